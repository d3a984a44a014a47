/* PyArrowQuantizedLayer: quantized layers in Arrow memory, readable by any Arrow library without a copy, and the way back to float32.
 *
 * It is made over the six columns of a result. Where the layers were coded for time groups, group g of G stands for the values [g*n/G, (g+1)*n/G) of the n
 * values of all layers in their order, as in quantize_layer_auto; without time groups there is one group, which is everything. */
#include "arrow.h"

#include <string.h>

#include <arrowquant/solve.h>

#include "base/mem.h"

/* One layer: pointers into the table's buffers. */
typedef struct layer_row {
    const char *name;
    uint64_t name_size;
    const uint8_t *codes;
    const float *scales, *zeros;
    const int64_t *shape;
    uint64_t ndim, rows, cols;
    uint64_t first; /* index of its first value among those of all layers */
    int bits;
} layer_row;

typedef struct layer {
    PyObject_HEAD
    aqpy_table table;
    PyObject *time_groups;    /* list of dict */
    PyObject *groups_by_name; /* of layers that have their own: dict name -> list of dict; or NULL */
    layer_row *rows;
    aqpy_spatial *spatial; /* by row, or NULL */
    uint64_t n_values, group_size;
} layer;

static layer *as_layer(PyObject *self) { return (layer *)self; }

/* ---- making ---- */

enum { NAME, CODES, SCALES, ZEROS, SHAPE, BITS, N_COLUMNS };
static const char *const column_names[N_COLUMNS] = {"layer_name", "quantized_data", "scales", "zero_points", "shape", "bit_width"};

static bool check_columns(const struct ArrowSchema *schema, int64_t *columns) {
    for (int i = 0; i < N_COLUMNS; i++) {
        columns[i] = aqpy_column_find(schema, column_names[i]);
        if (columns[i] < 0) {
            PyErr_Format(PyExc_ValueError, "Missing column '%s': not a quantized result", column_names[i]);
            return false;
        }
        const struct ArrowSchema *c = schema->children[columns[i]];
        bool good = i == NAME    ? aqpy_is_string(c)
                    : i == CODES ? aqpy_is_binary(c)
                    : i == SHAPE ? aqpy_is_list_of(c, "l")
                    : i == BITS  ? strlen(c->format) == 1 && strchr("cCsSiIlL", c->format[0])
                                 : aqpy_is_list_of(c, "f");
        if (good) continue;
        PyObject *type = aqpy_type_name(c);
        if (type) PyErr_Format(PyExc_ValueError, "Column '%s' has type %U: not a quantized result", column_names[i], type);
        Py_XDECREF(type);
        return false;
    }
    return true;
}

/* An integer column's value, of any width. */
static int64_t integer_at(const aqpy_column *c, uint64_t row) {
    uint64_t at = row + (uint64_t)c->chunk->offset + (uint64_t)c->array->offset;
    const char *data = aqpy_column_data(c);
    int8_t i8;
    int16_t i16;
    int32_t i32;
    int64_t i64;
    switch (c->value_format) {
    case 'c':
    case 'C': memcpy(&i8, data + at, 1); return i8;
    case 's':
    case 'S': memcpy(&i16, data + 2 * at, 2); return i16;
    case 'i':
    case 'I': memcpy(&i32, data + 4 * at, 4); return i32;
    default: memcpy(&i64, data + 8 * at, 8); return i64;
    }
}

static bool matrix_of(layer_row *r) {
    uint64_t rest = 1;
    bool empty = false;
    for (uint64_t i = 0; i < r->ndim; i++) {
        if (r->shape[i] < 0) return false;
        empty = empty || r->shape[i] == 0;
    }
    for (uint64_t i = r->ndim > 1; i < r->ndim && !empty; i++) {
        if (rest > INT64_MAX / (uint64_t)r->shape[i]) return false;
        rest *= (uint64_t)r->shape[i];
    }
    r->rows = r->ndim > 1 ? (uint64_t)r->shape[0] : 1;
    r->cols = empty ? 0 : rest;
    return true;
}

