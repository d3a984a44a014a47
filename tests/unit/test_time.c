/* Time groups, spatial methods and layers on integers, against closed forms and brute force. */
#include <float.h>
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>

#include <arrowquant/time.h>
#include <cmocka.h>

#include "base/mem.h"

/* Pseudo-random floats in [-1, 1). */
static float next(uint32_t *state) {
    *state = *state * 1664525u + 1013904223u;
    return (float)(*state >> 8) / 8388608.0f - 1.0f;
}

#define expect_near(a, b, within) expect_near_at((double)(a), (double)(b), (double)(within), __LINE__)
static void expect_near_at(double a, double b, double within, int line) {
    if (!(fabs(a - b) <= within)) fail_msg("line %d: %.17g is not %.17g to %g", line, a, b, within);
}

/* ---- time groups ---- */

static void each_timestep_is_in_exactly_one_group(void **state) {
    (void)state;
    aq_time_group groups[100];
    static const uint32_t steps[] = {1, 2, 7, 50, 99, 100, 1000, 1001, 4000000000u};
    for (size_t i = 0; i < sizeof steps / sizeof *steps; i++)
        for (uint32_t n = 1; n <= 100; n++) {
            uint32_t t = steps[i] > INT32_MAX ? INT32_MAX : steps[i];
            size_t count = aq_time_groups_split(t, n, groups);
            int32_t smallest = INT32_MAX, largest = 0;
            assert_int_equal(count, n < t ? n : t);
            assert_int_equal(groups[0].start, 0);
            assert_int_equal(groups[count - 1].end, t);
            for (size_t g = 0; g < count; g++) {
                int32_t size = groups[g].end - groups[g].start;
                smallest = size < smallest ? size : smallest;
                largest = size > largest ? size : largest;
                assert_int_equal(groups[g].start, (uint64_t)g * t / count);
                if (g) assert_int_equal(groups[g].start, groups[g - 1].end);
                assert_int_equal(aq_time_group_find(groups, count, groups[g].start), g);
                assert_int_equal(aq_time_group_find(groups, count, groups[g].end - 1), g);
            }
            assert_true(smallest >= 1 && largest - smallest <= 1);
            assert_int_equal(aq_time_group_find(groups, count, -5), 0); /* outside: the nearest */
            assert_int_equal(aq_time_group_find(groups, count, INT32_MAX), count - 1);
        }
}

static void channel_groups_grow_from_64_to_256_with_the_noise(void **state) {
    (void)state;
    for (size_t n = 2; n <= 100; n++) {
        assert_int_equal(aq_time_group_channels(0, n), 64);
        assert_int_equal(aq_time_group_channels(n - 1, n), 256);
        for (size_t g = 1; g < n; g++) {
            int32_t size = aq_time_group_channels(g, n);
            assert_true(size >= aq_time_group_channels(g - 1, n));
            double exact = 64 * pow(4, (double)g / (double)(n - 1)), best = INFINITY;
            for (int32_t v = 64; v <= 256; v *= 2) best = fmin(best, fabs(log2(exact / v)));
            assert_true(fabs(log2(exact / size)) <= best + 1e-9); /* the nearest power of two */
        }
    }
    assert_int_equal(aq_time_group_channels(0, 1), 128);
}

static void pairs_are_finite_for_every_range(void **state) {
    (void)state;
    float s, z;
    aq_activation_pair(-1, 3, &s, &z);
    assert_true(s == 4.0f / 255 && z == 1 / s);
    aq_activation_pair(2, 5, &s, &z); /* widened to contain 0 */
    assert_true(s == 5.0f / 255 && z == 0);
    aq_activation_pair(-5, -2, &s, &z);
    assert_true(s == 5.0f / 255 && fabsf(z - 255) < 1e-4f);
    aq_activation_pair(0, 0, &s, &z);
    assert_true(s == 1 && z == 0);
    static const float ends[] = {0, 1e-45f, -1e-45f, FLT_MAX, -FLT_MAX, INFINITY, -INFINITY, NAN, FLT_MIN, 1, -3};
    enum { N = sizeof ends / sizeof *ends };
    for (int i = 0; i < N; i++)
        for (int k = 0; k < N; k++) {
            aq_activation_pair(ends[i], ends[k], &s, &z);
            assert_true(isfinite(s) && s > 0 && isfinite(z) && z >= 0 && z <= 256);
        }
}

