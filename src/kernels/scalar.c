/* Scalar kernels: the definition of right (see kernels.h). Written to be read; the vector forms must give the same bits. */
#include "kernels/kernels.h"

#include <float.h>
#include <math.h>
#include <string.h>

#include "base/half.h"

static void f16_to_f32(const uint16_t *in, float *out, size_t n) {
    for (size_t i = 0; i < n; i++) out[i] = aq_f16_to_f32(in[i]);
}
static void f32_to_f16(const float *in, uint16_t *out, size_t n) {
    for (size_t i = 0; i < n; i++) out[i] = aq_f32_to_f16(in[i]);
}
static void bf16_to_f32(const uint16_t *in, float *out, size_t n) {
    for (size_t i = 0; i < n; i++) out[i] = aq_bf16_to_f32(in[i]);
}
static void f32_to_bf16(const float *in, uint16_t *out, size_t n) {
    for (size_t i = 0; i < n; i++) out[i] = aq_f32_to_bf16(in[i]);
}

static size_t find_nonfinite(const float *x, size_t n) {
    size_t i = 0;
    while (i < n && (aq_f32_bits(x[i]) & 0x7F800000) != 0x7F800000) i++;
    return i;
}

static bool range(const float *x, size_t n, float *lo, float *hi) {
    float a = x[0], b = x[0], marks = 0;
    for (size_t i = 0; i < n; i++) {
        a = x[i] < a ? x[i] : a;
        b = x[i] > b ? x[i] : b;
        marks += x[i] * 0.0f; /* NaN from the first NaN or infinity on */
    }
    *lo = a + 0.0f; /* -0 becomes +0, so that the order of comparisons does not show */
    *hi = b + 0.0f;
    return marks == 0;
}

static bool ranges(const float *x, size_t n, size_t n_groups, float *lo, float *hi) {
    bool finite = true;
    for (size_t j = 0; j < n_groups; j++) finite &= range(x + j * n, n, lo + j, hi + j);
    return finite;
}

static void column_stats(const float *x, size_t rows, size_t stride, size_t n, double *sum, double *sum_sq, float *lo, float *hi) {
    for (size_t i = 0; i < rows; i++) {
        for (size_t j = 0; j < n; j++) {
            float v = x[i * stride + j];
            sum[j] += (double)v;
            sum_sq[j] += (double)v * (double)v;
            lo[j] = v < lo[j] ? v : lo[j];
            hi[j] = v > hi[j] ? v : hi[j];
        }
    }
}

static float clamp(float t, float low, float high) {
    t = t > low ? t : low;
    return t < high ? t : high;
}

/* Clamped before it is rounded: adding and subtracting 1.5 * 2^23 then rounds half to even in two operations. */
static float round_code(float t, float top) { return clamp(t, 0.0f, top) + 12582912.0f - 12582912.0f; }

static void quantize(const float *x, size_t n, float s, float z, int q_max, uint8_t *codes) {
    float top = (float)q_max, inverse = 1.0f / s;
    for (size_t i = 0; i < n; i++) codes[i] = (uint8_t)round_code((s < AQ_TINY_SCALE ? x[i] / s : x[i] * inverse) + z, top);
}

static void quantize_inputs(const float *x, size_t n, float s, float z, uint8_t *codes) {
    for (size_t i = 0; i < n; i++) codes[i] = (uint8_t)round_code(x[i] / s + z, 255.0f);
}

static void quantize_packed(const float *x, size_t n, float s, float z, size_t bits, uint8_t *packed) {
    for (size_t i = 0; i < n; i++) {
        uint8_t code;
        quantize(x + i, 1, s, z, (1 << bits) - 1, &code);
        size_t at = i * bits;
        packed[at / 8] = (uint8_t)((at % 8 ? packed[at / 8] : 0) | code << at % 8);
    }
}
static void quantize2(const float *x, size_t n, float s, float z, uint8_t *packed) { quantize_packed(x, n, s, z, 2, packed); }
static void quantize4(const float *x, size_t n, float s, float z, uint8_t *packed) { quantize_packed(x, n, s, z, 4, packed); }

