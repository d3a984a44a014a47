/* Refine: lowers tr(E H E^T) of finished codes, by turns (algorithms 3).
 *
 * - The parameters of a pair (scale and offset; R2Q: middle and both steps) are moved to the least squares of the output's error given every code and all
 *   other pairs. A value is linear in them, v = sum_b p_b phi_b, so with R = E H the move d solves (phi H phi^T) d = phi R^T; it is rounded to the stored form,
 *   the rest following what rounding changed, and taken when it lowers the error. Two-level: first the outer pair of a group in the same way (phi = k q and m),
 *   then each sub-group takes the best point (k, m) of its grid.
 * - Each code of the pair is set to the best one given everything else: v_j + R_j / H_jj, rounded.
 *
 * R of a block of inputs comes from one product with the current E and is kept up to date inside the block, so a round costs one product with H.
 */
#include <math.h>
#include <string.h>

#include "base/half.h"
#include "base/mem.h"
#include "base/size.h"
#include "kernels/gemm.h"
#include "quant/r2q.h"
#include "quant/solve_internal.h"

enum { BLOCK = AQ_SOLVE_BLOCK, MOST_BASES = 3 };

typedef struct work {
    aq_slab *s;
    uint64_t group;         /* inputs per group */
    float *h;               /* [BLOCK, BLOCK] of H, in full */
    float *r, *delta;       /* [BLOCK][16] of 16 rows: R of the block; changes of E */
    float *phi[MOST_BASES]; /* [BLOCK][16] */
    float *h_phi[MOST_BASES];
    float *wide[MOST_BASES]; /* [group][lanes], for groups beyond a block and outer pairs */
    float *wide_h[MOST_BASES];
    aq_two_level *records; /* [lanes] of the group at hand */
} work;

static uint64_t least(uint64_t a, uint64_t b) { return a < b ? a : b; }
static bool is_two_level(const work *t) { return t->s->spec->params == AQ_PARAMS_TWO_LEVEL; }
static size_t n_bases(const aq_quant_spec *spec) { return spec->params == AQ_PARAMS_R2Q ? 3 : spec->symmetric ? 1 : 2; }

/* The bases' values of 16 codes. */
static void bases_of(const aq_quant_spec *spec, const uint8_t *codes, size_t b, float *phi) {
    float middle = spec->symmetric ? (float)(1 << (spec->bits - 1)) : 0.0f;
    for (size_t j = 0; j < AQ_LANES; j++) {
        if (spec->params == AQ_PARAMS_R2Q)
            phi[j] = b == 0 ? 1.0f : codes[j] & (b == 1 ? 2 : 1) ? 1.0f : -1.0f;
        else
            phi[j] = b == 0 ? (float)codes[j] - middle : 1.0f;
    }
}

/* Quadratic of a move d of one lane's parameters: the error changes by d A d - 2 d r. */
typedef struct quadratic {
    double a[MOST_BASES][MOST_BASES], r[MOST_BASES];
    size_t n;
} quadratic;

static double change(const quadratic *f, const double *d) {
    double sum = 0;
    for (size_t b = 0; b < f->n; b++) {
        double row = -2 * f->r[b];
        for (size_t c = 0; c < f->n; c++) row += f->a[b][c] * d[c];
        sum += d[b] * row;
    }
    return sum;
}

/* Minimum over d[from ...] with d[0 ... from - 1] given: Gauss elimination of up to three unknowns. False when it is singular to rounding. */
static bool minimum(const quadratic *f, size_t from, double *d) {
    double a[MOST_BASES][MOST_BASES + 1];
    size_t n = f->n;
    for (size_t b = from; b < n; b++) {
        a[b][n] = f->r[b];
        for (size_t c = 0; c < from; c++) a[b][n] -= f->a[b][c] * d[c];
        for (size_t c = from; c < n; c++) a[b][c] = f->a[b][c];
    }
    for (size_t b = from; b < n; b++) {
        if (!(a[b][b] > 1e-7 * f->a[b][b])) return false;
        for (size_t c = b + 1; c < n; c++) {
            double g = a[c][b] / a[b][b];
            for (size_t k = b; k <= n; k++) a[c][k] -= g * a[b][k];
        }
    }
    for (size_t b = n; b-- > from;) {
        d[b] = a[b][n];
        for (size_t c = b + 1; c < n; c++) d[b] -= a[b][c] * d[c];
        d[b] /= a[b][b];
    }
    return true;
}

/* ---- rounding a move to what can be stored ---- */

static float half_of(double x) { return aq_f16_to_f32(aq_f32_to_f16((float)x)); }

