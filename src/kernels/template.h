/* Vector kernels: the loops of scalar.c, written once for every instruction set. An instruction-set file defines, then includes this:
 *   VECTOR_BYTES             size of a register
 *   v_min, v_max             a < b ? a : b and a > b ? a : b, b when unordered
 *   v_reduce_min, v_reduce_max, v_all_zero
 *                            over the lanes of one register; v_all_zero is false when one is NaN
 *   v_reduce_min_16, v_reduce_max_16
 *                            where HAS_REDUCE_16 says so: of 16 registers at once, + 0
 *   codes_store, codes_pack4, codes_pack2
 *                            16 floats 1.5 * 2^23 + code, whose lowest byte is the code, -> 16, 8 or 4 bytes
 *   codes_64                 where HAS_CODES_64 says so: 64 floats below 2^31, not yet rounded nor clamped, -> their codes, packed
 *   codes_load               16 bytes -> 16 floats
 *   half_load, half_store    one register of floats <-> halves
 *   vd, vd_load, vd_low, vd_high, vd_max, vd_abs
 *                            a register of doubles; W / 2 floats from memory or from a register's lower or upper half
 *   v_fold                   the sum of the PARTS registers of 16 lanes: 16 -> 8 -> 4 -> 2 -> 1, lane j taking lane j + half
 *   v_code_at, v_spread      code number t of each word as floats; lane j = p[j >> shift], where a whole register may be read
 *   v_narrow                 two registers of doubles -> one of floats
 *   v_fma, vd_fma            a b + c with one rounding, of floats and of doubles
 *   TILE_ROWS, TILE_VECTORS  of matrix products (gemm_tile.h): what fills the registers
 *   DOT_OUTPUTS              of products on codes at once: what the registers hold
 *   v_transpose_words        where HAS_TRANSPOSE_WORDS says so: 16 bytes of each of W rows -> four registers of words
 *   WORD_ROWS, WORD_VECTORS, v_sum, v_add_products, v_sum_of
 *                            of products of integers (words_tile.h)
 *   KERNELS_NAME, KERNELS    "avx2", aq_kernels_avx2
 * The rest is the vector extension of GCC and clang: + - * / and comparisons on whole registers. Each lane performs exactly the operations of the
 * scalar code in the same order, which is why the results are the same bits.
 */
#include "kernels/kernels.h"

#include <float.h>
#include <math.h>
#include <string.h>

#include "base/half.h"

enum { W = VECTOR_BYTES / 4, PARTS = AQ_LANES / W }; /* floats a register; registers that hold the 16 lanes */

typedef int32_t vi __attribute__((vector_size(VECTOR_BYTES)));

static inline vf v_load(const float *p) {
    vf v;
    memcpy(&v, p, sizeof v);
    return v;
}
static inline void v_store(float *p, vf v) { memcpy(p, &v, sizeof v); }
static inline vf v_set(float x) { return x - (vf){0}; }
static inline vf v_select(vi mask, vf a, vf b) { return (vf)((mask & (vi)a) | (~mask & (vi)b)); }
static inline vf v_clamp(vf t, vf low, vf high) { return v_min(v_max(t, low), high); }
/* As the integer in the lowest bits; as a float. */
static inline vf v_code_bits(vf t, vf top) { return v_clamp(t, v_set(0.0f), top) + 12582912.0f; }
static inline vf v_round_code(vf t, vf top) { return v_code_bits(t, top) - 12582912.0f; }
/* ---- conversions ---- */

static void f16_to_f32(const uint16_t *in, float *out, size_t n) {
    size_t i = 0;
    for (; i + W <= n; i += W) v_store(out + i, half_load(in + i));
    for (; i < n; i++) out[i] = aq_f16_to_f32(in[i]);
}

static void f32_to_f16(const float *in, uint16_t *out, size_t n) {
    size_t i = 0;
    for (; i + W <= n; i += W) half_store(out + i, v_load(in + i));
    for (; i < n; i++) out[i] = aq_f32_to_f16(in[i]);
}

/* Integer arithmetic without branches: compilers vectorize these two as they stand. */
static void bf16_to_f32(const uint16_t *in, float *out, size_t n) {
    for (size_t i = 0; i < n; i++) out[i] = aq_bf16_to_f32(in[i]);
}

static void f32_to_bf16(const float *in, uint16_t *out, size_t n) {
    for (size_t i = 0; i < n; i++) {
        uint32_t u = aq_f32_bits(in[i]), rounded = (u + 0x7FFF + (u >> 16 & 1)) >> 16, quiet = u >> 16 | 0x40;
        out[i] = (uint16_t)((u & 0x7FFFFFFF) > 0x7F800000 ? quiet : rounded);
    }
}

/* ---- finite, range ---- */

/* x * 0 is NaN for NaN and infinity, else 0. */
static size_t find_nonfinite(const float *x, size_t n) {
    size_t i = 0;
    for (; i + 4 * W <= n; i += 4 * W) {
        vf marks = {0};
        for (size_t u = 0; u < 4; u++) marks += v_load(x + i + u * W) * 0.0f;
        if (!v_all_zero(marks)) break;
    }
    while (i < n && (aq_f32_bits(x[i]) & 0x7F800000) != 0x7F800000) i++;
    return i;
}

/* Bytes. The hardware's own prefetching stops at the end of a page of 4 KiB. */
enum { FAR_AHEAD = 16384, NEAR_AHEAD = 2048 };

/* Per lane the smallest and largest of n >= W values, and marks that stay finite as long as all are, and as no product of two exceeds F32. What is left behind
 * the last whole step is seen together with values in front of it, which changes neither. What comes later is asked for: into the second-level cache, where
 * more requests can wait, then into the first. */
