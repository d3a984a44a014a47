/* Group affine codes: round trips, closed forms, properties that hold for every spec and shape. */
#include <fenv.h>
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include <arrowquant/quant.h>

#include "base/mem.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

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

/* sum w (x - v)^2 of every group of up to 256 inputs: the two-level form too keeps the better of search and min-max. */
static void two_level_search_is_never_worse_than_rtn_in_any_group(void **state) {
    (void)state;
    uint64_t rows = 16, cols = 600; /* the last group has 88 inputs: sub-groups of 16 and 32, the last one short */
    float *w = gaussian_matrix(rows * cols, 0.05f), *h = malloc(cols * sizeof *h);
    for (uint64_t c = 0; c < cols; c++) h[c] = (float)uniform();
    for (uint64_t c = 0; c < cols; c++) w[3 * cols + c] *= c % 40 ? 0.01f : 30.0f; /* outliers */
    for (uint64_t c = 0; c < 300; c++) w[5 * cols + c] = 0;
    for (uint64_t c = 0; c < cols; c++) w[6 * cols + c] = fabsf(w[6 * cols + c]) + 0.1f; /* all above 0 */
    for (int bits = 2; bits <= 4; bits += 2)
        for (int i = 0; i < 4; i++) {
            aq_quant_spec spec = {.bits = bits, .group_size = 256, .axis = 1, .params = AQ_PARAMS_TWO_LEVEL, .symmetric = i & 1, .method = AQ_METHOD_SEARCH};
            const float *importance = i & 2 ? h : NULL;
            result a = run(w, spec, rows, cols, importance, 1);
            spec.method = AQ_METHOD_RTN;
            result b = run(w, spec, rows, cols, importance, 1);
            assert_int_equal(a.status, AQ_OK);
            for (uint64_t r = 0; r < rows; r++)
                for (uint64_t c = 0; c < cols; c += 256) {
                    uint64_t n = cols - c < 256 ? cols - c : 256, at = r * cols + c;
                    double ea = error_of(w + at, a.v + at, 1, n, importance ? h + c : NULL), eb = error_of(w + at, b.v + at, 1, n, importance ? h + c : NULL);
                    assert_true(ea <= eb * (1 + 1e-12));
                }
            done(&a), done(&b);
        }
    free(w), free(h);
}

/* Codes from the plain NumPy reference (minmax_params and quantize of the design's aqref.py, float64). */
static void rtn_codes_equal_the_reference(void **state) {
    (void)state;
    static const float x[8] = {0.9f, -0.3f, 0.1f, 0.0f, 2.0f, -1.0f, 0.5f, 0.25f};
    static const int codes[3][8] = {{2, 1, 1, 1, 3, 0, 2, 1}, {10, 4, 6, 5, 15, 0, 8, 6}, {162, 60, 94, 85, 255, 0, 128, 106}};
    static const float scales[3] = {1.0f, 0.2f, 3.0f / 255}, zeros[3] = {1, 5, 85};
    for (int i = 0; i < 3; i++) {
        aq_quant_spec spec = {.bits = 2 << i, .group_size = 8, .axis = 1, .params = AQ_PARAMS_F32};
        result r = run(x, spec, 1, 8, NULL, 1);
        for (uint64_t c = 0; c < 8; c++) assert_int_equal(code_at(&r, spec.bits, 0, c), codes[i][c]);
        assert_true(r.scales[0] == scales[i] && r.zeros[0] == zeros[i]);
        done(&r);
    }
}

