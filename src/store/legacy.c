/* Older Parquet model folders, one file and usually one row per tensor (docs/format.md, "Older formats"):
 * base V2 (layer_name …, one byte per code at every width, its later JSON columns checked) and V1 (name, shape, F32 data).
 *
 * They were written by general Parquet writers, compressed and dictionary-encoded as those please, so tensors are decoded to memory at open; codes are
 * packed and parameters brought to the F32 form, after which they are like any other tensor. */
#include "store/store_internal.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/json.h"
#include "base/mem.h"
#include "base/size.h"
#include "store/extension.h"

typedef enum {
    L_NAME,
    L_SHAPE,
    L_DTYPE,
    L_DATA,
    L_NUM_PARAMS,
    L_QUANT_TYPE,
    L_SCALES,
    L_ZEROS,
    L_AXIS,
    L_GROUP,
    L_MODALITY,
    L_TIME,
    L_SPATIAL,
    L_STATS,
    L_COUNT
} legacy_column;

static const char *const g_names[L_COUNT] = {"layer_name",
                                             "shape",
                                             "dtype",
                                             "data",
                                             "num_params",
                                             "quant_type",
                                             "scales",
                                             "zero_points",
                                             "quant_axis",
                                             "group_size",
                                             "modality",
                                             "time_aware_quant_json",
                                             "spatial_quant_json",
                                             "activation_stats_json"};

typedef struct {
    aq_store *store;
    aq_store_input *file;
    size_t file_index;
    int32_t leaf[L_COUNT];
    aq_column_data columns[L_COUNT];
    uint64_t n_rows;
} legacy_reader;

static aq_status fail_tensor(legacy_reader *g, const char *tensor, aq_error *err, const char *what) {
    return aq_fail_at(err, AQ_ERR_FORMAT, g->file->path, tensor, "%s", what);
}

static void find_columns(legacy_reader *g) {
    const carquet_schema_t *schema = carquet_reader_schema(g->file->reader);
    int32_t n = carquet_schema_num_columns(schema);
    for (int c = 0; c < L_COUNT; c++) {
        g->leaf[c] = -1;
        for (int32_t i = 0; i < n && g->leaf[c] < 0; i++) {
            const char *path[8];
            int32_t depth = carquet_schema_column_path(schema, i, path, 8);
            const char *wanted = c == L_NAME && g->file->kind == AQ_FILE_V1 ? "name" : g_names[c];
            if (depth > 0 && path[0] && strcmp(path[0], wanted) == 0 && (depth == 1 || carquet_schema_max_rep_level(schema, i) > 0)) g->leaf[c] = i;
        }
    }
}

/* Type and nesting are checked against the file's schema; integers may be of 32 or 64 bits. */
static aq_status read_column(legacy_reader *g, legacy_column c, int32_t row_group, bool is_list, carquet_physical_type_t type, bool any_int,
                             uint64_t max_levels, aq_error *err) {
    const carquet_schema_t *schema = carquet_reader_schema(g->file->reader);
    int32_t leaf = g->leaf[c];
    if (leaf >= 0) {
        carquet_physical_type_t found = carquet_schema_column_type(schema, leaf);
        if (any_int && found == CARQUET_PHYSICAL_INT32) type = found;
        if (found != type || carquet_schema_max_rep_level(schema, leaf) != (is_list ? 1 : 0))
            return aq_fail_at(err, AQ_ERR_FORMAT, g->file->path, NULL, "column %s has another type than this format gives it", g_names[c]);
    }
    return aq_column_read_leaf(&g->columns[c], g->file, row_group, leaf, g_names[c], type, g->n_rows, max_levels, err);
}