static void statistics_combine_to_those_of_all_values(void **state) {
    (void)state;
    float x[1000];
    uint32_t seed = 8;
    for (int i = 0; i < 1000; i++) x[i] = 1000 + next(&seed) * (i < 300 ? 1.0f : 10.0f);
    aq_time_stats all, sum = {.timestep = 7};
    aq_time_stats_of(x, 1000, 7, &all);
    double mean = 0, sq = 0;
    for (int i = 0; i < 1000; i++) mean += (double)x[i] / 1000;
    for (int i = 0; i < 1000; i++) sq += ((double)x[i] - mean) * ((double)x[i] - mean) / 1000;
    expect_near(all.mean, mean, 1e-9);
    expect_near(all.std, sqrt(sq), 1e-9);
    for (int at = 0, n; at < 1000; at += n) {
        aq_time_stats part;
        n = 1 + (int)(200 * fabsf(next(&seed)));
        n = at + n > 1000 ? 1000 - at : n;
        aq_time_stats_of(x + at, (uint64_t)n, 99, &part);
        aq_time_stats_combine(&sum, &part);
        aq_time_stats_combine(&sum, &(aq_time_stats){.mean = 5}); /* nothing: changes nothing */
    }
    assert_int_equal(sum.timestep, 7);
    assert_int_equal(sum.count, 1000);
    expect_near(sum.mean, all.mean, 1e-9);
    expect_near(sum.std, all.std, 1e-9);
    assert_true(sum.min == all.min && sum.max == all.max);
    /* The same from sums per channel, each channel scaled. */
    double sums[10] = {0}, squares[10] = {0};
    float lo[10], hi[10], s[10], scaled[1000];
    for (int c = 0; c < 10; c++) {
        lo[c] = INFINITY, hi[c] = -INFINITY, s[c] = 0.5f + (float)c;
        for (int r = 0; r < 100; r++) {
            float v = x[r * 10 + c];
            sums[c] += (double)v;
            squares[c] += (double)v * (double)v;
            lo[c] = fminf(lo[c], v);
            hi[c] = fmaxf(hi[c], v);
            scaled[r * 10 + c] = v * s[c];
        }
    }
    aq_time_stats channels = {0};
    aq_activation_channels(100, sums, squares, lo, hi, s, 10, &channels);
    aq_time_stats_of(scaled, 1000, 0, &all);
    expect_near(channels.mean, all.mean, 1e-3);
    expect_near(channels.std, all.std, 1e-3);
    assert_true(channels.min == all.min && channels.max == all.max);
    aq_activation_channels(0, sums, squares, lo, hi, NULL, 10, &channels);
    assert_int_equal(channels.count, 0);
}

static void parameters_are_those_of_each_groups_own_timesteps(void **state) {
    (void)state;
    aq_error err;
    aq_time_group g[4];
    aq_time_stats stats[40], combined[4];
    aq_time_groups_split(40, 4, g);
    for (int t = 0; t < 40; t++) /* group 2 is never seen, and timestep 39 is beyond the schedule */
        stats[t] = (aq_time_stats){t == 39 ? 1000 : t, t / 10 == 2 ? 0 : 100, 0, 1, -1 - (float)(t / 10), 1 + (float)t / 10};
    assert_int_equal(aq_time_groups_params(stats, 40, false, g, 4, combined, &err), AQ_OK);
    for (int i = 0; i < 4; i++) {
        int from = i == 2 ? 1 : i; /* the nearest with statistics, the earlier of two */
        float lo = -1 - (float)from, hi = 1 + (float)(10 * from + 9) / 10, s, z;
        aq_activation_pair(lo, hi, &s, &z);
        assert_true(g[i].scale == s && g[i].zero_point == z);
        assert_int_equal(combined[i].count, i == 2 ? 0 : 1000);
        assert_int_equal(g[i].group_size, aq_time_group_channels((size_t)i, 4));
    }
    aq_time_group alone = {.end = 10};
    assert_int_equal(aq_time_groups_params(stats, 10, false, &alone, 1, NULL, &err), AQ_OK);
    assert_true(alone.scale == g[0].scale); /* one group does not depend on another's timesteps */
    stats[3].std = -1;
    assert_int_equal(aq_time_groups_params(stats, 40, false, g, 4, NULL, &err), AQ_ERR_FORMAT);
    assert_non_null(strstr(err.message, "timestep 3"));
    assert_int_equal(aq_time_groups_params(stats, 0, false, g, 4, NULL, &err), AQ_ERR_USAGE);
}

