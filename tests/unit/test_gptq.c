/* Solvers: GPTQ by the factor of H against the textbook form with the inverse, the output's error, what no cut of the rows may change, and bad input. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include <arrowquant/solve.h>

#include "base/mem.h"
#include "solver_samples.h"

/* ---- the textbook ---- */

/* Upper Cholesky factor of the inverse of the damped H: H^-1 = U^T U. */
static double *inverse_factor(const sample *t, double damping) {
    size_t n = t->n;
    double *a = calloc(n * n, sizeof *a), *inverse = calloc(n * n, sizeof *inverse), mean = 0;
    for (size_t i = 0; i < n; i++) mean += (double)t->h[i * n + i] / (double)n;
    for (size_t i = 0; i < n * n; i++) a[i] = (double)t->h[i];
    for (size_t i = 0; i < n; i++) a[i * n + i] += damping * mean, inverse[i * n + i] = 1;
    for (size_t i = 0; i < n; i++) { /* Gauss and Jordan */
        double pivot = a[i * n + i];
        for (size_t k = 0; k < n; k++) a[i * n + k] /= pivot, inverse[i * n + k] /= pivot;
        for (size_t r = 0; r < n; r++) {
            double f = a[r * n + i];
            if (r == i || f == 0) continue;
            for (size_t k = 0; k < n; k++) a[r * n + k] -= f * a[i * n + k], inverse[r * n + k] -= f * inverse[i * n + k];
        }
    }
    for (size_t i = 0; i < n; i++) /* U^T U */
        for (size_t j = i; j < n; j++) {
            double sum = inverse[i * n + j];
            for (size_t k = 0; k < i; k++) sum -= a[k * n + i] * a[k * n + j];
            a[i * n + j] = i == j ? sqrt(sum) : sum / a[i * n + i];
        }
    free(inverse);
    return a;
}

/* Algorithm 1 of the paper with the pairs of `s`; returns the number of codes that differ from those of `s`. */
static size_t textbook_disagreements(const sample *t, const solved *s, double damping) {
    size_t n = t->n, different = 0;
    double *u = inverse_factor(t, damping), *w = malloc(n * sizeof *w);
    for (size_t r = 0; r < t->rows; r++) {
        for (size_t i = 0; i < n; i++) w[i] = (double)t->w[r * n + i];
        for (size_t i = 0; i < n; i++) {
            double v = (double)s->v[r * n + i], scale = (double)s->scales[r * s->layout.pairs_per_row + i / s->layout.pair_width];
            double zero = (double)s->zeros[r * s->layout.pairs_per_row + i / s->layout.pair_width];
            double q = rint(w[i] / scale + zero), top = (double)(1 << s->spec.bits) - 1;
            q = q < 0 ? 0 : q > top ? top : q;
            different += fabs((q - zero) * scale - v) > 0.5 * scale;
            double error = (w[i] - v) / u[i * n + i];
            for (size_t k = i + 1; k < n; k++) w[k] -= error * u[i * n + k];
        }
    }
    free(u);
    free(w);
    return different;
}

static void codes_are_those_of_the_textbook(void **state) {
    (void)state;
    sample t = make_sample(24, 200);
    for (int bits = 2; bits <= 8; bits *= 2)
        for (int form = AQ_PARAMS_F16; form <= AQ_PARAMS_TWO_LEVEL; form++) {
            if (bits == 8 && form == AQ_PARAMS_TWO_LEVEL) continue;
            for (uint64_t group = 0; group <= 256; group = group ? group * 2 : 32) {
                if (group == 0 && form == AQ_PARAMS_TWO_LEVEL) continue;
                aq_quant_spec spec = {.bits = bits, .group_size = group, .axis = 1, .params = (aq_params_form)form, .method = AQ_METHOD_GPTQ};
                aq_solve_options options = {.damp = 0.01, .order = AQ_ORDER_INPUTS};
                solved s = solve(&t, spec, options, 1);
                assert_int_equal(s.status, AQ_OK);
                assert_true(textbook_disagreements(&t, &s, 0.01) <= 2); /* values that fall between two codes to rounding */
                done(&s);
            }
        }
    free_sample(&t);
}

