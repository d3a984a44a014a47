/* ArrowQuant linear: a layer that runs on its codes. y = x W'^T + bias, with W' = dequantize(codes, params) of quant.h, which never exists as a whole.
 *
 * Few rows of x: every output is a dot product on the codes themselves, which are read once, at the speed of memory. More rows: the inputs become integers of
 * 16 bits and meet the codes in products of integers, which are exact and twice as fast as those of floats (docs/decisions/006-integers-of-16-bits.md). Inputs
 * of 8 bits, a quantization of its own, take that way at any number of rows: time.h. Codes and parameters are only read and may lie in a memory-mapped file.
 * What a layer needs besides (equalization of its inputs, their rotation) is done to x by the caller, aq_hadamard (solve.h) for one.
 */
#ifndef ARROWQUANT_LINEAR_H
#define ARROWQUANT_LINEAR_H

#include <arrowquant/quant.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Up to so many rows of x are multiplied on the codes. */
enum { AQ_LINEAR_FEW = 4 };

/* A layer of layout.rows outputs and layout.cols inputs. Everything is borrowed. Parameters that come from a file were checked (aq_quant_params_check). */
typedef struct aq_linear_weight {
    aq_quant_spec spec;     /* bits, group size, axis, form of the parameters; its method does not matter */
    aq_quant_layout layout; /* of aq_quant_layout_init */
    const uint8_t *codes;   /* layout.codes_bytes */
    const void *params;     /* layout.params_bytes */
    const float *bias;      /* [outputs], or NULL */
} aq_linear_weight;

/* y [n_rows, outputs] = x [n_rows, inputs] W'^T + bias, all row-major and contiguous. y overlaps nothing. n_threads 0: all.
 *
 * Up to AQ_LINEAR_FEW rows: sums are F32 with fused multiply-adds, of s q x + o x, w = s q + o being the line of a pair, in 16 lanes.
 *
 * More rows: each 256 inputs of a row (from a multiple of 256 on) become integers X = rint(x / t), t the least power of two, at least 2^-126, for which no |X|
 * is above 32767. So x is off by at most a 32767th of the largest |x| of its 256, or by 2^-127 where that is more, and not at all where x / t is whole. A row
 * of y starts as the bias, or 0; for each 256 inputs, in F32: p = 0; p = fma(I, s, p) for their pairs in rising order, I the exact sum of X q, rounded to F32;
 * p = fma(o, sum of X, p) for the pairs; y = fma(p, t, y). With two levels, s = S k, I is the sum of X k q and S takes the place of s: for all inputs of a
 * group (and of the 256) at once at 2 bits, for 64 of them at 4 bits (32 where the group is no multiple of 64). Rows do not depend on each other.
 *
 * In F32 instead, with the bits of the product of aq_gemm_f32 on the dequantized matrix added to the bias: rows with NaN or infinity; layers whose pairs do not
 * begin on words of 32 bits of codes (odd group sizes) or are R2Q's levels, also up to AQ_LINEAR_FEW rows; layers with F32 parameters of which an s is not
 * within 2^-60 to 2^60 or an |o| not below 2^60.
 *
 * Any way the same bits at any thread count and on every instruction set (NaNs apart). AQ_ERR_MEMORY, nothing else: y is untouched or holds partial sums then.
 */
AQ_API aq_status aq_linear(const aq_linear_weight *weight, const float *x, uint64_t n_rows, float *y, int n_threads, aq_error *err);

#ifdef __cplusplus
}
#endif
#endif
