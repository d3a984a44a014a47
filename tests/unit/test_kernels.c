/* Parity: every kernel of every instruction set that this CPU has gives the bits of the scalar one, on random and adversarial input with tails of
 * every length, and writes nothing past its output. */
#include <float.h>
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "base/half.h"
#include "kernels/kernels.h"

enum { MAX = 300 };

static uint64_t random_state = 42;
static uint32_t random_bits(void) {
    random_state = random_state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(random_state >> 32);
}
static float uniform(void) { return (float)(random_bits() >> 8) * 0x1p-24f; }

/* The kinds of input: what weights look like, then what breaks code that assumes it. */
enum { NORMAL, MIXED, DENORMAL, EXTREME, CONSTANT, ZEROS, KINDS };
static float value_of(int kind) {
    switch (kind) {
    case NORMAL: return (uniform() + uniform() + uniform() - 1.5f) * 0.1f;
    case MIXED: return ldexpf(uniform() - 0.5f, (int)(random_bits() % 60) - 30);
    case DENORMAL: return aq_f32_from_bits(random_bits() & 0x800FFFFF);
    case EXTREME: {
        float x = aq_f32_from_bits(random_bits());
        return isfinite(x) ? x : FLT_MAX;
    }
    case CONSTANT: return -0.375f;
    default: return random_bits() & 1 ? 0.0f : -0.0f;
    }
}
static void fill(float *x, size_t n, int kind) {
    for (size_t i = 0; i < n; i++) x[i] = value_of(kind);
}

static const char *const isas[] = {"avx2", "avx512", "neon"};
#define FOR_EACH_TABLE(k)                                                                                                                                      \
    for (size_t isa_ = 0; isa_ < 3; isa_++)                                                                                                                    \
        for (const aq_kernels *k = aq_kernels_find(isas[isa_]); k; k = NULL)

static void conversions_agree(void **state) {
    (void)state;
    static uint16_t halves[65536 + 8], a[65536 + 8], b[65536 + 8];
    static float x[65536 + 8], y[65536 + 8];
    for (size_t i = 0; i < 65536; i++) halves[i] = (uint16_t)i;
    FOR_EACH_TABLE(k) {
        /* All 65536 values, signaling NaN among them. */
        aq_kernels_scalar.f16_to_f32(halves, x, 65536);
        k->f16_to_f32(halves, y, 65536);
        assert_memory_equal(x, y, 65536 * 4);
        aq_kernels_scalar.bf16_to_f32(halves, x, 65536);
        k->bf16_to_f32(halves, y, 65536);
        assert_memory_equal(x, y, 65536 * 4);
        /* Back, from every upper half with rounding bits below, at and above the middle. */
        static const uint32_t low[] = {0, 1, 0x0FFF, 0x1000, 0x1001, 0x7FFF, 0x8000, 0x8001, 0xEFFF, 0xF000, 0xF001, 0xFFFF};
        for (size_t t = 0; t < sizeof low / sizeof *low; t++) {
            for (uint32_t i = 0; i < 65536; i++) x[i] = aq_f32_from_bits(i << 16 | low[t]);
            aq_kernels_scalar.f32_to_f16(x, a, 65536);
            k->f32_to_f16(x, b, 65536);
            assert_memory_equal(a, b, 65536 * 2);
            aq_kernels_scalar.f32_to_bf16(x, a, 65536);
            k->f32_to_bf16(x, b, 65536);
            assert_memory_equal(a, b, 65536 * 2);
        }
        for (size_t n = 0; n < 70; n++) {
            memset(a, 0xEE, sizeof a), memset(b, 0xEE, sizeof b), memset(x, 0xEE, sizeof x), memset(y, 0xEE, sizeof y);
            aq_kernels_scalar.f16_to_f32(halves + 15000, x, n);
            k->f16_to_f32(halves + 15000, y, n);
            assert_memory_equal(x, y, 80 * 4);
            aq_kernels_scalar.f32_to_f16(x, a, n);
            k->f32_to_f16(x, b, n);
            assert_memory_equal(a, b, 80 * 2);
        }
    }
}