static void CA02_statistics_that_are_not_finite_are_refused(void **state) {
    (void)state;
    aq_error err;
    aq_time_group g = {.end = 10};
    aq_time_stats good = {.timestep = 3, .count = 5, .std = 1, .min = -1, .max = 1}, bad[6];
    for (int i = 0; i < 6; i++) bad[i] = good;
    bad[0].mean = NAN, bad[1].std = NAN, bad[2].min = NAN, bad[3].max = INFINITY, bad[4].min = -INFINITY, bad[5].min = 2;
    for (int i = 0; i < 6; i++) {
        assert_int_equal(aq_time_groups_params(&bad[i], 1, true, &g, 1, NULL, &err), AQ_ERR_FORMAT);
        assert_non_null(strstr(err.message, "timestep 3"));
    }
}

/* Mean squared error of 8-bit codes of values under the pair of a range. */
static double coding_error(const float *x, size_t n, float lo, float hi) {
    float s, z;
    double error = 0;
    aq_activation_pair(lo, hi, &s, &z);
    for (size_t i = 0; i < n; i++) {
        uint8_t q;
        aq_activation_quantize(&x[i], 1, 1, &s, &z, 0, &q);
        double d = (double)((float)q - z) * (double)s - (double)x[i];
        error += d * d / (double)n;
    }
    return error;
}

static void clipping_lowers_the_error_and_keeps_outlier_channels(void **state) {
    (void)state;
    enum { CHANNELS = 400, N = 500 };
    float *x = aq_alloc(CHANNELS * N * sizeof *x);
    aq_time_stats parts[CHANNELS], all = {0};
    uint32_t seed = 6;
    for (int i = 0; i < CHANNELS * N; i++) { /* normal by a sum of twelve; exponential on both sides in one channel */
        float u = 0, v = next(&seed);
        for (int k = 0; k < 12; k++) u += next(&seed) / 2;
        x[i] = i / N == 7 ? copysignf(1.5f * -logf(fabsf(v) + 1e-6f), v) : u;
    }
    for (int c = 0; c < CHANNELS; c++) {
        aq_time_stats_of(x + c * N, N, 0, &parts[c]);
        aq_time_stats_combine(&all, &parts[c]);
    }
    float lo = all.min, hi = all.max;
    aq_activation_clip(parts, CHANNELS, &lo, &hi);
    assert_true(lo > all.min && hi < all.max);
    assert_true(coding_error(x, CHANNELS * N, lo, hi) < 0.9 * coding_error(x, CHANNELS * N, all.min, all.max));
    /* One far value of a set keeps its place: it may be one of many. */
    static const float far[] = {5, 9, 20, 400};
    for (size_t i = 0; i < sizeof far / sizeof *far; i++) {
        aq_time_stats st;
        x[0] = far[i];
        aq_time_stats_of(x, N, 0, &st);
        lo = st.min, hi = st.max;
        aq_activation_clip(&st, 1, &lo, &hi);
        assert_true(lo >= st.min && hi <= st.max && hi >= 0.9f * far[i]);
        assert_true(coding_error(x, N, lo, hi) <= 1.001 * coding_error(x, N, st.min, st.max));
    }
    aq_free(x);
    for (int i = 0; i < 10; i++) parts[i] = (aq_time_stats){.count = 1000, .std = i == 3 ? 10 : 1, .min = i == 3 ? -40 : -4, .max = i == 3 ? 40 : 4};
    lo = -40, hi = 40; /* a channel in ten that is far out stays inside: it is no accident */
    aq_activation_clip(parts, 10, &lo, &hi);
    assert_true(hi >= 25 && lo <= -25);
    lo = 0, hi = 5; /* one-sided stays one-sided; nothing known keeps the range */
    aq_activation_clip(parts, 0, &lo, &hi);
    assert_true(lo == 0 && hi == 5);
}

static aq_time_group group_of(float scale, float zero) { return (aq_time_group){.scale = scale, .zero_point = zero, .end = 1}; }

