/* GPTQ (Frantar et al., ICLR 2023, Algorithm 1) as error feedback through the factor of H (hessian.c).
 *
 * Inputs are coded one after the other; each code is chosen for w_j + sum_{i<j} e_i U_ij. Errors are spread at once inside a block of inputs, and by matrix
 * products over those further on, the inputs being halved again and again. A group's parameters are searched when it is entered, on those updated weights and
 * with the diagonal of H; codes then are chosen on the stored form. With act_order the inputs are visited by falling H_ii and parameters come first, from the
 * weights themselves.
 */
#include <math.h>
#include <string.h>

#include "base/size.h"
#include "kernels/gemm.h"
#include "quant/r2q.h"
#include "quant/solve_internal.h"

/* ---- levels ---- */

static inline float clamp_round(float t, float top) {
    t = t > 0 ? t : 0.0f;
    t = t < top ? t : top;
    return t + 12582912.0f - 12582912.0f; /* half to even */
}

void aq_levels_values(const aq_quant_spec *spec, const aq_levels *levels, const uint8_t *codes, float *values) {
    if (spec->params == AQ_PARAMS_R2Q) {
        for (size_t j = 0; j < AQ_LANES; j++) {
            float sum = levels->a[j] + (codes[j] & 2 ? levels->b[j] : -levels->b[j]);
            values[j] = sum + (codes[j] & 1 ? levels->c[j] : -levels->c[j]);
        }
        return;
    }
    for (size_t j = 0; j < AQ_LANES; j++) values[j] = ((float)codes[j] - levels->b[j]) * levels->a[j];
}

void aq_levels_round(const aq_quant_spec *spec, const aq_levels *levels, const float *x, uint8_t *codes, float *values) {
    if (spec->params == AQ_PARAMS_R2Q) { /* a1 >= a2 >= 0: the nearest level, sign by sign */
        for (size_t j = 0; j < AQ_LANES; j++) {
            bool first = x[j] >= levels->a[j];
            float rest = x[j] - (levels->a[j] + (first ? levels->b[j] : -levels->b[j]));
            codes[j] = (uint8_t)(first << 1 | (rest >= 0));
        }
        aq_levels_values(spec, levels, codes, values);
        return;
    }
    float top = (float)aq_quant_q_max(spec);
    for (size_t j = 0; j < AQ_LANES; j++) {
        float q = clamp_round(x[j] / levels->a[j] + levels->b[j], top);
        codes[j] = (uint8_t)q;
        values[j] = (q - levels->b[j]) * levels->a[j];
    }
}

static uint64_t group_size(const aq_slab *s) { return s->spec->group_size && s->spec->group_size < s->n ? s->spec->group_size : s->n; }
static uint64_t at_most(uint64_t x, uint64_t limit) { return x < limit ? x : limit; }

void aq_slab_load_levels(aq_slab *s, uint64_t group) {
    uint64_t per_group = aq_div_up(group_size(s), s->layout->pair_width), first = group * per_group;
    uint64_t n_pairs = at_most(per_group, s->layout->pairs_per_row - first);
    for (uint64_t lane = 0; s->spec->params == AQ_PARAMS_R2Q && lane < s->lanes; lane++) {
        aq_r2q p = {0, 0, 0};
        if (lane < s->rows) p = aq_r2q_load(s->params + aq_params_offset(s->spec, s->layout, s->first + lane, group));
        aq_levels *l = aq_slab_levels(s, group, lane);
        l->a[lane % AQ_LANES] = p.m;
        l->b[lane % AQ_LANES] = p.a1;
        l->c[lane % AQ_LANES] = p.a2;
    }
    for (uint64_t lane = 0; s->spec->params != AQ_PARAMS_R2Q && lane < s->lanes; lane++) {
        aq_pair pairs[AQ_TWO_LEVEL_MAX_SUB];
        for (uint64_t i = 0; i < n_pairs; i++) pairs[i] = (aq_pair){1, 0};
        if (lane < s->rows) aq_pairs_load(s->spec, s->layout, s->params, s->first + lane, group, 1, pairs);
        for (uint64_t i = 0; i < n_pairs; i++) {
            aq_levels *l = aq_slab_levels(s, first + i, lane);
            l->a[lane % AQ_LANES] = pairs[i].s;
            l->b[lane % AQ_LANES] = pairs[i].z;
        }
    }
}

