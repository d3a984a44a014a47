/* Layers on integers (algorithms 6): y = s_w s_x sum (q_w - z_w)(q_x - z_x), W8A8, W4A8, W2A8.
 *
 * Where pairs of weights begin on words of codes, which is the rule, linear_words.c multiplies, as it does inputs of 16 bits. The plain way here is for the
 * rest. Zero points are real numbers, so it takes the product apart: for one group of n weights that share a pair,
 *     sum (q_w - z_w)(q_x - z_x) = sum q_w q_x - z_x sum q_w - z_w sum q_x + n z_w z_x,
 * exact integer sums and one rounding order of what follows, in double. So a group is K (sum p q_x - z_x sum p) + O (sum q_x - n z_x) with one plane p = q_w of
 * whole numbers, K = s_w, O = -z_w s_w. R2Q's levels m +- a1 +- a2 are two planes of 0 and 1 with K = 2 a1, 2 a2 and O = m - a1 - a2.
 */
#include <arrowquant/time.h>

#include <math.h>
#include <string.h>

#include "base/error.h"
#include "base/half.h"
#include "base/mem.h"
#include "base/size.h"
#include "base/threads.h"
#include "quant/linear_internal.h"

/* ---- activations ---- */

void aq_activation_quantize(const float *x, uint64_t rows, uint64_t n, const float *scales, const float *zero_points, size_t pair_stride, uint8_t *codes) {
    const aq_kernels *k = aq_kernels_get();
    for (uint64_t r = 0; r < rows; r++) k->quantize_inputs(x + r * n, n, scales[r * pair_stride], zero_points[r * pair_stride], codes + r * n);
}

void aq_activation_row_pair(const aq_kernels *k, const float *x, uint64_t n, float *scale, float *zero_point) {
    float lo = 0, hi = 0;
    if (n > 0 && !k->range(x, n, &lo, &hi)) { /* infinity counts, NaN does not */
        lo = hi = 0;
        for (uint64_t i = 0; i < n; i++) {
            lo = x[i] < lo ? x[i] : lo;
            hi = x[i] > hi ? x[i] : hi;
        }
    }
    aq_activation_pair(lo, hi, scale, zero_point);
}

void aq_activation_quantize_dynamic(const float *x, uint64_t rows, uint64_t n, float *scales, float *zero_points, uint8_t *codes) {
    const aq_kernels *k = aq_kernels_get();
    for (uint64_t r = 0; r < rows; r++) {
        aq_activation_row_pair(k, x + r * n, n, &scales[r], &zero_points[r]);
        k->quantize_inputs(x + r * n, n, scales[r], zero_points[r], codes + r * n);
    }
}

/* ---- the product ---- */

/* Weight rows of one task: what is unpacked is used for all rows of x. */
enum { TASK_ROWS = 8 };

typedef struct {
    const aq_quant_spec *spec;
    const aq_quant_layout *layout;
    const uint8_t *codes, *x_codes;
    int n_planes;
    const float *factors;  /* per group of weights: K of each plane, then -O / K (affine: s, z) or O (R2Q) */
    const int64_t *x_sums; /* of the codes of x by row and group [rows, pairs_per_row] */
    uint64_t rows;
    const float *x_scales, *x_zeros, *bias;
    size_t pair_stride;
    float *y;
} product;

/* One row's codes, one byte each. */
static void unpack(const uint8_t *packed, uint64_t n, unsigned bits, uint8_t *out) {
    unsigned mask = (1u << bits) - 1;
    if (bits == 8) {
        memcpy(out, packed, (size_t)n);
        return;
    }
    for (uint64_t i = 0; i < n; i++) out[i] = (uint8_t)((unsigned)packed[i * bits / 8] >> (unsigned)(i * bits % 8) & mask);
}

static int64_t sum_u8(const uint8_t *v, uint64_t n) {
    int64_t total = 0;
    for (uint64_t i = 0; i < n;) {
        uint64_t end = n - i < 1 << 16 ? n : i + (1 << 16);
        uint32_t part = 0; /* up to 2^16 * 255: fits */
        for (; i < end; i++) part += v[i];
        total += part;
    }
    return total;
}

static int64_t dot_u8(const uint8_t *a, const uint8_t *b, uint64_t n) {
    int64_t total = 0;
    for (uint64_t i = 0; i < n;) {
        uint64_t end = n - i < 1 << 15 ? n : i + (1 << 15);
        uint32_t part = 0; /* up to 2^15 * 255^2 < 2^31 */
        for (; i < end; i++) part += (uint32_t)a[i] * b[i];
        total += part;
    }
    return total;
}

