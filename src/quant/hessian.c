/* The second moment of a layer's inputs, made ready for solving (see solve.h): H = (I + U) D (I + U)^T.
 *
 * GPTQ takes the upper Cholesky factor of H's inverse. The same choice of codes comes from this factor of H itself (Babai's nearest plane; Chen et al.,
 * 2025, arXiv 2507.18553): the value that code j is chosen for is w_j + sum_{i<j} e_i U_ij, with e = w - v of what was coded before. No inverse is needed, and
 * the error is a sum of squares, e H e^T = sum_j d_j (e (I + U))_j^2. The factor is computed in double, blocked, from the last input to the first; the order of
 * the inputs is chosen on the way.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/error.h"
#include "base/mem.h"
#include "base/size.h"
#include "base/threads.h"
#include "kernels/gemm.h"
#include "quant/solve_internal.h"

enum { FACTOR_BLOCK = 128, SQUARE = 32 /* of what is read by rows and written by columns */ };
#define MOST_DAMPING 1.0

typedef struct factoring {
    double *left;      /* [n] diagonal of what is left of A */
    uint64_t *order;   /* of to->order */
    uint64_t *swapped; /* [n] which input came to place j when its turn came */
    int n_threads;
    bool no_memory;
} factoring;

void aq_solve_options_init(aq_solve_options *options) { *options = (aq_solve_options){.damp = 0.01, .order = AQ_ORDER_BALANCED, .refine_sweeps = 3}; }

static void swap(double *a, double *b) {
    double t = *a;
    *a = *b;
    *b = t;
}

/* Rows of A lie this many doubles apart: one cache line more than a row, so that a column's elements fall into different sets of the caches. */
static uint64_t stride_of(uint64_t n) { return n + 8; }

/* Element (i, j) changes places with (n - 1 - j, n - 1 - i): inputs from the last to the first, in the same upper triangle, where a column of A is a row. */
static void reflect(double *a, uint64_t n) {
    uint64_t stride = stride_of(n);
    for (uint64_t top = 0; top < n; top += SQUARE)
        for (uint64_t left = top; left + top + 1 < n; left += SQUARE)
            for (uint64_t i = top; i < top + SQUARE; i++)
                for (uint64_t j = left > i ? left : i; j < left + SQUARE && i + j + 1 < n; j++) swap(&a[i * stride + j], &a[(n - 1 - j) * stride + n - 1 - i]);
}

/* Swaps inputs p < q of the symmetric A, whose upper triangle is stored, and of the rows of the factor from `begin` to p. */
static void swap_inputs(double *a, uint64_t n, uint64_t begin, uint64_t p, uint64_t q) {
    uint64_t stride = stride_of(n);
    for (uint64_t i = begin; i < p; i++) swap(&a[i * stride + p], &a[i * stride + q]);
    swap(&a[p * stride + p], &a[q * stride + q]);
    for (uint64_t k = p + 1; k < q; k++) swap(&a[p * stride + k], &a[k * stride + q]);
    for (uint64_t k = q + 1; k < n; k++) swap(&a[p * stride + k], &a[q * stride + k]);
}

/* The input with the smallest pivot among those that are left goes to place j, the first of them: pivots come out as equal as they can be, and their sum, which
 * is what the error is proportional to, small (sorted QR decomposition: Wübben et al., 2001, Electronics Letters 37(22)). `order` has the
 * inputs the other way round. */
static void balance(double *a, uint64_t n, uint64_t begin, uint64_t j, factoring *f) {
    uint64_t p = j;
    for (uint64_t i = j + 1; i < n; i++)
        if (f->left[i] < f->left[p]) p = i;
    f->swapped[j] = p;
    if (p == j) return;
    swap_inputs(a, n, begin, j, p);
    swap(&f->left[p], &f->left[j]);
    uint64_t kept = f->order[n - 1 - p];
    f->order[n - 1 - p] = f->order[n - 1 - j];
    f->order[n - 1 - j] = kept;
}

/* Row j of the factor from that of A: what rows [begin, j) take from it, divided by the root of its pivot. False when there is none. */
static bool factor_row(double *a, uint64_t n, uint64_t begin, uint64_t j, double *left) {
    uint64_t stride = stride_of(n);
    double *row = a + j * stride, f[FACTOR_BLOCK];
    for (uint64_t k = begin; k < j; k++) f[k - begin] = a[k * stride + j];
    aq_kernels_get()->subtract_rows(f, (size_t)(j - begin), a + begin * stride + j, (size_t)stride, (size_t)(n - j), row + j);
    double pivot = row[j];
    if (!(pivot > 0 && isfinite(pivot))) return false;
    pivot = sqrt(pivot);
    for (uint64_t i = j + 1; i < n; i++) row[i] /= pivot;
    row[j] = pivot;
    for (uint64_t i = j + 1; i < n; i++) left[i] -= row[i] * row[i];
    return true;
}

/* Rows that were finished before later inputs changed places follow them. */
static void follow_swaps(double *a, uint64_t n, const uint64_t *swapped) {
    for (uint64_t i = 0; i < n; i++) {
        double *row = a + i * stride_of(n);
        for (uint64_t j = (i / FACTOR_BLOCK + 1) * FACTOR_BLOCK; j < n; j++) swap(&row[j], &row[swapped[j]]);
    }
}

