/* The factor of a damped second moment, H + shift I = (I + U) D (I + U)^T, for hessian.c.
 *
 * Cholesky, blocked, from the last input to the first; the order of the inputs is chosen on the way. It is computed in floats (factor_tile.h is written once
 * for both) as long as every pivot keeps 2^-12 of its diagonal: what rounding does to a row of U is about 2^-24 of the diagonal over the pivot. A matrix that
 * leaves less, as one that was damped little may, is factored in doubles.
 */
#ifndef AQ_FACTOR_H
#define AQ_FACTOR_H

#include "quant/solve_internal.h"

enum { AQ_FACTOR_PADDING = 16 }; /* elements at most between the rows of the matrix in work */

typedef struct aq_factoring {
    double shift;      /* in units of H */
    double *left;      /* [n] diagonal of what is left */
    uint64_t *swapped; /* [n] which input came to place j when its turn came */
    bool balanced;     /* the order is chosen on the way */
    int n_threads;
} aq_factoring;

typedef enum { AQ_FACTORED, AQ_NO_PIVOT, AQ_FACTOR_NO_MEMORY } aq_factored;

/* Factors h [n, n] (upper triangle) into to->packed and to->pivots; to->unit and to->importance are known, to->order (NULL: as they stand) is where balancing
 * starts. Dead inputs stand alone. */
aq_factored aq_factor_f32(const float *h, aq_hessian *to, aq_factoring *f);
aq_factored aq_factor_f64(const float *h, aq_hessian *to, aq_factoring *f);

#endif
