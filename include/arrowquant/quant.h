/* ArrowQuant quant: group affine codes of one matrix (algorithms 1 and 2), and the metrics of the result.
 *
 * A weight is a matrix W [rows, cols] of F32, row-major. Codes q are unsigned integers of 2, 4 or 8 bits; the value of a code is
 *     w = (q - z) * s        in F32, one subtraction, one multiplication
 * with one pair (s, z) a group (two-level: a sub-group). Element i of a row lies at bit i*bits of the row's bytes, little-endian;
 * each row starts on a byte boundary; unused bits are 0.
 *
 * How s and z are stored (`params`, groups row-major):
 *   AQ_PARAMS_F32        float s, float z per group                                  64 bits a group
 *   AQ_PARAMS_F16        half s, half o per group; z = -(float)o / (float)s          32 bits a group
 *   AQ_PARAMS_TWO_LEVEL  groups of up to 256 with half S, half O, then small integers k_j, m_j per sub-group:
 *                        s_j = S * k_j, o_j = O * m_j, z_j = -o_j / s_j; sub-groups of 16 with 4 + 4 bits at 2 bits,
 *                        of 32 with 6 + 6 bits at 4 bits. Byte layout: docs/format-params.md. Not for 8 bits and not for axis 0; the group
 *                        size is a multiple of the sub-group's, at most 256.
 *   AQ_PARAMS_R2Q        half m, half a1, half a2 per group (48 bits), 2 bits only: the four levels of code c are m +- a1 +- a2, bit 1 of c the sign of a1 and
 *                        bit 0 the sign of a2 (1: plus), added in this order in F32; it has levels instead of pairs
 * Codes are chosen after the parameters were rounded to their stored form. The same bytes come out at any thread count and
 * on every instruction set.
 */
#ifndef ARROWQUANT_QUANT_H
#define ARROWQUANT_QUANT_H

#include <arrowquant/base.h>

