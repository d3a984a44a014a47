/* Reading the file of a collection. Nothing in it is believed: each row is checked against the ones before and its hash, the whole against the fingerprint;
 * H stays in the map and is compared with its hash when it is used. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/mem.h"
#include "base/parquet.h"
#include "base/size.h"
#include "base/utf8.h"
#include "calibration/file.h"

#define LIMIT_COUNT (INT64_C(1) << 56) /* rows of a layer: sums of counts cannot overflow */

typedef struct {
    aq_calib *c;
    aq_parquet *file;
    aq_column_data columns[CAL_COLUMNS];
    int32_t leaf[CAL_COLUMNS];
    size_t layer; /* of the row before; n_layers - 1 */
    int64_t group, part;
    uint64_t hessian_next; /* first row of H that is still to come; 0 when the one before is whole */
    aq_calib_digest *digest;
} reader;

static aq_status fail(const reader *r, const char *layer, aq_error *err, const char *what) {
    return aq_fail_at(err, AQ_ERR_FORMAT, r->file->path, layer, "%s", what);
}

/* ---- what says where the data come from ---- */

static bool read_number(const reader *r, const char *key, uint64_t most, uint64_t *out) {
    char name[64];
    snprintf(name, sizeof name, "arrowquant.calibration.%s", key);
    const char *text = carquet_reader_find_metadata(r->file->reader, name);
    size_t n = text ? strspn(text, "0123456789") : 0;
    if (n == 0 || n > 19 || text[n] || (n > 1 && text[0] == '0')) return false;
    *out = strtoull(text, NULL, 10);
    return *out <= most;
}

static bool is_text(const char *text, uint64_t n, uint64_t limit) {
    uint32_t code;
    if (n > limit) return false;
    for (uint64_t i = 0; i < n;) {
        size_t len = aq_utf8_decode((const unsigned char *)text + i, (size_t)(n - i), &code);
        if (len == 0 || code == 0) return false;
        i += len;
    }
    return true;
}

static aq_status read_options(const reader *r, aq_calib_options *o, aq_error *err) {
    const carquet_reader_t *p = r->file->reader;
    const char *version = carquet_reader_find_metadata(p, AQ_CALIB_KEY_SCHEMA);
    uint64_t n_timesteps = 0, n_groups = 0, hessian = 0, pooled = 0, synthetic = 0;
    if (!version) {
        aq_fail_at(err, AQ_ERR_FORMAT, r->file->path, NULL, "is no file of calibration statistics: it has no %s", AQ_CALIB_KEY_SCHEMA);
        aq_hint(err, "such files are made by the recorder (arrow_quant_v2.torch) or by arrowquant calib merge");
        return AQ_ERR_FORMAT;
    }
    if (strncmp(version, "1.", 2) != 0) {
        char shown[32];
        aq_escape(shown, sizeof shown, version, strnlen(version, 16));
        aq_fail_at(err, AQ_ERR_FORMAT, r->file->path, NULL, "has version %s of the statistics, this program reads version 1", shown);
        aq_hint(err, "install a newer ArrowQuant");
        return AQ_ERR_FORMAT;
    }
    aq_calib_options_init(o);
    if (!read_number(r, "n_timesteps", AQ_CALIB_LIMIT_TIMESTEPS, &n_timesteps) || !read_number(r, "n_groups", AQ_CALIB_LIMIT_GROUPS, &n_groups) ||
        !read_number(r, "hessian", 1, &hessian) || !read_number(r, "hessian_pooled", 1, &pooled) ||
        !read_number(r, "hessian_most", INT64_MAX, &o->hessian_most) || o->hessian_most == 0 || !read_number(r, "hessian_full", INT64_MAX, &o->hessian_full) ||
        !read_number(r, "seed", INT64_MAX, &o->seed) || !read_number(r, "synthetic", 1, &synthetic))
        return fail(r, NULL, err, "its settings (arrowquant.calibration.*) are missing or out of range");
    o->n_timesteps = (uint32_t)n_timesteps;
    o->n_groups = (uint32_t)n_groups;
    o->hessian = hessian;
    o->hessian_pooled = pooled;
    o->synthetic = synthetic;
    o->data_name = carquet_reader_find_metadata(p, "arrowquant.calibration.data_name");
    o->data_sha256 = carquet_reader_find_metadata(p, "arrowquant.calibration.data_sha256");
    if (o->data_name && !is_text(o->data_name, strlen(o->data_name), 1 << 16)) return fail(r, NULL, err, "the name of its data set is not UTF-8, or too long");
    const char *diagonal = carquet_reader_find_metadata(p, AQ_CALIB_KEY_DIAGONAL);
    if (diagonal && strcmp(diagonal, "1") != 0) return fail(r, NULL, err, "its settings (arrowquant.calibration.*) are missing or out of range");
    o->diagonal_only = diagonal != NULL;
    const char *modality = carquet_reader_find_metadata(p, "arrowquant.calibration.modality");
    o->modality = modality ? aq_modality_from_name(modality) : AQ_MODALITY_UNKNOWN;
    if (modality && o->modality == AQ_MODALITY_UNKNOWN) return fail(r, NULL, err, "its modality is none of text, code, image, audio");
    return AQ_OK;
}

