/* Error of an approximation (algorithms 9): sums in double, in a fixed order. */
#include "quant/quant_internal.h"

#include <math.h>

#include "base/threads.h"

void aq_quant_metrics_add(aq_quant_metrics *into, const aq_quant_metrics *part) {
    into->dot += part->dot;
    into->w_sq += part->w_sq;
    into->v_sq += part->v_sq;
    into->err_sq += part->err_sq;
    into->err_max = part->err_max > into->err_max ? part->err_max : into->err_max;
    into->count += part->count;
}

double aq_quant_metrics_cosine(const aq_quant_metrics *m) {
    if (m->w_sq == 0 && m->v_sq == 0) return 1;
    if (m->w_sq == 0 || m->v_sq == 0) return 0;
    double c = m->dot / (sqrt(m->w_sq) * sqrt(m->v_sq));
    return c > 1 ? 1 : c < -1 ? -1 : c;
}

double aq_quant_metrics_sqnr_db(const aq_quant_metrics *m) {
    if (m->err_sq == 0) return INFINITY;
    return 10 * log10(m->w_sq / m->err_sq);
}

void aq_quant_metrics_compute(const float *w, const float *v, uint64_t n, aq_quant_metrics *out) {
    enum { PIECE = 4096 };
    const aq_kernels *k = aq_kernels_get();
    *out = (aq_quant_metrics){0};
    aq_fp_state fp = aq_fp_enter();
    for (uint64_t i = 0; i < n; i += PIECE) {
        aq_error_sums sums;
        uint64_t m = n - i < PIECE ? n - i : PIECE;
        k->error_sums(w + i, v + i, m, &sums);
        aq_quant_metrics part = {sums.dot, sums.w_sq, sums.v_sq, sums.err_sq, sums.err_max, m};
        aq_quant_metrics_add(out, &part);
    }
    aq_fp_leave(fp);
}
