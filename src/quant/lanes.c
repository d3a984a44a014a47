/* Lanes of values for the search (see quant_internal.h): filling them, and the sums over them.
 *
 * Many small groups are searched side by side, one in each lane: their values are transposed once, then each pass is straight-line vector code with
 * nothing to reduce. A large group takes all lanes; its sums are folded in double and put back into every lane, so that the same search runs on it.
 */
#include "quant/quant_internal.h"

static void start(aq_lanes *l, const aq_kernels *k, const aq_quant_spec *spec) {
    l->kernels = k;
    l->q_max = aq_quant_q_max(spec);
    l->middle = spec->symmetric ? (float)(1 << (spec->bits - 1)) : -1.0f;
}

/* Sixteen groups of equal size: the common case. */
static void fill_even(aq_lanes *l, const aq_values *groups, size_t steps) {
    const float *rows[AQ_LANES], *weights[AQ_LANES];
    for (size_t j = 0; j < AQ_LANES; j++) {
        rows[j] = groups[j].x;
        weights[j] = groups[j].h;
        l->weight[j] = groups[j].h ? 0.0f : (float)steps;
    }
    l->kernels->transpose(rows, steps, l->x);
    l->block = (aq_block){l->x, NULL, steps};
    if (!groups[0].h) return;
    l->kernels->transpose(weights, steps, l->h);
    l->block.h = l->h;
    for (size_t i = 0; i < steps; i++)
        for (size_t j = 0; j < AQ_LANES; j++) l->weight[j] += l->h[i * AQ_LANES + j];
}

/* Lanes that are short or empty: they are padded with values of weight 0 that leave their range as it is. */
static void fill_ragged(aq_lanes *l, const aq_values *groups, size_t n, size_t steps) {
    for (size_t j = 0; j < AQ_LANES; j++) {
        size_t size = j < n ? groups[j].n : 0;
        l->weight[j] = 0;
        for (size_t i = 0; i < steps; i++) {
            float h = i >= size ? 0.0f : groups[j].h ? groups[j].h[i] : 1.0f;
            l->h[i * AQ_LANES + j] = h;
            l->x[i * AQ_LANES + j] = i < size ? groups[j].x[i] : size > 0 ? groups[j].x[0] : 0.0f;
            l->weight[j] += h;
        }
    }
    l->block = (aq_block){l->x, l->h, steps};
}

bool aq_lanes_fill(aq_lanes *l, const aq_kernels *k, const aq_quant_spec *spec, const aq_values *groups, size_t n) {
    size_t steps = 0;
    bool even = n == AQ_LANES;
    start(l, k, spec);
    l->wide = NULL;
    for (size_t j = 0; j < n; j++) steps = groups[j].n > steps ? groups[j].n : steps;
    for (size_t j = 0; j < n; j++) even &= groups[j].n == steps;
    if (even)
        fill_even(l, groups, steps);
    else
        fill_ragged(l, groups, n, steps);
    if (!k->lane_range(l->x, steps, l->low, l->high)) return false;
    for (size_t j = 0; j < AQ_LANES; j++)
        if (aq_range_reach((aq_range){l->low[j], l->high[j]}) >= AQ_SEARCH_MAX)
            for (size_t i = 0; i < steps; i++) l->x[i * AQ_LANES + j] = 0.0f; /* not searched */
    return true;
}

/* ---- one large group ---- */

enum { WIDE_STEPS = 256 }; /* F32 sums stay exact enough over this many steps; longer runs are added up in double */