static aq_status read_columns(legacy_reader *g, int32_t row_group, aq_error *err) {
    static const legacy_column texts[] = {L_NAME, L_DTYPE, L_DATA, L_QUANT_TYPE, L_MODALITY, L_TIME, L_SPATIAL, L_STATS};
    static const legacy_column ints[] = {L_NUM_PARAMS, L_AXIS, L_GROUP};
    aq_status status = AQ_OK;
    for (size_t i = 0; status == AQ_OK && i < sizeof texts / sizeof *texts; i++)
        status = read_column(g, texts[i], row_group, false, CARQUET_PHYSICAL_BYTE_ARRAY, false, 0, err);
    for (size_t i = 0; status == AQ_OK && i < sizeof ints / sizeof *ints; i++)
        status = read_column(g, ints[i], row_group, false, CARQUET_PHYSICAL_INT64, true, 0, err);
    if (status == AQ_OK) status = read_column(g, L_SHAPE, row_group, true, CARQUET_PHYSICAL_INT64, true, g->n_rows * AQ_MAX_RANK, err);
    uint64_t most = g->n_rows + AQ_LIMIT_PAGE_BYTES / 8;
    if (status == AQ_OK) status = read_column(g, L_SCALES, row_group, true, CARQUET_PHYSICAL_FLOAT, false, most, err);
    if (status == AQ_OK) status = read_column(g, L_ZEROS, row_group, true, CARQUET_PHYSICAL_FLOAT, false, most, err);
    return status;
}

static int64_t load_int(const aq_column_data *c, const void *p) {
    if (c->type == CARQUET_PHYSICAL_INT32) {
        int32_t v;
        memcpy(&v, p, 4);
        return v;
    }
    int64_t v;
    memcpy(&v, p, 8);
    return v;
}

/* Next integer, or `otherwise` for null. */
static int64_t next_int(legacy_reader *g, legacy_column c, int64_t otherwise) {
    const void *p = aq_column_next(&g->columns[c]);
    return p ? load_int(&g->columns[c], p) : otherwise;
}

static aq_status next_text(legacy_reader *g, legacy_column c, uint64_t limit, const char *tensor, const char **out, aq_error *err) {
    return aq_column_next_text(&g->columns[c], g->store, g->file->path, g_names[c], tensor, limit, out, err);
}

static aq_status read_shape(legacy_reader *g, aq_store_tensor *t, aq_error *err) {
    const void *values;
    uint64_t n;
    bool null;
    if (!aq_column_next_list(&g->columns[L_SHAPE], &values, &n, &null) || null) return fail_tensor(g, t->name, err, "its shape is null or holds null");
    if (n > AQ_MAX_RANK) return fail_tensor(g, t->name, err, "has more than 8 dimensions");
    t->shape.rank = (uint32_t)n;
    for (uint64_t i = 0; i < n; i++) {
        int64_t d = load_int(&g->columns[L_SHAPE], (const uint8_t *)values + i * g->columns[L_SHAPE].size);
        if (d < 0) return fail_tensor(g, t->name, err, "a dimension does not fit 63 bits");
        t->shape.dims[i] = (uint64_t)d;
    }
    if (!aq_shape_count(&t->shape, &t->num_params) || t->num_params > INT64_MAX)
        return fail_tensor(g, t->name, err, "its number of elements does not fit 63 bits");
    aq_shape_matrix(&t->shape, &t->rows, &t->cols);
    if (!g->columns[L_NUM_PARAMS].missing && next_int(g, L_NUM_PARAMS, -1) != (int64_t)t->num_params)
        return fail_tensor(g, t->name, err, "num_params differs from the number of elements of its shape");
    return AQ_OK;
}

/* Which groups n pairs are: per tensor, per row, along the inputs, groups of rows, or one per input (*per_input: repeated for every row). */
static bool find_groups(aq_store_tensor *t, int64_t axis, int64_t group, uint64_t n, bool *per_input) {
    uint64_t size = group > 0 ? (uint64_t)group : 0;
    *per_input = false;
    bool by_rows = size && n == aq_div_up(t->rows, size),
         by_inputs = size && t->cols && n / aq_div_up(t->cols, size) == t->rows && n % aq_div_up(t->cols, size) == 0;
    t->spec.axis = 1;
    t->spec.group_size = size;
    if (by_inputs && !(by_rows && axis == 0)) return true;
    t->spec.axis = 0;
    if (by_rows) return true;
    t->spec.group_size = t->rows ? t->rows : 1;
    if (n == 1) return true;
    t->spec.axis = 1;
    t->spec.group_size = t->cols ? t->cols : 1;
    if (n == t->rows && !(axis == 1 && n == t->cols)) return true;
    t->spec.group_size = 1;
    *per_input = true;
    return n == t->cols;
}