static bool fail_row(const aqpy_state *state, const layer_row *r, const char *what) {
    PyObject *name = PyUnicode_DecodeUTF8(r->name, (Py_ssize_t)r->name_size, "replace");
    if (name) PyErr_Format(aqpy_get(state, AQPY_FormatError), "Layer '%U': %s", name, what);
    Py_XDECREF(name);
    return false;
}

static bool read_row(const aqpy_state *state, const layer *self, const struct ArrowArray *chunk, uint64_t row, const int64_t *columns, layer_row *out) {
    aqpy_column c[N_COLUMNS];
    out->name = "";
    for (int i = 0; i < N_COLUMNS; i++) {
        aqpy_column_open(&c[i], &self->table.schema, chunk, columns[i]);
        if (!aqpy_column_is_null(&c[i], row)) continue;
        PyErr_Format(aqpy_get(state, AQPY_FormatError), "Null in column '%s' at row %llu", column_names[i], (unsigned long long)row);
        return false;
    }
    uint64_t n_codes, at[N_COLUMNS], n[N_COLUMNS];
    const char *codes;
    bool ok = aqpy_column_bytes(&c[NAME], row, &out->name, &out->name_size) && aqpy_column_bytes(&c[CODES], row, &codes, &n_codes);
    for (int i = SCALES; ok && i <= SHAPE; i++) ok = aqpy_column_list(&c[i], row, &at[i], &n[i]) && !aqpy_column_has_null(&c[i], at[i], n[i]);
    if (!ok) return fail_row(state, out, "damaged offsets, or a null in a list");
    out->codes = (const uint8_t *)codes;
    static const int64_t no_shape;
    out->ndim = n[SHAPE];
    out->shape = out->ndim ? (const int64_t *)aqpy_column_data(&c[SHAPE]) + at[SHAPE] : &no_shape;
    out->scales = n[SCALES] ? (const float *)aqpy_column_data(&c[SCALES]) + at[SCALES] : NULL;
    out->zeros = n[ZEROS] ? (const float *)aqpy_column_data(&c[ZEROS]) + at[ZEROS] : NULL;
    if ((uintptr_t)out->shape % _Alignof(int64_t) || (uintptr_t)out->scales % _Alignof(float) || (uintptr_t)out->zeros % _Alignof(float))
        return fail_row(state, out, "its Arrow buffers are not aligned");
    int64_t bits = integer_at(&c[BITS], row);
    if (bits != 2 && bits != 4 && bits != 8) return fail_row(state, out, "its bit width is not 2, 4 or 8");
    out->bits = (int)bits;
    if (!matrix_of(out)) return fail_row(state, out, "its shape has a negative dimension or is too large");
    aq_quant_spec spec = aqpy_array_spec(out->bits, self->group_size);
    aq_quant_layout layout;
    if (aq_quant_layout_init(&layout, &spec, out->rows, out->cols, NULL) != AQ_OK || n_codes != layout.codes_bytes || n[SCALES] != layout.n_groups ||
        n[ZEROS] != layout.n_groups)
        return fail_row(state, out, "its codes, scales or zero points do not have the sizes of its shape");
    return true;
}

static bool read_rows(const aqpy_state *state, layer *self) {
    int64_t columns[N_COLUMNS];
    if (!check_columns(&self->table.schema, columns)) return false;
    self->group_size = (uint64_t)aqpy_schema_number(&self->table.schema, "arrowquant.group_size", 128);
    self->rows = aq_calloc(self->table.n_rows, sizeof *self->rows);
    if (!self->rows) {
        PyErr_NoMemory();
        return false;
    }
    layer_row *r = self->rows;
    for (size_t i = 0; i < self->table.n_chunks; i++) {
        const struct ArrowArray *chunk = &self->table.chunks[i]->array;
        for (uint64_t row = 0; row < (uint64_t)chunk->length; row++, r++) {
            if (!read_row(state, self, chunk, row, columns, r)) return false;
            r->first = self->n_values;
            self->n_values += r->rows * r->cols;
        }
    }
    return true;
}

