/* Statistics of activations by timestep, and the parameters of time groups that follow from them (algorithms 6).
 *
 * Mean and variance are combined exactly (Chan, Golub and LeVeque 1983): with n, mean and M2 = n std^2 of two sets, delta the difference of means,
 *     mean = m1 + delta n2 / n,   M2 = M2_1 + M2_2 + delta^2 n1 n2 / n.
 * The clip search models the values of a part (channel or timestep) by two exponential tails that reach as far as was seen: normal tails would make outliers
 * look cheaper to clip than they are (measured on the sample DiT: 1.6 dB of the noise prediction in the cleanest tenth, W8A8). */
#include <arrowquant/time.h>

#include <math.h>

#include "base/error.h"
#include "base/mem.h"

void aq_time_stats_of(const float *x, uint64_t n, int32_t timestep, aq_time_stats *out) {
    double sum = 0, sq = 0;
    *out = (aq_time_stats){.timestep = timestep, .count = n};
    if (n == 0) return;
    out->min = out->max = x[0];
    for (uint64_t i = 0; i < n; i++) {
        sum += (double)x[i];
        out->min = x[i] < out->min ? x[i] : out->min;
        out->max = x[i] > out->max ? x[i] : out->max;
    }
    out->mean = sum / (double)n;
    for (uint64_t i = 0; i < n; i++) {
        double d = (double)x[i] - out->mean;
        sq += d * d;
    }
    out->std = sqrt(sq / (double)n);
}

void aq_time_stats_combine(aq_time_stats *into, const aq_time_stats *part) {
    if (part->count == 0) return;
    if (into->count == 0) {
        int32_t timestep = into->timestep;
        *into = *part;
        into->timestep = timestep;
        return;
    }
    double n1 = (double)into->count, n2 = (double)part->count, n = n1 + n2, delta = part->mean - into->mean;
    double m2 = n1 * into->std * into->std + n2 * part->std * part->std + delta * delta * n1 * n2 / n;
    into->mean += delta * n2 / n;
    into->std = sqrt(m2 / n);
    into->count += part->count;
    into->min = part->min < into->min ? part->min : into->min;
    into->max = part->max > into->max ? part->max : into->max;
}

/* ---- clip search ---- */

enum { CLIPS = 29 }; /* 1, 0.975 … 0.3 of each end */
static double clip_at(int i) { return 1 - 0.025 * i; }

/* exp and log by operations that are rounded one way everywhere: libm's differ between versions, and with the instruction set; what they decide here is
 * stored. Series to within 1e-15. */
#define LN2_HIGH 0x1.62e42fefa38p-1 /* its last bits are zero: times a small whole number it is exact */
#define LN2_LOW 0x1.ef35793c7673p-45

static double exp_of(double x) { /* x <= 0 */
    if (!(x > -700)) return 0;
    int k = (int)(x / LN2_HIGH - 0.5);
    double r = x - k * LN2_HIGH - k * LN2_LOW, sum = 1; /* |r| <= 0.35 */
    for (int i = 14; i > 0; i--) sum = 1 + sum * r / i;
    return ldexp(sum, k);
}

static double log_of(double x) { /* x > 0, finite */
    int k;
    double m = frexp(x, &k);
    if (m < 0x1.6a09e667f3bcdp-1) m *= 2, k--; /* to [sqrt(1/2), sqrt(2)) */
    double z = (m - 1) / (m + 1), sum = 0;
    for (int i = 23; i > 0; i -= 2) sum = sum * z * z + 1.0 / i;
    return k * LN2_HIGH + (2 * z * sum + k * LN2_LOW);
}

/* E (x - a)^2 over x > a of one part, whose upper half falls as exp(-(x - m) / b) / 2: b is such that of its `count` values one is expected at `furthest`.
 * So a part with rare large values (what an activation function leaves of a channel) has a heavy tail, and a small set is not clipped by much. */
static double tail(double a, double m, double furthest, double count) {
    double b = (furthest - m) / log_of(count > 4 ? count / 2 : 2), over = fmax(0, m - a);
    if (b <= 0) return over * over;
    return b * b * exp_of(-fmax(0, a - m) / b) + over * over;
}

/* Mean squared error of clipping at c * end for each candidate, beyond that of clipping at `end` itself: the tails, and the one value of each part that is
 * known to lie at its end. `sign` -1: the lower end. */
static void clip_errors(const aq_time_stats *parts, size_t n, double end, double sign, double out[CLIPS]) {
    double total = 0;
    for (int i = 0; i < CLIPS; i++) out[i] = 0;
    if (end * sign <= 0) return;
    for (size_t k = 0; k < n; k++) {
        double count = (double)parts[k].count, furthest = sign > 0 ? (double)parts[k].max : -(double)parts[k].min;
        if (parts[k].count == 0) continue;
        total += count;
        for (int i = 0; i < CLIPS; i++) {
            double at = sign * end * clip_at(i), beyond = fmax(0, furthest - at);
            out[i] += count * tail(at, sign * parts[k].mean, furthest, count) + beyond * beyond;
        }
    }
    for (int i = CLIPS - 1; i >= 0; i--) out[i] = total > 0 ? (out[i] - out[0]) / total : 0;
}