static bool quantize_groups(const float *x, size_t size, size_t n, const float *s, const float *z, int bits, uint8_t *codes, const float *next, size_t n_next,
                            float *lo, float *hi) {
    size_t rate = (size_t)bits;
    for (size_t j = 0; j < n; j++) quantize_packed(x + j * size, size, s[j], z[j], rate, codes + j * size * rate / 8);
    return ranges(next, size, n_next, lo, hi);
}

/* s, 0 where it is left to the caller; the lower end, widened to contain 0. */
static float rtn_scale(float lo, float hi, float q_max, float *low) {
    float a = lo < 0 ? lo : 0.0f, b = hi > 0 ? hi : 0.0f, s = (float)(((double)b - (double)a) / (double)q_max);
    *low = a;
    return lo != hi && s >= FLT_MIN && s * q_max < INFINITY ? s : 0.0f;
}

static void rtn_f32(const float *lo, const float *hi, int q_max, float *s, float *z) {
    for (size_t j = 0; j < AQ_LANES; j++) {
        float low, top = (float)q_max;
        s[j] = rtn_scale(lo[j], hi[j], top, &low);
        z[j] = s[j] > 0 ? (float)(-(double)low / (double)s[j] + 0x1.8p52 - 0x1.8p52) : 0.0f;
        z[j] = z[j] < top ? z[j] : top;
    }
}

static void rtn_f16(const float *lo, const float *hi, int q_max, uint16_t *slots, float *s, float *z) {
    for (size_t j = 0; j < AQ_LANES; j++) {
        float low, scale = rtn_scale(lo[j], hi[j], (float)q_max, &low);
        slots[2 * j] = aq_f32_to_f16(scale);
        slots[2 * j + 1] = aq_f32_to_f16(low);
        s[j] = aq_f16_to_f32(slots[2 * j]);
        z[j] = s[j] > 0 ? (0.0f - aq_f16_to_f32(slots[2 * j + 1])) / s[j] : 0.0f;
    }
}

static void dequantize(const uint8_t *codes, size_t n, float s, float z, float *out) {
    for (size_t i = 0; i < n; i++) out[i] = ((float)codes[i] - z) * s;
}

static void pack2(const uint8_t *codes, size_t n, uint8_t *packed) {
    size_t i = 0;
    for (; i + 4 <= n; i += 4) packed[i / 4] = (uint8_t)(codes[i] | codes[i + 1] << 2 | codes[i + 2] << 4 | codes[i + 3] << 6);
    if (i < n) packed[i / 4] = 0;
    for (; i < n; i++) packed[i / 4] = (uint8_t)(packed[i / 4] | codes[i] << i % 4 * 2);
}

static void pack4(const uint8_t *codes, size_t n, uint8_t *packed) {
    size_t i = 0;
    for (; i + 2 <= n; i += 2) packed[i / 2] = (uint8_t)(codes[i] | codes[i + 1] << 4);
    if (i < n) packed[i / 2] = codes[i];
}

static void unpack2(const uint8_t *packed, size_t n, uint8_t *codes) {
    for (size_t i = 0; i < n; i++) codes[i] = packed[i / 4] >> i % 4 * 2 & 3;
}

static void unpack4(const uint8_t *packed, size_t n, uint8_t *codes) {
    for (size_t i = 0; i < n; i++) codes[i] = packed[i / 2] >> i % 2 * 4 & 15;
}

static double fold(double *lanes, bool max) {
    for (size_t half = AQ_LANES / 2; half > 0; half /= 2)
        for (size_t j = 0; j < half; j++) lanes[j] = !max ? lanes[j] + lanes[j + half] : lanes[j] > lanes[j + half] ? lanes[j] : lanes[j + half];
    return lanes[0];
}

