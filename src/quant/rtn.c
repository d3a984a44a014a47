/* Round to nearest: the pair of a group from its smallest and largest value, the range widened to contain 0 (algorithms 1).
 *
 * In the f32 form z is an integer, so that 0 stays exactly 0 (but not where the range itself is more than F32 holds); a group of equal values comes back
 * exactly; an all-zero group has s = 1, z = 0. In the f16 form scale and offset are the range's, each rounded to half precision.
 */
#include "quant/quant_internal.h"

#include <float.h>
#include <math.h>

#include "base/half.h"

/* The largest s <= s0 with which no code overflows F32. */
static float limit_scale(float s, float z, float q_max) {
    float reach = z > q_max - z ? z : q_max - z;
    if (isinf(reach * s)) s = FLT_MAX / reach;
    while (isinf(reach * s)) s = nextafterf(s, 0.0f);
    return s;
}

/* range / steps as F32: above 0 and, among denormals, large enough that `steps` of it cover the range. */
static float scale_of(double range, double steps) {
    float s = (float)(range / steps);
    if (s < FLT_MIN && (double)s * steps < range) s = nextafterf(s, 1.0f);
    return s;
}

/* All values equal c: the code beside z is c itself, where s = |c| can be stored. */
static bool constant_pair(const aq_quant_spec *spec, float c, void *slot, aq_pair *out) {
    float s = fabsf(c);
    if (spec->params == AQ_PARAMS_F16 && aq_f16_to_f32(aq_f32_to_f16(s)) != s) return false;
    return aq_pair_store(spec, s, c > 0 ? 0.0 : (double)c, slot, out);
}

static bool symmetric_pair(const aq_quant_spec *spec, float lo, float hi, void *slot, aq_pair *out) {
    float q_max = (float)aq_quant_q_max(spec), z = (float)(1 << (spec->bits - 1));
    float below = scale_of(-(double)lo, z), above = scale_of(hi, q_max - z);
    float s = below > above ? below : above;
    if (spec->params == AQ_PARAMS_F32) s = limit_scale(s, z, q_max);
    return aq_pair_store(spec, s, 0, slot, out);
}

static bool range_pair(const aq_quant_spec *spec, float lo, float hi, void *slot, aq_pair *out) {
    float q_max = (float)aq_quant_q_max(spec);
    float s = scale_of((double)hi - lo, q_max);
    if (spec->params == AQ_PARAMS_F16) return aq_pair_store(spec, s, lo, slot, out);
    float z = (float)(-(double)lo / (double)s + 0x1.8p52 - 0x1.8p52); /* rounded half to even */
    z = z < q_max ? z : q_max;
    /* An integer z shifts the range, here past the end of F32. A smaller scale would clip the other end; z as it is keeps every value within half a step. */
    if (isinf((z > q_max - z ? z : q_max - z) * s)) z = (float)(-(double)lo / (double)s);
    s = limit_scale(s, z, q_max);
    return aq_pair_store(spec, s, -(double)z * s, slot, out);
}

bool aq_values_range(const aq_kernels *k, const aq_values *values, aq_range *out) {
    bool finite = k->range(values->x, values->n, &out->lo, &out->hi);
    for (uint64_t r = 1; r < values->n_rows; r++) {
        aq_range row;
        finite &= k->range(values->x + r * values->stride, values->n, &row.lo, &row.hi);
        out->lo = row.lo < out->lo ? row.lo : out->lo;
        out->hi = row.hi > out->hi ? row.hi : out->hi;
    }
    return finite;
}

bool aq_rtn_pair(const aq_quant_spec *spec, aq_range range, void *slot, aq_pair *out) {
    float lo = range.lo, hi = range.hi;
    if (lo == 0 && hi == 0) return aq_pair_store(spec, 1.0, 0.0, slot, out);
    if (lo == hi && constant_pair(spec, lo, slot, out)) return true;
    lo = lo < 0 ? lo : 0.0f;
    hi = hi > 0 ? hi : 0.0f;
    return spec->symmetric ? symmetric_pair(spec, lo, hi, slot, out) : range_pair(spec, lo, hi, slot, out);
}