static void smoothness_figures_follow_their_definition(void **state) {
    (void)state;
    aq_time_group g[] = {group_of(1, 100), group_of(1.5f, 100), group_of(0.75f, 151), group_of(30, 151)};
    double scores[3], ds[3], dz[3];
    double total = aq_time_groups_smoothness(g, 4, scores, ds, dz);
    expect_near(ds[0], 0.5, 1e-12);
    expect_near(ds[1], 0.5, 1e-12);
    expect_near(ds[2], 39, 1e-12);
    expect_near(dz[1], 0.2, 1e-12);
    expect_near(scores[0], 0.75, 1e-12);
    expect_near(scores[1], 0.65, 1e-12);
    expect_near(scores[2], 0, 1e-12);
    expect_near(total, 0, 1e-12);
    expect_near(aq_time_groups_smoothness(g, 3, NULL, NULL, NULL), 1 - (0.5 + 0.7) / 4, 1e-12);
    expect_near(aq_time_groups_smoothness(g, 1, NULL, NULL, NULL), 1, 0);
}

static void a_jump_becomes_a_ramp_on_its_smaller_side(void **state) {
    (void)state;
    aq_error err;
    aq_time_group g[] = {group_of(1, 10), group_of(1, 10), group_of(1, 10), group_of(4, 20), group_of(4, 20)};
    assert_int_equal(aq_time_groups_smooth(g, 5, 0.3, 2, AQ_SMOOTH_LINEAR, &err), AQ_OK);
    assert_true(g[0].scale == 1 && g[3].scale == 4 && g[4].scale == 4);
    expect_near(g[2].scale, 3, 1e-6); /* 4 + (1 - 4) / 3 */
    expect_near(g[1].scale, 2, 1e-6);
    expect_near(g[1].zero_point, 20 + (10 - 20) * 2.0 / 3, 1e-5); /* the wider range has room for it */
    aq_time_group cubic[] = {group_of(4, 20), group_of(1, 10), group_of(1, 10)};
    assert_int_equal(aq_time_groups_smooth(cubic, 3, 0.3, 1, AQ_SMOOTH_CUBIC, &err), AQ_OK);
    expect_near(cubic[1].scale, 2.5, 1e-6); /* u(1/2) = 1/2 */
    assert_true(cubic[2].scale == 1);
    aq_time_group sigmoid[] = {group_of(4, 20), group_of(1, 10)};
    assert_int_equal(aq_time_groups_smooth(sigmoid, 2, 0.3, 1, AQ_SMOOTH_SIGMOID, &err), AQ_OK);
    expect_near(sigmoid[1].scale, 2.5, 1e-6);
    aq_time_group calm[] = {group_of(1, 10), group_of(1.3f, 10), group_of(1, 90)}; /* no jump of the scale above 0.31 */
    assert_int_equal(aq_time_groups_smooth(calm, 3, 0.31, 5, AQ_SMOOTH_LINEAR, &err), AQ_OK);
    assert_true(calm[0].scale == 1 && calm[1].scale == 1.3f && calm[2].zero_point == 90);
}

static void smoothing_never_makes_a_range_smaller(void **state) {
    (void)state;
    uint32_t seed = 5;
    aq_error err;
    for (int round = 0; round < 3000; round++) {
        aq_time_group g[12], before[12];
        size_t n = 1 + (size_t)round % 12;
        double worst = 0;
        for (size_t i = 0; i < n; i++) g[i] = before[i] = group_of(powf(10, 3 * next(&seed)), 127.5f + 127.5f * next(&seed));
        for (size_t i = 0; i + 1 < n; i++)
            worst = fmax(worst, fmax((double)g[i].scale, (double)g[i + 1].scale) / fmin((double)g[i].scale, (double)g[i + 1].scale));
        assert_int_equal(aq_time_groups_smooth(g, n, 0.3, (uint32_t)round % 20 + 1, (aq_smoothing)(round % 3), &err), AQ_OK);
        for (size_t i = 0; i < n; i++) {
            double s = (double)g[i].scale, z = (double)g[i].zero_point, s0 = (double)before[i].scale, z0 = (double)before[i].zero_point;
            assert_true(isfinite(s) && isfinite(z) && s >= s0);
            assert_true(s * z >= s0 * z0 * (1 - 1e-6) && s * (255 - z) >= s0 * (255 - z0) * (1 - 1e-6) - 1e-4 * s);
            if (i + 1 < n) assert_true(fmax(s, (double)g[i + 1].scale) / fmin(s, (double)g[i + 1].scale) <= worst * (1 + 1e-6)); /* and no new, larger jump */
        }
    }
}

/* ---- spatial ---- */