/* ---- columns ---- */

static aq_status find_columns(reader *r, aq_error *err) {
    const carquet_schema_t *schema = carquet_reader_schema(r->file->reader);
    int32_t n = carquet_schema_num_columns(schema);
    for (int c = 0; c < CAL_COLUMNS; c++) r->leaf[c] = -1;
    for (int32_t i = 0; i < n; i++) {
        char path[64];
        if (!aq_parquet_leaf_path(schema, i, path, sizeof path)) continue;
        for (int c = 0; c < CAL_COLUMNS; c++) {
            if (strcmp(path, aq_calib_columns[c].name) != 0) continue;
            if (r->leaf[c] >= 0 || carquet_schema_column_type(schema, i) != aq_calib_columns[c].type ||
                carquet_schema_max_rep_level(schema, i) != (aq_calib_columns[c].list ? 1 : 0))
                return aq_fail_at(err, AQ_ERR_FORMAT, r->file->path, NULL, "column %s is there twice, or of another type than this format gives it", path);
            r->leaf[c] = i;
        }
    }
    for (int c = 0; c < CAL_COLUMNS; c++)
        if (r->leaf[c] < 0) return aq_fail_at(err, AQ_ERR_FORMAT, r->file->path, NULL, "column %s is missing", aq_calib_columns[c].name);
    return AQ_OK;
}

/* The next value of each column as a cell. */
static bool next_row(reader *r, aq_calib_row row) {
    memset(row, 0, sizeof(aq_calib_row));
    for (int c = 0; c < CAL_COLUMNS; c++) {
        const aq_calib_column_info *info = &aq_calib_columns[c];
        aq_calib_cell *cell = &row[c];
        if (info->list) {
            bool null;
            if (!aq_column_next_list(&r->columns[c], &cell->data, &cell->n, &null)) return false;
            cell->present = !null;
            continue;
        }
        const void *value = aq_column_next(&r->columns[c]);
        cell->present = value != NULL;
        if (!value) {
            if (!info->optional) return false;
        } else if (info->type == CARQUET_PHYSICAL_BYTE_ARRAY) {
            const carquet_byte_array_t *bytes = value;
            if (bytes->length < 0) return false;
            cell->data = bytes->data;
            cell->n = (uint64_t)bytes->length;
            if (info->text && !is_text(cell->data, cell->n, AQ_CALIB_LIMIT_NAME_BYTES)) return false;
        } else {
            int32_t narrow;
            memcpy(&narrow, value, sizeof narrow);
            if (info->type == CARQUET_PHYSICAL_INT32)
                cell->number = narrow;
            else
                memcpy(&cell->number, value, sizeof cell->number);
        }
    }
    return true;
}

/* ---- rows ---- */

static bool all_finite(const aq_calib_cell *cell, bool wide, bool not_negative) {
    for (uint64_t i = 0; i < cell->n; i++) {
        double v = wide ? ((const double *)cell->data)[i] : (double)((const float *)cell->data)[i];
        if (!isfinite(v) || (not_negative && v < 0)) return false;
    }
    return true;
}

