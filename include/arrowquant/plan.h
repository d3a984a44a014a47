/* ArrowQuant plan: which bits, group, parameters and method each layer gets (algorithms 7), as an object and as a file.
 *
 * A plan is made by the planner or by hand and carried out by `quantize --plan FILE`. The file is JSON (docs/json.md, "arrowquant.plan/1"); the plan of the
 * granularity tool, whose layers hold little more than a group size, is read as well: what a layer leaves out is as the configuration says.
 */
#ifndef ARROWQUANT_PLAN_H
#define ARROWQUANT_PLAN_H

#include <arrowquant/base.h>
#include <arrowquant/quant.h>

#ifdef __cplusplus
extern "C" {
#endif

/* One layer. Figures are NaN where they are not known; error is what was measured or estimated when the plan was made: tr(E H E^T) / tr(W H W^T), without
 * calibration |E|^2 / |W|^2. */
typedef struct aq_plan_layer {
    const char *name;   /* of the tensor, or without ".weight" */
    int bits;           /* 2, 4, 8; 16: kept as it is; 0: as configured */
    int64_t group_size; /* inputs per group; 0: whole row; -1: as configured */
    const char *params; /* word of the setting `params`, NULL: as configured */
    const char *method; /* word of the setting `method`, NULL: as configured */
    double sensitivity; /* 0..1 */
    double error;
    uint64_t size_bytes; /* stored bytes of the layer by the plan; 0: not known */
} aq_plan_layer;

typedef struct aq_plan aq_plan;

/* An empty plan. NULL: no memory. */
AQ_API aq_plan *aq_plan_create(void);
AQ_API void aq_plan_free(aq_plan *plan);
/* Adds a layer (strings are copied). AQ_ERR_USAGE: the name is there already, or a value is out of range. AQ_ERR_MEMORY. */
AQ_API aq_status aq_plan_add(aq_plan *plan, const aq_plan_layer *layer, aq_error *err);
/* What the file says beside the layers: figures of the plan as a whole, a JSON object. Replaces the one before. AQ_ERR_USAGE: no JSON object. */
AQ_API aq_status aq_plan_set_summary(aq_plan *plan, const char *summary_json, aq_error *err);

AQ_API size_t aq_plan_n_layers(const aq_plan *plan);
AQ_API const aq_plan_layer *aq_plan_layer_at(const aq_plan *plan, size_t index); /* strings live as long as the plan */
/* The layer of a tensor, with or without its ".weight"; NULL when the plan does not name it. */
AQ_API const aq_plan_layer *aq_plan_find(const aq_plan *plan, const char *tensor);
AQ_API const char *aq_plan_summary_json(const aq_plan *plan); /* "{}" when none was set */

/* Text of a plan, "arrowquant.plan/1", freed by aq_plan_free_text. NULL: no memory. */
AQ_API char *aq_plan_to_json(const aq_plan *plan);
AQ_API void aq_plan_free_text(char *text);
/* Reads one from memory; `name` for messages. AQ_ERR_FORMAT: no plan, or a value out of range, naming the layer. */
AQ_API aq_status aq_plan_parse(aq_plan **out, const char *text, size_t size, const char *name, aq_error *err);
/* The same from a file of at most 256 MiB, and to one (atomically). AQ_ERR_IO. */
AQ_API aq_status aq_plan_load(aq_plan **out, const char *path, aq_error *err);
AQ_API aq_status aq_plan_save(const aq_plan *plan, const char *path, bool overwrite, aq_error *err);
/* SHA-256 over the layers' bits, groups, parameters and methods: part of a run's fingerprint. 64 hex digits + NUL. AQ_ERR_MEMORY. */
AQ_API aq_status aq_plan_fingerprint(const aq_plan *plan, char out[65], aq_error *err);

/* ---- making a plan ---- */

/* Which candidate each layer gets is a multiple-choice knapsack. A problem holds, for every layer, what each candidate costs and takes; it is measured once
 * and solved for any number of budgets in milliseconds.
 *
 * The error of a candidate is relative: tr(E H E^T) / tr(W H W^T) where the layer's H is known, with its diagonal alone where that is known, else
 * |E|^2 / |W|^2. It is an estimate where rows were sampled. Sizes count everything the container stores. The same input gives the same plan at any number
 * of threads. */

/* One way to store a layer. */
typedef struct aq_plan_choice {
    int bits;           /* 2, 4, 8; 16: kept */
    aq_quant_spec spec; /* when bits < 16 */
    uint64_t bytes;     /* everything the tensor takes in the container */
    double error;       /* relative, finite, >= 0 */
    double cosine;      /* of the weights; NaN: not known */
} aq_plan_choice;

/* One layer and its candidates, at least one. */
typedef struct aq_plan_item {
    const char *name;
    double weight;      /* what a relative error of 1 in this layer costs the model, as far as is known; finite, >= 0 */
    double sensitivity; /* 0 (robust) to 1; NaN: not computed */
    bool fixed;         /* the caller's settings left no choice */
    aq_plan_choice *choices;
    size_t n_choices;
} aq_plan_item;

typedef struct aq_plan_problem {
    aq_plan_item *items; /* in source order */
    size_t n_items;
    uint64_t other_bytes; /* of the container: tensors that are not among the items, and the frame of its files */
} aq_plan_problem;

/* Smallest and largest size of the container that the candidates can reach. */
AQ_API void aq_plan_extremes(const aq_plan_problem *problem, uint64_t *minimum_bytes, uint64_t *maximum_bytes);

/* The candidates with the least sum of weight * error whose sizes, with other_bytes, stay within the budget: choice[n_items] receives an index per layer.
 * The sum never rises as the budget grows. It is the optimum on small problems; on large ones it is above it by a fraction of one layer's step at most.
 * budget_bytes 0: no budget; the least error of each layer, and of equal ones the smaller size.
 * AQ_ERR_BUDGET: nothing fits; the message and *minimum_bytes (set whenever the problem is sound; may be NULL) tell the smallest size. AQ_ERR_USAGE: a layer
 * without candidates, or figures that are negative or not finite. AQ_ERR_MEMORY. */
AQ_API aq_status aq_plan_choose(const aq_plan_problem *problem, uint64_t budget_bytes, size_t *choice, uint64_t *minimum_bytes, aq_error *err);
/* What a choice adds up to: the sum of weight * error, and bytes. */
AQ_API double aq_plan_error(const aq_plan_problem *problem, const size_t *choice);
AQ_API uint64_t aq_plan_bytes(const aq_plan_problem *problem, const size_t *choice);
/* The plan that a choice amounts to, without a summary. */
AQ_API aq_status aq_plan_of_choice(aq_plan **out, const aq_plan_problem *problem, const size_t *choice, aq_error *err);

#ifdef __cplusplus
}
#endif
#endif