/* Weight SQNR of the reference on the same matrix: rtn, search, search under importance h (weighted SQNR). */
static void errors_equal_the_reference(void **state) {
    (void)state;
    static const struct {
        int bits;
        uint64_t group;
        double rtn, search, weighted;
    } reference[] = {
        {2, 64, 6.8775, 9.9407, 10.3098}, {4, 64, 20.8928, 21.7626, 22.2718}, {8, 64, 45.5289, 46.0706, 46.3349}, {4, 100, 20.4882, 21.2331, 21.6553}};
    uint64_t rows = 64, cols = 256, kept = random_state;
    random_state = 2026;
    float *w = gaussian_matrix(rows * cols, 0.1f), h[256];
    random_state = kept;
    double w_sq = 0;
    for (uint64_t c = 0; c < cols; c++) h[c] = (float)(1 + c % 7 * (c % 7));
    for (uint64_t i = 0; i < rows * cols; i++) w_sq += (double)h[i % cols] * (double)w[i] * (double)w[i];
    for (size_t i = 0; i < sizeof reference / sizeof *reference; i++) {
        aq_quant_spec spec = {.bits = reference[i].bits, .group_size = reference[i].group, .axis = 1, .params = AQ_PARAMS_F32};
        result r = run(w, spec, rows, cols, NULL, 1);
        assert_true(fabs(aq_quant_metrics_sqnr_db(&r.metrics) - reference[i].rtn) < 0.01);
        done(&r);
        spec.method = AQ_METHOD_SEARCH;
        r = run(w, spec, rows, cols, NULL, 1);
        assert_true(aq_quant_metrics_sqnr_db(&r.metrics) > reference[i].search - 0.05);
        done(&r);
        r = run(w, spec, rows, cols, h, 1);
        assert_true(10 * log10(w_sq / error_of(w, r.v, rows, cols, h)) > reference[i].weighted - 0.05);
        done(&r);
    }
    free(w);
}

/* The figures that the search promises on Gaussian weights, every stored bit counted. */
static void search_reaches_its_quality_at_its_bits(void **state) {
    (void)state;
    static const struct {
        aq_quant_spec spec;
        double bits_per_weight, db;
    } promised[] = {{{.bits = 2, .group_size = 256, .params = AQ_PARAMS_TWO_LEVEL}, 2.625, 11.5},
                    {{.bits = 4, .group_size = 256, .params = AQ_PARAMS_TWO_LEVEL}, 4.5, 22.95},
                    {{.bits = 2, .group_size = 64, .params = AQ_PARAMS_F16}, 2.5, 9.8},
                    {{.bits = 4, .group_size = 64, .params = AQ_PARAMS_F16}, 4.5, 21.6},
                    {{.bits = 4, .group_size = 128, .params = AQ_PARAMS_F16}, 4.25, 20.7}};
    uint64_t rows = 256, cols = 1024;
    float *w = gaussian_matrix(rows * cols, 0.02f);
    for (size_t i = 0; i < sizeof promised / sizeof *promised; i++) {
        aq_quant_spec spec = promised[i].spec;
        spec.axis = 1;
        spec.method = AQ_METHOD_SEARCH;
        result r = run(w, spec, rows, cols, NULL, 0);
        assert_true(8.0 * (double)(r.layout.codes_bytes + r.layout.params_bytes) <= promised[i].bits_per_weight * (double)(rows * cols));
        assert_true(aq_quant_metrics_sqnr_db(&r.metrics) >= promised[i].db);
        done(&r);
    }
    free(w);
}

static void scalar_kernels_give_the_same_bytes(void **state) {
    (void)state;
    uint64_t rows = 19, cols = 1111;
    float *w = gaussian_matrix(rows * cols, 0.3f), *h = malloc(cols * sizeof *h);
    for (uint64_t c = 0; c < cols; c++) h[c] = (float)uniform();
    FOR_ALL_SPECS(spec) {
        spec.group_size = spec.params == AQ_PARAMS_TWO_LEVEL ? 128 : spec.axis ? 96 : 4;
        for (int weighted = 0; weighted <= 1; weighted++) {
            result a = run(w, spec, rows, cols, weighted ? h : NULL, 1);
            spec.no_simd = true;
            result b = run(w, spec, rows, cols, weighted ? h : NULL, 1);
            spec.no_simd = false;
            assert_memory_equal(a.codes, b.codes, a.layout.codes_bytes);
            assert_memory_equal(a.params, b.params, a.layout.params_bytes);
            assert_memory_equal(a.v, b.v, rows * cols * sizeof *a.v);
            assert_memory_equal(&a.metrics, &b.metrics, sizeof a.metrics);
            done(&a), done(&b);
        }
    }
    free(w), free(h);
}

