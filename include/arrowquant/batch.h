/* ArrowQuant batch: many matrices quantized by one call, for callers that hold arrays (the Python module, embedding programs).
 *
 * All matrices of a batch are cut into pieces of whole groups, whose number and size follow from the shapes alone; the pieces are spread over the threads.
 * So one large matrix and a thousand small ones both keep all cores busy, and the bytes are the same at any thread count.
 * Memory is the caller's: weights are only read, results are written straight into the caller's buffers (nothing is copied).
 */
#ifndef ARROWQUANT_BATCH_H
#define ARROWQUANT_BATCH_H

#include <arrowquant/quant.h>

#ifdef __cplusplus
extern "C" {
#endif

#define AQ_ALL_FINITE UINT64_MAX

/* One matrix W [rows, cols] and where its result goes. */
typedef struct aq_batch_layer {
    const float *weights; /* [rows, cols], row-major; may be NULL when there are none */
    uint64_t rows, cols;
    uint8_t *codes;           /* layout.codes_bytes of aq_quant_layout_init */
    float *scales;            /* layout.n_groups */
    float *zero_points;       /* layout.n_groups */
    uint64_t first_nonfinite; /* set by aq_batch_check: flat index of the first NaN or Inf, AQ_ALL_FINITE when there is none */
    aq_status status;         /* set by aq_batch_quantize */
} aq_batch_layer;

typedef struct aq_batch_options {
    aq_quant_spec spec; /* axis 1, AQ_PARAMS_F32 */
    int n_threads;      /* 0: all */
    /* Called from the calling thread, while the others work, at least every 50 ms, and once for each layer that is finished.
     * `layer` is the index of the finished layer, or SIZE_MAX when there is none to tell. Returning false stops the batch. May be NULL. */
    bool (*tick)(void *user, size_t layer, size_t n_finished);
    void *user;
} aq_batch_options;

/* Finds the first NaN or Inf of each layer (`first_nonfinite`), reading every weight once. Of the options it takes n_threads and tick, which is called without
 * a layer. AQ_ERR_INTERRUPTED when `tick` stopped it, nothing else. */
AQ_API aq_status aq_batch_check(aq_batch_layer *layers, size_t n_layers, const aq_batch_options *options, aq_error *err);

/* Quantizes every layer. A layer that fails has its status set and does not stop the others; the error of the first such layer is returned.
 * AQ_ERR_USAGE for a bad spec (no layer was touched), AQ_ERR_INTERRUPTED when `tick` stopped it, AQ_ERR_MEMORY. */
AQ_API aq_status aq_batch_quantize(aq_batch_layer *layers, size_t n_layers, const aq_batch_options *options, aq_error *err);

/* The way back for one layer: W'[rows, cols] = (q - z) * s into `out`, from codes and parameters laid out as above, in parallel.
 * Codes, scales and zero points must have the sizes of the layout. AQ_ERR_USAGE for a bad spec, AQ_ERR_FORMAT names the first scale that is not
 * finite and positive, or zero point that is not finite. */
AQ_API aq_status aq_batch_dequantize(const aq_quant_spec *spec, uint64_t rows, uint64_t cols, const uint8_t *codes, const float *scales,
                                     const float *zero_points, int n_threads, float *out, aq_error *err);

/* Codes of 8 bits under parameters that are given: part g of G, the values [g*n/G, (g+1)*n/G), is coded as round(w / scales[g] + zero_points[g]), half to even,
 * clamped to 0..255. Every weight, scale and zero point must be finite and every scale positive; `n_parts` >= 1. */
AQ_API void aq_quantize_parts(const float *weights, uint64_t n, const float *scales, const float *zero_points, size_t n_parts, int n_threads, uint8_t *codes);

#ifdef __cplusplus
}
#endif
#endif
