/* Rows of a V2 extended file: each is checked against its own shape and sizes (PQ10) before anything is built on it. */
#include "store/store_internal.h"

#include <ctype.h>
#include <math.h>
#include <string.h>

#include "base/mem.h"
#include "base/size.h"
#include "store/extension.h"

#define RELEASE_BYTES (UINT64_C(1) << 20)

typedef struct {
    aq_store *store;
    aq_store_input *file;
    size_t file_index;
    int32_t row_group;
    uint64_t n_rows;
    uint64_t row_group_bytes, payload_bytes;
    aq_column_data columns[COL_COUNT];
} group_reader;

static aq_status next_text(group_reader *g, aq_column c, uint64_t limit, const char **out, const char *tensor, aq_error *err) {
    return aq_column_next_text(&g->columns[c], g->store, g->file->path, aq_columns[c].path, tensor, limit, out, err);
}

static aq_status required_text(group_reader *g, aq_column c, uint64_t limit, const char **out, const char *tensor, aq_error *err) {
    aq_status status = next_text(g, c, limit, out, tensor, err);
    if (status == AQ_OK && !*out) return aq_fail_at(err, AQ_ERR_FORMAT, g->file->path, tensor, "column %s is null", aq_columns[c].path);
    return status;
}

static aq_status fail_row(group_reader *g, const aq_store_tensor *t, aq_error *err, const char *what) {
    return aq_fail_at(err, AQ_ERR_FORMAT, g->file->path, t->name, "%s", what);
}

static aq_status read_shape(group_reader *g, aq_store_tensor *t, aq_error *err) {
    const void *values;
    uint64_t n, count;
    bool null;
    if (!aq_column_next_list(&g->columns[COL_SHAPE], &values, &n, &null) || null) return fail_row(g, t, err, "its shape is null or holds null");
    if (n > AQ_MAX_RANK)
        return aq_fail_at(err, AQ_ERR_FORMAT, g->file->path, t->name, "has %llu dimensions, over the limit of %d", (unsigned long long)n, AQ_MAX_RANK);
    t->shape.rank = (uint32_t)n;
    for (uint64_t i = 0; i < n; i++) {
        int64_t d;
        memcpy(&d, (const uint8_t *)values + 8 * i, 8);
        if (d < 0) return fail_row(g, t, err, "a dimension is negative");
        t->shape.dims[i] = (uint64_t)d;
    }
    if (!aq_shape_count(&t->shape, &count) || count > INT64_MAX) return fail_row(g, t, err, "its number of elements does not fit 63 bits");
    const int64_t *num_params = aq_column_next(&g->columns[COL_NUM_PARAMS]);
    if (!num_params || *num_params < 0 || (uint64_t)*num_params != count)
        return aq_fail_at(err, AQ_ERR_FORMAT, g->file->path, t->name, "num_params is %lld, its shape has %llu elements",
                          num_params ? (long long)*num_params : -1LL, (unsigned long long)count);
    t->num_params = count;
    aq_shape_matrix(&t->shape, &t->rows, &t->cols);
    return AQ_OK;
}

static aq_status next_bytes(group_reader *g, aq_column c, const aq_store_tensor *t, const uint8_t **data, uint64_t *size, bool *null, aq_error *err) {
    const carquet_byte_array_t *v = aq_column_next(&g->columns[c]);
    *data = NULL;
    *size = 0;
    *null = !v;
    if (!v) return AQ_OK;
    if (v->length < 0) return fail_row(g, t, err, "a value has a negative length");
    *data = v->data;
    *size = (uint64_t)v->length;
    return AQ_OK;
}

static aq_status settle(group_reader *g, const uint8_t **data, uint64_t size, void **owned, aq_error *err) {
    return aq_column_settle(g->file, data, size, owned, err);
}

