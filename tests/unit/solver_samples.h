/* A layer with correlated inputs, as real ones have, and solving it whole: shared by the tests of the solvers. */
#ifndef SOLVER_SAMPLES_H
#define SOLVER_SAMPLES_H

#include <arrowquant/solve.h>

typedef struct sample {
    size_t rows, n;
    float *w; /* [rows, n] */
    float *h; /* [n, n], symmetric */
    bool borrowed;
} sample;
sample make_sample(size_t rows, size_t n);
/* Rows [first, first + n) of another one, as far as there are; borrows. */
sample rows_of(const sample *t, size_t first, size_t n);
void free_sample(sample *t);

typedef struct solved {
    aq_quant_spec spec;
    aq_quant_layout layout;
    uint8_t *codes, *params;
    float *v, *scales, *zeros;
    aq_quant_metrics metrics;
    aq_output_error output;
    bool needs_f32;
    aq_status status;
    aq_error error;
} solved;
solved solve(const sample *t, aq_quant_spec spec, aq_solve_options options, int threads);
solved solve_asking(const sample *t, aq_quant_spec spec, aq_solve_options options, int threads, bool (*keep_going)(void *), void *user);
void done(solved *s);
bool same(const solved *a, const solved *b); /* codes, parameters and sums */

#endif
