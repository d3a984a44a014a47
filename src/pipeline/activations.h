/* Parameters of a layer's inputs per group of timesteps, and their statistics, as the container stores them (algorithms.md 6). */
#ifndef AQ_PIPELINE_ACTIVATIONS_H
#define AQ_PIPELINE_ACTIVATIONS_H

#include "pipeline/quantize.h"

typedef struct layer_activations {
    aq_time_group *groups; /* [n], NULL: none */
    float *stats[4];       /* mean, std, min, max per group [n] */
    size_t n;
} layer_activations;

/* For the inputs as the codes see them, (x - m) s R (equalization and shift [n] may be NULL; rms [n]: root mean squares of the rotated inputs, NULL when they
 * are not rotated). Nothing (n = 0) without calibration, with one that knows no ranges (an importance matrix), or with time
 * awareness off. *problem: "" or why this layer has to do with one pair for all timesteps,
 * which is then what it gets. AQ_ERR_MEMORY. */
aq_status aq_activations(const quantize_run *run, size_t index, const float *equalization, const float *shift, const float *rms, layer_activations *out,
                         char problem[160], aq_error *err);
void aq_activations_free(layer_activations *a);
/* The relative error of a layer's output: of codes whose values' squares sum to code_sq, and of 8-bit inputs where the settings ask for them. */
double aq_relative_error(const quantize_run *run, const aq_output_error *output, double code_sq, const layer_activations *a);
/* Mean square of what 8-bit codes with these parameters add to an input value; 0 without groups. */
double aq_activations_noise(const layer_activations *a);

#endif
