/* Calibration statistics against plain loops: any split of the rows, any order of merges, any number of threads; H in memory, spilled and subsampled;
 * convolutions; what is refused. */
#include <math.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include <arrowquant/calibration.h>

#include "base/mem.h"

static uint64_t random_state = 7;
static uint32_t random_bits(void) {
    random_state = random_state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(random_state >> 32);
}
static float uniform(void) { return (float)(random_bits() >> 8) * 0x1p-24f; }

/* Rows with correlated channels of different sizes and a mean. */
static float *random_rows(uint64_t rows, uint64_t n) {
    float *x = malloc((rows * n + 1) * sizeof *x);
    for (uint64_t i = 0; i < rows; i++) {
        float common = uniform() - 0.5f;
        for (uint64_t j = 0; j < n; j++) x[i * n + j] = (common + uniform() - 0.3f) * (1 + (float)(j % 7));
    }
    return x;
}

static int32_t *random_timesteps(uint64_t rows, int32_t end) {
    int32_t *t = malloc((rows + 1) * sizeof *t);
    for (uint64_t i = 0; i < rows; i++) t[i] = random_bits() % 3 && i > 0 ? t[i - 1] : (int32_t)(random_bits() % (uint32_t)end);
    return t;
}

static aq_calib *create(const aq_calib_options *options, uint64_t n) {
    aq_calib *c;
    aq_error err;
    assert_int_equal(aq_calib_create(&c, options, &err), AQ_OK);
    assert_int_equal(aq_calib_add_layer(c, "a.weight", n, NULL, NULL, &err), AQ_OK);
    return c;
}

static aq_calib_options with_hessian(uint32_t n_timesteps, uint32_t n_groups) {
    aq_calib_options o;
    aq_calib_options_init(&o);
    o.n_timesteps = n_timesteps;
    o.n_groups = n_groups;
    o.hessian = true;
    return o;
}

static bool near(double a, double b, double scale, double tolerance) { return fabs(a - b) <= tolerance * scale; }

/* All that a collection says of layer 0, against loops over the rows in double. timesteps NULL: all rows in group 0. */
static void assert_describes(const aq_calib *c, const float *x, uint64_t rows, uint64_t n, const int32_t *timesteps) {
    const aq_calib_options *o = aq_calib_settings(c);
    double *h = calloc(n * n, sizeof *h), *mean = calloc(2 * n, sizeof *mean), *std = mean + n;
    uint64_t seen = 0;
    for (uint32_t g = 0; g < o->n_groups; g++) {
        uint32_t start, end;
        aq_calib_group_range(c, g, &start, &end);
        aq_calib_stats s = aq_calib_group(c, 0, g);
        uint64_t count = 0;
        for (uint64_t i = 0; i < rows; i++) count += !timesteps || ((uint32_t)timesteps[i] >= start && (uint32_t)timesteps[i] < end);
        assert_int_equal(s.count, count);
        seen += count;
        if (count == 0) {
            assert_null(s.sum);
            assert_false(aq_calib_mean_std(c, 0, g, mean, std));
            continue;
        }
        assert_true(aq_calib_mean_std(c, 0, g, mean, std));
        for (uint64_t j = 0; j < n; j++) {
            double sum = 0, sum_sq = 0, size = 0, around = 0;
            float lo = INFINITY, hi = -INFINITY;
            for (uint64_t i = 0; i < rows; i++) {
                if (timesteps && ((uint32_t)timesteps[i] < start || (uint32_t)timesteps[i] >= end)) continue;
                float v = x[i * n + j];
                sum += (double)v, sum_sq += (double)v * (double)v, size += fabs((double)v);
                lo = fminf(lo, v), hi = fmaxf(hi, v);
            }
            for (uint64_t i = 0; i < rows; i++) {
                if (timesteps && ((uint32_t)timesteps[i] < start || (uint32_t)timesteps[i] >= end)) continue;
                double from_mean = (double)x[i * n + j] - sum / (double)count;
                around += from_mean * from_mean;
            }
            assert_true(near(mean[j], sum / (double)count, size, 1e-13));
            assert_true(near(std[j] * std[j], around / (double)count, sum_sq, 1e-12));
            assert_true(near(s.sum[j], sum, size, 1e-13));
            assert_true(near(s.sum_sq[j], sum_sq, sum_sq, 1e-13));
            assert_true(s.min[j] == lo && s.max[j] == hi && s.absmax[j] == fmaxf(fabsf(lo), fabsf(hi)));
        }
    }
    assert_int_equal(seen, rows);
    if (aq_calib_has_hessian(c, 0)) {
        for (uint64_t i = 0; i < rows; i++)
            for (uint64_t j = 0; j < n; j++)
                for (uint64_t k = 0; k < n; k++) h[j * n + k] += (double)x[i * n + j] * (double)x[i * n + k] / (double)rows;
        float *got = malloc(n * n * sizeof *got);
        assert_int_equal(aq_calib_hessian(c, 0, NULL, got, NULL), AQ_OK);
        for (uint64_t j = 0; j < n; j++)
            for (uint64_t k = 0; k < n; k++) {
                assert_true(near((double)got[j * n + k], h[j * n + k], sqrt(h[j * n + j] * h[k * n + k]), 3e-5));
                assert_true(got[j * n + k] == got[k * n + j]);
            }
        float *diagonal = malloc(n * sizeof *diagonal);
        assert_int_equal(aq_calib_diagonal(c, 0, NULL, diagonal, NULL), AQ_OK);
        for (uint64_t j = 0; j < n; j++) assert_true(near((double)diagonal[j], h[j * n + j], h[j * n + j], 1e-6));
        free(diagonal);
        free(got);
    }
    free(h);
    free(mean);
}

