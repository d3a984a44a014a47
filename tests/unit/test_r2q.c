/* R2Q: the levels that are stored, the fit against the plain form of the method, error feedback and refine on these levels, and what is refused. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include <arrowquant/solve.h>

#include "base/half.h"
#include "base/mem.h"
#include "solver_samples.h"

static aq_quant_spec r2q_spec(uint64_t group) {
    return (aq_quant_spec){.bits = 2, .group_size = group, .axis = 1, .params = AQ_PARAMS_R2Q, .method = AQ_METHOD_R2Q};
}

static solved fit(const sample *t, uint64_t group, const float *importance, int threads) {
    solved s = {.spec = r2q_spec(group)};
    assert_int_equal(aq_quant_layout_init(&s.layout, &s.spec, t->rows, t->n, &s.error), AQ_OK);
    s.codes = malloc(s.layout.codes_bytes);
    s.params = malloc(s.layout.params_bytes);
    s.v = malloc(t->rows * t->n * sizeof *s.v);
    s.status = aq_quantize(t->w, &s.spec, &s.layout, importance, threads, s.codes, s.params, &s.metrics, &s.needs_f32, &s.error);
    if (s.status == AQ_OK) aq_dequantize(&s.spec, &s.layout, s.codes, s.params, 0, t->rows, s.v);
    return s;
}

static void values_are_the_levels_of_their_codes(void **state) {
    (void)state;
    sample t = make_sample(5, 203);
    const uint64_t groups[] = {0, 1, 3, 16, 64, 256};
    for (size_t g = 0; g < sizeof groups / sizeof *groups; g++) {
        solved s = fit(&t, groups[g], NULL, 2);
        uint64_t size = groups[g] ? groups[g] : t.n;
        assert_int_equal(s.status, AQ_OK);
        assert_int_equal(s.layout.params_bytes, 6 * s.layout.n_groups);
        assert_int_equal(aq_quant_params_check(&s.spec, &s.layout, s.params, &s.error), AQ_OK);
        for (size_t r = 0; r < t.rows; r++)
            for (size_t i = 0; i < t.n; i++) {
                uint16_t h[3];
                memcpy(h, s.params + 6 * (r * s.layout.groups_per_row + i / size), 6);
                float m = aq_f16_to_f32(h[0]), a1 = aq_f16_to_f32(h[1]), a2 = aq_f16_to_f32(h[2]), nearest = INFINITY, found = s.v[r * t.n + i];
                int code = s.codes[r * s.layout.row_bytes + i / 4] >> i % 4 * 2 & 3;
                assert_true(a1 >= a2 && a2 >= 0);
                assert_true(found == (m + (code & 2 ? a1 : -a1)) + (code & 1 ? a2 : -a2));
                for (int c = 0; c < 4; c++) nearest = fminf(nearest, fabsf(t.w[r * t.n + i] - (m + (c & 2 ? a1 : -a1) + (c & 1 ? a2 : -a2))));
                assert_true(fabsf(t.w[r * t.n + i] - found) <= nearest * 1.0001f + 1e-7f);
            }
        float part[3 * 203];
        aq_dequantize(&s.spec, &s.layout, s.codes, s.params, 1, 3, part);
        assert_memory_equal(part, s.v + t.n, sizeof part);
        done(&s);
    }
    free_sample(&t);
}

/* The method as the design's reference has it, unrounded: error of one group. */
static double reference_error(const float *x, size_t n) {
    double m = 0, a1 = 0, a2 = 0, error = INFINITY;
    for (size_t i = 0; i < n; i++) m += (double)x[i] / (double)n;
    for (size_t i = 0; i < n; i++) a1 += fabs((double)x[i] - m) / (double)n;
    for (size_t i = 0; i < n; i++) a2 += fabs(fabs((double)x[i] - m) - a1) / (double)n;
    for (int round = 0; round <= 10; round++) {
        double g[3][4] = {{0}};
        error = 0;
        for (size_t i = 0; i < n; i++) {
            double best = INFINITY, b1 = 0, b2 = 0;
            for (int c = 0; c < 4; c++) {
                double s1 = c & 2 ? 1 : -1, s2 = c & 1 ? 1 : -1, e = fabs((double)x[i] - (m + s1 * a1 + s2 * a2));
                if (e < best) best = e, b1 = s1, b2 = s2;
            }
            error += best * best;
            double row[4] = {1, b1, b2, (double)x[i]};
            for (int p = 0; p < 3; p++)
                for (int q = 0; q < 4; q++) g[p][q] += row[p] * row[q] + (p == q ? 1e-9 / (double)n : 0);
        }
        for (int p = 0; p < 3; p++) /* Gauss and Jordan */
            for (int r = 0; r < 3; r++) {
                if (r == p) continue;
                double f = g[r][p] / g[p][p];
                for (int q = p; q < 4; q++) g[r][q] -= f * g[p][q];
            }
        m = g[0][3] / g[0][0], a1 = g[1][3] / g[1][1], a2 = g[2][3] / g[2][2];
    }
    return error;
}

