/* Inside the solvers: the factored second moment, slabs of rows, and what GPTQ and refine share.
 *
 * A slab is worked on transposed: value of input i and row l at [i * lanes + l], so that 16 rows fill a vector register in every step and a product with
 * H or its factor is an ordinary matrix product from the left.
 */
#ifndef AQ_SOLVE_INTERNAL_H
#define AQ_SOLVE_INTERNAL_H

#include <arrowquant/solve.h>

#include <math.h>

#include "quant/quant_internal.h"

enum { AQ_SOLVE_BLOCK = 128 }; /* inputs whose errors are spread at once */

/* H = (I + U) D (I + U)^T with U strictly upper, in the order of visiting; e H e^T = sum_j d_j ((e (I + U))_j)^2. */
struct aq_hessian {
    uint64_t n;
    double damping;    /* fraction of the mean diagonal that was added */
    double unit;       /* H is held divided by this power of two, which brings its mean diagonal near 1 */
    float *packed;     /* [n, n]: U above the diagonal, H (order of the inputs, undamped) on and below it */
    float *pivots;     /* D [n] */
    float *importance; /* diagonal of H, 0 for dead inputs; order of the inputs */
    uint64_t *order;   /* [n] input visited at each step; NULL: their own order */
};

/* Levels of the codes of a pair, 16 rows side by side: affine (s, z) or R2Q (m, a1, a2). */
typedef struct aq_levels {
    float a[AQ_LANES], b[AQ_LANES], c[AQ_LANES];
} aq_levels;

/* Rows [first, first + rows) of W that are solved together; arrays are transposed, `lanes` (a multiple of 16, padded with rows of zeros) floats a step. */
typedef struct aq_slab {
    const aq_quant_spec *spec;
    const aq_quant_layout *layout;
    const aq_hessian *hessian;
    const aq_solve_options *options;
    const aq_kernels *kernels;
    uint64_t first, rows, lanes, n;
    float *w;          /* [n] inputs in their order, 0 where dead */
    float *e;          /* [n] w - v; in GPTQ in the order of visiting, first what the codes are chosen for; afterwards in the order of the inputs */
    float *t;          /* [block or group] E H */
    uint8_t *q;        /* [n] codes, order of the inputs */
    aq_levels *levels; /* [pairs_per_row][lanes / 16] */
    aq_lanes *search;
    float *rows_of_group; /* [16][group] */
    uint8_t *params;      /* of the whole layer */
    bool (*keep_going)(void *user);
    void *user;
    bool interrupted, no_memory;
} aq_slab;

static inline aq_levels *aq_slab_levels(const aq_slab *s, uint64_t pair, uint64_t lane) { return &s->levels[pair * (s->lanes / AQ_LANES) + lane / AQ_LANES]; }

/* Every code of a pair has a finite value. F32 pairs near the end of the range may have codes beyond it, which feedback and refining could choose. */
static inline bool aq_pair_reaches(const aq_quant_spec *spec, aq_pair pair) {
    return isfinite((0.0f - pair.z) * pair.s) && isfinite(((float)aq_quant_q_max(spec) - pair.z) * pair.s);
}

/* Code and value of 16 numbers on their levels. */
void aq_levels_round(const aq_quant_spec *spec, const aq_levels *levels, const float *x, uint8_t *codes, float *values);
void aq_levels_values(const aq_quant_spec *spec, const aq_levels *levels, const uint8_t *codes, float *values);
/* Reads the stored parameters of group `group` of the slab's rows into `levels`. */
void aq_slab_load_levels(aq_slab *s, uint64_t group);

/* Error feedback over all inputs (gptq.c); codes, levels, parameters and E. False: interrupted, no memory, or parameters that do not fit. */
bool aq_slab_gptq(aq_slab *s);
/* Search only: each group's parameters from W, codes by rounding. */
bool aq_slab_search(aq_slab *s);
/* Rounds of refine (refine.c) on what stands in codes, levels, parameters and E. */
bool aq_slab_refine(aq_slab *s, int rounds);
/* E of inputs [begin, end), in their order, from codes and levels. */
void aq_slab_errors(aq_slab *s, uint64_t begin, uint64_t end);
/* False, and noted, when the caller wants to stop. */
bool aq_slab_going(aq_slab *s);

/* y [end - begin] = sum over k in [k0, k1) of H[i][k] x[k - k0], for i in [begin, end): transposed like the slab. y is overwritten. */
bool aq_times_hessian(const aq_hessian *h, uint64_t begin, uint64_t end, uint64_t k0, uint64_t k1, const float *x, uint64_t lanes, float *y);
/* The square block of H at [begin, end) in full, rows `stride` apart. */
void aq_hessian_block(const aq_hessian *h, uint64_t begin, uint64_t end, float *block, uint64_t stride);
/* Adds x H x^T (in H's own unit) of each lane to sums [lanes]. */
bool aq_hessian_square(const aq_hessian *h, const float *x, uint64_t lanes, float *scratch, double *sums);

#endif
