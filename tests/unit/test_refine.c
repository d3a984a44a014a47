/* Refine: no round raises tr(E H E^T), in any stored form; what it finds cannot be bettered by one code; it gains what the design says. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include <arrowquant/solve.h>

#include "solver_samples.h"

static double row_error(const sample *t, const float *v, size_t row) {
    double sum = 0;
    for (size_t i = 0; i < t->n; i++)
        for (size_t k = 0; k < t->n; k++)
            sum += ((double)t->w[row * t->n + i] - (double)v[row * t->n + i]) * (double)t->h[i * t->n + k] *
                   ((double)t->w[row * t->n + k] - (double)v[row * t->n + k]);
    return sum;
}

#define FOR_ALL_SPECS(spec)                                                                                                                                    \
    for (int b_ = 2; b_ <= 8; b_ *= 2)                                                                                                                         \
        for (int p_ = AQ_PARAMS_F16; p_ <= AQ_PARAMS_R2Q; p_++)                                                                                                \
            for (int y_ = 0; y_ <= 1; y_++)                                                                                                                    \
                for (uint64_t g_ = 0; g_ <= 256; g_ = g_ ? g_ * 2 : 16)                                                                                        \
                    for (aq_quant_spec spec = {.bits = b_,                                                                                                     \
                                              .group_size = g_,                                                                                                \
                                              .axis = 1,                                                                                                       \
                                              .params = (aq_params_form)p_,                                                                                    \
                                              .method = p_ == AQ_PARAMS_R2Q ? AQ_METHOD_R2Q : AQ_METHOD_GPTQ,                                                  \
                                              .symmetric = y_};                                                                                                \
                         spec.bits && !(p_ == AQ_PARAMS_TWO_LEVEL && (b_ == 8 || g_ == 0 || (b_ == 4 && g_ == 16))) &&                                         \
                         !(p_ == AQ_PARAMS_R2Q && (b_ != 2 || y_));                                                                                            \
                         spec.bits = 0)

static void no_round_raises_the_error_of_any_row(void **state) {
    (void)state;
    sample t = make_sample(18, 210);
    FOR_ALL_SPECS(spec) {
        double before[18], first = 0, last = 0;
        for (int rounds = 0; rounds <= 3; rounds++) {
            aq_solve_options options = {.damp = 0.01, .order = b_ == 4 ? AQ_ORDER_BALANCED : AQ_ORDER_INPUTS, .refine_sweeps = rounds, .no_feedback = b_ == 8};
            solved s = solve(&t, spec, options, 2);
            assert_int_equal(s.status, AQ_OK);
            last = 0;
            for (size_t r = 0; r < t.rows; r++) {
                double error = row_error(&t, s.v, r);
                if (rounds > 0) assert_true(error <= before[r] * (1 + 1e-6));
                before[r] = error;
                last += error;
            }
            if (rounds == 0) first = last;
            done(&s);
        }
        assert_true(last < first);
    }
    free_sample(&t);
}

/* Values of row `row` with code `code` at input i. */
static float value_of(const solved *s, size_t row, size_t i, int code) {
    uint64_t pair = row * s->layout.pairs_per_row + i / s->layout.pair_width;
    return ((float)code - s->zeros[pair]) * s->scales[pair];
}

static void in_the_end_no_single_code_can_be_bettered(void **state) {
    (void)state;
    sample t = make_sample(6, 96);
    aq_quant_spec spec = {.bits = 2, .group_size = 32, .axis = 1, .params = AQ_PARAMS_F16, .method = AQ_METHOD_GPTQ};
    solved s = solve(&t, spec, (aq_solve_options){.damp = 0.01, .refine_sweeps = 50}, 1);
    for (size_t r = 0; r < t.rows; r++) {
        double error = row_error(&t, s.v, r);
        for (size_t i = 0; i < t.n; i++) {
            float kept = s.v[r * t.n + i];
            for (int code = 0; code < 4; code++) {
                s.v[r * t.n + i] = value_of(&s, r, i, code);
                assert_true(row_error(&t, s.v, r) >= error * (1 - 1e-5));
            }
            s.v[r * t.n + i] = kept;
        }
    }
    done(&s);
    free_sample(&t);
}