/* ---- quality ---- */

static void feedback_beats_search_beats_nothing(void **state) {
    (void)state;
    sample t = make_sample(32, 256);
    for (int bits = 2; bits <= 8; bits *= 2) {
        aq_quant_spec spec = {.bits = bits, .group_size = 64, .axis = 1, .params = AQ_PARAMS_F16, .method = AQ_METHOD_GPTQ};
        solved search = solve(&t, spec, (aq_solve_options){.damp = 0.01, .no_feedback = true}, 1);
        solved gptq = solve(&t, spec, (aq_solve_options){.damp = 0.01, .order = AQ_ORDER_INPUTS}, 1);
        solved ordered = solve(&t, spec, (aq_solve_options){.damp = 0.01, .order = AQ_ORDER_ENERGY}, 1);
        assert_true(aq_output_sqnr_db(&gptq.output) > aq_output_sqnr_db(&search.output) + 1);
        assert_true(aq_output_sqnr_db(&ordered.output) > aq_output_sqnr_db(&search.output) + 1);
        done(&search);
        done(&gptq);
        done(&ordered);
    }
    free_sample(&t);
}

static void the_reported_error_is_that_of_the_values(void **state) {
    (void)state;
    sample t = make_sample(45, 300);
    for (int ordered = 0; ordered <= 2; ordered++) {
        aq_quant_spec spec = {.bits = 4, .group_size = 128, .axis = 1, .params = AQ_PARAMS_F16, .method = AQ_METHOD_GPTQ};
        solved s = solve(&t, spec, (aq_solve_options){.damp = 0.01, .order = (aq_solve_order)ordered, .refine_sweeps = 2}, 2);
        aq_output_error exact = {0}, alone = {0};
        double brute = 0;
        assert_int_equal(aq_output_error_add(t.w, s.v, t.rows, t.n, t.h, 2, &exact, NULL), AQ_OK);
        assert_int_equal(aq_output_error_add(t.w, s.v, t.rows, t.n, t.h, 1, &alone, NULL), AQ_OK);
        assert_true(exact.err == alone.err && exact.ref == alone.ref);
        for (size_t r = 0; r < t.rows; r++)
            for (size_t i = 0; i < t.n; i++)
                for (size_t k = 0; k < t.n; k++)
                    brute += ((double)t.w[r * t.n + i] - (double)s.v[r * t.n + i]) * (double)t.h[i * t.n + k] *
                             ((double)t.w[r * t.n + k] - (double)s.v[r * t.n + k]);
        assert_true(fabs(exact.err - brute) < 1e-9 * brute);
        assert_true(fabs(exact.err - s.output.err) < 1e-4 * exact.err);
        assert_true(fabs(exact.ref - s.output.ref) < 1e-5 * exact.ref);
        done(&s);
    }
    free_sample(&t);
}

/* ---- sameness ---- */

static void cuts_threads_and_kernels_change_no_byte(void **state) {
    (void)state;
    sample t = make_sample(70, 160);
    for (int form = AQ_PARAMS_F16; form <= AQ_PARAMS_TWO_LEVEL; form++)
        for (int ordered = 0; ordered <= 2; ordered++) {
            aq_quant_spec spec = {.bits = 2, .group_size = 32, .axis = 1, .params = (aq_params_form)form, .method = AQ_METHOD_GPTQ};
            aq_solve_options options = {.damp = 0.01, .order = (aq_solve_order)ordered, .refine_sweeps = 2};
            solved whole = solve(&t, spec, options, 1), threads = solve(&t, spec, options, 4);
            spec.no_simd = true;
            solved plain = solve(&t, spec, options, 2);
            spec.no_simd = false;
            assert_true(same(&whole, &threads) && same(&whole, &plain));
            for (uint64_t first = 0, n = 1; first < t.rows; first += n, n += 7) {
                sample part = rows_of(&t, first, n);
                solved cut = solve(&part, spec, options, 1);
                assert_memory_equal(cut.codes, whole.codes + first * whole.layout.row_bytes, cut.layout.codes_bytes);
                assert_memory_equal(cut.v, whole.v + first * t.n, part.rows * t.n * sizeof(float));
                done(&cut);
            }
            done(&whole);
            done(&threads);
            done(&plain);
        }
    free_sample(&t);
}