static void all_finite(const float *v, uint64_t n) {
    for (uint64_t i = 0; i < n; i++) assert_true(isfinite(v[i]));
}

static void NU02_constant_groups_come_back_exactly(void **state) {
    (void)state;
    static const float constants[] = {0.0f, -0.0f, 1.0f, -1.0f, 0.3f, -0.1234567f, 1e-45f, -1e-40f, 3e38f, -3.4e38f, 65504.0f};
    for (size_t i = 0; i < sizeof constants / sizeof *constants; i++) FOR_ALL_SPECS(spec) {
            float w[70];
            if (spec.params != AQ_PARAMS_F32) continue;
            for (size_t c = 0; c < 70; c++) w[c] = constants[i];
            spec.group_size = spec.axis ? 32 : 2;
            result r = run(w, spec, 2, 35, NULL, 1);
            assert_int_equal(r.status, AQ_OK);
            for (size_t c = 0; c < 70; c++) assert_true(r.v[c] == w[c]);
            for (uint64_t p = 0; p < r.layout.n_pairs; p++) assert_true(r.scales[p] > 0 && isfinite(r.scales[p]));
            if (constants[i] == 0 && !spec.symmetric) assert_true(r.scales[0] == 1.0f && r.zeros[0] == 0.0f);
            done(&r);
        }
}

static void NU02_constants_that_half_precision_holds_are_exact_in_f16(void **state) {
    (void)state;
    static const float constants[] = {0.0f, -0.0f, 1.0f, -0.25f, 0.0999755859375f, -2048.0f};
    for (size_t i = 0; i < sizeof constants / sizeof *constants; i++) FOR_ALL_SPECS(spec) {
            float w[40];
            if (spec.params != AQ_PARAMS_F16) continue;
            for (size_t c = 0; c < 40; c++) w[c] = constants[i];
            spec.group_size = spec.axis ? 16 : 1;
            result r = run(w, spec, 2, 20, NULL, 1);
            assert_int_equal(r.status, AQ_OK);
            for (size_t c = 0; c < 40; c++) assert_true(r.v[c] == w[c]);
            done(&r);
        }
}

static void NU02_groups_of_one_value_are_exact(void **state) {
    (void)state;
    uint64_t n = 333;
    float *w = gaussian_matrix(n, 7.0f);
    FOR_ALL_SPECS(spec) {
        if (spec.params != AQ_PARAMS_F32 || spec.axis == 0) continue;
        spec.group_size = 1;
        result r = run(w, spec, 1, n, NULL, 1);
        for (uint64_t i = 0; i < n; i++) assert_true(r.v[i] == w[i]);
        done(&r);
    }
    free(w);
}

static void NU02_denormals_stay_within_one_step(void **state) {
    (void)state;
    float w[64];
    for (int i = 0; i < 64; i++) w[i] = (float)(i * 37 % 201 - 100) * 0x1p-149f;
    FOR_ALL_SPECS(spec) {
        if (spec.params != AQ_PARAMS_F32) continue;
        spec.group_size = spec.axis ? 32 : 1;
        result r = run(w, spec, 2, 32, NULL, 1);
        assert_int_equal(r.status, AQ_OK);
        for (uint64_t i = 0; i < 64; i++) {
            float s = r.scales[i / 32];
            assert_true(s > 0 && fabsf(w[i] - r.v[i]) <= s);
            if (spec.bits == 8 && !spec.symmetric) assert_true(r.v[i] == w[i]); /* 201 steps of the smallest denormal fit 256 codes */
        }
        done(&r);
    }
}