static void finite_check_finds_the_first_index(void **state) {
    (void)state;
    float x[MAX];
    fill(x, MAX, EXTREME);
    for (size_t isa = 0; isa < 4; isa++) {
        const aq_kernels *k = isa < 3 ? aq_kernels_find(isas[isa]) : &aq_kernels_scalar;
        if (!k) continue;
        for (size_t n = 0; n < MAX; n++) assert_int_equal(k->find_nonfinite(x, n), n);
        for (size_t at = 0; at < MAX; at++) {
            float kept = x[at];
            x[at] = at % 3 == 0 ? NAN : at % 3 == 1 ? INFINITY : -INFINITY;
            if (at + 7 < MAX) x[at + 7] = NAN;
            assert_int_equal(k->find_nonfinite(x, MAX), at);
            assert_int_equal(k->find_nonfinite(x, at), at);
            x[at] = kept;
            if (at + 7 < MAX) x[at + 7] = value_of(EXTREME);
        }
    }
}

static void range_agrees(void **state) {
    (void)state;
    float x[MAX];
    FOR_EACH_TABLE(k)
    for (int kind = 0; kind < KINDS; kind++)
        for (size_t n = 1; n < MAX; n++) {
            float a[2], b[2];
            fill(x, n, kind);
            assert_true(aq_kernels_scalar.range(x, n, &a[0], &a[1]));
            assert_true(k->range(x, n, &b[0], &b[1]));
            assert_memory_equal(a, b, sizeof a);
            x[random_bits() % n] = random_bits() & 1 ? NAN : INFINITY;
            assert_false(aq_kernels_scalar.range(x, n, &a[0], &a[1]));
            assert_false(k->range(x, n, &b[0], &b[1]));
        }
}

static void ranges_agree(void **state) {
    (void)state;
    enum { WIDTH = 150 };
    static float x[AQ_LANES * WIDTH];
    FOR_EACH_TABLE(k)
    for (int kind = 0; kind < KINDS; kind++)
        for (size_t n = 1; n <= WIDTH; n++) {
            size_t n_groups = 1 + random_bits() % AQ_LANES;
            float lo[2][AQ_LANES + 1], hi[2][AQ_LANES + 1];
            memset(lo, 0xEE, sizeof lo), memset(hi, 0xEE, sizeof hi); /* nothing behind the last group is touched */
            fill(x, n * n_groups, kind);
            assert_true(aq_kernels_scalar.ranges(x, n, n_groups, lo[0], hi[0]));
            assert_true(k->ranges(x, n, n_groups, lo[1], hi[1]));
            assert_memory_equal(lo[0], lo[1], sizeof lo[0]);
            assert_memory_equal(hi[0], hi[1], sizeof hi[0]);
            for (size_t j = 0; j < n_groups; j++) {
                float a, b;
                assert_true(aq_kernels_scalar.range(x + j * n, n, &a, &b));
                assert_true(a == lo[0][j] && b == hi[0][j]);
            }
            x[random_bits() % (n * n_groups)] = random_bits() & 1 ? NAN : INFINITY;
            assert_false(aq_kernels_scalar.ranges(x, n, n_groups, lo[0], hi[0]));
            assert_false(k->ranges(x, n, n_groups, lo[1], hi[1]));
        }
}

