/* Long calls that are stopped (src/calibration/stage.c): wherever a call ends, the collection is what it was, to the byte and in its files; and what it becomes
 * when nobody stops it is what a short call makes of the same rows, to rounding. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#include "calibration/internal.h"

static uint64_t random_state = 11;
static float random_value(void) {
    random_state = random_state * 6364136223846793005u + 1442695040888963407u;
    return (float)(random_state >> 40) * 0x1p-24f - 0.3f;
}

typedef struct {
    uint64_t n, rows;
    uint32_t groups;
    bool pooled, spilled, without_hessian;
    uint64_t full;
    int conv_kernel, threads;
} kind;

static const kind KINDS[] = {
    {.n = 130, .rows = 1700, .groups = 3, .threads = 2},
    {.n = 600, .rows = 1100, .groups = 2, .threads = 1},
    {.n = 600, .rows = 1100, .groups = 1, .threads = 2},
    {.n = 600, .rows = 700, .groups = 2, .pooled = true, .threads = 1},
    {.n = 600, .rows = 1100, .groups = 2, .spilled = true, .threads = 2},
    {.n = 600, .rows = 2500, .groups = 2, .full = 250, .threads = 1},
    {.n = 600, .rows = 1300, .groups = 2, .without_hessian = true, .threads = 2},
    {.n = 18, .rows = 1024, .groups = 2, .conv_kernel = 3, .threads = 1},
};

typedef struct {
    int asks, stop_at; /* the ask that ends the call; -1: none */
} stopper;

static bool keep_going(void *user) {
    stopper *s = user;
    return s->stop_at < 0 || s->asks++ < s->stop_at;
}

static aq_calib *create(const kind *k) {
    aq_calib_options o;
    aq_calib_options_init(&o);
    o.n_timesteps = 100;
    o.n_groups = k->groups;
    o.hessian = !k->without_hessian;
    o.hessian_pooled = k->pooled;
    o.hessian_full = k->full;
    if (k->spilled) o.max_memory_bytes = 64 * k->n * k->groups + 4096;
    aq_calib *c;
    assert_int_equal(aq_calib_create(&c, &o, NULL), AQ_OK);
    assert_int_equal(aq_calib_add_layer(c, "a.weight", k->n, NULL, NULL, NULL), AQ_OK);
    return c;
}

static aq_status update(aq_calib *c, const kind *k, const float *x, uint64_t rows, const int32_t *timesteps, aq_error *err) {
    if (!k->conv_kernel) return aq_calib_update(c, 0, x, rows, k->n, timesteps, 0, k->threads, err);
    uint32_t kernel = (uint32_t)k->conv_kernel, side = 16;
    aq_conv_shape s = {.batch = (uint32_t)(rows / side / side), .channels = (uint32_t)k->n / kernel / kernel, .groups = 1};
    for (int d = 0; d < 3; d++) s.size[d] = d ? side : 1, s.kernel[d] = d ? kernel : 1, s.stride[d] = s.dilation[d] = 1, s.padding[d] = d ? kernel / 2 : 0;
    return aq_calib_update_conv(c, 0, x, &s, timesteps, 0, k->threads, err);
}

static void assert_near(const aq_calib *a, const aq_calib *b, const kind *k) {
    for (uint32_t g = 0; g < k->groups; g++) {
        aq_calib_stats s = aq_calib_group(a, 0, g), t = aq_calib_group(b, 0, g);
        assert_int_equal(s.count, t.count);
        assert_int_equal(s.hessian_count, t.hessian_count);
        for (uint64_t j = 0; s.count > 0 && j < k->n; j++) {
            assert_true(fabs(s.sum[j] - t.sum[j]) <= 1e-12 * (double)s.count && fabs(s.sum_sq[j] - t.sum_sq[j]) <= 1e-12 * (double)s.count);
            assert_true(s.min[j] == t.min[j] && s.max[j] == t.max[j] && s.absmax[j] == t.absmax[j]);
        }
    }
    size_t n_a, n_b;
    aq_calib_timesteps(a, 0, &n_a);
    aq_calib_timesteps(b, 0, &n_b);
    assert_int_equal(n_a, n_b);
    if (k->without_hessian) return;
    float *p = malloc(k->n * k->n * sizeof *p), *q = malloc(k->n * k->n * sizeof *q);
    assert_int_equal(aq_calib_hessian(a, 0, NULL, p, NULL), AQ_OK);
    assert_int_equal(aq_calib_hessian(b, 0, NULL, q, NULL), AQ_OK);
    for (uint64_t i = 0; i < k->n * k->n; i++) assert_true(fabsf(p[i] - q[i]) <= 1e-6f);
    free(p);
    free(q);
}

