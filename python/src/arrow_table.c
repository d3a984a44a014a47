/* Tables in and out by the Arrow PyCapsule interface.
 *
 * A chunk that came in, or that we built, has one owner by the rules of the C data interface. It is kept in a counted holder; what goes out are nodes that
 * point to the same buffers and hold the holder, so any consumer may keep, move or release any of them, on any thread, and no value is ever copied. */
#include "arrow.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/mem.h"

/* ---- chunks ---- */

static void chunk_release(aqpy_chunk *chunk) {
    if (atomic_fetch_sub(&chunk->refs, 1) != 1) return;
    if (chunk->array.release) chunk->array.release(&chunk->array);
    aq_free(chunk);
}

void aqpy_table_free(aqpy_table *table) {
    for (size_t i = 0; i < table->n_chunks; i++) chunk_release(table->chunks[i]);
    aq_free(table->chunks);
    if (table->schema.release) table->schema.release(&table->schema);
    memset(table, 0, sizeof *table);
}

bool aqpy_table_append(aqpy_table *table, struct ArrowArray *array) {
    aqpy_chunk *chunk = aq_alloc(sizeof *chunk);
    bool must_grow = (table->n_chunks & (table->n_chunks - 1)) == 0; /* room for a power of two */
    uint64_t room = table->n_chunks ? 2 * (uint64_t)table->n_chunks : 1;
    aqpy_chunk **chunks = !must_grow ? table->chunks : chunk ? aq_realloc(table->chunks, room, sizeof *chunks) : NULL;
    if (chunks) table->chunks = chunks;
    if (!chunk || !chunks) {
        aq_free(chunk);
        PyErr_NoMemory();
        return false;
    }
    atomic_init(&chunk->refs, 1);
    chunk->array = *array;
    array->release = NULL;
    table->chunks[table->n_chunks++] = chunk;
    table->n_rows += (uint64_t)chunk->array.length;
    return true;
}

/* ---- schema ---- */

static void schema_release(struct ArrowSchema *schema) {
    for (int64_t i = 0; i < schema->n_children; i++) {
        if (schema->children[i]->release) schema->children[i]->release(schema->children[i]);
        aq_free(schema->children[i]);
    }
    if (schema->dictionary) {
        if (schema->dictionary->release) schema->dictionary->release(schema->dictionary);
        aq_free(schema->dictionary);
    }
    aq_free(schema->children);
    aq_free((void *)(uintptr_t)schema->format);
    aq_free((void *)(uintptr_t)schema->name);
    aq_free((void *)(uintptr_t)schema->metadata);
    schema->release = NULL;
}

bool aqpy_schema_init(struct ArrowSchema *out, const char *format, const char *name, int64_t n_children) {
    *out = (struct ArrowSchema){.flags = ARROW_FLAG_NULLABLE, .release = schema_release};
    out->format = aq_strdup(format);
    out->name = aq_strdup(name ? name : "");
    out->children = aq_calloc((uint64_t)n_children, sizeof *out->children);
    bool ok = out->format && out->name && out->children;
    while (ok && out->n_children < n_children) {
        out->children[out->n_children] = aq_calloc(1, sizeof **out->children);
        ok = out->children[out->n_children] != NULL;
        out->n_children += ok;
    }
    if (!ok) schema_release(out);
    return ok;
}

/* Length of a metadata block: int32 number of pairs, each an int32 length and bytes, twice. */
static size_t metadata_size(const char *metadata) {
    int32_t n, length;
    size_t at = 4;
    memcpy(&n, metadata, 4);
    for (int64_t i = 0; i < 2 * (int64_t)n; i++) {
        memcpy(&length, metadata + at, 4);
        at += 4 + (size_t)length;
    }
    return at;
}