static void groups_are_quantized_as_alone(void **state) {
    (void)state;
    enum { WIDTH = 300, GROUPS = 2 * AQ_LANES };
    static float x[GROUPS * 1100];
    static uint8_t codes[2][AQ_LANES * 1100 + 1];
    FOR_EACH_TABLE(k)
    for (int kind = 0; kind < KINDS; kind++)
        for (size_t turn = 0; turn < WIDTH; turn++) {
            int bits = 1 << (1 + random_bits() % 3);
            size_t align = 8 / (size_t)bits, size = turn < 250 ? (1 + turn / align) * align : 500 + random_bits() % 600 / 4 * 4; /* whole bytes */
            size_t n = random_bits() % (AQ_LANES + 1), n_next = random_bits() % (AQ_LANES + 1), at = n * size * (size_t)bits / 8;
            float lo[2][AQ_LANES + 1], hi[2][AQ_LANES + 1], s[AQ_LANES], z[AQ_LANES];
            memset(lo, 0xEE, sizeof lo), memset(hi, 0xEE, sizeof hi), memset(codes, 0xEE, sizeof codes);
            fill(x, size * (n + n_next), kind);
            for (size_t j = 0; j < n; j++) {
                float low, high;
                aq_kernels_scalar.range(x + j * size, size, &low, &high);
                float reach = -low > high ? -low : high;
                s[j] = reach > 0 ? reach / (float)(1 + random_bits() % 300) : 1.0f;
                if (s[j] == 0) s[j] = reach;
                z[j] = (float)(random_bits() % 9);
            }
            assert_true(aq_kernels_scalar.quantize_groups(x, size, n, s, z, bits, codes[0], x + n * size, n_next, lo[0], hi[0]));
            assert_true(k->quantize_groups(x, size, n, s, z, bits, codes[1], x + n * size, n_next, lo[1], hi[1]));
            assert_memory_equal(codes[0], codes[1], at);
            assert_int_equal(codes[1][at], 0xEE);
            assert_memory_equal(lo[0], lo[1], sizeof lo[0]);
            assert_memory_equal(hi[0], hi[1], sizeof hi[0]);
            for (size_t j = 0; j < n_next; j++) {
                float a, b;
                assert_true(aq_kernels_scalar.range(x + (n + j) * size, size, &a, &b));
                assert_true(a == lo[0][j] && b == hi[0][j]);
            }
            if (n_next == 0) continue;
            x[n * size + random_bits() % (n_next * size)] = random_bits() & 1 ? NAN : INFINITY;
            assert_false(aq_kernels_scalar.quantize_groups(x, size, n, s, z, bits, codes[0], x + n * size, n_next, lo[0], hi[0]));
            assert_false(k->quantize_groups(x, size, n, s, z, bits, codes[1], x + n * size, n_next, lo[1], hi[1]));
        }
}

static void column_stats_agree(void **state) {
    (void)state;
    enum { ROWS = 5, STRIDE = MAX + 3 };
    static float x[ROWS * STRIDE];
    FOR_EACH_TABLE(k)
    for (int kind = 0; kind < KINDS; kind++)
        for (size_t n = 0; n < MAX; n += 1 + n / 40) {
            double sum[2][MAX + 1], sum_sq[2][MAX + 1];
            float lo[2][MAX + 1], hi[2][MAX + 1];
            fill(x, sizeof x / sizeof *x, kind);
            for (size_t i = 0; i <= MAX; i++) { /* what is there already counts, and nothing behind the end is touched */
                sum[0][i] = sum[1][i] = (double)value_of(NORMAL);
                sum_sq[0][i] = sum_sq[1][i] = 1;
                lo[0][i] = lo[1][i] = hi[0][i] = hi[1][i] = value_of(NORMAL);
            }
            size_t rows = random_bits() % (ROWS + 1);
            aq_kernels_scalar.column_stats(x, rows, STRIDE, n, sum[0], sum_sq[0], lo[0], hi[0]);
            k->column_stats(x, rows, STRIDE, n, sum[1], sum_sq[1], lo[1], hi[1]);
            assert_memory_equal(sum[0], sum[1], sizeof sum[0]);
            assert_memory_equal(sum_sq[0], sum_sq[1], sizeof sum_sq[0]);
            assert_memory_equal(lo[0], lo[1], sizeof lo[0]);
            assert_memory_equal(hi[0], hi[1], sizeof hi[0]);
        }
}