static void NU03_outliers_widen_or_stay_finite(void **state) {
    (void)state;
    static const float outliers[] = {1e38f, -1e38f, 3.4028235e38f, -3.4028235e38f, 70000.0f * 256};
    for (size_t o = 0; o < sizeof outliers / sizeof *outliers; o++) FOR_ALL_SPECS(spec) {
            uint64_t rows = 3, cols = 128;
            float *w = gaussian_matrix(rows * cols, 0.1f);
            w[200] = outliers[o];
            if (o == 3) w[201] = -outliers[o];
            spec.group_size = spec.params == AQ_PARAMS_TWO_LEVEL ? 64 : spec.axis ? 64 : 1;
            result r = run(w, spec, rows, cols, NULL, 1);
            bool two_level_reaches_it = spec.params == AQ_PARAMS_TWO_LEVEL && spec.bits == 4 && !spec.symmetric && o == 4; /* S k goes beyond 65504 */
            if (spec.params == AQ_PARAMS_F32 || two_level_reaches_it) {
                assert_int_equal(r.status, AQ_OK);
                all_finite(r.v, rows * cols);
                assert_true(fabs((double)r.v[200] / (double)w[200] - 1) < (spec.symmetric ? 1.01 : 0.51));
            } else {
                assert_int_equal(r.status, AQ_ERR_QUALITY);
                assert_true(r.needs_f32);
                assert_non_null(strstr(r.error.hint, "f32"));
            }
            done(&r);
            free(w);
        }
}

static void NU04_scales_below_half_precision_ask_for_f32(void **state) {
    (void)state;
    FOR_ALL_SPECS(spec) {
        uint64_t rows = 4, cols = 64;
        float *w = gaussian_matrix(rows * cols, 0.1f);
        for (uint64_t c = 0; c < cols; c++) w[2 * cols + c] *= 1e-9f;
        spec.group_size = spec.params == AQ_PARAMS_TWO_LEVEL ? 64 : spec.axis ? 64 : 1;
        result r = run(w, spec, rows, cols, NULL, 1);
        assert_int_equal(r.status, spec.params == AQ_PARAMS_F32 ? AQ_OK : AQ_ERR_QUALITY);
        assert_int_equal(r.needs_f32, spec.params != AQ_PARAMS_F32);
        done(&r);
        free(w);
    }
}

static void NU05_any_shape_and_group_size(void **state) {
    (void)state;
    static const uint64_t shapes[][2] = {{1, 1}, {1, 7}, {7, 1}, {3, 5}, {2, 31}, {1, 5000}, {40, 33}, {5, 0}, {0, 5}, {3, 4097}, {2, 1030}};
    static const uint64_t sizes[] = {0, 1, 3, 7, 32, 33, 100, 1000, 1024, 1025, 4096, 100000};
    for (size_t s = 0; s < sizeof shapes / sizeof *shapes; s++)
        for (size_t g = 0; g < sizeof sizes / sizeof *sizes; g++) FOR_ALL_SPECS(spec) {
                uint64_t rows = shapes[s][0], cols = shapes[s][1];
                if (spec.symmetric && g % 3) continue; /* enough of them */
                spec.group_size = spec.params == AQ_PARAMS_TWO_LEVEL ? 32 * (1 + g % 8) : sizes[g];
                float *w = gaussian_matrix(rows * cols, 1.0f);
                for (uint64_t c = 0; c < rows * cols; c++) w[c] += w[c] < 0 ? -0.1f : 0.1f; /* scales that half precision holds, even of one value */
                result r = run(w, spec, rows, cols, NULL, 1);
                assert_int_equal(r.status, AQ_OK);
                assert_int_equal(r.metrics.count, rows * cols);
                for (uint64_t i = 0; i < rows * cols; i++) { /* within a step of the value, or of the end of a clipped range */
                    uint64_t pair = spec.axis         ? i / cols * r.layout.pairs_per_row + i % cols / r.layout.pair_width
                                    : spec.group_size ? i / cols / spec.group_size
                                                      : 0;
                    float step = r.scales[pair], low = (0 - r.zeros[pair]) * step, high = ((float)((1 << spec.bits) - 1) - r.zeros[pair]) * step;
                    float nearest = w[i] < low ? low : w[i] > high ? high : w[i];
                    assert_true(fabsf(nearest - r.v[i]) <= step * 0.5001f);
                }
                for (uint64_t i = 0; i < rows; i++) { /* unused bits are 0 */
                    uint64_t used = cols * (uint64_t)spec.bits % 8;
                    if (used) assert_int_equal(r.codes[(i + 1) * r.layout.row_bytes - 1] >> used, 0);
                }
                float *row = malloc((cols + 1) * sizeof *row); /* one row alone */
                if (rows > 1) {
                    aq_dequantize(&spec, &r.layout, r.codes, r.params, rows - 1, 1, row);
                    assert_memory_equal(row, r.v + (rows - 1) * cols, cols * sizeof *row);
                }
                free(row);
                done(&r);
                free(w);
            }
}