static void equalization_keeps_the_product(void **state) {
    (void)state;
    enum { OUT = 9, IN = 40, ROWS = 7 };
    float w[OUT * IN], x[ROWS * IN], w_max[IN] = {0}, x_max[IN] = {0}, s[IN];
    uint32_t seed = 1;
    for (int i = 0; i < OUT * IN; i++) w[i] = next(&seed) * (i % IN == 3 ? 0 : 1);
    for (int i = 0; i < ROWS * IN; i++) x[i] = next(&seed) * (i % IN == 5 ? 0 : expf(4 * next(&(uint32_t){(uint32_t)(i % IN)}))) - (i % IN == 7 ? 3.0f : 0);
    aq_column_absmax(w, 4, IN, w_max); /* two slabs add up */
    aq_column_absmax(w + 4 * IN, OUT - 4, IN, w_max);
    aq_column_absmax(x, ROWS, IN, x_max);
    aq_equalization_scales(w_max, x_max, IN, s);
    for (int i = 0; i < IN; i++) {
        float largest = 0;
        for (int r = 0; r < OUT; r++) largest = fmaxf(largest, fabsf(w[r * IN + i]));
        assert_true(w_max[i] == largest);
        if (i == 3 || i == 5)
            assert_true(s[i] == 1);
        else
            expect_near(s[i], sqrt((double)w_max[i] / (double)x_max[i]), 1e-6 * (double)s[i]);
    }
    double before[ROWS * OUT], size[ROWS * OUT];
    for (int r = 0; r < ROWS; r++)
        for (int o = 0; o < OUT; o++) {
            before[r * OUT + o] = size[r * OUT + o] = 0;
            for (int i = 0; i < IN; i++) {
                before[r * OUT + o] += (double)x[r * IN + i] * (double)w[o * IN + i];
                size[r * OUT + o] += fabs((double)x[r * IN + i] * (double)w[o * IN + i]);
            }
        }
    aq_scale_columns(w, OUT, IN, s, true);
    aq_scale_columns(x, ROWS, IN, s, false);
    for (int r = 0; r < ROWS; r++)
        for (int o = 0; o < OUT; o++) {
            double after = 0;
            for (int i = 0; i < IN; i++) after += (double)x[r * IN + i] * (double)w[o * IN + i];
            expect_near(after, before[r * OUT + o], 3e-7 * size[r * OUT + o]);
        }
    float w2[IN] = {0}, x2[IN] = {0}; /* both sides end with the same largest magnitude, sqrt(w x) */
    aq_column_absmax(w, OUT, IN, w2);
    aq_column_absmax(x, ROWS, IN, x2);
    for (int i = 0; i < IN; i++)
        if (i != 3 && i != 5) expect_near(w2[i], x2[i], 1e-5 * (double)w2[i]);
}

static void equalization_is_1_where_a_quotient_is_no_normal_number(void **state) {
    (void)state;
    const float w[] = {0, 1, 0, NAN, INFINITY, 1e-45f, FLT_MAX, 4}, x[] = {1, 0, 0, 1, 1, FLT_MAX, 1e-45f, 1};
    float s[8];
    aq_equalization_scales(w, x, 8, s);
    for (int i = 0; i < 5; i++) assert_true(s[i] == 1);
    for (int i = 5; i < 8; i++) assert_true(isnormal(s[i]));
    assert_true(s[7] == 2);
}

static void limits_touch_the_widest_inputs_alone(void **state) {
    (void)state;
    const float w[] = {16, 1, 0, 3, 2, 5}, x[] = {8, -2, 8, 0, -7, 0.25F};
    float s[6];
    aq_equalization_scales_by(AQ_EQUALIZE_NONE, w, x, 6, s);
    for (int i = 0; i < 6; i++) assert_true(s[i] == 1);
    aq_equalization_scales_by(AQ_EQUALIZE_HALF, w, x, 6, s);
    expect_near(s[0], sqrt(2), 1e-7);
    for (int k = 1; k <= 6; k++) {
        double limit = 8 * pow(2, -k / 4.0);
        aq_equalization_scales_by((aq_equalize)(AQ_EQUALIZE_LIMIT_1 + k - 1), w, x, 6, s);
        expect_near(s[0] * x[0], limit, 1e-6);
        expect_near(s[4] * x[4], -fmin(7, limit), 1e-6);
        expect_near(s[1], fmin(1, limit / 2), 1e-7);
        assert_true(s[2] == 1 && s[3] == 1 && s[5] == 1); /* a dead weight, a dead input, a narrow one */
    }
}