static void codes_agree(void **state) {
    (void)state;
    FOR_EACH_TABLE(k)
    for (int kind = 0; kind < KINDS; kind++)
        for (size_t n = 0; n < MAX; n++) {
            float x[MAX], v[MAX], w[MAX];
            uint8_t a[MAX], b[MAX], pa[MAX], pb[MAX];
            int bits = 2 << random_bits() % 3, q_max = (1 << bits) - 1;
            float s = fabsf(value_of(kind)) / 7 + FLT_TRUE_MIN, z = random_bits() & 1 ? (float)(random_bits() % 256) : uniform() * 300 - 20;
            if (kind == NORMAL) s = 0.3f / (float)q_max, z = (float)(1 << (bits - 1));
            fill(x, n, kind);
            if (kind == NORMAL) /* halfway between codes */
                for (size_t i = 0; i < n; i += 3) x[i] = ((float)(i % 16) - 7.5f) * s;
            memset(a, 0xEE, MAX), memset(b, 0xEE, MAX), memset(pa, 0xEE, MAX), memset(pb, 0xEE, MAX);
            aq_kernels_scalar.quantize(x, n, s, z, q_max, a);
            k->quantize(x, n, s, z, q_max, b);
            assert_memory_equal(a, b, MAX);
            for (size_t i = 0; i < n; i++) assert_in_range(a[i], 0, (unsigned)q_max);

            memset(v, 0xEE, sizeof v), memset(w, 0xEE, sizeof w);
            aq_kernels_scalar.dequantize(a, n, s, z, v);
            k->dequantize(a, n, s, z, w);
            assert_memory_equal(v, w, sizeof v);

            if (bits == 8) continue;
            (bits == 2 ? aq_kernels_scalar.pack2 : aq_kernels_scalar.pack4)(a, n, pa);
            (bits == 2 ? k->pack2 : k->pack4)(a, n, pb);
            assert_memory_equal(pa, pb, MAX);
            memset(pb, 0xEE, MAX);
            (bits == 2 ? k->quantize2 : k->quantize4)(x, n, s, z, pb);
            assert_memory_equal(pa, pb, MAX);
            memset(pb, 0xEE, MAX);
            (bits == 2 ? aq_kernels_scalar.quantize2 : aq_kernels_scalar.quantize4)(x, n, s, z, pb);
            assert_memory_equal(pa, pb, MAX);
            memset(b, 0xEE, MAX);
            (bits == 2 ? aq_kernels_scalar.unpack2 : aq_kernels_scalar.unpack4)(pa, n, b);
            assert_memory_equal(a, b, MAX);
            memset(b, 0xEE, MAX);
            (bits == 2 ? k->unpack2 : k->unpack4)(pa, n, b);
            assert_memory_equal(a, b, MAX);
        }
}

static void min_max_pairs_agree(void **state) {
    (void)state;
    FOR_EACH_TABLE(k)
    for (int kind = 0; kind < KINDS; kind++)
        for (int trial = 0; trial < 400; trial++) {
            float lo[AQ_LANES], hi[AQ_LANES], a[2][AQ_LANES], b[2][AQ_LANES];
            uint16_t ha[2 * AQ_LANES], hb[2 * AQ_LANES];
            int q_max = (1 << (2 << trial % 3)) - 1;
            for (size_t i = 0; i < AQ_LANES; i++) {
                float u = value_of(kind), v = i % 5 ? value_of(kind) : u;
                lo[i] = (u < v ? u : v) + 0.0f;
                hi[i] = (u < v ? v : u) + 0.0f;
            }
            aq_kernels_scalar.rtn_f32(lo, hi, q_max, a[0], a[1]);
            k->rtn_f32(lo, hi, q_max, b[0], b[1]);
            assert_memory_equal(a, b, sizeof a);
            for (size_t i = 0; i < AQ_LANES; i++) assert_true(a[0][i] > 0 ? lo[i] < hi[i] && a[1][i] >= 0 && a[1][i] <= (float)q_max : a[1][i] == 0);
            aq_kernels_scalar.rtn_f16(lo, hi, q_max, ha, a[0], a[1]);
            k->rtn_f16(lo, hi, q_max, hb, b[0], b[1]);
            assert_memory_equal(a, b, sizeof a);
            assert_memory_equal(ha, hb, sizeof ha);
        }
}

static void error_sums_agree(void **state) {
    (void)state;
    FOR_EACH_TABLE(k)
    for (int kind = 0; kind < KINDS; kind++)
        for (size_t n = 0; n < MAX; n++) {
            float w[MAX], v[MAX];
            aq_error_sums a, b;
            fill(w, n, kind), fill(v, n, kind);
            aq_kernels_scalar.error_sums(w, v, n, &a);
            k->error_sums(w, v, n, &b);
            assert_memory_equal(&a, &b, sizeof a);
        }
}

/* Sums that overflow to infinity, then to NaN, agree as values: the sign of a NaN is not defined. */
static void assert_same_floats(const float *a, const float *b, size_t n) {
    for (size_t i = 0; i < n; i++)
        if (!(isnan(a[i]) && isnan(b[i]))) assert_memory_equal(a + i, b + i, 4);
}

