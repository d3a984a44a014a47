/* Encoding GGML blocks (see ggml.h) with the searches of this room.
 *
 * A block of 32 is a group with half parameters: Q4_1 w = d q + m, Q4_0 and Q8_0 the symmetric line w = d (q - z). A block of 256 is a two-level group:
 * d = S, dmin = -O, with the sub-groups' small integers. So the parameters are those that the search finds for such a group, never worse than min-max; Q4_0 is
 * also tried with a negative d, whose grid reaches one step further on the other side. Blocks whose scales are too small or too large for the search are
 * rounded to nearest on whatever halves there are.
 */
#include <math.h>
#include <string.h>

#include "base/half.h"
#include "base/mem.h"
#include "quant/ggml_internal.h"
#include "quant/quant_internal.h"

struct aq_ggml_encoder {
    const aq_kernels *kernels;
    aq_lanes lanes;
    float negated[AQ_LANES * 32];
    uint8_t other[AQ_LANES * AQ_GGML_MAX_BYTES];
};

bool aq_ggml_can_encode(const aq_ggml_format *f) {
    return f->type == AQ_GGML_Q8_0 || f->type == AQ_GGML_Q4_0 || f->type == AQ_GGML_Q4_1 || f->type == AQ_GGML_Q4_K || f->type == AQ_GGML_Q2_K;
}

aq_ggml_encoder *aq_ggml_encoder_create(void) {
    aq_ggml_encoder *e = aq_alloc(sizeof *e);
    if (e) e->kernels = aq_kernels_get();
    return e;
}

void aq_ggml_encoder_free(aq_ggml_encoder *encoder) { aq_free(encoder); }

aq_quant_spec aq_ggml_spec(const aq_ggml_format *f) {
    bool k_block = f->n_values == 256;
    return (aq_quant_spec){.bits = f->type == AQ_GGML_Q8_0   ? 8
                                   : f->type == AQ_GGML_Q2_K ? 2
                                                             : 4,
                           .group_size = f->n_values,
                           .axis = 1,
                           .params = k_block ? AQ_PARAMS_TWO_LEVEL : AQ_PARAMS_F16,
                           .method = AQ_METHOD_SEARCH,
                           .symmetric = f->type == AQ_GGML_Q8_0 || f->type == AQ_GGML_Q4_0};
}

/* ---- bytes ---- */

static void put_half(uint8_t *p, uint16_t h) {
    p[0] = (uint8_t)h;
    p[1] = (uint8_t)(h >> 8);
}

static void pack_nibbles(const uint8_t *q, uint8_t *out) {
    for (int i = 0; i < 16; i++) out[i] = (uint8_t)(q[i] | q[i + 16] << 4);
}

static void pack_q4_k(const aq_ggml_parts *p, uint8_t *b) {
    memset(b, 0, 144);
    put_half(b, p->d);
    put_half(b + 2, p->m);
    uint8_t *s = b + 4;
    for (int j = 0; j < 4; j++) {
        s[j] = (uint8_t)(p->k[j] | p->k[j + 4] >> 4 << 6);
        s[j + 4] = (uint8_t)(p->min[j] | p->min[j + 4] >> 4 << 6);
        s[j + 8] = (uint8_t)((p->k[j + 4] & 15) | (p->min[j + 4] & 15) << 4);
    }
    for (int i = 0; i < 256; i++) b[16 + i / 64 * 32 + i % 32] |= (uint8_t)(p->q[i] << (i % 64 / 32 * 4));
}

static void pack_q2_k(const aq_ggml_parts *p, uint8_t *b) {
    memset(b, 0, 84);
    for (int j = 0; j < 16; j++) b[j] = (uint8_t)(p->k[j] | p->min[j] << 4);
    for (int i = 0; i < 256; i++) b[16 + i / 128 * 32 + i % 32] |= (uint8_t)(p->q[i] << (i % 128 / 32 * 2));
    put_half(b + 80, p->d);
    put_half(b + 82, p->m);
}

void aq_ggml_pack(const aq_ggml_format *f, const aq_ggml_parts *p, uint8_t *b) {
    if (f->type == AQ_GGML_Q4_K) {
        pack_q4_k(p, b);
    } else if (f->type == AQ_GGML_Q2_K) {
        pack_q2_k(p, b);
    } else if (f->type == AQ_GGML_Q8_0) {
        put_half(b, p->d);
        for (int i = 0; i < 32; i++) b[2 + i] = (uint8_t)(p->q[i] ^ 0x80);
    } else if (f->type == AQ_GGML_Q4_0) {
        put_half(b, p->d);
        pack_nibbles(p->q, b + 2);
    } else {
        put_half(b, p->d);
        put_half(b + 2, p->m);
        pack_nibbles(p->q, b + 4);
    }
}

