/* Layers that run on their codes: y = x W'^T + bias against the dequantized matrix, for every form of parameters, width, group size and number of rows;
 * the same bits on every instruction set and at any thread count. What the integers of many rows give, bit for bit: test_linear_words.c. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include <arrowquant/linear.h>

#include "base/mem.h"
#include "kernels/gemm.h"
#include "kernels/kernels.h"

static uint64_t random_state = 5;
static uint32_t random_bits(void) {
    random_state = random_state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(random_state >> 32);
}
static float uniform(void) { return (float)(random_bits() >> 8) * 0x1p-24f - 0.5f; }

enum { MOST = 1 << 18 };
static float w[MOST], x[MOST], dequantized[MOST], bias[4096], y[MOST], expected[MOST];

typedef struct layer {
    aq_linear_weight weight;
    void *codes, *params;
} layer;

/* Exact sizes, so that a sanitizer sees any byte read beyond. */
static layer make(int bits, uint64_t group, int axis, aq_params_form form, uint64_t outputs, uint64_t inputs, bool with_bias) {
    layer l = {.weight = {.spec = {.bits = bits, .group_size = group, .axis = axis, .params = form}}};
    if (form == AQ_PARAMS_R2Q) l.weight.spec.method = AQ_METHOD_R2Q;
    aq_quant_layout *layout = &l.weight.layout;
    assert_int_equal(aq_quant_layout_init(layout, &l.weight.spec, outputs, inputs, NULL), AQ_OK);
    assert_true(outputs * inputs <= MOST && outputs <= 4096);
    for (size_t i = 0; i < outputs * inputs; i++) w[i] = uniform() * 0.1f + 0.01f;
    l.codes = malloc(layout->codes_bytes);
    l.params = malloc(layout->params_bytes);
    assert_int_equal(aq_quantize(w, &l.weight.spec, layout, NULL, 1, l.codes, l.params, NULL, NULL, NULL), AQ_OK);
    aq_dequantize(&l.weight.spec, layout, l.codes, l.params, 0, outputs, dequantized);
    l.weight.codes = l.codes;
    l.weight.params = l.params;
    l.weight.bias = with_bias ? bias : NULL;
    return l;
}

static void drop(layer *l) {
    free(l->codes);
    free(l->params);
}

/* As linear.h counts them. */
static bool in_integers(const layer *l, uint64_t rows) {
    return rows > AQ_LINEAR_FEW && l->weight.spec.params != AQ_PARAMS_R2Q &&
           (l->weight.layout.pairs_per_row == 1 || l->weight.layout.pair_width * (uint64_t)l->weight.spec.bits % 32 == 0);
}

/* Rounding of F32 sums, and of inputs to 16 bits: a 32767th of the largest of a block of 256. */
static void check_values(const layer *l, uint64_t rows) {
    uint64_t outputs = l->weight.layout.rows, inputs = l->weight.layout.cols;
    for (uint64_t r = 0; r < rows; r++)
        for (uint64_t i = 0; i < outputs; i++) {
            double sum = 0, size = 0, rounding = 0;
            for (uint64_t k = 0; k < inputs; k++) {
                double term = (double)x[r * inputs + k] * (double)dequantized[i * inputs + k];
                sum += term;
                size += fabs(term);
                rounding += fabs((double)dequantized[i * inputs + k]) * 0.5 / 32767; /* inputs below 0.5 */
            }
            double b = l->weight.bias ? (double)bias[i] : 0;
            assert_true(fabs((double)y[r * outputs + i] - sum - b) <= 4e-6 * (size + fabs(b)) + 1e-9 + (in_integers(l, rows) ? rounding : 0));
        }
}

static void check(layer l, uint64_t rows) {
    static const char *const isas[] = {"scalar", "avx2", "avx512-bw", "avx512", "neon"};
    uint64_t outputs = l.weight.layout.rows, inputs = l.weight.layout.cols;
    assert_true(rows * inputs <= MOST && rows * outputs <= MOST);
    for (size_t i = 0; i < rows * inputs; i++) x[i] = uniform();
    bool first = true;
    for (size_t isa = 0; isa < 5; isa++)
        for (int threads = 1; threads <= 3; threads += 2) {
            if (!aq_kernels_find(isas[isa]) || (isa == 0 && threads > 1)) continue;
            assert_int_equal(aq_kernels_select(isas[isa], NULL), AQ_OK);
            memset(y, 0xEE, rows * outputs * sizeof *y);
            assert_int_equal(aq_linear(&l.weight, x, rows, y, threads, NULL), AQ_OK);
            if (first) {
                check_values(&l, rows);
                memcpy(expected, y, rows * outputs * sizeof *y);
            } else {
                assert_memory_equal(y, expected, rows * outputs * sizeof *y);
            }
            first = false;
        }
    aq_kernels_select(NULL, NULL);
}