/* Parameters as F32 pairs. */
static aq_status read_params(legacy_reader *g, aq_store_tensor *t, aq_part *part, const uint8_t *scales, const uint8_t *zeros, bool per_input, aq_error *err) {
    uint64_t n = t->layout.n_pairs;
    float *pairs = aq_alloc(t->layout.params_bytes);
    if (!pairs) return aq_fail_memory(err, t->layout.params_bytes, "parameters");
    part->params = part->owned_params = pairs;
    part->params_bytes = t->layout.params_bytes;
    for (uint64_t i = 0; i < n; i++) {
        uint64_t k = per_input ? i % t->cols : i;
        memcpy(&pairs[2 * i], scales + 4 * k, 4);
        memcpy(&pairs[2 * i + 1], zeros + 4 * k, 4);
    }
    aq_error why;
    aq_error_clear(&why);
    return aq_quant_params_check(&t->spec, &t->layout, pairs, &why) == AQ_OK ? AQ_OK : fail_tensor(g, t->name, err, why.message);
}

/* One byte per code to packed codes. */
static aq_status pack(legacy_reader *g, aq_store_tensor *t, aq_part *part, const uint8_t *codes, aq_error *err) {
    int bits = t->spec.bits;
    if (bits == 8) {
        part->data = codes;
        part->data_bytes = t->num_params;
        return aq_column_settle(g->file, &part->data, part->data_bytes, &part->owned_data, err);
    }
    uint8_t *packed = aq_calloc(t->layout.codes_bytes, 1);
    if (!packed) return aq_fail_memory(err, t->layout.codes_bytes, "codes");
    part->data = part->owned_data = packed;
    part->data_bytes = t->layout.codes_bytes;
    unsigned over = 0;
    for (uint64_t r = 0; r < t->rows; r++)
        for (uint64_t c = 0; c < t->cols; c++) {
            unsigned q = codes[r * t->cols + c];
            over |= q >> bits;
            packed[r * t->layout.row_bytes + c * (uint64_t)bits / 8] |= (uint8_t)((q & ((1u << bits) - 1)) << c * (uint64_t)bits % 8);
        }
    return over ? fail_tensor(g, t->name, err, "a code is too large for its quant_type") : AQ_OK;
}

static aq_status read_codes(legacy_reader *g, aq_store_tensor *t, aq_part *part, const carquet_byte_array_t *data, int bits, aq_error *err) {
    const void *scales, *zeros;
    uint64_t n_scales, n_zeros;
    bool null, per_input;
    int64_t axis = next_int(g, L_AXIS, -1), group = next_int(g, L_GROUP, 0);
    if (!aq_column_next_list(&g->columns[L_SCALES], &scales, &n_scales, &null) || !aq_column_next_list(&g->columns[L_ZEROS], &zeros, &n_zeros, &null))
        return fail_tensor(g, t->name, err, "scales or zero_points hold null");
    if (group < 0 || group > INT32_MAX || (axis != -1 && axis != 0 && axis != 1))
        return fail_tensor(g, t->name, err, "quant_axis or group_size is out of range");
    if ((uint64_t)data->length != t->num_params)
        return aq_fail_at(err, AQ_ERR_FORMAT, g->file->path, t->name, "%d bytes of codes, expected one for each of %llu elements", (int)data->length,
                          (unsigned long long)t->num_params);
    t->quantized = true;
    t->spec = (aq_quant_spec){.bits = bits, .params = AQ_PARAMS_F32, .method = AQ_METHOD_RTN};
    if (n_scales != n_zeros || !find_groups(t, axis, group, n_scales, &per_input))
        return aq_fail_at(err, AQ_ERR_FORMAT, g->file->path, t->name, "%llu scales and %llu zero_points fit no grouping of %llu x %llu",
                          (unsigned long long)n_scales, (unsigned long long)n_zeros, (unsigned long long)t->rows, (unsigned long long)t->cols);
    aq_status status = aq_quant_layout_init(&t->layout, &t->spec, t->rows, t->cols, err);
    if (status == AQ_OK && t->layout.n_pairs != (per_input ? t->rows * t->cols : n_scales))
        status = fail_tensor(g, t->name, err, "the number of scales does not fit its shape");
    if (status == AQ_OK) status = pack(g, t, part, data->data, err);
    if (status == AQ_OK) status = read_params(g, t, part, scales, zeros, per_input, err);
    part->row_count = t->rows;
    return status;
}