static void error_sums(const float *w, const float *v, size_t n, aq_error_sums *out) {
    double dot[AQ_LANES] = {0}, w_sq[AQ_LANES] = {0}, v_sq[AQ_LANES] = {0}, err_sq[AQ_LANES] = {0}, err_max[AQ_LANES] = {0};
    for (size_t i = 0; i < n; i++) {
        size_t j = i % AQ_LANES;
        double a = w[i], b = v[i], e = a - b;
        dot[j] += a * b;
        w_sq[j] += a * a;
        v_sq[j] += b * b;
        err_sq[j] += e * e;
        err_max[j] = fabs(e) > err_max[j] ? fabs(e) : err_max[j];
    }
    *out = (aq_error_sums){fold(dot, false), fold(w_sq, false), fold(v_sq, false), fold(err_sq, false), fold(err_max, true)};
}

/* ---- search ---- */

static void transpose(const float *const rows[AQ_LANES], size_t n, float *x) {
    for (size_t j = 0; j < AQ_LANES; j++)
        for (size_t i = 0; i < n; i++) x[i * AQ_LANES + j] = rows[j][i];
}

static bool lane_range(const float *x, size_t steps, float *lo, float *hi) {
    float marks = 0; /* as in range */
    for (size_t j = 0; j < AQ_LANES; j++) {
        lo[j] = hi[j] = x[j] + 0.0f;
        for (size_t i = 0; i < steps; i++) {
            float v = x[i * AQ_LANES + j] + 0.0f;
            lo[j] = v < lo[j] ? v : lo[j];
            hi[j] = v > hi[j] ? v : hi[j];
            marks += v * 0.0f;
        }
    }
    return marks == 0;
}

static void fit_sums(const aq_block *b, int q_max, const aq_lines *lines, aq_fit_sums *out) {
    float top = (float)q_max, inverse[AQ_LANES];
    *out = (aq_fit_sums){0};
    for (size_t j = 0; j < AQ_LANES; j++) inverse[j] = 1.0f / lines->s[j];
    for (size_t i = 0; i < b->steps; i++)
        for (size_t j = 0; j < AQ_LANES; j++) {
            float d = b->x[i * AQ_LANES + j] - lines->o[j], h = b->h ? b->h[i * AQ_LANES + j] : 1.0f;
            float q = round_code(d * inverse[j], top), r = d - q * lines->s[j], hq = h * q, hr = h * r;
            out->q[j] += hq;
            out->qq[j] += hq * q;
            out->r[j] += hr;
            out->rq[j] += hr * q;
            out->rr[j] += hr * r;
        }
}

/* With residuals r of the line (s, o): minimize sum h (r - ds q - do)^2 over ds and do, a weighted line fit in closed form. */
static void fit_lines(const aq_fit_sums *f, const float *weight, float middle, aq_lines *lines, aq_lines *best) {
    for (size_t j = 0; j < AQ_LANES; j++) {
        float n = weight[j], ds, d_o, error, spread;
        if (middle >= 0) { /* w = s (q - middle) */
            float cq = f->q[j] - middle * n, cr = f->rq[j] - middle * f->r[j];
            spread = f->qq[j] - middle * f->q[j] - middle * cq;
            ds = cr / spread;
            d_o = -middle * ds;
            error = f->rr[j] - ds * cr;
        } else {
            spread = n * f->qq[j] - f->q[j] * f->q[j];
            ds = (n * f->rq[j] - f->q[j] * f->r[j]) / spread;
            d_o = (f->r[j] - ds * f->q[j]) / n;
            error = f->rr[j] - ds * f->rq[j] - d_o * f->r[j];
        }
        float s = lines->s[j] + ds, o = lines->o[j] + d_o;
        bool good = spread > 0 && s > 0 && error < INFINITY;
        lines->s[j] = good ? s : lines->s[j];
        lines->o[j] = good ? o : lines->o[j];
        lines->error[j] = good ? error > 0 ? error : 0.0f : INFINITY;
        if (!best || !(lines->error[j] < best->error[j])) continue;
        best->s[j] = lines->s[j];
        best->o[j] = lines->o[j];
        best->error[j] = lines->error[j];
    }
}

