/* Test helper: a small model with shared inputs, a convolution and wide channels, and a calibration of it that is made, not recorded. */
#ifndef AQ_TEST_CALIB_MODEL_H
#define AQ_TEST_CALIB_MODEL_H

#include <arrowquant/calibration.h>

#include "pipeline_model.h"

/* Five layers: attn.to_q, to_k, to_v [64, 128] of one input, ff [96, 200], conv [24, 20, 3, 3]; biases. */
const char *attention_model(const char *name);
/* Correlated inputs of very different strength, 4 groups of 1000 timesteps, `rows` a layer and group. `seed` gives another collection. */
aq_calib *attention_calibration(uint64_t rows, uint32_t seed);
/* The same without rows in the group `missing` (-1: none), without H, or without the layer `without` (NULL: all). */
aq_calib *calibration_of(uint64_t rows, uint32_t seed, int missing, bool hessian, const char *without);

/* Runs with a calibration in memory; fails the test when the run does. */
json_t *quantize_calibrated(const char *model, const aq_calib *calib, const char *out, const char *settings);
/* The same, whatever comes out. */
result try_calibrated(const char *model, const aq_calib *calib, const char *out, const char *settings, const aq_job_hooks *hooks);

#endif