static layer *layer_make(const aqpy_state *state, PyTypeObject *type, aqpy_table *table, PyObject *time_groups) {
    allocfunc allocate = PyType_GetSlot(type, Py_tp_alloc);
    layer *self = (layer *)allocate(type, 0);
    if (!self) {
        aqpy_table_free(table);
        return NULL;
    }
    self->table = *table;
    memset(table, 0, sizeof *table);
    self->time_groups = time_groups && time_groups != Py_None ? PySequence_List(time_groups) : PyList_New(0);
    if (self->time_groups && read_rows(state, self)) return self;
    Py_DECREF(self);
    return NULL;
}

PyObject *aqpy_arrow_layer_new(const aqpy_state *state, aqpy_table *table, PyObject *time_groups) {
    return (PyObject *)layer_make(state, (PyTypeObject *)aqpy_get(state, AQPY_PyArrowQuantizedLayer), table, time_groups);
}

static PyObject *layer_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"data", "time_group_params", NULL};
    PyObject *data, *time_groups = NULL;
    const aqpy_state *state = aqpy_state_of_type(type);
    aqpy_table table;
    if (!state || !aqpy_parse(args, kwargs, "O|$O:PyArrowQuantizedLayer", names, &data, &time_groups) || !aqpy_table_import(&table, data)) return NULL;
    return (PyObject *)layer_make(state, type, &table, time_groups);
}

static void spatial_free(aqpy_spatial *spatial, uint64_t n) {
    for (uint64_t i = 0; spatial && i < n; i++) aq_free(spatial[i].scales);
    aq_free(spatial);
}

void aqpy_arrow_layer_extend(PyObject *object, aqpy_spatial *spatial, PyObject *groups_by_name) {
    layer *self = as_layer(object);
    spatial_free(self->spatial, self->table.n_rows);
    self->spatial = spatial;
    Py_XDECREF(self->groups_by_name);
    self->groups_by_name = Py_XNewRef(groups_by_name);
}

static int layer_traverse(PyObject *self, visitproc visit, void *arg) {
    Py_VISIT(as_layer(self)->time_groups);
    Py_VISIT(as_layer(self)->groups_by_name);
    Py_VISIT(Py_TYPE(self));
    return 0;
}

static int layer_clear(PyObject *self) {
    Py_CLEAR(as_layer(self)->time_groups);
    Py_CLEAR(as_layer(self)->groups_by_name);
    return 0;
}

static void layer_dealloc(PyObject *self) {
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    layer_clear(self);
    spatial_free(as_layer(self)->spatial, as_layer(self)->table.n_rows);
    aqpy_table_free(&as_layer(self)->table);
    aq_free(as_layer(self)->rows);
    freefunc release = PyType_GetSlot(type, Py_tp_free);
    release(self);
    Py_DECREF(type);
}

/* The examples of the methods start with this. */
#define LAYER_EXAMPLE                                                                                                                                          \
    ">>> import pyarrow as pa\n"                                                                                                                               \
    ">>> from arrow_quant_v2 import ArrowQuantV2, PyArrowQuantizedLayer\n"                                                                                     \
    ">>> t = pa.table({'layer_name': ['w'], 'weights': [[0.0, 1.0, 2.0, 3.0]], 'shape': [[2, 2]]})\n"                                                          \
    ">>> layer = PyArrowQuantizedLayer(ArrowQuantV2().quantize_arrow(t, bit_width=2))\n"

/* ---- values ---- */

static PyObject *shape_of(const layer_row *r) {
    PyObject *list = PyList_New((Py_ssize_t)r->ndim);
    for (uint64_t i = 0; list && i < r->ndim; i++)
        if (PyList_SetItem(list, (Py_ssize_t)i, PyLong_FromLongLong(r->shape[i])) < 0) Py_CLEAR(list);
    return list;
}

/* Writes the values of one layer; called without the GIL. */
static aq_status fill(const layer *self, const layer_row *r, int n_threads, float *out, aq_error *err) {
    aq_quant_spec spec = aqpy_array_spec(r->bits, self->group_size);
    aq_status status = aq_batch_dequantize(&spec, r->rows, r->cols, r->codes, r->scales, r->zeros, n_threads, out, err);
    const aqpy_spatial *spatial = self->spatial ? &self->spatial[r - self->rows] : NULL;
    if (status != AQ_OK || !spatial) return status;
    if (spatial->hadamard) aq_hadamard(out, r->rows, r->cols, spatial->hadamard);
    if (spatial->scales) aq_scale_columns(out, r->rows, r->cols, spatial->scales, false);
    return AQ_OK;
}

