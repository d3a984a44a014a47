/* Strategy: what is tried for a layer at given bits, by modality, settings and what calibration knows (algorithms.md 8). */
#ifndef AQ_PIPELINE_ATTEMPTS_H
#define AQ_PIPELINE_ATTEMPTS_H

#include "pipeline/inputs.h"
#include "pipeline/quantize.h"

/* One way to code a layer. */
typedef struct attempt {
    aq_quant_spec spec; /* method: the word that is stored */
    inputs_want want;
    inputs_basis basis;
} attempt;

enum { MOST_ATTEMPTS = 11 };

/* Attempts for tensor `index` at `bits`, which must be quantized; the first is the plain one that others are compared with, and the one whose result stays
 * on a draw. spatial: with equalization where the settings have it. AQ_ERR_*: as aq_spec_at. */
aq_status aq_attempts(const quantize_run *run, size_t index, int bits, bool spatial, attempt out[MOST_ATTEMPTS], size_t *n, aq_error *err);
/* Whether equalization is a matter of course for this tensor (smooth = ditas), so that leaving it out is a step of the ladder. */
bool aq_spatial_is_asked(const quantize_run *run, size_t index);
/* Whether equalization may come out for this tensor. */
bool aq_spatial_is_possible(const quantize_run *run, size_t index);
/* "gptq", "gptq + hadamard", "search + spatial". Returns out. */
const char *aq_attempt_name(const attempt *a, char out[48]);
/* Most bytes that the inputs of a layer take over its attempts; *making: on top, while they are made. */
uint64_t aq_attempts_bytes(const attempt *attempts, size_t n, uint64_t n_inputs, uint64_t *making);

#endif