static void in_the_end_no_scale_can_be_bettered(void **state) {
    (void)state;
    sample t = make_sample(6, 96);
    aq_quant_spec spec = {.bits = 4, .group_size = 32, .axis = 1, .params = AQ_PARAMS_F32, .method = AQ_METHOD_GPTQ};
    solved s = solve(&t, spec, (aq_solve_options){.damp = 0.01, .refine_sweeps = 50}, 1);
    for (size_t r = 0; r < t.rows; r++) {
        double error = row_error(&t, s.v, r);
        for (size_t g = 0; g < 3; g++)
            for (int move = 0; move < 4; move++) { /* scale up, down, offset up, down */
                float kept[32], s0 = s.scales[r * 3 + g], by = move % 2 ? 0.003f : -0.003f;
                memcpy(kept, s.v + r * t.n + g * 32, sizeof kept);
                for (size_t i = 0; i < 32; i++) s.v[r * t.n + g * 32 + i] += move < 2 ? by * (kept[i] + s.zeros[r * 3 + g] * s0) : by * s0;
                assert_true(row_error(&t, s.v, r) >= error * (1 - 1e-6));
                memcpy(s.v + r * t.n + g * 32, kept, sizeof kept);
            }
    }
    done(&s);
    free_sample(&t);
}

static void it_gains_most_where_bits_are_few(void **state) {
    (void)state;
    sample t = make_sample(32, 256);
    const double least[] = {[2] = 0.5, [4] = 0.1};
    for (int bits = 2; bits <= 4; bits *= 2)
        for (int form = AQ_PARAMS_F16; form <= AQ_PARAMS_TWO_LEVEL; form++) {
            aq_quant_spec spec = {.bits = bits, .group_size = 64, .axis = 1, .params = (aq_params_form)form, .method = AQ_METHOD_GPTQ};
            solved without = solve(&t, spec, (aq_solve_options){.damp = 0.01}, 1);
            solved with = solve(&t, spec, (aq_solve_options){.damp = 0.01, .refine_sweeps = 3}, 1);
            assert_true(aq_output_sqnr_db(&with.output) > aq_output_sqnr_db(&without.output) + least[bits]);
            done(&without);
            done(&with);
        }
    free_sample(&t);
}

/* All 4^5 codes and the least-squares parameters of each, against what the solver finds for a layer of five inputs. */
static double exhaustive(const double *w, const double *h) {
    enum { N = 5 };
    double best = INFINITY;
    for (int all = 0; all < 1 << (2 * N); all++) {
        double q[N], a11 = 0, a12 = 0, a22 = 0, b1 = 0, b2 = 0, ww = 0;
        for (int i = 0; i < N; i++) q[i] = all >> (2 * i) & 3;
        for (int i = 0; i < N; i++)
            for (int k = 0; k < N; k++) {
                double g = h[i * N + k];
                a11 += q[i] * g * q[k], a12 += q[i] * g, a22 += g, b1 += q[i] * g * w[k], b2 += g * w[k], ww += w[i] * g * w[k];
            }
        double det = a11 * a22 - a12 * a12;
        if (!(det > 1e-9 * a11 * a22)) continue;
        double s = (b1 * a22 - b2 * a12) / det, o = (a11 * b2 - a12 * b1) / det, error = ww - s * b1 - o * b2;
        if (s > 0 && error < best) best = error;
    }
    return best;
}

static void a_tiny_layer_comes_near_the_best_of_all_codes(void **state) {
    (void)state;
    double ratio = 0;
    for (size_t rows = 1; rows <= 24; rows++) {
        sample t = make_sample(rows, 5);
        aq_quant_spec spec = {.bits = 2, .group_size = 0, .axis = 1, .params = AQ_PARAMS_F32, .method = AQ_METHOD_GPTQ};
        solved s = solve(&t, spec, (aq_solve_options){.damp = 0.01, .refine_sweeps = 20}, 1);
        double w[5], h[25], mine = row_error(&t, s.v, rows - 1);
        for (size_t i = 0; i < 5; i++) w[i] = (double)t.w[(rows - 1) * 5 + i];
        for (size_t i = 0; i < 25; i++) h[i] = (double)t.h[i];
        double best = exhaustive(w, h);
        assert_true(mine >= best * (1 - 1e-4));
        ratio += log(mine / best) / 24;
        done(&s);
        free_sample(&t);
    }
    printf("geometric mean of error / least possible: %.3f\n", exp(ratio));
    assert_true(exp(ratio) < 2.5);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(no_round_raises_the_error_of_any_row),          cmocka_unit_test(in_the_end_no_single_code_can_be_bettered),
        cmocka_unit_test(in_the_end_no_scale_can_be_bettered),           cmocka_unit_test(it_gains_most_where_bits_are_few),
        cmocka_unit_test(a_tiny_layer_comes_near_the_best_of_all_codes),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
