/* Layers whose inputs become integers of 16 bits: the definition of linear.h written out and met bit for bit; the bound on what rounding the inputs costs, for
 * inputs of all kinds; rows that do not depend on their neighbours; rows and layers that integers do not suit. */
#include <float.h>
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

#include "base/half.h"
#include "kernels/gemm.h"
#include "kernels/kernels.h"
#include "quant/linear_internal.h"
#include "quant/quant_internal.h"

static uint64_t random_state = 9;
static uint32_t random_bits(void) {
    random_state = random_state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(random_state >> 32);
}
static float uniform(void) { return (float)(random_bits() >> 8) * 0x1p-24f - 0.5f; }

enum { MOST = 1 << 17, BLOCK = 256 };
static float w[MOST], x[MOST], dequantized[MOST], y[MOST], expected[MOST], bias[512];

static const char *const isas[] = {"scalar", "avx2", "avx512-bw", "avx512", "neon"};
enum { ISAS = sizeof isas / sizeof *isas };

enum { MOST_PAIRS = 1 << 16 };
static float line_s[MOST_PAIRS], line_o[MOST_PAIRS];

typedef struct layer {
    aq_linear_weight weight;
    void *codes, *params;
} layer;

static layer make(int bits, uint64_t group, int axis, aq_params_form form, bool symmetric, float size, uint64_t outputs, uint64_t inputs) {
    layer l = {.weight = {.spec = {.bits = bits, .group_size = group, .axis = axis, .params = form, .symmetric = symmetric}, .bias = bias}};
    aq_quant_layout *layout = &l.weight.layout;
    assert_int_equal(aq_quant_layout_init(layout, &l.weight.spec, outputs, inputs, NULL), AQ_OK);
    assert_true(outputs * inputs <= MOST && outputs <= 512);
    for (size_t i = 0; i < outputs * inputs; i++) w[i] = (uniform() + 0.1f) * size;
    for (size_t i = 0; i < outputs; i++) bias[i] = uniform() * size;
    l.codes = malloc(layout->codes_bytes);
    l.params = malloc(layout->params_bytes);
    assert_int_equal(aq_quantize(w, &l.weight.spec, layout, NULL, 1, l.codes, l.params, NULL, NULL, NULL), AQ_OK);
    aq_dequantize(&l.weight.spec, layout, l.codes, l.params, 0, outputs, dequantized);
    l.weight.codes = l.codes;
    l.weight.params = l.params;
    assert_true(outputs * layout->pairs_per_row + 16 <= MOST_PAIRS);
    aq_linear_lines(&aq_kernels_scalar, &l.weight, 0, outputs, line_s, line_o);
    return l;
}

static void drop(layer *l) {
    free(l->codes);
    free(l->params);
}

static int code_of(const layer *l, uint64_t row, uint64_t i) {
    uint64_t bits = (uint64_t)l->weight.spec.bits, at = i * bits;
    return l->weight.codes[row * l->weight.layout.row_bytes + at / 8] >> at % 8 & ((1 << bits) - 1);
}

static uint64_t pair_of(const layer *l, uint64_t i) { return l->weight.layout.pairs_per_row == 1 ? 0 : i / l->weight.layout.pair_width; }

/* Scale of a block of n inputs: the least power of two, 2^-126 or more, with which none rounds to more than 32767. */
static float scale_of(const float *block, uint64_t n) {
    float largest = 0, scale = 0x1p-126f;
    for (uint64_t i = 0; i < n; i++) largest = fmaxf(largest, fabsf(block[i]));
    while (rintf(largest / scale) > 32767) scale *= 2;
    return scale;
}

/* Inputs that share a scale: a pair's; with two levels a record's, at 4 bits 64 where a record is a multiple of that, else a pair's. */
static uint64_t run_of(const layer *l, uint64_t i) {
    const aq_quant_spec *spec = &l->weight.spec;
    if (spec->params != AQ_PARAMS_TWO_LEVEL) return pair_of(l, i);
    return i / (spec->bits == 2 ? spec->group_size : spec->group_size % 64 == 0 ? 64 : 32);
}

/* S of input i's record, 0 where there are no two levels. */
static float outer_of(const layer *l, uint64_t row, uint64_t i) {
    const aq_linear_weight *weight = &l->weight;
    uint16_t half;
    if (weight->spec.params != AQ_PARAMS_TWO_LEVEL) return 0;
    memcpy(&half, (const uint8_t *)weight->params + aq_params_offset(&weight->spec, &weight->layout, row, i / weight->spec.group_size), sizeof half);
    return aq_f16_to_f32(half);
}