static void fit(const aq_block *b, int q_max, const float *weight, float middle, const aq_lines *from, float clip, float shift, aq_lines *out, aq_lines *best) {
    aq_lines lines;
    aq_fit_sums sums;
    for (size_t j = 0; j < AQ_LANES; j++) {
        lines.s[j] = from->s[j] * clip;
        lines.o[j] = from->o[j] + shift * lines.s[j];
    }
    fit_sums(b, q_max, &lines, &sums);
    fit_lines(&sums, weight, middle, &lines, best);
    if (out) *out = lines;
}

static void grid_try_one(const aq_block *b, int q_max, const aq_grid *from, float dk, float dm, const aq_grid_limits *limits, aq_grid *best) {
    float top = (float)q_max, k[AQ_LANES], m[AQ_LANES], s[AQ_LANES], o[AQ_LANES], inverse[AQ_LANES], error[AQ_LANES] = {0};
    for (size_t j = 0; j < AQ_LANES; j++) {
        k[j] = clamp(from->k[j] + dk, 1.0f, limits->k_top);
        m[j] = clamp(from->m[j] + dm, limits->m_low, limits->m_top);
        s[j] = from->outer_s[j] * k[j];
        o[j] = from->outer_o[j] * m[j];
        inverse[j] = 1.0f / s[j];
    }
    for (size_t i = 0; i < b->steps; i++)
        for (size_t j = 0; j < AQ_LANES; j++) {
            float d = b->x[i * AQ_LANES + j] - o[j], h = b->h ? b->h[i * AQ_LANES + j] : 1.0f;
            float r = d - round_code(d * inverse[j], top) * s[j];
            error[j] += h * r * r;
        }
    for (size_t j = 0; j < AQ_LANES; j++) {
        bool better = error[j] < best->error[j];
        best->k[j] = better ? k[j] : best->k[j];
        best->m[j] = better ? m[j] : best->m[j];
        best->error[j] = better ? error[j] : best->error[j];
    }
}

static void grid_try(const aq_block *b, int q_max, const aq_grid *from, const float dk[3], const float dm[3], const aq_grid_limits *limits, aq_grid *best) {
    for (size_t i = 0; i < 3; i++) grid_try_one(b, q_max, from, dk[i], dm[i], limits, best);
}

static void pair_error(const aq_block *b, int q_max, const float *s, const float *z, double *error) {
    float top = (float)q_max;
    for (size_t j = 0; j < AQ_LANES; j++) error[j] = 0;
    for (size_t i = 0; i < b->steps; i++)
        for (size_t j = 0; j < AQ_LANES; j++) {
            float x = b->x[i * AQ_LANES + j], v = (round_code(x * (1.0f / s[j]) + z[j], top) - z[j]) * s[j];
            double e = (double)x - (double)v, h = b->h ? (double)b->h[i * AQ_LANES + j] : 1.0;
            error[j] += h * e * e;
        }
}

/* Matrix products: registers of one element. */
#define T float
#define V float
#define V_FMA fmaf
#define ROWS 4
#define VECTORS 4
#define NAME(x) x##_f32
#include "kernels/gemm_tile.h"

#define T double
#define V double
#define V_FMA fma
#define ROWS 4
#define VECTORS 4
#define NAME(x) x##_f64
#include "kernels/gemm_tile.h"

static void spread(const float *e, size_t count, const float *u, size_t u_stride, size_t n, float *y, size_t stride) {
    for (size_t k = 0; k < count; k++)
        for (size_t i = 0; i < n; i++)
            for (size_t j = 0; j < AQ_LANES; j++) y[i * stride + j] += e[k * AQ_LANES + j] * u[k * u_stride + i];
}

/* ---- products on codes ---- */

static float code_at(const uint8_t *row, size_t i, int bits) {
    size_t at = i * (size_t)bits;
    return (float)(row[at / 8] >> at % 8 & ((1 << bits) - 1));
}

