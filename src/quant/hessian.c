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

enum { FACTOR_BLOCK = 64 };
#define MOST_DAMPING 1.0

void aq_solve_options_init(aq_solve_options *options) { *options = (aq_solve_options){.damp = 0.01, .order = AQ_ORDER_BALANCED, .refine_sweeps = 3}; }

static void swap(double *a, double *b) {
    double t = *a;
    *a = *b;
    *b = t;
}

/* Element (i, j) changes places with (n - 1 - j, n - 1 - i): inputs from the last to the first, in the same upper triangle, where a column of A is a row. */
static void reflect(double *a, uint64_t n) {
    enum { SQUARE = 32 };
    for (uint64_t top = 0; top < n; top += SQUARE)
        for (uint64_t left = top; left + top + 1 < n; left += SQUARE)
            for (uint64_t i = top; i < top + SQUARE; i++)
                for (uint64_t j = left > i ? left : i; j < left + SQUARE && i + j + 1 < n; j++) swap(&a[i * n + j], &a[(n - 1 - j) * n + n - 1 - i]);
}

/* Swaps inputs p < q of the symmetric A, whose upper triangle is stored, and of the rows of the factor above p. */
static void swap_inputs(double *a, uint64_t n, uint64_t p, uint64_t q) {
    for (uint64_t i = 0; i < p; i++) swap(&a[i * n + p], &a[i * n + q]);
    swap(&a[p * n + p], &a[q * n + q]);
    for (uint64_t k = p + 1; k < q; k++) swap(&a[p * n + k], &a[k * n + q]);
    for (uint64_t k = q + 1; k < n; k++) swap(&a[p * n + k], &a[q * n + k]);
}

/* The input with the smallest pivot among those that are left goes to place j, the first of them: pivots come out as equal as they can be, and their sum, which
 * is what the error is proportional to, small (sorted QR decomposition: Wübben et al., 2001, Electronics Letters 37(22)). `left` is the diagonal of what is
 * left of A; `order` has the inputs the other way round. */
static void balance(double *a, uint64_t n, uint64_t j, double *left, uint64_t *order) {
    uint64_t p = j;
    for (uint64_t i = j + 1; i < n; i++)
        if (left[i] < left[p]) p = i;
    if (p == j) return;
    swap_inputs(a, n, j, p);
    swap(&left[p], &left[j]);
    uint64_t kept = order[n - 1 - p];
    order[n - 1 - p] = order[n - 1 - j];
    order[n - 1 - j] = kept;
}

/* Row j of the factor from that of A: what rows [begin, j) take from it, divided by the root of its pivot. False when there is none. */
static bool factor_row(double *a, uint64_t n, uint64_t begin, uint64_t j, double *left) {
    double *row = a + j * n;
    for (uint64_t k = begin; k < j; k++) {
        const double *earlier = a + k * n;
        double f = earlier[j];
        for (uint64_t i = j; i < n; i++) row[i] -= f * earlier[i];
    }
    double pivot = row[j];
    if (!(pivot > 0 && isfinite(pivot))) return false;
    pivot = sqrt(pivot);
    for (uint64_t i = j + 1; i < n; i++) row[i] /= pivot;
    row[j] = pivot;
    for (uint64_t i = j + 1; i < n; i++) left[i] -= row[i] * row[i];
    return true;
}

/* A = R^T R, upper triangles, row after row; every FACTOR_BLOCK rows their square is taken off the rest by one product. `order` is permuted along when it is to
 * be balanced. */
static bool factor_rows(double *a, uint64_t n, bool balanced, uint64_t *order, double *left, int n_threads, bool *no_memory) {
    for (uint64_t i = 0; i < n; i++) left[i] = a[i * n + i];
    for (uint64_t begin = 0, end; begin < n; begin = end) {
        end = n - begin > FACTOR_BLOCK ? begin + FACTOR_BLOCK : n;
        for (uint64_t j = begin; j < end; j++) {
            if (balanced) balance(a, n, j, left, order);
            if (!factor_row(a, n, begin, j, left)) return false;
        }
        const double *panel = a + begin * n + end;
        aq_matrix_f64 columns = {panel, 1, n}, rows = {panel, n, 1};
        if (end < n && !aq_gemm_f64(n - end, n - end, end - begin, columns, rows, a + end * n + end, n, true, AQ_GEMM_UPPER, n_threads)) {
            *no_memory = true;
            return false;
        }
    }
    return true;
}

/* A = C C^T with C upper triangular: the other way round it is R^T R, whose rows lie together in memory. */
static bool factor(double *a, uint64_t n, bool balanced, uint64_t *order, double *left, int n_threads, bool *no_memory) {
    reflect(a, n);
    bool ok = factor_rows(a, n, balanced, order, left, n_threads, no_memory);
    if (ok) reflect(a, n);
    return ok;
}