static void search_kernels_agree(void **state) {
    (void)state;
    FOR_EACH_TABLE(k)
    for (int kind = 0; kind < KINDS; kind++)
        for (int trial = 0; trial < 60; trial++) {
            float x[MAX / 6 * AQ_LANES], h[MAX / 6 * AQ_LANES], weight[AQ_LANES], z[AQ_LANES];
            aq_block block = {x, trial & 1 ? h : NULL, random_bits() % (MAX / 6)};
            int q_max = (1 << (2 << trial % 3)) - 1;
            aq_lines a = {0};
            aq_fit_sums fa, fb;
            aq_grid from, ga, gb;
            fill(x, block.steps * AQ_LANES, kind);
            for (size_t i = 0; i < block.steps * AQ_LANES; i++) h[i] = random_bits() % 8 ? uniform() : 0.0f;
            for (size_t j = 0; j < AQ_LANES; j++) {
                a.s[j] = fabsf(value_of(kind)) + (j % 5 ? FLT_MIN : 0.0f);
                a.o[j] = value_of(kind);
                weight[j] = (float)block.steps;
                z[j] = uniform() * (float)q_max;
                from.outer_s[j] = a.s[j] / 8;
                from.outer_o[j] = a.o[j] / 8;
                from.k[j] = (float)(1 + random_bits() % 16);
                from.m[j] = (float)(random_bits() % 16);
                from.error[j] = INFINITY;
            }
            aq_lines b = a;
            aq_kernels_scalar.fit_sums(&block, q_max, &a, &fa);
            k->fit_sums(&block, q_max, &b, &fb);
            assert_same_floats(fa.q, fb.q, sizeof fa / 4);
            float middle = trial % 4 == 3 ? (float)((q_max + 1) / 2) : -1.0f;
            aq_lines best_a = a, best_b = a;
            for (size_t j = 0; j < AQ_LANES; j++) best_a.error[j] = best_b.error[j] = uniform() * value_of(kind) * value_of(kind);
            aq_kernels_scalar.fit_lines(&fa, weight, middle, &a, &best_a);
            k->fit_lines(&fa, weight, middle, &b, &best_b);
            assert_same_floats(a.s, b.s, sizeof a / 4);
            assert_same_floats(best_a.s, best_b.s, sizeof a / 4);

            aq_lines out_a, out_b;
            aq_kernels_scalar.fit(&block, q_max, weight, middle, &best_a, 0.8f, 0.3f, &out_a, &best_a);
            k->fit(&block, q_max, weight, middle, &best_b, 0.8f, 0.3f, &out_b, &best_b);
            assert_same_floats(out_a.s, out_b.s, sizeof out_a / 4);
            assert_same_floats(best_a.s, best_b.s, sizeof best_a / 4);

            float low[2][AQ_LANES], high[2][AQ_LANES], moved[2][MAX / 6 * AQ_LANES];
            const float *rows[AQ_LANES];
            for (size_t j = 0; j < AQ_LANES; j++) rows[j] = x + j * block.steps;
            memset(moved, 0xEE, sizeof moved);
            aq_kernels_scalar.transpose(rows, block.steps, moved[0]);
            k->transpose(rows, block.steps, moved[1]);
            assert_memory_equal(moved[0], moved[1], sizeof moved[0]);
            if (block.steps) {
                assert_true(aq_kernels_scalar.lane_range(x, block.steps, low[0], high[0]));
                assert_true(k->lane_range(x, block.steps, low[1], high[1]));
                assert_memory_equal(low[0], low[1], sizeof low[0]);
                assert_memory_equal(high[0], high[1], sizeof high[0]);
                size_t at = random_bits() % (block.steps * AQ_LANES);
                float kept = x[at];
                x[at] = trial & 2 ? NAN : -INFINITY;
                assert_false(aq_kernels_scalar.lane_range(x, block.steps, low[0], high[0]));
                assert_false(k->lane_range(x, block.steps, low[1], high[1]));
                x[at] = kept;
            }

            aq_grid_limits limits = {16, 0, 15};
            ga = gb = from;
            for (int i = 0; i < 3; i++) {
                const float dk[3] = {0, -1, 1}, dm[3] = {(float)(i - 1), 0, (float)(1 - i)};
                aq_kernels_scalar.grid_try(&block, q_max, &from, dk, dm, &limits, &ga);
                k->grid_try(&block, q_max, &from, dk, dm, &limits, &gb);
                assert_same_floats(ga.outer_s, gb.outer_s, sizeof ga / 4);
            }

            double ea[AQ_LANES], eb[AQ_LANES];
            for (size_t j = 0; j < AQ_LANES; j++) a.s[j] = fabsf(value_of(kind)) + AQ_TINY_SCALE;
            aq_kernels_scalar.pair_error(&block, q_max, a.s, z, ea);
            k->pair_error(&block, q_max, a.s, z, eb);
            for (size_t j = 0; j < AQ_LANES; j++)
                if (!(isnan(ea[j]) && isnan(eb[j]))) assert_memory_equal(&ea[j], &eb[j], 8);
        }
}

