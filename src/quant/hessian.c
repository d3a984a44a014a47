/* The second moment of a layer's inputs, made ready for solving (see solve.h): H = (I + U) D (I + U)^T.
 *
 * GPTQ takes the upper Cholesky factor of H's inverse. The same choice of codes comes from this factor of H itself (Babai's nearest plane; Chen et al.,
 * 2025, arXiv 2507.18553): the value that code j is chosen for is w_j + sum_{i<j} e_i U_ij, with e = w - v of what was coded before. No inverse is needed, and
 * the error is a sum of squares, e H e^T = sum_j d_j (e (I + U))_j^2. Here: what H must be, the damping, the order to start with; factor.h does the rest.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/error.h"
#include "base/mem.h"
#include "base/size.h"
#include "base/threads.h"
#include "kernels/kernels.h"
#include "quant/factor.h"

#define MOST_DAMPING 1.0

void aq_solve_options_init(aq_solve_options *options) { *options = (aq_solve_options){.damp = 0.01, .order = AQ_ORDER_BALANCED, .refine_sweeps = 3}; }

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
    uint64_t row, bytes;
    /* doubles while it is made, when floats do not do; half of that afterwards; and vectors */
    if (!aq_add(n, AQ_FACTOR_PADDING, &row) || !aq_mul(n, row, &bytes) || !aq_mul(bytes, 8, &bytes) || !aq_add(bytes, n * 6 * 8, &bytes)) return UINT64_MAX;
    return bytes;
}

/* Factors with the first damping of the ladder that works: in floats where they do, else in doubles. */
static aq_status climb(const float *h, aq_hessian *to, const aq_solve_options *options, double mean, aq_factoring *f, aq_error *err) {
    for (to->damping = options->damp;; to->damping = to->damping > 0 ? to->damping * 10 : 1e-6) {
        if (to->damping > MOST_DAMPING * (1 + 1e-9))
            return aq_fail(err, AQ_ERR_QUALITY, "the second moment of the inputs is not positive definite, even with a damping of %g", MOST_DAMPING);
        f->shift = to->damping * mean;
        aq_factored got = aq_factor_f32(h, to, f);
        if (got == AQ_NO_PIVOT) got = aq_factor_f64(h, to, f);
        if (got == AQ_FACTORED) return AQ_OK;
        if (got == AQ_FACTOR_NO_MEMORY) return aq_fail_memory(err, aq_hessian_bytes(to->n), "the factor of a second moment");
    }
}

static aq_status make(aq_hessian *to, const float *h, const aq_solve_options *options, aq_factoring *f, aq_error *err) {
    double mean = 1;
    aq_status status = survey(h, to, &mean, err);
    if (status != AQ_OK) return status;
    if (options->order != AQ_ORDER_INPUTS && !make_order(to, options->order == AQ_ORDER_ENERGY))
        return aq_fail_memory(err, to->n * sizeof(ranked), "the order of the inputs");
    return climb(h, to, options, mean, f, err);
}

aq_status aq_hessian_create(aq_hessian **out, const float *h, uint64_t n, const aq_solve_options *options, int n_threads, aq_error *err) {
    *out = NULL;
    aq_solve_options defaults;
    aq_solve_options_init(&defaults);
    if (!options) options = &defaults;
    if (!(options->damp >= 0 && options->damp <= MOST_DAMPING)) return aq_fail(err, AQ_ERR_USAGE, "Invalid damp: %g. Must be 0 to 1", options->damp);
    if (aq_hessian_bytes(n) == UINT64_MAX) return aq_fail_memory(err, UINT64_MAX, "the factor of a second moment");
    aq_hessian *made = aq_calloc(1, sizeof *made);
    aq_factoring f = {.balanced = options->order == AQ_ORDER_BALANCED, .n_threads = n_threads};
    f.left = aq_calloc(n, sizeof *f.left);
    f.swapped = aq_calloc(n, sizeof *f.swapped);
    if (made) {
        made->n = n;
        made->pivots = aq_calloc(n, sizeof *made->pivots);
        made->importance = aq_calloc(n, sizeof *made->importance);
    }
    aq_status status = AQ_OK;
    if (!made || !f.left || !f.swapped || !made->pivots || !made->importance)
        status = aq_fail_memory(err, aq_hessian_bytes(n), "the factor of a second moment");
    aq_fp_state fp = aq_fp_enter();
    if (status == AQ_OK) status = make(made, h, options, &f, err);
    aq_fp_leave(fp);
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