static aq_status read_sums(reader *r, aq_calib_layer *layer, uint32_t group, const aq_calib_row row, aq_error *err) {
    int64_t count = row[CAL_COUNT].number;
    uint64_t n = layer->n_inputs;
    bool shares = layer->source != r->layer, any = false;
    for (int c = CAL_SUM; c <= CAL_MAX; c++) any = any || row[c].present;
    if (count < 0 || count > LIMIT_COUNT || (count == 0 && any) || (shares && (count > 0 || any)))
        return fail(r, layer->name, err, "its count and its sums do not fit each other");
    if (count == 0) return AQ_OK;
    bool diagonal_only = r->c->options.diagonal_only;
    for (int c = CAL_SUM; c <= CAL_MAX; c++)
        if (diagonal_only && c != CAL_SUM_SQ ? row[c].present : !row[c].present || row[c].n != n)
            return fail(r, layer->name, err, "a list is not as long as it has inputs");
    if (!all_finite(&row[CAL_SUM], true, false) || !all_finite(&row[CAL_SUM_SQ], true, true) || !all_finite(&row[CAL_MIN], false, false) ||
        !all_finite(&row[CAL_MAX], false, false))
        return fail(r, layer->name, err, "a sum is not finite");
    aq_sums *s = &layer->groups[group];
    if (!aq_sums_reserve(r->c, s, n)) return aq_fail_memory(err, 28 * n, "a layer's statistics");
    s->count = (uint64_t)count;
    memcpy(s->sum_sq, row[CAL_SUM_SQ].data, (size_t)(8 * n));
    if (diagonal_only) return AQ_OK;
    const float *absmax = row[CAL_ABSMAX].data, *lo = row[CAL_MIN].data, *hi = row[CAL_MAX].data;
    for (uint64_t j = 0; j < n; j++)
        if (!(lo[j] <= hi[j]) || absmax[j] != fmaxf(fabsf(lo[j]), fabsf(hi[j]))) return fail(r, layer->name, err, "absmax, min and max do not fit each other");
    memcpy(s->sum, row[CAL_SUM].data, (size_t)(8 * n));
    memcpy(s->absmax, absmax, (size_t)(4 * n));
    memcpy(s->min, lo, (size_t)(4 * n));
    memcpy(s->max, hi, (size_t)(4 * n));
    return AQ_OK;
}

static aq_status read_timesteps(reader *r, aq_calib_layer *layer, uint32_t group, const aq_calib_row row, aq_error *err) {
    uint64_t n = row[CAL_TIMESTEPS].n;
    if (!row[CAL_TIMESTEPS].present) n = 0;
    for (int c = CAL_TIMESTEPS; c <= CAL_TIMESTEP_MAX; c++)
        if (row[c].n != n) return fail(r, layer->name, err, "the lists of its timesteps differ in length");
    if (n > 0 && layer->source != r->layer) return fail(r, layer->name, err, "it shares its statistics and has timesteps of its own");
    if (n > (uint64_t)AQ_CALIB_LIMIT_TIMESTEPS + 1) return fail(r, layer->name, err, "it has too many timesteps");
    const int32_t *timestep = row[CAL_TIMESTEPS].data;
    const int64_t *count = row[CAL_TIMESTEP_COUNT].data;
    const double *sum = row[CAL_TIMESTEP_SUM].data, *sum_sq = row[CAL_TIMESTEP_SUM_SQ].data;
    const float *lo = row[CAL_TIMESTEP_MIN].data, *hi = row[CAL_TIMESTEP_MAX].data;
    for (uint64_t i = 0; i < n; i++) {
        aq_timestep_stats t = {timestep[i], lo[i], hi[i], (uint64_t)count[i], 0, 0, sum[i], sum_sq[i]};
        if (t.timestep < -1 || (r->c->options.n_timesteps > 0 && t.timestep >= (int64_t)r->c->options.n_timesteps) ||
            aq_calib_group_of(r->c, t.timestep) != group || count[i] <= 0 || count[i] > LIMIT_COUNT || !isfinite(t.sum) || !(t.sum_sq >= 0) ||
            !isfinite(t.sum_sq) || !isfinite(t.min) || !isfinite(t.max) || t.min > t.max ||
            (layer->n_timesteps > 0 && layer->timesteps[layer->n_timesteps - 1].timestep >= t.timestep))
            return fail(r, layer->name, err, "a timestep is out of order, or its figures out of range");
        if (!aq_timesteps_add(layer, &t)) return aq_fail_memory(err, sizeof t, "the list of timesteps");
    }
    return AQ_OK;
}