/* Calls visit for each run of the group's values, the last few of a row padded with weight 0. */
static void for_each_run(const aq_values *v, void (*visit)(void *context, const aq_block *run), void *context) {
    for (uint64_t r = 0; r < v->n_rows; r++) {
        const float *x = v->x + r * v->stride;
        uint64_t whole = v->n / AQ_LANES * AQ_LANES;
        for (uint64_t i = 0; i < whole; i += (uint64_t)WIDE_STEPS * AQ_LANES) {
            uint64_t steps = (whole - i) / AQ_LANES;
            aq_block run = {x + i, v->h ? v->h + i : NULL, steps < WIDE_STEPS ? steps : WIDE_STEPS};
            visit(context, &run);
        }
        if (whole == v->n) continue;
        float tail[AQ_LANES] = {0}, weights[AQ_LANES] = {0};
        for (uint64_t i = whole; i < v->n; i++) {
            tail[i - whole] = x[i];
            weights[i - whole] = v->h ? v->h[i] : 1.0f;
        }
        aq_block run = {tail, weights, 1};
        visit(context, &run);
    }
}

bool aq_lanes_fill_wide(aq_lanes *l, const aq_kernels *k, const aq_quant_spec *spec, const aq_values *group) {
    aq_range range;
    if (!aq_values_range(k, group, &range)) return false;
    double weight = 0;
    start(l, k, spec);
    l->wide = group;
    for (uint64_t i = 0; i < group->n; i++) weight += group->h ? (double)group->h[i] : 1.0;
    for (size_t j = 0; j < AQ_LANES; j++) {
        l->low[j] = range.lo;
        l->high[j] = range.hi;
        l->weight[j] = (float)(weight * (double)group->n_rows);
    }
    return true;
}

typedef struct wide_sums {
    const aq_lanes *lanes;
    const aq_lines *lines;
    const float *s, *z;
    double q, qq, r, rq, rr, error;
} wide_sums;

static double fold(const float *lanes) {
    double sum = 0;
    for (size_t j = 0; j < AQ_LANES; j++) sum += (double)lanes[j];
    return sum;
}

static void add_sums(void *context, const aq_block *run) {
    wide_sums *w = context;
    aq_fit_sums part;
    w->lanes->kernels->fit_sums(run, w->lanes->q_max, w->lines, &part);
    w->q += fold(part.q);
    w->qq += fold(part.qq);
    w->r += fold(part.r);
    w->rq += fold(part.rq);
    w->rr += fold(part.rr);
}

void aq_lanes_fit(const aq_lanes *l, const aq_lines *from, float clip, float shift, aq_lines *out, aq_lines *best) {
    if (!l->wide) {
        l->kernels->fit(&l->block, l->q_max, l->weight, l->middle, from, clip, shift, out, best);
        return;
    }
    aq_lines lines;
    aq_fit_sums sums;
    for (size_t j = 0; j < AQ_LANES; j++) {
        lines.s[j] = from->s[j] * clip;
        lines.o[j] = from->o[j] + shift * lines.s[j];
    }
    aq_lanes_sums(l, &lines, &sums);
    l->kernels->fit_lines(&sums, l->weight, l->middle, &lines, best);
    if (out) *out = lines;
}

void aq_lanes_sums(const aq_lanes *l, const aq_lines *lines, aq_fit_sums *out) {
    if (!l->wide) {
        l->kernels->fit_sums(&l->block, l->q_max, lines, out);
        return;
    }
    wide_sums w = {.lanes = l, .lines = lines};
    for_each_run(l->wide, add_sums, &w);
    for (size_t j = 0; j < AQ_LANES; j++) {
        out->q[j] = (float)w.q;
        out->qq[j] = (float)w.qq;
        out->r[j] = (float)w.r;
        out->rq[j] = (float)w.rq;
        out->rr[j] = (float)w.rr;
    }
}

static void add_error(void *context, const aq_block *run) {
    wide_sums *w = context;
    double part[AQ_LANES];
    w->lanes->kernels->pair_error(run, w->lanes->q_max, w->s, w->z, part);
    for (size_t j = 0; j < AQ_LANES; j++) w->error += part[j];
}

void aq_lanes_error(const aq_lanes *l, const float *s, const float *z, double *error) {
    if (!l->wide) {
        l->kernels->pair_error(&l->block, l->q_max, s, z, error);
        return;
    }
    wide_sums w = {.lanes = l, .s = s, .z = z};
    for_each_run(l->wide, add_error, &w);
    for (size_t j = 0; j < AQ_LANES; j++) error[j] = w.error;
}
