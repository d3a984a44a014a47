/* R2Q's stored form inside the quant room (see r2q.c): three halves a group instead of a pair. */
#ifndef AQ_QUANT_R2Q_H
#define AQ_QUANT_R2Q_H

#include "quant/quant_internal.h"

/* Levels (m +- a1) +- a2, added in that order in F32. */
typedef struct aq_r2q {
    float m, a1, a2;
} aq_r2q;

enum { AQ_R2Q_BYTES = 6 };

/* Rounds to halves at `slot`; false when they do not fit or a1 >= a2 >= 0 does not hold. */
bool aq_r2q_store(double m, double a1, double a2, void *slot, aq_r2q *out);
aq_r2q aq_r2q_load(const void *slot);
/* Values of the codes 0 to 3. */
void aq_r2q_levels(const aq_r2q *p, float levels[4]);
/* Levels for one row of finite values, weighted by h. False when they do not fit halves. */
bool aq_r2q_fit(const aq_values *values, void *slot, aq_r2q *out);
/* aq_dequantize for this form. */
void aq_r2q_dequantize(const aq_quant_spec *spec, const aq_quant_layout *layout, const uint8_t *codes, const void *params, uint64_t row_begin, uint64_t n_rows,
                       float *out);
/* aq_quantize for this form; the layout is not empty. */
aq_status aq_r2q_quantize(const float *w, const aq_quant_spec *spec, const aq_quant_layout *layout, const float *importance, int n_threads, uint8_t *codes,
                          void *params, aq_quant_metrics *metrics, bool *needs_f32, aq_error *err);

#endif