static aq_status read_gradient(reader *r, aq_calib_layer *layer, uint32_t group, const aq_calib_row row, aq_error *err) {
    const aq_calib_cell *count = &row[CAL_GRADIENT_COUNT], *rows = &row[CAL_GRADIENT_ROWS], *cols = &row[CAL_GRADIENT_COLS];
    if (!count->present && !rows->present && !cols->present) return AQ_OK;
    if (group != 0 || !count->present || count->number <= 0 || count->number > LIMIT_COUNT || rows->n == 0 || rows->n > AQ_CALIB_LIMIT_INPUTS ||
        cols->n != layer->n_inputs || !all_finite(rows, true, true) || !all_finite(cols, true, true))
        return fail(r, layer->name, err, "its gradient does not fit its inputs, or is not finite");
    if (!aq_gradient_reserve(layer, rows->n)) return aq_fail_memory(err, 8 * (rows->n + cols->n), "a gradient");
    memcpy(layer->gradient_rows, rows->data, (size_t)(8 * rows->n));
    memcpy(layer->gradient_cols, cols->data, (size_t)(8 * cols->n));
    layer->n_gradients = (uint64_t)count->number;
    aq_gradient_finish(layer);
    return AQ_OK;
}

/* Keeps bytes that do not lie in the map (a file that another program wrote anew, compressed). */
static aq_status settle(reader *r, const aq_calib_cell *cell, const uint8_t **out, aq_error *err) {
    uintptr_t p = (uintptr_t)cell->data, begin = (uintptr_t)r->file->map.data;
    *out = cell->data;
    if (p >= begin && p - begin <= r->file->map.size && cell->n <= r->file->map.size - (p - begin)) return AQ_OK;
    aq_calib *c = r->c;
    void **owned = aq_realloc(c->owned, c->n_owned + 1, sizeof *owned);
    if (owned) c->owned = owned;
    void *copy = owned ? aq_alloc(cell->n) : NULL;
    if (!copy) return aq_fail_memory(err, cell->n, "a second moment");
    memcpy(copy, cell->data, (size_t)cell->n);
    c->owned[c->n_owned++] = copy;
    *out = copy;
    return AQ_OK;
}

static aq_status read_hessian(reader *r, aq_calib_layer *layer, uint32_t group, const aq_calib_row row, aq_error *err) {
    uint64_t n = layer->n_inputs;
    bool any = false, all = true;
    for (int c = CAL_HESSIAN_COUNT; c <= CAL_HESSIAN_HASH; c++) any = any || row[c].present, all = all && row[c].present;
    if (!any) return row[CAL_PART].number == 0 ? AQ_OK : fail(r, layer->name, err, "a part of its second moment is missing");
    if (!all || !layer->moments || (r->c->options.hessian_pooled && group != 0)) return fail(r, layer->name, err, "it cannot have a second moment here");
    aq_moment *m = aq_calib_moment(r->c, layer, group);
    int64_t count = row[CAL_HESSIAN_COUNT].number, begin = row[CAL_HESSIAN_ROW_BEGIN].number, end = row[CAL_HESSIAN_ROW_END].number;
    if (count <= 0 || count > LIMIT_COUNT || begin < 0 || (uint64_t)begin != r->hessian_next || end <= begin || (uint64_t)end > n ||
        (begin > 0 && (uint64_t)count != m->count) || row[CAL_HESSIAN_HASH].n != 32)
        return fail(r, layer->name, err, "the parts of its second moment do not fit each other");
    uint64_t b = (uint64_t)begin, e = (uint64_t)end, values = (e - b) * n - (e * (e - 1) / 2 - (b > 0 ? b * (b - 1) / 2 : 0));
    if (row[CAL_HESSIAN].n != 4 * values) return fail(r, layer->name, err, "a part of its second moment is not as long as its rows ask for");
    aq_moment_part *parts = aq_realloc(m->parts, m->n_parts + 1, sizeof *parts);
    if (!parts) return aq_fail_memory(err, sizeof *parts, "a second moment");
    m->parts = parts;
    aq_moment_part *part = &parts[m->n_parts];
    *part = (aq_moment_part){.row_begin = b, .row_end = e};
    memcpy(part->hash, row[CAL_HESSIAN_HASH].data, 32);
    aq_status status = settle(r, &row[CAL_HESSIAN], &part->data, err);
    if (status != AQ_OK) return status;
    m->n_parts++;
    m->count = m->stored_count = m->n_offered = (uint64_t)count;
    m->file = r->c->path;
    m->layer = layer->name;
    r->hessian_next = e == n ? 0 : e;
    return AQ_OK;
}

