/* Inside aq_linear: what its ways share (linear.c, linear_words.c, linear_panels.c). */
#ifndef AQ_QUANT_LINEAR_INTERNAL_H
#define AQ_QUANT_LINEAR_INTERNAL_H

#include <arrowquant/linear.h>

#include "kernels/kernels.h"

static inline uint64_t aq_least(uint64_t a, uint64_t b) { return a < b ? a : b; }

/* The row of the parameters that an output takes its pairs from. */
static inline uint64_t aq_linear_param_row(const aq_linear_weight *w, uint64_t row) {
    uint64_t height = w->spec.group_size ? w->spec.group_size : w->layout.rows;
    return w->spec.axis == 1 ? row : row / height;
}

static inline bool aq_linear_half_pairs(const aq_linear_weight *w) {
    return w->spec.axis == 1 && (w->spec.params == AQ_PARAMS_F16 || w->spec.params == AQ_PARAMS_TWO_LEVEL);
}

/* Inputs that share a pair. */
static inline uint64_t aq_linear_pair_width(const aq_linear_weight *w) { return w->layout.pairs_per_row == 1 ? w->layout.cols : w->layout.pair_width; }

/* Pairs begin on words of 32 bits. */
static inline bool aq_linear_words_fit(const aq_linear_weight *w) {
    return w->layout.pairs_per_row == 1 || w->layout.pair_width * (uint64_t)w->spec.bits % 32 == 0;
}

/* Input `step` of an output, which begins on a byte. */
static inline const uint8_t *aq_linear_codes_at(const aq_linear_weight *w, uint64_t row, uint64_t step) {
    return w->codes + row * w->layout.row_bytes + step * (uint64_t)w->spec.bits / 8;
}

/* Lines w = s q + o of pairs [first, first + n) of an output whose parameters are halves. */
void aq_linear_half_lines(const aq_kernels *k, const aq_linear_weight *w, uint64_t row, uint64_t first, uint64_t n, float *s, float *o);
/* Lines of every pair of outputs [row, row + n_rows), output after output. */
void aq_linear_lines(const aq_kernels *k, const aq_linear_weight *w, uint64_t row, uint64_t n_rows, float *s, float *o);

/* Inputs that are codes of 8 bits, x = (q - z) s [rows, inputs]; or NULL, and values that become such codes. The pair of row r lies at r * pair_stride; scales
 * NULL: each row's own. */
typedef struct aq_coded_inputs {
    const uint8_t *codes;
    const float *x;
    const float *scales, *zeros;
    size_t pair_stride;
} aq_coded_inputs;

/* The pair of a row of values from its own range, NaN left out. */
void aq_activation_row_pair(const aq_kernels *k, const float *x, uint64_t n, float *scale, float *zero_point);

/* Whether aq_linear_integer (time.h) multiplies on words; in double where not. */
bool aq_linear_codes_fit(const aq_linear_weight *weight);
/* y as it defines it then. */
aq_status aq_linear_codes(const aq_linear_weight *weight, const aq_coded_inputs *x, uint64_t n_rows, float *y, int n_threads, aq_error *err);

/* y as in linear.h, for inputs >= 1: by integers, where pairs begin on words; in F32. */
aq_status aq_linear_words(const aq_linear_weight *weight, const float *x, uint64_t n_rows, float *y, int n_threads, aq_error *err);
aq_status aq_linear_panels(const aq_linear_weight *weight, const float *x, uint64_t n_rows, float *y, int n_threads, aq_error *err);

#endif