/* Affine pair of one group: the rounded scale first, then the offset that is best beside it. */
static bool move_pair(const work *t, const quadratic *f, uint64_t row, uint64_t group, aq_pair *pair) {
    const aq_quant_spec *spec = t->s->spec;
    double s = (double)pair->s, o = -(double)pair->z * s, d[MOST_BASES] = {0};
    if (!minimum(f, 0, d) || !(s + d[0] > 0)) return false;
    uint8_t slot[8];
    aq_pair moved;
    if (spec->params == AQ_PARAMS_F16 && !spec->symmetric) {
        d[0] = (double)half_of(s + d[0]) - s;
        if (!minimum(f, 1, d)) return false;
    }
    if (!aq_pair_store(spec, s + d[0], o + d[1], slot, &moved) || !aq_pair_reaches(spec, moved)) return false;
    d[0] = (double)moved.s - s;
    d[1] = spec->symmetric ? 0 : -(double)moved.z * (double)moved.s - o;
    if (!(change(f, d) < 0)) return false;
    memcpy(t->s->params + aq_params_offset(spec, t->s->layout, row, group), slot, aq_pair_bytes(spec));
    *pair = moved;
    return true;
}

/* R2Q's levels of one group. */
static bool move_levels(const work *t, const quadratic *f, uint64_t row, uint64_t group, aq_r2q *p) {
    double d[MOST_BASES] = {0};
    uint8_t slot[AQ_R2Q_BYTES];
    aq_r2q moved;
    if (!minimum(f, 0, d)) return false;
    d[1] = (double)half_of((double)p->a1 + d[1]) - (double)p->a1;
    d[2] = (double)half_of((double)p->a2 + d[2]) - (double)p->a2;
    d[0] = (f->r[0] - f->a[0][1] * d[1] - f->a[0][2] * d[2]) / f->a[0][0]; /* the middle that is best beside the rounded steps */
    if (!aq_r2q_store((double)p->m + d[0], (double)p->a1 + d[1], (double)p->a2 + d[2], slot, &moved)) return false;
    d[0] = (double)moved.m - (double)p->m;
    if (!(change(f, d) < 0)) return false;
    memcpy(t->s->params + aq_params_offset(t->s->spec, t->s->layout, row, group), slot, sizeof slot);
    *p = moved;
    return true;
}

/* Levels of one row and group, unless they live in records. */
static bool move_group(const work *t, const quadratic *f, uint64_t row, uint64_t group, aq_levels *levels) {
    uint64_t j = (row - t->s->first) % AQ_LANES;
    if (t->s->spec->params == AQ_PARAMS_R2Q) {
        aq_r2q p = {levels->a[j], levels->b[j], levels->c[j]};
        bool moved = move_levels(t, f, row, group, &p);
        levels->a[j] = p.m;
        levels->b[j] = p.a1;
        levels->c[j] = p.a2;
        return moved;
    }
    aq_pair pair = {levels->a[j], levels->b[j]};
    bool moved = move_pair(t, f, row, group, &pair);
    levels->a[j] = pair.s;
    levels->b[j] = pair.z;
    return moved;
}

/* The best point (k, m) of a sub-group: for each k near the best real one the best m beside it. */
static bool move_on_grid(const work *t, const quadratic *f, aq_two_level *record, uint64_t sub) {
    enum { NEAR = 8 };
    const aq_quant_spec *spec = t->s->spec;
    int top = (1 << aq_two_level_field_bits(spec->bits)) - 1, k0 = record->k[sub], m0 = record->m[sub], best_k = k0, best_m = m0;
    double outer_s = (double)aq_f16_to_f32(record->scale), outer_o = (double)aq_f16_to_f32(record->offset), best = 0, d[MOST_BASES] = {0};
    double wanted = minimum(f, 0, d) ? k0 + d[0] / outer_s : k0;
    int middle = wanted < 1 ? 1 : wanted > top ? top : (int)wanted, first = middle > NEAR ? middle - NEAR : 1;
    bool moves_m = !spec->symmetric && outer_o != 0 && f->a[1][1] > 0;
    for (int k = first; k <= top && k <= middle + NEAR; k++) {
        int m = spec->symmetric ? k : m0;
        d[0] = outer_s * (k - k0);
        if (moves_m) {
            double beside = rint(m0 + (f->r[1] - f->a[0][1] * d[0]) / f->a[1][1] / outer_o);
            m = beside < 0 ? 0 : beside > top ? top : (int)beside;
        }
        d[1] = outer_o * (m - m0);
        double by = change(f, d);
        if (!(by < best)) continue;
        best = by;
        best_k = k;
        best_m = m;
    }
    bool moved = best_k != k0 || best_m != m0;
    record->k[sub] = (uint8_t)best_k;
    record->m[sub] = (uint8_t)best_m;
    return moved;
}

