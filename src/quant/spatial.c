/* Spatial methods (algorithms 5, after DiTAS, arXiv 2409.07756): equalization of input channels between weights and activations, smoothing of activations,
 * and 8-bit codes for groups of channels.
 *
 * Everything works on rows in storage order with sums in double, so results depend on the values alone. */
#include <arrowquant/time.h>

#include <float.h>
#include <math.h>
#include <string.h>

void aq_column_absmax(const float *w, uint64_t rows, uint64_t n, float *out) {
    for (uint64_t r = 0; r < rows; r++)
        for (uint64_t i = 0; i < n; i++) {
            float a = fabsf(w[r * n + i]);
            out[i] = a > out[i] ? a : out[i];
        }
}

/* What the widest input keeps of its range: 2^(-1/4), 2^(-1/2) ... Square roots alone: they round the same everywhere. */
static double limit_of(aq_equalize strength) {
    double keep = 1;
    for (int k = 0; k <= (int)strength - AQ_EQUALIZE_LIMIT_1; k++) keep *= sqrt(sqrt(0.5));
    return keep;
}

void aq_equalization_scales_by(aq_equalize strength, const float *w_absmax, const float *x_absmax, uint64_t n, float *out) {
    double widest = 0, keep = limit_of(strength);
    for (uint64_t i = 0; i < n; i++) widest = fmax(widest, fabs((double)x_absmax[i]));
    for (uint64_t i = 0; i < n; i++) {
        double w = fabs((double)w_absmax[i]), x = fabs((double)x_absmax[i]);
        out[i] = 1;
        if (!(w > 0 && x > 0) || strength == AQ_EQUALIZE_NONE) continue;
        out[i] = (float)(strength == AQ_EQUALIZE_HALF ? sqrt(w / x) : fmin(1, keep * widest / x));
        if (!isnormal(out[i])) out[i] = 1;
    }
}

void aq_equalization_scales(const float *w_absmax, const float *x_absmax, uint64_t n, float *out) {
    aq_equalization_scales_by(AQ_EQUALIZE_HALF, w_absmax, x_absmax, n, out);
}

void aq_temporal_absmax(const float *group, uint64_t n, bool is_first, double momentum, float *out) {
    for (uint64_t i = 0; i < n; i++) {
        double a = fabs((double)group[i]);
        if (is_first)
            out[i] = (float)a;
        else if (momentum < 0)
            out[i] = fmaxf(out[i], (float)a);
        else
            out[i] = (float)(momentum * (double)out[i] + (1 - momentum) * a);
    }
}

void aq_scale_columns(float *x, uint64_t rows, uint64_t n, const float *s, bool divide) {
    for (uint64_t r = 0; r < rows; r++, x += n) {
        if (divide)
            for (uint64_t i = 0; i < n; i++) x[i] /= s[i];
        else
            for (uint64_t i = 0; i < n; i++) x[i] *= s[i];
    }
}

void aq_activation_smooth(const float *x, uint64_t rows, uint64_t n, float alpha, float *out) {
    for (uint64_t r = 0; r < rows; r++, x += n, out += n) {
        double sum = 0;
        if (alpha == 0) {
            memmove(out, x, n * sizeof *out);
            continue;
        }
        for (uint64_t i = 0; i < n; i++) sum += (double)x[i];
        double mean = n ? sum / (double)n : 0, a = (double)alpha;
        for (uint64_t i = 0; i < n; i++) out[i] = (float)((double)x[i] * (1 - a) + mean * a);
    }
}

/* One group of channels: rows * n values that lie together. */
static void code_group(const float *w, uint64_t count, uint8_t *codes, float *scale, float *zero_point) {
    float lo = w[0], hi = w[0];
    for (uint64_t i = 1; i < count; i++) {
        lo = w[i] < lo ? w[i] : lo;
        hi = w[i] > hi ? w[i] : hi;
    }
    float s = (float)(((double)hi - (double)lo) / 255);
    if (!(s > 0)) s = 1; /* one value, or a range below what a scale can express */
    float z = (float)(-(double)lo / (double)s);
    if (!isfinite(z)) z = lo > 0 ? -FLT_MAX : FLT_MAX;
    for (uint64_t i = 0; i < count; i++) {
        double q = rint((double)w[i] / (double)s + (double)z);
        codes[i] = (uint8_t)(q < 0 ? 0 : q > 255 ? 255 : q);
    }
    *scale = s;
    *zero_point = z;
}

void aq_channel_group_u8(const float *w, uint64_t rows, uint64_t n, uint64_t group_size, uint8_t *codes, float *scales, float *zero_points) {
    if (group_size == 0) group_size = rows;
    for (uint64_t at = 0, g = 0; at < rows; at += group_size, g++) {
        uint64_t count = rows - at < group_size ? rows - at : group_size;
        scales[g] = 1;
        zero_points[g] = 0;
        if (n) code_group(w + at * n, count * n, codes + at * n, &scales[g], &zero_points[g]);
    }
}
