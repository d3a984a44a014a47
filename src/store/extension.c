/* Spatial and time-aware parts of a tensor (see extension.h). */
#include "store/extension.h"

#include <math.h>
#include <string.h>

/* Sizes that no calibration reaches: a schedule has up to some thousand steps. */
enum { MAX_TIME_GROUPS = 10000, MAX_STATS = 1000000 };

/* ---- rules ---- */

static bool is_power_of_4(uint32_t v) { return v && (v & (v - 1)) == 0 && (v & 0x55555555u); }

static const char *spatial_fault(const aq_store_record *r, uint64_t cols) {
    bool any = r->n_equalization_scales || r->hadamard_group || r->equalization_folded;
    if (any && !r->quantized) return "it is not quantized but has spatial parts";
    if (r->n_equalization_scales && r->n_equalization_scales != cols) return "the number of equalization_scales differs from its inputs";
    for (uint64_t i = 0; i < r->n_equalization_scales; i++)
        if (!isfinite(r->equalization_scales[i]) || r->equalization_scales[i] <= 0) return "an equalization scale is not finite and positive";
    if (r->equalization_folded && !r->n_equalization_scales) return "its equalization is folded but there are no equalization_scales";
    if (r->folded_shift && !r->equalization_folded) return "it has a folded_shift but its equalization is not folded";
    for (uint64_t i = 0; r->folded_shift && i < r->n_equalization_scales; i++)
        if (!isfinite(r->folded_shift[i])) return "a value of its folded_shift is not finite";
    if (r->hadamard_group && (!is_power_of_4(r->hadamard_group) || r->hadamard_group < 4 || cols % r->hadamard_group != 0))
        return "hadamard_group is no power of 4 above 1 that divides its inputs";
    if (!(r->smoothing_alpha >= 0 && r->smoothing_alpha <= 1)) return "the smoothing alpha is not within 0..1";
    return NULL;
}

static const char *time_fault(const aq_time_group *g, size_t n) {
    if (n > MAX_TIME_GROUPS) return "it has more time groups than any schedule";
    for (size_t i = 0; i < n; i++) {
        if (g[i].start < 0 || g[i].end <= g[i].start) return "a time group is empty or before the start of the schedule";
        if (i > 0 && g[i].start != g[i - 1].end) return "its time groups have a gap or an overlap";
        if (!isfinite(g[i].scale) || g[i].scale <= 0) return "the scale of a time group is not finite and positive";
        if (!isfinite(g[i].zero_point)) return "the zero point of a time group is not finite";
        if (g[i].group_size <= 0) return "the group size of a time group is not positive";
    }
    return NULL;
}

static const char *stats_fault(const float *const stats[4], size_t n) {
    if (n > MAX_STATS) return "its activation_stats have more entries than any schedule";
    for (size_t i = 0; i < n; i++) {
        for (int k = 0; k < 4; k++)
            if (!isfinite(stats[k][i])) return "its activation_stats hold a number that is not finite";
        if (stats[1][i] < 0) return "a standard deviation in its activation_stats is negative";
        if (stats[2][i] > stats[3][i]) return "a minimum in its activation_stats is above its maximum";
    }
    return NULL;
}

const char *aq_extension_fault(const aq_store_record *r) {
    uint64_t rows, cols;
    aq_shape_matrix(&r->shape, &rows, &cols);
    const char *fault = spatial_fault(r, cols);
    if (!fault) fault = time_fault(r->time_groups, r->n_time_groups);
    return fault ? fault : stats_fault(r->activation_stats, r->n_activation_stats);
}

/* ---- tensors and records ---- */

void aq_extension_of(const aq_store_tensor *t, aq_store_record *out) {
    out->shape = t->shape;
    out->quantized = t->quantized;
    out->equalization_scales = t->equalization_scales;
    out->n_equalization_scales = t->n_equalization_scales;
    out->equalization_folded = t->equalization_folded;
    out->folded_shift = t->folded_shift;
    out->hadamard_group = t->hadamard_group;
    out->smoothing_alpha = t->smoothing_alpha;
    out->time_groups = t->time_groups;
    out->n_time_groups = t->n_time_groups;
    for (int k = 0; k < 4; k++) out->activation_stats[k] = t->activation_stats[k];
    out->n_activation_stats = t->n_activation_stats;
}