static aq_status read_spec(group_reader *g, aq_store_tensor *t, const char *form, aq_error *err) {
    const int32_t *axis = aq_column_next(&g->columns[COL_QUANT_AXIS]), *group = aq_column_next(&g->columns[COL_GROUP_SIZE]),
                  *bits = aq_column_next(&g->columns[COL_BIT_WIDTH]);
    const char *type = t->quant_type;
    bool r2q = strcmp(type, "r2q2") == 0;
    t->quantized = r2q || strcmp(type, "int2") == 0 || strcmp(type, "int4") == 0 || strcmp(type, "int8") == 0;
    if (!t->quantized) {
        if (strncmp(type, "int", 3) == 0 || axis || group || bits || form) return fail_row(g, t, err, "its quantization columns contradict its quant_type");
        return AQ_OK;
    }
    if (!axis || !group || !bits) return fail_row(g, t, err, "quant_axis, group_size or bit_width is null");
    if (*bits != type[3] - '0') return aq_fail_at(err, AQ_ERR_FORMAT, g->file->path, t->name, "bit_width is %d, its quant_type is %s", (int)*bits, type);
    if (*axis != 0 && *axis != 1) return aq_fail_at(err, AQ_ERR_FORMAT, g->file->path, t->name, "quant_axis is %d, expected 0 or 1", (int)*axis);
    if (*group <= 0) return aq_fail_at(err, AQ_ERR_FORMAT, g->file->path, t->name, "group_size is %d, expected a positive number", (int)*group);
    t->spec = (aq_quant_spec){.bits = *bits, .group_size = (uint64_t)*group, .axis = *axis, .params = AQ_PARAMS_F32, .method = AQ_METHOD_RTN};
    if (r2q != (form && strcmp(form, "r2q") == 0)) return fail_row(g, t, err, "params_form contradicts its quant_type");
    if (!form || strcmp(form, "f32") == 0) return AQ_OK;
    if (strcmp(form, "f16") == 0)
        t->spec.params = AQ_PARAMS_F16;
    else if (strcmp(form, "two-level") == 0)
        t->spec.params = AQ_PARAMS_TWO_LEVEL;
    else if (r2q)
        t->spec.params = AQ_PARAMS_R2Q;
    else
        return fail_row(g, t, err, "params_form is unknown to this version");
    return AQ_OK;
}

static aq_status fail_sizes(group_reader *g, const aq_store_tensor *t, const char *what, uint64_t found, uint64_t expected, aq_error *err) {
    return aq_fail_at(err, AQ_ERR_FORMAT, g->file->path, t->name, "%s: %llu, expected %llu", what, (unsigned long long)found, (unsigned long long)expected);
}

/* Lists that stand beside packed parameters must say the same. */
static aq_status compare_lists(group_reader *g, const aq_store_tensor *t, const aq_quant_layout *layout, const uint8_t *params, const uint8_t *scales,
                               const uint8_t *zero_points, aq_error *err) {
    float *pairs = aq_calloc(layout->n_pairs, 2 * sizeof *pairs);
    if (!pairs) return aq_fail_memory(err, 8 * layout->n_pairs, "parameters");
    aq_quant_pairs(&t->spec, layout, params, pairs, pairs + layout->n_pairs);
    bool same = memcmp(pairs, scales, 4 * layout->n_pairs) == 0 && memcmp(pairs + layout->n_pairs, zero_points, 4 * layout->n_pairs) == 0;
    aq_free(pairs);
    return same ? AQ_OK : fail_row(g, t, err, "its scales and zero_points disagree with its packed params");
}

