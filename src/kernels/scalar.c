/* Scalar kernels: the definition of right (see kernels.h). Written to be read; the vector forms must give the same bits. */
#include "kernels/kernels.h"

#include <math.h>

#include "base/half.h"

static void f16_to_f32(const uint16_t *in, float *out, size_t n) {
    for (size_t i = 0; i < n; i++) out[i] = aq_f16_to_f32(in[i]);
}
static void f32_to_f16(const float *in, uint16_t *out, size_t n) {
    for (size_t i = 0; i < n; i++) out[i] = aq_f32_to_f16(in[i]);
}
static void bf16_to_f32(const uint16_t *in, float *out, size_t n) {
    for (size_t i = 0; i < n; i++) out[i] = aq_bf16_to_f32(in[i]);
}
static void f32_to_bf16(const float *in, uint16_t *out, size_t n) {
    for (size_t i = 0; i < n; i++) out[i] = aq_f32_to_bf16(in[i]);
}

static size_t find_nonfinite(const float *x, size_t n) {
    size_t i = 0;
    while (i < n && (aq_f32_bits(x[i]) & 0x7F800000) != 0x7F800000) i++;
    return i;
}

static void range(const float *x, size_t n, float *lo, float *hi) {
    float a = x[0], b = x[0];
    for (size_t i = 1; i < n; i++) {
        a = x[i] < a ? x[i] : a;
        b = x[i] > b ? x[i] : b;
    }
    *lo = a + 0.0f; /* -0 becomes +0, so that the order of comparisons does not show */
    *hi = b + 0.0f;
}

/* Clamped before it is rounded: adding and subtracting 1.5 * 2^23 then rounds half to even in two operations. */
static const float round_magic = 12582912.0f;

static void quantize(const float *x, size_t n, float s, float z, int q_max, uint8_t *codes) {
    float top = (float)q_max;
    for (size_t i = 0; i < n; i++) {
        float t = x[i] / s + z;
        t = t > 0.0f ? t : 0.0f;
        t = t < top ? t : top;
        codes[i] = (uint8_t)(t + round_magic - round_magic);
    }
}

static void dequantize(const uint8_t *codes, size_t n, float s, float z, float *out) {
    for (size_t i = 0; i < n; i++) out[i] = ((float)codes[i] - z) * s;
}

static void pack2(const uint8_t *codes, size_t n, uint8_t *packed) {
    size_t i = 0;
    for (; i + 4 <= n; i += 4) packed[i / 4] = (uint8_t)(codes[i] | codes[i + 1] << 2 | codes[i + 2] << 4 | codes[i + 3] << 6);
    if (i < n) packed[i / 4] = 0;
    for (; i < n; i++) packed[i / 4] = (uint8_t)(packed[i / 4] | codes[i] << i % 4 * 2);
}

static void pack4(const uint8_t *codes, size_t n, uint8_t *packed) {
    size_t i = 0;
    for (; i + 2 <= n; i += 2) packed[i / 2] = (uint8_t)(codes[i] | codes[i + 1] << 4);
    if (i < n) packed[i / 2] = codes[i];
}

static void unpack2(const uint8_t *packed, size_t n, uint8_t *codes) {
    for (size_t i = 0; i < n; i++) codes[i] = packed[i / 4] >> i % 4 * 2 & 3;
}

static void unpack4(const uint8_t *packed, size_t n, uint8_t *codes) {
    for (size_t i = 0; i < n; i++) codes[i] = packed[i / 2] >> i % 2 * 4 & 15;
}

static double fold(double *lanes, bool max) {
    for (size_t half = AQ_LANES / 2; half > 0; half /= 2)
        for (size_t j = 0; j < half; j++) lanes[j] = !max ? lanes[j] + lanes[j + half] : lanes[j] > lanes[j + half] ? lanes[j] : lanes[j + half];
    return lanes[0];
}

static void error_sums(const float *w, const float *v, size_t n, aq_error_sums *out) {
    double dot[AQ_LANES] = {0}, w_sq[AQ_LANES] = {0}, v_sq[AQ_LANES] = {0}, err_sq[AQ_LANES] = {0}, err_max[AQ_LANES] = {0};
    for (size_t i = 0; i < n; i++) {
        size_t j = i % AQ_LANES;
        double a = w[i], b = v[i], e = a - b;
        dot[j] += a * b;
        w_sq[j] += a * a;
        v_sq[j] += b * b;
        err_sq[j] += e * e;
        err_max[j] = fabs(e) > err_max[j] ? fabs(e) : err_max[j];
    }
    *out = (aq_error_sums){fold(dot, false), fold(w_sq, false), fold(v_sq, false), fold(err_sq, false), fold(err_max, true)};
}

const aq_kernels aq_kernels_scalar = {
    .name = "scalar",
    .f16_to_f32 = f16_to_f32,
    .f32_to_f16 = f32_to_f16,
    .bf16_to_f32 = bf16_to_f32,
    .f32_to_bf16 = f32_to_bf16,
    .find_nonfinite = find_nonfinite,
    .range = range,
    .quantize = quantize,
    .dequantize = dequantize,
    .pack2 = pack2,
    .pack4 = pack4,
    .unpack2 = unpack2,
    .unpack4 = unpack4,
    .error_sums = error_sums,
};