/* ---- parameters ---- */

static float clamp_half(double x) { return x > 65504 ? 65504.0f : x < -65504 ? -65504.0f : (float)x; }

/* Codes of a line w = s q + o; s may be 0. */
static void line_codes(const aq_kernels *k, const float *x, size_t n, float s, float o, int q_max, uint8_t *q) {
    if (s > 0)
        k->quantize(x, n, s, (0.0f - o) / s, q_max, q);
    else
        memset(q, 0, n);
}

/* Min-max with halves that may be subnormal, 0 or clamped: for 32 values that the search cannot take. */
static void plain_line(const aq_kernels *k, const aq_quant_spec *spec, const float *x, aq_range range, aq_ggml_parts *p) {
    int q_max = aq_quant_q_max(spec), middle = 1 << (spec->bits - 1);
    double lo = range.lo < 0 ? (double)range.lo : 0, hi = range.hi > 0 ? (double)range.hi : 0;
    double step = spec->symmetric ? (-lo > hi ? -lo : hi) / (middle - 1) : (hi - lo) / q_max;
    p->d = aq_f32_to_f16(clamp_half(step));
    float s = aq_f16_to_f32(p->d);
    p->m = spec->symmetric ? 0 : aq_f32_to_f16(clamp_half(lo));
    line_codes(k, x, 32, s, spec->symmetric ? (float)-middle * s : aq_f16_to_f32(p->m), q_max, p->q);
    if (s == 0 && spec->symmetric) memset(p->q, middle, 32);
}

/* The same for 256 values. */
static void plain_two_level(const aq_kernels *k, const aq_quant_spec *spec, const float *x, aq_ggml_parts *p) {
    int width = (int)aq_two_level_width(spec->bits), n_sub = 256 / width, top = (1 << aq_two_level_field_bits(spec->bits)) - 1, q_max = aq_quant_q_max(spec);
    double lo[16], step[16], lowest = 0, widest = 0;
    for (int j = 0; j < n_sub; j++) {
        float a, b;
        k->range(x + j * width, (size_t)width, &a, &b);
        lo[j] = a < 0 ? (double)a : 0;
        step[j] = ((b > 0 ? (double)b : 0) - lo[j]) / q_max;
        lowest = lo[j] < lowest ? lo[j] : lowest;
        widest = step[j] > widest ? step[j] : widest;
    }
    p->d = aq_f32_to_f16(clamp_half(widest / top));
    p->m = aq_f32_to_f16(clamp_half(-lowest / top));
    double d = (double)aq_f16_to_f32(p->d), dmin = (double)aq_f16_to_f32(p->m);
    for (int j = 0; j < n_sub; j++) {
        double scale = d > 0 ? step[j] / d + 0.5 : 0, min = dmin > 0 ? -lo[j] / dmin + 0.5 : 0;
        p->k[j] = (uint8_t)(scale < top ? scale : top);
        p->min[j] = (uint8_t)(min < top ? min : top);
        line_codes(k, x + j * width, (size_t)width, (float)(d * p->k[j]), (float)(-dmin * p->min[j]), q_max, p->q + j * width);
    }
}

/* ---- batches ---- */

/* Up to 16 blocks of 32, side by side. */
static bool encode_lines(aq_ggml_encoder *e, const aq_ggml_format *f, const float *x, size_t n, uint8_t *out) {
    aq_quant_spec spec = aq_ggml_spec(f);
    aq_values groups[AQ_LANES];
    size_t index[AQ_LANES], n_fit = 0;
    uint8_t slots[AQ_LANES][8];
    void *slot_at[AQ_LANES];
    aq_ggml_parts p = {0};
    for (size_t i = 0; i < n; i++) {
        aq_values v = {x + 32 * i, NULL, 32, 1, 0};
        aq_range range;
        aq_pair pair;
        if (!aq_values_range(e->kernels, &v, &range)) return false;
        if (aq_rtn_pair(&spec, range, slots[n_fit], &pair)) {
            slot_at[n_fit] = slots[n_fit];
            index[n_fit] = i;
            groups[n_fit++] = v;
        } else {
            plain_line(e->kernels, &spec, v.x, range, &p);
            aq_ggml_pack(f, &p, out + i * f->n_bytes);
        }
    }
    if (n_fit == 0) return true;
    if (!aq_lanes_fill(&e->lanes, e->kernels, &spec, groups, n_fit)) return false;
    aq_search_pairs(&e->lanes, &spec, groups, n_fit, slot_at);
    for (size_t j = 0; j < n_fit; j++) {
        aq_pair pair = aq_pair_load(&spec, slots[j]);
        memcpy(&p.d, slots[j], 2);
        memcpy(&p.m, slots[j] + 2, 2);
        e->kernels->quantize(groups[j].x, 32, pair.s, pair.z, aq_quant_q_max(&spec), p.q);
        aq_ggml_pack(f, &p, out + index[j] * f->n_bytes);
    }
    return true;
}