/* Two planes of 0 and 1: bit 1 and bit 0 of each code. */
static void split_planes(uint8_t *weights, uint64_t n) {
    for (uint64_t i = 0; i < n; i++) {
        weights[n + i] = weights[i] & 1;
        weights[i] >>= 1;
    }
}

static void one_weight_row(const product *p, uint64_t row, uint8_t *weights, int64_t *weight_sums) {
    const aq_quant_layout *l = p->layout;
    uint64_t n_groups = l->pairs_per_row, width = l->pair_width;
    int n_planes = p->n_planes;
    unpack(p->codes + row * l->row_bytes, l->cols, (unsigned)p->spec->bits, weights);
    if (n_planes == 2) split_planes(weights, l->cols);
    for (uint64_t g = 0; g < n_groups; g++)
        for (int k = 0; k < n_planes; k++)
            weight_sums[2 * g + (uint64_t)k] = sum_u8(weights + (uint64_t)k * l->cols + g * width, l->cols - g * width < width ? l->cols - g * width : width);
    for (uint64_t r = 0; r < p->rows; r++) {
        const uint8_t *x = p->x_codes + r * l->cols;
        double zx = (double)p->x_zeros[r * p->pair_stride], sum = 0;
        for (uint64_t g = 0; g < n_groups; g++) {
            const float *f = p->factors + (row * n_groups + g) * (uint64_t)(n_planes + 1);
            uint64_t at = g * width, n = l->cols - at < width ? l->cols - at : width;
            double rest = (double)p->x_sums[r * n_groups + g] - (double)n * zx;
            double dot = (double)dot_u8(weights + at, x + at, n) - zx * (double)weight_sums[2 * g];
            if (n_planes == 1)
                sum += (double)f[0] * (dot - (double)f[1] * rest);
            else
                sum += (double)f[0] * dot + (double)f[1] * ((double)dot_u8(weights + l->cols + at, x + at, n) - zx * (double)weight_sums[2 * g + 1]) +
                       (double)f[2] * rest;
        }
        double y = sum * (double)p->x_scales[r * p->pair_stride];
        p->y[r * l->rows + row] = (float)(p->bias ? y + (double)p->bias[row] : y);
    }
}

static bool run_task(void *context, size_t index) {
    const product *p = context;
    const aq_quant_layout *l = p->layout;
    uint8_t *weights = aq_calloc(l->cols, 2);
    int64_t *sums = aq_calloc(l->pairs_per_row, 2 * sizeof *sums);
    bool ok = weights && sums;
    for (uint64_t row = index * TASK_ROWS; ok && row < l->rows && row < (index + 1) * (uint64_t)TASK_ROWS; row++) one_weight_row(p, row, weights, sums);
    aq_free(weights);
    aq_free(sums);
    return ok;
}

/* K and O of every group (see product). R2Q: halves m, a1, a2 a group. */
static void load_factors(const aq_quant_spec *spec, const aq_quant_layout *layout, const void *params, float *factors) {
    uint64_t n = layout->n_pairs;
    if (spec->params != AQ_PARAMS_R2Q) {
        aq_quant_pairs(spec, layout, params, factors + n, factors + 2 * n);
        for (uint64_t i = 0; i < n; i++) { /* s and z side by side: reads stay ahead of writes */
            float s = factors[n + i], z = factors[2 * n + i];
            factors[2 * i] = s;
            factors[2 * i + 1] = z;
        }
        return;
    }
    for (uint64_t i = 0; i < n; i++) {
        uint16_t h[3];
        memcpy(h, (const uint8_t *)params + 6 * i, 6);
        float m = aq_f16_to_f32(h[0]), a1 = aq_f16_to_f32(h[1]), a2 = aq_f16_to_f32(h[2]);
        factors[3 * i] = 2 * a1;
        factors[3 * i + 1] = 2 * a2;
        factors[3 * i + 2] = m - a1 - a2;
    }
}

static void sum_activations(const aq_quant_layout *l, const uint8_t *x_codes, uint64_t rows, int64_t *sums) {
    for (uint64_t r = 0; r < rows; r++)
        for (uint64_t g = 0; g < l->pairs_per_row; g++) {
            uint64_t at = g * l->pair_width, n = l->cols - at < l->pair_width ? l->cols - at : l->pair_width;
            sums[r * l->pairs_per_row + g] = sum_u8(x_codes + r * l->cols + at, n);
        }
}