/* Outer pair (S, O) of a group. */
static bool move_outer(const work *t, const quadratic *f, aq_two_level *record) {
    const aq_quant_spec *spec = t->s->spec;
    double s = (double)aq_f16_to_f32(record->scale), o = (double)aq_f16_to_f32(record->offset), d[MOST_BASES] = {0};
    if (!minimum(f, 0, d)) return false;
    double new_s = (double)half_of(s + d[0]), new_o;
    d[0] = new_s - s;
    if (!spec->symmetric && !minimum(f, 1, d)) return false;
    new_o = (double)half_of(spec->symmetric ? -(double)(1 << (spec->bits - 1)) * new_s : o + d[1]);
    d[1] = spec->symmetric ? 0 : new_o - o;
    if (!(new_s >= (double)AQ_MIN_HALF_SCALE && new_s < INFINITY && fabs(new_o) < INFINITY && change(f, d) < 0)) return false;
    record->scale = aq_f32_to_f16((float)new_s);
    record->offset = aq_f32_to_f16((float)new_o);
    return true;
}

/* ---- one pair of 16 rows inside a block ---- */

/* E and R after the levels of inputs [begin, end) changed; R from `begin` to the end of the block [first, last): what lies before is not looked at again. */
static void set_values(work *t, uint64_t lane, uint64_t begin, uint64_t end, uint64_t first, uint64_t last, const aq_levels *levels) {
    aq_slab *s = t->s;
    for (uint64_t i = begin; i < end; i++) {
        float values[AQ_LANES], *delta = t->delta + (i - begin) * AQ_LANES, *e = s->e + i * s->lanes + lane;
        const float *w = s->w + i * s->lanes + lane;
        aq_levels_values(s->spec, levels, s->q + i * s->lanes + lane, values);
        for (size_t j = 0; j < AQ_LANES; j++) {
            float error = w[j] - values[j];
            delta[j] = error - e[j];
            e[j] = error;
        }
    }
    s->kernels->spread(t->delta, end - begin, t->h + (begin - first) * BLOCK + (begin - first), BLOCK, last - begin, t->r + (begin - first) * AQ_LANES,
                       AQ_LANES);
}

/* phi R and phi H phi of 16 rows, from phi and h_phi. */
static void make_quadratics(const work *t, const float *r, size_t width, size_t n, quadratic *f) {
    for (size_t b = 0; b < n; b++)
        for (size_t c = b; c <= n; c++) { /* c = n: with R */
            const float *other = c < n ? t->h_phi[c] : r;
            double sum[AQ_LANES] = {0};
            for (size_t i = 0; i < width; i++)
                for (size_t j = 0; j < AQ_LANES; j++) sum[j] += (double)t->phi[b][i * AQ_LANES + j] * (double)other[i * AQ_LANES + j];
            for (size_t j = 0; j < AQ_LANES; j++) *(c < n ? &f[j].a[b][c] : &f[j].r[b]) = sum[j];
            for (size_t j = 0; c < n && j < AQ_LANES; j++) f[j].a[c][b] = sum[j];
        }
    for (size_t j = 0; j < AQ_LANES; j++) f[j].n = n;
}

static void fit_pair(work *t, uint64_t lane, uint64_t pair, uint64_t begin, uint64_t end, uint64_t first, uint64_t last) {
    aq_slab *s = t->s;
    size_t n = n_bases(s->spec), width = (size_t)(end - begin);
    for (size_t b = 0; b < n; b++) {
        memset(t->h_phi[b], 0, width * AQ_LANES * sizeof(float));
        for (size_t i = 0; i < width; i++) bases_of(s->spec, s->q + (begin + i) * s->lanes + lane, b, t->phi[b] + i * AQ_LANES);
        s->kernels->spread(t->phi[b], width, t->h + (begin - first) * BLOCK + (begin - first), BLOCK, width, t->h_phi[b], AQ_LANES);
    }
    quadratic f[AQ_LANES];
    make_quadratics(t, t->r + (begin - first) * AQ_LANES, width, n, f);
    aq_levels *levels = aq_slab_levels(s, pair, lane);
    bool moved = false;
    for (size_t j = 0; j < AQ_LANES && lane + j < s->rows; j++) {
        if (!is_two_level(t)) {
            moved |= move_group(t, &f[j], s->first + lane + j, pair, levels);
            continue;
        }
        uint64_t sub = pair % (s->spec->group_size / s->layout->pair_width);
        if (!move_on_grid(t, &f[j], &t->records[lane + j], sub)) continue;
        aq_pair p = aq_two_level_pair(&t->records[lane + j], sub);
        moved = true;
        levels->a[j] = p.s;
        levels->b[j] = p.z;
    }
    if (moved) set_values(t, lane, begin, end, first, last, levels);
}

