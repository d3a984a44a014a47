/* Two-level parameters: sub-groups of 16 or 32 values whose scale and offset are small multiples of the group's (algorithms 1 and 2).
 *
 * Search: the sub-groups' lines are found freely, side by side in the lanes; an outer pair that reaches the largest of them makes a grid; each
 * sub-group moves to the best of its neighbouring grid points; then, by turns, the outer pair is fitted by least squares to all codes of the group
 * and the sub-groups move again. Sub-groups are independent once the outer pair is fixed, so one pass tries one move for all of them.
 */
#include "quant/quant_internal.h"

#include <math.h>

#include "base/half.h"

static float middle(const aq_quant_spec *spec) { return (float)(1 << (spec->bits - 1)); }
/* The nearest whole number in [low, high]; 0 / 0 gives low. */
static float grid(float x, float low, float high) {
    x = x > low ? x : low;
    x = x < high ? x : high;
    return x + 12582912.0f - 12582912.0f;
}

/* The stored form would hold k up to 2^p; one less costs 0.006 dB at 2 bits, and makes full groups of 256 the blocks Q2_K and Q4_K of GGUF, code for code. */
static aq_grid_limits limits_of(const aq_quant_spec *spec) {
    float top = (float)((1 << aq_two_level_field_bits(spec->bits)) - 1);
    /* Symmetric: o = -middle s, so that m repeats k and O = -middle S. */
    return spec->symmetric ? (aq_grid_limits){top, 1, top} : (aq_grid_limits){top, 0, top};
}

/* Rounds an outer pair to halves; false when it does not fit. */
static bool round_outer(const aq_quant_spec *spec, float s, float o, float *outer_s, float *outer_o) {
    *outer_s = aq_f16_to_f32(aq_f32_to_f16(s));
    *outer_o = aq_f16_to_f32(aq_f32_to_f16(spec->symmetric ? -middle(spec) * *outer_s : o));
    return *outer_s >= AQ_MIN_HALF_SCALE && *outer_s<INFINITY && * outer_o> - INFINITY && *outer_o < INFINITY;
}

/* Puts the lines of lanes [first, first + n_sub) on the grid of an outer pair that reaches the largest scale and offset among them. */
static bool start_grid(const aq_quant_spec *spec, const float *s, const float *o, size_t first, size_t n_sub, aq_grid *g) {
    aq_grid_limits limits = limits_of(spec);
    float s_max = 0, o_low = 0, o_high = 0, outer_s = 1, outer_o = 0;
    for (size_t j = first; j < first + n_sub; j++) {
        s_max = s[j] > s_max ? s[j] : s_max;
        o_low = o[j] < o_low ? o[j] : o_low;
        o_high = o[j] > o_high ? o[j] : o_high;
    }
    /* All zero: S = 1, O = 0. */
    if (s_max > 0 && !round_outer(spec, s_max / limits.k_top, (o_high > -o_low ? o_high : o_low) / limits.m_top, &outer_s, &outer_o)) return false;
    for (size_t j = first; j < first + n_sub; j++) {
        g->outer_s[j] = outer_s;
        g->outer_o[j] = outer_o;
        g->k[j] = grid(s[j] / outer_s, 1, limits.k_top);
        g->m[j] = grid(o[j] / outer_o, limits.m_low, limits.m_top);
    }
    if (!spec->symmetric) return true;
    for (size_t j = first; j < first + n_sub; j++) g->m[j] = g->k[j];
    return true;
}

static aq_two_level record_of(const aq_grid *g, size_t first, size_t n_sub) {
    aq_two_level r = {.scale = aq_f32_to_f16(g->outer_s[first]), .offset = aq_f32_to_f16(g->outer_o[first])};
    for (size_t j = 0; j < n_sub; j++) {
        r.k[j] = (uint8_t)g->k[first + j];
        r.m[j] = (uint8_t)g->m[first + j];
    }
    return r;
}

/* Sub-group j of a group. */
static aq_values sub_group(const aq_quant_spec *spec, const aq_values *v, size_t j) {
    uint64_t width = aq_two_level_width(spec->bits), begin = j * width;
    return (aq_values){v->x + begin, v->h ? v->h + begin : NULL, v->n - begin < width ? v->n - begin : width, 1, 0};
}
static size_t sub_count(const aq_quant_spec *spec, const aq_values *v) {
    return (size_t)((v->n + aq_two_level_width(spec->bits) - 1) / aq_two_level_width(spec->bits));
}