/* One value of y as linear.h defines it. */
static float definition(const layer *l, const float *row, uint64_t output) {
    uint64_t inputs = l->weight.layout.cols, pairs = l->weight.layout.pairs_per_row;
    float total = l->weight.bias ? l->weight.bias[output] : 0;
    for (uint64_t begin = 0; begin < inputs; begin += BLOCK) {
        uint64_t end = inputs - begin < BLOCK ? inputs : begin + BLOCK;
        float scale = scale_of(row + begin, end - begin), part = 0;
        for (uint64_t at = begin; at < end;) {
            uint64_t run = run_of(l, at);
            float s = line_s[output * pairs + pair_of(l, at)], outer = outer_of(l, output, at);
            int64_t sum = 0;
            for (; at < end && run_of(l, at) == run; at++) {
                s = line_s[output * pairs + pair_of(l, at)];
                int64_t factor = outer > 0 ? (int64_t)(s / outer) : 1;
                assert_true(outer <= 0 || (float)factor * outer == s);
                sum += (int64_t)rintf(row[at] / scale) * factor * code_of(l, output, at);
            }
            assert_true(llabs(sum) <= INT32_MAX);
            part = fmaf((float)sum, outer > 0 ? outer : s, part);
        }
        for (uint64_t at = begin; at < end;) {
            uint64_t pair = pair_of(l, at);
            int64_t sum = 0;
            for (; at < end && pair_of(l, at) == pair; at++) sum += (int64_t)rintf(row[at] / scale);
            part = fmaf(line_o[output * pairs + pair], (float)sum, part);
        }
        total = fmaf(part, scale, total);
    }
    return total;
}

static void run(const layer *l, uint64_t rows, int threads) {
    memset(y, 0xEE, sizeof y);
    assert_int_equal(aq_linear(&l->weight, x, rows, y, threads, NULL), AQ_OK);
}

enum { NORMAL, OUTLIERS, ZEROS, DENORMAL, TINY, HUGE_ONES, ROUNDING_UP, MIXED, KINDS };
static float value_of(int kind) {
    float u = uniform();
    switch (kind) {
    case OUTLIERS: return random_bits() % 50 ? u : u * 1000;
    case ZEROS: return random_bits() % 2 ? 0.0f : -0.0f;
    case DENORMAL: return u * 0x1p-126f;
    case TINY: return u * 0x1p-112f; /* where the scale stops at 2^-126 */
    case HUGE_ONES: return u * FLT_MAX;
    case ROUNDING_UP: return random_bits() % 9 ? u : 1 - 0x1p-24f; /* 32768, were the scale not doubled */
    case MIXED: return ldexpf(u, (int)(random_bits() % 200) - 150);
    default: return u;
    }
}

/* Each row of a kind of its own. */
static void fill(uint64_t rows, uint64_t inputs) {
    for (uint64_t r = 0; r < rows; r++) {
        int kind = (int)(random_bits() % KINDS);
        for (uint64_t i = 0; i < inputs; i++) x[r * inputs + i] = value_of(kind);
    }
}

/* What linear.h promises: every input is off by at most a 32767th of the largest of its block, or 2^-127; the F32 sums are those of a few operations a pair. */
static void check_bound(const layer *l, uint64_t rows) {
    uint64_t outputs = l->weight.layout.rows, inputs = l->weight.layout.cols, pairs = l->weight.layout.pairs_per_row;
    for (uint64_t r = 0; r < rows; r++)
        for (uint64_t i = 0; i < outputs; i++) {
            double sum = (double)bias[i], size = fabs(sum), rounding = 0;
            for (uint64_t begin = 0; begin < inputs; begin += BLOCK) {
                uint64_t end = inputs - begin < BLOCK ? inputs : begin + BLOCK;
                double largest = 0, weights = 0;
                for (uint64_t k = begin; k < end; k++) {
                    double s = (double)line_s[i * pairs + pair_of(l, k)], o = (double)line_o[i * pairs + pair_of(l, k)], q = code_of(l, i, k);
                    double v = (double)x[r * inputs + k];
                    largest = fmax(largest, fabs(v));
                    weights += fabs(s * q + o);
                    sum += v * (s * q + o);
                    size += fabs(v) * (fabs(s) * q + fabs(o));
                }
                rounding += fmax(largest / 32767, 0x1p-127) * weights;
                size += largest / 32767 * weights;
            }
            double bound = rounding * 1.001 + size * 0x1p-24 * (double)(3 * pairs + 4 * (inputs / BLOCK + 1)) + 0x1p-140, got = (double)y[r * outputs + i];
            if (fabs(sum) + bound < (double)FLT_MAX) assert_true(fabs(got - sum) <= bound);
        }
}

