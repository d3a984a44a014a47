/* The error of a layer's output: tr(E H E^T), and products with H as a slab needs them. */
#include <math.h>
#include <string.h>

#include "base/error.h"
#include "base/mem.h"
#include "base/size.h"
#include "base/threads.h"
#include "kernels/gemm.h"
#include "quant/solve_internal.h"

double aq_output_sqnr_db(const aq_output_error *e) {
    if (e->err <= 0) return INFINITY;
    return 10 * log10(e->ref / e->err);
}

static uint64_t least(uint64_t a, uint64_t b) { return a < b ? a : b; }
static uint64_t most(uint64_t a, uint64_t b) { return a > b ? a : b; }

void aq_hessian_block(const aq_hessian *h, uint64_t begin, uint64_t end, float *block, uint64_t stride) {
    for (uint64_t i = begin; i < end; i++)
        for (uint64_t k = begin; k < end; k++) block[(i - begin) * stride + (k - begin)] = i >= k ? h->packed[i * h->n + k] : h->packed[k * h->n + i];
}

/* Columns [k0, k1) of the square block of H at [begin, end) in full, its lower triangle being what is stored. */
static void expand(const aq_hessian *h, uint64_t begin, uint64_t end, uint64_t k0, uint64_t k1, float *block) {
    for (uint64_t i = begin; i < end; i++)
        for (uint64_t k = k0; k < k1; k++) *block++ = i >= k ? h->packed[i * h->n + k] : h->packed[k * h->n + i];
}

/* Adds H[begin .. end, k0 .. k1) x, where x holds inputs k0 to k1. */
static bool times_block(const aq_hessian *h, uint64_t begin, uint64_t end, uint64_t k0, uint64_t k1, const float *x, uint64_t lanes, float *y) {
    float block[AQ_SOLVE_BLOCK * AQ_SOLVE_BLOCK];
    uint64_t before = most(least(begin, k1), k0), after = least(most(end, k0), k1);
    aq_matrix_f32 lower = {h->packed + begin * h->n + k0, h->n, 1}, upper = {h->packed + after * h->n + begin, 1, h->n};
    aq_matrix_f32 middle = {block, after - before, 1}, first = {x, lanes, 1}, second = {x + (before - k0) * lanes, lanes, 1};
    aq_matrix_f32 third = {x + (after - k0) * lanes, lanes, 1};
    uint64_t rows = end - begin;
    if (after > before) expand(h, begin, end, before, after, block);
    return (before == k0 || aq_gemm_f32(rows, lanes, before - k0, lower, first, y, lanes, false, AQ_GEMM_FULL, 1)) &&
           (after <= before || aq_gemm_f32(rows, lanes, after - before, middle, second, y, lanes, false, AQ_GEMM_FULL, 1)) &&
           (k1 == after || aq_gemm_f32(rows, lanes, k1 - after, upper, third, y, lanes, false, AQ_GEMM_FULL, 1));
}

bool aq_times_hessian(const aq_hessian *h, uint64_t begin, uint64_t end, uint64_t k0, uint64_t k1, const float *x, uint64_t lanes, float *y) {
    memset(y, 0, (end - begin) * lanes * sizeof *y);
    bool ok = true;
    for (uint64_t i = begin; ok && i < end && k1 > k0; i += AQ_SOLVE_BLOCK) {
        uint64_t next = least(i + AQ_SOLVE_BLOCK, end);
        ok = times_block(h, i, next, k0, k1, x, lanes, y + (i - begin) * lanes);
    }
    return ok;
}

/* sums += weight * x y, over rows [n] of lanes. */
static void add_products(const float *x, const float *y, uint64_t n, uint64_t lanes, double weight, double *sums) {
    for (uint64_t i = 0; i < n; i++)
        for (uint64_t l = 0; l < lanes; l++) sums[l] += weight * (double)x[i * lanes + l] * (double)y[i * lanes + l];
}

