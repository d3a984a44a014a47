/* Rows of a Parquet file: a column of text, or one of numbers with timestep and shape (python-api of the design, section 8). One row group is in memory. */
#include <math.h>
#include <string.h>

#include "base/mem.h"
#include "base/parquet.h"
#include "base/size.h"
#include "base/utf8.h"
#include "calibration/dataset.h"

#define LIMIT_VALUES (INT64_C(1) << 26) /* of one row group: 12 bytes each while it is read */

enum { TEXT, PROMPT, INPUT, DATA, TIMESTEP, SHAPE, N_COLUMNS };
static const char *const names[N_COLUMNS] = {"text", "prompt", "input", "data", "timestep", "shape"};

typedef struct {
    aq_parquet file;
    int32_t leaf[N_COLUMNS], row_group, n_row_groups;
    int content; /* which of the first four columns is read */
    carquet_physical_type_t types[N_COLUMNS];
    aq_column_data columns[N_COLUMNS];
    uint64_t rows_left, row;
    char *text;
} rows;

static void close_columns(rows *r) {
    for (int c = 0; c < N_COLUMNS; c++) aq_column_free(&r->columns[c]);
}

static aq_status next_row_group(aq_dataset *d, rows *r, aq_error *err) {
    carquet_row_group_metadata_t meta;
    close_columns(r);
    if (carquet_reader_row_group_metadata(r->file.reader, r->row_group, &meta) != CARQUET_OK || meta.num_rows < 0 || meta.num_rows > LIMIT_VALUES)
        return aq_fail_at(err, AQ_ERR_FORMAT, d->path, NULL, "row group %d has too many rows; write smaller ones", (int)r->row_group);
    aq_status status = AQ_OK;
    for (int c = 0; status == AQ_OK && c < N_COLUMNS; c++) {
        if (c != r->content && c != TIMESTEP && c != SHAPE) continue;
        status = aq_parquet_column(&r->columns[c], &r->file, r->row_group, r->leaf[c], names[c], r->types[c], (uint64_t)meta.num_rows, LIMIT_VALUES, err);
    }
    r->rows_left = (uint64_t)meta.num_rows;
    r->row_group++;
    return status;
}

static double value_at(carquet_physical_type_t type, const void *values, uint64_t i) {
    const uint8_t *p = values;
    switch (type) {
    case CARQUET_PHYSICAL_INT32: return (double)((const int32_t *)values)[i];
    case CARQUET_PHYSICAL_INT64: return (double)((const int64_t *)values)[i];
    case CARQUET_PHYSICAL_FLOAT: return (double)((const float *)values)[i];
    case CARQUET_PHYSICAL_DOUBLE: return ((const double *)values)[i];
    default: return (double)p[i];
    }
}

static aq_status read_text(aq_dataset *d, rows *r, aq_sample *out, aq_error *err) {
    const carquet_byte_array_t *bytes = aq_column_next(&r->columns[r->content]);
    if (!bytes || bytes->length < 0) return aq_dataset_fail(d, "row", r->row, err, "has no %s", names[r->content]);
    uint64_t n = (uint64_t)bytes->length;
    uint32_t code;
    for (uint64_t i = 0, len; i < n; i += len) {
        len = aq_utf8_decode(bytes->data + i, (size_t)(n - i), &code);
        if (len == 0) return aq_dataset_fail(d, "row", r->row, err, "its text is not UTF-8 at byte %llu", (unsigned long long)i);
    }
    char *copy = aq_realloc(r->text, n + 1, 1);
    if (!copy) return aq_fail_memory(err, n, "a text");
    r->text = copy;
    if (n > 0) memcpy(copy, bytes->data, (size_t)n);
    copy[n] = 0;
    out->text = copy;
    out->text_bytes = n;
    return AQ_OK;
}

static aq_status read_values(aq_dataset *d, rows *r, aq_sample *out, aq_error *err) {
    const void *values, *dims;
    uint64_t n, n_dims;
    bool null, no_shape;
    carquet_physical_type_t type = r->types[r->content];
    bool whole = aq_column_next_list(&r->columns[r->content], &values, &n, &null),
         shape_whole = aq_column_next_list(&r->columns[SHAPE], &dims, &n_dims, &no_shape);
    if (!whole || null || n == 0) return aq_dataset_fail(d, "row", r->row, err, "has no values, or one that is null");
    aq_status status = aq_dataset_reserve(d, n, err);
    if (status != AQ_OK) return status;
    for (uint64_t i = 0; i < n; i++) {
        d->values[i] = (float)value_at(type, values, i);
        if (!isfinite(d->values[i])) return aq_dataset_fail(d, "row", r->row, err, "value %llu is not finite in F32", (unsigned long long)i);
    }
    out->values = d->values;
    out->n_values = n;
    out->shape = (aq_shape){.rank = 1, .dims = {n}};
    out->integers = type == CARQUET_PHYSICAL_INT32 || type == CARQUET_PHYSICAL_INT64;
    if (no_shape && shape_whole) return AQ_OK;
    int64_t sizes[AQ_MAX_RANK];
    for (uint64_t i = 0; i < n_dims && i < AQ_MAX_RANK; i++) sizes[i] = (int64_t)value_at(r->types[SHAPE], dims, i);
    return shape_whole && aq_dataset_shape(&out->shape, sizes, n_dims, n) ? AQ_OK
                                                                          : aq_dataset_fail(d, "row", r->row, err, "shape does not multiply to its values");
}