/* What the header promises of many rows whose pairs do not begin on words: the bits of aq_gemm_f32 on the dequantized matrix. */
static void check_product(layer l, uint64_t rows) {
    uint64_t outputs = l.weight.layout.rows, inputs = l.weight.layout.cols;
    for (uint64_t i = 0; i < rows * outputs; i++) expected[i] = l.weight.bias ? bias[i % outputs] : 0;
    aq_matrix_f32 left = {x, inputs, 1}, right = {dequantized, 1, inputs};
    assert_true(aq_gemm_f32(rows, outputs, inputs, left, right, expected, outputs, false, AQ_GEMM_FULL, 1));
    assert_int_equal(aq_linear(&l.weight, x, rows, y, 1, NULL), AQ_OK);
    assert_memory_equal(y, expected, rows * outputs * sizeof *y);
}

static void few_and_many_rows(int bits, uint64_t group, int axis, aq_params_form form, uint64_t outputs, uint64_t inputs, bool with_bias) {
    layer l = make(bits, group, axis, form, outputs, inputs, with_bias);
    check(l, 1 + random_bits() % 4);
    check(l, 5 + random_bits() % 4);
    check(l, 9 + random_bits() % 30);
    if (!in_integers(&l, 9)) check_product(l, 9 + random_bits() % 30);
    drop(&l);
}

static void every_form_and_group_size_agrees(void **state) {
    (void)state;
    static const uint64_t groups[] = {0, 1, 3, 8, 16, 24, 32, 64, 96, 100, 128, 256, 384};
    for (size_t i = 0; i < 4096; i++) bias[i] = uniform();
    for (int bits = 2; bits <= 8; bits *= 2)
        for (int form = AQ_PARAMS_F16; form <= AQ_PARAMS_F32; form++)
            for (size_t g = 0; g < sizeof groups / sizeof *groups; g++) {
                uint64_t inputs = g % 3 == 0 ? 512 : 300 + random_bits() % 300;
                if (groups[g] == 1 && form == AQ_PARAMS_F16) continue; /* single values near 0 do not fit halves */
                few_and_many_rows(bits, groups[g], 1, (aq_params_form)form, 1 + random_bits() % 70, inputs, g & 1);
            }
}

static void two_level_parameters_agree(void **state) {
    (void)state;
    for (int bits = 2; bits <= 4; bits *= 2)
        for (uint64_t group = 32; group <= 256; group += 32) {
            few_and_many_rows(bits, group, 1, AQ_PARAMS_TWO_LEVEL, 40, 512, true);
            few_and_many_rows(bits, group, 1, AQ_PARAMS_TWO_LEVEL, 37, 700, false);
        }
}

static void r2q_levels_agree(void **state) {
    (void)state;
    few_and_many_rows(2, 64, 1, AQ_PARAMS_R2Q, 40, 512, true);
    few_and_many_rows(2, 100, 1, AQ_PARAMS_R2Q, 17, 333, false);
}

static void groups_of_rows_agree(void **state) {
    (void)state;
    for (int bits = 2; bits <= 8; bits *= 2) {
        few_and_many_rows(bits, 5, 0, AQ_PARAMS_F16, 33, 257, true);
        few_and_many_rows(bits, 0, 0, AQ_PARAMS_F32, 33, 129, false);
    }
}

static void tiny_layers_agree(void **state) {
    (void)state;
    for (uint64_t outputs = 1; outputs < 20; outputs += 3)
        for (uint64_t inputs = 1; inputs < 40; inputs += 1 + inputs / 3)
            for (int bits = 2; bits <= 8; bits *= 2) few_and_many_rows(bits, inputs & 1 ? 16 : 0, 1, AQ_PARAMS_F32, outputs, inputs, true);
}

/* Large enough that threads take part in both ways. */
static void large_layers_agree(void **state) {
    (void)state;
    layer l = make(2, 64, 1, AQ_PARAMS_F16, 256, 1024, true);
    check(l, 33);
    check(l, 1);
    drop(&l);
}

static void nothing_gives_nothing(void **state) {
    (void)state;
    layer l = make(4, 32, 1, AQ_PARAMS_F16, 3, 0, true);
    y[3] = 7;
    assert_int_equal(aq_linear(&l.weight, x, 1, y, 1, NULL), AQ_OK);
    assert_memory_equal(y, bias, 3 * sizeof *y);
    assert_int_equal(aq_linear(&l.weight, x, 0, y + 3, 1, NULL), AQ_OK);
    assert_true(y[3] == 7);
    drop(&l);
}

static void missing_memory_is_an_error(void **state) {
    (void)state;
    layer l = make(4, 32, 1, AQ_PARAMS_F16, 20, 64, true);
    for (uint64_t rows = 1; rows <= 20; rows += 19)
        for (int n = 0; n < 10; n++) {
            aq_error err;
            aq_mem_fail_after(n);
            aq_status status = aq_linear(&l.weight, x, rows, y, 1, &err);
            aq_mem_fail_after(-1);
            if (status == AQ_OK) {
                assert_true(n > 0);
                break;
            }
            assert_int_equal(status, AQ_ERR_MEMORY);
        }
    drop(&l);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_form_and_group_size_agrees),
        cmocka_unit_test(two_level_parameters_agree),
        cmocka_unit_test(r2q_levels_agree),
        cmocka_unit_test(groups_of_rows_agree),
        cmocka_unit_test(tiny_layers_agree),
        cmocka_unit_test(large_layers_agree),
        cmocka_unit_test(nothing_gives_nothing),
        cmocka_unit_test(missing_memory_is_an_error),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
