/* Spatial methods (algorithms 5, after DiTAS, arXiv 2409.07756): equalization of input channels between weights and activations, smoothing of activations,
 * and 8-bit codes for groups of channels.
 *
 * Everything works on rows in storage order with sums in double, so results depend on the values alone. */
#include <arrowquant/time.h>

#include <math.h>
#include <string.h>

void aq_column_absmax(const float *w, uint64_t rows, uint64_t n, float *out) {
    for (uint64_t r = 0; r < rows; r++)
        for (uint64_t i = 0; i < n; i++) {
            float a = fabsf(w[r * n + i]);
            out[i] = a > out[i] ? a : out[i];
        }
}

void aq_equalization_scales(const float *w_absmax, const float *x_absmax, uint64_t n, float *out) {
    for (uint64_t i = 0; i < n; i++) {
        double w = fabs((double)w_absmax[i]), x = fabs((double)x_absmax[i]), s = w > 0 && x > 0 ? sqrt(w / x) : 1;
        out[i] = (float)s;
        if (!isnormal(out[i])) out[i] = 1;
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