int64_t aqpy_schema_number(const struct ArrowSchema *schema, const char *key, int64_t otherwise) {
    if (!schema->metadata) return otherwise;
    const char *at = schema->metadata;
    int32_t n, key_size, value_size;
    memcpy(&n, at, 4);
    at += 4;
    for (int32_t i = 0; i < n; i++) {
        memcpy(&key_size, at, 4);
        const char *name = at + 4;
        at = name + key_size;
        memcpy(&value_size, at, 4);
        const char *value = at + 4;
        at = value + value_size;
        if ((size_t)key_size != strlen(key) || memcmp(name, key, (size_t)key_size) != 0) continue;
        int64_t number = 0;
        for (int32_t d = 0; d < value_size && number < INT64_MAX / 100; d++) {
            if (value[d] < '0' || value[d] > '9') return otherwise;
            number = number * 10 + (value[d] - '0');
        }
        return value_size > 0 ? number : otherwise;
    }
    return otherwise;
}

bool aqpy_schema_copy(struct ArrowSchema *out, const struct ArrowSchema *from) {
    if (!aqpy_schema_init(out, from->format, from->name, from->n_children)) return false;
    out->flags = from->flags;
    bool ok = true;
    if (from->metadata) {
        size_t size = metadata_size(from->metadata);
        char *metadata = aq_alloc(size);
        ok = metadata != NULL;
        if (ok) memcpy(metadata, from->metadata, size);
        out->metadata = metadata;
    }
    for (int64_t i = 0; ok && i < from->n_children; i++) ok = aqpy_schema_copy(out->children[i], from->children[i]);
    if (ok && from->dictionary) {
        out->dictionary = aq_calloc(1, sizeof *out->dictionary);
        ok = out->dictionary && aqpy_schema_copy(out->dictionary, from->dictionary);
    }
    if (!ok) schema_release(out);
    return ok;
}

/* ---- taking ---- */

/* What a capsule of that name holds; TypeError, naming the method, for anything else. */
static void *pointer_of(PyObject *object, const char *name, const char *method) {
    if (PyCapsule_IsValid(object, name)) return PyCapsule_GetPointer(object, name);
    PyObject *type = PyType_GetName(Py_TYPE(object));
    if (type && PyCapsule_CheckExact(object))
        PyErr_Format(PyExc_TypeError, "%s must give a capsule named '%s', got one of another name", method, name);
    else if (type)
        PyErr_Format(PyExc_TypeError, "%s must give a capsule named '%s', got %U", method, name, type);
    Py_XDECREF(type);
    return NULL;
}

/* A producer's structure without a release function was moved out of its capsule before. */
static bool is_used_up(bool used_up, const char *method) {
    if (used_up) PyErr_Format(PyExc_ValueError, "%s gave a capsule whose data was taken already", method);
    return used_up;
}

static bool take_array(aqpy_table *out, PyObject *object) {
    PyObject *pair = PyObject_CallMethod(object, "__arrow_c_array__", NULL);
    if (!pair) return false;
    struct ArrowSchema *schema = NULL;
    struct ArrowArray *array = NULL;
    if (PyTuple_Check(pair) && PyTuple_Size(pair) == 2) {
        schema = pointer_of(PyTuple_GetItem(pair, 0), "arrow_schema", "__arrow_c_array__");
        array = schema ? pointer_of(PyTuple_GetItem(pair, 1), "arrow_array", "__arrow_c_array__") : NULL;
    } else {
        PyObject *type = PyType_GetName(Py_TYPE(pair));
        if (type) PyErr_Format(PyExc_TypeError, "__arrow_c_array__ must give two capsules, got %U", type);
        Py_XDECREF(type);
    }
    bool ok = array && !is_used_up(!schema->release || !array->release, "__arrow_c_array__");
    if (ok) {
        out->schema = *schema;
        schema->release = NULL;
        ok = aqpy_table_append(out, array);
    }
    Py_DECREF(pair);
    return ok;
}

static bool fail_stream(struct ArrowArrayStream *stream, int code) {
    const char *text = stream->get_last_error ? stream->get_last_error(stream) : NULL;
    if (!PyErr_Occurred()) PyErr_Format(PyExc_OSError, "the Arrow stream failed: %s", text ? text : strerror(code));
    return false;
}