/* The layer that the row belongs to: the one before, or a new one. */
static aq_status find_layer(reader *r, const aq_calib_row row, aq_calib_layer **out, aq_error *err) {
    char name[AQ_CALIB_LIMIT_NAME_BYTES + 1], same[AQ_CALIB_LIMIT_NAME_BYTES + 1];
    const aq_calib_cell *text = &row[CAL_LAYER], *shared = &row[CAL_SAME_INPUT_AS];
    memcpy(name, text->data, (size_t)text->n);
    name[text->n] = 0;
    int64_t group = row[CAL_GROUP].number, part = row[CAL_PART].number;
    aq_calib *c = r->c;
    bool same_layer = c->n_layers > 0 && strcmp(c->layers[r->layer].name, name) == 0;
    if (!same_layer && (group != 0 || part != 0)) return fail(r, name, err, "its rows do not begin with time group 0");
    if (same_layer && !(group == r->group && part == r->part + 1) && !(group > r->group && part == 0)) return fail(r, name, err, "its rows are out of order");
    if ((part > 0) != (r->hessian_next > 0)) return fail(r, name, err, "a part of a second moment is missing, or one too many");
    uint32_t start = 0, end = 0;
    if (group < 0 || group >= (int64_t)c->options.n_groups) return fail(r, name, err, "its time group is out of range");
    aq_calib_group_range(c, (uint32_t)group, &start, &end);
    if (row[CAL_START].number != (int64_t)start || row[CAL_END].number != (int64_t)end)
        return fail(r, name, err, "its range of timesteps is not that of its group");
    if (!same_layer) {
        if (shared->present) memcpy(same, shared->data, (size_t)shared->n);
        same[shared->present ? shared->n : 0] = 0;
        aq_status status = row[CAL_N_INPUTS].number < 0
                               ? fail(r, name, err, "its number of inputs is negative")
                               : aq_calib_add_layer(c, name, (uint64_t)row[CAL_N_INPUTS].number, shared->present ? same : NULL, &r->layer, err);
        if (status == AQ_ERR_USAGE) {
            if (err) err->code = AQ_ERR_FORMAT;
            aq_context(err, "%s", r->file->path);
            status = AQ_ERR_FORMAT;
        }
        if (status != AQ_OK) return status;
    } else if (row[CAL_N_INPUTS].number != (int64_t)c->layers[r->layer].n_inputs) {
        return fail(r, name, err, "its rows differ in the number of inputs");
    }
    r->group = group;
    r->part = part;
    *out = &c->layers[r->layer];
    return AQ_OK;
}

static aq_status read_row(reader *r, const aq_calib_row row, aq_error *err) {
    char hash[33];
    if (row[CAL_LAYER].n == 0 || row[CAL_HASH].n != 32) return fail(r, NULL, err, "a row has no layer or no hash");
    if (!aq_calib_row_hash(row, hash) || !aq_calib_digest_row(r->digest, hash)) return aq_fail_memory(err, 1, "a hash");
    if (!AQ_HASHES_IGNORED && memcmp(hash, row[CAL_HASH].data, 32) != 0) return fail(r, NULL, err, "is damaged: the figures of a row do not match their hash");
    aq_calib_layer *layer = NULL;
    aq_status status = find_layer(r, row, &layer, err);
    if (status != AQ_OK) return status;
    uint32_t group = (uint32_t)r->group;
    if (r->part > 0) { /* more of H, nothing else */
        for (int c = CAL_SUM; c <= CAL_GRADIENT_COLS; c++)
            if (row[c].present) return fail(r, layer->name, err, "a further part of its second moment has sums");
        return read_hessian(r, layer, group, row, err);
    }
    status = read_sums(r, layer, group, row, err);
    if (status == AQ_OK) status = read_timesteps(r, layer, group, row, err);
    if (status == AQ_OK) status = read_gradient(r, layer, group, row, err);
    return status == AQ_OK ? read_hessian(r, layer, group, row, err) : status;
}

