/* Samples for the tests of the solvers (see solver_samples.h). */
#include "solver_samples.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static uint64_t random_state;
static double uniform(void) {
    random_state = random_state * 6364136223846793005u + 1442695040888963407u;
    return (double)(random_state >> 11) * 0x1p-53;
}
static double gaussian(void) {
    double sum = -6;
    for (int i = 0; i < 12; i++) sum += uniform();
    return sum;
}

sample make_sample(size_t rows, size_t n) {
    sample t = {rows, n, malloc(rows * n * sizeof(float)), malloc(n * n * sizeof(float)), false};
    size_t rank = n + n / 2;
    double *x = malloc(rank * n * sizeof *x), *size = malloc(n * sizeof *size);
    random_state = rows * 1000 + n;
    for (size_t i = 0; i < n; i++) size[i] = exp(gaussian());
    for (size_t r = 0; r < rank; r++) {
        double common = gaussian(), before = 0;
        for (size_t i = 0; i < n; i++) {
            before = 0.7 * before + gaussian();
            x[r * n + i] = size[i] * (before + 0.5 * common);
        }
    }
    for (size_t i = 0; i < n; i++)
        for (size_t j = i; j < n; j++) {
            double sum = 0;
            for (size_t r = 0; r < rank; r++) sum += x[r * n + i] * x[r * n + j];
            t.h[i * n + j] = t.h[j * n + i] = (float)(sum / (double)rank);
        }
    for (size_t i = 0; i < rows * n; i++) t.w[i] = (float)(0.05 * gaussian());
    free(x);
    free(size);
    return t;
}

sample rows_of(const sample *t, size_t first, size_t n) { return (sample){first + n < t->rows ? n : t->rows - first, t->n, t->w + first * t->n, t->h, true}; }

void free_sample(sample *t) {
    if (t->borrowed) return;
    free(t->w);
    free(t->h);
}

solved solve_asking(const sample *t, aq_quant_spec spec, aq_solve_options options, int threads, bool (*keep_going)(void *), void *user) {
    solved s = {.spec = spec};
    aq_hessian *h;
    s.status = aq_quant_layout_init(&s.layout, &spec, t->rows, t->n, &s.error);
    if (s.status != AQ_OK) return s;
    /* Exact sizes, so that the sanitizer sees a byte too many. */
    s.codes = malloc(s.layout.codes_bytes);
    s.params = malloc(s.layout.params_bytes);
    s.v = malloc(t->rows * t->n * sizeof *s.v);
    s.scales = malloc(s.layout.n_pairs * sizeof *s.scales);
    s.zeros = malloc(s.layout.n_pairs * sizeof *s.zeros);
    s.status = aq_hessian_create(&h, t->h, t->n, &options, threads, &s.error);
    if (s.status == AQ_OK) {
        s.status = aq_solve(t->w, &spec, &s.layout, h, &options, threads, s.codes, s.params, &s.metrics, &s.output, &s.needs_f32, keep_going, user, &s.error);
        aq_hessian_free(h);
    }
    if (s.status != AQ_OK) return s;
    aq_dequantize(&spec, &s.layout, s.codes, s.params, 0, t->rows, s.v);
    aq_quant_pairs(&spec, &s.layout, s.params, s.scales, s.zeros);
    return s;
}

solved solve(const sample *t, aq_quant_spec spec, aq_solve_options options, int threads) { return solve_asking(t, spec, options, threads, NULL, NULL); }

void done(solved *s) {
    free(s->codes);
    free(s->params);
    free(s->v);
    free(s->scales);
    free(s->zeros);
}

bool same(const solved *a, const solved *b) {
    return memcmp(a->codes, b->codes, a->layout.codes_bytes) == 0 && memcmp(a->params, b->params, a->layout.params_bytes) == 0 &&
           memcmp(&a->metrics, &b->metrics, sizeof a->metrics) == 0 && memcmp(&a->output, &b->output, sizeof a->output) == 0;
}