static bool take_stream(aqpy_table *out, PyObject *object) {
    PyObject *capsule = PyObject_CallMethod(object, "__arrow_c_stream__", NULL);
    struct ArrowArrayStream *stream = capsule ? pointer_of(capsule, "arrow_array_stream", "__arrow_c_stream__") : NULL;
    bool ok = stream && !is_used_up(!stream->release, "__arrow_c_stream__");
    if (ok) {
        int code = stream->get_schema(stream, &out->schema);
        ok = code == 0 || fail_stream(stream, code);
    }
    while (ok) {
        struct ArrowArray array = {0};
        int code;
        /* The producer may need the GIL on threads of its own (duckdb): it must not be ours while we wait. */
        Py_BEGIN_ALLOW_THREADS
        code = stream->get_next(stream, &array);
        Py_END_ALLOW_THREADS
        if (code != 0)
            ok = fail_stream(stream, code);
        else if (!array.release)
            break;
        else
            ok = aqpy_table_append(out, &array);
        if (array.release) array.release(&array);
    }
    Py_XDECREF(capsule); /* releases the stream */
    return ok;
}

bool aqpy_table_import(aqpy_table *out, PyObject *object) {
    memset(out, 0, sizeof *out);
    bool is_type = PyType_Check(object), ok = false;
    if (!is_type && PyObject_HasAttrString(object, "__arrow_c_stream__")) {
        ok = take_stream(out, object);
    } else if (!is_type && PyObject_HasAttrString(object, "__arrow_c_array__")) {
        ok = take_array(out, object);
    } else {
        PyObject *type = PyType_GetName(Py_TYPE(object));
        if (type)
            PyErr_Format(PyExc_TypeError, "Expected a pyarrow.Table, a pyarrow.RecordBatch or an object with __arrow_c_stream__ or __arrow_c_array__, got %U",
                         type);
        Py_XDECREF(type);
    }
    if (ok && strcmp(out->schema.format, "+s") != 0) {
        PyObject *type = aqpy_type_name(&out->schema);
        if (type) PyErr_Format(PyExc_TypeError, "Expected a table (an Arrow struct of columns), got Arrow data of type %U", type);
        Py_XDECREF(type);
        ok = false;
    }
    if (!ok) aqpy_table_free(out);
    return ok;
}

/* ---- giving ---- */

static void exported_release(struct ArrowArray *array) {
    for (int64_t i = 0; i < array->n_children; i++) {
        if (array->children[i]->release) array->children[i]->release(array->children[i]);
        aq_free(array->children[i]);
    }
    aq_free(array->children);
    if (array->dictionary) {
        if (array->dictionary->release) array->dictionary->release(array->dictionary);
        aq_free(array->dictionary);
    }
    chunk_release(array->private_data);
    array->release = NULL;
}

/* A node like `from` that shares its buffers and holds the chunk. */
static bool export_array(struct ArrowArray *out, const struct ArrowArray *from, aqpy_chunk *chunk) {
    *out = *from;
    out->private_data = chunk;
    out->release = exported_release;
    out->n_children = 0;
    out->dictionary = NULL;
    atomic_fetch_add(&chunk->refs, 1);
    out->children = aq_calloc((uint64_t)from->n_children, sizeof *out->children);
    bool ok = out->children != NULL;
    for (int64_t i = 0; ok && i < from->n_children; i++) {
        out->children[i] = aq_calloc(1, sizeof **out->children);
        ok = out->children[i] != NULL;
        out->n_children += ok;
        ok = ok && export_array(out->children[i], from->children[i], chunk);
    }
    if (ok && from->dictionary) {
        out->dictionary = aq_calloc(1, sizeof *out->dictionary);
        ok = out->dictionary && export_array(out->dictionary, from->dictionary, chunk);
    }
    if (!ok) exported_release(out);
    return ok;
}

static void schema_capsule_free(PyObject *capsule) {
    struct ArrowSchema *schema = PyCapsule_GetPointer(capsule, "arrow_schema");
    if (schema->release) schema->release(schema);
    aq_free(schema);
}