static void temporal_aggregation_is_the_largest_or_a_running_average(void **state) {
    (void)state;
    const float groups[3][2] = {{4, -1}, {-2, 8}, {6, 0}};
    float most[2], average[2], last[2];
    for (int g = 0; g < 3; g++) {
        aq_temporal_absmax(groups[g], 2, g == 0, -1, most);
        aq_temporal_absmax(groups[g], 2, g == 0, 0.75, average);
        aq_temporal_absmax(groups[g], 2, g == 0, 0, last);
    }
    assert_true(most[0] == 6 && most[1] == 8);
    expect_near(average[0], 0.75 * (0.75 * 4 + 0.25 * 2) + 0.25 * 6, 1e-6);
    expect_near(average[1], 0.75 * (0.75 * 1 + 0.25 * 8), 1e-6);
    assert_true(last[0] == 6 && last[1] == 0); /* without a memory: the last group */
}

static void smoothing_activations_scales_the_deviation(void **state) {
    (void)state;
    enum { N = 33 };
    float x[2 * N], out[2 * N];
    uint32_t seed = 3;
    for (int i = 0; i < 2 * N; i++) x[i] = (i < N ? 100 : -100) + next(&seed);
    x[3] = -0.0f; /* alpha = 0 keeps every bit */
    for (int a = 0; a <= 4; a++) {
        float alpha = 0.25f * (float)a;
        aq_activation_smooth(x, 2, N, alpha, out);
        for (int r = 0; r < 2; r++) {
            double mean = 0;
            for (int i = 0; i < N; i++) mean += (double)x[r * N + i] / N;
            for (int i = 0; i < N; i++) expect_near(out[r * N + i] - mean, ((double)x[r * N + i] - mean) * (1 - (double)alpha), 1e-5);
        }
        if (a == 0) assert_memory_equal(out, x, sizeof x);
        if (a == 4) assert_true(out[0] == out[N - 1]);
    }
    aq_activation_smooth(x, 2, N, 0.5f, out);
    aq_activation_smooth(x, 2, N, 0.5f, x); /* in place */
    assert_memory_equal(out, x, sizeof x);
}

static void channel_groups_are_independent_and_within_half_a_step(void **state) {
    (void)state;
    enum { ROWS = 10, N = 13 };
    float w[ROWS * N], scales[4], zeros[4];
    uint8_t codes[ROWS * N];
    uint32_t seed = 9;
    for (int i = 0; i < ROWS * N; i++) w[i] = next(&seed) * (float)(1 + i / (4 * N));
    for (int i = 4 * N; i < 8 * N; i++) w[i] = -2.5f; /* the second group is constant */
    aq_channel_group_u8(w, ROWS, N, 4, codes, scales, zeros);
    for (int r = 0; r < ROWS; r++)
        for (int i = 0; i < N; i++) {
            float v = ((float)codes[r * N + i] - zeros[r / 4]) * scales[r / 4];
            expect_near(v, w[r * N + i], 0.5001f * scales[r / 4] * (float)(r / 4 != 1));
        }
    assert_true(scales[1] == 1 && zeros[1] == 2.5f);
    float alone[2], zero[2];
    uint8_t again[ROWS * N];
    aq_channel_group_u8(w, 4, N, 4, again, alone, zero);
    assert_memory_equal(again, codes, 4 * N); /* the first group does not depend on the others */
    assert_true(alone[0] == scales[0] && zero[0] == zeros[0]);
    aq_channel_group_u8(w, ROWS, N, 256, again, alone, zero); /* one group */
    aq_channel_group_u8(w, ROWS, N, 0, codes, scales, zeros);
    assert_memory_equal(again, codes, sizeof codes);
    static const float extremes[][2] = {{FLT_MAX, -FLT_MAX},   {FLT_MAX, FLT_MAX}, {1e-45f, 0}, {1e-45f, -1e-45f}, {-FLT_MAX, -FLT_MAX / 2}, {0, 0},
                                        {3e38f, 3.0000002e38f}};
    for (size_t i = 0; i < sizeof extremes / sizeof *extremes; i++) {
        aq_channel_group_u8(extremes[i], 1, 2, 32, codes, scales, zeros);
        assert_true(isfinite(scales[0]) && scales[0] > 0 && isfinite(zeros[0]));
    }
}

/* ---- integers ---- */