static void the_fit_is_as_good_as_the_plain_method(void **state) {
    (void)state;
    sample t = make_sample(40, 256);
    for (uint64_t group = 16; group <= 256; group *= 2) {
        solved s = fit(&t, group, NULL, 1);
        double reference = 0;
        for (size_t i = 0; i < t.rows * t.n; i += group) reference += reference_error(t.w + i, group);
        printf("group %d: error %.4f of the plain method's\n", (int)group, s.metrics.err_sq / reference);
        assert_true(s.metrics.err_sq < reference * 1.002); /* the parameters here are halves */
        done(&s);
    }
    free_sample(&t);
}

static void feedback_and_refine_gain_over_the_fit(void **state) {
    (void)state;
    sample t = make_sample(24, 256);
    for (uint64_t group = 32; group <= 256; group *= 2) {
        double best = -INFINITY;
        for (int step = 0; step <= 3; step++) {
            aq_solve_options options = {.damp = 0.01, .no_feedback = step == 0, .refine_sweeps = step > 1 ? 2 * (step - 1) : 0};
            solved s = solve(&t, r2q_spec(group), options, 2);
            assert_int_equal(s.status, AQ_OK);
            assert_int_equal(aq_quant_params_check(&s.spec, &s.layout, s.params, &s.error), AQ_OK);
            assert_true(aq_output_sqnr_db(&s.output) > best);
            best = aq_output_sqnr_db(&s.output);
            done(&s);
        }
    }
    free_sample(&t);
}

static void cuts_threads_and_kernels_change_no_byte(void **state) {
    (void)state;
    sample t = make_sample(37, 100);
    float importance[100];
    for (size_t i = 0; i < t.n; i++) importance[i] = t.h[i * t.n + i];
    solved a = fit(&t, 32, importance, 1), b = fit(&t, 32, importance, 5);
    assert_true(same(&a, &b));
    done(&a);
    done(&b);
    for (int order = AQ_ORDER_BALANCED; order <= AQ_ORDER_INPUTS; order++) {
        aq_solve_options options = {.damp = 0.01, .order = (aq_solve_order)order, .refine_sweeps = 1};
        aq_quant_spec plain = r2q_spec(32);
        plain.no_simd = true;
        a = solve(&t, r2q_spec(32), options, 1);
        b = solve(&t, r2q_spec(32), options, 4);
        solved c = solve(&t, plain, options, 1);
        assert_true(same(&a, &b) && same(&a, &c));
        for (size_t first = 0; first < t.rows; first += 5) {
            sample part = rows_of(&t, first, 5);
            solved cut = solve(&part, r2q_spec(32), options, 1);
            assert_memory_equal(cut.codes, a.codes + first * a.layout.row_bytes, cut.layout.codes_bytes);
            assert_memory_equal(cut.params, a.params + first * 4 * 6, cut.layout.params_bytes);
            done(&cut);
        }
        done(&a);
        done(&b);
        done(&c);
    }
    free_sample(&t);
}

