/* Reading columns of one chunk, in every physical layout that producers use: pyarrow has string and list, polars string views and large lists, and so on.
 * The offsets of a slice count: those of the chunk (which apply to its columns), of the column and of the list's values. */
#include "arrow.h"

#include <stdlib.h>
#include <string.h>

int64_t aqpy_column_find(const struct ArrowSchema *schema, const char *name) {
    for (int64_t i = 0; i < schema->n_children; i++)
        if (schema->children[i]->name && strcmp(schema->children[i]->name, name) == 0) return i;
    return -1;
}

/* ---- types ---- */

static bool is_one_of(const struct ArrowSchema *schema, const char *const *formats) {
    for (; !schema->dictionary && *formats; formats++)
        if (strcmp(schema->format, *formats) == 0) return true;
    return false;
}

bool aqpy_is_string(const struct ArrowSchema *schema) {
    static const char *const formats[] = {"u", "U", "vu", NULL};
    return is_one_of(schema, formats);
}

bool aqpy_is_binary(const struct ArrowSchema *schema) {
    static const char *const formats[] = {"z", "Z", "vz", NULL};
    return is_one_of(schema, formats);
}

static bool is_list(const char *format) { return strcmp(format, "+l") == 0 || strcmp(format, "+L") == 0 || strncmp(format, "+w:", 3) == 0; }

bool aqpy_is_list_of(const struct ArrowSchema *schema, const char *formats) {
    if (!is_list(schema->format) || schema->n_children != 1 || schema->dictionary) return false;
    const struct ArrowSchema *values = schema->children[0];
    return !values->dictionary && strlen(values->format) == 1 && strchr(formats, values->format[0]);
}

/* Nested at most `depth` deep; deeper is told by dots. */
static PyObject *type_name(const struct ArrowSchema *schema, int depth) {
    static const char *const names[][2] = {{"n", "null"},         {"b", "bool"},     {"c", "int8"},         {"C", "uint8"},        {"s", "int16"},
                                           {"S", "uint16"},       {"i", "int32"},    {"I", "uint32"},       {"l", "int64"},        {"L", "uint64"},
                                           {"e", "float16"},      {"f", "float32"},  {"g", "float64"},      {"z", "binary"},       {"Z", "large_binary"},
                                           {"vz", "binary_view"}, {"u", "string"},   {"U", "large_string"}, {"vu", "string_view"}, {"+s", "struct"},
                                           {"+m", "map"},         {"tdD", "date32"}, {"tdm", "date64"}};
    const char *format = schema->format;
    if (schema->dictionary) return PyUnicode_FromString("dictionary");
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        if (strcmp(format, names[i][0]) == 0) return PyUnicode_FromString(names[i][1]);
    bool has_child = (is_list(format) || strcmp(format, "+vl") == 0 || strcmp(format, "+vL") == 0) && schema->n_children == 1;
    if (!has_child) return PyUnicode_DecodeUTF8(format, (Py_ssize_t)strlen(format), "replace");
    PyObject *child = depth > 0 ? type_name(schema->children[0], depth - 1) : PyUnicode_FromString("…"), *name = NULL;
    if (!child) return NULL;
    if (strncmp(format, "+w:", 3) == 0)
        name = PyUnicode_FromFormat("fixed_size_list<%U>[%s]", child, format + 3);
    else
        name = PyUnicode_FromFormat("%s<%U>", strcmp(format, "+l") == 0 ? "list" : strcmp(format, "+L") == 0 ? "large_list" : "list_view", child);
    Py_DECREF(child);
    return name;
}

PyObject *aqpy_type_name(const struct ArrowSchema *schema) { return type_name(schema, 8); }

/* ---- values ---- */

void aqpy_column_open(aqpy_column *out, const struct ArrowSchema *schema, const struct ArrowArray *chunk, int64_t index) {
    const struct ArrowSchema *type = schema->children[index];
    *out = (aqpy_column){.layout = AQPY_VALUES, .chunk = chunk, .array = chunk->children[index], .value_format = type->format[0]};
    const char *format = type->format;
    if (strcmp(format, "n") == 0)
        out->layout = AQPY_NULLS;
    else if (strcmp(format, "u") == 0 || strcmp(format, "z") == 0)
        out->layout = AQPY_BYTES32;
    else if (strcmp(format, "U") == 0 || strcmp(format, "Z") == 0)
        out->layout = AQPY_BYTES64;
    else if (strcmp(format, "vu") == 0 || strcmp(format, "vz") == 0)
        out->layout = AQPY_BYTES_VIEW;
    else if (strcmp(format, "+l") == 0)
        out->layout = AQPY_LIST32;
    else if (strcmp(format, "+L") == 0)
        out->layout = AQPY_LIST64;
    else if (strncmp(format, "+w:", 3) == 0) {
        out->layout = AQPY_LIST_FIXED;
        out->fixed_size = strtoll(format + 3, NULL, 10);
    }
    if (is_list(format)) {
        out->values = out->array->children[0];
        out->value_format = type->children[0]->format[0];
    }
}