/* Writes the values [begin, end) of all layers; those that lie partly in it go through a block of their own. */
static aq_status fill_range(const layer *self, uint64_t begin, uint64_t end, float *out, aq_error *err) {
    for (uint64_t i = 0; i < self->table.n_rows; i++) {
        const layer_row *r = &self->rows[i];
        uint64_t n = r->rows * r->cols, from = r->first > begin ? r->first : begin, to = r->first + n < end ? r->first + n : end;
        if (from >= to) continue;
        bool whole = to - from == n;
        float *block = whole ? out + (r->first - begin) : aq_alloc(n * sizeof(float));
        if (!block) {
            *err = (aq_error){.code = AQ_ERR_MEMORY, .message = "not enough memory"};
            return AQ_ERR_MEMORY;
        }
        aq_status status = fill(self, r, 0, block, err);
        if (!whole) {
            if (status == AQ_OK) memcpy(out + (from - begin), block + (from - r->first), (to - from) * sizeof(float));
            aq_free(block);
        }
        if (status != AQ_OK) return status;
    }
    return AQ_OK;
}

/* Steals `buffer`, which holds n floats: an array, or a flat list. */
static PyObject *give(PyObject *buffer, const float *data, uint64_t n, bool as_numpy) {
    PyObject *maker = as_numpy ? aqpy_array_maker() : NULL, *values = NULL;
    if (maker)
        values = aqpy_buffer_as_array(Py_NewRef(buffer), maker);
    else if (!as_numpy)
        values = aqpy_list_of_floats(data, n);
    Py_XDECREF(maker);
    Py_DECREF(buffer);
    return values;
}

/* A new buffer in the layer's shape with its values. */
static PyObject *dequantize_row(const aqpy_state *state, const layer *self, const layer_row *r, int n_threads, void **data) {
    PyObject *buffer = aqpy_buffer_new(state, 'f', r->rows * r->cols, data), *shape = buffer ? shape_of(r) : NULL;
    int failed = shape ? aqpy_buffer_reshape(buffer, shape) : -1;
    Py_XDECREF(shape);
    if (failed == 0) {
        aq_error err = {0};
        aq_status status;
        Py_BEGIN_ALLOW_THREADS
        status = fill(self, r, n_threads, *data, &err);
        Py_END_ALLOW_THREADS
        if (status != AQ_OK) aqpy_raise(state, &err);
        failed = status != AQ_OK;
    }
    if (failed) Py_CLEAR(buffer);
    return buffer;
}

static PyObject *name_of(const layer_row *r) { return PyUnicode_DecodeUTF8(r->name, (Py_ssize_t)r->name_size, "replace"); }

PyDoc_STRVAR(dequantize_doc,
             "dequantize($self, name, *, as_numpy=False)\n--\n\n"
             "Values of one layer: a flat list of float, or with as_numpy=True a float32 array in its shape. KeyError for an unknown name.\n\n" LAYER_EXAMPLE
             ">>> layer.dequantize('w', as_numpy=True).shape\n"
             "(2, 2)\n");
static PyObject *layer_dequantize(PyObject *object, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"name", "as_numpy", NULL};
    const layer *self = as_layer(object);
    const char *name;
    Py_ssize_t size;
    int as_numpy = 0;
    const aqpy_state *state = aqpy_state_of_type(Py_TYPE(object));
    if (!state || !aqpy_parse(args, kwargs, "s#|$p:dequantize", names, &name, &size, &as_numpy)) return NULL;
    for (uint64_t i = 0; i < self->table.n_rows; i++) {
        const layer_row *r = &self->rows[i];
        if (r->name_size != (uint64_t)size || memcmp(r->name, name, (size_t)size) != 0) continue;
        void *data;
        PyObject *buffer = dequantize_row(state, self, r, 0, &data);
        return buffer ? give(buffer, data, r->rows * r->cols, as_numpy) : NULL;
    }
    return PyErr_Format(PyExc_KeyError, "No layer '%s'", name);
}

