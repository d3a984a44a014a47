/* Hadamard rotation of a layer's inputs: y = W x = (W R) (R x), where W R has fewer outliers (QuIP#: Tseng et al., ICML 2024; QuaRot: Ashkboos et al., 2024).
 *
 * R is block-diagonal, each block a Kronecker power of the regular H4 = [[1,1,1,-1],[1,1,-1,1],[1,-1,1,1],[-1,1,1,1]] / 2: symmetric, orthogonal, and without a
 * row of equal signs, so that no output gathers the mean of the inputs. With t = (a + b + c + d) / 2, H4 (a, b, c, d) = (t - d, t - c, t - b, t - a).
 */
#include <arrowquant/solve.h>

#include "base/threads.h"

/* One stage on four runs of n values, in place. */
static void mix(float *restrict a, float *restrict b, float *restrict c, float *restrict d, uint64_t n) {
    for (uint64_t i = 0; i < n; i++) {
        float t = ((a[i] + b[i]) + (c[i] + d[i])) * 0.5f, first = t - d[i], second = t - c[i], third = t - b[i], fourth = t - a[i];
        a[i] = first;
        b[i] = second;
        c[i] = third;
        d[i] = fourth;
    }
}

/* Every stage on n values of which `run` neighbours always go together. */
static void rotate(float *x, uint64_t n, uint64_t run, uint64_t size) {
    for (uint64_t step = run; step < size * run; step *= 4)
        for (uint64_t i = 0; i < n; i += 4 * step) mix(x + i, x + i + step, x + i + 2 * step, x + i + 3 * step, step);
}

void aq_hadamard(float *x, uint64_t rows, uint64_t n, uint64_t size) {
    aq_fp_state fp = aq_fp_enter();
    for (uint64_t r = 0; r < rows; r++) rotate(x + r * n, n, 1, size);
    aq_fp_leave(fp);
}

void aq_hadamard_hessian(float *h, uint64_t n, uint64_t size) {
    aq_hadamard(h, n, n, size);
    aq_fp_state fp = aq_fp_enter();
    rotate(h, n * n, n, size); /* whole rows together: from the left */
    for (uint64_t i = 0; i < n; i++)
        for (uint64_t j = 0; j < i; j++) h[i * n + j] = h[j * n + i]; /* symmetric to the last bit */
    aq_fp_leave(fp);
}

uint64_t aq_hadamard_size(uint64_t n) {
    uint64_t size = 1;
    while (size < 256 && n > 0 && n % (4 * size) == 0) size *= 4;
    return size;
}
