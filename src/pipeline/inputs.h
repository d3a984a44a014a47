/* What calibration says about the inputs of a layer, in the basis its codes are made in: the diagonal of H, H itself, or its factor.
 *
 * A pool holds what the layers in flight use. Consecutive layers that read the same input (q, k, v) share one entry, which lives until the last of them is
 * finished, so that their second moment is factored once. An entry counts in the memory plan of every layer that uses it.
 */
#ifndef AQ_PIPELINE_INPUTS_H
#define AQ_PIPELINE_INPUTS_H

#include "pipeline/quantize.h"
#include "quant/code.h"

typedef enum inputs_want { INPUTS_NONE, INPUTS_DIAGONAL, INPUTS_METRIC, INPUTS_FACTOR } inputs_want;

/* Which inputs: x s R, or (x - m) s R of a fold. */
typedef struct inputs_basis {
    const aq_fold *fold; /* s and m; NULL: s by `equalized` */
    aq_equalize equalized;
    uint32_t hadamard_group; /* 0: not rotated */
    bool corrected;          /* the bias makes up for the mean: x less it is what the codes are made for */
} inputs_basis;

typedef struct layer_inputs {
    uint64_t n;
    float *importance;   /* [n] diagonal of H; NULL when H is 0 or not finite: see `problem` */
    float *h;            /* [n, n] with INPUTS_METRIC, or when there is no factor; NULL like the diagonal */
    aq_hessian *hessian; /* with INPUTS_FACTOR */
    float *equalization; /* s [n] of an equalized basis */
    const float *shift;  /* m [n] of a fold, borrowed, or NULL */
    float *mean;         /* with a shift or a correction: of the inputs, as H weights them [n] */
    const float *centre; /* what H is about: the mean, the shift of a fold, or NULL: 0 */
    float *corrected;    /* the mean less a fold's shift [n], which the bias makes up for; NULL: it does not */
    bool made_up;        /* H = I: nothing is known of the inputs */
    char problem[320];   /* why there is no factor */
} layer_inputs;

typedef struct inputs_pool inputs_pool;
aq_status aq_inputs_pool_create(inputs_pool **out, const quantize_run *run, aq_error *err);
void aq_inputs_pool_free(inputs_pool *pool);
/* The inputs of tensor `index`; made by the first who asks, others wait for it. A second moment that cannot be factored is no failure: see `problem`. */
aq_status aq_inputs_take(inputs_pool *pool, size_t index, inputs_want want, inputs_basis basis, const layer_inputs **out, aq_error *err);
void aq_inputs_release(inputs_pool *pool, const layer_inputs *inputs);
/* Tensor `index` will not take any more. */
void aq_inputs_finish(inputs_pool *pool, size_t index);

/* The same of no pool, for tensor `index` alone. */
aq_status aq_inputs_make(const quantize_run *run, size_t index, inputs_want want, inputs_basis basis, layer_inputs **out, aq_error *err);
void aq_inputs_free(layer_inputs *inputs);
bool aq_same_basis(const inputs_basis *a, const inputs_basis *b);
/* How codes are made for such inputs (NULL: none); spec, hadamard_group and bias_change are the caller's. */
aq_coder aq_inputs_coder(const quantize_run *run, const layer_inputs *in);
/* Root mean squares of the inputs in the basis of the codes, rotation included, into out [n]. */
aq_status aq_inputs_rms(const layer_inputs *in, uint32_t hadamard_group, float *out, aq_error *err);
/* Largest magnitude of each input less shift [n] (NULL: 0), over the groups of timesteps as temporal_aggregation says. */
void aq_input_ranges(const quantize_run *run, size_t layer, const float *shift, float *out);
/* Largest magnitude per input over the weights of tensor `index`; out is raised. */
aq_status aq_weight_ranges(const quantize_run *run, size_t index, float *out, aq_error *err);
/* Values of tensor `index` as the run's folds make them. */
aq_status aq_run_read_f32(const quantize_run *run, size_t index, uint64_t begin, uint64_t count, float *out, aq_error *err);
/* What the run's calibration has for a tensor: INPUTS_NONE, INPUTS_DIAGONAL or INPUTS_METRIC. `layer` (may be NULL): its number in the collection. */
inputs_want aq_inputs_known(const quantize_run *run, size_t index, size_t *layer);
/* Bytes of an entry for n inputs, and what making it takes beyond that. UINT64_MAX: beyond every memory. */
uint64_t aq_inputs_bytes(inputs_want want, uint64_t n, uint64_t *making);

#endif
