/* Layers whose inputs are coded with 8 bits (aq_linear_integer, aq_linear_coded): the definition of time.h written out and met bit for bit, on every
 * instruction set, at any thread count and number of rows, for every form of parameters and every kind of scales; and how near that is to the product in
 * double. */
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

#include <arrowquant/time.h>

#include "base/half.h"
#include "base/mem.h"
#include "kernels/kernels.h"
#include "quant/linear_internal.h"
#include "quant/quant_internal.h"

static uint64_t random_state = 11;
static uint32_t random_bits(void) {
    random_state = random_state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(random_state >> 32);
}
static float uniform(void) { return (float)(random_bits() >> 8) * 0x1p-24f - 0.5f; }

enum { MOST = 1 << 16, MOST_ROWS = 64, BLOCK = 256 };
static float w[MOST], x[MOST], dequantized[MOST], y[MOST], expected[MOST], bias[512], scales[MOST_ROWS], zeros[MOST_ROWS];
static float line_s[MOST], line_o[MOST], line_second[MOST];
static uint8_t coded[MOST];

static const char *const isas[] = {"scalar", "avx2", "avx512-bw", "avx512", "neon"};
enum { ISAS = sizeof isas / sizeof *isas };

typedef struct layer {
    aq_linear_weight weight;
    void *codes, *params;
} layer;