static aq_status next(aq_dataset *d, aq_sample *out, bool *end, aq_error *err) {
    rows *r = d->state;
    while (r->rows_left == 0) {
        *end = r->row_group >= r->n_row_groups;
        if (*end) return AQ_OK;
        aq_status status = next_row_group(d, r, err);
        d->is_broken = status != AQ_OK;
        if (status != AQ_OK) return status;
    }
    r->rows_left--;
    out->line = ++r->row;
    out->kind = (aq_sample_kind)r->content;
    const void *timestep = aq_column_next(&r->columns[TIMESTEP]);
    aq_status status = r->content <= PROMPT ? read_text(d, r, out, err) : read_values(d, r, out, err);
    if (status != AQ_OK || !timestep) return status;
    double t = value_at(r->types[TIMESTEP], timestep, 0);
    if (!(t >= 0) || t > INT32_MAX) return aq_dataset_fail(d, "row", r->row, err, "timestep is no integer of at least 0");
    out->timestep = (int32_t)t;
    return AQ_OK;
}

static void close_rows(aq_dataset *d) {
    rows *r = d->state;
    if (!r) return;
    close_columns(r);
    aq_parquet_close(&r->file);
    aq_free(r->text);
    aq_free(r);
}

static aq_status hint_at_python(aq_error *err) {
    aq_hint(err, "column= of arrow_quant_v2.DataSet reads one of any name and type, with pyarrow");
    return AQ_ERR_FORMAT;
}

static aq_status find_columns(aq_dataset *d, rows *r, aq_error *err) {
    const carquet_schema_t *schema = carquet_reader_schema(r->file.reader);
    for (int c = 0; c < N_COLUMNS; c++) r->leaf[c] = -1;
    for (int32_t i = 0; i < carquet_schema_num_columns(schema); i++) {
        char path[64];
        if (!aq_parquet_leaf_path(schema, i, path, sizeof path)) continue;
        for (int c = 0; c < N_COLUMNS; c++) {
            if (strcmp(path, names[c]) != 0) continue;
            carquet_physical_type_t type = carquet_schema_column_type(schema, i);
            bool integer = type == CARQUET_PHYSICAL_INT32 || type == CARQUET_PHYSICAL_INT64,
                 number = integer || type == CARQUET_PHYSICAL_FLOAT || type == CARQUET_PHYSICAL_DOUBLE;
            bool list = c == INPUT || c == DATA || c == SHAPE;
            bool fits = c <= PROMPT ? type == CARQUET_PHYSICAL_BYTE_ARRAY : c <= DATA ? number : integer;
            if (!fits || carquet_schema_max_rep_level(schema, i) != (list ? 1 : 0)) {
                aq_fail_at(err, AQ_ERR_FORMAT, d->path, NULL, "column %s has another type than a data set gives it", path);
                return hint_at_python(err);
            }
            r->leaf[c] = i;
            r->types[c] = type;
        }
    }
    for (r->content = TEXT; r->content <= DATA; r->content++)
        if (r->leaf[r->content] >= 0) return AQ_OK;
    aq_fail_at(err, AQ_ERR_FORMAT, d->path, NULL, "has no column text, prompt, input or data");
    return hint_at_python(err);
}

aq_status aq_dataset_open_parquet(aq_dataset *d, aq_error *err) {
    static const aq_dataset_reader reader = {next, close_rows};
    rows *r = aq_calloc(1, sizeof *r);
    if (!r) return aq_fail_memory(err, sizeof *r, "a data set");
    for (int c = 0; c < N_COLUMNS; c++) r->columns[c].missing = true;
    r->file.map.fd = -1;
    d->state = r;
    d->reader = &reader;
    aq_status status = aq_parquet_open(&r->file, d->path, err);
    if (status == AQ_OK) status = find_columns(d, r, err);
    if (status != AQ_OK) return status;
    int64_t n = carquet_reader_num_rows(r->file.reader);
    d->n_samples = n > 0 ? (uint64_t)n : 0;
    r->n_row_groups = carquet_reader_num_row_groups(r->file.reader);
    return AQ_OK;
}
