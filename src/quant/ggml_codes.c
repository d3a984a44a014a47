/* Our codes as GGML blocks (see ggml.h), where the grids agree.
 *
 * A code's value is w = s q + o with o = -z s. In the half form s and o are what is stored, so a line of 32 weights is Q4_1's d = s, m = o; with a whole zero
 * point z it is the d (q - z') of Q4_0 and Q8_0. A two-level group of 256 is Q4_K or Q2_K: d = S, dmin = -O, the same small integers; so is a longer
 * group of one pair, with all small integers 1.
 */
#include <math.h>
#include <string.h>

#include "base/half.h"
#include "quant/ggml_internal.h"
#include "quant/quant_internal.h"

/* Codes [col, col + n) of a row, one byte each. */
static void unpack(const aq_ggml_codes *c, uint64_t row, uint64_t col, int n, uint8_t *q) {
    int bits = c->spec->bits, mask = (1 << bits) - 1;
    const uint8_t *packed = c->codes + row * c->layout->row_bytes;
    for (int i = 0; i < n; i++) {
        uint64_t bit = (col + (uint64_t)i) * (uint64_t)bits;
        q[i] = (uint8_t)(packed[bit / 8] >> (bit % 8) & mask);
    }
}

/* The group of columns [col, col + n) of a row, when they are all in one: which and where its parameters are. */
static const uint8_t *group_at(const aq_ggml_codes *c, uint64_t row, uint64_t col, uint64_t n, uint64_t *begin) {
    uint64_t size = c->spec->group_size;
    *begin = 0;
    if (c->spec->axis == 0) return (const uint8_t *)c->params + aq_params_offset(c->spec, c->layout, size ? row / size : 0, 0);
    if (size == 0) size = c->layout->cols;
    if (col / size != (col + n - 1) / size) return NULL;
    *begin = col / size * size;
    return (const uint8_t *)c->params + aq_params_offset(c->spec, c->layout, row, col / size);
}

/* The line of 32 columns, exact in double. False when they do not share one. */
static bool line_at(const aq_ggml_codes *c, uint64_t row, uint64_t col, double *s, double *o) {
    uint64_t begin;
    const uint8_t *slot = group_at(c, row, col, 32, &begin);
    if (!slot) return false;
    if (c->spec->params == AQ_PARAMS_F16) {
        uint16_t halves[2];
        memcpy(halves, slot, 4);
        *s = (double)aq_f16_to_f32(halves[0]);
        *o = (double)aq_f16_to_f32(halves[1]);
    } else if (c->spec->params == AQ_PARAMS_F32) {
        aq_pair pair = aq_pair_load(c->spec, slot);
        *s = (double)pair.s;
        *o = -(double)pair.z * (double)pair.s;
    } else if (c->spec->params == AQ_PARAMS_TWO_LEVEL && c->spec->bits == 4 && (col - begin) % 32 == 0) {
        aq_two_level r;
        uint64_t in_group = c->layout->cols - begin < c->spec->group_size ? c->layout->cols - begin : c->spec->group_size;
        aq_two_level_read(&r, 4, (in_group + 31) / 32, slot);
        uint64_t j = (col - begin) / 32;
        *s = (double)aq_f16_to_f32(r.scale) * r.k[j];
        *o = (double)aq_f16_to_f32(r.offset) * r.m[j];
    } else {
        return false;
    }
    return true;
}

/* Nearest half of x; false when that is no number or 0 for something else. */
static bool to_half(double x, uint16_t *half, bool *exact) {
    *half = aq_f32_to_f16((float)x);
    float back = aq_f16_to_f32(*half);
    *exact &= (double)back == x;
    return isfinite(back) && (back != 0 || x == 0);
}

static aq_ggml_fit take_line(const aq_ggml_format *f, const aq_ggml_codes *c, uint64_t row, uint64_t col, aq_ggml_parts *p) {
    double s, o;
    bool exact = true;
    if (f->type != AQ_GGML_Q8_0 && c->spec->bits > 4) return AQ_GGML_NO_FIT;
    if (!line_at(c, row, col, &s, &o) || !to_half(s, &p->d, &exact)) return AQ_GGML_NO_FIT;
    unpack(c, row, col, 32, p->q);
    if (f->type == AQ_GGML_Q4_1) return to_half(o, &p->m, &exact) ? (exact ? AQ_GGML_EXACT : AQ_GGML_ROUNDED) : AQ_GGML_NO_FIT;
    /* w = s (q + shift) with a whole shift, stored as the code q + shift + middle */
    double shift = o / s;
    int most = aq_quant_q_max(&(aq_quant_spec){.bits = f->type == AQ_GGML_Q8_0 ? 8 : 4}), middle = (most + 1) / 2;
    if (shift != floor(shift) || fabs(shift) > 256) return AQ_GGML_NO_FIT;
    for (int i = 0; i < 32; i++) {
        int q = p->q[i] + (int)shift + middle;
        if (q < 0 || q > most) return AQ_GGML_NO_FIT;
        p->q[i] = (uint8_t)q;
    }
    return exact ? AQ_GGML_EXACT : AQ_GGML_ROUNDED;
}

static aq_ggml_fit take_two_level(const aq_ggml_format *f, const aq_ggml_codes *c, uint64_t row, uint64_t col, aq_ggml_parts *p) {
    int bits = f->type == AQ_GGML_Q2_K ? 2 : 4, n_sub = 256 / (int)aq_two_level_width(bits), top = (1 << aq_two_level_field_bits(bits)) - 1;
    uint64_t begin;
    const uint8_t *slot = c->spec->bits <= bits ? group_at(c, row, col, 256, &begin) : NULL;
    if (!slot) return AQ_GGML_NO_FIT;
    if (c->spec->params == AQ_PARAMS_F16) {
        memcpy(&p->d, slot, 2);
        memcpy(&p->m, slot + 2, 2);
        memset(p->k, 1, sizeof p->k);
        memset(p->min, 1, sizeof p->min);
    } else if (c->spec->params == AQ_PARAMS_TWO_LEVEL && c->spec->bits == bits && begin == col) {
        aq_two_level r;
        aq_two_level_read(&r, bits, (uint64_t)n_sub, slot);
        p->d = r.scale;
        p->m = r.offset;
        for (int j = 0; j < n_sub; j++) {
            if (r.k[j] > top) return AQ_GGML_NO_FIT;
            p->k[j] = r.k[j];
            p->min[j] = r.m[j];
        }
    } else {
        return AQ_GGML_NO_FIT;
    }
    p->m = p->m & 0x7FFF ? p->m ^ 0x8000 : 0; /* dmin is subtracted */
    unpack(c, row, col, 256, p->q);
    return AQ_GGML_EXACT;
}

aq_ggml_fit aq_ggml_take_codes(const aq_ggml_format *f, const aq_ggml_codes *c, uint64_t row, uint64_t col, uint8_t *block) {
    aq_ggml_parts p;
    aq_ggml_fit fit = f->n_values == 256 ? take_two_level(f, c, row, col, &p) : take_line(f, c, row, col, &p);
    if (fit != AQ_GGML_NO_FIT) aq_ggml_pack(f, &p, block);
    return fit;
}
