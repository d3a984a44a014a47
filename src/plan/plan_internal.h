/* Inside of the planner:
 *   plan_file.c   a plan as an object and as a file
 *   knapsack.c    one candidate per layer under a budget
 *   evolve.c      evolutionary search from there
 *   candidates.c  what is tried for a layer, and what it takes
 *   sample.c      the rows of a layer that are measured
 *   inputs.c      what calibration knows of a layer's inputs, and the error of one candidate by it
 *   measure.c     the errors of all candidates of all layers
 *   weights.c     what a layer's error costs the model
 *   cache.c       figures that an earlier run measured
 *   sensitivity.c scores of layers
 */
#ifndef AQ_PLAN_INTERNAL_H
#define AQ_PLAN_INTERNAL_H

#include <arrowquant/plan.h>
#include <arrowquant/solve.h>
#include <arrowquant/store.h>

enum { AQ_PLAN_MOST_CHOICES = 32, AQ_PLAN_MOST_THREADS = 256 };

/* Every item has a candidate, and weights and errors are finite and not negative. AQ_ERR_USAGE. */
aq_status aq_plan_problem_check(const aq_plan_problem *problem, aq_error *err);

/* ---- knapsack.c ---- */

/* Candidates of which no other is both no larger and no worse, by rising size, into out[n_choices]; their number, 0 when memory is out. */
size_t aq_plan_undominated(const aq_plan_item *item, size_t *out);

/* ---- candidates.c ---- */

aq_status aq_plan_check_options(const aq_plan_options *options, aq_error *err);
/* Candidates of an open layer into out[AQ_PLAN_MOST_CHOICES], without bytes and errors. method: that of the affine codes; r2q: tried as well, at 2 bits. */
size_t aq_plan_list_choices(const aq_plan_options *options, const aq_plan_request *request, uint64_t cols, aq_method method, bool r2q, aq_plan_choice *out);
/* What a quantized layer stores beside codes and parameters. */
typedef struct aq_plan_extras {
    bool equalization;
    uint64_t n_time_groups;
} aq_plan_extras;
aq_status aq_plan_coded_bytes(const aq_tensor_info *t, const aq_quant_spec *spec, const aq_plan_extras *extras, uint64_t file_bytes, uint64_t *out,
                              aq_error *err);
uint64_t aq_plan_kept_bytes(const aq_tensor_info *t, uint64_t file_bytes);

/* ---- sample.c ---- */

/* Whole rows, evenly spread over the layer. */
typedef struct aq_plan_rows {
    uint64_t rows, cols; /* of the layer */
    uint64_t n_rows;     /* of the sample */
} aq_plan_rows;
aq_plan_rows aq_plan_rows_of(const aq_tensor_info *t, uint64_t sample_values);
/* The row of the layer that row `index` of the sample is. */
uint64_t aq_plan_row_at(const aq_plan_rows *rows, uint64_t index);
/* Reads the sample into out [n_rows, cols]. *n_bad (may be NULL): values that are not finite; they are set to zero then. */
aq_status aq_plan_read_rows(const aq_model *model, size_t tensor, const aq_plan_rows *rows, float *out, uint64_t *n_bad, aq_error *err);

/* ---- inputs.c ---- */

/* How much of a layer's H is known. */
typedef enum aq_plan_knowledge { AQ_PLAN_KNOWS_NOTHING, AQ_PLAN_KNOWS_DIAGONAL, AQ_PLAN_KNOWS_HESSIAN } aq_plan_knowledge;
aq_plan_knowledge aq_plan_inputs_known(const aq_plan_options *options, const aq_tensor_info *t);

/* What is known of a layer's inputs; pointers are NULL where nothing is. */
typedef struct aq_plan_inputs {
    const aq_plan_options *options;
    uint64_t n;
    double trace;    /* mean of H's diagonal; 1 when it is not known */
    float *diagonal; /* [n] of H, or with a mean of the covariance */
    float *h;        /* [n, n] */
    float *mean;     /* [n] of the inputs, which the layer's bias makes up for; NULL: it does not, H is not about it */
    aq_hessian *hessian;
    bool unfactorable; /* H has no factor even with the largest damping: codes are searched by its diagonal */
} aq_plan_inputs;
/* Memory that they take, factor included. */
uint64_t aq_plan_inputs_bytes(const aq_plan_options *options, const aq_tensor_info *t);
aq_status aq_plan_inputs_make(aq_plan_inputs *out, const aq_plan_options *options, const aq_model *model, size_t tensor, aq_error *err);
/* The bias that is corrected with a weight, -1: none. */
int64_t aq_plan_bias_of(const aq_plan_options *options, const aq_model *model, size_t tensor);
/* Adds the factor where there is an H. */
aq_status aq_plan_inputs_factor(aq_plan_inputs *inputs, aq_error *err);
void aq_plan_inputs_free(aq_plan_inputs *inputs);
/* Error of one way to code the rows w [n_rows, cols]. */
typedef struct aq_plan_trial {
    double err, ref; /* sums in the measure of the inputs */
    double cosine;
    bool needs_f32; /* nothing was measured: parameters do not fit half precision */
} aq_plan_trial;
aq_status aq_plan_try(const aq_plan_inputs *inputs, const aq_quant_spec *spec, const float *w, uint64_t n_rows, uint64_t cols, aq_plan_trial *out,
                      aq_error *err);
/* sum of w_r H w_r^T over the rows, in the same measure. */
aq_status aq_plan_energy(const aq_plan_inputs *inputs, const float *w, uint64_t n_rows, uint64_t cols, double *out, aq_error *err);

/* ---- weights.c ---- */

/* The calibration has gradients of the tensor. */
bool aq_plan_has_gradient(const aq_plan_options *options, const aq_tensor_info *t);
/* Root mean square of gradient times error, E that of `spec` (data-free) on the sampled rows. Needs aq_plan_has_gradient. */
aq_status aq_plan_gradient_error(const aq_plan_options *options, const aq_tensor_info *t, const aq_quant_spec *spec, const aq_plan_rows *rows,
                                 const float *values, double *out, aq_error *err);
/* Sets the items' weights. tensors[n_items]: their indexes in the model; energies[n_items]: sum of w H w^T over their rows, by the mean of H's diagonal. */
aq_status aq_plan_weigh(aq_plan_problem *problem, const aq_model *model, const aq_plan_options *options, const size_t *tensors, const double *energies,
                        aq_error *err);

/* ---- cache.c ---- */

/* What was measured on one layer: per candidate three figures. */
typedef struct aq_plan_cache aq_plan_cache;
/* Opens <dir>/measured.aqplan, an empty one when there is none or it is damaged. AQ_ERR_IO: the folder cannot be used. */
aq_status aq_plan_cache_open(aq_plan_cache **out, const char *dir, aq_error *err);
/* The n figures stored under a key (32 hex digits); false when there are none. Safe from several threads while nothing is added. */
bool aq_plan_cache_find(const aq_plan_cache *cache, const char *key, double *figures, size_t n);
aq_status aq_plan_cache_add(aq_plan_cache *cache, const char *key, const double *figures, size_t n, aq_error *err);
/* Writes it when anything was added, and frees it. */
aq_status aq_plan_cache_close(aq_plan_cache *cache, bool write, aq_error *err);

#endif
