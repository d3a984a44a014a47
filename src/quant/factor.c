/* The factor of a second moment in floats and in doubles (see factor.h). */
#include "quant/factor.h"

#include <math.h>
#include <string.h>

#include "base/mem.h"
#include "base/pages.h"
#include "base/threads.h"
#include "kernels/gemm.h"

enum { FACTOR_BLOCK = 64, SQUARE = 32 /* of what is read by rows and written by columns */, BANDS_WORTH_THREADS = 16 };

static uint64_t least(uint64_t a, uint64_t b) { return a < b ? a : b; }

/* Input that stands at place j. */
static uint64_t input_at(const aq_hessian *to, uint64_t j) { return to->order ? to->order[to->n - 1 - j] : to->n - 1 - j; }

/* Diagonal of the damped H. */
static double diagonal_at(const aq_hessian *to, const aq_factoring *f, uint64_t j) {
    double own = (double)to->importance[input_at(to, j)];
    return (own == 0 ? 1.0 : own) + f->shift;
}

static bool is_dead(const aq_hessian *to, uint64_t i, uint64_t j) { return to->importance[i] == 0 || to->importance[j] == 0; }

/* Runs `task` on bands of SQUARE rows; `context` holds what it needs. */
static void by_bands(uint64_t n, int n_threads, bool (*task)(void *context, size_t band), void *context) {
    uint64_t bands = (n + SQUARE - 1) / SQUARE;
    aq_parallel_for((size_t)bands, bands < BANDS_WORTH_THREADS ? 1 : n_threads, task, context);
}

#define T float
#define NAME(x) x##_f32
#define LEAST_LEFT 0x1p-12
#include "quant/factor_tile.h"

#define T double
#define NAME(x) x##_f64
#define LEAST_LEFT 0.0
#include "quant/factor_tile.h"