static void half_lines(const uint8_t *stored, size_t n, float *s, float *o) {
    for (size_t i = 0; i < n; i++) {
        uint16_t two[2];
        memcpy(two, stored + 4 * i, sizeof two);
        s[i] = aq_finite_f16_to_f32(two[0]);
        o[i] = aq_finite_f16_to_f32(two[1]);
    }
}

static void two_level(const uint8_t *records, int bits, size_t n, float *s, float *o) {
    size_t fields = bits == 4 ? 8 : 16, bytes = bits == 4 ? 16 : 20;
    unsigned p = bits == 4 ? 6 : 4;
    for (size_t i = 0; i < n; i++, records += bytes) {
        float scale, offset;
        half_lines(records, 1, &scale, &offset);
        for (size_t j = 0; j < fields; j++) { /* 12 bits each: the first or the last of two bytes; or a byte each */
            const uint8_t *at = records + 4 + (bits == 4 ? j * 3 / 2 : j);
            unsigned field = bits == 4 ? (unsigned)(at[0] | at[1] << 8) >> (j & 1) * 4 & 0xFFF : at[0];
            *s++ = scale * (float)((field & ((1u << p) - 1)) + 1);
            *o++ = offset * (float)(field >> p);
        }
    }
}

static float dot_one(const aq_code_rows *rows, size_t i, const float *x, const float *sums) {
    size_t per = 32 / (size_t)rows->bits, codes = rows->bytes * 8 / (size_t)rows->bits;
    float lanes[AQ_LANES] = {0};
    for (size_t p = 0; p < rows->n_pairs; p++) lanes[p % AQ_LANES] = fmaf(rows->o[i * rows->lines + p], sums[p], lanes[p % AQ_LANES]);
    for (size_t word = 0; word < (rows->bytes + 63) / 64 * AQ_LANES; word++) {
        float part = 0, *lane = &lanes[word % AQ_LANES];
        for (size_t t = 0; t < per; t++) {
            size_t at = word * per + t;
            float q = at < codes ? code_at(rows->codes + i * rows->bytes, at, rows->bits) : 0.0f;
            part = fmaf(q, x[(word / AQ_LANES * per + t) * AQ_LANES + word % AQ_LANES], part);
        }
        *lane = fmaf(rows->s[i * rows->lines + (word >> rows->shift)], part, *lane);
    }
    for (size_t half = AQ_LANES / 2; half > 0; half /= 2)
        for (size_t j = 0; j < half; j++) lanes[j] += lanes[j + half];
    return lanes[0];
}

static void dot_codes(const aq_code_rows *rows, const float *x, size_t x_stride, const float *sums, size_t sums_stride, size_t n_rows, float *out,
                      size_t out_stride) {
    for (size_t r = 0; r < n_rows; r++)
        for (size_t i = 0; i < rows->outputs; i++) out[r * out_stride + i] = dot_one(rows, i, x + r * x_stride, sums + r * sums_stride);
}

/* ---- products of integers ---- */

enum { WORD_ROWS = 4, WORD_COLS = 16 };

static float word_of(int32_t below, int32_t above) { return aq_f32_from_bits(((uint32_t)below & 0xFFFF) | (uint32_t)above << 16); }
static int32_t below(float word) { return (int16_t)(aq_f32_bits(word) & 0xFFFF); }
static int32_t above(float word) { return (int16_t)(aq_f32_bits(word) >> 16); }

/* The power of two between which and half of which the 16-bit integers of inputs lie, largest rounds to 32767 or less. */
static float input_scale(const float *x, size_t n) {
    float largest = 0, scale = 0x1p-126f;
    for (size_t i = 0; i < n; i++) largest = fabsf(x[i]) > largest ? fabsf(x[i]) : largest;
    while (rintf(largest / scale) > AQ_INPUT_TOP) scale *= 2;
    return scale;
}