/* A = R^T R, upper triangles, row after row; every FACTOR_BLOCK rows their square is taken off the rest by one product. The order is permuted along when it is
 * to be balanced. */
static bool factor_rows(double *a, uint64_t n, bool balanced, factoring *f) {
    uint64_t stride = stride_of(n);
    for (uint64_t i = 0; i < n; i++) f->left[i] = a[i * stride + i];
    for (uint64_t begin = 0, end; begin < n; begin = end) {
        end = n - begin > FACTOR_BLOCK ? begin + FACTOR_BLOCK : n;
        for (uint64_t j = begin; j < end; j++) {
            if (balanced) balance(a, n, begin, j, f);
            if (!factor_row(a, n, begin, j, f->left)) return false;
        }
        const double *panel = a + begin * stride + end;
        aq_matrix_f64 columns = {panel, 1, stride}, rows = {panel, stride, 1};
        if (end < n && !aq_gemm_f64(n - end, n - end, end - begin, columns, rows, a + end * stride + end, stride, true, AQ_GEMM_UPPER, f->n_threads)) {
            f->no_memory = true;
            return false;
        }
    }
    if (balanced) follow_swaps(a, n, f->swapped);
    return true;
}

/* The damped H in the order of visiting, from the last input to the first; dead inputs stand alone. Upper triangle. */
static void fill(double *a, const float *h, const aq_hessian *to, double damping) {
    uint64_t n = to->n, stride = stride_of(n);
    double scale = 1 / to->unit; /* a power of two */
    for (uint64_t top = 0; top < n; top += SQUARE)
        for (uint64_t left = top; left < n; left += SQUARE)
            for (uint64_t i = top; i < top + SQUARE && i < n; i++)
                for (uint64_t j = left > i ? left : i; j < left + SQUARE && j < n; j++) {
                    uint64_t from = to->order ? to->order[n - 1 - i] : n - 1 - i, other = to->order ? to->order[n - 1 - j] : n - 1 - j;
                    bool dead = to->importance[from] == 0 || to->importance[other] == 0;
                    a[i * stride + j] = dead ? 0.0 : (double)(from < other ? h[from * n + other] : h[other * n + from]) * scale;
                }
    for (uint64_t i = 0; i < n; i++) {
        if (to->importance[to->order ? to->order[n - 1 - i] : n - 1 - i] == 0) a[i * stride + i] = 1;
        a[i * stride + i] += damping;
    }
}

/* The doubles of R give way to the floats of U, and of H below them, in the same memory: row i of floats ends where row i / 2 of doubles did. `row` holds one
 * row of doubles. A = C C^T with C upper triangular is R the other way round, and U is C with its columns divided by its diagonal. */
static void pack(double *r, const float *h, aq_hessian *to, double *row) {
    uint64_t n = to->n, stride = stride_of(n);
    float *packed = to->packed = (float *)(void *)r;
    for (uint64_t i = 0; i < n; i++) {
        double *line = r + i * stride, diagonal = line[i];
        to->pivots[n - 1 - i] = (float)(diagonal * diagonal);
        for (uint64_t j = i + 1; j < n; j++) line[j] /= diagonal;
    }
    reflect(r, n);
    for (uint64_t i = 0; i < n; i++) {
        memcpy(row, (const char *)r + i * stride * sizeof *row, n * sizeof *row);
        for (uint64_t j = i + 1; j < n; j++) packed[i * n + j] = (float)row[j];
    }
    double scale = 1 / to->unit;
    for (uint64_t top = 0; top < n; top += SQUARE)
        for (uint64_t left = 0; left <= top; left += SQUARE)
            for (uint64_t i = top; i < top + SQUARE && i < n; i++)
                for (uint64_t j = left; j < left + SQUARE && j <= i; j++) packed[i * n + j] = (float)((double)h[j * n + i] * scale);
}

/* Checks H, and learns its unit, dead inputs and mean diagonal (in units, over live inputs). */
static aq_status survey(const float *h, aq_hessian *to, double *mean, aq_error *err) {
    uint64_t n = to->n, live = 0;
    double sum = 0;
    int exponent = 0;
    for (uint64_t i = 0; i < n; i++) {
        size_t bad = aq_kernels_get()->find_nonfinite(h + i * n + i, n - i);
        if (bad < n - i)
            return aq_fail(err, AQ_ERR_FORMAT, "the second moment of inputs %llu and %llu is not finite", (unsigned long long)i, (unsigned long long)(i + bad));
        if (h[i * n + i] < 0) return aq_fail(err, AQ_ERR_FORMAT, "the second moment of input %llu is negative", (unsigned long long)i);
        sum += (double)h[i * n + i];
        live += h[i * n + i] > 0;
    }
    if (live) frexp(sum / (double)live, &exponent);
    to->unit = ldexp(1.0, exponent);
    *mean = live ? sum / (double)live / to->unit : 1;
    for (uint64_t i = 0; i < n; i++) to->importance[i] = (float)((double)h[i * n + i] / to->unit);
    return AQ_OK;
}