static aq_status read_params(group_reader *g, const aq_store_tensor *t, const aq_quant_layout *layout, aq_part *part, aq_error *err) {
    const void *scales, *zeros;
    uint64_t n_scales = 0, n_zeros = 0;
    bool null_s = true, null_z = true, null_p = true;
    if (!aq_column_next_list(&g->columns[COL_SCALES], &scales, &n_scales, &null_s) ||
        !aq_column_next_list(&g->columns[COL_ZERO_POINTS], &zeros, &n_zeros, &null_z))
        return fail_row(g, t, err, "scales or zero_points hold null");
    aq_status status = next_bytes(g, COL_PARAMS, t, &part->params, &part->params_bytes, &null_p, err);
    if (status != AQ_OK) return status;
    if (!t->quantized) {
        if (n_scales || n_zeros || part->params_bytes) return fail_row(g, t, err, "it is not quantized but has scales, zero_points or params");
        return AQ_OK;
    }
    bool lists = n_scales || n_zeros;
    if (lists && (n_scales != layout->n_pairs || n_zeros != layout->n_pairs))
        return fail_sizes(g, t, n_scales != layout->n_pairs ? "number of scales" : "number of zero_points", n_scales != layout->n_pairs ? n_scales : n_zeros,
                          layout->n_pairs, err);
    if (t->spec.params == AQ_PARAMS_F32) {
        if (!null_p && part->params_bytes) return fail_row(g, t, err, "its params are packed but params_form does not say how");
        if (!lists && layout->n_pairs) return fail_sizes(g, t, "number of scales", 0, layout->n_pairs, err);
        float *pairs = aq_alloc(layout->params_bytes);
        if (!pairs) return aq_fail_memory(err, layout->params_bytes, "parameters");
        for (uint64_t i = 0; i < layout->n_pairs; i++) {
            memcpy(&pairs[2 * i], (const uint8_t *)scales + 4 * i, 4);
            memcpy(&pairs[2 * i + 1], (const uint8_t *)zeros + 4 * i, 4);
        }
        part->params = part->owned_params = pairs;
        part->params_bytes = layout->params_bytes;
    } else {
        if (null_p || part->params_bytes != layout->params_bytes) return fail_sizes(g, t, "bytes of params", part->params_bytes, layout->params_bytes, err);
        status = settle(g, &part->params, part->params_bytes, &part->owned_params, err);
        if (status == AQ_OK && lists) status = compare_lists(g, t, layout, part->params, scales, zeros, err);
        if (status != AQ_OK) return status;
    }
    status = aq_quant_params_check(&t->spec, layout, part->params, err);
    if (status != AQ_OK) {
        char why[512];
        snprintf(why, sizeof why, "%s", err ? err->message : "a scale or zero point is out of range");
        return aq_fail_at(err, AQ_ERR_FORMAT, g->file->path, t->name, "%s", why);
    }
    return AQ_OK;
}

/* Which rows of the tensor this is, and whether the data have the size that follows. */
static aq_status read_extent(group_reader *g, aq_store_tensor *t, aq_part *part, aq_quant_layout *layout, aq_error *err) {
    const int64_t *start = aq_column_next(&g->columns[COL_ROW_START]), *count = aq_column_next(&g->columns[COL_ROW_COUNT]);
    uint64_t all = t->quantized ? t->rows : t->num_params;
    if (!start != !count) return fail_row(g, t, err, "row_start stands without row_count or the reverse");
    if (start && (*start < 0 || *count <= 0 || (uint64_t)*start > all || (uint64_t)*count > all - (uint64_t)*start))
        return aq_fail_at(err, AQ_ERR_FORMAT, g->file->path, t->name, "rows %lld + %lld are not within its %llu rows", (long long)*start, (long long)*count,
                          (unsigned long long)all);
    part->row_begin = start ? (uint64_t)*start : 0;
    part->row_count = count ? (uint64_t)*count : all;
    uint64_t expected;
    if (t->quantized) {
        aq_error why;
        if (aq_quant_layout_init(&t->layout, &t->spec, t->rows, t->cols, &why) != AQ_OK ||
            aq_quant_layout_init(layout, &t->spec, part->row_count, t->cols, &why) != AQ_OK)
            return fail_row(g, t, err, why.message);
        uint64_t unit = t->spec.group_size;
        if (t->spec.axis == 0 && part->row_begin % unit != 0) return fail_row(g, t, err, "a part begins inside a group of rows");
        if (t->spec.axis == 0 && part->row_count % unit != 0 && part->row_begin + part->row_count != all)
            return fail_row(g, t, err, "a part ends inside a group of rows");
        expected = layout->codes_bytes;
    } else if (t->raw_dtype == AQ_DTYPE_OTHER) {
        if (start) return fail_row(g, t, err, "a tensor of an unknown element type cannot have parts");
        return AQ_OK;
    } else if (!aq_mul(part->row_count, aq_dtype_size(t->raw_dtype), &expected)) {
        return fail_row(g, t, err, "its size does not fit 64 bits");
    }
    return part->data_bytes == expected ? AQ_OK : fail_sizes(g, t, t->quantized ? "bytes of codes" : "bytes of data", part->data_bytes, expected, err);
}