/* Min-max: the line of each sub-group's range, widened to contain 0, put on the grid. */
static bool rtn_grid(const aq_quant_spec *spec, const float *low, const float *high, size_t first, size_t n_sub, aq_grid *g) {
    float s[AQ_LANES] = {0}, o[AQ_LANES] = {0}, q_max = (float)aq_quant_q_max(spec), mid = middle(spec);
    for (size_t j = first; j < first + n_sub; j++) {
        float lo = low[j] < 0 ? low[j] : 0.0f, hi = high[j] > 0 ? high[j] : 0.0f;
        s[j] = (float)(((double)hi - (double)lo) / (double)q_max);
        o[j] = lo;
        if (!spec->symmetric) continue;
        s[j] = -lo / mid > hi / (q_max - mid) ? -lo / mid : hi / (q_max - mid);
        o[j] = -mid * s[j];
    }
    return start_grid(spec, s, o, first, n_sub, g);
}

bool aq_rtn_two_level(const aq_kernels *k, const aq_quant_spec *spec, const aq_values *values, uint8_t *record, aq_pair *out) {
    size_t n_sub = sub_count(spec, values);
    float low[AQ_LANES], high[AQ_LANES];
    aq_grid g;
    for (size_t j = 0; j < n_sub; j++) {
        aq_values sub = sub_group(spec, values, j);
        k->range(sub.x, sub.n, &low[j], &high[j]);
    }
    if (!rtn_grid(spec, low, high, 0, n_sub, &g)) return false;
    aq_two_level r = record_of(&g, 0, n_sub);
    aq_two_level_write(&r, spec->bits, n_sub, record);
    for (size_t j = 0; j < n_sub; j++) out[j] = aq_two_level_pair(&r, j);
    return true;
}

/* ---- search ---- */

typedef struct search {
    aq_lanes *lanes;
    const aq_quant_spec *spec;
    size_t n_groups, n_sub;  /* lane of sub-group j of group i: i * n_sub + j */
    bool searched[AQ_LANES]; /* per group */
} search;

/* Lanes [first, first + n) of a grid. */
static void copy_lanes(const aq_grid *from, size_t first, size_t n, aq_grid *to) {
    for (size_t j = first; j < first + n; j++) {
        to->outer_s[j] = from->outer_s[j];
        to->outer_o[j] = from->outer_o[j];
        to->k[j] = from->k[j];
        to->m[j] = from->m[j];
        to->error[j] = from->error[j];
    }
}

/* The best of each lane's grid point and its neighbours: in k alone (rounds = 1), then in m too (2). */
static void move(const search *t, const aq_grid *from, size_t rounds, aq_grid *best) {
    static const float dk[2][3] = {{0, -1, 1}, {0, 0, 1}}, dm[2][3] = {{0, 0, 0}, {-1, 1, 1}}; /* its own first: ties stay */
    aq_grid_limits limits = limits_of(t->spec);
    copy_lanes(from, 0, AQ_LANES, best);
    for (size_t j = 0; j < AQ_LANES; j++) best->error[j] = INFINITY;
    if (t->spec->symmetric) { /* m goes with k */
        t->lanes->kernels->grid_try(&t->lanes->block, t->lanes->q_max, from, dk[0], dk[0], &limits, best);
        return;
    }
    for (size_t i = 0; i < rounds; i++) t->lanes->kernels->grid_try(&t->lanes->block, t->lanes->q_max, from, dk[i], dm[i], &limits, best);
}

/* Least squares of S and O given every code, k and m of the group: residuals r = x - (S k q + O m), so dS, dO solve a 2 x 2 system. */
static void refit_outer(const search *t, const aq_fit_sums *f, size_t first, aq_grid *g) {
    double a11 = 0, a12 = 0, a22 = 0, b1 = 0, b2 = 0, mid = t->spec->symmetric ? (double)middle(t->spec) : 0;
    for (size_t j = first; j < first + t->n_sub; j++) {
        double k = (double)g->k[j], m = (double)g->m[j], n = (double)t->lanes->weight[j], q = (double)f->q[j];
        a11 += k * k * ((double)f->qq[j] - 2 * mid * q + mid * mid * n);
        b1 += k * ((double)f->rq[j] - mid * (double)f->r[j]);
        a12 += k * m * q;
        a22 += m * m * n;
        b2 += m * (double)f->r[j];
    }
    if (t->spec->symmetric) a12 = b2 = 0, a22 = 1;
    double det = a11 * a22 - a12 * a12, outer_s = (double)g->outer_s[first], outer_o = (double)g->outer_o[first];
    if (det > 1e-9 * a11 * a22) {
        outer_s += (b1 * a22 - b2 * a12) / det;
        outer_o += (a11 * b2 - a12 * b1) / det;
    } else if (a11 > 0) {
        outer_s += b1 / a11;
    }
    float s, o;
    if (!round_outer(t->spec, (float)outer_s, (float)outer_o, &s, &o)) return;
    for (size_t j = first; j < first + t->n_sub; j++) {
        g->outer_s[j] = s;
        g->outer_o[j] = o;
    }
}

static double group_error(const search *t, const float *lanes, size_t first) {
    double sum = 0;
    for (size_t j = first; j < first + t->n_sub; j++) sum += (double)lanes[j];
    return sum;
}

