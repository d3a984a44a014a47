/* Parameter search: pairs with a smaller weighted squared error than min-max (algorithms 2).
 *
 * Candidates clip the range by a factor and shift it by a fraction of a step: at few bits the error as a function of the line has many local minima,
 * and different starts find better ones than more rounds from one start. Each start takes one pass: codes by rounding, the least-squares line
 * through (code, value) in closed form, and its error with these codes. The best line then alternates between rounding to the stored form and a new
 * fit. What counts in the end is the error of the stored pair, in double, exactly as it dequantizes; min-max is among the candidates.
 */
#include "quant/quant_internal.h"
#include "quant/r2q.h"

#include <math.h>
#include <string.h>

enum { FINAL_ROUNDS = 3 };

/* Shifts of the candidates, in steps. Sub-groups of 16 at 2 bits have another search behind this one and take fewer. */
static const float shifts[] = {0.0f, -0.35f, 0.35f}, few_shifts[] = {-0.2f, 0.2f};

/* Clip factors that suit the values of a bell-shaped group of this size: the larger the group, the further out lie its extremes. */
static void clip_range(int bits, uint64_t group_size, float *high, float *low) {
    int doublings = 0; /* above 16 values */
    while (group_size > 16 && doublings < 8) group_size /= 2, doublings++;
    *high = bits == 2 ? 0.95f : 1.0f;
    *low = bits == 2 ? 0.7f - 0.1f * (float)(doublings < 4 ? doublings : 4) : bits == 4 ? 0.9f - 0.05f * (float)doublings : 0.99f - 0.01f * (float)doublings;
}

void aq_search_lines(const aq_lanes *l, int bits, uint64_t group_size, aq_lines *best) {
    bool symmetric = l->middle >= 0, few = bits == 2 && group_size == 16;
    float high, low, q_max = (float)l->q_max;
    const float *shift = few ? few_shifts : shifts;
    size_t n_shifts = symmetric ? 1 : few ? 2 : 3, n_clips = symmetric ? 8 : few ? 3 : 5;
    aq_lines center; /* the step that covers the range, and the middle of the range */
    clip_range(bits, group_size, &high, &low);
    for (size_t j = 0; j < AQ_LANES; j++) {
        aq_range range = {l->low[j], l->high[j]};
        float width = symmetric ? 2 * aq_range_reach(range) : range.hi - range.lo;
        center.s[j] = width > 0 ? width / q_max : 1.0f;
        center.o[j] = symmetric ? 0.0f : (range.lo + range.hi) * 0.5f;
        center.error[j] = INFINITY;
    }
    *best = center;
    for (size_t c = 0; c < n_clips; c++) {
        float clip = high + (low - high) * (float)c / (float)(n_clips - 1);
        for (size_t k = 0; k < n_shifts; k++) aq_lanes_fit(l, &center, clip, symmetric ? -l->middle : shift[k] - 0.5f * q_max, NULL, best);
    }
}

typedef struct stored {
    float s[AQ_LANES], z[AQ_LANES];
    double error[AQ_LANES];
    uint8_t bytes[AQ_LANES][8];
} stored;

static void set_pair(stored *t, size_t j, aq_pair pair) {
    t->s[j] = pair.s;
    t->z[j] = pair.z;
}

/* Rounds the lines of the lanes that are searched; the others, and those that do not fit, repeat the best pair. */
static void round_lines(const aq_quant_spec *spec, const aq_lines *lines, const stored *best, const bool *searched, size_t n, stored *out) {
    *out = *best;
    for (size_t j = 0; j < n; j++) {
        aq_pair pair;
        uint8_t bytes[8];
        if (!searched[j] || !(lines->error[j] < INFINITY) || !aq_pair_store(spec, (double)lines->s[j], (double)lines->o[j], bytes, &pair)) continue;
        set_pair(out, j, pair);
        memcpy(out->bytes[j], bytes, sizeof bytes);
    }
}