/* Searches the parameters of group `group`, whose weights stand in x [size][lanes]. */
static bool search_group(aq_slab *s, uint64_t group, const float *x) {
    uint64_t begin = group * group_size(s), size = at_most(group_size(s), s->n - begin);
    const float *importance = s->hessian->importance + begin;
    uint64_t together = size > AQ_NARROW ? 1 : aq_search_capacity(s->spec);
    for (uint64_t first = 0; first < s->rows; first += together) {
        aq_values values[AQ_LANES];
        void *slots[AQ_LANES];
        size_t n = (size_t)at_most(together, s->rows - first), stored;
        for (uint64_t i = 0; i < size; i++)
            for (size_t j = 0; j < n; j++) s->rows_of_group[j * size + i] = x[i * s->lanes + first + j];
        for (size_t j = 0; j < n; j++) {
            values[j] = (aq_values){s->rows_of_group + j * size, importance, size, 1, size};
            slots[j] = s->params + aq_params_offset(s->spec, s->layout, s->first + first + j, group);
        }
        if (!aq_search_batch(s->search, s->kernels, s->spec, values, n, slots, &stored)) return false;
        if (stored < n) return false; /* a pair does not fit half precision */
    }
    aq_slab_load_levels(s, group);
    for (uint64_t lane = 0; s->spec->params == AQ_PARAMS_F32 && lane < s->rows; lane++) {
        const aq_levels *l = aq_slab_levels(s, group, lane);
        if (!aq_pair_reaches(s->spec, (aq_pair){l->a[lane % AQ_LANES], l->b[lane % AQ_LANES]})) return false;
    }
    return true;
}

enum { AT_ONCE = 16 }; /* inputs whose errors are spread together beyond them */

/* Codes 16 rows' inputs [begin, end) of the order of visiting, whose updated weights are t [last - begin][16], and spreads the errors over the rest of t. */
static void code_lanes(aq_slab *s, uint64_t lane, uint64_t begin, uint64_t end, uint64_t last, float *t) {
    const aq_hessian *h = s->hessian;
    uint64_t width = s->layout->pair_width;
    for (uint64_t first = begin, next; first < end; first = next) {
        float errors[AT_ONCE * AQ_LANES];
        next = at_most(first + AT_ONCE, end);
        for (uint64_t i = first; i < next; i++) {
            uint64_t input = h->order ? h->order[i] : i;
            float values[AQ_LANES], *e = errors + (i - first) * AQ_LANES, *x = t + (i - begin) * AQ_LANES;
            const float *w = s->w + input * s->lanes + lane;
            aq_levels_round(s->spec, aq_slab_levels(s, input / width, lane), x, s->q + input * s->lanes + lane, values);
            for (size_t j = 0; j < AQ_LANES; j++) e[j] = w[j] - values[j];
            memcpy(s->e + i * s->lanes + lane, e, AQ_LANES * sizeof *e);
            s->kernels->spread(e, 1, h->packed + i * h->n + i + 1, h->n, next - i - 1, x + AQ_LANES, AQ_LANES);
        }
        s->kernels->spread(errors, next - first, h->packed + first * h->n + next, h->n, last - next, t + (next - begin) * AQ_LANES, AQ_LANES);
    }
}

/* Codes inputs [begin, end) of the order of visiting, at most a block, whose updated weights stand in E, and spreads each error over those behind it up to
 * `last`. */
static void code_inputs(aq_slab *s, uint64_t begin, uint64_t end, uint64_t last) {
    float t[AQ_SOLVE_BLOCK * AQ_LANES]; /* of 16 rows, side by side in the first cache */
    for (uint64_t lane = 0; lane < s->lanes; lane += AQ_LANES) {
        float *x = s->e + begin * s->lanes + lane;
        for (uint64_t i = begin; i < last; i++) memcpy(t + (i - begin) * AQ_LANES, x + (i - begin) * s->lanes, AQ_LANES * sizeof *t);
        code_lanes(s, lane, begin, end, last, t);
        for (uint64_t i = end; i < last; i++) memcpy(x + (i - begin) * s->lanes, t + (i - begin) * AQ_LANES, AQ_LANES * sizeof *t);
    }
}