static bool same_bytes(const void *a, const void *b, uint64_t size) { return size == 0 || memcmp(a, b, (size_t)size) == 0; }

bool aq_extension_same(const aq_store_tensor *a, const aq_store_tensor *b) {
    bool same = a->n_equalization_scales == b->n_equalization_scales && a->equalization_folded == b->equalization_folded &&
                a->hadamard_group == b->hadamard_group && same_bytes(&a->smoothing_alpha, &b->smoothing_alpha, sizeof a->smoothing_alpha) &&
                a->n_time_groups == b->n_time_groups && a->n_activation_stats == b->n_activation_stats &&
                same_bytes(a->equalization_scales, b->equalization_scales, 4 * a->n_equalization_scales) && !a->folded_shift == !b->folded_shift &&
                (!a->folded_shift || same_bytes(a->folded_shift, b->folded_shift, 4 * a->n_equalization_scales)) &&
                same_bytes(a->time_groups, b->time_groups, a->n_time_groups * sizeof *a->time_groups);
    for (int k = 0; same && k < 4; k++) same = same_bytes(a->activation_stats[k], b->activation_stats[k], 4 * a->n_activation_stats);
    return same;
}

/* ---- reading ---- */

typedef struct {
    aq_store *store;
    const aq_store_input *file;
    aq_column_data *columns;
    const char *tensor;
} extension_reader;

static aq_status fail(const extension_reader *x, aq_error *err, const char *what) {
    return aq_fail_at(err, AQ_ERR_FORMAT, x->file->path, x->tensor, "%s", what);
}

aq_status aq_extension_check(const aq_store_input *file, const aq_store_tensor *tensor, aq_error *err) {
    aq_store_record record = {0};
    aq_extension_of(tensor, &record);
    const char *fault = aq_extension_fault(&record);
    return fault ? aq_fail_at(err, AQ_ERR_FORMAT, file->path, tensor->name, "%s", fault) : AQ_OK;
}

static int next_bool(extension_reader *x, aq_column c, int otherwise) {
    const uint8_t *v = aq_column_next(&x->columns[c]);
    return v ? *v != 0 : otherwise;
}

/* A list of 4-byte values; null is empty. */
static aq_status next_list(extension_reader *x, aq_column c, const void **values, uint64_t *n, aq_error *err) {
    bool null;
    if (aq_column_next_list(&x->columns[c], values, n, &null)) return AQ_OK;
    return aq_fail_at(err, AQ_ERR_FORMAT, x->file->path, x->tensor, "%s holds null", aq_columns[c].path);
}

static aq_status keep(extension_reader *x, const void *values, uint64_t n, const float **out, aq_error *err) {
    *out = n ? aq_store_keep(x->store, values, 4 * n) : NULL;
    return n && !*out ? aq_fail_memory(err, 4 * n, "spatial and time-aware parts") : AQ_OK;
}

static aq_status read_time_groups(extension_reader *x, aq_store_tensor *t, aq_error *err) {
    static const char *const disagree = "its lists of time_group_params have different lengths";
    const void *lists[5];
    uint64_t n[5];
    int enabled = next_bool(x, COL_TIME_ENABLED, -1);
    const int32_t *count = aq_column_next(&x->columns[COL_TIME_NUM_GROUPS]);
    for (int i = 0; i < 5; i++) {
        aq_status status = next_list(x, (aq_column)(COL_TIME_START + i), &lists[i], &n[i], err);
        if (status != AQ_OK) return status;
        if (n[i] != n[0]) return fail(x, err, disagree);
    }
    if (count && (*count < 0 || (uint64_t)*count != n[0]))
        return aq_fail_at(err, AQ_ERR_FORMAT, x->file->path, x->tensor, "num_time_groups is %d, time_group_params has %llu", (int)*count,
                          (unsigned long long)n[0]);
    if (n[0] == 0) return AQ_OK;
    if (!enabled) return fail(x, err, "its time_aware_quant is not enabled but has groups");
    aq_time_group *groups = n[0] > MAX_TIME_GROUPS ? NULL : aq_store_keep_zeros(x->store, n[0] * sizeof *groups);
    if (n[0] > MAX_TIME_GROUPS) return fail(x, err, "it has more time groups than any schedule");
    if (!groups) return aq_fail_memory(err, n[0] * sizeof *groups, "time groups");
    for (uint64_t i = 0; i < n[0]; i++) {
        memcpy(&groups[i].start, (const uint8_t *)lists[0] + 4 * i, 4);
        memcpy(&groups[i].end, (const uint8_t *)lists[1] + 4 * i, 4);
        memcpy(&groups[i].scale, (const uint8_t *)lists[2] + 4 * i, 4);
        memcpy(&groups[i].zero_point, (const uint8_t *)lists[3] + 4 * i, 4);
        memcpy(&groups[i].group_size, (const uint8_t *)lists[4] + 4 * i, 4);
    }
    t->time_groups = groups;
    t->n_time_groups = (size_t)n[0];
    return AQ_OK;
}