static aq_status in_double(const aq_linear_weight *w, const uint8_t *x_codes, uint64_t rows, const float *x_scales, const float *x_zero_points,
                           size_t pair_stride, float *y, int n_threads, aq_error *err) {
    const aq_quant_layout *layout = &w->layout;
    uint64_t n_sums, bytes, factor_bytes;
    if (!aq_mul(rows, layout->pairs_per_row, &n_sums) || !aq_mul(n_sums, 8, &bytes) || !aq_mul(layout->n_pairs, 12, &factor_bytes))
        return aq_fail_memory(err, UINT64_MAX, "sums of activations");
    float *factors = aq_alloc(factor_bytes);
    int64_t *sums = aq_alloc(bytes);
    aq_status status = factors && sums ? AQ_OK : aq_fail_memory(err, bytes + factor_bytes, "sums of activations");
    if (status == AQ_OK) {
        load_factors(&w->spec, layout, w->params, factors);
        sum_activations(layout, x_codes, rows, sums);
        product p = {.spec = &w->spec,
                     .layout = layout,
                     .codes = w->codes,
                     .x_codes = x_codes,
                     .n_planes = w->spec.params == AQ_PARAMS_R2Q ? 2 : 1,
                     .factors = factors,
                     .x_sums = sums,
                     .rows = rows,
                     .x_scales = x_scales,
                     .x_zeros = x_zero_points,
                     .bias = w->bias,
                     .pair_stride = pair_stride,
                     .y = y};
        if (!aq_parallel_for((size_t)aq_div_up(layout->rows, TASK_ROWS), n_threads, run_task, &p)) status = aq_fail_memory(err, layout->cols, "a row of codes");
    }
    aq_free(factors);
    aq_free(sums);
    return status;
}

/* The codes of x, then their product. */
static aq_status code_in_double(const aq_linear_weight *w, const float *x, uint64_t rows, const float *scales, const float *zero_points, size_t pair_stride,
                                float *y, int n_threads, aq_error *err) {
    uint64_t inputs = w->layout.cols, bytes;
    if (!aq_mul(rows, inputs + 2 * sizeof(float), &bytes)) return aq_fail_memory(err, UINT64_MAX, "codes of activations");
    float *pairs = aq_alloc(bytes);
    if (!pairs) return aq_fail_memory(err, bytes, "codes of activations");
    uint8_t *codes = (uint8_t *)(pairs + 2 * rows);
    if (scales) {
        aq_activation_quantize(x, rows, inputs, scales, zero_points, pair_stride, codes);
    } else {
        aq_activation_quantize_dynamic(x, rows, inputs, pairs, pairs + rows, codes);
        scales = pairs;
        zero_points = pairs + rows;
        pair_stride = 1;
    }
    aq_status status = in_double(w, codes, rows, scales, zero_points, pair_stride, y, n_threads, err);
    aq_free(pairs);
    return status;
}

static aq_status refuse_axis(const aq_quant_spec *spec, aq_error *err) {
    aq_error_clear(err);
    return spec->axis == 1 ? AQ_OK : aq_fail(err, AQ_ERR_USAGE, "integer execution needs groups along the inputs (axis 1)");
}

aq_status aq_linear_coded(const aq_linear_weight *weight, const float *x, uint64_t rows, const float *scales, const float *zero_points, size_t pair_stride,
                          float *y, int n_threads, aq_error *err) {
    aq_status status = refuse_axis(&weight->spec, err);
    if (status != AQ_OK) return status;
    aq_coded_inputs coded = {.x = x, .scales = scales, .zeros = zero_points, .pair_stride = pair_stride};
    if (aq_linear_codes_fit(weight)) return aq_linear_codes(weight, &coded, rows, y, n_threads, err);
    return code_in_double(weight, x, rows, scales, zero_points, pair_stride, y, n_threads, err);
}

aq_status aq_linear_integer(const aq_quant_spec *spec, const aq_quant_layout *layout, const uint8_t *codes, const void *params, const uint8_t *x_codes,
                            uint64_t rows, const float *x_scales, const float *x_zero_points, size_t pair_stride, const float *bias, int n_threads, float *y,
                            aq_error *err) {
    aq_status status = refuse_axis(spec, err);
    if (status != AQ_OK) return status;
    aq_linear_weight w = {.spec = *spec, .layout = *layout, .codes = codes, .params = params, .bias = bias};
    aq_coded_inputs coded = {.codes = x_codes, .scales = x_scales, .zeros = x_zero_points, .pair_stride = pair_stride};
    if (aq_linear_codes_fit(&w)) return aq_linear_codes(&w, &coded, rows, y, n_threads, err);
    return in_double(&w, x_codes, rows, x_scales, x_zero_points, pair_stride, y, n_threads, err);
}
