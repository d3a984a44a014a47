/* Group affine codes: round trips, closed forms, properties that hold for every spec and shape. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include <arrowquant/quant.h>

/* Gaussian values from a fixed generator: sum of 12 uniforms, enough for a test. */
static uint64_t random_state = 1;
static double uniform(void) {
    random_state = random_state * 6364136223846793005u + 1442695040888963407u;
    return (double)(random_state >> 11) * 0x1p-53;
}
static float gaussian(void) {
    double sum = -6;
    for (int i = 0; i < 12; i++) sum += uniform();
    return (float)sum;
}
static float *gaussian_matrix(uint64_t n, float scale) {
    float *w = malloc((n + 1) * sizeof *w);
    for (uint64_t i = 0; i < n; i++) w[i] = gaussian() * scale;
    return w;
}

/* One matrix quantized and dequantized. */
typedef struct result {
    aq_quant_layout layout;
    uint8_t *codes, *params;
    float *v, *scales, *zeros;
    aq_quant_metrics metrics;
    bool needs_f32;
    aq_status status;
    aq_error error;
} result;

static result run(const float *w, aq_quant_spec spec, uint64_t rows, uint64_t cols, const float *importance, int threads) {
    result r = {0};
    assert_int_equal(aq_quant_layout_init(&r.layout, &spec, rows, cols, &r.error), AQ_OK);
    /* Exact sizes, so that the sanitizer sees a byte too many. */
    r.codes = malloc(r.layout.codes_bytes + !r.layout.codes_bytes);
    r.params = malloc(r.layout.params_bytes + !r.layout.params_bytes);
    r.v = malloc((rows * cols + 1) * sizeof *r.v);
    r.scales = malloc((r.layout.n_pairs + 1) * sizeof(float));
    r.zeros = malloc((r.layout.n_pairs + 1) * sizeof(float));
    memset(r.codes, 0xEE, r.layout.codes_bytes);
    r.status = aq_quantize(w, &spec, &r.layout, importance, threads, r.codes, r.params, &r.metrics, &r.needs_f32, &r.error);
    if (r.status == AQ_OK) {
        aq_dequantize(&spec, &r.layout, r.codes, r.params, 0, rows, r.v);
        aq_quant_pairs(&spec, &r.layout, r.params, r.scales, r.zeros);
        assert_int_equal(aq_quant_params_check(&spec, &r.layout, r.params, &r.error), AQ_OK);
    }
    return r;
}

static void done(result *r) {
    free(r->codes), free(r->params), free(r->v), free(r->scales), free(r->zeros);
    *r = (result){0};
}

static double error_of(const float *w, const float *v, uint64_t rows, uint64_t cols, const float *h) {
    double sum = 0;
    for (uint64_t i = 0; i < rows * cols; i++) {
        double e = (double)w[i] - (double)v[i];
        sum += (h ? (double)h[i % cols] : 1.0) * e * e;
    }
    return sum;
}

static int code_at(const result *r, int bits, uint64_t row, uint64_t col) {
    uint64_t bit = col * (uint64_t)bits;
    return r->codes[row * r->layout.row_bytes + bit / 8] >> bit % 8 & ((1 << bits) - 1);
}

/* Every form that a matrix can take. */
#define FOR_ALL_SPECS(spec)                                                                                                                                    \
    for (int b_ = 2; b_ <= 8; b_ *= 2)                                                                                                                         \
        for (int p_ = 0; p_ <= 2; p_++)                                                                                                                        \
            for (int m_ = 0; m_ <= 1; m_++)                                                                                                                    \
                for (int a_ = 0; a_ <= 1; a_++)                                                                                                                \
                    for (int y_ = 0; y_ <= 1; y_++)                                                                                                            \
                        for (aq_quant_spec spec = {.bits = b_, .axis = a_, .params = (aq_params_form)p_, .method = (aq_method)m_, .symmetric = y_};            \
                             spec.bits && !(p_ == AQ_PARAMS_TWO_LEVEL && (b_ == 8 || a_ == 0)); spec.bits = 0)