static aq_status read_row_group(reader *r, int32_t index, aq_error *err) {
    carquet_row_group_metadata_t meta;
    if (carquet_reader_row_group_metadata(r->file->reader, index, &meta) != CARQUET_OK || meta.num_rows < 0 || (uint64_t)meta.num_rows > r->file->map.size)
        return aq_fail_at(err, AQ_ERR_FORMAT, r->file->path, NULL, "row group %d: its number of rows does not fit the file", (int)index);
    uint64_t n = (uint64_t)meta.num_rows, most_levels = r->file->map.size / 4 + n;
    aq_status status = AQ_OK;
    /* Time groups cost memory before any is seen: no more of it than the file's size bears. */
    uint64_t n_groups = r->c->options.n_groups, cells = 0;
    if (!aq_mul(r->c->n_layers + n, n_groups, &cells) || cells > r->file->map.size + (1 << 16))
        return aq_fail_at(err, AQ_ERR_FORMAT, r->file->path, NULL, "%llu time groups are more than a file of its size can hold", (unsigned long long)n_groups);
    for (int c = 0; status == AQ_OK && c < CAL_COLUMNS; c++)
        status = aq_parquet_column(&r->columns[c], r->file, index, r->leaf[c], aq_calib_columns[c].name, aq_calib_columns[c].type, n, most_levels, err);
    for (uint64_t i = 0; status == AQ_OK && i < n; i++) {
        aq_calib_row row;
        status = next_row(r, row) ? read_row(r, row, err) : fail(r, NULL, err, "a value is missing, too long or no UTF-8");
    }
    for (int c = 0; c < CAL_COLUMNS; c++) aq_column_free(&r->columns[c]);
    return status;
}

static aq_status read_file(reader *r, aq_calib **out, const char *path, aq_error *err) {
    aq_calib_options options;
    aq_status status = read_options(r, &options, err);
    if (status == AQ_OK) status = find_columns(r, err);
    if (status != AQ_OK) return status;
    status = aq_calib_create(out, &options, err);
    if (status == AQ_ERR_USAGE) {
        if (err) err->code = AQ_ERR_FORMAT;
        aq_context(err, "%s", path);
        status = AQ_ERR_FORMAT;
    }
    if (status != AQ_OK) return status;
    aq_calib *c = r->c = *out;
    c->path = aq_strdup(path);
    r->digest = aq_calib_digest_create(&c->options);
    if (!c->path || !r->digest) return aq_fail_memory(err, 1, "the statistics");
    for (int32_t i = 0; status == AQ_OK && i < carquet_reader_num_row_groups(r->file->reader); i++) status = read_row_group(r, i, err);
    if (status == AQ_OK && r->hessian_next > 0) status = fail(r, c->layers[r->layer].name, err, "the last part of its second moment is missing");
    if (status != AQ_OK) return status;
    bool ok = aq_calib_digest_end(r->digest, c->fingerprint);
    r->digest = NULL;
    if (!ok) return aq_fail_memory(err, 1, "a hash");
    const char *cache_key = carquet_reader_find_metadata(r->file->reader, AQ_CALIB_KEY_CACHE);
    if (cache_key && strlen(cache_key) < sizeof c->cache_key) memcpy(c->cache_key, cache_key, strlen(cache_key) + 1);
    atomic_store(&c->is_changed, false); /* as reading it did */
    const char *stored = carquet_reader_find_metadata(r->file->reader, AQ_CALIB_KEY_HASH);
    if (!stored || (!AQ_HASHES_IGNORED && strcmp(stored, c->fingerprint) != 0)) return fail(r, NULL, err, "is damaged: its content does not match its hash");
    return AQ_OK;
}

aq_status aq_calib_open(aq_calib **out, const char *path, aq_error *err) {
    *out = NULL;
    aq_error_clear(err);
    aq_parquet file;
    reader *r = NULL;
    aq_status status = aq_parquet_open(&file, path, err);
    if (status == AQ_ERR_FORMAT)
        aq_hint(err, "record again, or copy the file again if it was whole elsewhere; data sets are no statistics: run `calibrate` on them");
    if (status == AQ_OK && !(r = aq_calloc(1, sizeof *r))) status = aq_fail_memory(err, sizeof *r, "the statistics");
    if (status == AQ_OK && r) {
        r->file = &file;
        for (int c = 0; c < CAL_COLUMNS; c++) r->columns[c].missing = true;
        status = read_file(r, out, path, err);
        aq_calib_digest_end(r->digest, NULL);
    }
    aq_free(r);
    if (status == AQ_OK && *out) { /* H stays in the map */
        (*out)->map = file.map;
        file.map = (aq_file_map){.fd = -1};
    } else {
        aq_calib_free(*out);
        *out = NULL;
    }
    aq_parquet_close(&file);
    return status;
}

aq_status aq_calib_verify(const aq_calib *c, aq_error *err) {
    aq_error_clear(err);
    for (size_t i = 0; i < c->n_layers; i++)
        for (uint32_t g = 0; c->layers[i].moments && g < aq_calib_n_moments(c); g++) {
            aq_status status = aq_moment_check(&c->layers[i].moments[g], err);
            if (status != AQ_OK) return status;
        }
    return AQ_OK;
}