/* The damped H in the order of visiting; dead inputs stand alone. Upper triangle. */
static void fill(double *a, const float *h, const aq_hessian *to, double damping) {
    uint64_t n = to->n;
    for (uint64_t i = 0; i < n; i++) {
        uint64_t from = to->order ? to->order[i] : i;
        for (uint64_t j = i; j < n; j++) {
            uint64_t other = to->order ? to->order[j] : j, low = from < other ? from : other, high = from < other ? other : from;
            bool dead = to->importance[from] == 0 || to->importance[other] == 0;
            a[i * n + j] = dead ? 0.0 : (double)h[low * n + high] / to->unit;
        }
        if (to->importance[from] == 0) a[i * n + i] = 1;
        a[i * n + i] += damping;
    }
}

/* The doubles of C give way to the floats of U, and of H below them, in the same memory: row i of floats ends where row i / 2 of doubles did. `row` holds one
 * row of doubles. */
static void pack(double *c, const float *h, aq_hessian *to, double *scales, double *row) {
    uint64_t n = to->n;
    float *packed = to->packed = (float *)(void *)c;
    for (uint64_t j = 0; j < n; j++) {
        scales[j] = c[j * n + j];
        to->pivots[j] = (float)(scales[j] * scales[j]);
    }
    for (uint64_t i = 0; i < n; i++) {
        memcpy(row, (const char *)c + i * n * sizeof *row, n * sizeof *row);
        for (uint64_t j = i + 1; j < n; j++) packed[i * n + j] = (float)(row[j] / scales[j]);
        for (uint64_t j = 0; j <= i; j++) packed[i * n + j] = (float)((double)h[j * n + i] / to->unit);
    }
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
    if (!aq_mul(n, n, &square) || !aq_mul(square, 8, &bytes) || !aq_add(bytes, n * 6 * 8, &bytes)) return UINT64_MAX;
    return bytes;
}

/* Factors with the first damping of the ladder that works. */
static aq_status climb(const float *h, aq_hessian *to, double *a, const aq_solve_options *options, double mean, double *left, int n_threads, aq_error *err) {
    bool no_memory = false;
    for (to->damping = options->damp;; to->damping = to->damping > 0 ? to->damping * 10 : 1e-6) {
        if (to->damping > MOST_DAMPING * (1 + 1e-9))
            return aq_fail(err, AQ_ERR_QUALITY, "the second moment of the inputs is not positive definite, even with a damping of %g", MOST_DAMPING);
        fill(a, h, to, to->damping * mean);
        if (factor(a, to->n, options->order == AQ_ORDER_BALANCED, to->order, left, n_threads, &no_memory)) return AQ_OK;
        if (no_memory) return aq_fail_memory(err, aq_hessian_bytes(to->n), "the factor of a second moment");
    }
}

static aq_status make(aq_hessian *to, const float *h, const aq_solve_options *options, double *a, double *scales, double *left, int n_threads, aq_error *err) {
    double mean = 1;
    aq_status status = survey(h, to, &mean, err);
    if (status != AQ_OK) return status;
    if (options->order != AQ_ORDER_INPUTS && !make_order(to, options->order == AQ_ORDER_ENERGY))
        return aq_fail_memory(err, to->n * sizeof(ranked), "the order of the inputs");
    status = climb(h, to, a, options, mean, left, n_threads, err);
    if (status == AQ_OK) pack(a, h, to, scales, left);
    return status;
}

aq_status aq_hessian_create(aq_hessian **out, const float *h, uint64_t n, const aq_solve_options *options, int n_threads, aq_error *err) {
    *out = NULL;
    aq_solve_options defaults;
    aq_solve_options_init(&defaults);
    if (!options) options = &defaults;
    if (!(options->damp >= 0 && options->damp <= MOST_DAMPING)) return aq_fail(err, AQ_ERR_USAGE, "Invalid damp: %g. Must be 0 to 1", options->damp);
    uint64_t count, bytes;
    if (!aq_mul(n, n, &count) || !aq_mul(count, sizeof(double), &bytes)) return aq_fail_memory(err, UINT64_MAX, "the factor of a second moment");
    aq_hessian *made = aq_calloc(1, sizeof *made);
    double *a = aq_alloc(bytes), *scales = aq_calloc(n, sizeof *scales), *left = aq_calloc(n, sizeof *left);
    if (made) {
        made->n = n;
        made->pivots = aq_calloc(n, sizeof *made->pivots);
        made->importance = aq_calloc(n, sizeof *made->importance);
    }
    aq_status status = AQ_OK;
    if (!made || !a || !scales || !left || !made->pivots || !made->importance)
        status = aq_fail_memory(err, aq_hessian_bytes(n), "the factor of a second moment");
    aq_fp_state fp = aq_fp_enter();
    if (status == AQ_OK) status = make(made, h, options, a, scales, left, n_threads, err);
    aq_fp_leave(fp);
    if (status == AQ_OK) {
        void *smaller = aq_realloc(a, count, sizeof(float));
        made->packed = smaller ? smaller : made->packed;
        a = NULL;
    }
    aq_free(a);
    aq_free(scales);
    aq_free(left);
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
