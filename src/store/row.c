/* One row (see row.h). Definition and repetition levels follow the Dremel scheme: `def` counts the optional and repeated ancestors that are there,
 * `rep` is 1 for the second and later elements of a list. */
#include "store/row.h"

#include <errno.h>
#include <math.h>
#include <string.h>
#include <xxhash.h>

#include "base/mem.h"
#include "base/size.h"

void aq_row_init(aq_row *row, const carquet_schema_t *schema) {
    memset(row, 0, sizeof *row);
    for (int32_t c = 0; c < COL_COUNT; c++) {
        row->max_def[c] = carquet_schema_max_def_level(schema, c);
        row->max_rep[c] = carquet_schema_max_rep_level(schema, c);
    }
}

static void clear(aq_row *row) {
    for (int c = 0; c < COL_COUNT; c++) {
        aq_row_column *col = &row->columns[c];
        col->values_used = col->n_levels = 0;
        if (col->values_cap > 1 << 16) { /* a large list does not stay around */
            aq_free(col->values);
            aq_free(col->def);
            aq_free(col->rep);
            memset(col, 0, sizeof *col);
        }
    }
}

void aq_row_free(aq_row *row) {
    clear(row);
    for (int c = 0; c < COL_COUNT; c++) {
        aq_free(row->columns[c].values);
        aq_free(row->columns[c].def);
        aq_free(row->columns[c].rep);
    }
    memset(row, 0, sizeof *row);
}

static size_t value_size(aq_column c) {
    switch (aq_columns[c].type) {
    case CARQUET_PHYSICAL_BOOLEAN: return 1;
    case CARQUET_PHYSICAL_INT32:
    case CARQUET_PHYSICAL_FLOAT: return 4;
    case CARQUET_PHYSICAL_BYTE_ARRAY: return sizeof(carquet_byte_array_t);
    default: return 8;
    }
}

/* Room for n more values and levels. */
static bool reserve(aq_row_column *col, uint64_t n, size_t size) {
    uint64_t bytes, need, levels;
    if (!aq_mul(n, size, &bytes) || !aq_add(col->values_used, bytes, &need) || !aq_add(col->n_levels, n + 1, &levels)) return false;
    if (need > col->values_cap) {
        uint64_t cap = need < 2 * col->values_cap ? 2 * col->values_cap : need;
        uint8_t *values = aq_realloc(col->values, cap, 1);
        if (!values) return false;
        col->values = values;
        col->values_cap = cap;
    }
    if (levels > col->levels_cap) {
        uint64_t cap = levels < 2 * col->levels_cap ? 2 * col->levels_cap : levels;
        int16_t *def = aq_realloc(col->def, cap, sizeof *def);
        if (def) col->def = def;
        int16_t *rep = def ? aq_realloc(col->rep, cap, sizeof *rep) : NULL;
        if (!rep) return false;
        col->rep = rep;
        col->levels_cap = cap;
    }
    return true;
}

/* One value, or null when value is NULL: `depth` ancestors are there then. */
static bool put(aq_row *row, aq_column c, const void *value, int16_t depth) {
    aq_row_column *col = &row->columns[c];
    size_t size = value_size(c);
    if (!reserve(col, 1, size)) return false;
    if (value) {
        memcpy(col->values + col->values_used, value, size);
        col->values_used += size;
    }
    col->def[col->n_levels] = value ? row->max_def[c] : depth;
    col->rep[col->n_levels++] = 0;
    return true;
}

static bool put_null(aq_row *row, aq_column c) { return put(row, c, NULL, 0); }
static bool put_i32(aq_row *row, aq_column c, int32_t v) { return put(row, c, &v, 0); }
static bool put_i64(aq_row *row, aq_column c, int64_t v) { return put(row, c, &v, 0); }
static bool put_bool(aq_row *row, aq_column c, bool v) { return put(row, c, &(uint8_t){v}, 0); }
/* Member of a struct that is there: not measured (NaN) and exact (infinite) are null. */
static bool put_measure(aq_row *row, aq_column c, double v) { return put(row, c, isfinite(v) ? &v : NULL, 1); }

/* The bytes are borrowed until the row is written. */
static bool put_bytes(aq_row *row, aq_column c, const void *data, uint64_t size) {
    carquet_byte_array_t value = {(uint8_t *)(uintptr_t)data, (int32_t)size};
    return put(row, c, &value, 0);
}

/* A text, or null; in a struct the struct is there. */
static bool put_text(aq_row *row, aq_column c, const char *text) {
    if (!text) return put(row, c, NULL, aq_columns[c].path[0] == 'q' && c >= COL_METHOD ? 1 : 0);
    return put_bytes(row, c, text, strlen(text));
}