/* Fits the outer pairs to what the sub-groups chose, lets those move once more, and keeps the groups that gained. */
static void improve(const search *t, aq_grid *best) {
    aq_grid fitted, moved;
    aq_lines lines;
    aq_fit_sums sums;
    for (size_t j = 0; j < AQ_LANES; j++) {
        lines.s[j] = best->outer_s[j] * best->k[j];
        lines.o[j] = best->outer_o[j] * best->m[j];
    }
    aq_lanes_sums(t->lanes, &lines, &sums);
    copy_lanes(best, 0, AQ_LANES, &fitted);
    for (size_t i = 0; i < t->n_groups; i++) refit_outer(t, &sums, i * t->n_sub, &fitted);
    move(t, &fitted, 1, &moved);
    for (size_t i = 0; i < t->n_groups; i++)
        if (group_error(t, moved.error, i * t->n_sub) < group_error(t, best->error, i * t->n_sub)) copy_lanes(&moved, i * t->n_sub, t->n_sub, best);
}

/* Exact error of each group as it dequantizes. */
static void exact_errors(const search *t, const aq_grid *g, double *group_errors) {
    float s[AQ_LANES], z[AQ_LANES];
    double error[AQ_LANES];
    for (size_t j = 0; j < AQ_LANES; j++) {
        s[j] = g->outer_s[j] * g->k[j];
        z[j] = (0.0f - g->outer_o[j] * g->m[j]) / s[j];
    }
    aq_lanes_error(t->lanes, s, z, error);
    for (size_t i = 0; i < t->n_groups; i++) {
        group_errors[i] = 0;
        for (size_t j = 0; j < t->n_sub; j++) group_errors[i] += error[i * t->n_sub + j];
    }
}

/* The grid of each group from the free lines of its sub-groups; a group that cannot be searched keeps the min-max grid. */
static void free_grid(search *t, aq_grid *g) {
    const aq_lanes *l = t->lanes;
    aq_lines lines;
    aq_search_lines(l, t->spec->bits, aq_two_level_width(t->spec->bits), &lines);
    for (size_t i = 0; i < t->n_groups; i++) {
        size_t first = i * t->n_sub;
        t->searched[i] = true;
        for (size_t j = first; j < first + t->n_sub; j++) {
            aq_range range = {l->low[j], l->high[j]};
            t->searched[i] &= aq_range_reach(range) < AQ_SEARCH_MAX;
            if (lines.error[j] < INFINITY) continue; /* no line: take the range's */
            lines.o[j] = range.lo < 0 ? range.lo : 0.0f;
            lines.s[j] = ((range.hi > 0 ? range.hi : 0.0f) - lines.o[j]) / (float)l->q_max;
        }
        if (t->searched[i]) t->searched[i] = start_grid(t->spec, lines.s, lines.o, first, t->n_sub, g);
    }
}

bool aq_lanes_fill_two_level(aq_lanes *l, const aq_kernels *k, const aq_quant_spec *spec, const aq_values *groups, size_t n) {
    aq_values subs[AQ_LANES];
    size_t n_sub = sub_count(spec, &groups[0]);
    /* Groups of a batch have as many sub-groups as the first; a last, shorter one comes alone. */
    for (size_t i = 0; i < n; i++)
        for (size_t j = 0; j < n_sub; j++) subs[i * n_sub + j] = sub_group(spec, &groups[i], j);
    return aq_lanes_fill(l, k, spec, subs, n * n_sub);
}

size_t aq_search_two_level(aq_lanes *l, const aq_quant_spec *spec, const aq_values *groups, size_t n, void *const *records) {
    search t = {.lanes = l, .spec = spec, .n_sub = sub_count(spec, &groups[0])};
    aq_grid rtn;
    for (size_t j = 0; j < AQ_LANES; j++) rtn.outer_s[j] = rtn.k[j] = 1, rtn.outer_o[j] = rtn.m[j] = rtn.error[j] = 0;
    for (; t.n_groups < n; t.n_groups++)
        if (!rtn_grid(spec, l->low, l->high, t.n_groups * t.n_sub, t.n_sub, &rtn)) break;
    aq_grid started, found;
    copy_lanes(&rtn, 0, AQ_LANES, &started);
    free_grid(&t, &started);
    move(&t, &started, 2, &found);
    improve(&t, &found);

    double rtn_errors[AQ_LANES], found_errors[AQ_LANES];
    exact_errors(&t, &rtn, rtn_errors);
    exact_errors(&t, &found, found_errors);
    for (size_t i = 0; i < t.n_groups; i++) {
        bool better = t.searched[i] && found_errors[i] < rtn_errors[i];
        aq_two_level r = record_of(better ? &found : &rtn, i * t.n_sub, t.n_sub);
        aq_two_level_write(&r, spec->bits, t.n_sub, records[i]);
    }
    return t.n_groups;
}
