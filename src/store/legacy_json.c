/* The JSON texts of a base V2 row (time_aware_quant_json, spatial_quant_json, activation_stats_json) become the same parts as the columns of an extended file.
 * What is marked as not enabled is not in use and left out. */
#include "store/extension.h"

#include <math.h>

#include "base/json.h"

/* A JSON number, or NaN, which the checks refuse. */
static float number(const json_t *value) { return json_is_number(value) ? (float)json_number_value(value) : NAN; }

/* An integer that fits, else -1, which the checks refuse. */
static int32_t integer(const json_t *value) {
    json_int_t v = json_is_integer(value) ? json_integer_value(value) : -1;
    return v >= 0 && v <= INT32_MAX ? (int32_t)v : -1;
}

static bool in_use(const json_t *root) { return json_is_object(root) && !json_is_false(json_object_get(root, "enabled")); }

static aq_status fail(const aq_store_input *file, const aq_store_tensor *t, aq_error *err, const char *what) {
    return aq_fail_at(err, AQ_ERR_FORMAT, file->path, t->name, "%s", what);
}

static aq_status take_time_groups(aq_store *store, const aq_store_input *file, const json_t *root, aq_store_tensor *t, aq_error *err) {
    const json_t *list = json_object_get(root, "time_group_params"), *count = json_object_get(root, "num_time_groups"), *group;
    size_t i, n = json_array_size(list);
    if (!in_use(root) || !list || json_is_null(list)) return AQ_OK;
    if (!json_is_array(list) || (json_is_integer(count) && json_integer_value(count) != (json_int_t)n))
        return fail(file, t, err, "num_time_groups and time_group_params contradict each other");
    aq_time_group *groups = n ? aq_store_keep_zeros(store, n * sizeof *groups) : NULL;
    if (n && !groups) return aq_fail_memory(err, n * sizeof *groups, "time groups");
    json_array_foreach(list, i, group) {
        const json_t *range = json_object_get(group, "time_range");
        if (json_array_size(range) != 2) return fail(file, t, err, "a time_range is no pair of timesteps");
        groups[i] = (aq_time_group){/* NOLINT(clang-analyzer-core.NullDereference): n > 0 here */
                                    .start = integer(json_array_get(range, 0)),
                                    .end = integer(json_array_get(range, 1)),
                                    .scale = number(json_object_get(group, "scale")),
                                    .zero_point = number(json_object_get(group, "zero_point")),
                                    .group_size = integer(json_object_get(group, "group_size"))};
    }
    t->time_groups = groups;
    t->n_time_groups = n;
    return AQ_OK;
}

/* A list of numbers, or one number as a list of one. */
static aq_status take_list(aq_store *store, const json_t *value, const float **out, uint64_t *n, aq_error *err) {
    *n = json_is_array(value) ? json_array_size(value) : json_is_number(value);
    if (*n == 0) return AQ_OK;
    float *values = aq_store_keep_zeros(store, *n * sizeof *values);
    if (!values) return aq_fail_memory(err, *n * sizeof *values, "spatial and time-aware parts");
    for (size_t i = 0; i < *n; i++) values[i] = number(json_is_array(value) ? json_array_get(value, i) : value);
    *out = values;
    return AQ_OK;
}

static aq_status take_spatial(aq_store *store, const aq_store_input *file, const json_t *root, aq_store_tensor *t, aq_error *err) {
    if (!in_use(root)) return AQ_OK;
    const json_t *alpha = json_object_get(root, "alpha");
    if (alpha && !json_is_null(alpha)) t->smoothing_alpha = number(alpha);
    aq_status status = take_list(store, json_object_get(root, "equalization_scales"), &t->equalization_scales, &t->n_equalization_scales, err);
    if (status == AQ_OK && t->n_equalization_scales && json_is_false(json_object_get(root, "channel_equalization")))
        return fail(file, t, err, "channel_equalization contradicts its equalization_scales");
    return status;
}

static aq_status take_stats(aq_store *store, const aq_store_input *file, const json_t *root, aq_store_tensor *t, aq_error *err) {
    static const char *const names[4] = {"mean", "std", "min", "max"};
    uint64_t n[4] = {0};
    aq_status status = AQ_OK;
    for (int k = 0; status == AQ_OK && k < 4; k++) {
        status = take_list(store, json_object_get(root, names[k]), &t->activation_stats[k], &n[k], err);
        if (status == AQ_OK && n[k] != n[0]) status = fail(file, t, err, "its lists of activation_stats have different lengths");
    }
    if (status == AQ_OK) t->n_activation_stats = (size_t)n[0];
    return status;
}

aq_status aq_extension_from_json(aq_store *store, const aq_store_input *file, const json_t *time, const json_t *spatial, const json_t *stats,
                                 aq_store_tensor *t, aq_error *err) {
    aq_status status = take_time_groups(store, file, time, t, err);
    if (status == AQ_OK) status = take_spatial(store, file, spatial, t, err);
    if (status == AQ_OK) status = take_stats(store, file, stats, t, err);
    return status == AQ_OK ? aq_extension_check(file, t, err) : status;
}