/* A list of n values taken `stride` bytes apart. */
static bool put_list(aq_row *row, aq_column c, const void *values, uint64_t n, size_t stride) {
    aq_row_column *col = &row->columns[c];
    size_t size = value_size(c);
    if (!reserve(col, n, size)) return false;
    for (uint64_t i = 0; i < n; i++) {
        memcpy(col->values + col->values_used, (const uint8_t *)values + i * stride, size);
        col->values_used += size;
        col->def[col->n_levels] = row->max_def[c];
        col->rep[col->n_levels++] = i > 0;
    }
    if (n == 0) { /* an empty list: itself there, no element */
        col->def[col->n_levels] = (int16_t)(row->max_def[c] - 2);
        col->rep[col->n_levels++] = 0;
    }
    return true;
}

void aq_store_record_hash(const void *data, uint64_t data_bytes, const void *params, uint64_t params_bytes, char out[33]) {
    XXH3_state_t *state = XXH3_createState();
    XXH128_canonical_t digest;
    memset(&digest, 0, sizeof digest);
    if (state) {
        XXH3_128bits_reset(state);
        XXH3_128bits_update(state, data, (size_t)data_bytes);
        XXH3_128bits_update(state, params, (size_t)params_bytes);
        XXH128_canonicalFromHash(&digest, XXH3_128bits_digest(state));
        XXH3_freeState(state);
    }
    static const char hex[] = "0123456789abcdef";
    for (int i = 0; i < 16; i++) {
        out[2 * i] = hex[digest.digest[i] >> 4];
        out[2 * i + 1] = hex[digest.digest[i] & 15];
    }
    out[32] = 0;
}

static bool add_quantization(aq_row *row, const aq_store_record *r) {
    if (!r->quantized)
        return put_null(row, COL_SCALES) && put_null(row, COL_ZERO_POINTS) && put_null(row, COL_PARAMS) && put_null(row, COL_PARAMS_FORM) &&
               put_null(row, COL_QUANT_AXIS) && put_null(row, COL_GROUP_SIZE) && put_null(row, COL_BIT_WIDTH);
    bool lists = r->spec.params == AQ_PARAMS_F32;
    uint64_t n = r->params_bytes / 8;
    bool ok =
        lists ? put_list(row, COL_SCALES, r->params, n, 8) && put_list(row, COL_ZERO_POINTS, (const uint8_t *)r->params + 4, n, 8) && put_null(row, COL_PARAMS)
              : put_null(row, COL_SCALES) && put_null(row, COL_ZERO_POINTS) && put_bytes(row, COL_PARAMS, r->params, r->params_bytes);
    /* A group that spans everything is stored by its size: 0 means nothing to other readers. */
    uint64_t rows_all, cols, group = r->spec.group_size;
    aq_shape_matrix(&r->shape, &rows_all, &cols);
    if (group == 0) group = r->spec.axis == 1 ? cols : rows_all;
    if (group == 0) group = 1;
    return ok && put_text(row, COL_PARAMS_FORM, aq_params_form_name(r->spec.params)) && put_i32(row, COL_QUANT_AXIS, r->spec.axis) &&
           put_i32(row, COL_GROUP_SIZE, (int32_t)group) && put_i32(row, COL_BIT_WIDTH, r->spec.bits);
}

/* Columns [first, last] of a struct that is not there. */
static bool put_nothing(aq_row *row, aq_column first, aq_column last) {
    for (aq_column c = first; c <= last; c++)
        if (!put_null(row, c)) return false;
    return true;
}

static bool add_time_groups(aq_row *row, const aq_store_record *r) {
    const aq_time_group *g = r->time_groups;
    size_t n = r->n_time_groups, stride = sizeof *g;
    if (n == 0) return put_nothing(row, COL_TIME_ENABLED, COL_TIME_GROUP_SIZE);
    return put_bool(row, COL_TIME_ENABLED, true) && put_i32(row, COL_TIME_NUM_GROUPS, (int32_t)n) && put_list(row, COL_TIME_START, &g->start, n, stride) &&
           put_list(row, COL_TIME_END, &g->end, n, stride) && put_list(row, COL_TIME_SCALE, &g->scale, n, stride) &&
           put_list(row, COL_TIME_ZERO_POINT, &g->zero_point, n, stride) && put_list(row, COL_TIME_GROUP_SIZE, &g->group_size, n, stride);
}