/* ---- H that is not as one would like ---- */

static void dead_inputs_get_weight_zero(void **state) {
    (void)state;
    sample t = make_sample(16, 96);
    for (size_t k = 0; k < t.n; k++) t.h[17 * t.n + k] = t.h[k * t.n + 17] = t.h[40 * t.n + k] = t.h[k * t.n + 40] = 0;
    for (size_t r = 0; r < t.rows; r++) t.w[r * t.n + 17] = 100; /* would ruin its group */
    aq_quant_spec spec = {.bits = 4, .group_size = 32, .axis = 1, .params = AQ_PARAMS_F32, .method = AQ_METHOD_GPTQ};
    for (int ordered = 0; ordered <= 2; ordered++) {
        solved s = solve(&t, spec, (aq_solve_options){.damp = 0.01, .order = (aq_solve_order)ordered, .refine_sweeps = 2}, 1);
        for (size_t r = 0; r < t.rows; r++) assert_true(fabsf(s.v[r * t.n + 17]) <= s.scales[r * 3] && fabsf(s.v[r * t.n + 40]) <= s.scales[r * 3 + 1]);
        assert_true(aq_output_sqnr_db(&s.output) > 15);
        done(&s);
    }
    free_sample(&t);
}

/* Entries beside a diagonal of zero cannot be: H would not be positive semidefinite. They count as the zeros they stand for, in refine and in the error too. */
static void what_stands_beside_dead_inputs_does_not_matter(void **state) {
    (void)state;
    sample clean = make_sample(16, 96), odd = make_sample(16, 96);
    memcpy(odd.w, clean.w, clean.rows * clean.n * sizeof *clean.w);
    memcpy(odd.h, clean.h, clean.n * clean.n * sizeof *clean.h);
    for (size_t k = 0; k < clean.n; k++) clean.h[17 * clean.n + k] = clean.h[k * clean.n + 17] = 0;
    for (size_t k = 0; k < clean.n; k++) odd.h[17 * odd.n + k] = odd.h[k * odd.n + 17] = k == 17 ? 0 : (float)k - 40;
    aq_quant_spec spec = {.bits = 2, .group_size = 32, .axis = 1, .params = AQ_PARAMS_F32, .method = AQ_METHOD_GPTQ};
    for (int order = 0; order <= 2; order++) {
        aq_solve_options options = {.damp = 0.01, .order = (aq_solve_order)order, .refine_sweeps = 2};
        solved a = solve(&clean, spec, options, 1), b = solve(&odd, spec, options, 1);
        assert_true(same(&a, &b));
        done(&a);
        done(&b);
    }
    free_sample(&clean);
    free_sample(&odd);
}

/* Inputs that nearly are combinations of others: floats leave no pivots when the damping is small, and doubles take over at the same damping. What comes out
 * is the textbook's, and no damping is added that doubles do not need. */