static double block_error(const aq_ggml_format *f, const float *x, const uint8_t *block) {
    float v[AQ_GGML_MAX_BLOCK];
    double sum = 0;
    f->decode(block, v);
    for (uint32_t i = 0; i < f->n_values; i++) sum += ((double)x[i] - (double)v[i]) * ((double)x[i] - (double)v[i]);
    return sum;
}

/* Q4_0 holds -8 d .. 7 d: with a negative d the longer side is the positive one. */
static bool encode_either_sign(aq_ggml_encoder *e, const aq_ggml_format *f, const float *x, size_t n, uint8_t *out) {
    for (size_t i = 0; i < 32 * n; i++) e->negated[i] = -x[i];
    if (!encode_lines(e, f, x, n, out) || !encode_lines(e, f, e->negated, n, e->other)) return false;
    for (size_t i = 0; i < n; i++) {
        uint8_t *mine = out + i * f->n_bytes, *other = e->other + i * f->n_bytes;
        other[1] ^= 0x80; /* the sign of d */
        if (block_error(f, x + 32 * i, other) < block_error(f, x + 32 * i, mine)) memcpy(mine, other, f->n_bytes);
    }
    return true;
}

/* As many blocks of 256 as there are lanes for their sub-groups. */
static bool encode_two_level(aq_ggml_encoder *e, const aq_ggml_format *f, const float *x, size_t n, uint8_t *out) {
    aq_quant_spec spec = aq_ggml_spec(f);
    size_t width = (size_t)aq_two_level_width(spec.bits), n_sub = 256 / width, n_fit = 0;
    aq_values groups[2];
    size_t index[2];
    uint8_t records[2][36];
    void *record_at[2];
    aq_pair pairs[AQ_TWO_LEVEL_MAX_SUB];
    aq_ggml_parts p = {0};
    for (size_t i = 0; i < n; i++) {
        aq_values v = {x + 256 * i, NULL, 256, 1, 0};
        aq_range range;
        if (!aq_values_range(e->kernels, &v, &range)) return false;
        if (aq_rtn_two_level(e->kernels, &spec, &v, records[n_fit], pairs)) {
            record_at[n_fit] = records[n_fit];
            index[n_fit] = i;
            groups[n_fit++] = v;
        } else {
            plain_two_level(e->kernels, &spec, v.x, &p);
            aq_ggml_pack(f, &p, out + i * f->n_bytes);
        }
    }
    if (n_fit == 0) return true;
    if (!aq_lanes_fill_two_level(&e->lanes, e->kernels, &spec, groups, n_fit)) return false;
    aq_search_two_level(&e->lanes, &spec, groups, n_fit, record_at);
    for (size_t i = 0; i < n_fit; i++) {
        aq_two_level r;
        aq_two_level_read(&r, spec.bits, n_sub, records[i]);
        p.d = r.scale;
        p.m = r.offset ? r.offset ^ 0x8000 : 0;
        for (size_t j = 0; j < n_sub; j++) {
            aq_pair pair = aq_two_level_pair(&r, j);
            p.k[j] = r.k[j];
            p.min[j] = r.m[j];
            e->kernels->quantize(groups[i].x + j * width, width, pair.s, pair.z, aq_quant_q_max(&spec), p.q + j * width);
        }
        aq_ggml_pack(f, &p, out + index[i] * f->n_bytes);
    }
    return true;
}

bool aq_ggml_encode(aq_ggml_encoder *e, const aq_ggml_format *f, const float *values, uint64_t n_blocks, uint8_t *blocks) {
    size_t batch = f->n_values == 32 ? AQ_LANES : AQ_LANES / (256 / (size_t)aq_two_level_width(aq_ggml_spec(f).bits));
    for (uint64_t i = 0; i < n_blocks; i += batch) {
        size_t n = n_blocks - i < batch ? (size_t)(n_blocks - i) : batch;
        const float *x = values + i * f->n_values;
        uint8_t *out = blocks + i * f->n_bytes;
        if (!(f->n_values == 256        ? encode_two_level(e, f, x, n, out)
              : f->type == AQ_GGML_Q4_0 ? encode_either_sign(e, f, x, n, out)
                                        : encode_lines(e, f, x, n, out)))
            return false;
    }
    return true;
}