static bool add_spatial(aq_row *row, const aq_store_record *r) {
    int32_t hadamard = (int32_t)r->hadamard_group;
    bool equalized = r->n_equalization_scales > 0;
    if (!equalized && !hadamard && !(r->smoothing_alpha > 0)) return put_nothing(row, COL_SPATIAL_ENABLED, COL_SPATIAL_SHIFT);
    return put_bool(row, COL_SPATIAL_ENABLED, true) && put_bool(row, COL_SPATIAL_EQUALIZATION, equalized) &&
           put_bool(row, COL_SPATIAL_SMOOTHING, r->smoothing_alpha > 0) && put(row, COL_SPATIAL_ALPHA, &r->smoothing_alpha, 1) &&
           (equalized ? put_list(row, COL_SPATIAL_SCALES, r->equalization_scales, r->n_equalization_scales, 4) : put(row, COL_SPATIAL_SCALES, NULL, 1)) &&
           put_bool(row, COL_SPATIAL_FOLDED, r->equalization_folded) && put(row, COL_SPATIAL_HADAMARD, hadamard ? &hadamard : NULL, 1) &&
           (r->folded_shift ? put_list(row, COL_SPATIAL_SHIFT, r->folded_shift, r->n_equalization_scales, 4) : put(row, COL_SPATIAL_SHIFT, NULL, 1));
}

static bool add_stats(aq_row *row, const aq_store_record *r) {
    if (r->n_activation_stats == 0) return put_nothing(row, COL_STATS_MEAN, COL_STATS_MAX);
    bool ok = true;
    for (int k = 0; ok && k < 4; k++) ok = put_list(row, (aq_column)(COL_STATS_MEAN + k), r->activation_stats[k], r->n_activation_stats, 4);
    return ok;
}

static bool add_quality(aq_row *row, const aq_store_quality *q) {
    return put_measure(row, COL_COSINE, q->cosine) && put_measure(row, COL_SQNR_DB, q->sqnr_db) && put_measure(row, COL_OUTPUT_SQNR_DB, q->output_sqnr_db) &&
           put_text(row, COL_METHOD, q->method) && put_text(row, COL_FALLBACK_FROM, q->fallback_from) && put_text(row, COL_COMPARED_WITH, q->compared_with);
}

aq_status aq_row_fill(aq_row *row, const aq_store_record *r, bool is_diffusion_model, aq_modality modality, aq_error *err) {
    uint64_t count, all_rows, cols;
    if (!aq_shape_count(&r->shape, &count) || count > INT64_MAX)
        return aq_fail_at(err, AQ_ERR_FORMAT, NULL, r->name, "has a shape whose number of elements does not fit 63 bits");
    aq_shape_matrix(&r->shape, &all_rows, &cols);
    int64_t dims[AQ_MAX_RANK];
    for (uint32_t i = 0; i < r->shape.rank; i++) dims[i] = (int64_t)r->shape.dims[i];
    aq_store_record_hash(r->data, r->data_bytes, r->quantized ? r->params : NULL, r->quantized ? r->params_bytes : 0, row->hash);
    bool whole = r->row_begin == 0 && r->row_count == (r->quantized ? all_rows : count);
    bool ok = put_text(row, COL_LAYER_NAME, r->name) && put_text(row, COL_DTYPE, r->dtype) && put_text(row, COL_QUANT_TYPE, r->quant_type) &&
              put_list(row, COL_SHAPE, dims, r->shape.rank, 8) && put_bytes(row, COL_DATA, r->data, r->data_bytes) &&
              put_i64(row, COL_NUM_PARAMS, (int64_t)count) && add_quantization(row, r) &&
              (whole ? put_null(row, COL_ROW_START) && put_null(row, COL_ROW_COUNT)
                     : put_i64(row, COL_ROW_START, (int64_t)r->row_begin) && put_i64(row, COL_ROW_COUNT, (int64_t)r->row_count)) &&
              put_text(row, COL_HASH, row->hash) && put_bool(row, COL_IS_DIFFUSION_MODEL, is_diffusion_model) &&
              put_text(row, COL_MODALITY, modality == AQ_MODALITY_UNKNOWN ? NULL : aq_modality_name(modality)) && add_time_groups(row, r) &&
              add_spatial(row, r) && add_stats(row, r) && add_quality(row, &r->quality);
    if (!ok) {
        clear(row);
        return aq_fail_memory(err, r->data_bytes, "a row of the output");
    }
    return AQ_OK;
}

aq_status aq_row_write(aq_row *row, carquet_writer_t *writer, const char *file, aq_error *err) {
    static const uint8_t nothing[16];
    errno = 0;
    carquet_status_t status = CARQUET_OK;
    for (int32_t c = 0; status == CARQUET_OK && c < COL_COUNT; c++) {
        const aq_row_column *col = &row->columns[c];
        status = carquet_writer_write_batch(writer, c, col->values ? col->values : nothing, (int64_t)col->n_levels, row->max_def[c] > 0 ? col->def : NULL,
                                            row->max_rep[c] > 0 ? col->rep : NULL);
    }
    if (status == CARQUET_OK) status = carquet_writer_new_row_group(writer);
    clear(row);
    return status == CARQUET_OK ? AQ_OK : aq_store_carquet_fail(err, file, status, "cannot write");
}