static void a_second_moment_too_near_singular_for_floats_is_factored_in_doubles(void **state) {
    (void)state;
    sample t = make_sample(24, 96);
    for (size_t i = 0; i < t.n; i++) /* rank 8, and little more */
        for (size_t k = 0; k < t.n; k++)
            t.h[i * t.n + k] = i % 8 == k % 8 ? (1 + 0.01f * (float)(i % 13)) * (1 + 0.01f * (float)(k % 13)) + (i == k ? 0x1p-19f : 0) : 0;
    for (double damp = 0.01; damp > 1e-8; damp /= 100) {
        aq_solve_options options = {.damp = damp, .order = AQ_ORDER_INPUTS};
        aq_quant_spec spec = {.bits = 4, .group_size = 32, .axis = 1, .params = AQ_PARAMS_F16, .method = AQ_METHOD_GPTQ};
        aq_hessian *h;
        assert_int_equal(aq_hessian_create(&h, t.h, t.n, &options, 1, NULL), AQ_OK);
        assert_true(aq_hessian_damping(h) == damp);
        aq_hessian_free(h);
        solved s = solve(&t, spec, options, 1);
        assert_int_equal(s.status, AQ_OK);
        size_t different = textbook_disagreements(&t, &s, damp);
        assert_true(different <= t.rows * t.n / 200); /* values that fall between two codes to rounding */
        done(&s);
    }
    free_sample(&t);
}

static void damping_climbs_until_the_factor_exists(void **state) {
    (void)state;
    sample t = make_sample(4, 64);
    aq_solve_options options = {.damp = 0};
    aq_hessian *h;
    aq_error err;
    for (size_t i = 0; i < t.n * t.n; i++) t.h[i] = 1; /* rank 1 */
    for (size_t i = 0; i < t.n; i++) t.h[i * t.n + i] -= 1e-3f;
    assert_int_equal(aq_hessian_create(&h, t.h, t.n, &options, 1, &err), AQ_OK);
    assert_true(aq_hessian_damping(h) > 1e-4 && aq_hessian_damping(h) < 0.2);
    aq_hessian_free(h);
    for (size_t i = 0; i < t.n * t.n; i++) t.h[i] = i % (t.n + 1) ? 40 : 1; /* no damping up to 1 helps */
    t.h[1] = -40;
    assert_int_equal(aq_hessian_create(&h, t.h, t.n, &options, 1, &err), AQ_ERR_QUALITY);
    assert_null(h);
    free_sample(&t);
}

static void inputs_without_meaning_are_refused(void **state) {
    (void)state;
    sample t = make_sample(4, 64);
    aq_solve_options options;
    aq_hessian *h;
    aq_error err;
    aq_solve_options_init(&options);
    float kept = t.h[5 * t.n + 9];
    t.h[5 * t.n + 9] = NAN;
    assert_int_equal(aq_hessian_create(&h, t.h, t.n, &options, 1, &err), AQ_ERR_FORMAT);
    assert_string_equal(err.message, "the second moment of inputs 5 and 9 is not finite");
    t.h[5 * t.n + 9] = kept;
    kept = t.h[0];
    t.h[0] = -1;
    assert_int_equal(aq_hessian_create(&h, t.h, t.n, &options, 1, &err), AQ_ERR_FORMAT);
    t.h[0] = kept;
    options.damp = -1;
    assert_int_equal(aq_hessian_create(&h, t.h, t.n, &options, 1, &err), AQ_ERR_USAGE);
    options.damp = 0.01;
    aq_quant_spec spec = {.bits = 4, .group_size = 32, .axis = 1, .params = AQ_PARAMS_F16, .method = AQ_METHOD_GPTQ};
    t.w[70] = INFINITY;
    solved s = solve(&t, spec, options, 1);
    assert_int_equal(s.status, AQ_ERR_FORMAT);
    assert_string_equal(s.error.message, "the value at flat index 70 is not finite");
    done(&s);
    t.w[70] = 1e9f; /* beyond half precision */
    s = solve(&t, spec, options, 1);
    assert_int_equal(s.status, AQ_ERR_QUALITY);
    assert_true(s.needs_f32);
    done(&s);
    spec.axis = 0;
    s = solve(&t, spec, options, 1);
    assert_int_equal(s.status, AQ_ERR_USAGE);
    done(&s);
    free_sample(&t);
}