static inline __attribute__((always_inline)) void range_lanes(const float *x, size_t n, vf *low, vf *high, vf *marks) {
    vf a[2], b[2];
    size_t step = n < 4 * W ? W : 4 * W;
    for (size_t u = 0; u < 2; u++) a[u] = b[u] = v_load(x);
    for (size_t i = 0; i < n; i += step) {
        const float *at = x + (i + step <= n ? i : n - step);
        if (step == W) {
            vf v = v_load(at);
            a[0] = v_min(v, a[0]);
            b[0] = v_max(v, b[0]);
            marks[0] = v_fma(v, v, marks[0]);
            continue;
        }
        for (size_t u = 0; u < 2; u++) {
            vf first = v_load(at + 2 * u * W), second = v_load(at + (2 * u + 1) * W);
            for (size_t line = 0; line < 2 * VECTOR_BYTES; line += 64) {
                uintptr_t here = (uintptr_t)(at + 2 * u * W) + line;
                __builtin_prefetch((const void *)(here + FAR_AHEAD), 0, 2);
                __builtin_prefetch((const void *)(here + NEAR_AHEAD), 0, 3);
            }
            /* Where one is NaN, the second one comes out: here the one, there the other. */
            vf less = v_min(first, second), more = v_max(second, first);
            a[u] = v_min(less, a[u]);
            b[u] = v_max(more, b[u]);
            marks[u] = v_fma(less, more, marks[u]);
        }
    }
    *low = v_min(a[0], a[1]);
    *high = v_max(b[0], b[1]);
}

/* Whether the n values that left these marks are finite. */
static inline bool marks_finite(const vf *marks, const float *x, size_t n) { return v_all_zero((marks[0] + marks[1]) * 0.0f) || find_nonfinite(x, n) == n; }

static bool range(const float *x, size_t n, float *lo, float *hi) {
    if (n >= W) {
        vf low, high, marks[2] = {{0}, {0}};
        range_lanes(x, n, &low, &high, marks);
        *lo = v_reduce_min(low) + 0.0f;
        *hi = v_reduce_max(high) + 0.0f;
        return marks_finite(marks, x, n);
    }
    float low = x[0], high = x[0], marks = 0;
    for (size_t i = 0; i < n; i++) {
        low = x[i] < low ? x[i] : low;
        high = x[i] > high ? x[i] : high;
        marks += x[i] * 0.0f;
    }
    *lo = low + 0.0f;
    *hi = high + 0.0f;
    return marks == 0;
}

#ifndef HAS_REDUCE_16
static inline void v_reduce_min_16(const vf v[AQ_LANES], float *out) {
    for (size_t j = 0; j < AQ_LANES; j++) out[j] = v_reduce_min(v[j]) + 0.0f;
}
static inline void v_reduce_max_16(const vf v[AQ_LANES], float *out) {
    for (size_t j = 0; j < AQ_LANES; j++) out[j] = v_reduce_max(v[j]) + 0.0f;
}
#endif

/* The ends of n groups, a register of each group's lanes folded to one value. */
static inline void fold_ranges(const vf low[AQ_LANES], const vf high[AQ_LANES], size_t n, float *lo, float *hi) {
    float a[AQ_LANES], b[AQ_LANES];
    v_reduce_min_16(low, a);
    v_reduce_max_16(high, b);
    memcpy(lo, a, n * sizeof *lo);
    memcpy(hi, b, n * sizeof *hi);
}

static bool ranges(const float *x, size_t n, size_t n_groups, float *lo, float *hi) {
    if (n < W) {
        bool finite = true;
        for (size_t j = 0; j < n_groups; j++) finite &= range(x + j * n, n, lo + j, hi + j);
        return finite;
    }
    vf a[AQ_LANES], b[AQ_LANES], marks[2] = {{0}, {0}};
    for (size_t j = n_groups; j < AQ_LANES; j++) a[j] = b[j] = (vf){0};
    for (size_t j = 0; j < n_groups; j++) range_lanes(x + j * n, n, &a[j], &b[j], marks);
    fold_ranges(a, b, n_groups, lo, hi);
    return marks_finite(marks, x, n * n_groups);
}

/* ---- column statistics ---- */

enum { ROWS_AHEAD = 16 };

/* `parts` registers of columns: their sums stay in registers while the rows go by. What a layer reads was just written and lies in outer caches, `stride`
 * apart: rows are asked for ahead of their turn (past the last row as well, which no prefetch minds). */
static inline __attribute__((always_inline)) void column_stats_parts(const float *x, size_t rows, size_t stride, size_t parts, double *sum, double *sum_sq,
                                                                     float *lo, float *hi) {
    vd s[8], q[8];
    vf a[4], b[4];
    for (size_t u = 0; u < parts; u++) a[u] = v_load(lo + u * W), b[u] = v_load(hi + u * W);
    for (size_t u = 0; u < 2 * parts; u++) {
        memcpy(&s[u], sum + u * W / 2, sizeof s[u]);
        memcpy(&q[u], sum_sq + u * W / 2, sizeof q[u]);
    }
    for (size_t i = 0; i < rows; i++, x += stride) {
        for (size_t u = 0; u < parts; u++) {
            __builtin_prefetch((const void *)((uintptr_t)(x + u * W) + ROWS_AHEAD * stride * sizeof *x));
            vf v = v_load(x + u * W);
            vd low = vd_load(x + u * W), high = vd_load(x + u * W + W / 2);
            s[2 * u] += low;
            s[2 * u + 1] += high;
            q[2 * u] = vd_fma(low, low, q[2 * u]); /* the square of an F32 is exact in double: one rounding or two, it is the same sum */
            q[2 * u + 1] = vd_fma(high, high, q[2 * u + 1]);
            a[u] = v_min(v, a[u]);
            b[u] = v_max(v, b[u]);
        }
    }
    for (size_t u = 0; u < parts; u++) v_store(lo + u * W, a[u]), v_store(hi + u * W, b[u]);
    for (size_t u = 0; u < 2 * parts; u++) {
        memcpy(sum + u * W / 2, &s[u], sizeof s[u]);
        memcpy(sum_sq + u * W / 2, &q[u], sizeof q[u]);
    }
}