typedef struct ranked {
    float key;
    uint64_t index;
} ranked;
static int by_falling_key(const void *a, const void *b) {
    const ranked *x = a, *y = b;
    if (x->key != y->key) return x->key > y->key ? -1 : 1;
    return x->index < y->index ? -1 : x->index > y->index;
}

/* The order to start with. */
static bool make_order(aq_hessian *h, bool by_energy) {
    ranked *all = aq_calloc(h->n, sizeof *all);
    h->order = aq_calloc(h->n, sizeof *h->order);
    if (all && h->order) {
        for (uint64_t i = 0; i < h->n; i++) all[i] = (ranked){h->importance[i], i};
        if (by_energy) qsort(all, (size_t)h->n, sizeof *all, by_falling_key);
        for (uint64_t i = 0; i < h->n; i++) h->order[i] = all[i].index;
    }
    aq_free(all);
    return all && h->order;
}

uint64_t aq_hessian_bytes(uint64_t n) {
    uint64_t square, bytes;
    /* doubles while it is made, half of that afterwards; and vectors */
    if (!aq_mul(n, stride_of(n), &square) || !aq_mul(square, 8, &bytes) || !aq_add(bytes, n * 6 * 8, &bytes)) return UINT64_MAX;
    return bytes;
}

/* Factors with the first damping of the ladder that works. */
static aq_status climb(const float *h, aq_hessian *to, double *a, const aq_solve_options *options, double mean, factoring *f, aq_error *err) {
    f->order = to->order;
    for (to->damping = options->damp;; to->damping = to->damping > 0 ? to->damping * 10 : 1e-6) {
        if (to->damping > MOST_DAMPING * (1 + 1e-9))
            return aq_fail(err, AQ_ERR_QUALITY, "the second moment of the inputs is not positive definite, even with a damping of %g", MOST_DAMPING);
        fill(a, h, to, to->damping * mean);
        if (factor_rows(a, to->n, options->order == AQ_ORDER_BALANCED, f)) return AQ_OK;
        if (f->no_memory) return aq_fail_memory(err, aq_hessian_bytes(to->n), "the factor of a second moment");
    }
}

static aq_status make(aq_hessian *to, const float *h, const aq_solve_options *options, double *a, factoring *f, aq_error *err) {
    double mean = 1;
    aq_status status = survey(h, to, &mean, err);
    if (status != AQ_OK) return status;
    if (options->order != AQ_ORDER_INPUTS && !make_order(to, options->order == AQ_ORDER_ENERGY))
        return aq_fail_memory(err, to->n * sizeof(ranked), "the order of the inputs");
    status = climb(h, to, a, options, mean, f, err);
    if (status == AQ_OK) pack(a, h, to, f->left);
    return status;
}

aq_status aq_hessian_create(aq_hessian **out, const float *h, uint64_t n, const aq_solve_options *options, int n_threads, aq_error *err) {
    *out = NULL;
    aq_solve_options defaults;
    aq_solve_options_init(&defaults);
    if (!options) options = &defaults;
    if (!(options->damp >= 0 && options->damp <= MOST_DAMPING)) return aq_fail(err, AQ_ERR_USAGE, "Invalid damp: %g. Must be 0 to 1", options->damp);
    uint64_t count, bytes;
    if (!aq_mul(n, stride_of(n), &count) || !aq_mul(count, sizeof(double), &bytes)) return aq_fail_memory(err, UINT64_MAX, "the factor of a second moment");
    aq_hessian *made = aq_calloc(1, sizeof *made);
    double *a = aq_alloc(bytes);
    factoring f = {.left = aq_calloc(n, sizeof *f.left), .swapped = aq_calloc(n, sizeof *f.swapped), .n_threads = n_threads};
    if (made) {
        made->n = n;
        made->pivots = aq_calloc(n, sizeof *made->pivots);
        made->importance = aq_calloc(n, sizeof *made->importance);
    }
    aq_status status = AQ_OK;
    if (!made || !a || !f.left || !f.swapped || !made->pivots || !made->importance)
        status = aq_fail_memory(err, aq_hessian_bytes(n), "the factor of a second moment");
    aq_fp_state fp = aq_fp_enter();
    if (status == AQ_OK) status = make(made, h, options, a, &f, err);
    aq_fp_leave(fp);
    if (status == AQ_OK) {
        void *smaller = aq_realloc(a, n * n, sizeof(float));
        made->packed = smaller ? smaller : made->packed;
        a = NULL;
    }
    aq_free(a);
    aq_free(f.left);
    aq_free(f.swapped);
    if (status == AQ_OK)
        *out = made;
    else
        aq_hessian_free(made);
    return status;
}

void aq_hessian_free(aq_hessian *hessian) {
    if (!hessian) return;
    aq_free(hessian->packed);
    aq_free(hessian->pivots);
    aq_free(hessian->importance);
    aq_free(hessian->order);
    aq_free(hessian);
}

double aq_hessian_damping(const aq_hessian *hessian) { return hessian->damping; }
