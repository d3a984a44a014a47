/* Hadamard rotation of inputs (declared in solve.h): blocks of size 4^k are multiplied by the k-th Kronecker power of the regular H4, in place.
 *
 * Each factor mixes four values that lie 1, 4, 16 … apart, so a block costs k passes instead of 4^k products. H4 / 2 is symmetric and orthogonal, so the
 * rotation undoes itself (to rounding). The order of the sums is fixed: the same bytes everywhere. */
#include <arrowquant/solve.h>

/* One block. y = H4 (a, b, c, d) / 2 by four sums of two. */
static void rotate(float *x, uint64_t size) {
    for (uint64_t step = 1; step < size; step *= 4)
        for (uint64_t i = 0; i < size; i += 4 * step)
            for (uint64_t k = i; k < i + step; k++) {
                float a = x[k], b = x[k + step], c = x[k + 2 * step], d = x[k + 3 * step];
                float s = a + b, t = c - d, u = a - b, v = c + d;
                x[k] = 0.5f * (s + t);
                x[k + step] = 0.5f * (s - t);
                x[k + 2 * step] = 0.5f * (u + v);
                x[k + 3 * step] = 0.5f * (v - u);
            }
}

void aq_hadamard(float *x, uint64_t rows, uint64_t n, uint64_t size) {
    if (size < 4) return;
    for (uint64_t r = 0; r < rows; r++)
        for (uint64_t i = 0; i + size <= n; i += size) rotate(x + r * n + i, size);
}

void aq_hadamard_hessian(float *h, uint64_t n, uint64_t size) {
    if (size < 4) return;
    aq_hadamard(h, n, n, size);
    /* The other side: columns of a block of rows, which are `n` apart. */
    for (uint64_t block = 0; block + size <= n; block += size)
        for (uint64_t step = 1; step < size; step *= 4)
            for (uint64_t i = block; i < block + size; i += 4 * step)
                for (uint64_t k = i; k < i + step; k++) {
                    float *p = h + k * n, *q = p + step * n, *r = q + step * n, *w = r + step * n;
                    for (uint64_t c = 0; c < n; c++) {
                        float s = p[c] + q[c], t = r[c] - w[c], u = p[c] - q[c], v = r[c] + w[c];
                        p[c] = 0.5f * (s + t);
                        q[c] = 0.5f * (s - t);
                        r[c] = 0.5f * (u + v);
                        w[c] = 0.5f * (v - u);
                    }
                }
}

uint64_t aq_hadamard_size(uint64_t n) {
    uint64_t size = 1;
    while (size < 256 && n && n % (4 * size) == 0) size *= 4;
    return size;
}
