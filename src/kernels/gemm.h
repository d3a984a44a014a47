/* Matrix products in F32 and F64: the one place where the library multiplies matrices (solvers, statistics, layers that run).
 *
 * C[i][j] is a chain of fused multiply-adds over k in rising order within blocks of AQ_GEMM_BLOCK, the blocks' sums added to C in rising order: the same
 * bits at any thread count and on every instruction set (a NaN's sign and payload apart). Threads: src/base/threads.h.
 */
#ifndef AQ_KERNELS_GEMM_H
#define AQ_KERNELS_GEMM_H

#include <arrowquant/base.h>

enum { AQ_GEMM_BLOCK = 256 };

/* Element (i, j) lies at data[i * row_stride + j * col_stride]; a transpose swaps the strides. */
typedef struct aq_matrix_f32 {
    const float *data;
    uint64_t row_stride, col_stride;
} aq_matrix_f32;
typedef struct aq_matrix_f64 {
    const double *data;
    uint64_t row_stride, col_stride;
} aq_matrix_f64;

typedef enum {
    AQ_GEMM_FULL,
    AQ_GEMM_UPPER,  /* only elements with j >= i change, about half the work: for symmetric results (m = n) */
    AQ_GEMM_SCRATCH /* the same, quicker: of those with j < i, some change and mean nothing */
} aq_gemm_part;

/* C [m, n] (rows `ldc` elements apart) += A [m, k] B [k, n], or -= with `subtract`. C does not overlap A or B. n_threads 0: all.
 * False when scratch (packing, bounded by a few MB a thread) cannot be had; C is untouched then. */
bool aq_gemm_f32(uint64_t m, uint64_t n, uint64_t k, aq_matrix_f32 a, aq_matrix_f32 b, float *c, uint64_t ldc, bool subtract, aq_gemm_part part, int n_threads);
bool aq_gemm_f64(uint64_t m, uint64_t n, uint64_t k, aq_matrix_f64 a, aq_matrix_f64 b, double *c, uint64_t ldc, bool subtract, aq_gemm_part part,
                 int n_threads);

/* Writes steps [step, step + depth) of columns [column, column + width) of B as a panel: out[l * cols + i], `cols` of the kernels' gemm_f32, columns from
 * `width` on as it likes. Called from several threads; depth <= AQ_GEMM_BLOCK. */
typedef void aq_gemm_fill_f32(void *context, uint64_t column, size_t width, uint64_t step, size_t depth, float *out);
/* C += A B as above, with B made by `fill`, every element once. */
bool aq_gemm_filled_f32(uint64_t m, uint64_t n, uint64_t k, aq_matrix_f32 a, aq_gemm_fill_f32 *fill, void *context, float *c, uint64_t ldc, int n_threads);

#endif