enum { STATS_PARTS = VECTOR_BYTES == 32 ? 2 : 4 }; /* as many as the registers hold: 16 of them on AVX2, 32 elsewhere */

static void column_stats(const float *x, size_t rows, size_t stride, size_t n, double *sum, double *sum_sq, float *lo, float *hi) {
    size_t j = 0;
    for (; j + STATS_PARTS * W <= n; j += STATS_PARTS * W) column_stats_parts(x + j, rows, stride, STATS_PARTS, sum + j, sum_sq + j, lo + j, hi + j);
    for (; j + W <= n; j += W) column_stats_parts(x + j, rows, stride, 1, sum + j, sum_sq + j, lo + j, hi + j);
    for (; j < n; j++) {
        for (size_t i = 0; i < rows; i++) {
            float v = x[i * stride + j];
            sum[j] += (double)v;
            sum_sq[j] += (double)v * (double)v;
            lo[j] = v < lo[j] ? v : lo[j];
            hi[j] = v > hi[j] ? v : hi[j];
        }
    }
}

/* ---- codes ---- */

static inline __attribute__((always_inline)) void quantize_16(const float *x, bool tiny, vf inverse, vf scale, vf zero, int bits, vf top, uint8_t *codes) {
    vf q[PARTS];
    for (size_t u = 0; u < PARTS; u++) {
        vf v = v_load(x + u * W);
        q[u] = v_code_bits((tiny ? v / scale : v * inverse) + zero, top);
    }
    if (bits == 8)
        codes_store(codes, q);
    else if (bits == 4)
        codes_pack4(codes, q);
    else
        codes_pack2(codes, q);
}

/* near: no quotient is so large that it does not fit an integer of 32 bits. */
static inline __attribute__((always_inline)) void quantize_any(const float *x, size_t n, bool tiny, bool near, float s, float z, int bits, int q_max,
                                                               uint8_t *codes) {
    vf scale = v_set(s), inverse = v_set(1.0f / s), zero = v_set(z), top = v_set((float)q_max);
    size_t i = 0, rate = (size_t)bits;
    (void)near; /* others clamp at no cost */
#ifdef HAS_CODES_64
    for (; i + 64 <= n; i += 64) {
        vf t[64 / W];
        for (size_t u = 0; u < 64 / W; u++) {
            vf v = v_load(x + i + u * W);
            t[u] = (tiny ? v / scale : v * inverse) + zero;
            if (!near) t[u] = v_min(top, t[u]); /* NaN stays and converts to less than 0 */
        }
        codes_64(codes + i * rate / 8, t, bits);
    }
#endif
    for (; i + AQ_LANES <= n; i += AQ_LANES) quantize_16(x + i, tiny, inverse, scale, zero, bits, top, codes + i * rate / 8);
    if (i == n) return;
    if (n > AQ_LANES && n * rate % 8 == 0) { /* the last 16 once more, the first of them for the second time */
        quantize_16(x + n - AQ_LANES, tiny, inverse, scale, zero, bits, top, codes + (n - AQ_LANES) * rate / 8);
        return;
    }
    float tail[AQ_LANES] = {0};
    uint8_t last[AQ_LANES];
    memcpy(tail, x + i, (n - i) * sizeof *x);
    quantize_16(tail, tiny, inverse, scale, zero, bits, top, last);
    size_t used = (n - i) * rate;
    if (used % 8) last[used / 8] &= (uint8_t)((1 << used % 8) - 1);
    memcpy(codes + i * rate / 8, last, (used + 7) / 8);
}

static void quantize(const float *x, size_t n, float s, float z, int q_max, uint8_t *codes) {
    if (s < AQ_TINY_SCALE)
        quantize_any(x, n, true, false, s, z, 8, q_max, codes);
    else
        quantize_any(x, n, false, false, s, z, 8, q_max, codes);
}

static void quantize_inputs(const float *x, size_t n, float s, float z, uint8_t *codes) { quantize_any(x, n, true, false, s, z, 8, 255, codes); }

static void quantize2(const float *x, size_t n, float s, float z, uint8_t *packed) {
    if (s < AQ_TINY_SCALE)
        quantize_any(x, n, true, false, s, z, 2, 3, packed);
    else
        quantize_any(x, n, false, false, s, z, 2, 3, packed);
}

static void quantize4(const float *x, size_t n, float s, float z, uint8_t *packed) {
    if (s < AQ_TINY_SCALE)
        quantize_any(x, n, true, false, s, z, 4, 15, packed);
    else
        quantize_any(x, n, false, false, s, z, 4, 15, packed);
}

/* By turns some values of the present groups and as many of the next ones, whose way from memory the former's work covers. */
static inline __attribute__((always_inline)) bool quantize_groups_of(const float *x, size_t size, size_t n, const float *s, const float *z, int bits,
                                                                     uint8_t *codes, const float *next, size_t n_next, float *lo, float *hi) {
    enum { SOME = 256 };
    size_t rate = (size_t)bits, most = n > n_next ? n : n_next;
    vf a[AQ_LANES], b[AQ_LANES], marks[2] = {{0}, {0}};
    for (size_t j = n_next; j < AQ_LANES; j++) a[j] = b[j] = (vf){0};
    for (size_t j = 0; j < most; j++) {
        for (size_t i = 0, some; i < size; i += some) {
            some = size - i < 2 * SOME ? size - i : SOME;
            uint8_t *packed = codes + (j * size + i) * rate / 8;
            if (j < n && s[j] >= AQ_TINY_SCALE)
                quantize_any(x + j * size + i, some, false, true, s[j], z[j], bits, (1 << bits) - 1, packed);
            else if (j < n)
                quantize_any(x + j * size + i, some, true, false, s[j], z[j], bits, (1 << bits) - 1, packed);
            if (j >= n_next) continue;
            vf low, high;
            range_lanes(next + j * size + i, some, &low, &high, marks);
            a[j] = i ? v_min(low, a[j]) : low;
            b[j] = i ? v_max(high, b[j]) : high;
        }
    }
    fold_ranges(a, b, n_next, lo, hi);
    return marks_finite(marks, next, size * n_next);
}