static void activations_are_coded_to_the_nearest(void **state) {
    (void)state;
    const float x[] = {-10, -1, -0.5f, 0, 0.25f, 0.75f, 1, 200, NAN, INFINITY, -INFINITY, 0.5f};
    uint8_t codes[12], expected[] = {0, 0, 1, 2, 2, 4, 4, 255, 0, 255, 0, 3};
    float s = 0.5f, z = 2;
    aq_activation_quantize(x, 1, 12, &s, &z, 0, codes);
    assert_memory_equal(codes, expected, sizeof codes); /* 0.25 / 0.5 + 2 = 2.5 goes to the even 2, 3.5 to 4 */
    float two[2], zeros[2], rows[] = {1, 2, 3, 4, 0, 0, 0, 0};
    aq_activation_quantize_dynamic(rows, 2, 4, two, zeros, codes);
    assert_true(two[0] == 4.0f / 255 && zeros[0] == 0 && two[1] == 1 && zeros[1] == 0);
    assert_true(codes[3] == 255 && codes[4] == 0);
}

/* y by its definition, from dequantized weights and activations in double. */
static double by_definition(const float *w, const uint8_t *x, uint64_t n, double s, double z) {
    double sum = 0;
    for (uint64_t i = 0; i < n; i++) sum += (double)w[i] * ((double)x[i] - z) * s;
    return sum;
}

static void integer_layers_equal_their_definition(void **state) {
    (void)state;
    enum { OUT = 21, IN = 133, ROWS = 5 };
    static const aq_params_form forms[] = {AQ_PARAMS_F16, AQ_PARAMS_F32, AQ_PARAMS_TWO_LEVEL};
    float w[OUT * IN], x[ROWS * IN], v[OUT * IN], bias[OUT], s[ROWS], z[ROWS], y[ROWS * OUT], again[ROWS * OUT];
    uint8_t q[ROWS * IN];
    uint32_t seed = 77;
    aq_error err;
    for (int i = 0; i < OUT * IN; i++) w[i] = next(&seed) + 0.3f;
    for (int i = 0; i < ROWS * IN; i++) x[i] = 3 * next(&seed) - 1;
    for (int i = 0; i < OUT; i++) bias[i] = next(&seed);
    for (int bits = 2; bits <= 8; bits *= 2)
        for (size_t f = 0; f < 3; f++)
            for (uint64_t group = 0; group <= 128; group = group ? 2 * group : 32) {
                aq_quant_spec spec = {.bits = bits, .group_size = group, .axis = 1, .params = forms[f], .method = AQ_METHOD_RTN};
                aq_quant_layout layout;
                if (forms[f] == AQ_PARAMS_TWO_LEVEL && (bits == 8 || group == 0)) continue;
                assert_int_equal(aq_quant_layout_init(&layout, &spec, OUT, IN, &err), AQ_OK);
                uint8_t *codes = aq_alloc(layout.codes_bytes), *params = aq_alloc(layout.params_bytes);
                assert_int_equal(aq_quantize(w, &spec, &layout, NULL, 1, codes, params, NULL, NULL, &err), AQ_OK);
                aq_dequantize(&spec, &layout, codes, params, 0, OUT, v);
                for (size_t stride = 0; stride < 2; stride++) {
                    if (stride) {
                        aq_activation_quantize_dynamic(x, ROWS, IN, s, z, q);
                    } else {
                        aq_activation_pair(-4, 2, s, z);
                        aq_activation_quantize(x, ROWS, IN, s, z, 0, q);
                    }
                    assert_int_equal(aq_linear_integer(&spec, &layout, codes, params, q, ROWS, s, z, stride, bias, 1, y, &err), AQ_OK);
                    for (int r = 0; r < ROWS; r++)
                        for (int o = 0; o < OUT; o++) {
                            double expected = by_definition(v + o * IN, q + r * IN, IN, (double)s[(size_t)r * stride], (double)z[(size_t)r * stride]);
                            expect_near(y[r * OUT + o], expected + (double)bias[o], 1e-4); /* sums of magnitudes up to 500, in F32 */
                        }
                    assert_int_equal(aq_linear_integer(&spec, &layout, codes, params, q, ROWS, s, z, stride, bias, 3, again, &err), AQ_OK);
                    assert_memory_equal(again, y, sizeof y);
                    assert_int_equal(aq_linear_integer(&spec, &layout, codes, params, q + IN, 1, s + stride, z + stride, stride, NULL, 1, again, &err), AQ_OK);
                    for (int o = 0; o < OUT; o++)
                        expect_near(again[o] + bias[o], y[OUT + o], 1e-6 * fabs((double)y[OUT + o]) + 2e-5); /* rows are independent; no bias */
                }
                aq_free(codes);
                aq_free(params);
            }
}