static void any_split_into_calls_gives_the_statistics_of_plain_loops(void **state) {
    (void)state;
    static const uint64_t inputs[] = {1, 3, 16, 65, 130, 200};
    for (size_t k = 0; k < sizeof inputs / sizeof *inputs; k++)
        for (int round = 0; round < 6; round++) {
            uint64_t n = inputs[k], rows = 1 + random_bits() % (round < 3 ? 40 : 1400);
            float *x = random_rows(rows, n);
            int32_t *t = random_timesteps(rows, 100);
            aq_calib_options o = with_hessian(100, round % 2 ? 7 : 1);
            o.hessian_pooled = round == 3;
            aq_calib *c = create(&o, n);
            for (uint64_t i = 0; i < rows;) {
                uint64_t some = 1 + random_bits() % (round == 5 ? 1400 : 90);
                if (some > rows - i) some = rows - i;
                assert_int_equal(aq_calib_update(c, 0, x + i * n, some, n, t + i, 0, 1 + round % 3, NULL), AQ_OK);
                i += some;
            }
            assert_describes(c, x, rows, n, t);
            aq_calib_free(c);
            free(x);
            free(t);
        }
}

/* Everything that is shown, as bytes. */
static void digest(const aq_calib *c, uint64_t n, float *h, double *sums) {
    assert_int_equal(aq_calib_hessian(c, 0, NULL, h, NULL), AQ_OK);
    aq_calib_stats s = aq_calib_group(c, 0, 0);
    memcpy(sums, s.sum, n * sizeof *sums);
    memcpy(sums + n, s.sum_sq, n * sizeof *sums);
}

static void threads_do_not_change_a_bit_and_the_split_of_rows_only_rounding(void **state) {
    (void)state;
    const uint64_t inputs[] = {192, 300, 700}, splits[] = {1700, 1700, 1700, 783, 783, 97, 97}; /* rows of a call */
    const int threads[] = {1, 2, 5, 1, 3, 1, 4};
    enum { ROWS = 1700, RUNS = 7 };
    for (size_t k = 0; k < 3; k++) {
        uint64_t n = inputs[k];
        float *x = random_rows(ROWS, n), *h[RUNS];
        double *sums[RUNS];
        aq_calib_options o = with_hessian(0, 1);
        for (int r = 0; r < RUNS; r++) {
            aq_calib *c = create(&o, n);
            for (uint64_t i = 0; i < ROWS; i += splits[r])
                assert_int_equal(aq_calib_update(c, 0, x + i * n, ROWS - i < splits[r] ? ROWS - i : splits[r], n, NULL, -1, threads[r], NULL), AQ_OK);
            h[r] = malloc(n * n * 4), sums[r] = malloc(16 * n);
            digest(c, n, h[r], sums[r]);
            aq_calib_free(c);
            bool same = r > 0 && splits[r] == splits[r - 1];
            if (same) assert_memory_equal(h[r], h[r - 1], n * n * 4);
            if (same) assert_memory_equal(sums[r], sums[r - 1], 16 * n);
            for (uint64_t i = 0; i < n * n; i++) assert_true(fabsf(h[r][i] - h[0][i]) <= 3e-5f * sqrtf(h[0][i / n * (n + 1)] * h[0][i % n * (n + 1)]));
            for (uint64_t j = 0; j < n; j++) assert_true(fabs(sums[r][n + j] - sums[0][n + j]) <= 1e-13 * sums[0][n + j]);
        }
        for (int r = 0; r < RUNS; r++) free(h[r]), free(sums[r]);
        free(x);
    }
}

static void any_order_of_merges_gives_the_statistics_of_all_rows(void **state) {
    (void)state;
    enum { PARTS = 5, N = 70, ROWS = 900 };
    for (int round = 0; round < 6; round++) {
        float *x = random_rows(ROWS, N);
        int32_t *t = random_timesteps(ROWS, 50);
        aq_calib *parts[PARTS];
        aq_calib_options o = with_hessian(50, 5);
        for (int p = 0; p < PARTS; p++) {
            char name[8], sha[65];
            snprintf(name, sizeof name, "set%d", p % 3);
            memset(sha, 'a' + p % 3, 64), sha[64] = 0;
            o.data_name = name;
            o.data_sha256 = sha;
            o.seed = (uint64_t)(10 - p);
            o.synthetic = p == 2;
            o.max_memory_bytes = p == 1 ? 100000 : 0; /* one of them spills */
            parts[p] = create(&o, N);
            uint64_t begin = (uint64_t)p * ROWS / PARTS, end = (uint64_t)(p + 1) * ROWS / PARTS;
            assert_int_equal(aq_calib_update(parts[p], 0, x + begin * N, end - begin, N, t + begin, 0, 1, NULL), AQ_OK);
        }
        for (int left = PARTS; left > 1; left--) { /* two of those left become one */
            int a = (int)(random_bits() % (uint32_t)left), b = (int)(random_bits() % (uint32_t)(left - 1));
            if (b >= a) b++;
            assert_int_equal(aq_calib_merge(parts[a], parts[b], NULL), AQ_OK);
            aq_calib_free(parts[b]);
            parts[b] = parts[left - 1];
            if (a == left - 1) a = b;
        }
        assert_describes(parts[0], x, ROWS, N, t);
        const aq_calib_options *all = aq_calib_settings(parts[0]);
        assert_string_equal(all->data_name, "set0 + set1 + set2");
        assert_int_equal(strlen(all->data_sha256), 3 * 64 + 2 * 3);
        assert_true(all->synthetic);
        assert_int_equal(all->seed, 6);
        aq_calib_free(parts[0]);
        free(x);
        free(t);
    }
}

static void layers_of_one_collection_are_taken_as_they_are(void **state) {
    (void)state;
    enum { N = 6 };
    float *x = random_rows(20, N);
    aq_calib_options o = with_hessian(0, 1);
    aq_calib *a = create(&o, N), *b = create(&o, N);
    size_t q, k;
    assert_int_equal(aq_calib_add_layer(b, "q.weight", N, NULL, &q, NULL), AQ_OK);
    assert_int_equal(aq_calib_add_layer(b, "k.weight", N, "q.weight", &k, NULL), AQ_OK);
    assert_int_equal(aq_calib_update(b, q, x, 20, N, NULL, -1, 1, NULL), AQ_OK);
    for (int times = 1; times <= 2; times++) {
        assert_int_equal(aq_calib_merge(a, b, NULL), AQ_OK);
        int64_t at = aq_calib_find(a, "k.weight");
        assert_int_equal(aq_calib_group(a, (size_t)at, 0).count, 20 * times);
        assert_int_equal(aq_calib_source(a, (size_t)at), aq_calib_find(a, "q.weight"));
        assert_true(aq_calib_has_hessian(a, (size_t)at));
        assert_int_equal(aq_calib_group(a, 0, 0).count, 0);
    }
    aq_calib_free(a);
    aq_calib_free(b);
    free(x);
}