static void check(layer l) {
    uint64_t rows = AQ_LINEAR_FEW + 1 + random_bits() % 30, outputs = l.weight.layout.rows, inputs = l.weight.layout.cols;
    fill(rows, inputs);
    for (uint64_t r = 0; r < rows; r++)
        for (uint64_t i = 0; i < outputs; i++) expected[r * outputs + i] = definition(&l, x + r * inputs, i);
    for (int isa = 0; isa < ISAS; isa++)
        for (int threads = 1; aq_kernels_find(isas[isa]) && threads <= 3; threads += 2) {
            assert_int_equal(aq_kernels_select(isas[isa], NULL), AQ_OK);
            run(&l, rows, threads);
            assert_memory_equal(y, expected, rows * outputs * sizeof *y);
        }
    aq_kernels_select(NULL, NULL);
    check_bound(&l, rows);
    drop(&l);
}

static void many_rows_meet_the_definition_and_its_bound(void **state) {
    (void)state;
    static const uint64_t groups[] = {0, 16, 32, 48, 64, 96, 128, 256, 384};
    for (int bits = 2; bits <= 8; bits *= 2)
        for (int form = AQ_PARAMS_F16; form <= AQ_PARAMS_F32; form++)
            for (size_t g = 0; g < sizeof groups / sizeof *groups; g++)
                check(make(bits, groups[g], 1, (aq_params_form)form, g & 1, 0.1f, 1 + random_bits() % 70, g % 3 ? 200 + random_bits() % 500 : 512));
}

static void two_levels_meet_the_definition_and_its_bound(void **state) {
    (void)state;
    for (int bits = 2; bits <= 4; bits *= 2)
        for (uint64_t group = 32; group <= 256; group += 32)
            for (int symmetric = 0; symmetric < 2; symmetric++) {
                check(make(bits, group, 1, AQ_PARAMS_TWO_LEVEL, symmetric, 0.1f, 35, 512));
                check(make(bits, group, 1, AQ_PARAMS_TWO_LEVEL, symmetric, 0.1f, 9, 300 + random_bits() % 300));
            }
}

static void groups_of_rows_and_tiny_layers_meet_the_definition_and_its_bound(void **state) {
    (void)state;
    for (int bits = 2; bits <= 8; bits *= 2) {
        check(make(bits, 5, 0, AQ_PARAMS_F16, false, 0.1f, 33, 257));
        check(make(bits, 0, 0, AQ_PARAMS_F32, false, 0.1f, 33, 129));
        for (uint64_t inputs = 1; inputs < 40; inputs += 1 + inputs / 3)
            check(make(bits, inputs & 1 ? 16 : 0, 1, AQ_PARAMS_F32, false, 0.1f, 1 + inputs / 2, inputs));
    }
}

/* The largest sums there are: all codes 255, all inputs of one size. */
static void the_largest_sums_fit(void **state) {
    (void)state;
    layer l = make(8, 256, 1, AQ_PARAMS_F32, false, 0.1f, 5, 512);
    memset(l.codes, 0xFF, l.weight.layout.codes_bytes);
    for (int sign = -1; sign <= 1; sign += 2) {
        for (size_t i = 0; i < 12 * 512; i++) x[i] = (float)sign * 32767;
        for (int isa = 0; isa < ISAS; isa++) {
            if (!aq_kernels_find(isas[isa])) continue;
            assert_int_equal(aq_kernels_select(isas[isa], NULL), AQ_OK);
            run(&l, 12, 1);
            for (uint64_t i = 0; i < 12 * 5; i++) {
                float right = definition(&l, x, i % 5);
                assert_memory_equal(&y[i], &right, sizeof right);
            }
        }
    }
    aq_kernels_select(NULL, NULL);
    drop(&l);
}

/* Numbers of few bits lose nothing: with weights that are whole multiples of a power of two, the product is exact. */
static void inputs_of_few_bits_are_exact(void **state) {
    (void)state;
    layer l = make(4, 64, 1, AQ_PARAMS_F32, true, 0.1f, 20, 512);
    float *pairs = l.params;
    for (uint64_t i = 0; i < l.weight.layout.n_pairs; i++) pairs[2 * i] = 0.125f;
    l.weight.bias = NULL;
    for (size_t i = 0; i < 16 * 512; i++) x[i] = (float)((int)(random_bits() % 511) - 255) * 0x1p-9f;
    run(&l, 16, 1);
    for (uint64_t r = 0; r < 16; r++)
        for (uint64_t i = 0; i < 20; i++) {
            double sum = 0;
            for (uint64_t k = 0; k < 512; k++) sum += (double)x[r * 512 + k] * (code_of(&l, i, k) - 8) * 0.125;
            assert_true((double)y[r * 20 + i] == sum);
        }
    drop(&l);
}