static void keep_better(const stored *trial, stored *best, size_t n) {
    for (size_t j = 0; j < n; j++) {
        if (!(trial->error[j] < best->error[j])) continue;
        best->s[j] = trial->s[j];
        best->z[j] = trial->z[j];
        best->error[j] = trial->error[j];
        memcpy(best->bytes[j], trial->bytes[j], sizeof best->bytes[j]);
    }
}

size_t aq_search_pairs(aq_lanes *l, const aq_quant_spec *spec, const aq_values *groups, size_t n, void *const *slots) {
    stored best = {0}, trial;
    aq_lines lines = {0};
    bool searched[AQ_LANES];
    size_t fit = 0;
    for (size_t j = 0; j < AQ_LANES; j++) set_pair(&best, j, (aq_pair){1.0f, 0.0f});
    for (; fit < n; fit++) {
        aq_range range = {l->low[fit], l->high[fit]};
        aq_pair pair;
        searched[fit] = range.lo < range.hi && aq_range_reach(range) > AQ_SEARCH_MIN && aq_range_reach(range) < AQ_SEARCH_MAX;
        if (!aq_rtn_pair(spec, range, best.bytes[fit], &pair)) break;
        set_pair(&best, fit, pair);
    }
    if (l->wide) /* one group: its pair stands in every lane */
        for (size_t j = 1; j < AQ_LANES; j++) set_pair(&best, j, (aq_pair){best.s[0], best.z[0]});
    aq_lanes_error(l, best.s, best.z, best.error);
    aq_search_lines(l, spec->bits, groups[0].n * groups[0].n_rows, &lines);
    for (int round = 0; round < FINAL_ROUNDS; round++) {
        round_lines(spec, &lines, &best, searched, fit, &trial);
        if (l->wide)
            for (size_t j = 1; j < AQ_LANES; j++) set_pair(&trial, j, (aq_pair){trial.s[0], trial.z[0]});
        aq_lanes_error(l, trial.s, trial.z, trial.error);
        keep_better(&trial, &best, fit);
        if (round + 1 == FINAL_ROUNDS) break;
        for (size_t j = 0; j < AQ_LANES; j++) {
            lines.s[j] = trial.s[j];
            lines.o[j] = (0.0f - trial.z[j]) * trial.s[j];
        }
        aq_lanes_fit(l, &lines, 1.0f, 0.0f, &lines, NULL);
    }
    for (size_t j = 0; j < fit; j++) memcpy(slots[j], best.bytes[j], aq_pair_bytes(spec));
    return fit;
}

uint64_t aq_search_capacity(const aq_quant_spec *spec) {
    return spec->params == AQ_PARAMS_TWO_LEVEL ? AQ_LANES / (spec->group_size / aq_two_level_width(spec->bits)) : AQ_LANES;
}

bool aq_search_batch(aq_lanes *l, const aq_kernels *k, const aq_quant_spec *spec, const aq_values *groups, size_t n, void *const *slots, size_t *n_stored) {
    *n_stored = 0;
    if (spec->params == AQ_PARAMS_R2Q) {
        aq_r2q levels;
        while (*n_stored < n && aq_r2q_fit(&groups[*n_stored], slots[*n_stored], &levels)) ++*n_stored;
        return true;
    }
    if (spec->params == AQ_PARAMS_TWO_LEVEL) {
        if (!aq_lanes_fill_two_level(l, k, spec, groups, n)) return false;
        *n_stored = aq_search_two_level(l, spec, groups, n, slots);
        return true;
    }
    bool wide = groups[0].n_rows > 1 || groups[0].n > AQ_NARROW;
    if (!(wide ? aq_lanes_fill_wide(l, k, spec, &groups[0]) : aq_lanes_fill(l, k, spec, groups, n))) return false;
    *n_stored = aq_search_pairs(l, spec, groups, n, slots);
    return true;
}