static aq_status read_spatial(extension_reader *x, aq_store_tensor *t, aq_error *err) {
    const void *scales, *shift;
    uint64_t n_shift;
    int enabled = next_bool(x, COL_SPATIAL_ENABLED, -1), equalized = next_bool(x, COL_SPATIAL_EQUALIZATION, -1);
    int smoothed = next_bool(x, COL_SPATIAL_SMOOTHING, -1);
    const float *alpha = aq_column_next(&x->columns[COL_SPATIAL_ALPHA]);
    aq_status status = next_list(x, COL_SPATIAL_SCALES, &scales, &t->n_equalization_scales, err);
    if (status == AQ_OK) status = keep(x, scales, t->n_equalization_scales, &t->equalization_scales, err);
    if (status == AQ_OK) status = next_list(x, COL_SPATIAL_SHIFT, &shift, &n_shift, err);
    if (status == AQ_OK) status = keep(x, shift, n_shift, &t->folded_shift, err);
    if (status != AQ_OK) return status;
    t->equalization_folded = next_bool(x, COL_SPATIAL_FOLDED, 0) != 0;
    const int32_t *hadamard = aq_column_next(&x->columns[COL_SPATIAL_HADAMARD]);
    if (hadamard && *hadamard < 0) return fail(x, err, "hadamard_group is negative");
    t->hadamard_group = hadamard ? (uint32_t)*hadamard : 0;
    t->smoothing_alpha = alpha ? *alpha : 0;
    bool any = t->n_equalization_scales || t->hadamard_group || t->equalization_folded;
    if (!enabled && any) return fail(x, err, "its spatial_quant is not enabled but has parts");
    if (equalized >= 0 && equalized != (t->n_equalization_scales > 0)) return fail(x, err, "channel_equalization contradicts its equalization_scales");
    if (n_shift && n_shift != t->n_equalization_scales) return fail(x, err, "its folded_shift and its equalization_scales have different lengths");
    if (smoothed == 0 && t->smoothing_alpha > 0) return fail(x, err, "activation_smoothing contradicts its alpha");
    return AQ_OK;
}

static aq_status read_stats(extension_reader *x, aq_store_tensor *t, aq_error *err) {
    const void *lists[4];
    uint64_t n[4];
    aq_status status = AQ_OK;
    for (int i = 0; status == AQ_OK && i < 4; i++) {
        status = next_list(x, (aq_column)(COL_STATS_MEAN + i), &lists[i], &n[i], err);
        if (status == AQ_OK && n[i] != n[0]) status = fail(x, err, "its lists of activation_stats have different lengths");
    }
    if (status == AQ_OK && n[0] > MAX_STATS) status = fail(x, err, "its activation_stats have more entries than any schedule");
    for (int i = 0; status == AQ_OK && i < 4; i++) status = keep(x, lists[i], n[i], &t->activation_stats[i], err);
    if (status == AQ_OK) t->n_activation_stats = (size_t)n[0];
    return status;
}

aq_status aq_extension_read(aq_store *store, const aq_store_input *file, aq_column_data columns[COL_COUNT], aq_store_tensor *t, aq_error *err) {
    extension_reader x = {store, file, columns, t->name};
    aq_status status = read_time_groups(&x, t, err);
    if (status == AQ_OK) status = read_spatial(&x, t, err);
    if (status == AQ_OK) status = read_stats(&x, t, err);
    return status == AQ_OK ? aq_extension_check(file, t, err) : status;
}