/* `NAME.bin` beside `NAME.parquet`: little-endian F32, for a tensor whose data column is empty. */
static aq_status read_bin(legacy_reader *g, aq_store_tensor *t, aq_part *part, aq_error *err) {
    size_t n = strlen(g->file->path);
    if (!aq_text_ends_with(g->file->path, ".parquet")) return fail_tensor(g, t->name, err, "its data are empty");
    char *path = aq_strdup(g->file->path), *bytes = NULL;
    uint64_t size = 0;
    if (!path) return aq_fail_memory(err, n, "a path");
    memcpy(path + n - strlen(".parquet"), ".bin", 5);
    aq_status status = aq_path_is_file(path) ? aq_file_read(&bytes, &size, path, 4 * t->num_params, err)
                                             : fail_tensor(g, t->name, err, "its data are empty and there is no .bin file beside");
    if (status == AQ_OK) {
        part->data = part->owned_data = bytes;
        part->data_bytes = size;
    }
    aq_free(path);
    return status;
}

static aq_status read_raw(legacy_reader *g, aq_store_tensor *t, aq_part *part, const carquet_byte_array_t *data, aq_error *err) {
    const void *values;
    uint64_t n, n_zeros, bytes;
    bool null;
    next_int(g, L_AXIS, 0);
    next_int(g, L_GROUP, 0);
    if (!aq_column_next_list(&g->columns[L_SCALES], &values, &n, &null) || !aq_column_next_list(&g->columns[L_ZEROS], &values, &n_zeros, &null) || n || n_zeros)
        return fail_tensor(g, t->name, err, "it is not quantized but has scales or zero_points");
    if (!aq_mul(t->num_params, 4, &bytes)) return fail_tensor(g, t->name, err, "its size does not fit 64 bits");
    t->raw_dtype = AQ_F32;
    t->quant_type = "f32";
    part->row_count = t->num_params;
    part->data = data->data;
    part->data_bytes = (uint64_t)data->length;
    aq_status status = data->length == 0 && bytes > 0 && g->file->kind == AQ_FILE_V2_BASE
                           ? read_bin(g, t, part, err)
                           : aq_column_settle(g->file, &part->data, part->data_bytes, &part->owned_data, err);
    if (status != AQ_OK || part->data_bytes == bytes) return status;
    return aq_fail_at(err, AQ_ERR_FORMAT, g->file->path, t->name, "bytes of data: %llu, expected %llu", (unsigned long long)part->data_bytes,
                      (unsigned long long)bytes);
}

/* A JSON column: broken JSON is an error. *out is NULL for null, else json_decref. */
static aq_status next_json(legacy_reader *g, legacy_column c, const char *tensor, json_t **out, aq_error *err) {
    const carquet_byte_array_t *v = aq_column_next(&g->columns[c]);
    *out = NULL;
    if (!v) return AQ_OK;
    aq_error why;
    aq_error_clear(&why);
    if (v->length < 0 || (uint64_t)v->length > AQ_LIMIT_CONFIG_BYTES) return fail_tensor(g, tensor, err, "a JSON column is over the limit of 16 MiB");
    if (aq_json_parse(out, (const char *)v->data, (uint64_t)v->length, 64, g_names[c], &why) != AQ_OK) return fail_tensor(g, tensor, err, why.message);
    return AQ_OK;
}

static aq_status read_json_columns(legacy_reader *g, aq_store_tensor *t, aq_error *err) {
    json_t *time = NULL, *spatial = NULL, *stats = NULL;
    aq_status status = next_json(g, L_TIME, t->name, &time, err);
    if (status == AQ_OK) status = next_json(g, L_SPATIAL, t->name, &spatial, err);
    if (status == AQ_OK) status = next_json(g, L_STATS, t->name, &stats, err);
    if (status == AQ_OK) status = aq_extension_from_json(g->store, g->file, time, spatial, stats, t, err);
    json_decref(time);
    json_decref(spatial);
    json_decref(stats);
    return status;
}

