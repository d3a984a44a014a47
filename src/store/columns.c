/* Reading one column of one row group through carquet, with every count checked against the rows first. */
#include "store/store_internal.h"

#include <string.h>

#include "base/mem.h"

static size_t size_of(carquet_physical_type_t type) {
    switch (type) {
    case CARQUET_PHYSICAL_BOOLEAN: return 1;
    case CARQUET_PHYSICAL_INT32:
    case CARQUET_PHYSICAL_FLOAT: return 4;
    case CARQUET_PHYSICAL_BYTE_ARRAY: return sizeof(carquet_byte_array_t);
    default: return 8;
    }
}

static aq_status fail_column(aq_error *err, const aq_store_input *file, int32_t row_group, const char *column, const char *what) {
    return aq_fail_at(err, AQ_ERR_FORMAT, file->path, NULL, "row group %d, column %s: %s", (int)row_group, column, what);
}

aq_status aq_column_read(aq_column_data *out, const aq_store_input *file, int32_t row_group, aq_column column, uint64_t n_rows, uint64_t max_levels,
                         aq_error *err) {
    return aq_column_read_leaf(out, file, row_group, file->leaf[column], aq_columns[column].path, aq_columns[column].type, n_rows, max_levels, err);
}

/* Optional levels between the repeated node of a list and its leaf: the leaf itself, and the struct it belongs to. Elements lie in pre-order, and the members
 * of our structs are leaves, so the groups before the leaf are its ancestors. */
static int16_t optional_below_repeated(const carquet_schema_t *schema, int32_t leaf) {
    int32_t at = -1, n = carquet_schema_num_elements(schema);
    for (int32_t seen = -1; seen < leaf && at + 1 < n;) {
        const carquet_schema_node_t *node = carquet_schema_get_element(schema, ++at);
        seen += node && carquet_schema_node_is_leaf(node);
    }
    int16_t below = 0;
    for (int32_t i = at; i > 0; i--) {
        const carquet_schema_node_t *node = carquet_schema_get_element(schema, i);
        if (!node || (i < at && carquet_schema_node_is_leaf(node))) continue;
        carquet_field_repetition_t repetition = carquet_schema_node_repetition(node);
        if (repetition == CARQUET_REPETITION_REPEATED) break;
        below = (int16_t)(below + (repetition == CARQUET_REPETITION_OPTIONAL));
    }
    return below;
}

aq_status aq_column_read_leaf(aq_column_data *out, const aq_store_input *file, int32_t row_group, int32_t leaf, const char *column,
                              carquet_physical_type_t type, uint64_t n_rows, uint64_t max_levels, aq_error *err) {
    memset(out, 0, sizeof *out);
    out->missing = leaf < 0;
    if (out->missing) return AQ_OK;
    const carquet_schema_t *schema = carquet_reader_schema(file->reader);
    carquet_column_chunk_metadata_t chunk;
    out->type = type;
    out->size = size_of(out->type);
    out->max_def = carquet_schema_max_def_level(schema, leaf);
    out->max_rep = carquet_schema_max_rep_level(schema, leaf);
    if (carquet_reader_column_chunk_metadata(file->reader, row_group, leaf, &chunk) != CARQUET_OK)
        return fail_column(err, file, row_group, column, "its metadata cannot be read");
    if (chunk.type != out->type) return fail_column(err, file, row_group, column, "its type differs from the schema's");
    out->below = out->max_rep > 0 ? optional_below_repeated(schema, leaf) : 0;
    uint64_t limit = out->max_rep > 0 ? max_levels : n_rows;
    if (chunk.num_values < (int64_t)n_rows || (uint64_t)chunk.num_values > limit)
        return fail_column(err, file, row_group, column, "the number of values does not fit the rows");
    out->n_levels = (uint64_t)chunk.num_values;

    out->values = aq_calloc(out->n_levels + 1, out->size);
    out->def = aq_calloc(out->n_levels + 1, sizeof *out->def);
    out->rep = aq_calloc(out->n_levels + 1, sizeof *out->rep);
    if (!out->values || !out->def || !out->rep) {
        aq_column_free(out);
        return aq_fail_memory(err, out->n_levels * out->size, "a column");
    }
    carquet_error_t error = CARQUET_ERROR_INIT;
    out->reader = carquet_reader_get_column(file->reader, row_group, leaf, &error);
    int64_t n = out->reader ? carquet_column_read_batch_ex(out->reader, out->values, (int64_t)out->n_levels, out->def, out->rep, &error) : -1;
    if (n != (int64_t)out->n_levels || error.code != CARQUET_OK) {
        char text[sizeof error.message];
        snprintf(text, sizeof text, "%s", error.code != CARQUET_OK ? error.message : "it ends early");
        aq_column_free(out);
        if (error.code == CARQUET_ERROR_OUT_OF_MEMORY) return aq_fail(err, AQ_ERR_MEMORY, "%s: out of memory: %s", file->path, text);
        return fail_column(err, file, row_group, column, text);
    }
    if (out->max_def == 0) memset(out->def, 0, out->n_levels * sizeof *out->def);
    if (out->max_rep == 0) memset(out->rep, 0, out->n_levels * sizeof *out->rep);
    uint64_t rows = 0;
    for (uint64_t i = 0; i < out->n_levels; i++) {
        if (out->def[i] < 0 || out->def[i] > out->max_def || out->rep[i] < 0 || out->rep[i] > out->max_rep) {
            aq_column_free(out);
            return fail_column(err, file, row_group, column, "a level is out of range");
        }
        rows += out->rep[i] == 0;
    }
    if (rows != n_rows || (out->n_levels && out->rep[0] != 0)) {
        aq_column_free(out);
        return fail_column(err, file, row_group, column, "its number of rows differs from the row group's");
    }
    return AQ_OK;
}