void aq_activation_clip(const aq_time_stats *parts, size_t n, float *min, float *max) {
    double low[CLIPS], high[CLIPS], best = INFINITY;
    float lo = fminf(*min, 0), hi = fmaxf(*max, 0);
    int best_low = 0, best_high = 0;
    clip_errors(parts, n, (double)lo, -1, low);
    clip_errors(parts, n, (double)hi, 1, high);
    bool any = false;
    for (size_t k = 0; k < n; k++) any = any || parts[k].count;
    for (int i = 0; any && i < CLIPS; i++)
        for (int k = 0; k < CLIPS; k++) {
            double step = ((double)hi * clip_at(k) - (double)lo * clip_at(i)) / 255, error = step * step / 12 + low[i] + high[k];
            if (error >= best) continue;
            best = error;
            best_low = i;
            best_high = k;
        }
    *min = (float)((double)lo * clip_at(best_low));
    *max = (float)((double)hi * clip_at(best_high));
}

/* ---- groups ---- */

static aq_status check(const aq_time_stats *s, aq_error *err) {
    if (!isfinite(s->mean) || !isfinite(s->std) || !isfinite(s->min) || !isfinite(s->max))
        return aq_fail(err, AQ_ERR_FORMAT, "the statistics of timestep %d are not finite", (int)s->timestep);
    if (s->std < 0) return aq_fail(err, AQ_ERR_FORMAT, "the statistics of timestep %d have a negative standard deviation", (int)s->timestep);
    if (s->min > s->max) return aq_fail(err, AQ_ERR_FORMAT, "the statistics of timestep %d have a minimum above the maximum", (int)s->timestep);
    return AQ_OK;
}

/* The statistics of the timesteps of one group, one after the other; returns their number. */
static size_t parts_of_group(const aq_time_stats *stats, size_t n, const aq_time_group *groups, size_t n_groups, size_t group, aq_time_stats *out) {
    size_t used = 0;
    for (size_t i = 0; i < n; i++)
        if (aq_time_group_find(groups, n_groups, stats[i].timestep) == group) out[used++] = stats[i];
    return used;
}

/* Groups that nothing is known of take the parameters of the nearest one that something is known of, the earlier of two. */
static void fill_gaps(aq_time_group *groups, const aq_time_stats *combined, size_t n_groups) {
    for (size_t g = 0; g < n_groups; g++) {
        for (size_t away = 1; combined[g].count == 0 && away < n_groups; away++) {
            const aq_time_group *from = g >= away && combined[g - away].count             ? &groups[g - away]
                                        : g + away < n_groups && combined[g + away].count ? &groups[g + away]
                                                                                          : NULL;
            if (!from) continue;
            groups[g].scale = from->scale;
            groups[g].zero_point = from->zero_point;
            break;
        }
    }
}

aq_status aq_time_groups_params(const aq_time_stats *stats, size_t n, bool clip, aq_time_group *groups, size_t n_groups, aq_time_stats *combined,
                                aq_error *err) {
    aq_error_clear(err);
    uint64_t seen = 0;
    for (size_t i = 0; i < n; i++) {
        aq_status status = check(&stats[i], err);
        if (status != AQ_OK) return status;
        seen += stats[i].count > 0;
    }
    if (!seen) return aq_fail(err, AQ_ERR_USAGE, "there are no statistics to compute time groups from");
    aq_time_stats *sums = aq_calloc(n_groups, sizeof *sums), *parts = aq_calloc(n, sizeof *parts);
    if (!sums || !parts) {
        aq_free(sums);
        aq_free(parts);
        return aq_fail_memory(err, (n + n_groups) * sizeof *parts, "time groups");
    }
    for (size_t i = 0; i < n; i++) aq_time_stats_combine(&sums[aq_time_group_find(groups, n_groups, stats[i].timestep)], &stats[i]);
    for (size_t g = 0; g < n_groups; g++) {
        float lo = sums[g].min, hi = sums[g].max;
        if (clip) aq_activation_clip(parts, parts_of_group(stats, n, groups, n_groups, g, parts), &lo, &hi);
        sums[g].timestep = groups[g].start;
        groups[g].group_size = aq_time_group_channels(g, n_groups);
        aq_activation_pair(lo, hi, &groups[g].scale, &groups[g].zero_point);
    }
    fill_gaps(groups, sums, n_groups);
    for (size_t g = 0; combined && g < n_groups; g++) combined[g] = sums[g];
    aq_free(sums);
    aq_free(parts);
    return AQ_OK;
}

void aq_activation_channels(uint64_t count, const double *sum, const double *sum_sq, const float *min, const float *max, const float *s, uint64_t n,
                            aq_time_stats *out) {
    *out = (aq_time_stats){.timestep = out->timestep};
    for (uint64_t i = 0; count && i < n; i++) {
        double by = s ? (double)s[i] : 1, mean = sum[i] / (double)count, square = sum_sq[i] / (double)count - mean * mean;
        aq_time_stats_combine(
            out, &(aq_time_stats){
                     .count = count, .mean = mean * by, .std = sqrt(fmax(0, square)) * by, .min = min[i] * (s ? s[i] : 1), .max = max[i] * (s ? s[i] : 1)});
    }
}