static double next_measure(group_reader *g, aq_column c) {
    const double *v = aq_column_next(&g->columns[c]);
    return v ? *v : (double)NAN;
}

static aq_status read_quality(group_reader *g, aq_store_tensor *t, aq_error *err) {
    t->quality.cosine = next_measure(g, COL_COSINE);
    t->quality.sqnr_db = next_measure(g, COL_SQNR_DB);
    t->quality.output_sqnr_db = next_measure(g, COL_OUTPUT_SQNR_DB);
    aq_status status = next_text(g, COL_METHOD, 4096, &t->quality.method, t->name, err);
    if (status == AQ_OK) status = next_text(g, COL_FALLBACK_FROM, 65536, &t->quality.fallback_from, t->name, err);
    if (status == AQ_OK) status = next_text(g, COL_COMPARED_WITH, 65536, &t->quality.compared_with, t->name, err);
    static const struct {
        const char *name;
        aq_method method;
    } methods[] = {{"search", AQ_METHOD_SEARCH}, {"gptq", AQ_METHOD_GPTQ}, {"r2q", AQ_METHOD_R2Q}};
    for (size_t i = 0; status == AQ_OK && t->quality.method && i < sizeof methods / sizeof methods[0]; i++)
        if (strncmp(t->quality.method, methods[i].name, strlen(methods[i].name)) == 0) t->spec.method = methods[i].method;
    return status;
}

static void upper(char *out, size_t size, const char *text) {
    size_t i = 0;
    for (; text[i] && i + 1 < size; i++) out[i] = (char)toupper((unsigned char)text[i]);
    out[i] = 0;
}

static aq_status read_row(void *reader, aq_store_tensor *t, aq_part *part, aq_error *err) {
    group_reader *g = reader;
    const char *form, *hash;
    bool null;
    aq_quant_layout layout = {0};
    memset(t, 0, sizeof *t);
    memset(part, 0, sizeof *part);
    part->file = g->file_index;
    aq_status status = required_text(g, COL_LAYER_NAME, AQ_LIMIT_NAME_BYTES, &t->name, NULL, err);
    if (status == AQ_OK) status = required_text(g, COL_DTYPE, 64, &t->dtype, t->name, err);
    if (status == AQ_OK) status = required_text(g, COL_QUANT_TYPE, 64, &t->quant_type, t->name, err);
    if (status == AQ_OK) status = read_shape(g, t, err);
    if (status == AQ_OK) status = next_bytes(g, COL_DATA, t, &part->data, &part->data_bytes, &null, err);
    if (status == AQ_OK && null) status = fail_row(g, t, err, "its data are null");
    if (status == AQ_OK) status = next_text(g, COL_PARAMS_FORM, 64, &form, t->name, err);
    if (status == AQ_OK) status = read_spec(g, t, form, err);
    if (status != AQ_OK) return status;
    if (!t->quantized) {
        char word[65];
        upper(word, sizeof word, t->quant_type);
        t->raw_dtype = aq_dtype_from_name(word);
    }
    status = read_extent(g, t, part, &layout, err);
    if (status == AQ_OK) status = settle(g, &part->data, part->data_bytes, &part->owned_data, err);
    if (status == AQ_OK) status = read_params(g, t, &layout, part, err);
    if (status == AQ_OK) status = next_text(g, COL_HASH, 64, &hash, t->name, err);
    if (status == AQ_OK && hash) {
        if (strlen(hash) != 32) return fail_row(g, t, err, "its hash is not 32 digits");
        memcpy(part->hash, hash, 33);
    }
    if (status == AQ_OK) status = aq_extension_read(g->store, g->file, g->columns, t, err);
    if (status == AQ_OK) status = read_quality(g, t, err);
    if (status == AQ_OK) {
        /* Its values, and its share of what the row group costs besides values. */
        uint64_t own = part->data_bytes + part->params_bytes;
        uint64_t rest = g->row_group_bytes > g->payload_bytes ? g->row_group_bytes - g->payload_bytes : 0;
        t->stored_bytes = own + rest / g->n_rows;
    }
    return status;
}