static void spreading_agrees(void **state) {
    (void)state;
    enum { STRIDE = 40 };
    enum { MOST = 19 };
    static float e[MOST * AQ_LANES], u[MOST * MAX], a[MAX * STRIDE], b[MAX * STRIDE];
    FOR_EACH_TABLE(k)
    for (int kind = 0; kind < KINDS; kind++)
        for (size_t n = 0, count = 0; n < MAX; n += n < 20 ? 1 : 31, count = (count + 1) % (MOST + 1)) {
            fill(e, MOST * AQ_LANES, kind);
            fill(u, MOST * MAX, kind);
            fill(a, MAX * STRIDE, NORMAL);
            memcpy(b, a, sizeof b);
            aq_kernels_scalar.spread(e, count, u, MAX, n, a + 3, STRIDE);
            k->spread(e, count, u, MAX, n, b + 3, STRIDE);
            for (size_t i = 0; i < MAX * STRIDE; i++)
                if (!(isnan(a[i]) && isnan(b[i]))) assert_memory_equal(&a[i], &b[i], 4);
        }
}

/* Against the plain loop, for the scalar form is made of the same lines as the others. */
#define DEFINE_SUBTRACTING(bits, type, multiply_add)                                                                                                           \
    static void subtracting_rows_agrees_##bits(const aq_kernels *k) {                                                                                          \
        enum { MOST = 7 };                                                                                                                                     \
        static float raw[MOST * MAX];                                                                                                                          \
        static type f[MOST], x[MOST * MAX], a[MAX], b[MAX];                                                                                                    \
        for (int kind = 0; kind < KINDS; kind++)                                                                                                               \
            for (size_t n = 0, count = 0; n < MAX; n += n < 40 ? 1 : 31, count = (count + 1) % (MOST + 1)) {                                                   \
                fill(raw, MOST *MAX, kind);                                                                                                                    \
                for (size_t i = 0; i < MOST * MAX; i++) x[i] = (type)raw[i] / 3;                                                                               \
                fill(raw, MAX, NORMAL);                                                                                                                        \
                for (size_t i = 0; i < MAX; i++) a[i] = b[i] = (type)raw[i] / 7;                                                                               \
                for (size_t i = 0; i < MOST; i++) f[i] = (type)raw[MAX + i] / 5;                                                                               \
                for (size_t l = 0; l < count; l++)                                                                                                             \
                    for (size_t i = 0; i < n; i++) a[i] = multiply_add(-f[l], x[l * MAX + i], a[i]);                                                           \
                k->gemm_f##bits->subtract_rows(f, count, x, MAX, n, b);                                                                                        \
                for (size_t i = 0; i < MAX; i++)                                                                                                               \
                    if (!(isnan(a[i]) && isnan(b[i]))) assert_memory_equal(&a[i], &b[i], sizeof *a);                                                           \
            }                                                                                                                                                  \
    }
DEFINE_SUBTRACTING(32, float, fmaf)
DEFINE_SUBTRACTING(64, double, fma)

static void subtracting_rows_agrees(void **state) {
    (void)state;
    subtracting_rows_agrees_32(&aq_kernels_scalar);
    subtracting_rows_agrees_64(&aq_kernels_scalar);
    FOR_EACH_TABLE(k) {
        subtracting_rows_agrees_32(k);
        subtracting_rows_agrees_64(k);
    }
}

