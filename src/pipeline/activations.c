/* Activation parameters of a layer (see activations.h): the range of each group of timesteps over all its channels, as one pair. */
#include "pipeline/activations.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

#include "base/error.h"
#include "base/mem.h"
#include "pipeline/inputs.h"

static double square(float v) { return (double)v * (double)v; }

/* Rotated inputs are sums of many, nearly normal: what lies beyond so many root mean squares is clipped. */
#define ROTATED_RANGE 6.0F

/* One channel less its shift. */
static void add_channel(const aq_calib_stats *c, uint64_t i, const float *equalization, const float *shift, aq_time_stats *out) {
    double m = shift ? (double)shift[i] : 0, n = (double)c->count, sum = c->sum[i] - n * m, sum_sq = c->sum_sq[i] - 2 * m * c->sum[i] + n * m * m;
    float min = c->min[i] - (float)m, max = c->max[i] - (float)m;
    aq_activation_channels(c->count, &sum, &sum_sq, &min, &max, equalization ? equalization + i : NULL, 1, out);
}

/* Statistics per channel of the inputs as the codes see them, in the time groups [first, end) of the collection. Returns how many parts there are. */
static size_t gather(const quantize_run *run, size_t layer, uint32_t first, uint32_t end, const float *equalization, const float *shift, const float *rms,
                     aq_time_stats *parts, aq_time_stats *raw) {
    uint64_t n = aq_calib_n_inputs(run->calib, layer);
    size_t used = 0;
    *raw = (aq_time_stats){0};
    for (uint32_t g = first; g < end; g++) {
        aq_calib_stats c = aq_calib_group(run->calib, layer, g);
        if (c.count == 0) continue;
        aq_time_stats of_group = {0};
        aq_activation_channels(c.count, c.sum, c.sum_sq, c.min, c.max, NULL, n, &of_group);
        aq_time_stats_combine(raw, &of_group);
        for (uint64_t i = 0; i < n; i++) {
            aq_time_stats *part = &parts[used++];
            *part = (aq_time_stats){0};
            if (rms)
                *part = (aq_time_stats){.count = c.count, .std = (double)rms[i], .min = -ROTATED_RANGE * rms[i], .max = ROTATED_RANGE * rms[i]};
            else
                add_channel(&c, i, equalization, shift, part);
        }
    }
    return used;
}

/* Group `at` of the table: a pair by clip search over the channels, and the statistics of the inputs as they are. False: nothing was seen. */
static bool fill_group(const quantize_run *run, size_t layer, size_t at, size_t n, const float *equalization, const float *shift, const float *rms,
                       aq_time_stats *parts, layer_activations *out) {
    size_t n_seen = aq_calib_settings(run->calib)->n_groups;
    uint32_t first = (uint32_t)(at * n_seen / n), end = (uint32_t)((at + 1) * n_seen / n), start = 0, stop = 0, unused;
    aq_time_stats raw, all = {0};
    size_t n_parts = gather(run, layer, first, end, equalization, shift, rms, parts, &raw);
    for (size_t i = 0; i < n_parts; i++) aq_time_stats_combine(&all, &parts[i]);
    aq_activation_clip(parts, n_parts, &all.min, &all.max);
    aq_calib_group_range(run->calib, first, &start, &unused);
    aq_calib_group_range(run->calib, end - 1, &unused, &stop);
    out->groups[at] = (aq_time_group){.start = (int32_t)start, .end = stop > start ? (int32_t)stop : 1, .group_size = aq_time_group_channels(at, n)};
    aq_activation_pair(all.min, all.max, &out->groups[at].scale, &out->groups[at].zero_point);
    out->stats[0][at] = (float)raw.mean;
    out->stats[1][at] = (float)raw.std;
    out->stats[2][at] = raw.min;
    out->stats[3][at] = raw.max;
    return n_parts > 0;
}

static bool make_arrays(layer_activations *a, size_t n) {
    a->n = n;
    a->groups = aq_calloc(n, sizeof *a->groups);
    bool ok = a->groups != NULL;
    for (size_t i = 0; i < 4; i++) ok = (a->stats[i] = aq_calloc(n, sizeof **a->stats)) && ok;
    return ok;
}

