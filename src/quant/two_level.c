/* Two-level parameters: sub-groups of 16 or 32 values whose scale and offset are small multiples of the group's (algorithms 1 and 2).
 *
 * The lines of the sub-groups are found freely, then the outer pair, then each sub-group's integers on that grid.
 */
#include "quant/quant_internal.h"

#include <math.h>
#include <string.h>

#include "base/half.h"

static uint8_t grid(double x, int lowest, int highest) { return (uint8_t)(x > lowest ? x < highest ? rint(x) : highest : lowest); }

/* Puts lines s_j, o_j on the grid of an outer pair that just reaches the largest of them. */
static bool round_lines(const aq_quant_spec *spec, const double *s, const double *o, uint64_t n_sub, aq_two_level *g) {
    int levels = 1 << aq_two_level_field_bits(spec->bits), top_k = spec->symmetric ? levels - 1 : levels;
    double s_max = 0, o_far = 0, middle = (double)(1 << (spec->bits - 1));
    for (uint64_t j = 0; j < n_sub; j++) {
        s_max = fmax(s_max, s[j]);
        if (fabs(o[j]) > fabs(o_far)) o_far = o[j];
    }
    g->scale = aq_f32_to_f16((float)(s_max / top_k));
    double outer_s = (double)aq_f16_to_f32(g->scale);
    g->offset = aq_f32_to_f16((float)(spec->symmetric ? -middle * outer_s : o_far / (levels - 1)));
    double outer_o = (double)aq_f16_to_f32(g->offset);
    if (!isfinite(outer_s) || !isfinite(outer_o) || outer_s < (double)AQ_MIN_HALF_SCALE) return false;
    for (uint64_t j = 0; j < n_sub; j++) {
        g->k[j] = grid(s[j] / outer_s, 1, top_k);
        g->m[j] = spec->symmetric ? g->k[j] : outer_o != 0 ? grid(o[j] / outer_o, 0, levels - 1) : 0;
    }
    return true;
}

bool aq_two_level_group(const aq_kernels *k, const aq_quant_spec *spec, const aq_values *values, uint8_t *record, aq_pair *out) {
    uint64_t width = aq_two_level_width(spec->bits), n_sub = (values->n + width - 1) / width;
    aq_quant_spec free_spec = *spec;
    free_spec.params = AQ_PARAMS_F32;
    double s[AQ_TWO_LEVEL_MAX_SUB], o[AQ_TWO_LEVEL_MAX_SUB];
    bool any = false;
    for (uint64_t j = 0; j < n_sub; j++) {
        aq_values sub = {values->x + j * width, values->h ? values->h + j * width : NULL, values->n - j * width < width ? values->n - j * width : width, 1, 0};
        float lo, hi;
        k->range(sub.x, sub.n, &lo, &hi);
        s[j] = o[j] = 0;
        if (lo == 0 && hi == 0) continue;
        aq_pair pair;
        uint8_t slot[8];
        if (!(spec->method == AQ_METHOD_SEARCH ? aq_search_pair : aq_rtn_pair)(k, &free_spec, &sub, slot, &pair)) return false;
        any = true;
        s[j] = (double)pair.s;
        o[j] = (0.0 - (double)pair.z) * s[j];
    }
    aq_two_level g = {.scale = 0x3C00, .offset = 0}; /* S = 1, O = 0: an all-zero group */
    for (uint64_t j = 0; j < n_sub; j++) g.k[j] = 1, g.m[j] = 0;
    if (any && !round_lines(spec, s, o, n_sub, &g)) return false;
    aq_two_level_write(&g, spec->bits, n_sub, record);
    for (uint64_t j = 0; j < n_sub; j++) out[j] = aq_two_level_pair(&g, j);
    return true;
}