static bool quantize_groups(const float *x, size_t size, size_t n, const float *s, const float *z, int bits, uint8_t *codes, const float *next, size_t n_next,
                            float *lo, float *hi) {
    if (size < W) {
        for (size_t j = 0; j < n; j++) {
            uint8_t *packed = codes + j * size * (size_t)bits / 8;
            quantize_any(x + j * size, size, s[j] < AQ_TINY_SCALE, false, s[j], z[j], bits, (1 << bits) - 1, packed);
        }
        return ranges(next, size, n_next, lo, hi);
    }
    if (bits == 4) return quantize_groups_of(x, size, n, s, z, 4, codes, next, n_next, lo, hi);
    if (bits == 2) return quantize_groups_of(x, size, n, s, z, 2, codes, next, n_next, lo, hi);
    return quantize_groups_of(x, size, n, s, z, 8, codes, next, n_next, lo, hi);
}

static void dequantize(const uint8_t *codes, size_t n, float s, float z, float *out) {
    vf scale = v_set(s), zero = v_set(z);
    size_t i = 0;
    for (; i + AQ_LANES <= n; i += AQ_LANES) {
        vf q[PARTS];
        codes_load(codes + i, q);
        for (size_t u = 0; u < PARTS; u++) v_store(out + i + u * W, (q[u] - zero) * scale);
    }
    for (; i < n; i++) out[i] = ((float)codes[i] - z) * s;
}

/* s, and the ends of the range widened to contain 0. */
static inline vf rtn_scale(const float *lo, const float *hi, float q_max, vf *low, vf *high, vi *plain) {
    vf zero = v_set(0.0f), first = v_load(lo), last = v_load(hi), a = v_min(first, zero), b = v_max(last, zero);
    vf s = v_narrow((vd_low(b) - vd_low(a)) / (double)q_max, (vd_high(b) - vd_high(a)) / (double)q_max);
    *plain = (first != last) & (s >= v_set(FLT_MIN)) & (s * q_max < v_set(INFINITY));
    *low = a;
    *high = b;
    return s;
}

static void rtn_f32(const float *lo, const float *hi, int q_max, float *s, float *z) {
    for (size_t j = 0; j < AQ_LANES; j += W) {
        vf low, high, scale, top = v_set((float)q_max);
        vi plain;
        scale = rtn_scale(lo + j, hi + j, (float)q_max, &low, &high, &plain);
        vd first = -vd_low(low) / vd_low(scale) + 0x1.8p52 - 0x1.8p52, second = -vd_high(low) / vd_high(scale) + 0x1.8p52 - 0x1.8p52;
        v_store(s + j, v_select(plain, scale, v_set(0.0f)));
        v_store(z + j, v_select(plain, v_min(v_narrow(first, second), top), v_set(0.0f)));
    }
}

static void rtn_f16(const float *lo, const float *hi, int q_max, uint16_t *slots, float *s, float *z) {
    uint16_t halves[2][AQ_LANES];
    for (size_t j = 0; j < AQ_LANES; j += W) {
        vf low, high, scale;
        vi plain;
        scale = rtn_scale(lo + j, hi + j, (float)q_max, &low, &high, &plain);
        half_store(halves[0] + j, v_select(plain, scale, v_set(0.0f)));
        half_store(halves[1] + j, low);
        vf stored = half_load(halves[0] + j), offset = half_load(halves[1] + j);
        v_store(s + j, stored);
        v_store(z + j, v_select(stored > v_set(0.0f), (0.0f - offset) / stored, v_set(0.0f)));
    }
    for (size_t j = 0; j < AQ_LANES; j++) {
        slots[2 * j] = halves[0][j];
        slots[2 * j + 1] = halves[1][j];
    }
}

/* Plain loops over bytes: compilers turn them into shuffles of the instruction set that this file is compiled for. */
static void pack2(const uint8_t *restrict codes, size_t n, uint8_t *restrict packed) {
    size_t whole = n / 4;
    for (size_t i = 0; i < whole; i++) packed[i] = (uint8_t)(codes[4 * i] | codes[4 * i + 1] << 2 | codes[4 * i + 2] << 4 | codes[4 * i + 3] << 6);
    if (n % 4) packed[whole] = 0;
    for (size_t i = 4 * whole; i < n; i++) packed[whole] = (uint8_t)(packed[whole] | codes[i] << i % 4 * 2);
}

static void pack4(const uint8_t *restrict codes, size_t n, uint8_t *restrict packed) {
    size_t whole = n / 2;
    for (size_t i = 0; i < whole; i++) packed[i] = (uint8_t)(codes[2 * i] | codes[2 * i + 1] << 4);
    if (n % 2) packed[whole] = codes[n - 1];
}

static void unpack2(const uint8_t *restrict packed, size_t n, uint8_t *restrict codes) {
    size_t whole = n / 4;
    for (size_t i = 0; i < whole; i++) {
        uint32_t v = packed[i];
        v = (v | v << 6 | v << 12 | v << 18) & 0x03030303;
        memcpy(codes + 4 * i, &v, 4);
    }
    for (size_t i = 4 * whole; i < n; i++) codes[i] = packed[whole] >> i % 4 * 2 & 3;
}