/* What stands in E of inputs [middle, end), their updated weights, takes the errors of [begin, middle). */
static bool feed_forward(aq_slab *s, uint64_t begin, uint64_t middle, uint64_t end) {
    const aq_hessian *h = s->hessian;
    aq_matrix_f32 u = {h->packed + begin * h->n + middle, 1, h->n}, e = {s->e + begin * s->lanes, s->lanes, 1};
    if (aq_gemm_f32(end - middle, s->lanes, middle - begin, u, e, s->e + middle * s->lanes, s->lanes, false, AQ_GEMM_FULL, 1)) return true;
    s->no_memory = true;
    return false;
}

bool aq_slab_going(aq_slab *s) {
    if (s->keep_going && !s->keep_going(s->user)) s->interrupted = true;
    return !s->interrupted;
}

/* At most a block, which holds whole groups when they get their parameters here. */
static bool code_block(aq_slab *s, uint64_t begin, uint64_t end) {
    uint64_t size = group_size(s);
    if (!aq_slab_going(s)) return false;
    if (s->hessian->order || size > AQ_SOLVE_BLOCK) {
        code_inputs(s, begin, end, end);
        return true;
    }
    for (uint64_t i = begin; i < end; i += size) {
        if (!search_group(s, i / size, s->e + i * s->lanes)) return false;
        code_inputs(s, i, at_most(i + size, end), end);
    }
    return true;
}

/* Inputs [begin, end) of the order of visiting, cut where a whole number of `unit`s begins: the first part is coded, its errors go to the second by one
 * product, the second is coded. Nearly all of the work thus lies in products of hundreds of steps. Errors take the place of updated weights in E. */
static bool code_range(aq_slab *s, uint64_t begin, uint64_t end, uint64_t unit) {
    uint64_t size = group_size(s), first = unit;
    if (unit > AQ_SOLVE_BLOCK && end - begin <= unit) { /* a group on its own */
        if (!search_group(s, begin / size, s->e + begin * s->lanes)) return false;
        first = unit = AQ_SOLVE_BLOCK;
    }
    if (end - begin <= unit) return code_block(s, begin, end);
    while (2 * first < end - begin) first *= 2;
    return code_range(s, begin, begin + first, unit) && feed_forward(s, begin, begin + first, end) && code_range(s, begin + first, end, unit);
}

void aq_slab_errors(aq_slab *s, uint64_t begin, uint64_t end) {
    for (uint64_t i = begin; i < end; i++)
        for (uint64_t lane = 0; lane < s->lanes; lane += AQ_LANES) {
            float values[AQ_LANES];
            uint64_t at = i * s->lanes + lane;
            aq_levels_values(s->spec, aq_slab_levels(s, i / s->layout->pair_width, lane), s->q + at, values);
            for (size_t j = 0; j < AQ_LANES; j++) s->e[at + j] = s->w[at + j] - values[j];
        }
}

bool aq_slab_search(aq_slab *s) {
    uint64_t size = group_size(s);
    for (uint64_t begin = 0; begin < s->n; begin += size)
        if (!aq_slab_going(s) || !search_group(s, begin / size, s->w + begin * s->lanes)) return false;
    for (uint64_t i = 0; i < s->n; i++)
        for (uint64_t lane = 0; lane < s->lanes; lane += AQ_LANES) {
            float values[AQ_LANES];
            uint64_t at = i * s->lanes + lane;
            aq_levels_round(s->spec, aq_slab_levels(s, i / s->layout->pair_width, lane), s->w + at, s->q + at, values);
        }
    aq_slab_errors(s, 0, s->n);
    return true;
}

bool aq_slab_gptq(aq_slab *s) {
    uint64_t size = group_size(s);
    if (!s->hessian->order) {
        memcpy(s->e, s->w, s->n * s->lanes * sizeof *s->e);
        return code_range(s, 0, s->n, size > AQ_SOLVE_BLOCK ? size : AQ_SOLVE_BLOCK / size * size);
    }
    for (uint64_t begin = 0; begin < s->n; begin += size)
        if (!search_group(s, begin / size, s->w + begin * s->lanes)) return false;
    for (uint64_t i = 0; i < s->n; i++) memcpy(s->e + i * s->lanes, s->w + s->hessian->order[i] * s->lanes, s->lanes * sizeof *s->e);
    if (!code_range(s, 0, s->n, AQ_SOLVE_BLOCK)) return false;
    aq_slab_errors(s, 0, s->n);
    return true;
}