/* Every finite half as scale and as offset, at any alignment; records of random fields. */
static void lines_of_stored_parameters_agree(void **state) {
    (void)state;
    enum { N = 45, RECORDS = 9 };
    static uint8_t stored[N * 4 + 3];
    float expected[2][RECORDS * 16], found[2][RECORDS * 16];
    for (uint32_t from = 0; from < 0x10000; from += N) {
        size_t skew = from % 4;
        for (uint32_t i = 0; i < N; i++) {
            uint16_t s = (uint16_t)(from + i), o = (uint16_t)(s * 31 + 7);
            if ((s & 0x7C00) == 0x7C00) s = 0x3C00;
            if ((o & 0x7C00) == 0x7C00) o = 0x8001;
            memcpy(stored + skew + 4 * i, &s, 2);
            memcpy(stored + skew + 4 * i + 2, &o, 2);
        }
        aq_kernels_scalar.half_lines(stored + skew, N, expected[0], expected[1]);
        uint16_t first;
        memcpy(&first, stored + skew, 2);
        assert_true(expected[0][0] == aq_f16_to_f32(first));
        for (size_t isa = 0; isa < 3; isa++) {
            const aq_kernels *k = aq_kernels_find(isas[isa]);
            if (!k) continue;
            k->half_lines(stored + skew, N, found[0], found[1]);
            assert_memory_equal(found[0], expected[0], N * sizeof(float));
            assert_memory_equal(found[1], expected[1], N * sizeof(float));
            for (int bits = 2; bits <= 4; bits += 2) { /* the same bytes as records; their scale and offset are finite, the fields anything */
                size_t n = bits == 4 ? RECORDS : RECORDS - 1;
                aq_kernels_scalar.two_level(stored + skew, bits, n, expected[0], expected[1]);
                k->two_level(stored + skew, bits, n, found[0], found[1]);
                assert_memory_equal(found[0], expected[0], n * (bits == 4 ? 8 : 16) * sizeof(float));
                assert_memory_equal(found[1], expected[1], n * (bits == 4 ? 8 : 16) * sizeof(float));
            }
            aq_kernels_scalar.half_lines(stored + skew, N, expected[0], expected[1]);
        }
    }
}

static void an_instruction_set_is_selected_by_name(void **state) {
    (void)state;
    aq_error err;
    assert_int_equal(aq_kernels_select("sse9", &err), AQ_ERR_USAGE);
    assert_non_null(strstr(err.message, "unknown instruction set 'sse9'"));
    assert_non_null(strstr(err.hint, aq_isa_name()));
    const char *absent = aq_kernels_find("neon") ? "avx2" : "neon";
    assert_int_equal(aq_kernels_select(absent, &err), AQ_ERR_USAGE);
    assert_non_null(strstr(err.message, "this CPU has no"));
    setenv("ARROWQUANT_ISA", "quantum", 1);
    assert_int_equal(aq_kernels_select(NULL, &err), AQ_ERR_USAGE);
    assert_non_null(strstr(err.message, "ARROWQUANT_ISA: "));
    setenv("ARROWQUANT_ISA", "scalar", 1);
    assert_int_equal(aq_kernels_select(NULL, &err), AQ_OK);
    assert_string_equal(aq_isa_name(), "scalar");
    unsetenv("ARROWQUANT_ISA");
    assert_int_equal(aq_kernels_select(NULL, &err), AQ_OK);
}

int main(void) {
    printf("kernels:");
    FOR_EACH_TABLE(k) printf(" %s", k->name);
    printf(", best %s\n", aq_isa_name());
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(conversions_agree),
        cmocka_unit_test(finite_check_finds_the_first_index),
        cmocka_unit_test(range_agrees),
        cmocka_unit_test(ranges_agree),
        cmocka_unit_test(groups_are_quantized_as_alone),
        cmocka_unit_test(column_stats_agree),
        cmocka_unit_test(codes_agree),
        cmocka_unit_test(min_max_pairs_agree),
        cmocka_unit_test(error_sums_agree),
        cmocka_unit_test(search_kernels_agree),
        cmocka_unit_test(spreading_agrees),
        cmocka_unit_test(subtracting_rows_agrees),
        cmocka_unit_test(lines_of_stored_parameters_agree),
        cmocka_unit_test(an_instruction_set_is_selected_by_name),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
