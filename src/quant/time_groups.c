/* Time groups (algorithms 6): which timesteps share activation parameters, what these are, and how much they jump from group to group.
 *
 * Boundaries are g T / G in integers, so each timestep lies in exactly one group and sizes differ by at most one. Smoothing widens ranges only: the smaller
 * neighbour of a jump is raised towards the larger one along a curve, so no value is clipped that was not clipped before. */
#include <arrowquant/time.h>

#include <float.h>
#include <math.h>

#include "base/error.h"
#include "base/mem.h"

size_t aq_time_groups_split(uint32_t n_timesteps, uint32_t n_groups, aq_time_group *out) {
    uint32_t n = n_groups < n_timesteps ? n_groups : n_timesteps;
    for (uint32_t g = 0; g < n; g++) {
        out[g].start = (int32_t)((uint64_t)g * n_timesteps / n);
        out[g].end = (int32_t)(((uint64_t)g + 1) * n_timesteps / n);
    }
    return n;
}

size_t aq_time_group_find(const aq_time_group *groups, size_t n, int32_t timestep) {
    size_t low = 0, high = n - 1; /* the last group that starts at or before the timestep */
    while (low < high) {
        size_t middle = high - (high - low) / 2;
        if (groups[middle].start <= timestep)
            low = middle;
        else
            high = middle - 1;
    }
    return low;
}

int32_t aq_time_group_channels(size_t group, size_t n_groups) {
    if (n_groups < 2) return 128;
    /* 64 * 4^(g / (G - 1)), its exponent of 2 rounded. */
    size_t last = n_groups - 1, doublings = (4 * (group < last ? group : last) + last) / (2 * last);
    return 64 << doublings;
}

void aq_activation_pair(float min, float max, float *scale, float *zero_point) {
    float lo = fmaxf(fminf(min, 0), -FLT_MAX), hi = fminf(fmaxf(max, 0), FLT_MAX);
    *scale = 1;
    *zero_point = 0;
    if (lo == hi) return;
    float s = (float)(((double)hi - (double)lo) / 255);
    *scale = s < FLT_MIN ? FLT_MIN : s;
    *zero_point = -lo / *scale + 0.0f; /* + 0: never minus zero */
}

/* ---- smoothing ---- */

/* e^x for |x| <= 8, the same on every machine: a Taylor sum of x / 64, squared six times. */
static double exponential(double x) {
    double y = x / 64, term = 1, sum = 1;
    for (int i = 1; i < 12; i++) sum += term *= y / i;
    for (int i = 0; i < 6; i++) sum *= sum;
    return sum;
}

static double logistic(double x) { return 1 / (1 + exponential(-x)); }

/* Rises from 0 at t = 0 to 1 at t = 1. */
static double curve_at(aq_smoothing curve, double t) {
    switch (curve) {
    case AQ_SMOOTH_CUBIC: return t * t * (3 - 2 * t);
    case AQ_SMOOTH_SIGMOID: return (logistic(12 * t - 6) - logistic(-6)) / (logistic(6) - logistic(-6));
    default: return t;
    }
}

static double relative_jump(const aq_time_group *l, const aq_time_group *r) { return fabs((double)r->scale - (double)l->scale) / (double)l->scale; }

/* Raises the scale of `g` to `scale` and moves its zero point towards `zero` as far as the old range stays inside the new one. */
static void widen(aq_time_group *g, double scale, double zero) {
    double old = (double)g->scale, z = (double)g->zero_point, low = old * z / scale, high = 255 - old * (255 - z) / scale;
    double moved = zero < low ? low : zero > high ? high : zero;
    if (scale <= old || !isfinite((float)scale)) return;
    g->scale = (float)scale;
    if ((double)g->scale < scale) g->scale = nextafterf(g->scale, INFINITY);
    g->zero_point = (float)moved;
}

/* The ramp from the larger side `from` of a boundary over up to `window` groups of the smaller one: first, first + step … `to` are the scales before. */
static void ramp(aq_time_group *groups, size_t n, const float *scales, size_t from, ptrdiff_t step, uint32_t window, aq_smoothing curve) {
    double top = (double)scales[from], zero = (double)groups[from].zero_point;
    size_t at = from;
    for (uint32_t k = 1; k <= window; k++) {
        if ((step < 0 && at == 0) || (step > 0 && at == n - 1)) return;
        at = (size_t)((ptrdiff_t)at + step);
        double own = (double)scales[at], u = curve_at(curve, (double)k / ((double)window + 1));
        if (own >= top) return;
        double scale = top + (own - top) * u;
        if (scale > (double)groups[at].scale) widen(&groups[at], scale, zero + ((double)groups[at].zero_point - zero) * u);
    }
}

aq_status aq_time_groups_smooth(aq_time_group *groups, size_t n, double threshold, uint32_t window, aq_smoothing curve, aq_error *err) {
    float *scales = aq_alloc(n * sizeof *scales);
    if (!scales) return aq_fail_memory(err, n * sizeof *scales, "time groups");
    for (size_t i = 0; i < n; i++) scales[i] = groups[i].scale;
    for (size_t i = 0; i + 1 < n; i++) {
        aq_time_group l = {.scale = scales[i]}, r = {.scale = scales[i + 1]};
        if (relative_jump(&l, &r) <= threshold) continue;
        if (l.scale > r.scale)
            ramp(groups, n, scales, i, 1, window, curve);
        else
            ramp(groups, n, scales, i + 1, -1, window, curve);
    }
    aq_free(scales);
    return AQ_OK;
}

double aq_time_groups_smoothness(const aq_time_group *groups, size_t n, double *scores, double *scale_jumps, double *zero_jumps) {
    double sum = 0;
    for (size_t i = 0; i + 1 < n; i++) {
        double ds = relative_jump(&groups[i], &groups[i + 1]), dz = fabs((double)groups[i + 1].zero_point - (double)groups[i].zero_point) / 255;
        double mean = (ds + dz) / 2;
        if (scores) scores[i] = 1 - fmin(1, mean);
        if (scale_jumps) scale_jumps[i] = ds;
        if (zero_jumps) zero_jumps[i] = dz;
        sum += mean;
    }
    return n < 2 ? 1 : 1 - fmin(1, sum / (double)(n - 1));
}
