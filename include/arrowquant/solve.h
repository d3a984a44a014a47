/* ArrowQuant solve: codes chosen against the error of the layer's output, tr(E H E^T) with E = W - W', instead of that of the weight (algorithms 3, 4).
 *
 * H [n, n] is the second moment of the layer's inputs. Rows of W are independent, so any slab of rows may be solved alone: a caller makes one `aq_hessian`
 * and solves slabs on several threads; the result does not depend on how rows were cut.
 */
#ifndef ARROWQUANT_SOLVE_H
#define ARROWQUANT_SOLVE_H

#include <arrowquant/quant.h>

#ifdef __cplusplus
extern "C" {
#endif

/* The order in which inputs are coded. In an order other than their own, groups keep their inputs and get their parameters first, from the original weights. */
typedef enum aq_solve_order {
    AQ_ORDER_BALANCED, /* the input that the rest explains best last, and so on: pivots of the factor as equal as can be; the best known */
    AQ_ORDER_ENERGY,   /* by falling H_ii ("act_order") */
    AQ_ORDER_INPUTS    /* as they stand; groups get their parameters when they are entered, on the updated weights */
} aq_solve_order;

typedef struct aq_solve_options {
    double damp; /* fraction of mean diag H that is added to the diagonal: 0.01; x10 up to 1 when the factorization fails */
    aq_solve_order order;
    int refine_sweeps; /* rounds of refine after GPTQ (0: none; default 3): no round raises tr(E H E^T) */
    bool no_feedback;  /* only the search with diag H, then refine when asked */
} aq_solve_options;
AQ_API void aq_solve_options_init(aq_solve_options *options);

/* What solving needs of H, made once per layer (or once for layers that share inputs): factor, order, diagonal. Holds about 2 n^2 floats. */
typedef struct aq_hessian aq_hessian;
/* Factors H [n, n] (F32, symmetric; only the upper triangle is read). H is not kept. Dead inputs (H_ii = 0) get weight 0.
 * AQ_ERR_FORMAT: NaN or infinity, negative diagonal. AQ_ERR_QUALITY: not positive definite even with damping 1. AQ_ERR_MEMORY. n_threads: 0 all. */
AQ_API aq_status aq_hessian_create(aq_hessian **out, const float *h, uint64_t n, const aq_solve_options *options, int n_threads, aq_error *err);
AQ_API void aq_hessian_free(aq_hessian *hessian);
AQ_API double aq_hessian_damping(const aq_hessian *hessian); /* the damping that worked */
AQ_API uint64_t aq_hessian_bytes(uint64_t n);                /* memory that one holds, and what making it takes on top */

/* Output error of a slab, additive over slabs: of E and of W in the metric of the undamped H. */
typedef struct aq_output_error {
    double err, ref; /* tr(E H E^T), tr(W H W^T) */
} aq_output_error;
AQ_API double aq_output_sqnr_db(const aq_output_error *e); /* 10 log10(ref / err); +infinity when exact */

/* As aq_quantize (quant.h), on rows of W [layout->rows, n] with spec->method AQ_METHOD_GPTQ or AQ_METHOD_R2Q and groups along the inputs.
 * `output` may be NULL. Stored parameter forms are respected: codes are chosen on the rounded grid. AQ_ERR_QUALITY with *needs_f32 as there.
 * keep_going (may be NULL) is asked between blocks of columns: false returns AQ_ERR_INTERRUPTED. */
AQ_API aq_status aq_solve(const float *w, const aq_quant_spec *spec, const aq_quant_layout *layout, const aq_hessian *hessian, const aq_solve_options *options,
                          int n_threads, uint8_t *codes, void *params, aq_quant_metrics *metrics, aq_output_error *output, bool *needs_f32,
                          bool (*keep_going)(void *user), void *user, aq_error *err);

/* Output error of any approximation V of W, both [rows, n]; adds to *out. n_threads: 0 all. */
AQ_API aq_status aq_output_error_add(const float *w, const float *v, uint64_t rows, uint64_t n, const float *h, int n_threads, aq_output_error *out,
                                     aq_error *err);

/* ---- rotation ---- */

/* x [rows, n] times the orthogonal, symmetric block-diagonal Hadamard matrix of blocks `size`, in place. `size` is a power of 4 (Kronecker powers of the
 * regular H4 = [[1,1,1,-1],[1,1,-1,1],[1,-1,1,1],[-1,1,1,1]] / 2) dividing n. Its own inverse. The same bytes on every instruction set. */
AQ_API void aq_hadamard(float *x, uint64_t rows, uint64_t n, uint64_t size);
/* R H R in place, for H [n, n]. */
AQ_API void aq_hadamard_hessian(float *h, uint64_t n, uint64_t size);
/* The largest power of 4 up to 256 dividing n; 1 when there is none above 1. */
AQ_API uint64_t aq_hadamard_size(uint64_t n);

#ifdef __cplusplus
}
#endif
#endif