/* Exact sizes, so that a sanitizer sees any byte read beyond. */
static layer make(int bits, uint64_t group, aq_params_form form, bool symmetric, uint64_t outputs, uint64_t inputs) {
    layer l = {.weight = {.spec = {.bits = bits, .group_size = group, .axis = 1, .params = form, .symmetric = symmetric}}};
    if (form == AQ_PARAMS_R2Q) l.weight.spec.method = AQ_METHOD_R2Q;
    aq_quant_layout *layout = &l.weight.layout;
    assert_int_equal(aq_quant_layout_init(layout, &l.weight.spec, outputs, inputs, NULL), AQ_OK);
    assert_true(outputs * inputs <= MOST && outputs <= 512 && outputs * layout->pairs_per_row + 16 <= MOST);
    for (size_t i = 0; i < outputs * inputs; i++) w[i] = (uniform() + 0.1f) * 0.1f;
    for (size_t i = 0; i < outputs; i++) bias[i] = uniform();
    l.codes = malloc(layout->codes_bytes);
    l.params = malloc(layout->params_bytes);
    assert_int_equal(aq_quantize(w, &l.weight.spec, layout, NULL, 1, l.codes, l.params, NULL, NULL, NULL), AQ_OK);
    aq_dequantize(&l.weight.spec, layout, l.codes, l.params, 0, outputs, dequantized);
    l.weight.codes = l.codes;
    l.weight.params = l.params;
    l.weight.bias = random_bits() % 2 ? bias : NULL;
    if (form != AQ_PARAMS_R2Q) {
        aq_linear_lines(&aq_kernels_scalar, &l.weight, 0, outputs, line_s, line_o);
        return l;
    }
    for (uint64_t i = 0; i < layout->n_pairs; i++) {
        uint16_t halves[3];
        memcpy(halves, (char *)l.params + 6 * i, sizeof halves);
        float m = aq_f16_to_f32(halves[0]), a1 = aq_f16_to_f32(halves[1]), a2 = aq_f16_to_f32(halves[2]);
        line_s[i] = 2 * a1;
        line_second[i] = 2 * a2;
        line_o[i] = m - a1 - a2;
    }
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

/* The coded inputs of one row less 128; NULL: 1 each. */
static int input_of(const uint8_t *row, uint64_t i) { return row ? row[i] - 128 : 1; }

static uint64_t pair_of(const layer *l, uint64_t i) { return l->weight.layout.pairs_per_row == 1 ? 0 : i / l->weight.layout.pair_width; }

/* The sum p of inputs [begin, end): plane 1 is R2Q's upper one. */
static float part_of(const layer *l, const uint8_t *row, uint64_t output, uint64_t begin, uint64_t end, int plane) {
    uint64_t pairs = l->weight.layout.pairs_per_row;
    bool planes = l->weight.spec.params == AQ_PARAMS_R2Q;
    const float *lines = planes && plane == 0 ? line_second : line_s;
    float part = 0;
    for (uint64_t at = begin; at < end;) {
        uint64_t pair = pair_of(l, at);
        int64_t sum = 0;
        for (; at < end && pair_of(l, at) == pair; at++) sum += input_of(row, at) * (planes ? code_of(l, output, at) >> plane & 1 : code_of(l, output, at));
        assert_true(llabs(sum) < 1 << 24); /* so nothing is rounded yet */
        part = fmaf((float)sum, lines[output * pairs + pair], part);
    }
    for (uint64_t at = begin; at < end && plane == 0;) {
        uint64_t pair = pair_of(l, at);
        int64_t sum = 0;
        for (; at < end && pair_of(l, at) == pair; at++) sum += input_of(row, at);
        part = fmaf(line_o[output * pairs + pair], (float)sum, part);
    }
    return part;
}

/* One value of y as time.h defines it. */
static float definition(const layer *l, const uint8_t *row, float s, float z, uint64_t output) {
    uint64_t inputs = l->weight.layout.cols;
    float total = l->weight.bias ? l->weight.bias[output] : 0;
    for (uint64_t begin = 0; begin < inputs; begin += BLOCK) {
        uint64_t end = inputs - begin < BLOCK ? inputs : begin + BLOCK;
        float sums = 0;
        if (l->weight.spec.params == AQ_PARAMS_R2Q) {
            total = fmaf(part_of(l, row, output, begin, end, 1), s, total);
            sums = part_of(l, NULL, output, begin, end, 1);
        }
        sums += part_of(l, NULL, output, begin, end, 0);
        total = fmaf(fmaf(sums, 128 - z, part_of(l, row, output, begin, end, 0)), s, total);
    }
    return total;
}

/* The product in double, for a bound; *size: the sum of magnitudes. */
static double exact(const layer *l, const uint8_t *row, float s, float z, uint64_t output, double *size) {
    uint64_t inputs = l->weight.layout.cols;
    double sum = l->weight.bias ? (double)l->weight.bias[output] : 0, steps = fmax(fabs((double)z), 255);
    *size = fabs(sum);
    for (uint64_t i = 0; i < inputs; i++) {
        double v = (double)dequantized[output * inputs + i] * (double)s;
        sum += v * ((double)row[i] - (double)z);
        *size += (fabs(v) + 0.2 * (double)s) * steps; /* offsets and codes are larger than what they make */
    }
    return sum;
}

enum { STATIC, OF_EACH_ROW, DYNAMIC, EXTREME, KINDS };

/* Codes and pairs of rows; x where they come from values. Returns the stride. */
static size_t code(int kind, uint64_t rows, uint64_t inputs) {
    assert_true(rows <= MOST_ROWS && rows * inputs <= MOST);
    for (size_t i = 0; i < rows * inputs; i++) x[i] = uniform() * (random_bits() % 64 ? 1.0f : 5.0f);
    for (uint64_t r = 0; r < rows; r++) {
        aq_activation_pair(-1 - fabsf(uniform()), 1 + uniform(), &scales[r], &zeros[r]);
        if (kind != EXTREME) continue;
        static const float odd[] = {0, 255, 256, 0.5f, 1.5f, -3.25f, 1000.75f, 254.5f, 0x1p-30f};
        zeros[r] = odd[random_bits() % 9];
        scales[r] = random_bits() % 2 ? 0x1p-90f : 0x1p60f;
    }
    if (kind == DYNAMIC)
        aq_activation_quantize_dynamic(x, rows, inputs, scales, zeros, coded);
    else
        aq_activation_quantize(x, rows, inputs, scales, zeros, kind == STATIC ? 0 : 1, coded);
    if (kind == EXTREME)
        for (size_t i = 0; i < rows * inputs; i++) coded[i] = random_bits() % 3 ? 255 : (uint8_t)random_bits();
    return kind == STATIC ? 0 : 1;
}

static void run(const layer *l, uint64_t rows, size_t stride, int threads) {
    const aq_linear_weight *v = &l->weight;
    memset(y, 0xEE, sizeof y);
    assert_int_equal(aq_linear_integer(&v->spec, &v->layout, v->codes, v->params, coded, rows, scales, zeros, stride, v->bias, threads, y, NULL), AQ_OK);
}

/* The same from values instead of codes. */
static void check_values(const layer *l, int kind, uint64_t rows, size_t stride, int threads) {
    memset(y, 0xEE, sizeof y);
    bool dynamic = kind == DYNAMIC;
    assert_int_equal(aq_linear_coded(&l->weight, x, rows, dynamic ? NULL : scales, dynamic ? NULL : zeros, stride, y, threads, NULL), AQ_OK);
    assert_memory_equal(y, expected, rows * l->weight.layout.rows * sizeof *y);
}

static void check_rows(const layer *l, int kind, uint64_t rows) {
    uint64_t outputs = l->weight.layout.rows, inputs = l->weight.layout.cols;
    size_t stride = code(kind, rows, inputs);
    bool fits = aq_linear_codes_fit(&l->weight);
    for (uint64_t r = 0; r < rows && fits; r++)
        for (uint64_t i = 0; i < outputs; i++) expected[r * outputs + i] = definition(l, coded + r * inputs, scales[r * stride], zeros[r * stride], i);
    for (int isa = 0; isa < ISAS; isa++)
        for (int threads = 1; aq_kernels_find(isas[isa]) && threads <= 3; threads += 2) {
            assert_int_equal(aq_kernels_select(isas[isa], NULL), AQ_OK);
            run(l, rows, stride, threads);
            if (!fits && isa == 0 && threads == 1) memcpy(expected, y, sizeof y);
            assert_memory_equal(y, expected, rows * outputs * sizeof *y);
            if (kind != EXTREME) check_values(l, kind, rows, stride, threads);
        }
    aq_kernels_select(NULL, NULL);
    for (uint64_t r = 0; r < rows; r++)
        for (uint64_t i = 0; i < outputs; i++) {
            double size, value = exact(l, coded + r * inputs, scales[r * stride], zeros[r * stride], i, &size);
            assert_true(fabs((double)expected[r * outputs + i] - value) <= 2e-6 * size);
        }
}

static void check(layer l) {
    static const uint64_t most[] = {1, 4, 13, 40};
    for (size_t i = 0; i < sizeof most / sizeof *most; i++) {
        uint64_t rows = 1 + random_bits() % most[i], fit = MOST / (l.weight.layout.cols > l.weight.layout.rows ? l.weight.layout.cols : l.weight.layout.rows);
        check_rows(&l, (int)(random_bits() % KINDS), rows < fit ? rows : fit);
    }
    drop(&l);
}

static void pairs_of_all_widths_meet_the_definition(void **state) {
    (void)state;
    static const uint64_t groups[] = {0, 16, 32, 48, 64, 96, 128, 256, 384};
    for (int bits = 2; bits <= 8; bits *= 2)
        for (int form = AQ_PARAMS_F16; form <= AQ_PARAMS_F32; form++)
            for (size_t g = 0; g < sizeof groups / sizeof *groups; g++)
                check(make(bits, groups[g], (aq_params_form)form, g & 1, 1 + random_bits() % 70, g % 3 ? 200 + random_bits() % 500 : 512));
}

static void two_levels_meet_the_definition(void **state) {
    (void)state;
    for (int bits = 2; bits <= 4; bits *= 2)
        for (uint64_t group = 32; group <= 256; group += 32) {
            check(make(bits, group, AQ_PARAMS_TWO_LEVEL, false, 35, 512));
            check(make(bits, group, AQ_PARAMS_TWO_LEVEL, true, 9, 300 + random_bits() % 300));
        }
}

static void r2q_levels_meet_the_definition(void **state) {
    (void)state;
    static const uint64_t groups[] = {0, 16, 32, 64, 128, 256};
    for (size_t g = 0; g < sizeof groups / sizeof *groups; g++)
        check(make(2, groups[g], AQ_PARAMS_R2Q, false, 1 + random_bits() % 70, 200 + random_bits() % 400));
}

static void tiny_layers_meet_the_definition(void **state) {
    (void)state;
    for (int bits = 2; bits <= 8; bits *= 2)
        for (uint64_t inputs = 1; inputs < 40; inputs += 1 + inputs / 3) check(make(bits, inputs & 1 ? 16 : 0, AQ_PARAMS_F32, false, 1 + inputs / 2, inputs));
}

/* Where words of codes do not suit, the plain way in double is taken. */
static void odd_groups_and_far_scales_are_near_the_product(void **state) {
    (void)state;
    static const uint64_t groups[] = {3, 7, 20, 100};
    for (size_t g = 0; g < 4; g++) {
        check(make(2, groups[g], AQ_PARAMS_F32, false, 21, 333));
        check(make(4, groups[g] + 1, AQ_PARAMS_F16, false, 21, 333));
        check(make(2, groups[g], AQ_PARAMS_R2Q, false, 21, 333));
    }
    layer l = make(8, 32, AQ_PARAMS_F32, false, 21, 333);
    for (uint64_t i = 0; i < l.weight.layout.n_pairs; i++) ((float *)l.params)[2 * i] *= 0x1p70f;
    aq_dequantize(&l.weight.spec, &l.weight.layout, l.codes, l.params, 0, 21, dequantized);
    assert_false(aq_linear_codes_fit(&l.weight));
    code(STATIC, 5, 333);
    run(&l, 5, 0, 1);
    for (uint64_t i = 0; i < 5 * 21; i++) {
        double size, value = exact(&l, coded + i / 21 * 333, scales[0], zeros[0], i % 21, &size);
        assert_true(fabs((double)y[i] - value) <= 2e-6 * size);
    }
    drop(&l);
}

/* More rows than a chunk holds, and few panels for many threads: the bits of each row alone. */
static void rows_do_not_depend_on_the_others(void **state) {
    (void)state;
    enum { INPUTS = 1000, OUTPUTS = 60, ROWS = 64 };
    layer l = make(4, 64, AQ_PARAMS_F16, false, OUTPUTS, INPUTS);
    size_t stride = code(DYNAMIC, ROWS, INPUTS);
    run(&l, ROWS, stride, 3);
    memcpy(expected, y, sizeof y);
    const aq_linear_weight *v = &l.weight;
    for (uint64_t r = 0; r < ROWS; r += 5) {
        assert_int_equal(aq_linear_integer(&v->spec, &v->layout, v->codes, v->params, coded + r * INPUTS, 1, scales + r, zeros + r, 0, v->bias, 1, y, NULL),
                         AQ_OK);
        assert_memory_equal(y, expected + r * OUTPUTS, OUTPUTS * sizeof *y);
    }
    drop(&l);
}

/* More inputs than fit one chunk: 2 rows of 2^18 inputs, two outputs. */
static void long_rows_come_in_chunks(void **state) {
    (void)state;
    enum { INPUTS = 1 << 18, ROWS = 30 };
    aq_quant_spec spec = {.bits = 2, .group_size = 0, .axis = 1, .params = AQ_PARAMS_F32};
    aq_quant_layout layout;
    float pairs[] = {0.5f, 1, 2, 0}, out[ROWS * 2], s = 1, z = 3;
    assert_int_equal(aq_quant_layout_init(&layout, &spec, 2, INPUTS, NULL), AQ_OK);
    uint8_t *codes = malloc(layout.codes_bytes), *inputs = malloc((size_t)ROWS * INPUTS);
    memset(codes, 0xFF, layout.codes_bytes);
    for (size_t r = 0; r < ROWS; r++) memset(inputs + r * INPUTS, (int)r, INPUTS);
    assert_int_equal(aq_linear_integer(&spec, &layout, codes, pairs, inputs, ROWS, &s, &z, 0, NULL, 2, out, NULL), AQ_OK);
    for (int r = 0; r < ROWS; r++) { /* powers of two times small whole numbers: exact */
        assert_true(out[2 * r] == (float)INPUTS * (float)(r - 3));
        assert_true(out[2 * r + 1] == (float)INPUTS * (float)(r - 3) * 6);
    }
    free(codes);
    free(inputs);
}

static void inputs_are_coded_alike_on_every_instruction_set(void **state) {
    (void)state;
    enum { N = 333 };
    static const float odd[] = {NAN, INFINITY, -INFINITY, FLT_MAX, -FLT_MAX, 1e-45f, -0.0f, 0.5f, 1.5f, 254.5f, 255.5f, -0.5f, 3e9f, -3e9f};
    static const float pairs[][2] = {{1, 0}, {0.013f, 77.3f}, {FLT_MIN, 128}, {1e-45f, 3}, {FLT_MAX, 255}, {2, NAN}, {0.5f, -1000}, {INFINITY, 1}};
    for (size_t i = 0; i < N; i++) x[i] = random_bits() % 5 ? uniform() * (float)(1 << random_bits() % 12) : odd[random_bits() % 14];
    for (size_t p = 0; p < sizeof pairs / sizeof *pairs; p++)
        for (uint64_t n = 0; n <= N; n += n < 140 ? 1 : 64)
            for (int isa = 0; isa < ISAS; isa++) {
                if (!aq_kernels_find(isas[isa])) continue;
                assert_int_equal(aq_kernels_select(isas[isa], NULL), AQ_OK);
                memset(coded, 7, sizeof coded);
                aq_activation_quantize(x + N - n, 1, n, &pairs[p][0], &pairs[p][1], 0, coded);
                for (uint64_t i = 0; i < n; i++) {
                    float q = rintf(x[N - n + i] / pairs[p][0] + pairs[p][1]);
                    assert_int_equal(coded[i], q > 0 ? (int)fminf(q, 255) : 0);
                }
                assert_int_equal(coded[n], 7);
            }
    aq_kernels_select(NULL, NULL);
}

static void missing_memory_is_an_error(void **state) {
    (void)state;
    layer layers[] = {make(4, 32, AQ_PARAMS_F16, false, 20, 64), make(2, 64, AQ_PARAMS_R2Q, false, 20, 64), make(4, 7, AQ_PARAMS_F32, false, 20, 64)};
    for (size_t i = 0; i < 3; i++) {
        aq_status status = AQ_ERR_MEMORY;
        for (int n = 0; status != AQ_OK; n++) {
            aq_error err;
            assert_true(n < 20);
            aq_mem_fail_after(n);
            status = aq_linear_coded(&layers[i].weight, x, 5, NULL, NULL, 0, y, 1, &err);
            aq_mem_fail_after(-1);
            assert_true(status == AQ_ERR_MEMORY || (status == AQ_OK && n > 1));
        }
        drop(&layers[i]);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(pairs_of_all_widths_meet_the_definition),
        cmocka_unit_test(two_levels_meet_the_definition),
        cmocka_unit_test(r2q_levels_meet_the_definition),
        cmocka_unit_test(tiny_layers_meet_the_definition),
        cmocka_unit_test(odd_groups_and_far_scales_are_near_the_product),
        cmocka_unit_test(rows_do_not_depend_on_the_others),
        cmocka_unit_test(long_rows_come_in_chunks),
        cmocka_unit_test(inputs_are_coded_alike_on_every_instruction_set),
        cmocka_unit_test(missing_memory_is_an_error),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