/* The integers of one row as words in column i, and their sums. */
static void pack_row(const int32_t *integers, size_t i, int bits, const aq_segments *segments, float *words, float *sums) {
    size_t half = 16 / (size_t)bits;
    for (size_t word = 0; word < segments->words; word++) {
        const int32_t *first = integers + word / half * 2 * half + word % half;
        words[word * WORD_ROWS + i] = word_of(first[0], first[half]);
    }
    for (size_t at = 0, k = 0, end = segments->first; at < segments->words; k++, end += segments->width) {
        int32_t sum = 0;
        for (; at < end && at < segments->words; at++) sum += below(words[at * WORD_ROWS + i]) + above(words[at * WORD_ROWS + i]);
        sums[k * WORD_ROWS + i] = (float)sum;
    }
}

static void pack_inputs(const float *const *x, size_t depth, int bits, const aq_segments *segments, float *words, float *scales, float *sums) {
    for (size_t i = 0; i < WORD_ROWS; i++) {
        int32_t integers[AQ_WORD_BLOCK] = {0};
        scales[i] = x[i] ? input_scale(x[i], depth) : 0.0f;
        for (size_t l = 0; x[i] && l < depth; l++) integers[l] = (int32_t)rintf(x[i][l] / scales[i]);
        pack_row(integers, i, bits, segments, words, sums);
    }
}

static void pack_codes(const uint8_t *const *x, size_t depth, int bits, const aq_segments *segments, float *words, float *sums) {
    for (size_t i = 0; i < WORD_ROWS; i++) {
        int32_t integers[AQ_WORD_BLOCK] = {0};
        for (size_t l = 0; x[i] && l < depth; l++) integers[l] = x[i][l] - 128;
        pack_row(integers, i, bits, segments, words, sums);
    }
}

static void unpack_codes(const aq_code_panel *p, float *words) {
    size_t half = 16 / (size_t)p->bits, n = (p->depth + 2 * half - 1) / (2 * half) * half, readable = p->bytes * 8 / (size_t)p->bits;
    for (size_t word = 0; word < n; word++)
        for (size_t i = 0; i < p->width; i++) {
            const uint8_t *row = p->codes + i * p->row_bytes;
            size_t first = word / half * 2 * half + word % half, second = first + half;
            int32_t factor = p->factors ? below(p->factors[word / half / p->factor_words * WORD_COLS + i]) : 1;
            words[word * WORD_COLS + i] = word_of(first < readable ? factor * (int32_t)code_at(row, first, p->bits) : 0,
                                                  second < readable ? factor * (int32_t)code_at(row, second, p->bits) : 0);
        }
}

static float word_product(const aq_word_block *b, size_t i, size_t j, float from) {
    float part = 0;
    for (size_t at = 0, k = 0, end = b->scales.first; at < b->scales.words; k++, end += b->scales.width) {
        int32_t sum = 0;
        for (; at < end && at < b->scales.words; at++) {
            float x = b->x[at * WORD_ROWS + i], w = b->w[at * WORD_COLS + j];
            sum += below(x) * below(w) + above(x) * above(w);
        }
        part = fmaf((float)sum, b->s[k * WORD_COLS + j], part);
    }
    for (size_t k = 0; k < b->n_offsets; k++) part = fmaf(b->o[k * WORD_COLS + j], b->x_sums[k * WORD_ROWS + i], part);
    return fmaf(part, b->x_scales[i], from);
}

static void word_tile(const aq_word_block *b, const float *from, uint64_t from_stride, size_t height, size_t width, float *y, uint64_t y_stride) {
    for (size_t i = 0; i < height; i++)
        for (size_t j = 0; j < width; j++) y[i * y_stride + j] = word_product(b, i, j, from[i * from_stride + j]);
}

static const aq_word_kernels words = {WORD_ROWS, WORD_COLS, 2, pack_inputs, pack_codes, unpack_codes, word_tile};

#define KERNELS aq_kernels_scalar
#define KERNELS_NAME "scalar"
#define WORDS words
#define BYTES words
#include "kernels/table.h"