void aq_activations_free(layer_activations *a) {
    aq_free(a->groups);
    for (size_t i = 0; i < 4; i++) aq_free(a->stats[i]);
    *a = (layer_activations){0};
}

static aq_smoothing curve(const quantize_run *run) {
    const char *word = aq_config_string(run->config, "smoothing_interpolation");
    return strcmp(word, "cubic") == 0 ? AQ_SMOOTH_CUBIC : strcmp(word, "sigmoid") == 0 ? AQ_SMOOTH_SIGMOID : AQ_SMOOTH_LINEAR;
}

static aq_status smooth(const quantize_run *run, layer_activations *a, aq_error *err) {
    if (!aq_config_bool(run->config, "enable_transition_optimization") || a->n < 2) return AQ_OK;
    return aq_time_groups_smooth(a->groups, a->n, aq_config_float(run->config, "smoothness_threshold"),
                                 (uint32_t)aq_config_int(run->config, "smoothing_window", 5), curve(run), err);
}

aq_status aq_activations(const quantize_run *run, size_t index, const float *equalization, const float *shift, const float *rms, layer_activations *out,
                         char problem[160], aq_error *err) {
    *out = (layer_activations){0};
    problem[0] = 0;
    size_t layer = 0;
    bool eight = aq_config_int(run->config, "act_bits", 16) == 8, timed = aq_config_bool(run->config, "enable_time_aware");
    if (aq_inputs_known(run, index, &layer) == INPUTS_NONE || (!eight && !timed)) return AQ_OK;
    const aq_calib_options *o = aq_calib_settings(run->calib);
    if (o->diagonal_only) return AQ_OK; /* an importance matrix knows no ranges */
    uint64_t n_inputs = aq_calib_n_inputs(run->calib, layer);
    size_t n_seen = o->n_groups, n = timed ? (size_t)aq_config_int(run->config, "num_time_groups", 10) : 1;
    if (n > n_seen) n = n_seen; /* finer than it was recorded it cannot be */
    if (o->n_timesteps == 0) n = 1;
    aq_time_stats *parts = aq_calloc(n_inputs * n_seen, sizeof *parts);
    bool complete = false;
    while (parts && !complete) {
        if (!make_arrays(out, n)) break;
        complete = true;
        for (size_t k = 0; k < n; k++) {
            if (fill_group(run, layer, k, n, equalization, shift, rms, parts, out) || n == 1) continue;
            if (complete) snprintf(problem, 160, "no inputs were recorded for timesteps %d to %d", (int)out->groups[k].start, (int)out->groups[k].end - 1);
            complete = false;
        }
        if (!complete) aq_activations_free(out);
        n = 1; /* one pair for all timesteps instead */
    }
    aq_free(parts);
    if (!complete) {
        aq_activations_free(out);
        return aq_fail_memory(err, n_inputs * n_seen * sizeof *parts, "activation parameters");
    }
    aq_status status = smooth(run, out, err);
    if (status != AQ_OK) aq_activations_free(out);
    return status;
}

double aq_activations_noise(const layer_activations *a) {
    double sum = 0, energy = 0;
    for (size_t i = 0; i < a->n; i++) energy += square(a->stats[0][i]) + square(a->stats[1][i]);
    for (size_t i = 0; i < a->n; i++) {
        double own = square(a->stats[0][i]) + square(a->stats[1][i]);
        double weight = own > 0 ? energy / (own * (double)a->n) : 1; /* small inputs suffer more from the same step */
        sum += square(a->groups[i].scale) / 12 * weight;
    }
    return a->n ? sum / (double)a->n : 0;
}

double aq_relative_error(const quantize_run *run, const aq_output_error *output, double code_sq, const layer_activations *a) {
    bool eight = aq_config_int(run->config, "act_bits", 16) == 8;
    return (output->err + (eight ? code_sq * aq_activations_noise(a) : 0)) / output->ref;
}