static void array_capsule_free(PyObject *capsule) {
    struct ArrowArray *array = PyCapsule_GetPointer(capsule, "arrow_array");
    if (array->release) array->release(array);
    aq_free(array);
}

static void stream_capsule_free(PyObject *capsule) {
    struct ArrowArrayStream *stream = PyCapsule_GetPointer(capsule, "arrow_array_stream");
    if (stream->release) stream->release(stream);
    aq_free(stream);
}

PyObject *aqpy_table_schema_capsule(const aqpy_table *table) {
    struct ArrowSchema *schema = aq_calloc(1, sizeof *schema);
    if (!schema || !aqpy_schema_copy(schema, &table->schema)) {
        aq_free(schema);
        return PyErr_NoMemory();
    }
    PyObject *capsule = PyCapsule_New(schema, "arrow_schema", schema_capsule_free);
    if (capsule) return capsule;
    schema->release(schema);
    aq_free(schema);
    return NULL;
}

PyObject *aqpy_table_array_capsule(const aqpy_table *table) {
    struct ArrowArray *array = aq_calloc(1, sizeof *array);
    if (!array || !export_array(array, &table->chunks[0]->array, table->chunks[0])) {
        aq_free(array);
        return PyErr_NoMemory();
    }
    PyObject *capsule = PyCapsule_New(array, "arrow_array", array_capsule_free);
    if (capsule) return capsule;
    array->release(array);
    aq_free(array);
    return NULL;
}

/* ---- stream ---- */

typedef struct stream_state {
    struct ArrowSchema schema;
    aqpy_chunk **chunks;
    size_t n_chunks, next;
} stream_state;

static int stream_schema(struct ArrowArrayStream *stream, struct ArrowSchema *out) {
    const stream_state *s = stream->private_data;
    return aqpy_schema_copy(out, &s->schema) ? 0 : ENOMEM;
}

static int stream_next(struct ArrowArrayStream *stream, struct ArrowArray *out) {
    stream_state *s = stream->private_data;
    if (s->next == s->n_chunks) {
        memset(out, 0, sizeof *out); /* the end */
        return 0;
    }
    aqpy_chunk *chunk = s->chunks[s->next];
    if (!export_array(out, &chunk->array, chunk)) return ENOMEM;
    s->next++;
    return 0;
}

static const char *stream_error(struct ArrowArrayStream *stream) {
    (void)stream;
    return "out of memory"; /* the only way to fail */
}

static void stream_release(struct ArrowArrayStream *stream) {
    stream_state *s = stream->private_data;
    for (size_t i = 0; i < s->n_chunks; i++) chunk_release(s->chunks[i]);
    if (s->schema.release) s->schema.release(&s->schema);
    aq_free(s->chunks);
    aq_free(s);
    stream->release = NULL;
}

PyObject *aqpy_table_stream_capsule(const aqpy_table *table) {
    struct ArrowArrayStream *stream = aq_calloc(1, sizeof *stream);
    stream_state *s = aq_calloc(1, sizeof *s);
    if (!stream || !s) goto fail;
    *stream = (struct ArrowArrayStream){stream_schema, stream_next, stream_error, stream_release, s};
    s->chunks = aq_calloc(table->n_chunks, sizeof *s->chunks);
    if (!s->chunks || !aqpy_schema_copy(&s->schema, &table->schema)) {
        stream_release(stream);
        s = NULL;
        goto fail;
    }
    for (; s->n_chunks < table->n_chunks; s->n_chunks++) {
        s->chunks[s->n_chunks] = table->chunks[s->n_chunks];
        atomic_fetch_add(&s->chunks[s->n_chunks]->refs, 1);
    }
    PyObject *capsule = PyCapsule_New(stream, "arrow_array_stream", stream_capsule_free);
    if (capsule) return capsule;
    stream_release(stream);
    aq_free(stream);
    return NULL;
fail:
    aq_free(s);
    aq_free(stream);
    return PyErr_NoMemory();
}
