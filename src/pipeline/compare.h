/* Reading tensors through and, where there is a second side, measuring the difference: the work of verify and diff. */
#ifndef AQ_PIPELINE_COMPARE_H
#define AQ_PIPELINE_COMPARE_H

#include <jansson.h>

#include "pipeline/job.h"
#include "pipeline/source.h"

/* One tensor to read in `b`, and its partner in `a` (-1: none, b is only read). */
typedef struct aq_pair {
    int64_t a;
    size_t b;
} aq_pair;

typedef struct aq_pair_result {
    aq_quant_metrics metrics; /* of b against a, in F32; without a partner only v_sq and count */
    uint64_t n_nonfinite_a, n_nonfinite_b;
    uint64_t n_odd;       /* values that are not finite on one side only, or differently */
    bool is_float, equal; /* equal: the same values bit for bit */
    char *failure;        /* it could not be read: why; aq_free */
} aq_pair_result;

/* Fills results[n_pairs] (zeroed by the caller). Shapes of partners must be equal. A tensor that cannot be read is a result, not an error.
 * Memory: two slabs a thread, whatever the size of the tensors. AQ_ERR_INTERRUPTED when the hook cancels. */
aq_status aq_compare(const aq_source *a, const aq_source *b, const aq_pair *pairs, size_t n_pairs, aq_pair_result *results, aq_job *job, const char *stage,
                     int n_threads, aq_error *err);
void aq_pair_results_free(aq_pair_result *results, size_t n_results);

/* Means over layers: cosine weighted by size, SQNR of the mean relative error, the worst layer. */
typedef struct aq_mean {
    double weights, cosine_sum, error_sum;
    double worst_cosine, max_error;
    const char *worst; /* name, borrowed; NULL before the first */
} aq_mean;
void aq_mean_add(aq_mean *mean, const char *name, uint64_t count, double cosine, double sqnr_db, double max_error);
double aq_mean_cosine(const aq_mean *mean);
double aq_mean_sqnr_db(const aq_mean *mean);
json_t *aq_mean_worst_json(const aq_mean *mean); /* {name, cosine} or null */

#endif
