/* Rows of one layer coded by any method and measured in the layer's output: what the orchestrator does with a layer and the planner with a candidate. */
#ifndef AQ_QUANT_CODE_H
#define AQ_QUANT_CODE_H

#include <arrowquant/quant.h>
#include <arrowquant/solve.h>

/* How to code a layer of n inputs. All pointers are borrowed and may be NULL.
 * The codes are those of W R / s; hessian, h and importance then belong to the inputs in that basis, x s R. */
typedef struct aq_coder {
    aq_quant_spec spec;
    const aq_hessian *hessian; /* needed by AQ_METHOD_GPTQ and AQ_METHOD_R2Q; measures the output error */
    const float *h;            /* [n, n]: measures the output error when there is no `hessian` */
    const float *importance;   /* [n]: weights of the search */
    aq_solve_options solve;
    const float *equalization; /* s [n] */
    const float *shift, *mean; /* m and the mean of x [n]: H is that of (x - m) s R; or both NULL. The output's power counts x as it is */
    const float *corrected;  /* c [n], the mean of x less what a fold takes from it: the bias grows by (W - W^) c (Nagel et al. 2019, 4.2). NULL: it does not */
    bool h_has_mean;         /* H is not that of x less its mean: what the bias makes up for is taken out of the output's error afterwards */
    double *bias_change;     /* [rows] receives (W - W^) c; needed with `corrected` */
    uint32_t hadamard_group; /* size of R's blocks; 0: not rotated */
} aq_coder;

typedef struct aq_coded {
    aq_quant_metrics metrics; /* of W itself, whatever the basis */
    aq_output_error output;   /* zeros when nothing is known of the inputs */
    double bias_sq;           /* sum of squares of bias_change: what the output's error would be more with the bias as it was */
    double code_sq;           /* sum of squares of what the codes stand for, in their basis: how much noise of the inputs reaches the output */
    bool needs_f32;           /* nothing was coded: parameters do not fit half precision, or values in this basis F32 */
} aq_coded;

/* H [n, n] of x - shift from that of x and its mean; what rounding leaves of the diagonal is kept above nothing. With shift == mean: the covariance. */
void aq_shift_moment(float *h, uint64_t n, const float *mean, const float *shift);
/* Whether a covariance is to be solved in place of H: the inputs vary by more than their mean's rounding. diagonal: of H, `stride` apart. */
bool aq_moment_varies(const float *diagonal, uint64_t stride, uint64_t n, const float *mean);

/* Interrupted when it returns false; may be NULL. */
typedef bool (*aq_going)(void *user);

/* Codes w [rows, cols] into `codes` and `params` of a layout made for these rows. What cannot be stored in half precision is AQ_OK with out->needs_f32.
 * Scratch: up to two copies of w, and what aq_solve takes. Errors: as aq_quantize and aq_solve. */
aq_status aq_code_rows(const aq_coder *coder, const float *w, uint64_t rows, uint64_t cols, int n_threads, uint8_t *codes, void *params, aq_coded *out,
                       aq_going keep_going, void *user, aq_error *err);

#endif