static void merging_names_what_disagrees(void **state) {
    (void)state;
    aq_error err;
    aq_calib_options o = with_hessian(100, 4), other;
    aq_calib *a = create(&o, 8), *b;
    other = o, other.n_timesteps = 200;
    b = create(&other, 8);
    assert_int_equal(aq_calib_merge(a, b, &err), AQ_ERR_USAGE);
    assert_non_null(strstr(err.message, "schedules differ: 100 and 200"));
    aq_calib_free(b);
    other = o, other.n_groups = 5;
    b = create(&other, 8);
    assert_int_equal(aq_calib_merge(a, b, &err), AQ_ERR_USAGE);
    assert_non_null(strstr(err.message, "4 and 5"));
    aq_calib_free(b);
    b = create(&o, 9);
    assert_int_equal(aq_calib_merge(a, b, &err), AQ_ERR_USAGE);
    assert_string_equal(err.tensor, "a.weight");
    assert_non_null(strstr(err.message, "8 inputs in one collection and 9"));
    aq_calib_free(b);
    other = o, other.hessian_pooled = true;
    b = create(&other, 8);
    assert_int_equal(aq_calib_merge(a, b, &err), AQ_ERR_USAGE);
    aq_calib_free(b);
    assert_int_equal(aq_calib_merge(a, a, &err), AQ_ERR_USAGE);
    aq_calib_free(a);
}

/* Sizes scaled down from a large model: 20 layers whose H take 20 times the bound. */
static void statistics_stay_under_the_memory_bound_and_are_the_same(void **state) {
    (void)state;
    enum { N = 256, LAYERS = 20, ROWS = 600 };
    float *x = random_rows(ROWS, N), *h[2] = {malloc(N * N * 4), malloc(N * N * 4)};
    aq_calib_options o = with_hessian(0, 1);
    aq_calib *held, *spilled;
    assert_int_equal(aq_calib_create(&held, &o, NULL), AQ_OK);
    o.max_memory_bytes = 1000000; /* of 20 x 256^2 / 2 x 8 bytes = 5 MB, and rows that are kept until there are more */
    assert_int_equal(aq_calib_create(&spilled, &o, NULL), AQ_OK);
    uint64_t most = 0;
    for (int l = 0; l < LAYERS; l++) {
        char name[16];
        snprintf(name, sizeof name, "l%d", l);
        assert_int_equal(aq_calib_add_layer(held, name, N, NULL, NULL, NULL), AQ_OK);
        assert_int_equal(aq_calib_add_layer(spilled, name, N, NULL, NULL, NULL), AQ_OK);
    }
    for (uint64_t i = 0; i < ROWS; i += 200)
        for (size_t l = 0; l < LAYERS; l++) {
            assert_int_equal(aq_calib_update(held, l, x + i * N, 200, N, NULL, -1, 1, NULL), AQ_OK);
            assert_int_equal(aq_calib_update(spilled, l, x + i * N, 200, N, NULL, -1, 1, NULL), AQ_OK);
            if (aq_calib_held_bytes(spilled) > most) most = aq_calib_held_bytes(spilled);
        }
    assert_true(most <= o.max_memory_bytes);
    assert_true(aq_calib_held_bytes(held) > 5 * o.max_memory_bytes);
    for (size_t l = 0; l < LAYERS; l++) {
        assert_int_equal(aq_calib_hessian(held, l, NULL, h[0], NULL), AQ_OK);
        assert_int_equal(aq_calib_hessian(spilled, l, NULL, h[1], NULL), AQ_OK);
        for (int i = 0; i < N * N; i++) assert_true(fabsf(h[0][i] - h[1][i]) <= 3e-5f * sqrtf(h[0][i / N * (N + 1)] * h[0][i % N * (N + 1)]));
    }
    aq_calib_free(held);
    aq_calib_free(spilled);
    free(x), free(h[0]), free(h[1]);
}

static void sums_beyond_the_bound_are_refused_when_a_layer_is_added(void **state) {
    (void)state;
    aq_error err;
    aq_calib_options o = with_hessian(0, 1);
    o.max_memory_bytes = 100000;
    aq_calib *c;
    assert_int_equal(aq_calib_create(&c, &o, NULL), AQ_OK);
    assert_int_equal(aq_calib_add_layer(c, "small", 1000, NULL, NULL, &err), AQ_OK);
    assert_int_equal(aq_calib_add_layer(c, "large", 10000, NULL, NULL, &err), AQ_ERR_MEMORY);
    assert_non_null(strstr(err.message, "max_memory_bytes"));
    assert_int_equal(aq_calib_n_layers(c), 1);
    aq_calib_free(c);
    o.max_memory_bytes = 10000;
    o.spill_folder = "/nonexistent/folder";
    c = create(&o, 100);
    float x[100] = {1};
    assert_int_equal(aq_calib_update(c, 0, x, 1, 100, NULL, -1, 1, &err), AQ_ERR_IO);
    aq_calib_free(c);
}