static void a_call_that_is_stopped_anywhere_leaves_no_trace(void **state) {
    (void)state;
    for (size_t i = 0; i < sizeof KINDS / sizeof *KINDS; i++) {
        const kind *k = &KINDS[i];
        uint64_t first = k->conv_kernel ? 256 : 37; /* so few are gathered, and wait for more */
        uint64_t n_times = k->conv_kernel ? (first + k->rows) / 256 : first + k->rows, n_first = k->conv_kernel ? 1 : first;
        float *x = malloc((first + k->rows) * k->n * sizeof *x);
        int32_t *t = malloc(n_times * sizeof *t);
        for (uint64_t j = 0; j < (first + k->rows) * k->n; j++) x[j] = random_value();
        for (uint64_t j = 0; j < n_times; j++) t[j] = (int32_t)(j * 97 / n_times);
        const float *rest = x + (k->conv_kernel ? first * (k->n / 9) : first * k->n);

        aq_calib *c = create(k), *plain = create(k);
        assert_int_equal(update(c, k, x, first, t, NULL), AQ_OK);
        assert_int_equal(update(plain, k, x, first, t, NULL), AQ_OK);
        char before[65], after[65];
        assert_int_equal(aq_calib_fingerprint(c, before, NULL), AQ_OK);
        uint64_t held = aq_calib_held_bytes(c), spilled = c->pool.end;

        stopper s = {0, 0};
        c->long_work = 0;
        aq_calib_set_keep_going(c, keep_going, &s);
        aq_error err;
        aq_status status;
        for (;; s.stop_at += 1 + s.stop_at / 4) {
            s.asks = 0;
            status = update(c, k, rest, k->rows, t + n_first, &err);
            if (status == AQ_OK) break;
            assert_int_equal(status, AQ_ERR_INTERRUPTED);
            assert_string_equal(err.tensor, "a.weight");
            assert_string_equal(err.message, "tensor \"a.weight\": interrupted while rows were summed; nothing of the call was added");
            assert_int_equal(aq_calib_held_bytes(c), held);
            assert_int_equal(c->pool.end, spilled);
            assert_int_equal(aq_calib_fingerprint(c, after, NULL), AQ_OK);
            assert_string_equal(after, before);
        }
        assert_true(s.stop_at >= 3);
        if (!k->spilled) assert_int_equal(c->pool.end, spilled);
        assert_int_equal(update(plain, k, rest, k->rows, t + n_first, NULL), AQ_OK);
        assert_near(c, plain, k);
        s.stop_at = -1;
        spilled = c->pool.end; /* every group has its place there now */
        assert_int_equal(update(c, k, rest, k->rows, t + n_first, NULL), AQ_OK);
        assert_int_equal(c->pool.end, spilled);
        aq_calib_free(c);
        aq_calib_free(plain);
        free(x);
        free(t);
    }
}

static void short_calls_and_those_that_nobody_watches_are_not_asked(void **state) {
    (void)state;
    const kind *k = &KINDS[1];
    float *x = calloc(k->rows * k->n, sizeof *x);
    aq_calib *c = create(k);
    stopper s = {0, 0};
    aq_calib_set_keep_going(c, keep_going, &s);
    assert_int_equal(update(c, k, x, k->rows, NULL, NULL), AQ_OK); /* half a billion multiplications */
    assert_int_equal(s.asks, 0);
    aq_calib_set_keep_going(c, NULL, NULL);
    c->long_work = 0;
    assert_int_equal(update(c, k, x, k->rows, NULL, NULL), AQ_OK);
    aq_calib_free(c);
    free(x);
}

static void values_that_are_refused_are_named_by_a_long_call_too(void **state) {
    (void)state;
    const kind *k = &KINDS[1];
    float *x = calloc(k->rows * k->n, sizeof *x);
    x[7 * k->n + 3] = NAN;
    aq_calib *c = create(k);
    stopper s = {0, -1};
    aq_calib_set_keep_going(c, keep_going, &s);
    c->long_work = 0;
    aq_error err;
    assert_int_equal(update(c, k, x, k->rows, NULL, &err), AQ_ERR_FORMAT);
    assert_non_null(strstr(err.message, "row 7, channel 3 of its input is NaN"));
    assert_int_equal(aq_calib_count(c, 0), 0);
    aq_calib_free(c);
    free(x);
}

static void a_save_that_is_stopped_leaves_no_file(void **state) {
    (void)state;
    const kind *k = &KINDS[0];
    float *x = calloc(k->rows * k->n, sizeof *x);
    aq_calib *c = create(k);
    assert_int_equal(update(c, k, x, k->rows, NULL, NULL), AQ_OK);
    char folder[] = "/tmp/aq-stop-XXXXXX", path[64];
    assert_non_null(mkdtemp(folder));
    snprintf(path, sizeof path, "%s/a.aqcal", folder);
    stopper s = {0, 0};
    aq_calib_set_keep_going(c, keep_going, &s);
    aq_error err;
    assert_int_equal(aq_calib_save(c, path, false, &err), AQ_ERR_INTERRUPTED);
    assert_string_equal(err.message, "interrupted while the statistics were written; no file was made");
    assert_int_equal(rmdir(folder), 0); /* it is empty */
    aq_calib_free(c);
    free(x);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_call_that_is_stopped_anywhere_leaves_no_trace),
        cmocka_unit_test(short_calls_and_those_that_nobody_watches_are_not_asked),
        cmocka_unit_test(values_that_are_refused_are_named_by_a_long_call_too),
        cmocka_unit_test(a_save_that_is_stopped_leaves_no_file),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