/* Bit `index` of an array's validity bitmap, its own offset not yet added. */
static bool is_null_at(const struct ArrowArray *array, int64_t index) {
    if (array->null_count == 0 || array->n_buffers == 0 || !array->buffers[0]) return false;
    uint64_t at = (uint64_t)(index + array->offset);
    return !(((const uint8_t *)array->buffers[0])[at / 8] >> (at % 8) & 1);
}

/* Index of the row in the column, before the column's own offset. */
static int64_t index_of(const aqpy_column *c, uint64_t row) { return (int64_t)row + c->chunk->offset; }

bool aqpy_column_is_null(const aqpy_column *c, uint64_t row) {
    return c->layout == AQPY_NULLS || is_null_at(c->chunk, (int64_t)row) || is_null_at(c->array, index_of(c, row));
}

/* Offsets i and i + 1 of a variable-size layout. */
static bool range_at(const aqpy_column *c, uint64_t row, bool wide, uint64_t *first, uint64_t *n) {
    uint64_t at = (uint64_t)(index_of(c, row) + c->array->offset);
    const void *offsets = c->array->buffers[1];
    int64_t begin, end;
    if (wide) {
        memcpy(&begin, (const int64_t *)offsets + at, 8);
        memcpy(&end, (const int64_t *)offsets + at + 1, 8);
    } else {
        int32_t pair[2];
        memcpy(pair, (const int32_t *)offsets + at, 8);
        begin = pair[0];
        end = pair[1];
    }
    *first = (uint64_t)begin;
    *n = (uint64_t)(end - begin);
    return begin >= 0 && end >= begin;
}

static bool view_at(const aqpy_column *c, uint64_t row, const char **bytes, uint64_t *n) {
    const char *view = (const char *)c->array->buffers[1] + 16 * (index_of(c, row) + c->array->offset);
    int32_t length, where[2];
    memcpy(&length, view, 4);
    memcpy(where, view + 8, 8); /* buffer, offset */
    if (length < 0) return false;
    *n = (uint64_t)length;
    *bytes = view + 4;
    if (length <= 12) return true;
    if (where[0] < 0 || where[0] >= c->array->n_buffers - 3 || where[1] < 0) return false;
    *bytes = (const char *)c->array->buffers[2 + where[0]] + where[1];
    return true;
}

bool aqpy_column_bytes(const aqpy_column *c, uint64_t row, const char **bytes, uint64_t *n) {
    if (c->layout == AQPY_BYTES_VIEW) return view_at(c, row, bytes, n);
    uint64_t first;
    if (!range_at(c, row, c->layout == AQPY_BYTES64, &first, n)) return false;
    *bytes = *n ? (const char *)c->array->buffers[2] + first : "";
    return true;
}

bool aqpy_column_list(const aqpy_column *c, uint64_t row, uint64_t *first, uint64_t *n) {
    if (c->layout == AQPY_LIST_FIXED) {
        *n = (uint64_t)c->fixed_size;
        *first = (uint64_t)(index_of(c, row) + c->array->offset) * *n;
    } else if (!range_at(c, row, c->layout == AQPY_LIST64, first, n)) {
        return false;
    }
    if (*first + *n > (uint64_t)c->values->length) return false;
    *first += (uint64_t)c->values->offset;
    return true;
}

bool aqpy_column_has_null(const aqpy_column *c, uint64_t first, uint64_t n) {
    if (c->value_format == 'n') return n > 0;
    if (c->values->null_count == 0) return false;
    for (uint64_t i = 0; i < n; i++)
        if (is_null_at(c->values, (int64_t)(first + i) - c->values->offset)) return true;
    return false;
}

const void *aqpy_column_data(const aqpy_column *c) {
    const struct ArrowArray *array = c->values ? c->values : c->array;
    return array->n_buffers > 1 ? array->buffers[1] : NULL;
}