static void wide_layers_take_rows_evenly_and_everything_else_counts_all(void **state) {
    (void)state;
    enum { N = 64, ROWS = 6400 };
    float *x = random_rows(ROWS, N);
    for (uint64_t i = 0; i < ROWS; i++) x[i * N] = (float)(i % 64), x[i * N + 1] = (float)(i / 64); /* place in the sample, and the sample */
    aq_calib_options o = with_hessian(0, 1);
    o.hessian_full = 16; /* one row in four */
    float *h[2] = {malloc(N * N * 4), malloc(N * N * 4)};
    for (int k = 0; k < 2; k++) {
        aq_calib *c = create(&o, N);
        for (uint64_t i = 0; i < ROWS; i += k ? 64 : 1600) assert_int_equal(aq_calib_update(c, 0, x + i * N, k ? 64 : 1600, N, NULL, -1, 1, NULL), AQ_OK);
        aq_calib_stats s = aq_calib_group(c, 0, 0);
        assert_int_equal(s.count, ROWS);
        assert_int_equal(s.hessian_count, ROWS / 4);
        assert_true(s.sum[0] == 100 * 63 * 32);
        assert_int_equal(aq_calib_hessian(c, 0, NULL, h[k], NULL), AQ_OK);
        aq_calib_free(c);
    }
    assert_memory_equal(h[0], h[1], N * N * 4); /* the same rows, however they came */
    double place_sq = 63.0 * 64 * 127 / 6 / 64, sample_sq = 99.0 * 100 * 199 / 6 / 100;
    assert_true(fabs((double)h[0][0] / place_sq - 1) < 0.02);      /* all places of a sample alike, */
    assert_true(fabs((double)h[0][N + 1] / sample_sq - 1) < 0.02); /* and all samples */
    free(x), free(h[0]), free(h[1]);
}

static void weights_of_groups_are_those_of_a_weighted_mean(void **state) {
    (void)state;
    enum { N = 5 };
    aq_calib_options o = with_hessian(10, 2);
    aq_calib *c = create(&o, N);
    float *x = random_rows(30, N), ha[N * N], hb[N * N], h[N * N], d[N];
    assert_int_equal(aq_calib_update(c, 0, x, 10, N, NULL, 0, 1, NULL), AQ_OK);
    assert_int_equal(aq_calib_update(c, 0, x + 10 * N, 20, N, NULL, 9, 1, NULL), AQ_OK);
    assert_int_equal(aq_calib_hessian(c, 0, (double[]){1, 0}, ha, NULL), AQ_OK);
    assert_int_equal(aq_calib_hessian(c, 0, (double[]){0, 2}, hb, NULL), AQ_OK);
    assert_int_equal(aq_calib_hessian(c, 0, (double[]){3, 1}, h, NULL), AQ_OK);
    assert_int_equal(aq_calib_diagonal(c, 0, (double[]){3, 1}, d, NULL), AQ_OK);
    for (int i = 0; i < N * N; i++) assert_true(fabsf(h[i] - (0.75f * ha[i] + 0.25f * hb[i])) <= 1e-5f * (fabsf(ha[i]) + fabsf(hb[i])));
    for (int i = 0; i < N; i++) assert_true(fabsf(d[i] - h[i * N + i]) <= 1e-5f * d[i]);
    assert_int_equal(aq_calib_hessian(c, 0, (double[]){0, 0}, h, NULL), AQ_ERR_USAGE);
    assert_int_equal(aq_calib_hessian(c, 0, (double[]){NAN, 0}, h, NULL), AQ_ERR_USAGE);
    assert_int_equal(aq_calib_diagonal(c, 0, (double[]){-1, 0}, d, NULL), AQ_ERR_USAGE);
    aq_calib_free(c);
    free(x);
}

static void each_timestep_is_in_the_group_whose_range_holds_it(void **state) {
    (void)state;
    static const uint32_t schedules[][2] = {{1000, 10}, {1000, 7}, {10, 10}, {3, 2}, {1, 1}, {4000, 33}};
    for (size_t k = 0; k < 6; k++) {
        uint32_t n_timesteps = schedules[k][0], n_groups = schedules[k][1], at = 0;
        aq_calib_options o;
        aq_calib_options_init(&o);
        o.n_timesteps = n_timesteps;
        o.n_groups = n_groups;
        aq_calib *c = create(&o, 1);
        for (uint32_t t = 0; t < n_timesteps; t++) assert_int_equal(aq_calib_update(c, 0, (float[]){1}, 1, 1, NULL, (int32_t)t, 1, NULL), AQ_OK);
        for (uint32_t g = 0; g < n_groups; g++) {
            uint32_t start, end;
            aq_calib_group_range(c, g, &start, &end);
            assert_int_equal(start, at);
            assert_int_equal(aq_calib_group(c, 0, g).count, end - start);
            at = end;
        }
        assert_int_equal(at, n_timesteps);
        aq_calib_free(c);
    }
}

static void scalars_per_timestep_are_those_of_its_values(void **state) {
    (void)state;
    enum { N = 300, ROWS = 90 };
    aq_calib_options o;
    aq_calib_options_init(&o);
    o.n_timesteps = 20;
    aq_calib *c = create(&o, N);
    float *x = random_rows(ROWS, N);
    int32_t *t = random_timesteps(ROWS, 20);
    assert_int_equal(aq_calib_update(c, 0, x, 50, N, t, 0, 2, NULL), AQ_OK);
    assert_int_equal(aq_calib_update(c, 0, x + 50 * N, ROWS - 50, N, t + 50, 0, 1, NULL), AQ_OK);
    assert_int_equal(aq_calib_update(c, 0, x, 1, N, NULL, -1, 1, NULL), AQ_OK);
    size_t n;
    const aq_timestep_stats *s = aq_calib_timesteps(c, 0, &n);
    assert_int_equal(s[0].timestep, -1);
    assert_int_equal(s[0].count, N);
    uint64_t total = 0;
    for (size_t k = 1; k < n; k++) {
        double sum = 0, sum_sq = 0;
        uint64_t count = 0;
        float lo = INFINITY, hi = -INFINITY;
        assert_true(s[k].timestep > s[k - 1].timestep);
        for (uint64_t i = 0; i < ROWS * N; i++)
            if (t[i / N] == s[k].timestep) sum += (double)x[i], sum_sq += (double)x[i] * (double)x[i], count++, lo = fminf(lo, x[i]), hi = fmaxf(hi, x[i]);
        assert_int_equal(s[k].count, count);
        total += count;
        double mean = sum / (double)count, std = sqrt(sum_sq / (double)count - mean * mean);
        assert_true(fabs(s[k].mean - mean) < 1e-9 && fabs(s[k].std - std) < 1e-9 && s[k].min == lo && s[k].max == hi);
    }
    assert_int_equal(total, ROWS * N);
    aq_calib_free(c);
    free(x);
    free(t);
}