/* The most entries the lists of this row group can have, from the bytes that the file spends on values: nothing is allocated from a declared count alone. */
static uint64_t list_limit(const group_reader *g) {
    return g->n_rows + AQ_LIMIT_PAGE_BYTES / 4 < g->file->map.size / 4 + 64 * g->n_rows ? g->n_rows + AQ_LIMIT_PAGE_BYTES / 4
                                                                                        : g->file->map.size / 4 + 64 * g->n_rows;
}

static uint64_t length_at(const aq_column_data *column, uint64_t i) {
    if (column->missing || !column->values) return 0;
    int32_t length = ((const carquet_byte_array_t *)(const void *)column->values)[i].length;
    return length > 0 ? (uint64_t)length : 0;
}

static aq_status read_group(group_reader *g, aq_error *err) {
    aq_status status = AQ_OK;
    for (aq_column c = 0; status == AQ_OK && c < COL_COUNT; c++) {
        if (c == COL_IS_DIFFUSION_MODEL || c == COL_MODALITY) continue; /* the file's metadata say them */
        status = aq_column_read(&g->columns[c], g->file, g->row_group, c, g->n_rows, c == COL_SHAPE ? g->n_rows * AQ_MAX_RANK : list_limit(g), err);
    }
    if (status != AQ_OK) return status;

    g->payload_bytes = 0;
    for (uint64_t i = 0; i < g->n_rows; i++) g->payload_bytes += length_at(&g->columns[COL_DATA], i) + length_at(&g->columns[COL_PARAMS], i);
    return aq_store_append_rows(g->store, g->n_rows, read_row, g, err);
}

aq_status aq_store_read_rows(aq_store *store, size_t file, aq_error *err) {
    aq_store_input *f = &store->files[file];
    int32_t n = carquet_reader_num_row_groups(f->reader);
    if (n < 0 || n > AQ_LIMIT_ROW_GROUPS)
        return aq_fail_at(err, AQ_ERR_FORMAT, f->path, NULL, "has %d row groups, over the limit of %d", (int)n, AQ_LIMIT_ROW_GROUPS);
    aq_status status = AQ_OK;
    group_reader *g = aq_calloc(1, sizeof *g);
    if (!g) return aq_fail_memory(err, sizeof *g, "the container");
    for (int32_t i = 0; status == AQ_OK && i < n; i++) {
        carquet_row_group_metadata_t meta;
        *g = (group_reader){.store = store, .file = f, .file_index = file, .row_group = i};
        if (carquet_reader_row_group_metadata(f->reader, i, &meta) != CARQUET_OK || meta.num_rows < 0 || (uint64_t)meta.num_rows > AQ_LIMIT_TENSORS ||
            (uint64_t)meta.num_rows > f->map.size)
            status = aq_fail_at(err, AQ_ERR_FORMAT, f->path, NULL, "row group %d: its number of rows does not fit the file", (int)i);
        if (status != AQ_OK) break;
        g->n_rows = (uint64_t)meta.num_rows;
        g->row_group_bytes = meta.total_byte_size > 0 ? (uint64_t)meta.total_byte_size : 0;
        if (g->n_rows > 0) status = read_group(g, err);
        for (int c = 0; c < COL_COUNT; c++) aq_column_free(&g->columns[c]);
        if (g->payload_bytes >= RELEASE_BYTES) aq_store_release_row_group(f, i); /* parameters were read; they come back when they are used */
    }
    aq_free(g);
    return status;
}