PyObject *aqpy_arrow_dequantize(const aqpy_state *state, PyObject *object, bool as_numpy, int n_threads) {
    aqpy_table table;
    layer *self = NULL;
    if (PyObject_TypeCheck(object, (PyTypeObject *)aqpy_get(state, AQPY_PyArrowQuantizedLayer)))
        self = (layer *)Py_NewRef(object); /* it knows more than its columns */
    else if (aqpy_table_import(&table, object))
        self = (layer *)aqpy_arrow_layer_new(state, &table, NULL);
    if (!self) return NULL;
    PyObject *maker = as_numpy ? aqpy_array_maker() : Py_NewRef((PyObject *)&PyMemoryView_Type), *arrays = maker ? PyDict_New() : NULL;
    for (uint64_t i = 0; arrays && i < self->table.n_rows; i++) {
        void *data;
        PyObject *name = PyErr_CheckSignals() == 0 ? name_of(&self->rows[i]) : NULL,
                 *array = name ? dequantize_row(state, self, &self->rows[i], n_threads, &data) : NULL;
        array = aqpy_buffer_as_array(array, maker);
        if (!array || PyDict_SetItem(arrays, name, array) < 0) Py_CLEAR(arrays);
        Py_XDECREF(name);
        Py_XDECREF(array);
    }
    Py_XDECREF(maker);
    Py_XDECREF((PyObject *)self);
    return arrays;
}

/* ---- time groups ---- */

static uint64_t n_groups(const layer *self) {
    Py_ssize_t n = PyList_Size(self->time_groups);
    return n > 0 ? (uint64_t)n : 1;
}

static PyObject *group_values(const aqpy_state *state, const layer *self, uint64_t group, bool as_numpy) {
    uint64_t n = self->n_values, groups = n_groups(self);
    uint64_t begin = n / groups * group + n % groups * group / groups, end = n / groups * (group + 1) + n % groups * (group + 1) / groups;
    void *data;
    PyObject *buffer = aqpy_buffer_new(state, 'f', end - begin, &data);
    if (!buffer) return NULL;
    aq_error err = {0};
    aq_status status;
    Py_BEGIN_ALLOW_THREADS
    status = fill_range(self, begin, end, data, &err);
    Py_END_ALLOW_THREADS
    if (status == AQ_OK) return give(buffer, data, end - begin, as_numpy);
    Py_DECREF(buffer);
    return aqpy_raise(state, &err);
}

PyDoc_STRVAR(group_doc,
             "dequantize_group($self, group_id, *, as_numpy=False)\n--\n\n"
             "Values of one time group: a list of float, or with as_numpy=True a float32 array. ValueError with the valid range for a bad id.\n\n"
             "Group g of G holds the values g*n//G to (g+1)*n//G of the n values of all layers; without time groups, group 0 holds all.\n\n" LAYER_EXAMPLE
             ">>> layer.dequantize_group(0)\n"
             "[0.0, 1.0, 2.0, 3.0]\n");
static PyObject *layer_group(PyObject *object, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"group_id", "as_numpy", NULL};
    PyObject *id;
    int as_numpy = 0, overflow = 0;
    const aqpy_state *state = aqpy_state_of_type(Py_TYPE(object));
    if (!state || !aqpy_parse(args, kwargs, "O|$p:dequantize_group", names, &id, &as_numpy)) return NULL;
    PyObject *integer = PyNumber_Index(id);
    if (!integer) return NULL;
    long long group = PyLong_AsLongLongAndOverflow(integer, &overflow);
    uint64_t groups = n_groups(as_layer(object));
    if (overflow || group < 0 || (uint64_t)group >= groups) {
        PyErr_Format(PyExc_ValueError, "Invalid group_id: %S. Must be between 0 and %llu", integer, (unsigned long long)(groups - 1));
        Py_DECREF(integer);
        return NULL;
    }
    Py_DECREF(integer);
    return group_values(state, as_layer(object), (uint64_t)group, as_numpy);
}