/* Ranks follow from the matrix view: the same values, whatever the rank, give the same codes. */
static void NU05_ranks_1_to_5_are_matrices(void **state) {
    (void)state;
    static const aq_shape shapes[] = {{1, {240}}, {2, {4, 60}}, {3, {4, 6, 10}}, {4, {4, 3, 2, 10}}, {5, {4, 3, 2, 5, 2}}};
    float *w = gaussian_matrix(240, 1.0f);
    for (size_t i = 0; i < 5; i++) {
        uint64_t rows, cols;
        aq_shape_matrix(&shapes[i], &rows, &cols);
        assert_int_equal(rows, i == 0 ? 1 : 4);
        aq_quant_spec spec = {.bits = 4, .group_size = 20, .axis = 1, .params = AQ_PARAMS_F32};
        result r = run(w, spec, rows, cols, NULL, 1), flat = run(w, spec, 1, 240, NULL, 1);
        assert_memory_equal(r.codes, flat.codes, 120);
        done(&r), done(&flat);
    }
    free(w);
}

static void NU07_the_hosts_floating_point_state_has_no_effect(void **state) {
    (void)state;
    uint64_t rows = 6, cols = 700;
    float *w = gaussian_matrix(rows * cols, 0.1f), *h = malloc(cols * sizeof *h);
    for (uint64_t c = 0; c < cols; c++) h[c] = (float)uniform() * 1e-30f;
    for (uint64_t c = 0; c < 64; c++) w[c] = (float)c * 0x1p-140f;
    FOR_ALL_SPECS(spec) {
        if (spec.params != AQ_PARAMS_F32) continue;
        spec.group_size = spec.axis ? 64 : 2;
        result a = run(w, spec, rows, cols, h, 2);
        fesetround(FE_UPWARD);
#if defined(__x86_64__)
        unsigned control = _mm_getcsr();
        _mm_setcsr(control | 0x8040); /* flush to zero, denormals are zero */
#endif
        result b = run(w, spec, rows, cols, h, 2);
#if defined(__x86_64__)
        assert_int_equal(_mm_getcsr() & 0xFFC0, (control | 0x8040) & 0xFFC0); /* and is given back */
        _mm_setcsr(control);
#endif
        assert_int_equal(fegetround(), FE_UPWARD);
        fesetround(FE_TONEAREST);
        assert_memory_equal(a.codes, b.codes, a.layout.codes_bytes);
        assert_memory_equal(a.params, b.params, a.layout.params_bytes);
        assert_memory_equal(a.v, b.v, rows * cols * sizeof *a.v);
        assert_memory_equal(&a.metrics, &b.metrics, sizeof a.metrics);
        done(&a), done(&b);
    }
    free(w), free(h);
}

static void NU01_the_first_value_that_is_not_finite_is_named(void **state) {
    (void)state;
    uint64_t rows = 50, cols = 3000;
    FOR_ALL_SPECS(spec) {
        spec.group_size = spec.params == AQ_PARAMS_TWO_LEVEL ? 256 : spec.axis ? 77 : 5;
        for (int threads = 1; threads <= 8; threads += 7) {
            float *w = gaussian_matrix(rows * cols, 1.0f);
            w[100001] = NAN, w[100000] = -INFINITY, w[149999] = INFINITY;
            result r = run(w, spec, rows, cols, NULL, threads);
            assert_int_equal(r.status, AQ_ERR_FORMAT);
            assert_non_null(strstr(r.error.message, "100000"));
            assert_false(r.needs_f32);
            done(&r);
            free(w);
        }
    }
}

