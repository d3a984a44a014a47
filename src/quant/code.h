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
    uint32_t hadamard_group;   /* size of R's blocks; 0: not rotated */
} aq_coder;

typedef struct aq_coded {
    aq_quant_metrics metrics; /* of W itself, whatever the basis */
    aq_output_error output;   /* zeros when nothing is known of the inputs */
    double code_sq;           /* sum of squares of what the codes stand for, in their basis: how much noise of the inputs reaches the output */
    bool needs_f32;           /* nothing was coded: parameters do not fit half precision */
} aq_coded;

/* Interrupted when it returns false; may be NULL. */
typedef bool (*aq_going)(void *user);

/* Codes w [rows, cols] into `codes` and `params` of a layout made for these rows. What cannot be stored in half precision is AQ_OK with out->needs_f32.
 * Scratch: up to two copies of w, and what aq_solve takes. Errors: as aq_quantize and aq_solve. */
aq_status aq_code_rows(const aq_coder *coder, const float *w, uint64_t rows, uint64_t cols, int n_threads, uint8_t *codes, void *params, aq_coded *out,
                       aq_going keep_going, void *user, aq_error *err);

/* Rows [row_begin, row_begin + n_rows) of a layer as F32; called from several threads at once. */
typedef aq_status (*aq_rows_reader)(void *user, uint64_t row_begin, uint64_t n_rows, float *out, aq_error *err);

/* Measures a whole layer under `coder` without keeping its codes: slabs of `slab_rows` rows (a multiple of the row group for axis 0) on `n_threads` threads,
 * the same sums at any number of them. *size_bytes: codes and parameters. */
aq_status aq_measure_layer(const aq_coder *coder, aq_rows_reader read, void *read_user, uint64_t rows, uint64_t cols, uint64_t slab_rows, int n_threads,
                           aq_coded *out, uint64_t *size_bytes, aq_going keep_going, void *user, aq_error *err);

#endif