/* The definition of a convolution: the product of the unfolded rows and the weight's matrix view. Each unfolded value is looked up one by one. */
static void convolutions_count_the_rows_of_their_unfolded_input(void **state) {
    (void)state;
    static const aq_conv_shape shapes[] = {
        {2, 3, 1, {1, 5, 6}, {1, 3, 3}, {1, 1, 1}, {0, 1, 1}, {1, 1, 1}},  {1, 4, 2, {1, 7, 7}, {1, 3, 2}, {1, 2, 3}, {0, 0, 1}, {1, 2, 1}},
        {3, 2, 1, {1, 1, 20}, {1, 1, 4}, {1, 1, 2}, {0, 0, 3}, {1, 1, 3}}, {1, 2, 2, {3, 4, 4}, {2, 2, 2}, {1, 1, 1}, {1, 0, 0}, {1, 1, 1}},
        {2, 5, 1, {1, 4, 4}, {1, 1, 1}, {1, 1, 1}, {0, 0, 0}, {1, 1, 1}},
    };
    for (size_t k = 0; k < sizeof shapes / sizeof *shapes; k++) {
        const aq_conv_shape *s = &shapes[k];
        int64_t out[3], kernel = 1, per_group = s->channels / s->groups;
        for (int d = 0; d < 3; d++) {
            out[d] = ((int64_t)s->size[d] + 2 * (int64_t)s->padding[d] - (int64_t)s->dilation[d] * ((int64_t)s->kernel[d] - 1) - 1) / (int64_t)s->stride[d] + 1;
            kernel *= s->kernel[d];
        }
        uint64_t n = (uint64_t)(per_group * kernel), rows = s->batch * (uint64_t)(out[0] * out[1] * out[2]) * s->groups, at = 0;
        uint64_t plane = (uint64_t)s->size[0] * s->size[1] * s->size[2];
        float *x = random_rows(s->batch * s->channels, plane), *unfolded = malloc(rows * n * sizeof *unfolded);
        int32_t *timesteps = random_timesteps(s->batch, 9), *of_rows = malloc(rows * sizeof *of_rows);
        for (uint32_t b = 0; b < s->batch; b++)
            for (int64_t z = 0; z < out[0]; z++)
                for (int64_t y = 0; y < out[1]; y++)
                    for (int64_t w = 0; w < out[2]; w++)
                        for (uint32_t g = 0; g < s->groups; g++) {
                            of_rows[at / n] = timesteps[b];
                            for (int64_t c = 0; c < per_group; c++)
                                for (int64_t e = 0; e < kernel; e++) {
                                    int64_t p[3] = {e / s->kernel[2] / s->kernel[1], e / s->kernel[2] % s->kernel[1], e % s->kernel[2]}, base[3] = {z, y, w};
                                    bool inside = true;
                                    for (int d = 0; d < 3; d++) {
                                        p[d] = base[d] * s->stride[d] + p[d] * s->dilation[d] - s->padding[d];
                                        inside = inside && p[d] >= 0 && p[d] < s->size[d];
                                    }
                                    uint64_t channel = b * s->channels + g * (uint64_t)per_group + (uint64_t)c;
                                    uint64_t place = inside ? (uint64_t)((p[0] * s->size[1] + p[1]) * s->size[2] + p[2]) : 0;
                                    unfolded[at++] = inside ? x[channel * plane + place] : 0;
                                }
                        }
        assert_int_equal(at, rows * n);
        aq_calib_options o = with_hessian(9, 3);
        aq_calib *c = create(&o, n);
        assert_int_equal(aq_calib_update_conv(c, 0, x, s, timesteps, 0, 2, NULL), AQ_OK);
        assert_describes(c, unfolded, rows, n, of_rows);
        aq_calib_free(c);
        free(x), free(unfolded), free(timesteps), free(of_rows);
    }
}

static void impossible_convolutions_are_refused(void **state) {
    (void)state;
    aq_conv_shape good = {1, 2, 1, {1, 4, 4}, {1, 3, 3}, {1, 1, 1}, {0, 0, 0}, {1, 1, 1}}, s;
    aq_calib_options o = with_hessian(0, 1);
    aq_calib *c = create(&o, 18);
    float x[32] = {0};
    assert_int_equal(aq_calib_update_conv(c, 0, x, &good, NULL, -1, 1, NULL), AQ_OK);
    s = good, s.groups = 3;
    assert_int_equal(aq_calib_update_conv(c, 0, x, &s, NULL, -1, 1, NULL), AQ_ERR_USAGE);
    s = good, s.stride[1] = 0;
    assert_int_equal(aq_calib_update_conv(c, 0, x, &s, NULL, -1, 1, NULL), AQ_ERR_USAGE);
    s = good, s.kernel[1] = 5;
    assert_int_equal(aq_calib_update_conv(c, 0, x, &s, NULL, -1, 1, NULL), AQ_ERR_USAGE);
    s = good, s.dilation[1] = UINT32_MAX;
    assert_int_equal(aq_calib_update_conv(c, 0, x, &s, NULL, -1, 1, NULL), AQ_ERR_USAGE);
    s = good, s.channels = 4;
    assert_int_equal(aq_calib_update_conv(c, 0, x, &s, NULL, -1, 1, NULL), AQ_ERR_USAGE);
    x[20] = NAN;
    aq_error err;
    assert_int_equal(aq_calib_update_conv(c, 0, x, &good, NULL, -1, 1, &err), AQ_ERR_FORMAT);
    assert_non_null(strstr(err.message, "sample 0, channel 1"));
    assert_int_equal(aq_calib_group(c, 0, 0).count, 4);
    aq_calib_free(c);
}