static void unpack4(const uint8_t *restrict packed, size_t n, uint8_t *restrict codes) {
    size_t whole = n / 2;
    for (size_t i = 0; i < whole; i++) {
        codes[2 * i] = packed[i] & 15;
        codes[2 * i + 1] = packed[i] >> 4;
    }
    if (n % 2) codes[n - 1] = packed[whole] & 15;
}

/* ---- error ---- */

static double fold(double *lanes, bool max) {
    for (size_t half = AQ_LANES / 2; half > 0; half /= 2)
        for (size_t j = 0; j < half; j++) lanes[j] = !max ? lanes[j] + lanes[j + half] : lanes[j] > lanes[j + half] ? lanes[j] : lanes[j + half];
    return lanes[0];
}

enum { DOUBLES = W / 2, REGISTERS = AQ_LANES / DOUBLES };

typedef struct error_lanes {
    vd dot[REGISTERS], w_sq[REGISTERS], v_sq[REGISTERS], err_sq[REGISTERS], err_max[REGISTERS];
} error_lanes;

static inline __attribute__((always_inline)) void add_errors(const float *w, const float *v, error_lanes *l) {
    for (size_t u = 0; u < REGISTERS; u++) {
        vd a = vd_load(w + u * DOUBLES), b = vd_load(v + u * DOUBLES), e = a - b;
        l->dot[u] += a * b;
        l->w_sq[u] += a * a;
        l->v_sq[u] += b * b;
        l->err_sq[u] += e * e;
        l->err_max[u] = vd_max(vd_abs(e), l->err_max[u]);
    }
}

static double fold_registers(const vd *registers, bool max) {
    double lanes[AQ_LANES];
    memcpy(lanes, registers, sizeof lanes);
    return fold(lanes, max);
}

static void error_sums(const float *w, const float *v, size_t n, aq_error_sums *out) {
    error_lanes l = {0};
    size_t i = 0;
    for (; i + AQ_LANES <= n; i += AQ_LANES) add_errors(w + i, v + i, &l);
    if (i < n) { /* padded with zeros: they add +0 to sums that start at +0, which changes nothing */
        float tail[2][AQ_LANES] = {0};
        memcpy(tail[0], w + i, (n - i) * sizeof *w);
        memcpy(tail[1], v + i, (n - i) * sizeof *v);
        add_errors(tail[0], tail[1], &l);
    }
    *out = (aq_error_sums){fold_registers(l.dot, false), fold_registers(l.w_sq, false), fold_registers(l.v_sq, false), fold_registers(l.err_sq, false),
                           fold_registers(l.err_max, true)};
}

/* ---- search: the lanes of one register at a time, over all steps ---- */

typedef float v4 __attribute__((vector_size(16)));

/* 4 x 4 squares. */
static void transpose(const float *const rows[AQ_LANES], size_t n, float *x) {
    size_t whole = n / 4 * 4;
    for (size_t j = 0; j < AQ_LANES; j += 4)
        for (size_t i = 0; i < whole; i += 4) {
            v4 r[4];
            for (size_t u = 0; u < 4; u++) memcpy(&r[u], rows[j + u] + i, sizeof r[u]);
            v4 a = __builtin_shufflevector(r[0], r[1], 0, 4, 1, 5), b = __builtin_shufflevector(r[2], r[3], 0, 4, 1, 5);
            v4 c = __builtin_shufflevector(r[0], r[1], 2, 6, 3, 7), d = __builtin_shufflevector(r[2], r[3], 2, 6, 3, 7);
            v4 columns[4] = {__builtin_shufflevector(a, b, 0, 1, 4, 5), __builtin_shufflevector(a, b, 2, 3, 6, 7), __builtin_shufflevector(c, d, 0, 1, 4, 5),
                             __builtin_shufflevector(c, d, 2, 3, 6, 7)};
            for (size_t u = 0; u < 4; u++) memcpy(x + (i + u) * AQ_LANES + j, &columns[u], sizeof columns[u]);
        }
    for (size_t j = 0; j < AQ_LANES; j++)
        for (size_t i = whole; i < n; i++) x[i * AQ_LANES + j] = rows[j][i];
}

static bool lane_range(const float *x, size_t steps, float *lo, float *hi) {
    vf zero = v_set(0.0f), marks = zero;
    for (size_t j = 0; j < AQ_LANES; j += W) {
        vf a = v_load(x + j), b = a;
        for (size_t i = 0; i < steps; i++) {
            vf v = v_load(x + i * AQ_LANES + j);
            a = v_min(v, a);
            b = v_max(v, b);
            marks += v * zero;
        }
        v_store(lo + j, a + zero);
        v_store(hi + j, b + zero);
    }
    return v_all_zero(marks);
}

typedef struct part_sums {
    vf q, qq, r, rq, rr;
} part_sums;

static inline __attribute__((always_inline)) part_sums fit_sums_part(const aq_block *b, size_t first, bool weighted, vf top, vf s, vf o) {
    vf inverse = 1.0f / s;
    part_sums f = {{0}, {0}, {0}, {0}, {0}};
    for (size_t i = 0; i < b->steps; i++) {
        vf d = v_load(b->x + i * AQ_LANES + first) - o, q = v_round_code(d * inverse, top), r = d - q * s, hq = q, hr = r;
        if (weighted) {
            vf h = v_load(b->h + i * AQ_LANES + first);
            hq = h * q;
            hr = h * r;
        }
        f.q += hq;
        f.qq += hq * q;
        f.r += hr;
        f.rq += hr * q;
        f.rr += hr * r;
    }
    return f;
}