static void wrong_specs_are_refused(void **state) {
    (void)state;
    aq_quant_layout layout;
    aq_error err;
    aq_quant_spec spec = {.bits = 3, .group_size = 64, .axis = 1};
    assert_int_equal(aq_quant_layout_init(&layout, &spec, 2, 2, &err), AQ_ERR_USAGE);
    assert_string_equal(err.message, "Invalid bit_width: 3. Must be 2, 4, or 8");
    spec = (aq_quant_spec){.bits = 8, .group_size = 256, .axis = 1, .params = AQ_PARAMS_TWO_LEVEL};
    assert_int_equal(aq_quant_layout_init(&layout, &spec, 2, 2, &err), AQ_ERR_USAGE);
    spec = (aq_quant_spec){.bits = 2, .group_size = 256, .axis = 0, .params = AQ_PARAMS_TWO_LEVEL};
    assert_int_equal(aq_quant_layout_init(&layout, &spec, 2, 2, &err), AQ_ERR_USAGE);
    spec = (aq_quant_spec){.bits = 4, .group_size = 40, .axis = 1, .params = AQ_PARAMS_TWO_LEVEL};
    assert_int_equal(aq_quant_layout_init(&layout, &spec, 2, 2, &err), AQ_ERR_USAGE);
    assert_non_null(strstr(err.message, "40"));
    spec = (aq_quant_spec){.bits = 4, .group_size = 64, .axis = 2};
    assert_int_equal(aq_quant_layout_init(&layout, &spec, 2, 2, &err), AQ_ERR_USAGE);
    spec.axis = 1;
    assert_int_equal(aq_quant_layout_init(&layout, &spec, UINT64_MAX / 2, 8, &err), AQ_ERR_FORMAT);
    spec.bits = 8;
    assert_int_equal(aq_quant_layout_init(&layout, &spec, 1, UINT64_MAX / 4, &err), AQ_ERR_FORMAT);

    float w[4] = {1, 2, 3, 4}, h[2] = {1, -1};
    spec = (aq_quant_spec){.bits = 4, .group_size = 2, .axis = 1, .method = AQ_METHOD_SEARCH};
    result r = run(w, spec, 2, 2, h, 1);
    assert_int_equal(r.status, AQ_ERR_USAGE);
    assert_non_null(strstr(r.error.message, "input 1"));
    done(&r);
}

static void parameters_from_a_file_are_checked(void **state) {
    (void)state;
    aq_quant_spec spec = {.bits = 4, .group_size = 2, .axis = 1, .params = AQ_PARAMS_F32};
    aq_quant_layout layout;
    aq_error err;
    assert_int_equal(aq_quant_layout_init(&layout, &spec, 1, 4, &err), AQ_OK);
    float good[4] = {1, 0, 0.5f, 3};
    assert_int_equal(aq_quant_params_check(&spec, &layout, good, &err), AQ_OK);
    static const float bad[][2] = {{0, 0}, {-1, 0}, {NAN, 0}, {INFINITY, 0}, {1, NAN}, {1, -INFINITY}};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        float params[4] = {1, 0, bad[i][0], bad[i][1]};
        assert_int_equal(aq_quant_params_check(&spec, &layout, params, &err), AQ_ERR_FORMAT);
        assert_non_null(strstr(err.message, "group 1"));
    }
    spec = (aq_quant_spec){.bits = 2, .group_size = 256, .axis = 1, .params = AQ_PARAMS_TWO_LEVEL};
    assert_int_equal(aq_quant_layout_init(&layout, &spec, 1, 256, &err), AQ_OK);
    uint8_t record[20] = {0};
    assert_int_equal(layout.params_bytes, sizeof record);
    assert_int_equal(aq_quant_params_check(&spec, &layout, record, &err), AQ_ERR_FORMAT); /* S = 0 */
}

