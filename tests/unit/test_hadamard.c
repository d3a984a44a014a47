/* Hadamard rotation: the matrix it is, its own inverse, lengths and products kept, H turned along with the inputs. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include <arrowquant/solve.h>

#include "solver_samples.h"

static void it_is_the_kronecker_power_of_the_regular_matrix(void **state) {
    (void)state;
    static const int h4[4][4] = {{1, 1, 1, -1}, {1, 1, -1, 1}, {1, -1, 1, 1}, {-1, 1, 1, 1}};
    for (uint64_t size = 4; size <= 64; size *= 4)
        for (uint64_t i = 0; i < size; i++) {
            float x[64] = {0};
            x[i] = 1;
            aq_hadamard(x, 1, size, size);
            for (uint64_t j = 0; j < size; j++) {
                float expected = 1;
                for (uint64_t a = i, b = j, s = size; s > 1; s /= 4, a /= 4, b /= 4) expected *= 0.5f * (float)h4[a % 4][b % 4];
                assert_true(x[j] == expected);
            }
        }
}

static void it_undoes_itself_and_keeps_products(void **state) {
    (void)state;
    sample t = make_sample(7, 768);
    assert_int_equal(aq_hadamard_size(t.n), 256);
    float *x = malloc(t.rows * t.n * sizeof *x), *y = malloc(t.rows * t.n * sizeof *y);
    for (uint64_t size = 1; size <= 256; size *= 4) {
        memcpy(x, t.w, t.rows * t.n * sizeof *x);
        aq_hadamard(x, t.rows, t.n, size);
        memcpy(y, x, t.rows * t.n * sizeof *y);
        double before = 0, after = 0;
        for (size_t i = 0; i < t.n; i++) {
            before += (double)t.w[i] * (double)t.w[t.n + i];
            after += (double)x[i] * (double)x[t.n + i];
        }
        assert_true(fabs(before - after) < 1e-5);
        aq_hadamard(y, t.rows, t.n, size);
        for (size_t i = 0; i < t.rows * t.n; i++) assert_true(fabsf(y[i] - t.w[i]) < 1e-6f);
        if (size > 1) assert_memory_not_equal(x, t.w, t.n * sizeof *x);
    }
    free(x);
    free(y);
    free_sample(&t);
}

static void turning_weights_and_H_leaves_the_output_error(void **state) {
    (void)state;
    sample t = make_sample(5, 192);
    float *v = calloc(t.rows * t.n, sizeof *v);
    aq_output_error before = {0}, after = {0};
    assert_int_equal(aq_output_error_add(t.w, v, t.rows, t.n, t.h, 1, &before, NULL), AQ_OK);
    aq_hadamard(t.w, t.rows, t.n, 64);
    aq_hadamard_hessian(t.h, t.n, 64);
    for (size_t i = 0; i < t.n; i++)
        for (size_t j = 0; j < i; j++) assert_true(t.h[i * t.n + j] == t.h[j * t.n + i]);
    assert_int_equal(aq_output_error_add(t.w, v, t.rows, t.n, t.h, 1, &after, NULL), AQ_OK);
    assert_true(fabs(before.ref - after.ref) < 1e-4 * before.ref);
    free(v);
    free_sample(&t);
}

static void sizes_are_powers_of_four_that_divide(void **state) {
    (void)state;
    const uint64_t cases[][2] = {{0, 1}, {1, 1}, {2, 1}, {4, 4}, {6, 1}, {12, 4}, {16, 16}, {192, 64}, {256, 256}, {768, 256}, {4096, 256}, {320, 64}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) assert_int_equal(aq_hadamard_size(cases[i][0]), cases[i][1]);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(it_is_the_kronecker_power_of_the_regular_matrix),
        cmocka_unit_test(it_undoes_itself_and_keeps_products),
        cmocka_unit_test(turning_weights_and_H_leaves_the_output_error),
        cmocka_unit_test(sizes_are_powers_of_four_that_divide),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