PyDoc_STRVAR(all_groups_doc,
             "dequantize_all_groups($self, *, as_numpy=False)\n--\n\nList of the values of every time group, see dequantize_group.\n\n" LAYER_EXAMPLE
             ">>> layer.dequantize_all_groups()\n"
             "[[0.0, 1.0, 2.0, 3.0]]\n");
static PyObject *layer_all_groups(PyObject *object, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"as_numpy", NULL};
    int as_numpy = 0;
    const aqpy_state *state = aqpy_state_of_type(Py_TYPE(object));
    if (!state || !aqpy_parse(args, kwargs, "|$p:dequantize_all_groups", names, &as_numpy)) return NULL;
    PyObject *all = PyList_New(0);
    for (uint64_t g = 0; all && g < n_groups(as_layer(object)); g++) {
        PyObject *values = group_values(state, as_layer(object), g, as_numpy);
        if (!values || PyList_Append(all, values) < 0) Py_CLEAR(all);
        Py_XDECREF(values);
    }
    return all;
}

static PyObject *layer_names(PyObject *object, void *unused) {
    (void)unused;
    const layer *self = as_layer(object);
    PyObject *list = PyList_New((Py_ssize_t)self->table.n_rows);
    for (uint64_t i = 0; list && i < self->table.n_rows; i++) {
        PyObject *name = name_of(&self->rows[i]);
        if (!name || PyList_SetItem(list, (Py_ssize_t)i, name) < 0) Py_CLEAR(list);
    }
    return list;
}

PyDoc_STRVAR(params_doc, "get_time_group_params($self, layer=None)\n--\n\n"
                         "List of dict scale, zero_point, group_size, time_range (start, end), one per time group; empty where the layers have none.\n\n"
                         "layer: name of the layer whose input they code; None: the first that has some. KeyError for an unknown name.\n\n" LAYER_EXAMPLE
                         ">>> layer.get_time_group_params()\n"
                         "[]\n");
static PyObject *layer_params(PyObject *object, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"layer", NULL};
    PyObject *name = Py_None, *empty = NULL;
    const layer *self = as_layer(object);
    if (!aqpy_parse(args, kwargs, "|O:get_time_group_params", names, &name)) return NULL;
    PyObject *groups = self->time_groups;
    if (name != Py_None) {
        PyObject *own = layer_names(object, NULL);
        int found = own ? PySequence_Contains(own, name) : -1;
        Py_XDECREF(own);
        if (found == 0) PyErr_Format(PyExc_KeyError, "No layer %R", name);
        if (found != 1) return NULL;
        if (self->groups_by_name) groups = PyDict_GetItemWithError(self->groups_by_name, name);
        if (!groups && (PyErr_Occurred() || !(groups = empty = PyList_New(0)))) return NULL;
    }
    PyObject *copy = PyList_New(0);
    for (Py_ssize_t i = 0; copy && i < PyList_Size(groups); i++) {
        PyObject *group = PyDict_New(); /* a copy: what a caller does to it does not come back */
        if (!group || PyDict_Update(group, PyList_GetItem(groups, i)) < 0 || PyList_Append(copy, group) < 0) Py_CLEAR(copy);
        Py_XDECREF(group);
    }
    Py_XDECREF(empty);
    return copy;
}

/* ---- Arrow ---- */

static bool is_one_chunk(const layer *self) {
    if (self->table.n_chunks == 1) return true;
    PyErr_Format(PyExc_ValueError, "The layers lie in %zu chunks, which one record batch cannot hold; use __arrow_c_stream__ or pyarrow.table()",
                 self->table.n_chunks);
    return false;
}

PyDoc_STRVAR(c_array_doc,
             "__arrow_c_array__($self, requested_schema=None)\n--\n\nCapsules of the schema and the array (Arrow PyCapsule interface), without a copy.\n");
static PyObject *layer_c_array(PyObject *object, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"requested_schema", NULL};
    PyObject *requested = NULL;
    const layer *self = as_layer(object);
    if (!aqpy_parse(args, kwargs, "|O:__arrow_c_array__", names, &requested) || !is_one_chunk(self)) return NULL;
    PyObject *schema = aqpy_table_schema_capsule(&self->table), *array = schema ? aqpy_table_array_capsule(&self->table) : NULL;
    if (array) return Py_BuildValue("(NN)", schema, array);
    Py_XDECREF(schema);
    return NULL;
}