static void any_scale_of_H_and_W_gives_the_same_codes(void **state) {
    (void)state;
    sample t = make_sample(16, 128), scaled = make_sample(16, 128);
    aq_quant_spec spec = {.bits = 4, .group_size = 32, .axis = 1, .params = AQ_PARAMS_F32, .method = AQ_METHOD_GPTQ};
    aq_solve_options options = {.damp = 0.01, .refine_sweeps = 2};
    memcpy(scaled.w, t.w, t.rows * t.n * sizeof *t.w);
    for (size_t i = 0; i < t.n * t.n; i++) scaled.h[i] = t.h[i] * 0x1p-90f;
    solved a = solve(&t, spec, options, 1), b = solve(&scaled, spec, options, 1);
    assert_memory_equal(a.codes, b.codes, a.layout.codes_bytes);
    assert_true(fabs(a.output.err * 0x1p-90 - b.output.err) <= 1e-12 * b.output.err);
    done(&a);
    done(&b);
    free_sample(&t);
    free_sample(&scaled);
}

/* ---- stopping and running out of memory ---- */

static bool count_down(void *user) { return --*(int *)user > 0; }

static void it_stops_when_told(void **state) {
    (void)state;
    sample t = make_sample(16, 512);
    aq_quant_spec spec = {.bits = 4, .group_size = 64, .axis = 1, .params = AQ_PARAMS_F16, .method = AQ_METHOD_GPTQ};
    aq_solve_options options = {.damp = 0.01, .order = AQ_ORDER_INPUTS, .refine_sweeps = 1};
    int asked = 1000000;
    solved s = solve_asking(&t, spec, options, 1, count_down, &asked);
    assert_int_equal(s.status, AQ_OK);
    int times = 1000000 - asked;
    assert_true(times > 4);
    done(&s);
    for (int left = 1; left <= times; left++) {
        int n = left;
        s = solve_asking(&t, spec, options, 1, count_down, &n);
        assert_int_equal(s.status, AQ_ERR_INTERRUPTED);
        done(&s);
    }
    free_sample(&t);
}

static void every_allocation_may_fail(void **state) {
    (void)state;
    sample t = make_sample(20, 96);
    aq_quant_spec spec = {.bits = 4, .group_size = 32, .axis = 1, .params = AQ_PARAMS_F16, .method = AQ_METHOD_GPTQ};
    int failures = 0;
    for (int64_t n = 0;; n++) {
        aq_mem_fail_after(n);
        solved s = solve(&t, spec, (aq_solve_options){.damp = 0.01, .order = n % 2 ? AQ_ORDER_ENERGY : AQ_ORDER_INPUTS, .refine_sweeps = 1}, 1);
        aq_mem_fail_after(-1);
        bool finished = s.status == AQ_OK;
        if (!finished) assert_int_equal(s.status, AQ_ERR_MEMORY);
        failures += !finished;
        done(&s);
        if (finished && n % 2) break;
    }
    assert_true(failures > 10);
    free_sample(&t);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(codes_are_those_of_the_textbook),
        cmocka_unit_test(feedback_beats_search_beats_nothing),
        cmocka_unit_test(the_reported_error_is_that_of_the_values),
        cmocka_unit_test(cuts_threads_and_kernels_change_no_byte),
        cmocka_unit_test(dead_inputs_get_weight_zero),
        cmocka_unit_test(what_stands_beside_dead_inputs_does_not_matter),
        cmocka_unit_test(a_second_moment_too_near_singular_for_floats_is_factored_in_doubles),
        cmocka_unit_test(damping_climbs_until_the_factor_exists),
        cmocka_unit_test(inputs_without_meaning_are_refused),
        cmocka_unit_test(any_scale_of_H_and_W_gives_the_same_codes),
        cmocka_unit_test(it_stops_when_told),
        cmocka_unit_test(every_allocation_may_fail),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