/* Coordinate descent on the codes of inputs [begin, end). What a change does to R is spread at once over the few inputs that come next, for some changes
 * together over the rest of the block. */
static void descend(work *t, uint64_t lane, uint64_t begin, uint64_t end, uint64_t first, uint64_t last, const aq_levels *levels) {
    enum { AT_ONCE = 16 };
    aq_slab *s = t->s;
    for (uint64_t from = begin, next; from < end; from = next) {
        next = least(from + AT_ONCE, end);
        float any = 0;
        memset(t->delta, 0, (next - from) * AQ_LANES * sizeof *t->delta);
        for (uint64_t i = from; i < next; i++) {
            const float *h = t->h + (i - first) * BLOCK, *w = s->w + i * s->lanes + lane;
            float values[AQ_LANES], wanted[AQ_LANES], *r = t->r + (i - first) * AQ_LANES, *delta = t->delta + (i - from) * AQ_LANES;
            float *e = s->e + i * s->lanes + lane, diagonal = h[i - first];
            if (!(s->hessian->importance[i] > 0)) continue;
            for (size_t j = 0; j < AQ_LANES; j++) wanted[j] = w[j] - e[j] + r[j] / diagonal;
            aq_levels_round(s->spec, levels, wanted, s->q + i * s->lanes + lane, values);
            for (size_t j = 0; j < AQ_LANES; j++) {
                float error = w[j] - values[j];
                delta[j] = error - e[j];
                any += fabsf(delta[j]);
                e[j] = error;
            }
            s->kernels->spread(delta, 1, h + (i + 1 - first), BLOCK, next - i - 1, r + AQ_LANES, AQ_LANES);
        }
        const float *rest = t->h + (from - first) * BLOCK + (next - first);
        if (any > 0) s->kernels->spread(t->delta, next - from, rest, BLOCK, last - next, t->r + (next - first) * AQ_LANES, AQ_LANES);
    }
}

/* ---- blocks and groups ---- */

static bool load_block(work *t, uint64_t begin, uint64_t end) {
    aq_hessian_block(t->s->hessian, begin, end, t->h, BLOCK);
    return aq_times_hessian(t->s->hessian, begin, end, 0, t->s->n, t->s->e, t->s->lanes, t->s->t);
}

static bool refine_block(work *t, uint64_t begin, uint64_t end) {
    aq_slab *s = t->s;
    uint64_t width = s->layout->pair_width;
    if (!load_block(t, begin, end)) return false;
    for (uint64_t lane = 0; lane < s->lanes; lane += AQ_LANES) {
        for (uint64_t i = begin; i < end; i++) memcpy(t->r + (i - begin) * AQ_LANES, s->t + (i - begin) * s->lanes + lane, AQ_LANES * sizeof *t->r);
        for (uint64_t i = begin; i < end;) {
            uint64_t pair = i / width, next = least(least((pair + 1) * width, s->n), end);
            if (width <= BLOCK) fit_pair(t, lane, pair, i, next, begin, end);
            descend(t, lane, i, next, begin, end, aq_slab_levels(s, pair, lane));
            i = next;
        }
    }
    return true;
}

/* Parameters that cover more than a block: the pair of a large group, or the outer pair of a two-level one. */
static bool fit_wide(work *t, uint64_t group, uint64_t begin, uint64_t end) {
    aq_slab *s = t->s;
    size_t n = n_bases(s->spec);
    uint64_t width = end - begin, lanes = s->lanes;
    if (!aq_times_hessian(s->hessian, begin, end, 0, s->n, s->e, lanes, s->t)) return false;
    for (size_t b = 0; b < n; b++) {
        for (uint64_t i = 0; i < width; i++)
            for (uint64_t lane = 0; lane < lanes; lane += AQ_LANES) {
                float *phi = t->wide[b] + i * lanes + lane;
                bases_of(s->spec, s->q + (begin + i) * lanes + lane, b, phi);
                for (uint64_t j = 0; is_two_level(t) && j < AQ_LANES && lane + j < s->rows; j++) {
                    const aq_two_level *record = &t->records[lane + j];
                    uint64_t sub = i / s->layout->pair_width;
                    phi[j] *= (float)(b == 0 ? record->k[sub] : record->m[sub]);
                }
            }
        if (!aq_times_hessian(s->hessian, begin, end, begin, end, t->wide[b], lanes, t->wide_h[b])) return false;
    }
    for (uint64_t row = 0; row < s->rows; row++) {
        quadratic f = {.n = n};
        for (uint64_t i = 0; i < width; i++)
            for (size_t b = 0; b < n; b++) {
                double phi = (double)t->wide[b][i * lanes + row];
                f.r[b] += phi * (double)s->t[i * lanes + row];
                for (size_t c = 0; c < n; c++) f.a[b][c] += phi * (double)t->wide_h[c][i * lanes + row];
            }
        if (is_two_level(t))
            move_outer(t, &f, &t->records[row]);
        else
            move_group(t, &f, s->first + row, group, aq_slab_levels(s, group, row));
    }
    return true;
}