static aq_status read_row(void *reader, aq_store_tensor *t, aq_part *part, aq_error *err) {
    legacy_reader *g = reader;
    const char *modality = NULL;
    memset(t, 0, sizeof *t);
    memset(part, 0, sizeof *part);
    part->file = g->file_index;
    t->quality = (aq_store_quality){.cosine = NAN, .sqnr_db = NAN, .output_sqnr_db = NAN};
    aq_status status = next_text(g, L_NAME, AQ_LIMIT_NAME_BYTES, NULL, &t->name, err);
    if (status == AQ_OK && !t->name) return fail_tensor(g, NULL, err, "a tensor has no name");
    if (status == AQ_OK) status = next_text(g, L_DTYPE, 64, t->name, &t->dtype, err);
    if (status == AQ_OK) status = next_text(g, L_QUANT_TYPE, 64, t->name, &t->quant_type, err);
    if (status == AQ_OK) status = next_text(g, L_MODALITY, 64, t->name, &modality, err);
    if (status == AQ_OK) status = read_shape(g, t, err);
    if (status != AQ_OK) return status;
    if (modality && g->store->modality == AQ_MODALITY_UNKNOWN) g->store->modality = aq_modality_from_name(modality);
    static const carquet_byte_array_t nothing = {(uint8_t *)"", 0};
    const carquet_byte_array_t *data = aq_column_next(&g->columns[L_DATA]);
    const char *type = t->quant_type ? t->quant_type : "none";
    if (!t->dtype) t->dtype = "F32";
    if (!data) data = &nothing;
    if (data->length < 0) return fail_tensor(g, t->name, err, "its data have a negative length");
    bool coded = strcmp(type, "int2") == 0 || strcmp(type, "int4") == 0 || strcmp(type, "int8") == 0;
    if (!coded && strcmp(type, "none") != 0 && strcmp(type, "float32") != 0 && strcmp(type, "f32") != 0)
        return fail_tensor(g, t->name, err, "its quant_type is none of none, float32, int2, int4, int8");
    status = coded ? read_codes(g, t, part, data, type[3] - '0', err) : read_raw(g, t, part, data, err);
    if (status == AQ_OK) status = read_json_columns(g, t, err);
    t->stored_bytes = g->file->map.size / g->n_rows;
    return status;
}

static aq_status read_group(legacy_reader *g, int32_t row_group, aq_error *err) {
    aq_status status = read_columns(g, row_group, err);
    if (status == AQ_OK) status = aq_store_append_rows(g->store, g->n_rows, read_row, g, err);
    for (int c = 0; c < L_COUNT; c++) aq_column_free(&g->columns[c]);
    return status;
}

aq_status aq_store_read_legacy(aq_store *store, size_t file, aq_error *err) {
    aq_store_input *f = &store->files[file];
    legacy_reader *g = aq_calloc(1, sizeof *g);
    if (!g) return aq_fail_memory(err, sizeof *g, "the container");
    *g = (legacy_reader){.store = store, .file = f, .file_index = file};
    for (int c = 0; c < L_COUNT; c++) g->columns[c].missing = true;
    find_columns(g);
    aq_status status = AQ_OK;
    if (g->leaf[L_NAME] < 0 || g->leaf[L_SHAPE] < 0 || g->leaf[L_DATA] < 0)
        status = aq_fail_at(err, AQ_ERR_FORMAT, f->path, NULL,
                            "is no model file: it has no arrowquant.schema_version and no columns layer_name (or name), shape and data");
    const char *version = f->kind == AQ_FILE_V1 ? "1.0" : "2.0";
    if (status == AQ_OK && !store->schema_version && !(store->schema_version = aq_strdup(version))) status = aq_fail_memory(err, 4, "the version");
    int32_t n = carquet_reader_num_row_groups(f->reader);
    for (int32_t i = 0; status == AQ_OK && i < n; i++) {
        carquet_row_group_metadata_t meta;
        if (carquet_reader_row_group_metadata(f->reader, i, &meta) != CARQUET_OK || meta.num_rows < 0 || (uint64_t)meta.num_rows > AQ_LIMIT_TENSORS ||
            (uint64_t)meta.num_rows > f->map.size)
            status = aq_fail_at(err, AQ_ERR_FORMAT, f->path, NULL, "row group %d: its number of rows does not fit the file", (int)i);
        else if ((g->n_rows = (uint64_t)meta.num_rows) > 0)
            status = read_group(g, i, err);
    }
    aq_free(g);
    return status;
}