#ifdef __cplusplus
extern "C" {
#endif

/* GPTQ and R2Q choose codes against the error of the output and go through aq_solve (solve.h). AQ_METHOD_R2Q needs AQ_PARAMS_R2Q; with these parameters
 * aq_quantize fits the levels to the weights alone, whatever the method. */
typedef enum aq_method { AQ_METHOD_RTN, AQ_METHOD_SEARCH, AQ_METHOD_GPTQ, AQ_METHOD_R2Q } aq_method;
typedef enum aq_params_form { AQ_PARAMS_F16, AQ_PARAMS_F32, AQ_PARAMS_TWO_LEVEL, AQ_PARAMS_R2Q } aq_params_form;

/* What to do with one matrix. */
typedef struct aq_quant_spec {
    int bits;            /* 2, 4 or 8 */
    uint64_t group_size; /* axis 1: consecutive inputs per group; axis 0: consecutive rows per group; 0 = whole row (axis 1) / all rows (axis 0) */
    int axis;            /* 1: groups along the row; 0: groups of rows that share one pair */
    aq_params_form params;
    aq_method method; /* rtn: min-max; search: clip search and least squares, never worse than rtn */
    bool symmetric;   /* z fixed at 2^(bits-1) */
    bool no_simd;     /* scalar kernels only; the bytes are the same */
} aq_quant_spec;

/* Sizes that follow from a spec and a shape. */
typedef struct aq_quant_layout {
    uint64_t rows, cols;
    uint64_t row_bytes;      /* bytes of codes per row */
    uint64_t codes_bytes;    /* rows * row_bytes */
    uint64_t groups_per_row; /* axis 1; for axis 0: 1 */
    uint64_t n_groups;       /* number of groups in all */
    uint64_t n_pairs;        /* number of (s, z) pairs after expansion: n_groups, or all sub-groups when two-level */
    uint64_t pairs_per_row;  /* axis 1; for axis 0: 1 */
    uint64_t pair_width;     /* inputs per pair: group size, or sub-group size when two-level (axis 1) */
    uint64_t params_bytes;   /* bytes of the stored parameters */
} aq_quant_layout;

/* Checks a spec ("Invalid bit_width: 3. Must be 2, 4, or 8" …) and computes sizes, overflow-checked. rows or cols may be 0.
 * AQ_ERR_USAGE for a bad spec, AQ_ERR_FORMAT for sizes that overflow. */
AQ_API aq_status aq_quant_layout_init(aq_quant_layout *out, const aq_quant_spec *spec, uint64_t rows, uint64_t cols, aq_error *err);

/* Error of an approximation; sums in double, fixed order. Additive: parts of a matrix may be summed. */
typedef struct aq_quant_metrics {
    double dot;     /* sum w * v */
    double w_sq;    /* sum w^2 */
    double v_sq;    /* sum v^2, v the dequantized value */
    double err_sq;  /* sum (w - v)^2 */
    double err_max; /* max |w - v| */
    uint64_t count;
} aq_quant_metrics;

AQ_API void aq_quant_metrics_add(aq_quant_metrics *into, const aq_quant_metrics *part);
/* Cosine similarity; 1 when both are zero, 0 when one is. */
AQ_API double aq_quant_metrics_cosine(const aq_quant_metrics *m);
/* 10 log10(w_sq / err_sq) in dB; +infinity when exact. */
AQ_API double aq_quant_metrics_sqnr_db(const aq_quant_metrics *m);

/* Quantizes W [rows, cols] of `layout` into `codes` (layout->codes_bytes) and `params` (layout->params_bytes), both the caller's, disjoint from w.
 * `importance` [cols] weights the squared error of each input in the search (NULL: 1; AQ_ERR_USAGE when one is negative or not finite). `metrics` may be NULL.
 * `n_threads` 0 = all. Every value must be finite: AQ_ERR_FORMAT names the first flat index otherwise.
 * With AQ_PARAMS_F16 / TWO_LEVEL, a group whose scale or offset does not fit half precision (overflow, or underflow below 2^-20) makes the call
 * return AQ_ERR_QUALITY with `*needs_f32` = true (needs_f32 may be NULL): the caller widens to AQ_PARAMS_F32 and counts it.
 * AQ_ERR_MEMORY when scratch cannot be had. */
AQ_API aq_status aq_quantize(const float *w, const aq_quant_spec *spec, const aq_quant_layout *layout, const float *importance, int n_threads, uint8_t *codes,
                             void *params, aq_quant_metrics *metrics, bool *needs_f32, aq_error *err);

/* Dequantizes rows [row_begin, row_begin + n_rows) into out [n_rows, cols]. Infallible for a valid layout. */
AQ_API void aq_dequantize(const aq_quant_spec *spec, const aq_quant_layout *layout, const uint8_t *codes, const void *params, uint64_t row_begin,
                          uint64_t n_rows, float *out);

/* Expands stored parameters to one (s, z) pair per group or sub-group [n_pairs]. R2Q has levels instead: NaN. */
AQ_API void aq_quant_pairs(const aq_quant_spec *spec, const aq_quant_layout *layout, const void *params, float *scales, float *zero_points);

/* Checks parameters that come from a file: every s finite and > 0, every z finite; every level of R2Q finite. AQ_ERR_FORMAT names the first bad group. */
AQ_API aq_status aq_quant_params_check(const aq_quant_spec *spec, const aq_quant_layout *layout, const void *params, aq_error *err);

/* Metrics between two arrays of n floats. */
AQ_API void aq_quant_metrics_compute(const float *w, const float *v, uint64_t n, aq_quant_metrics *out);

AQ_API const char *aq_method_name(aq_method method);         /* "rtn", "search" */
AQ_API const char *aq_params_form_name(aq_params_form form); /* "f16", "f32", "two-level" */

#ifdef __cplusplus
}
#endif
#endif