static void CA02_values_that_are_not_finite_are_refused_whole_and_named(void **state) {
    (void)state;
    enum { N = 20, ROWS = 40 };
    aq_calib_options o = with_hessian(10, 2);
    aq_calib *c = create(&o, N);
    float *x = random_rows(ROWS, N);
    assert_int_equal(aq_calib_update(c, 0, x, 7, N, NULL, 9, 1, NULL), AQ_OK);
    for (int kind = 0; kind < 4; kind++)
        for (uint64_t at = 0; at < ROWS * N; at += 37) {
            float kept = x[at];
            aq_error err;
            char expected[64];
            x[at] = kind == 0 ? NAN : kind == 1 ? INFINITY : kind == 2 ? -INFINITY : 2e16f;
            assert_int_equal(aq_calib_update(c, 0, x, ROWS, N, NULL, 3, 1 + kind % 2, &err), AQ_ERR_FORMAT);
            snprintf(expected, sizeof expected, "row %d, channel %d ", (int)(at / N), (int)(at % N));
            assert_non_null(strstr(err.message, expected));
            assert_string_equal(err.tensor, "a.weight");
            x[at] = kept;
        }
    assert_int_equal(aq_calib_group(c, 0, 0).count, 0);
    assert_int_equal(aq_calib_group(c, 0, 1).count, 7);
    assert_int_equal(aq_calib_group(c, 0, 1).hessian_count, 7);
    size_t n;
    aq_calib_timesteps(c, 0, &n);
    assert_int_equal(n, 1);
    aq_calib_free(c);
    o.hessian = false; /* without H large values are counted */
    c = create(&o, N);
    x[5] = 3e38f;
    assert_int_equal(aq_calib_update(c, 0, x, ROWS, N, NULL, 3, 1, NULL), AQ_OK);
    aq_calib_free(c);
    free(x);
}

static void CA02_timesteps_outside_the_schedule_are_refused(void **state) {
    (void)state;
    aq_calib_options o = with_hessian(10, 2);
    aq_calib *c = create(&o, 2);
    float x[6] = {1, 2, 3, 4, 5, 6};
    aq_error err;
    assert_int_equal(aq_calib_update(c, 0, x, 3, 2, (int32_t[]){0, 10, 3}, 0, 1, &err), AQ_ERR_FORMAT);
    assert_non_null(strstr(err.message, "row 1: timestep 10 is outside the schedule of 10"));
    assert_int_equal(aq_calib_update(c, 0, x, 3, 2, NULL, -2, 1, &err), AQ_ERR_FORMAT);
    assert_int_equal(aq_calib_group(c, 0, 0).count, 0);
    aq_calib_free(c);
}

/* Empty, one sample, a constant channel, a group that was never seen: all are figures that can be used. */
static void CA02_little_data_gives_plain_figures(void **state) {
    (void)state;
    enum { N = 3 };
    aq_calib_options o = with_hessian(10, 5);
    aq_calib *c = create(&o, N);
    float h[N * N], d[N], x[N] = {2, 0, -1};
    aq_error err;
    assert_false(aq_calib_has_hessian(c, 0));
    assert_int_equal(aq_calib_hessian(c, 0, NULL, h, &err), AQ_ERR_USAGE);
    assert_int_equal(aq_calib_diagonal(c, 0, NULL, d, &err), AQ_ERR_USAGE);
    assert_int_equal(aq_calib_update(c, 0, x, 0, N, NULL, 1, 1, NULL), AQ_OK);
    assert_int_equal(aq_calib_update(c, 0, x, 1, N, NULL, 1, 1, NULL), AQ_OK);
    assert_int_equal(aq_calib_hessian(c, 0, NULL, h, NULL), AQ_OK);
    static const float expected[N * N] = {4, 0, -2, 0, 0, 0, -2, 0, 1};
    assert_memory_equal(h, expected, sizeof h);
    assert_int_equal(aq_calib_group(c, 0, 4).count, 0);
    assert_int_equal(aq_calib_hessian(c, 0, (double[]){0, 0, 0, 0, 1}, h, &err), AQ_ERR_USAGE); /* only a group without rows has weight */
    aq_calib_free(c);
}

static void options_and_layers_that_make_no_sense_are_refused(void **state) {
    (void)state;
    aq_error err;
    aq_calib *c;
    aq_calib_options o = with_hessian(10, 2), bad;
    bad = o, bad.n_groups = 0;
    assert_int_equal(aq_calib_create(&c, &bad, &err), AQ_ERR_USAGE);
    bad = o, bad.n_groups = 11;
    assert_int_equal(aq_calib_create(&c, &bad, &err), AQ_ERR_USAGE);
    bad = o, bad.n_timesteps = 0;
    assert_int_equal(aq_calib_create(&c, &bad, &err), AQ_ERR_USAGE);
    bad = o, bad.data_sha256 = "abc";
    assert_int_equal(aq_calib_create(&c, &bad, &err), AQ_ERR_USAGE);
    assert_null(c);
    c = create(&o, 4);
    assert_int_equal(aq_calib_add_layer(c, "a.weight", 4, NULL, NULL, &err), AQ_ERR_USAGE);
    assert_int_equal(aq_calib_add_layer(c, "", 4, NULL, NULL, &err), AQ_ERR_USAGE);
    assert_int_equal(aq_calib_add_layer(c, "b", 0, NULL, NULL, &err), AQ_ERR_USAGE);
    assert_int_equal(aq_calib_add_layer(c, "b", 5, "a.weight", NULL, &err), AQ_ERR_USAGE);
    assert_int_equal(aq_calib_add_layer(c, "b", 4, "none", NULL, &err), AQ_ERR_USAGE);
    size_t b;
    assert_int_equal(aq_calib_add_layer(c, "b", 4, "a.weight", &b, &err), AQ_OK);
    assert_int_equal(aq_calib_update(c, b, (float[4]){0}, 1, 4, NULL, 0, 1, &err), AQ_ERR_USAGE);
    assert_non_null(strstr(err.message, "shares the statistics of \"a.weight\""));
    assert_int_equal(aq_calib_update(c, 7, (float[4]){0}, 1, 4, NULL, 0, 1, &err), AQ_ERR_USAGE);
    aq_calib_free(c);
}