void aq_store_release_row_group(const aq_store_input *file, int32_t row_group) {
    int32_t n = carquet_reader_num_columns(file->reader);
    uint64_t begin = UINT64_MAX, end = 0;
    for (int32_t i = 0; i < n; i++) {
        carquet_column_chunk_metadata_t chunk;
        if (carquet_reader_column_chunk_metadata(file->reader, row_group, i, &chunk) != CARQUET_OK || chunk.data_page_offset < 0 ||
            chunk.total_compressed_size < 0)
            continue;
        uint64_t at = (uint64_t)chunk.data_page_offset, to = at + (uint64_t)chunk.total_compressed_size;
        begin = at < begin ? at : begin;
        end = to > end ? to : end;
    }
    if (begin < end) aq_file_map_release(&file->map, begin, end - begin);
}

void aq_column_free(aq_column_data *c) {
    carquet_column_reader_free(c->reader);
    aq_free(c->values);
    aq_free(c->def);
    aq_free(c->rep);
    memset(c, 0, sizeof *c);
    c->missing = true;
}

const void *aq_column_next(aq_column_data *c) {
    if (c->missing || c->at >= c->n_levels) return NULL;
    bool present = c->def[c->at++] == c->max_def;
    return present ? c->values + c->size * c->value_at++ : NULL;
}

bool aq_column_next_list(aq_column_data *c, const void **values, uint64_t *n, bool *null) {
    *values = NULL;
    *n = 0;
    *null = true;
    if (c->missing || c->at >= c->n_levels) return true;
    *values = c->values + c->size * c->value_at;
    uint64_t begin = c->at, end = begin + 1;
    while (end < c->n_levels && c->rep[end] > 0) end++;
    c->at = end;
    if (c->def[begin] < c->max_def) {
        /* Null, empty, or a null element: which one, the level at which elements are there tells. */
        int16_t element = (int16_t)(c->max_def - c->below);
        *null = c->def[begin] < element - 1;
        return end == begin + 1 && c->def[begin] < element;
    }
    *null = false;
    for (uint64_t i = begin; i < end; i++)
        if (c->def[i] != c->max_def) return false;
    *n = end - begin;
    c->value_at += *n;
    return true;
}

static bool is_utf8(const uint8_t *p, size_t n) {
    for (size_t i = 0; i < n;) {
        size_t len = p[i] < 0x80 ? 1 : p[i] >= 0xC2 && p[i] < 0xE0 ? 2 : (p[i] & 0xF0) == 0xE0 ? 3 : p[i] >= 0xF0 && p[i] < 0xF5 ? 4 : 0;
        if (len == 0 || len > n - i) return false;
        for (size_t k = 1; k < len; k++)
            if ((p[i + k] & 0xC0) != 0x80) return false;
        if ((p[i] == 0xE0 && p[i + 1] < 0xA0) || (p[i] == 0xED && p[i + 1] > 0x9F) || (p[i] == 0xF0 && p[i + 1] < 0x90) || (p[i] == 0xF4 && p[i + 1] > 0x8F))
            return false;
        i += len;
    }
    return true;
}

aq_status aq_column_next_text(aq_column_data *data, aq_store *store, const char *file, const char *column, const char *tensor, uint64_t limit, const char **out,
                              aq_error *err) {
    const carquet_byte_array_t *v = aq_column_next(data);
    *out = NULL;
    if (!v) return AQ_OK;
    if (v->length < 0 || (uint64_t)v->length > limit)
        return aq_fail_at(err, AQ_ERR_FORMAT, file, tensor, "column %s holds a text of %d bytes, over the limit of %llu", column, (int)v->length,
                          (unsigned long long)limit);
    if (v->length > 0 && (memchr(v->data, 0, (size_t)v->length) || !is_utf8(v->data, (size_t)v->length)))
        return aq_fail_at(err, AQ_ERR_FORMAT, file, tensor, "column %s holds a text that is not UTF-8", column);
    *out = aq_store_keep_text(store, v->data, (uint64_t)v->length);
    return *out ? AQ_OK : aq_fail_memory(err, (uint64_t)v->length, "a name");
}

aq_status aq_column_settle(const aq_store_input *file, const uint8_t **data, uint64_t size, void **owned, aq_error *err) {
    uintptr_t p = (uintptr_t)*data, begin = (uintptr_t)file->map.data;
    *owned = NULL;
    if (size == 0 || (p >= begin && p - begin <= file->map.size && size <= file->map.size - (p - begin))) return AQ_OK;
    if (!(*owned = aq_alloc(size))) return aq_fail_memory(err, size, "a tensor");
    memcpy(*owned, *data, (size_t)size);
    *data = *owned;
    return AQ_OK;
}