static void read_records(work *t, uint64_t group, uint64_t n_sub) {
    const aq_slab *s = t->s;
    for (uint64_t row = 0; row < s->rows; row++)
        aq_two_level_read(&t->records[row], s->spec->bits, n_sub, s->params + aq_params_offset(s->spec, s->layout, s->first + row, group));
}

static void write_records(work *t, uint64_t group, uint64_t n_sub) {
    aq_slab *s = t->s;
    for (uint64_t row = 0; row < s->rows; row++)
        aq_two_level_write(&t->records[row], s->spec->bits, n_sub, s->params + aq_params_offset(s->spec, s->layout, s->first + row, group));
}

static bool refine_group(work *t, uint64_t group, uint64_t begin, uint64_t end) {
    aq_slab *s = t->s;
    uint64_t n_sub = aq_div_up(end - begin, s->layout->pair_width);
    if (is_two_level(t)) read_records(t, group, n_sub);
    if (!fit_wide(t, group, begin, end)) return false;
    if (is_two_level(t)) {
        write_records(t, group, n_sub);
        aq_slab_load_levels(s, group);
    }
    aq_slab_errors(s, begin, end);
    bool ok = true;
    for (uint64_t i = begin; ok && i < end; i += BLOCK) ok = aq_slab_going(s) && refine_block(t, i, least(i + BLOCK, end));
    if (is_two_level(t)) write_records(t, group, n_sub);
    return ok;
}

static bool refine_round(work *t) {
    aq_slab *s = t->s;
    bool wide = is_two_level(t) || t->group > BLOCK;
    uint64_t unit = wide ? t->group : BLOCK / t->group * t->group;
    for (uint64_t begin = 0; begin < s->n; begin += unit) {
        uint64_t end = least(begin + unit, s->n);
        if (!aq_slab_going(s) || !(wide ? refine_group(t, begin / unit, begin, end) : refine_block(t, begin, end))) return false;
    }
    return true;
}

bool aq_slab_refine(aq_slab *s, int rounds) {
    work t = {.s = s, .group = s->spec->group_size && s->spec->group_size < s->n ? s->spec->group_size : s->n};
    bool wide = is_two_level(&t) || t.group > BLOCK, ok = true;
    t.h = aq_alloc(BLOCK * BLOCK * sizeof *t.h);
    t.records = aq_calloc(s->lanes, sizeof *t.records);
    t.r = aq_alloc(BLOCK * AQ_LANES * sizeof *t.r);
    t.delta = aq_alloc(BLOCK * AQ_LANES * sizeof *t.delta);
    for (size_t b = 0; b < MOST_BASES; b++) {
        t.phi[b] = aq_alloc(BLOCK * AQ_LANES * sizeof(float));
        t.h_phi[b] = aq_alloc(BLOCK * AQ_LANES * sizeof(float));
        t.wide[b] = aq_calloc(wide && b < n_bases(s->spec) ? t.group * s->lanes : 1, sizeof(float));
        t.wide_h[b] = aq_calloc(wide && b < n_bases(s->spec) ? t.group * s->lanes : 1, sizeof(float));
        ok = ok && t.phi[b] && t.h_phi[b] && t.wide[b] && t.wide_h[b];
    }
    ok = ok && t.h && t.records && t.r && t.delta;
    for (int i = 0; ok && i < rounds; i++) ok = refine_round(&t);
    if (!ok && !s->interrupted) s->no_memory = true;
    aq_free(t.h);
    aq_free(t.records);
    aq_free(t.r);
    aq_free(t.delta);
    for (size_t b = 0; b < MOST_BASES; b++) {
        aq_free(t.phi[b]);
        aq_free(t.h_phi[b]);
        aq_free(t.wide[b]);
        aq_free(t.wide_h[b]);
    }
    return ok;
}
