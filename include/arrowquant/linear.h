/* ArrowQuant linear: a layer that runs on its codes. y = x W'^T + bias, with W' = dequantize(codes, params) of quant.h, which never exists as a whole.
 *
 * Few rows of x: every output is a dot product on the codes themselves, which are read once, at the speed of memory. More rows: panels of W' (some inputs of
 * some outputs) are dequantized into the cache, laid out as the matrix product wants them, and multiplied by all rows (kernels/gemm.h).
 * Codes and parameters are only read and may lie in a memory-mapped file. What a layer needs besides (equalization of its inputs, their rotation) is done to x
 * by the caller, aq_hadamard (solve.h) for one.
 */
#ifndef ARROWQUANT_LINEAR_H
#define ARROWQUANT_LINEAR_H

#include <arrowquant/quant.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Up to so many rows of x are multiplied on the codes. */
enum { AQ_LINEAR_FEW = 8 };

/* A layer of layout.rows outputs and layout.cols inputs. Everything is borrowed. Parameters that come from a file were checked (aq_quant_params_check). */
typedef struct aq_linear_weight {
    aq_quant_spec spec;     /* bits, group size, axis, form of the parameters; its method does not matter */
    aq_quant_layout layout; /* of aq_quant_layout_init */
    const uint8_t *codes;   /* layout.codes_bytes */
    const void *params;     /* layout.params_bytes */
    const float *bias;      /* [outputs], or NULL */
} aq_linear_weight;

/* y [n_rows, outputs] = x [n_rows, inputs] W'^T + bias, all row-major and contiguous. y overlaps nothing. n_threads 0: all.
 * Sums are F32 with fused multiply-adds. With more than AQ_LINEAR_FEW rows, y has the bits of the product of aq_gemm_f32 on the dequantized matrix, added to
 * the bias. With fewer, a group's sum of s q x + o x takes the place of that of (q - z) s x, in 16 lanes: the same up to rounding. Either way the same bits at
 * any thread count and on every instruction set. AQ_ERR_MEMORY, nothing else: y is untouched or holds partial sums then. */
AQ_API aq_status aq_linear(const aq_linear_weight *weight, const float *x, uint64_t n_rows, float *y, int n_threads, aq_error *err);

#ifdef __cplusplus
}
#endif
#endif