static void a_row_does_not_depend_on_the_others(void **state) {
    (void)state;
    enum { ROWS = 61, INPUTS = 512, OUTPUTS = 70, LESS = AQ_LINEAR_FEW + 1 };
    layer l = make(4, 64, 1, AQ_PARAMS_F16, false, 0.1f, OUTPUTS, INPUTS);
    fill(ROWS, INPUTS);
    run(&l, ROWS, 2);
    memcpy(expected, y, sizeof expected);
    for (uint64_t r = 0; r + LESS <= ROWS; r += 7) {
        assert_int_equal(aq_linear(&l.weight, x + r * INPUTS, LESS, y, 1, NULL), AQ_OK);
        assert_memory_equal(y, expected + r * OUTPUTS, LESS * OUTPUTS * sizeof *y);
    }
    drop(&l);
}

/* The product of F32 on the dequantized matrix, of rows [row, row + n) */
static void product(const layer *l, uint64_t row, uint64_t n, float *out) {
    uint64_t outputs = l->weight.layout.rows, inputs = l->weight.layout.cols;
    for (uint64_t i = 0; i < n * outputs; i++) out[i] = bias[i % outputs];
    aq_matrix_f32 left = {x + row * inputs, inputs, 1}, right = {dequantized, 1, inputs};
    assert_true(aq_gemm_f32(n, outputs, inputs, left, right, out, outputs, false, AQ_GEMM_FULL, 1));
}

static void rows_that_are_not_finite_are_multiplied_in_f32(void **state) {
    (void)state;
    enum { ROWS = 40, INPUTS = 600, OUTPUTS = 37 };
    static const uint64_t bad[] = {0, 7, 8, 9, 23, 39};
    static const float values[] = {NAN, INFINITY, -INFINITY};
    layer l = make(8, 128, 1, AQ_PARAMS_F16, false, 0.1f, OUTPUTS, INPUTS);
    static float one[OUTPUTS];
    for (size_t i = 0; i < ROWS * INPUTS; i++) x[i] = uniform();
    run(&l, ROWS, 1);
    memcpy(expected, y, sizeof expected);
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) x[bad[i] * INPUTS + random_bits() % INPUTS] = values[i % 3];
    for (int threads = 1; threads <= 3; threads += 2) {
        run(&l, ROWS, threads);
        for (uint64_t r = 0; r < ROWS; r++) {
            bool is_bad = false;
            for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) is_bad |= bad[i] == r;
            if (!is_bad) {
                assert_memory_equal(y + r * OUTPUTS, expected + r * OUTPUTS, sizeof one);
                continue;
            }
            product(&l, r, 1, one);
            for (uint64_t i = 0; i < OUTPUTS; i++) {
                float got = y[r * OUTPUTS + i];
                assert_true(!isfinite(got));
                assert_true(isnan(got) ? isnan(one[i]) : got == one[i]);
            }
        }
    }
    drop(&l);
}

/* Weights near the ends of F32's range: integers times such scales would leave it. */
static void scales_near_the_ends_of_the_range_are_multiplied_in_f32(void **state) {
    (void)state;
    static const float sizes[] = {0x1p100f, 0x1p-100f};
    for (int i = 0; i < 2; i++) {
        layer l = make(4, 32, 1, AQ_PARAMS_F32, false, sizes[i], 21, 320);
        for (size_t k = 0; k < 30 * 320; k++) x[k] = uniform();
        run(&l, 30, 1);
        product(&l, 0, 30, expected);
        assert_memory_equal(y, expected, 30 * 21 * sizeof *y);
        drop(&l);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(many_rows_meet_the_definition_and_its_bound),
        cmocka_unit_test(two_levels_meet_the_definition_and_its_bound),
        cmocka_unit_test(groups_of_rows_and_tiny_layers_meet_the_definition_and_its_bound),
        cmocka_unit_test(the_largest_sums_fit),
        cmocka_unit_test(inputs_of_few_bits_are_exact),
        cmocka_unit_test(a_row_does_not_depend_on_the_others),
        cmocka_unit_test(rows_that_are_not_finite_are_multiplied_in_f32),
        cmocka_unit_test(scales_near_the_ends_of_the_range_are_multiplied_in_f32),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
