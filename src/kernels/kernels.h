/* Kernels: the inner loops, one table of function pointers per instruction set.
 *
 * scalar.c defines what each kernel computes; template.h holds the vector form, which avx2.c, avx512.c and neon.c include and compile with
 * their own flags. All give the same bits: elementwise operations are single IEEE operations (no contraction into fused multiply-add), and
 * where a kernel sums, the order is part of its contract. Arrays need no alignment. Inputs are finite unless a kernel says otherwise.
 */
#ifndef AQ_KERNELS_KERNELS_H
#define AQ_KERNELS_KERNELS_H

#include <arrowquant/base.h>

/* Sums of an approximation v of w. Element i is added to lane i % 16; lanes are folded 16 -> 8 -> 4 -> 2 -> 1, lane j taking lane j + half. */
typedef struct aq_error_sums {
    double dot, w_sq, v_sq, err_sq, err_max;
} aq_error_sums;

/* The search runs 16 groups at a time, one per lane: values are transposed, x[step * 16 + lane]. */
enum { AQ_LANES = 16 };

/* What one pass over the values of 16 groups learns about the codes q = clamp(rint((x - o) / s)) and their residuals r = x - (s q + o):
 * sums over the steps, in rising order, in F32, each term weighted by h. They suffice for the least-squares s and o of these codes. */
typedef struct aq_fit_sums {
    float q[AQ_LANES], qq[AQ_LANES], r[AQ_LANES], rq[AQ_LANES], rr[AQ_LANES];
} aq_fit_sums;

typedef struct aq_kernels {
    const char *name;

    /* Bulk conversion, as base/half.h defines it. NaN allowed. */
    void (*f16_to_f32)(const uint16_t *in, float *out, size_t n);
    void (*f32_to_f16)(const float *in, uint16_t *out, size_t n);
    void (*bf16_to_f32)(const uint16_t *in, float *out, size_t n);
    void (*f32_to_bf16)(const float *in, uint16_t *out, size_t n);

    /* Index of the first NaN or infinity, n when there is none. */
    size_t (*find_nonfinite)(const float *x, size_t n);
    /* Smallest and largest of n >= 1 values; a zero result is +0 or -0 as it comes (n is not read beyond, callers add +0). */
    void (*range)(const float *x, size_t n, float *lo, float *hi);

    /* codes[i] = clamp(rint(x[i] / s + z), 0, q_max), one byte each. s > 0; |x / s + z| < 2^31 is not required. */
    void (*quantize)(const float *x, size_t n, float s, float z, int q_max, uint8_t *codes);
    /* out[i] = ((float)codes[i] - z) * s */
    void (*dequantize)(const uint8_t *codes, size_t n, float s, float z, float *out);
    /* One code a byte <-> 8 / bits codes a byte, little-endian; unused bits of the last byte are 0. */
    void (*pack2)(const uint8_t *codes, size_t n, uint8_t *packed);
    void (*pack4)(const uint8_t *codes, size_t n, uint8_t *packed);
    void (*unpack2)(const uint8_t *packed, size_t n, uint8_t *codes);
    void (*unpack4)(const uint8_t *packed, size_t n, uint8_t *codes);

    /* Sums over n elements, in the order of aq_error_sums. */
    void (*error_sums)(const float *w, const float *v, size_t n, aq_error_sums *out);
} aq_kernels;

extern const aq_kernels aq_kernels_scalar, aq_kernels_avx2, aq_kernels_avx512, aq_kernels_neon;

/* The kernels in use: the best that the CPU has, or what ARROWQUANT_ISA (scalar, avx2, avx512, neon) names; an unusable name counts as not set here. */
const aq_kernels *aq_kernels_get(void);
/* The table of an instruction set: "scalar", "avx2", "avx512", "neon". NULL when the name is unknown or this CPU lacks it. */
const aq_kernels *aq_kernels_find(const char *isa);
/* Selects for the whole process; NULL or "": what ARROWQUANT_ISA says, else the best. AQ_ERR_USAGE when unknown or not on this CPU. A program calls it at its
 * start. */
AQ_API aq_status aq_kernels_select(const char *isa, aq_error *err);

#endif