static void gradients_are_means_of_squares(void **state) {
    (void)state;
    aq_calib_options o = with_hessian(0, 1);
    aq_calib *a = create(&o, 2), *b = create(&o, 2);
    const double *rows, *cols;
    uint64_t n;
    assert_false(aq_calib_gradient(a, 0, &rows, &n, &cols));
    float g[6] = {1, 2, 3, 4, 0, -2};
    assert_int_equal(aq_calib_add_gradient(a, 0, g, 3, NULL), AQ_OK);
    assert_int_equal(aq_calib_add_gradient(b, 0, g, 3, NULL), AQ_OK);
    for (int i = 0; i < 6; i++) g[i] *= 3;
    assert_int_equal(aq_calib_add_gradient(b, 0, g, 3, NULL), AQ_OK);
    assert_int_equal(aq_calib_merge(a, b, NULL), AQ_OK);
    assert_true(aq_calib_gradient(a, 0, &rows, &n, &cols));
    assert_int_equal(n, 3);
    const double mean = (1 + 1 + 9) / 3.0;
    assert_true(fabs(rows[0] - mean * 5 / 2) < 1e-12 && fabs(rows[1] - mean * 25 / 2) < 1e-12 && fabs(rows[2] - mean * 2) < 1e-12);
    assert_true(fabs(cols[0] - mean * 10 / 3) < 1e-12 && fabs(cols[1] - mean * 24 / 3) < 1e-12);
    aq_error err;
    assert_int_equal(aq_calib_add_gradient(a, 0, g, 2, &err), AQ_ERR_USAGE);
    g[3] = INFINITY;
    assert_int_equal(aq_calib_add_gradient(a, 0, g, 3, &err), AQ_ERR_FORMAT);
    assert_true(aq_calib_gradient(a, 0, &rows, &n, &cols) && isfinite(rows[1]));
    aq_calib_free(a);
    aq_calib_free(b);
}

typedef struct {
    aq_calib *c;
    const float *x;
    size_t layer;
    bool ok;
} worker;

static void *update_one_layer(void *arg) {
    worker *w = arg;
    w->ok = true;
    for (int i = 0; i < 4; i++) w->ok = w->ok && aq_calib_update(w->c, w->layer, w->x, 300, 70, NULL, i * 20, 1, NULL) == AQ_OK;
    return NULL;
}

static void *read_one_layer(void *arg) {
    worker *w = arg;
    float *h = malloc(70 * 70 * 4);
    w->ok = aq_calib_hessian(w->c, w->layer, NULL, h, NULL) == AQ_OK && h[0] > 0;
    free(h);
    return NULL;
}

/* Layers of one collection from several threads, some of them spilled; then one layer read by all. */
static void layers_are_updated_and_read_by_several_threads(void **state) {
    (void)state;
    enum { LAYERS = 6 };
    float *x = random_rows(300, 70);
    aq_calib_options o = with_hessian(80, 4);
    o.max_memory_bytes = 1000000;
    aq_calib *c;
    assert_int_equal(aq_calib_create(&c, &o, NULL), AQ_OK);
    worker workers[LAYERS];
    pthread_t threads[LAYERS];
    for (size_t l = 0; l < LAYERS; l++) {
        char name[8];
        snprintf(name, sizeof name, "l%zu", l);
        assert_int_equal(aq_calib_add_layer(c, name, 70, NULL, NULL, NULL), AQ_OK);
        workers[l] = (worker){c, x, l, false};
    }
    for (int reading = 0; reading < 2; reading++) {
        for (size_t l = 0; l < LAYERS; l++) {
            if (reading) workers[l].layer = 0;
            assert_int_equal(pthread_create(&threads[l], NULL, reading ? read_one_layer : update_one_layer, &workers[l]), 0);
        }
        for (size_t l = 0; l < LAYERS; l++) {
            pthread_join(threads[l], NULL);
            assert_true(workers[l].ok);
        }
    }
    for (size_t l = 0; l < LAYERS; l++)
        for (uint32_t g = 0; g < 4; g++) assert_int_equal(aq_calib_group(c, l, g).hessian_count, 300);
    aq_calib_free(c);
    free(x);
}

static void count_missing(void *user, const char *name) {
    char *names = user;
    strcat(strcat(names, name), " ");
}

static void CA01_statistics_of_another_model_are_refused_by_name(void **state) {
    (void)state;
    aq_model *model;
    aq_error err;
    assert_int_equal(aq_model_open(&model, AQ_SOURCE_DIR "/examples/dit-fashion", NULL, &err), AQ_OK);
    aq_calib_options o = with_hessian(0, 1);
    aq_calib *c;
    assert_int_equal(aq_calib_create(&c, &o, NULL), AQ_OK);
    size_t n_layers = 0;
    const char *left_out = NULL;
    for (size_t i = 0; i < aq_model_n_tensors(model); i++) {
        const aq_tensor_info *t = aq_model_tensor(model, i);
        uint64_t rows, cols;
        aq_shape_matrix(&t->shape, &rows, &cols);
        if (t->role != AQ_ROLE_LAYER) continue;
        if (n_layers++ == 3)
            left_out = t->name;
        else
            assert_int_equal(aq_calib_add_layer(c, t->name, cols, NULL, NULL, NULL), AQ_OK);
    }
    char missing[1000] = "";
    assert_true(n_layers > 4);
    assert_int_equal(aq_calib_check(c, model, count_missing, missing, &err), AQ_OK);
    assert_int_equal(strlen(missing), strlen(left_out) + 1);
    assert_memory_equal(missing, left_out, strlen(left_out));
    assert_int_equal(aq_calib_add_layer(c, "other.weight", 3, NULL, NULL, NULL), AQ_OK);
    assert_int_equal(aq_calib_add_layer(c, left_out, 3, NULL, NULL, NULL), AQ_OK);
    assert_int_equal(aq_calib_check(c, model, count_missing, missing, &err), AQ_ERR_FORMAT);
    assert_non_null(strstr(err.message, "\"other.weight\" is no tensor of the model"));
    assert_non_null(strstr(err.message, "has 3 inputs in the statistics and"));
    aq_calib_free(c);
    aq_model_close(model);
}