static void special_groups(void **state) {
    (void)state;
    float w[64] = {0};
    sample t = {1, 64, w, NULL, true};
    for (size_t i = 16; i < 32; i++) w[i] = 0.375f;                  /* one value */
    for (size_t i = 32; i < 48; i++) w[i] = i % 2 ? 1.5f : -0.25f;   /* two */
    for (size_t i = 48; i < 64; i++) w[i] = (float)(i % 4) * 0.125f; /* four, evenly spaced */
    solved s = fit(&t, 16, NULL, 1);
    for (size_t i = 0; i < 64; i++) assert_true(fabsf(s.v[i] - w[i]) < 1e-4f);
    done(&s);
}

static void what_does_not_fit_is_refused(void **state) {
    (void)state;
    aq_quant_layout layout;
    aq_error err;
    aq_quant_spec spec = r2q_spec(32);
    spec.bits = 4;
    assert_int_equal(aq_quant_layout_init(&layout, &spec, 1, 64, &err), AQ_ERR_USAGE);
    spec = r2q_spec(32);
    spec.axis = 0;
    assert_int_equal(aq_quant_layout_init(&layout, &spec, 1, 64, &err), AQ_ERR_USAGE);
    spec = r2q_spec(32);
    spec.params = AQ_PARAMS_F16;
    assert_int_equal(aq_quant_layout_init(&layout, &spec, 1, 64, &err), AQ_ERR_USAGE);
    assert_string_equal(err.message, "method 'r2q' needs r2q parameters, not 'f16'");

    float w[64] = {0};
    sample t = {1, 64, w, NULL, true};
    w[40] = 1e6f;
    solved s = fit(&t, 32, NULL, 1);
    assert_int_equal(s.status, AQ_ERR_QUALITY);
    assert_true(s.needs_f32);
    done(&s);
    w[40] = NAN;
    s = fit(&t, 32, NULL, 1);
    assert_int_equal(s.status, AQ_ERR_FORMAT);
    assert_string_equal(s.error.message, "the value at flat index 40 is not finite");
    done(&s);

    spec = r2q_spec(32);
    uint16_t params[6] = {0, 0x3C00, 0, 0, 0x7C00, 0};
    assert_int_equal(aq_quant_layout_init(&layout, &spec, 1, 64, &err), AQ_OK);
    assert_int_equal(aq_quant_params_check(&spec, &layout, params, &err), AQ_ERR_FORMAT);
    assert_string_equal(err.message, "parameters of group 1: its levels must be finite");
}

static void every_allocation_may_fail(void **state) {
    (void)state;
    sample t = make_sample(20, 64);
    float importance[64];
    for (size_t i = 0; i < 64; i++) importance[i] = t.h[i * 65];
    int failures = 0;
    for (int64_t n = 0;; n++) {
        aq_mem_fail_after(n);
        solved s = fit(&t, 32, importance, 1);
        aq_mem_fail_after(-1);
        bool finished = s.status == AQ_OK;
        if (!finished) assert_int_equal(s.status, AQ_ERR_MEMORY);
        failures += !finished;
        done(&s);
        if (finished) break;
    }
    assert_true(failures >= 5);
    free_sample(&t);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(values_are_the_levels_of_their_codes),
        cmocka_unit_test(the_fit_is_as_good_as_the_plain_method),
        cmocka_unit_test(feedback_and_refine_gain_over_the_fit),
        cmocka_unit_test(cuts_threads_and_kernels_change_no_byte),
        cmocka_unit_test(special_groups),
        cmocka_unit_test(what_does_not_fit_is_refused),
        cmocka_unit_test(every_allocation_may_fail),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
