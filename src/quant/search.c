/* Parameter search: a pair with a smaller weighted squared error than min-max (algorithms 2).
 *
 * Candidates clip the range by a factor; each is followed by rounds of "codes by rounding, then the least-squares line through (code, value)".
 * What counts is the error after rounding to the stored form; the best is kept, min-max included, so search is never worse.
 */
#include "quant/quant_internal.h"

#include <math.h>
#include <string.h>

static double code_of(double x, double s, double o, double q_max) { return fmin(fmax(rint((x - o) / s), 0), q_max); }

double aq_pair_error(const aq_quant_spec *spec, const aq_values *values, aq_pair pair) {
    float top = (float)aq_quant_q_max(spec);
    double sum = 0;
    for (uint64_t r = 0; r < values->n_rows; r++)
        for (uint64_t i = 0; i < values->n; i++) {
            float x = values->x[r * values->stride + i], t = x / pair.s + pair.z;
            t = t > 0.0f ? t : 0.0f;
            t = t < top ? t : top;
            double e = (double)x - (double)((rintf(t) - pair.z) * pair.s);
            sum += (values->h ? (double)values->h[i] : 1.0) * e * e;
        }
    return sum;
}

/* One least-squares fit of the codes that (s, o) gives. False when the codes are all the same. */
static bool refit(const aq_quant_spec *spec, const aq_values *values, double *s, double *o) {
    double q_max = aq_quant_q_max(spec), middle = (double)(1 << (spec->bits - 1)), sh = 0, sq = 0, sx = 0, sqq = 0, sqx = 0;
    for (uint64_t r = 0; r < values->n_rows; r++)
        for (uint64_t i = 0; i < values->n; i++) {
            double x = values->x[r * values->stride + i], h = values->h ? (double)values->h[i] : 1.0, q = code_of(x, *s, *o, q_max);
            if (spec->symmetric) q -= middle;
            sh += h;
            sq += h * q;
            sx += h * x;
            sqq += h * q * q;
            sqx += h * q * x;
        }
    if (spec->symmetric) {
        if (!(sqq > 0) || !(sqx > 0)) return false;
        *s = sqx / sqq;
        *o = -middle * *s;
        return true;
    }
    double var = sqq * sh - sq * sq, cov = sqx * sh - sq * sx;
    if (!(var > 0) || !(cov > 0)) return false;
    *s = cov / var;
    *o = (sx - *s * sq) / sh;
    return true;
}

bool aq_search_pair(const aq_kernels *k, const aq_quant_spec *spec, const aq_values *values, void *slot, aq_pair *out) {
    enum { CANDIDATES = 12, REFITS = 2 };
    if (!aq_rtn_pair(k, spec, values, slot, out)) return false;
    double best = aq_pair_error(spec, values, *out);
    if (!(best > 0)) return true;
    double s0 = (double)out->s, o0 = (0.0 - out->z) * s0, lowest = spec->bits == 2 ? 0.4 : spec->bits == 4 ? 0.65 : 0.9;
    for (int c = 0; c < CANDIDATES; c++) {
        double clip = 1 - (1 - lowest) * c / (CANDIDATES - 1), s = s0 * clip, o = o0 * clip;
        for (int round = 0; round < REFITS; round++) {
            uint8_t trial[8];
            aq_pair pair;
            if (!refit(spec, values, &s, &o)) break;
            if (!aq_pair_store(spec, s, o, trial, &pair)) break;
            double error = aq_pair_error(spec, values, pair);
            if (error < best) {
                best = error;
                *out = pair;
                memcpy(slot, trial, aq_pair_bytes(spec));
            }
        }
    }
    return true;
}