PyDoc_STRVAR(c_stream_doc,
             "__arrow_c_stream__($self, requested_schema=None)\n--\n\nCapsule of a stream of all chunks (Arrow PyCapsule interface), without a copy.\n");
static PyObject *layer_c_stream(PyObject *object, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"requested_schema", NULL};
    PyObject *requested = NULL;
    if (!aqpy_parse(args, kwargs, "|O:__arrow_c_stream__", names, &requested)) return NULL;
    return aqpy_table_stream_capsule(&as_layer(object)->table);
}

PyDoc_STRVAR(to_pyarrow_doc, "to_pyarrow($self)\n--\n\nA pyarrow.RecordBatch over the same memory.\n\n" LAYER_EXAMPLE ">>> layer.to_pyarrow().num_rows\n"
                             "1\n");
static PyObject *layer_to_pyarrow(PyObject *object, PyObject *unused) {
    (void)unused;
    PyObject *pyarrow = is_one_chunk(as_layer(object)) ? PyImport_ImportModule("pyarrow") : NULL;
    PyObject *batch = pyarrow ? PyObject_CallMethod(pyarrow, "record_batch", "O", object) : NULL;
    Py_XDECREF(pyarrow);
    return batch;
}

static Py_ssize_t layer_length(PyObject *object) { return (Py_ssize_t)as_layer(object)->n_values; }

static PyObject *layer_repr(PyObject *object) {
    const layer *self = as_layer(object);
    return PyUnicode_FromFormat("<PyArrowQuantizedLayer: %llu layers, %llu weights, %zd time groups>", (unsigned long long)self->table.n_rows,
                                (unsigned long long)self->n_values, PyList_Size(self->time_groups));
}

PyDoc_STRVAR(layer_doc, "PyArrowQuantizedLayer(data, *, time_group_params=None)\n--\n\n"
                        "Quantized layers in Arrow memory, readable by any Arrow library without a copy.\n\n"
                        "data: an Arrow result (the six columns of quantize_arrow), of any Arrow library. len() is the number of weights.\n"
                        "Raises ValueError where a column is missing or of another type, FormatError where sizes do not agree.\n\n" LAYER_EXAMPLE
                        ">>> layer.layers, len(layer), layer.dequantize('w')\n"
                        "(['w'], 4, [0.0, 1.0, 2.0, 3.0])\n");

#define KEYWORDS(function) (PyCFunction)(void (*)(void))(function), METH_VARARGS | METH_KEYWORDS
static PyMethodDef methods[] = {
    {"to_pyarrow", layer_to_pyarrow, METH_NOARGS, to_pyarrow_doc},  {"dequantize", KEYWORDS(layer_dequantize), dequantize_doc},
    {"dequantize_group", KEYWORDS(layer_group), group_doc},         {"dequantize_all_groups", KEYWORDS(layer_all_groups), all_groups_doc},
    {"get_time_group_params", KEYWORDS(layer_params), params_doc},  {"__arrow_c_array__", KEYWORDS(layer_c_array), c_array_doc},
    {"__arrow_c_stream__", KEYWORDS(layer_c_stream), c_stream_doc}, {NULL, NULL, 0, NULL},
};
static PyGetSetDef properties[] = {{"layers", layer_names, NULL, "Names of the layers, in row order.", NULL}, {NULL, NULL, NULL, NULL, NULL}};
static PyType_Slot slots[] = {
    {Py_tp_doc, (void *)layer_doc}, {Py_tp_new, layer_new},     {Py_tp_dealloc, layer_dealloc}, {Py_tp_traverse, layer_traverse}, {Py_tp_clear, layer_clear},
    {Py_tp_methods, methods},       {Py_tp_getset, properties}, {Py_tp_repr, layer_repr},       {Py_sq_length, layer_length},     {0, NULL},
};
static PyType_Spec spec = {"arrow_quant_v2.PyArrowQuantizedLayer", sizeof(layer), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC, slots};

int aqpy_add_arrow_layer(PyObject *module) { return aqpy_add_type(module, AQPY_PyArrowQuantizedLayer, &spec); }