static inline __attribute__((always_inline)) void fit_lines_part(const part_sums *f, size_t j, vf n, float middle, vf s0, vf o0, aq_lines *lines,
                                                                 aq_lines *best) {
    vf ds, d_o, error, spread, zero = v_set(0.0f), infinite = v_set(INFINITY);
    if (middle >= 0) {
        vf cq = f->q - middle * n, cr = f->rq - middle * f->r;
        spread = f->qq - middle * f->q - middle * cq;
        ds = cr / spread;
        d_o = -middle * ds;
        error = f->rr - ds * cr;
    } else {
        spread = n * f->qq - f->q * f->q;
        ds = (n * f->rq - f->q * f->r) / spread;
        d_o = (f->r - ds * f->q) / n;
        error = f->rr - ds * f->rq - d_o * f->r;
    }
    vf s = s0 + ds, o = o0 + d_o;
    vi good = (spread > zero) & (s > zero) & (error < infinite);
    s = v_select(good, s, s0);
    o = v_select(good, o, o0);
    error = v_select(good, v_max(error, zero), infinite);
    if (lines) {
        v_store(lines->s + j, s);
        v_store(lines->o + j, o);
        v_store(lines->error + j, error);
    }
    if (!best) return;
    vf old = v_load(best->error + j);
    vi better = error < old;
    v_store(best->s + j, v_select(better, s, v_load(best->s + j)));
    v_store(best->o + j, v_select(better, o, v_load(best->o + j)));
    v_store(best->error + j, v_select(better, error, old));
}

static void fit_sums(const aq_block *b, int q_max, const aq_lines *lines, aq_fit_sums *out) {
    vf top = v_set((float)q_max);
    for (size_t j = 0; j < AQ_LANES; j += W) {
        vf s = v_load(lines->s + j), o = v_load(lines->o + j);
        part_sums f = b->h ? fit_sums_part(b, j, true, top, s, o) : fit_sums_part(b, j, false, top, s, o);
        v_store(out->q + j, f.q);
        v_store(out->qq + j, f.qq);
        v_store(out->r + j, f.r);
        v_store(out->rq + j, f.rq);
        v_store(out->rr + j, f.rr);
    }
}

static void fit_lines(const aq_fit_sums *sums, const float *weight, float middle, aq_lines *lines, aq_lines *best) {
    for (size_t j = 0; j < AQ_LANES; j += W) {
        part_sums f = {v_load(sums->q + j), v_load(sums->qq + j), v_load(sums->r + j), v_load(sums->rq + j), v_load(sums->rr + j)};
        fit_lines_part(&f, j, v_load(weight + j), middle, v_load(lines->s + j), v_load(lines->o + j), lines, best);
    }
}

static void fit(const aq_block *b, int q_max, const float *weight, float middle, const aq_lines *from, float clip, float shift, aq_lines *out, aq_lines *best) {
    vf top = v_set((float)q_max);
    for (size_t j = 0; j < AQ_LANES; j += W) {
        vf s = v_load(from->s + j) * clip, o = v_load(from->o + j) + shift * s;
        part_sums f = b->h ? fit_sums_part(b, j, true, top, s, o) : fit_sums_part(b, j, false, top, s, o);
        fit_lines_part(&f, j, v_load(weight + j), middle, s, o, out, best);
    }
}

/* Three moves at a time: one alone would leave the vector units waiting for its sum. */
typedef struct moves {
    vf k[3], m[3], s[3], o[3], error[3];
} moves;

static inline __attribute__((always_inline)) void grid_errors(const aq_block *b, size_t first, bool weighted, vf top, moves *t) {
    vf inverse[3], s[3], o[3], error[3] = {{0}, {0}, {0}};
    for (size_t u = 0; u < 3; u++) {
        s[u] = t->s[u];
        o[u] = t->o[u];
        inverse[u] = 1.0f / s[u];
    }
    for (size_t i = 0; i < b->steps; i++) {
        vf x = v_load(b->x + i * AQ_LANES + first), h = weighted ? v_load(b->h + i * AQ_LANES + first) : x;
        for (size_t u = 0; u < 3; u++) {
            vf d = x - o[u], r = d - v_round_code(d * inverse[u], top) * s[u];
            error[u] += weighted ? h * r * r : r * r;
        }
    }
    for (size_t u = 0; u < 3; u++) t->error[u] = error[u];
}

static void grid_try(const aq_block *b, int q_max, const aq_grid *from, const float dk[3], const float dm[3], const aq_grid_limits *limits, aq_grid *best) {
    vf top = v_set((float)q_max), one = v_set(1.0f), k_top = v_set(limits->k_top), m_low = v_set(limits->m_low), m_top = v_set(limits->m_top);
    for (size_t j = 0; j < AQ_LANES; j += W) {
        moves t;
        for (size_t u = 0; u < 3; u++) {
            t.k[u] = v_clamp(v_load(from->k + j) + dk[u], one, k_top);
            t.m[u] = v_clamp(v_load(from->m + j) + dm[u], m_low, m_top);
            t.s[u] = v_load(from->outer_s + j) * t.k[u];
            t.o[u] = v_load(from->outer_o + j) * t.m[u];
        }
        if (b->h)
            grid_errors(b, j, true, top, &t);
        else
            grid_errors(b, j, false, top, &t);
        vf k = v_load(best->k + j), m = v_load(best->m + j), error = v_load(best->error + j);
        for (size_t u = 0; u < 3; u++) {
            vi better = t.error[u] < error;
            k = v_select(better, t.k[u], k);
            m = v_select(better, t.m[u], m);
            error = v_select(better, t.error[u], error);
        }
        v_store(best->k + j, k);
        v_store(best->m + j, m);
        v_store(best->error + j, error);
    }
}

static inline __attribute__((always_inline)) void pair_error_part(const aq_block *b, size_t first, bool weighted, vf top, vf s, vf z, double *error) {
    vf inverse = 1.0f / s;
    vd low = {0}, high = {0};
    for (size_t i = 0; i < b->steps; i++) {
        vf x = v_load(b->x + i * AQ_LANES + first), v = (v_round_code(x * inverse + z, top) - z) * s;
        vd e = vd_low(x) - vd_low(v), f = vd_high(x) - vd_high(v);
        if (weighted) {
            vf h = v_load(b->h + i * AQ_LANES + first);
            low += vd_low(h) * e * e;
            high += vd_high(h) * f * f;
        } else {
            low += e * e;
            high += f * f;
        }
    }
    memcpy(error + first, &low, sizeof low);
    memcpy(error + first + W / 2, &high, sizeof high);
}

