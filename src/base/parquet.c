/* Reading Parquet (see parquet.h) through carquet, with everything that a file declares checked before it is believed. */
#include "base/parquet.h"

#include <string.h>

#include "base/footer.h"
#include "base/mem.h"

void aq_parquet_close(aq_parquet *f) {
    carquet_reader_close(f->reader);
    if (f->map.data || f->map.fd >= 0) aq_file_map_close(&f->map);
    memset(f, 0, sizeof *f);
    f->map.fd = -1;
}

aq_status aq_parquet_open(aq_parquet *out, const char *path, aq_error *err) {
    memset(out, 0, sizeof *out);
    out->map.fd = -1;
    out->path = path;
    aq_status status = aq_file_map_open(&out->map, path, false, err);
    if (status != AQ_OK) return status;
    const uint8_t *p = out->map.data;
    uint64_t n = out->map.size;
    if (n < 12 || memcmp(p, "PAR1", 4) != 0 || memcmp(p + n - 4, "PAR1", 4) != 0) {
        bool begins = n >= 4 && memcmp(p, "PAR1", 4) == 0;
        aq_fail_at(err, AQ_ERR_FORMAT, out->path, NULL, "is no whole Parquet file: PAR1 is missing at its %s", begins ? "end" : "start");
        aq_hint(err, begins ? "the file was cut off: copy or fetch it again" : "this is a file of another kind, or its beginning was overwritten");
        return AQ_ERR_FORMAT;
    }
    uint64_t footer = (uint64_t)p[n - 8] | (uint64_t)p[n - 7] << 8 | (uint64_t)p[n - 6] << 16 | (uint64_t)p[n - 5] << 24;
    if (footer == 0 || footer > n - 12)
        return aq_fail_at(err, AQ_ERR_FORMAT, out->path, NULL, "its footer of %llu bytes does not fit the file", (unsigned long long)footer);
    if (footer > AQ_LIMIT_FOOTER_BYTES)
        return aq_fail_at(err, AQ_ERR_FORMAT, out->path, NULL, "its footer of %llu bytes is over the limit of %llu", (unsigned long long)footer,
                          (unsigned long long)AQ_LIMIT_FOOTER_BYTES);

    status = aq_footer_check(p + n - 8 - footer, footer, n - 8 - footer, out->path, err);
    if (status != AQ_OK) return status;
    carquet_reader_options_t options;
    carquet_error_t error = CARQUET_ERROR_INIT;
    carquet_reader_options_init(&options);
    options.verify_checksums = false; /* of pages; what is large is compared with hashes when it is used */
    options.num_threads = 1;
    out->reader = carquet_reader_open_buffer(p, (size_t)n, &options, &error);
    if (!out->reader) {
        if (error.code == CARQUET_ERROR_OUT_OF_MEMORY) return aq_fail(err, AQ_ERR_MEMORY, "%s: out of memory", out->path);
        return aq_fail_at(err, AQ_ERR_FORMAT, out->path, NULL, "its footer cannot be read: %s", error.message);
    }
    return AQ_OK;
}

bool aq_parquet_leaf_path(const carquet_schema_t *schema, int32_t leaf, char *out, size_t size) {
    const char *parts[16];
    int32_t n = carquet_schema_column_path(schema, leaf, parts, 16);
    size_t at = 0;
    bool is_list = carquet_schema_max_rep_level(schema, leaf) > 0;
    out[0] = 0;
    for (int32_t i = 0; i < n; i++) {
        static const char *const inner[] = {"list", "element", "bag", "array_element", "item", "array"};
        if (!parts[i]) return false;
        bool skip = false;
        for (size_t k = 0; is_list && i > 0 && k < sizeof inner / sizeof inner[0]; k++) skip = skip || strcmp(parts[i], inner[k]) == 0;
        if (skip) continue;
        int len = snprintf(out + at, size - at, "%s%s", at ? "." : "", parts[i]);
        if (len < 0 || (size_t)len >= size - at) return false;
        at += (size_t)len;
    }
    return n > 0;
}

static size_t size_of(carquet_physical_type_t type) {
    switch (type) {
    case CARQUET_PHYSICAL_BOOLEAN: return 1;
    case CARQUET_PHYSICAL_INT32:
    case CARQUET_PHYSICAL_FLOAT: return 4;
    case CARQUET_PHYSICAL_BYTE_ARRAY: return sizeof(carquet_byte_array_t);
    default: return 8;
    }
}

static aq_status fail_column(aq_error *err, const aq_parquet *file, int32_t row_group, const char *column, const char *what) {
    return aq_fail_at(err, AQ_ERR_FORMAT, file->path, NULL, "row group %d, column %s: %s", (int)row_group, column, what);
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

aq_status aq_parquet_column(aq_column_data *out, const aq_parquet *file, int32_t row_group, int32_t leaf, const char *column, carquet_physical_type_t type,
                            uint64_t n_rows, uint64_t max_levels, aq_error *err) {
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