bool aq_hessian_square(const aq_hessian *h, const float *x, uint64_t lanes, float *scratch, double *sums) {
    for (uint64_t begin = 0; begin < h->n; begin += AQ_SOLVE_BLOCK) {
        uint64_t end = least(begin + AQ_SOLVE_BLOCK, h->n);
        if (!aq_times_hessian(h, begin, end, 0, begin, x, lanes, scratch)) return false;
        add_products(x + begin * lanes, scratch, end - begin, lanes, 2, sums);
        if (!aq_times_hessian(h, begin, end, begin, end, x + begin * lanes, lanes, scratch)) return false;
        add_products(x + begin * lanes, scratch, end - begin, lanes, 1, sums);
    }
    return true;
}

/* ---- any approximation ---- */

enum { ROWS = 32, DEPTH = AQ_GEMM_BLOCK, WIDTH = 128 };

typedef struct error_job {
    const float *w, *v, *h;
    uint64_t rows, n;
    aq_output_error *parts; /* per row */
} error_job;

/* H[k0 .. k1, j0 .. j1) of the upper triangle in double, what is off the diagonal twice. */
static void widen(const float *h, uint64_t n, uint64_t k0, uint64_t k1, uint64_t j0, uint64_t j1, double *block) {
    for (uint64_t k = k0; k < k1; k++)
        for (uint64_t j = j0; j < j1; j++) *block++ = j < k ? 0 : (double)h[k * n + j] * (j > k ? 2 : 1);
}

/* Rows of w - v and of w by turns, d [2 rows, n]: d U d^T of each, U the upper triangle, WIDTH of its columns at a time. */
static bool error_task(void *context, size_t index) {
    error_job *j = context;
    uint64_t begin = index * ROWS, rows = least(ROWS, j->rows - begin), n = j->n;
    double *d = aq_alloc(2 * rows * n * sizeof *d), *block = aq_alloc((DEPTH + 2 * rows) * WIDTH * sizeof *block);
    bool ok = d && block;
    for (uint64_t r = 0; ok && r < rows; r++)
        for (uint64_t i = 0; i < n; i++) {
            uint64_t at = (begin + r) * n + i;
            d[2 * r * n + i] = (double)j->w[at] - (double)j->v[at];
            d[(2 * r + 1) * n + i] = (double)j->w[at];
        }
    for (uint64_t j0 = 0; ok && j0 < n; j0 += WIDTH) {
        uint64_t j1 = least(j0 + WIDTH, n), width = j1 - j0;
        double *y = block + DEPTH * WIDTH;
        memset(y, 0, 2 * rows * width * sizeof *y);
        for (uint64_t k0 = 0; ok && k0 < j1; k0 += DEPTH) {
            uint64_t k1 = least(k0 + DEPTH, j1);
            widen(j->h, n, k0, k1, j0, j1, block);
            aq_matrix_f64 left = {d + k0, n, 1}, right = {block, width, 1};
            ok = aq_gemm_f64(2 * rows, width, k1 - k0, left, right, y, width, false, AQ_GEMM_FULL, 1);
        }
        for (uint64_t r = 0; ok && r < 2 * rows; r++) {
            double total = 0;
            for (uint64_t i = 0; i < width; i++) total += d[r * n + j0 + i] * y[r * width + i];
            aq_output_error *part = &j->parts[begin + r / 2];
            *(r % 2 ? &part->ref : &part->err) += total;
        }
    }
    aq_free(d);
    aq_free(block);
    return ok;
}

aq_status aq_output_error_add(const float *w, const float *v, uint64_t rows, uint64_t n, const float *h, int n_threads, aq_output_error *out, aq_error *err) {
    error_job job = {w, v, h, rows, n, aq_calloc(rows, sizeof *job.parts)};
    bool ok = job.parts && aq_parallel_for((size_t)aq_div_up(rows, ROWS), n_threads, error_task, &job);
    for (uint64_t r = 0; ok && r < rows; r++) {
        out->err += job.parts[r].err;
        out->ref += job.parts[r].ref;
    }
    aq_free(job.parts);
    return ok ? AQ_OK : aq_fail_memory(err, rows * sizeof *job.parts, "the output error");
}