static void values_follow_from_codes_and_pairs(void **state) {
    (void)state;
    uint64_t rows = 5, cols = 300;
    float *w = gaussian_matrix(rows * cols, 0.1f);
    FOR_ALL_SPECS(spec) {
        spec.group_size = spec.params == AQ_PARAMS_TWO_LEVEL ? 128 : spec.axis ? 64 : 2;
        result r = run(w, spec, rows, cols, NULL, 1);
        assert_int_equal(r.status, AQ_OK);
        for (uint64_t i = 0; i < rows; i++)
            for (uint64_t c = 0; c < cols; c++) {
                uint64_t pair = spec.axis ? i * r.layout.pairs_per_row + c / r.layout.pair_width : i / 2;
                float expected = ((float)code_at(&r, spec.bits, i, c) - r.zeros[pair]) * r.scales[pair];
                assert_true(expected == r.v[i * cols + c]);
            }
        aq_quant_metrics m;
        aq_quant_metrics_compute(w, r.v, rows * cols, &m);
        assert_int_equal(r.metrics.count, rows * cols);
        assert_true(fabs(m.err_sq - r.metrics.err_sq) <= 1e-12 * m.err_sq && m.err_max == r.metrics.err_max);
        done(&r);
    }
    free(w);
}

static void rounding_stays_within_half_a_step(void **state) {
    (void)state;
    uint64_t rows = 7, cols = 130;
    float *w = gaussian_matrix(rows * cols, 1.0f);
    for (int bits = 2; bits <= 8; bits *= 2) {
        aq_quant_spec spec = {.bits = bits, .group_size = 32, .axis = 1, .params = AQ_PARAMS_F32};
        result r = run(w, spec, rows, cols, NULL, 1);
        for (uint64_t i = 0; i < rows * cols; i++) {
            uint64_t pair = i / cols * r.layout.pairs_per_row + i % cols / 32;
            /* An integer zero point shifts the range by up to half a step, which the outermost codes pay. */
            assert_true(fabsf(w[i] - r.v[i]) <= r.scales[pair] * 1.0001f);
            assert_true(r.zeros[pair] == rintf(r.zeros[pair]));
        }
        done(&r);
    }
    free(w);
}

static void search_is_never_worse_than_rtn_in_any_group(void **state) {
    (void)state;
    uint64_t rows = 24, cols = 192;
    float *w = gaussian_matrix(rows * cols, 0.05f), *h = malloc(cols * sizeof *h);
    for (uint64_t c = 0; c < cols; c++) h[c] = (float)exp(3 * (double)gaussian());
    h[5] = 0;
    for (uint64_t i = 0; i < cols; i++) w[3 * cols + i] = powf(w[3 * cols + i] * 20, 5); /* heavy tails */
    FOR_ALL_SPECS(spec) {
        if (spec.method != AQ_METHOD_SEARCH || spec.params == AQ_PARAMS_TWO_LEVEL) continue;
        for (int weighted = 0; weighted <= 1; weighted++) {
            const float *importance = weighted ? h : NULL;
            aq_quant_spec rtn = spec;
            spec.group_size = rtn.group_size = spec.axis ? 64 : 2;
            rtn.method = AQ_METHOD_RTN;
            result a = run(w, spec, rows, cols, importance, 1), b = run(w, rtn, rows, cols, importance, 1);
            assert_int_equal(a.status, AQ_OK);
            uint64_t height = spec.axis ? 1 : 2, width = spec.axis ? 64 : cols;
            for (uint64_t i = 0; i < rows; i += height)
                for (uint64_t c = 0; c < cols; c += width) {
                    double ea = 0, eb = 0;
                    for (uint64_t y = i; y < i + height; y++) {
                        ea += error_of(w + y * cols + c, a.v + y * cols + c, 1, width, importance ? h + c : NULL);
                        eb += error_of(w + y * cols + c, b.v + y * cols + c, 1, width, importance ? h + c : NULL);
                    }
                    assert_true(ea <= eb * (1 + 1e-12));
                }
            done(&a), done(&b);
        }
    }
    free(w), free(h);
}

static void threads_do_not_change_a_byte(void **state) {
    (void)state;
    uint64_t rows = 67, cols = 3001;
    float *w = gaussian_matrix(rows * cols, 0.1f);
    FOR_ALL_SPECS(spec) {
        spec.group_size = spec.params == AQ_PARAMS_TWO_LEVEL ? 256 : spec.axis ? 100 : 3;
        result one = run(w, spec, rows, cols, NULL, 1);
        for (int threads = 2; threads <= 64; threads = threads == 2 ? 3 : threads == 3 ? 7 : threads == 7 ? 64 : 65) {
            result many = run(w, spec, rows, cols, NULL, threads);
            assert_memory_equal(one.codes, many.codes, one.layout.codes_bytes);
            assert_memory_equal(one.params, many.params, one.layout.params_bytes);
            assert_memory_equal(&one.metrics, &many.metrics, sizeof one.metrics);
            done(&many);
        }
        done(&one);
    }
    free(w);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(values_follow_from_codes_and_pairs),
        cmocka_unit_test(rounding_stays_within_half_a_step),
        cmocka_unit_test(search_is_never_worse_than_rtn_in_any_group),
        cmocka_unit_test(threads_do_not_change_a_byte),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