static void pair_error(const aq_block *b, int q_max, const float *s, const float *z, double *error) {
    for (size_t j = 0; j < AQ_LANES; j += W) {
        vf top = v_set((float)q_max), scale = v_load(s + j), zero = v_load(z + j);
        if (b->h)
            pair_error_part(b, j, true, top, scale, zero, error);
        else
            pair_error_part(b, j, false, top, scale, zero, error);
    }
}

/* ---- matrix products ---- */

#define T float
#define V vf
#define V_FMA v_fma
#define ROWS TILE_ROWS
#define VECTORS TILE_VECTORS
#define NAME(x) x##_f32
#include "kernels/gemm_tile.h"

#define T double
#define V vd
#define V_FMA vd_fma
#define ROWS TILE_ROWS
#define VECTORS TILE_VECTORS
#define NAME(x) x##_f64
#include "kernels/gemm_tile.h"

/* Some errors at once stay in registers, so that y passes through them once for all of these. */
static inline __attribute__((always_inline)) void spread_some(const float *e, size_t count, const float *u, size_t u_stride, size_t n, float *y,
                                                              size_t stride) {
    vf errors[8][PARTS];
    for (size_t k = 0; k < count; k++)
        for (size_t p = 0; p < PARTS; p++) errors[k][p] = v_load(e + k * AQ_LANES + p * W);
    for (size_t i = 0; i < n; i++)
        for (size_t p = 0; p < PARTS; p++) {
            vf sum = v_load(y + i * stride + p * W);
            for (size_t k = 0; k < count; k++) sum += errors[k][p] * u[k * u_stride + i];
            v_store(y + i * stride + p * W, sum);
        }
}

static void spread(const float *e, size_t count, const float *u, size_t u_stride, size_t n, float *y, size_t stride) {
    enum { SOME = PARTS == 1 ? 8 : 4 };
    size_t k = 0;
    for (; k + SOME <= count; k += SOME) spread_some(e + k * AQ_LANES, SOME, u + k * u_stride, u_stride, n, y, stride);
    for (; k < count; k++) spread_some(e + k * AQ_LANES, 1, u + k * u_stride, u_stride, n, y, stride);
}

/* ---- products on codes ---- */

typedef uint8_t bytes16 __attribute__((vector_size(16)));
typedef uint16_t halves8 __attribute__((vector_size(16)));
typedef float floats8 __attribute__((vector_size(32)));
typedef uint32_t words32 __attribute__((vector_size(VECTOR_BYTES)));

static inline __attribute__((always_inline)) void two_level_8(halves8 field, int p, float scale, float offset, float *s, float *o) {
    halves8 k = (field & (uint16_t)((1 << p) - 1)) + 1, m = field >> p;
    floats8 first = __builtin_convertvector(k, floats8) * scale, second = __builtin_convertvector(m, floats8) * offset;
    memcpy(s, &first, sizeof first);
    memcpy(o, &second, sizeof second);
}

/* As aq_finite_f16_to_f32. */
static inline vf v_finite_halves(vi words) {
    vf size = (vf)((words & 0x7FFF) << 13) * 0x1p112f;
    return (vf)((words32)size | ((words32)words & 0x8000u) << 16);
}

static void half_lines(const uint8_t *stored, size_t n, float *s, float *o) {
    size_t i = 0;
    for (; i + W <= n; i += W) { /* a pair is a word */
        vi words;
        memcpy(&words, stored + 4 * i, sizeof words);
        v_store(s + i, v_finite_halves(words));
        v_store(o + i, v_finite_halves(words >> 16));
    }
    for (; i < n; i++) {
        uint16_t two[2];
        memcpy(two, stored + 4 * i, sizeof two);
        s[i] = aq_finite_f16_to_f32(two[0]);
        o[i] = aq_finite_f16_to_f32(two[1]);
    }
}

static void two_level(const uint8_t *records, int bits, size_t n, float *s, float *o) {
    const bytes16 none = {0};
    for (size_t i = 0; i < n; i++) {
        bytes16 stored;
        uint16_t outer[2];
        memcpy(outer, records, sizeof outer);
        float scale = aq_finite_f16_to_f32(outer[0]), offset = aq_finite_f16_to_f32(outer[1]);
        if (bits == 4) { /* 12 bits each: the first or the last of two bytes */
            memcpy(&stored, records, sizeof stored);
            halves8 twos = (halves8)__builtin_shufflevector(stored, stored, 4, 5, 5, 6, 7, 8, 8, 9, 10, 11, 11, 12, 13, 14, 14, 15);
            two_level_8(twos * (halves8){16, 1, 16, 1, 16, 1, 16, 1} >> 4, 6, scale, offset, s + 8 * i, o + 8 * i);
            records += 16;
        } else {
            memcpy(&stored, records + 4, sizeof stored);
            halves8 low = (halves8)__builtin_shufflevector(stored, none, 0, 16, 1, 16, 2, 16, 3, 16, 4, 16, 5, 16, 6, 16, 7, 16);
            halves8 high = (halves8)__builtin_shufflevector(stored, none, 8, 16, 9, 16, 10, 16, 11, 16, 12, 16, 13, 16, 14, 16, 15, 16);
            two_level_8(low, 4, scale, offset, s + 16 * i, o + 16 * i);
            two_level_8(high, 4, scale, offset, s + 16 * i + 8, o + 16 * i + 8);
            records += 20;
        }
    }
}

/* Outputs [first, first + n_outputs). Each line of codes is loaded once: loads that cross lines would take longer than the shifts they save. Words behind the
 * end of a row lie in what follows: they meet inputs of 0. */