/* The bytes of docs/format-params.md. */
static void stored_parameters_have_the_documented_layout(void **state) {
    (void)state;
    float scales[16], zeros[16];
    aq_quant_layout layout;
    /* 2 bits, one group of 40 inputs: S = 0.5, O = -0.25, three sub-groups (k, m) = (1, 0), (16, 15), (3, 4). */
    aq_quant_spec spec = {.bits = 2, .group_size = 256, .axis = 1, .params = AQ_PARAMS_TWO_LEVEL};
    static const uint8_t two[] = {0x00, 0x38, 0x00, 0xB4, 0x00, 0xFF, 0x42};
    assert_int_equal(aq_quant_layout_init(&layout, &spec, 1, 40, NULL), AQ_OK);
    assert_int_equal(layout.params_bytes, sizeof two);
    assert_int_equal(layout.n_pairs, 3);
    aq_quant_pairs(&spec, &layout, two, scales, zeros);
    assert_true(scales[0] == 0.5f && scales[1] == 8.0f && scales[2] == 1.5f);
    assert_true(zeros[0] == 0.0f && zeros[1] == 3.75f / 8.0f && zeros[2] == 1.0f / 1.5f);
    /* 4 bits, 64 inputs: (k, m) = (64, 1), (2, 63) as fields of 6 bits: 63, 1, 1, 63. */
    spec.bits = 4;
    static const uint8_t four[] = {0x00, 0x38, 0x00, 0xB4, 0x7F, 0x10, 0xFC};
    assert_int_equal(aq_quant_layout_init(&layout, &spec, 1, 64, NULL), AQ_OK);
    assert_int_equal(layout.params_bytes, sizeof four);
    aq_quant_pairs(&spec, &layout, four, scales, zeros);
    assert_true(scales[0] == 32.0f && zeros[0] == 0.25f / 32.0f && scales[1] == 1.0f && zeros[1] == 15.75f);
    /* f16: half s, half o. */
    spec = (aq_quant_spec){.bits = 8, .group_size = 4, .axis = 1, .params = AQ_PARAMS_F16};
    static const uint8_t half[] = {0x00, 0x38, 0x00, 0xB4, 0x00, 0x3C, 0x00, 0x00};
    assert_int_equal(aq_quant_layout_init(&layout, &spec, 2, 3, NULL), AQ_OK);
    assert_int_equal(layout.params_bytes, sizeof half);
    aq_quant_pairs(&spec, &layout, half, scales, zeros);
    assert_true(scales[0] == 0.5f && zeros[0] == 0.5f && scales[1] == 1.0f && zeros[1] == 0.0f);
}

static void metrics_are_additive_and_closed_form(void **state) {
    (void)state;
    static const float w[3] = {3, 0, -4}, v[3] = {3, 1, -2};
    aq_quant_metrics m, n = {0};
    aq_quant_metrics_compute(w, v, 3, &m);
    assert_true(m.dot == 17 && m.w_sq == 25 && m.v_sq == 14 && m.err_sq == 5 && m.err_max == 2 && m.count == 3);
    assert_true(fabs(aq_quant_metrics_cosine(&m) - 17 / sqrt(25.0 * 14)) < 1e-15);
    assert_true(fabs(aq_quant_metrics_sqnr_db(&m) - 10 * log10(5.0)) < 1e-12);
    assert_true(aq_quant_metrics_cosine(&n) == 1 && isinf(aq_quant_metrics_sqnr_db(&n)));
    aq_quant_metrics_add(&n, &m);
    aq_quant_metrics_add(&n, &m);
    assert_true(n.err_sq == 10 && n.err_max == 2 && n.count == 6);
    n = (aq_quant_metrics){.w_sq = 1};
    assert_true(aq_quant_metrics_cosine(&n) == 0);
}