/* Rows that were gathered when the memory for their block ran out are still there, no further one is put behind them, and they count when there is memory
 * again. */
static void FA07_rows_gathered_before_memory_ran_out_are_added_later(void **state) {
    (void)state;
    enum { N = 24, ROWS = 1400 };
    float *x = random_rows(ROWS, N);
    aq_calib_options o = with_hessian(0, 1);
    int failures = 0;
    for (int64_t n = 0; n < 40; n++) {
        aq_calib *c = create(&o, N);
        aq_error err;
        uint64_t fed = 0;
        for (uint64_t at = 0; at < ROWS; at++) {
            aq_mem_fail_after(at >= 505 && at < 540 ? n : -1); /* around the end of the first block */
            aq_status status = aq_calib_update(c, 0, x + at * N, 1, N, NULL, -1, 1, &err);
            aq_mem_fail_after(-1);
            failures += status != AQ_OK;
            fed += status == AQ_OK;
            if (status != AQ_OK) assert_int_equal(status, AQ_ERR_MEMORY);
        }
        assert_int_equal(aq_calib_count(c, 0), fed);
        aq_calib_free(c);
    }
    assert_true(failures > 100);
    free(x);
}

/* A gradient that found no memory leaves no room of its own size behind. */
static void FA07_a_gradient_without_memory_leaves_nothing_behind(void **state) {
    (void)state;
    float *g = random_rows(64, 8);
    for (int64_t n = 0; n < 8; n++) {
        aq_calib_options o;
        aq_error err;
        const double *rows, *cols;
        uint64_t n_rows;
        aq_calib_options_init(&o);
        aq_calib *c = create(&o, 8);
        aq_mem_fail_after(n);
        bool first = aq_calib_add_gradient(c, 0, g, 4, &err) == AQ_OK;
        aq_mem_fail_after(-1);
        aq_status status = aq_calib_add_gradient(c, 0, g, 64, &err);
        assert_int_equal(status, first ? AQ_ERR_USAGE : AQ_OK);
        assert_true(aq_calib_gradient(c, 0, &rows, &n_rows, &cols));
        assert_int_equal(n_rows, first ? 4 : 64);
        for (uint64_t i = 0; i < n_rows; i++) assert_true(rows[i] > 0);
        aq_calib_free(c);
    }
    free(g);
}

static void every_allocation_may_fail(void **state) {
    (void)state;
    enum { N = 70 };
    float *x = random_rows(600, N), *h = malloc(N * N * 4);
    bool done = false;
    for (int64_t n = 0; !done && n < 1000; n++) {
        aq_calib_options o = with_hessian(10, 2);
        o.data_name = "set";
        o.max_memory_bytes = n % 2 ? 10000 : 0;
        aq_calib *a = NULL, *b = NULL;
        aq_error err;
        aq_mem_fail_after(n);
        aq_status status = aq_calib_create(&a, &o, &err);
        o.data_name = "other";
        if (status == AQ_OK) status = aq_calib_create(&b, &o, &err);
        if (status == AQ_OK) status = aq_calib_add_layer(b, "l", N, NULL, NULL, &err);
        if (status == AQ_OK) status = aq_calib_add_layer(b, "m", N, "l", NULL, &err);
        if (status == AQ_OK) status = aq_calib_update(b, 0, x, 600, N, NULL, 1, 1, &err);
        if (status == AQ_OK) status = aq_calib_add_gradient(b, 1, x, 10, &err);
        if (status == AQ_OK) status = aq_calib_merge(a, b, &err);
        if (status == AQ_OK) status = aq_calib_hessian(a, 0, NULL, h, &err);
        done = status == AQ_OK;
        aq_mem_fail_after(-1);
        if (!done) assert_int_equal(status, AQ_ERR_MEMORY);
        aq_calib_free(a);
        aq_calib_free(b);
    }
    assert_true(done);
    free(x);
    free(h);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(any_split_into_calls_gives_the_statistics_of_plain_loops),
        cmocka_unit_test(threads_do_not_change_a_bit_and_the_split_of_rows_only_rounding),
        cmocka_unit_test(any_order_of_merges_gives_the_statistics_of_all_rows),
        cmocka_unit_test(layers_of_one_collection_are_taken_as_they_are),
        cmocka_unit_test(merging_names_what_disagrees),
        cmocka_unit_test(statistics_stay_under_the_memory_bound_and_are_the_same),
        cmocka_unit_test(sums_beyond_the_bound_are_refused_when_a_layer_is_added),
        cmocka_unit_test(wide_layers_take_rows_evenly_and_everything_else_counts_all),
        cmocka_unit_test(weights_of_groups_are_those_of_a_weighted_mean),
        cmocka_unit_test(each_timestep_is_in_the_group_whose_range_holds_it),
        cmocka_unit_test(scalars_per_timestep_are_those_of_its_values),
        cmocka_unit_test(convolutions_count_the_rows_of_their_unfolded_input),
        cmocka_unit_test(impossible_convolutions_are_refused),
        cmocka_unit_test(CA02_values_that_are_not_finite_are_refused_whole_and_named),
        cmocka_unit_test(CA02_timesteps_outside_the_schedule_are_refused),
        cmocka_unit_test(CA02_little_data_gives_plain_figures),
        cmocka_unit_test(options_and_layers_that_make_no_sense_are_refused),
        cmocka_unit_test(gradients_are_means_of_squares),
        cmocka_unit_test(layers_are_updated_and_read_by_several_threads),
        cmocka_unit_test(CA01_statistics_of_another_model_are_refused_by_name),
        cmocka_unit_test(FA07_rows_gathered_before_memory_ran_out_are_added_later),
        cmocka_unit_test(FA07_a_gradient_without_memory_leaves_nothing_behind),
        cmocka_unit_test(every_allocation_may_fail),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