static inline __attribute__((always_inline)) void dot_outputs(const aq_code_rows *rows, int bits, size_t first, size_t n_outputs, const float *x,
                                                              size_t x_stride, const float *sums, size_t sums_stride, size_t n_rows, float *out,
                                                              size_t out_stride) {
    const size_t per = 32 / (size_t)bits;
    const unsigned shift = rows->shift;
    const uint8_t *memory_end = rows->codes + rows->readable;
    const float *s = rows->s + first * rows->lines, *o = rows->o + first * rows->lines, *inputs = x;
    vf total[DOT_OUTPUTS][4][PARTS];
    for (size_t i = 0; i < n_outputs; i++)
        for (size_t r = 0; r < n_rows; r++)
            for (size_t u = 0; u < PARTS; u++) total[i][r][u] = (vf){0};
    for (size_t p = 0; p < rows->n_pairs; p += AQ_LANES)
        for (size_t i = 0; i < n_outputs; i++)
            for (size_t u = 0; u < PARTS; u++)
                for (size_t r = 0; r < n_rows; r++)
                    total[i][r][u] = v_fma(v_load(o + i * rows->lines + p + u * W), v_load(sums + r * sums_stride + p + u * W), total[i][r][u]);
    for (size_t at = 0, word = 0; at < rows->bytes; at += 64, inputs += per * AQ_LANES) {
        const uint8_t *codes[DOT_OUTPUTS];
        uint8_t last[64];
        for (size_t i = 0; i < n_outputs; i++) {
            codes[i] = rows->codes + (first + i) * rows->bytes + at;
            __builtin_prefetch(codes[i] + n_outputs * rows->bytes); /* of the outputs after these */
        }
        /* cppcheck-suppress uninitvar ; n_outputs is 1 or more */
        if ((size_t)(memory_end - codes[n_outputs - 1]) < sizeof last) { /* no other row of these can end so near, as outputs are taken one by one then */
            memset(last, 0, sizeof last);
            codes[n_outputs - 1] = memcpy(last, codes[n_outputs - 1], rows->bytes - at < 64 ? rows->bytes - at : 64);
        }
        for (size_t u = 0; u < PARTS; u++, word += W) {
            vf part[DOT_OUTPUTS][4];
            for (size_t i = 0; i < n_outputs; i++)
                for (size_t r = 0; r < n_rows; r++) part[i][r] = (vf){0};
            vi words[DOT_OUTPUTS];
            for (size_t i = 0; i < n_outputs; i++) memcpy(&words[i], codes[i] + u * VECTOR_BYTES, sizeof words[i]);
            for (size_t t = 0; t < per; t++)
                for (size_t i = 0; i < n_outputs; i++) {
                    vf q = v_code_at(words[i], (int)t, bits);
                    for (size_t r = 0; r < n_rows; r++) part[i][r] = v_fma(q, v_load(inputs + r * x_stride + t * AQ_LANES + u * W), part[i][r]);
                }
            for (size_t i = 0; i < n_outputs; i++) {
                vf scale = v_spread(s + i * rows->lines + (word >> shift), shift);
                for (size_t r = 0; r < n_rows; r++) total[i][r][u] = v_fma(scale, part[i][r], total[i][r][u]);
            }
        }
    }
    for (size_t i = 0; i < n_outputs; i++)
        for (size_t r = 0; r < n_rows; r++) out[r * out_stride + first + i] = v_fold(total[i][r]);
}

/* Few rows of x leave registers for several outputs at once, which share the loads of x and fill the waiting for sums. */
static inline __attribute__((always_inline)) void dot_codes_of(const aq_code_rows *rows, int bits, const float *x, size_t x_stride, const float *sums,
                                                               size_t sums_stride, size_t n_rows, float *out, size_t out_stride) {
    const size_t at_once = n_rows == 1 ? DOT_OUTPUTS : n_rows == 2 ? DOT_OUTPUTS / 2 : 1;
    size_t i = 0;
    for (; i + at_once <= rows->outputs && rows->bytes >= 64; i += at_once)
        dot_outputs(rows, bits, i, at_once, x, x_stride, sums, sums_stride, n_rows, out, out_stride);
    for (; i < rows->outputs; i++) dot_outputs(rows, bits, i, 1, x, x_stride, sums, sums_stride, n_rows, out, out_stride);
}

#define DOT_CODES(bits)                                                                                                                                        \
    if (n_rows == 1)                                                                                                                                           \
        dot_codes_of(rows, bits, x, x_stride, sums, sums_stride, 1, out, out_stride);                                                                          \
    else if (n_rows == 2)                                                                                                                                      \
        dot_codes_of(rows, bits, x, x_stride, sums, sums_stride, 2, out, out_stride);                                                                          \
    else if (n_rows == 3)                                                                                                                                      \
        dot_codes_of(rows, bits, x, x_stride, sums, sums_stride, 3, out, out_stride);                                                                          \
    else                                                                                                                                                       \
        dot_codes_of(rows, bits, x, x_stride, sums, sums_stride, 4, out, out_stride);

static void dot_codes(const aq_code_rows *rows, const float *x, size_t x_stride, const float *sums, size_t sums_stride, size_t n_rows, float *out,
                      size_t out_stride) {
    if (rows->bits == 4) {
        DOT_CODES(4)
    } else if (rows->bits == 2) {
        DOT_CODES(2)
    } else {
        DOT_CODES(8)
    }
}

/* ---- products of integers ---- */

#include "kernels/words.h"

#define SUM v_sum
#define ADD_PRODUCTS v_add_products
#define SUM_OF v_sum_of
#define PER 2
#define PACK_INPUTS pack_inputs
#define NAME(x) x##_words
#include "kernels/words_tile.h"

#define WORDS kernels_words
#define BYTES kernels_words
#include "kernels/table.h"