static void missing_memory_is_an_error(void **state) {
    (void)state;
    float w[64] = {1, 2, 3};
    aq_quant_metrics metrics;
    FOR_ALL_SPECS(spec) {
        spec.group_size = spec.params == AQ_PARAMS_TWO_LEVEL ? 32 : spec.axis ? 8 : 1;
        aq_quant_layout layout;
        uint8_t codes[64], params[512];
        aq_error err;
        assert_int_equal(aq_quant_layout_init(&layout, &spec, 2, 32, &err), AQ_OK);
        int64_t n = 0;
        for (aq_status status = AQ_ERR_MEMORY; status != AQ_OK; n++) {
            aq_mem_fail_after(n);
            status = aq_quantize(w, &spec, &layout, w, 1, codes, params, &metrics, NULL, &err);
            aq_mem_fail_after(-1);
            assert_true(status == AQ_OK || status == AQ_ERR_MEMORY);
        }
        assert_in_range(n, 3, 6);
    }
}

/* diag(H) is what of a Hessian the search uses: dead inputs (0), all of them dead, and figures that no Hessian has. */
static void NU06_hessian_diagonals_of_dead_inputs_and_nan(void **state) {
    (void)state;
    enum { ROWS = 6, COLS = 192 };
    float *w = gaussian_matrix(ROWS * COLS, 0.1f), h[COLS];
    aq_quant_spec spec = {.bits = 2, .group_size = 64, .axis = 1, .params = AQ_PARAMS_F16, .method = AQ_METHOD_SEARCH};
    for (int dead = 0; dead < 3; dead++) { /* none, the first group, all */
        for (int i = 0; i < COLS; i++) h[i] = dead == 2 || (dead == 1 && i < 64) ? 0.0f : 1.0f + (float)(i % 7);
        result r = run(w, spec, ROWS, COLS, h, 1);
        assert_int_equal(r.status, AQ_OK);
        for (uint64_t i = 0; i < ROWS * COLS; i++) assert_true(isfinite(r.v[i]));
        for (uint64_t i = 0; i < r.layout.n_pairs; i++) assert_true(r.scales[i] > 0 && isfinite(r.zeros[i]));
        done(&r);
    }
    static const float wrong[] = {NAN, INFINITY, -1.0f};
    for (size_t k = 0; k < 3; k++) {
        for (int i = 0; i < COLS; i++) h[i] = i == 70 ? wrong[k] : 1.0f;
        result r = run(w, spec, ROWS, COLS, h, 1);
        assert_int_equal(r.status, AQ_ERR_USAGE);
        assert_non_null(strstr(r.error.message, "input 70"));
        done(&r);
    }
    free(w);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(values_follow_from_codes_and_pairs),
        cmocka_unit_test(rounding_stays_within_half_a_step),
        cmocka_unit_test(search_is_never_worse_than_rtn_in_any_group),
        cmocka_unit_test(two_level_search_is_never_worse_than_rtn_in_any_group),
        cmocka_unit_test(threads_do_not_change_a_byte),
        cmocka_unit_test(scalar_kernels_give_the_same_bytes),
        cmocka_unit_test(rtn_codes_equal_the_reference),
        cmocka_unit_test(errors_equal_the_reference),
        cmocka_unit_test(search_reaches_its_quality_at_its_bits),
        cmocka_unit_test(NU01_the_first_value_that_is_not_finite_is_named),
        cmocka_unit_test(NU02_constant_groups_come_back_exactly),
        cmocka_unit_test(NU02_constants_that_half_precision_holds_are_exact_in_f16),
        cmocka_unit_test(NU02_groups_of_one_value_are_exact),
        cmocka_unit_test(NU02_denormals_stay_within_one_step),
        cmocka_unit_test(NU03_outliers_widen_or_stay_finite),
        cmocka_unit_test(NU04_scales_below_half_precision_ask_for_f32),
        cmocka_unit_test(NU05_any_shape_and_group_size),
        cmocka_unit_test(NU05_ranks_1_to_5_are_matrices),
        cmocka_unit_test(NU06_hessian_diagonals_of_dead_inputs_and_nan),
        cmocka_unit_test(NU07_the_hosts_floating_point_state_has_no_effect),
        cmocka_unit_test(wrong_specs_are_refused),
        cmocka_unit_test(parameters_from_a_file_are_checked),
        cmocka_unit_test(stored_parameters_have_the_documented_layout),
        cmocka_unit_test(metrics_are_additive_and_closed_form),
        cmocka_unit_test(missing_memory_is_an_error),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