/* The largest codes everywhere: sums over 70,000 inputs are past 32 bits. */
static void long_sums_do_not_overflow(void **state) {
    (void)state;
    enum { IN = 70001 };
    aq_quant_spec spec = {.bits = 8, .group_size = 0, .axis = 1, .params = AQ_PARAMS_F32};
    aq_quant_layout layout;
    aq_error err;
    float pair[] = {1, 0}, s = 1, z = 0, y;
    assert_int_equal(aq_quant_layout_init(&layout, &spec, 1, IN, &err), AQ_OK);
    uint8_t *codes = aq_alloc(IN);
    memset(codes, 255, IN);
    assert_int_equal(aq_linear_integer(&spec, &layout, codes, pair, codes, 1, &s, &z, 0, NULL, 1, &y, &err), AQ_OK);
    expect_near(y, 65025.0 * IN, 65025.0 * IN * 1e-6);
    z = 255; /* everything cancels exactly */
    assert_int_equal(aq_linear_integer(&spec, &layout, codes, pair, codes, 1, &s, &z, 0, NULL, 1, &y, &err), AQ_OK);
    assert_true(y == 0);
    spec.axis = 0;
    assert_int_equal(aq_linear_integer(&spec, &layout, codes, pair, codes, 1, &s, &z, 0, NULL, 1, &y, &err), AQ_ERR_USAGE);
    aq_free(codes);
}

static void a_failed_allocation_is_told(void **state) {
    (void)state;
    aq_quant_spec spec = {.bits = 8, .group_size = 0, .axis = 1, .params = AQ_PARAMS_F32};
    aq_quant_layout layout;
    aq_error err;
    uint8_t codes[64] = {0};
    float pairs[32], s = 1, z = 0, y[16];
    for (int i = 0; i < 16; i++) pairs[2 * i] = 1, pairs[2 * i + 1] = 0;
    assert_int_equal(aq_quant_layout_init(&layout, &spec, 16, 4, &err), AQ_OK);
    for (int64_t n = 0; n < 2; n++) {
        aq_mem_fail_after(n);
        aq_status status = aq_linear_integer(&spec, &layout, codes, pairs, codes, 1, &s, &z, 0, NULL, 1, y, &err);
        aq_mem_fail_after(-1);
        assert_int_equal(status, AQ_ERR_MEMORY);
    }
    aq_time_group g[2] = {group_of(1, 0), group_of(2, 0)};
    aq_mem_fail_after(0);
    assert_int_equal(aq_time_groups_smooth(g, 2, 0.3, 5, AQ_SMOOTH_LINEAR, &err), AQ_ERR_MEMORY);
    aq_mem_fail_after(-1);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(each_timestep_is_in_exactly_one_group),
        cmocka_unit_test(channel_groups_grow_from_64_to_256_with_the_noise),
        cmocka_unit_test(pairs_are_finite_for_every_range),
        cmocka_unit_test(statistics_combine_to_those_of_all_values),
        cmocka_unit_test(parameters_are_those_of_each_groups_own_timesteps),
        cmocka_unit_test(CA02_statistics_that_are_not_finite_are_refused),
        cmocka_unit_test(clipping_lowers_the_error_and_keeps_outlier_channels),
        cmocka_unit_test(smoothness_figures_follow_their_definition),
        cmocka_unit_test(a_jump_becomes_a_ramp_on_its_smaller_side),
        cmocka_unit_test(smoothing_never_makes_a_range_smaller),
        cmocka_unit_test(equalization_keeps_the_product),
        cmocka_unit_test(equalization_is_1_where_a_quotient_is_no_normal_number),
        cmocka_unit_test(limits_touch_the_widest_inputs_alone),
        cmocka_unit_test(temporal_aggregation_is_the_largest_or_a_running_average),
        cmocka_unit_test(smoothing_activations_scales_the_deviation),
        cmocka_unit_test(channel_groups_are_independent_and_within_half_a_step),
        cmocka_unit_test(activations_are_coded_to_the_nearest),
        cmocka_unit_test(integer_layers_equal_their_definition),
        cmocka_unit_test(long_sums_do_not_overflow),
        cmocka_unit_test(a_failed_allocation_is_told),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
