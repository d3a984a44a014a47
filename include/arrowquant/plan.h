/* ArrowQuant plan: which bits, group, parameters and method each layer gets (algorithms 7), as an object and as a file.
 *
 * A plan is made by the planner or by hand and carried out by `quantize --plan FILE`. The file is JSON (docs/json.md, "arrowquant.plan/1"); the plan of the
 * granularity tool, whose layers hold little more than a group size, is read as well: what a layer leaves out is as the configuration says.
 */
#ifndef ARROWQUANT_PLAN_H
#define ARROWQUANT_PLAN_H

#include <arrowquant/calibration.h>
#include <arrowquant/model.h>
#include <arrowquant/quant.h>
#include <arrowquant/solve.h>

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
    /* How it was measured; zeros where it was not aq_plan_measure. */
    const char *weighting;     /* where the weights come from: "equal", "size", "gradient", "given" */
    const char *error_measure; /* "weights", "outputs (diagonal of H)" or "outputs (H)": the best that was had for any layer */
    uint64_t sampled_rows;     /* rows of one layer that were measured at most, when not all were; else 0 */
    size_t n_below_floor;      /* layers none of whose candidates reaches the accuracy floor: they have their best one alone */
    size_t n_cached;           /* layers whose figures came out of the cache */
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

/* ---- measuring ---- */

/* What is open about one tensor. */
typedef enum aq_plan_openness { AQ_PLAN_KEEP, AQ_PLAN_FIXED, AQ_PLAN_OPEN } aq_plan_openness;
typedef struct aq_plan_request {
    aq_plan_openness open; /* kept as it is; quantized as `spec` says; or up to the planner */
    aq_quant_spec spec;    /* of an open one: symmetric, no_simd, method; gptq: where H is known, and r2q at 2 bits there, else search */
    int least_bits;        /* of an open one: candidates of fewer bits are left out; 0: none */
} aq_plan_request;

typedef enum aq_plan_weighting {
    AQ_PLAN_WEIGHT_AUTO,    /* gradients where the calibration has them for most open layers, else by size */
    AQ_PLAN_WEIGHT_EQUAL,   /* 1 */
    AQ_PLAN_WEIGHT_SIZE,    /* square root of the number of weights */
    AQ_PLAN_WEIGHT_GRADIENT /* mean square gradient times the energy of the layer's output: the second-order cost of its error */
} aq_plan_weighting;

typedef enum aq_plan_nonfinite { AQ_PLAN_NONFINITE_ERROR, AQ_PLAN_NONFINITE_KEEP, AQ_PLAN_NONFINITE_ZERO } aq_plan_nonfinite;

typedef struct aq_plan_options {
    const aq_plan_request *requests; /* one per tensor of the model */
    const int *bits;                 /* allowed widths out of 2, 4, 8, 16 (kept); NULL: all */
    size_t n_bits;
    const uint64_t *groups; /* group sizes to try; NULL: 32, 64, 128, 256 */
    size_t n_groups;
    double min_cosine;             /* candidates below are left out; 0: none */
    const aq_calib *calib;         /* may be NULL */
    const aq_solve_options *solve; /* NULL: defaults */
    aq_plan_weighting weighting;
    /* Weights given by name, in place of the computed ones: all of one measure, e.g. probed with a running model. Open layers not among them: the median. */
    const char *const *weight_names;
    const double *weights;
    size_t n_weights;
    uint64_t sample_values; /* weights of a layer that are measured: whole rows spread over it; 0: all of it */
    uint64_t n_time_groups; /* activation parameters that are stored with a calibrated layer */
    bool equalizes;         /* equalization scales are stored with a calibrated layer */
    bool corrects_biases;   /* a layer's bias, where it has one, makes up for the mean of its inputs (Nagel et al. 2019): errors are those of x less it */
    uint64_t frame_bytes;   /* what the container's files hold beside the tensors (configuration); 0: an ordinary amount */
    aq_plan_nonfinite nonfinite;
    int n_threads;             /* 0: all */
    uint64_t max_memory_bytes; /* of layers in flight; 0: no bound */
    const char *cache_dir;     /* figures are kept here by the content they were measured on; NULL: not kept */
    /* By the calling thread, for each finished layer (in order; name NULL: none to tell) and every 50 ms; false stops. May be NULL. */
    bool (*progress)(void *user, const char *name, size_t n_done, size_t n_total);
    void *user;
} aq_plan_options;
/* sample_values 65536, everything else 0. */
AQ_API void aq_plan_options_init(aq_plan_options *options);

/* Measures every candidate of every open layer. Strings of the problem are the model's. AQ_ERR_USAGE: a bad option. AQ_ERR_FORMAT: weights that are not finite,
 * a changed file. AQ_ERR_INTERRUPTED, AQ_ERR_MEMORY, AQ_ERR_IO (cache). */
AQ_API aq_status aq_plan_measure(aq_plan_problem **out, const aq_model *model, const aq_plan_options *options, aq_error *err);
AQ_API void aq_plan_problem_free(aq_plan_problem *problem);

/* ---- evolutionary search ---- */

/* Goes on from a choice with the measure of quality that counts: that of the whole model, when it can be run (after Q-DiT, arXiv 2406.17343). Genome: a
 * candidate per layer. Tournament selection, uniform crossover, mutation to neighbouring sizes, repair to the budget. The best of a generation always
 * survives, so the result is never worse than the start. The same seed gives the same answer. */
typedef struct aq_evolution {
    uint32_t population, generations;     /* 20, 10 */
    double mutation_rate, crossover_rate; /* 0.2 per layer, 0.7 per pair */
    double elite_ratio;                   /* 0.1 of the population goes on unchanged, at least one */
    uint64_t max_evaluations;             /* 0: no bound */
    uint64_t seed;
    /* Fitness of a choice, lower is better; NaN counts as the worst. false stops the search with AQ_ERR_INTERRUPTED. NULL: aq_plan_error. Called from the
     * calling thread, never twice for the same choice. */
    bool (*fitness)(void *user, const aq_plan_problem *problem, const size_t *choice, double *out);
    /* After each generation; false stops it with AQ_ERR_INTERRUPTED. May be NULL. */
    bool (*generation)(void *user, uint32_t generation, double best, double mean, double worst, uint64_t n_evaluations);
    void *user;
    const char *state_path; /* the state after each generation is kept here, and taken up again when it is that of the same search; NULL: not */
} aq_evolution;
AQ_API void aq_evolution_init(aq_evolution *evolution);

/* Improves choice[n_items], which fits the budget (0: none). *fitness and *n_evaluations (may be NULL): that of the result, and of how many choices it was
 * asked for. AQ_ERR_USAGE: a bad option, or a choice outside the
 * problem or the budget. AQ_ERR_FORMAT: the state file belongs to another search. */
AQ_API aq_status aq_plan_evolve(const aq_plan_problem *problem, uint64_t budget_bytes, const aq_evolution *evolution, size_t *choice, double *fitness,
                                uint64_t *n_evaluations, aq_error *err);

/* ---- sensitivity ---- */

/* How sensitive each open layer is, before any budget. */
typedef enum aq_sensitivity {
    AQ_SENSITIVITY_VARIANCE, /* mean square of the group ranges over Var(W): what uniform steps would leave of the weights; needs no data */
    AQ_SENSITIVITY_HESSIAN,  /* relative output error at 4 bits, groups of 128; needs calibration */
    AQ_SENSITIVITY_GRADIENT  /* root of sum (dL/dW)^2 E^2, E at 4 bits in groups of 128; needs gradients in the calibration */
} aq_sensitivity;
/* AQ_SENSITIVITY_* of "variance", "hessian", "gradient"; -1 for another word. */
AQ_API int aq_sensitivity_from_name(const char *name);
AQ_API const char *aq_sensitivity_name(aq_sensitivity method);
/* scores[n_tensors]: 0..1 of the open layers, by rank-preserving log scale over them (one layer, or all equal: 0.5); NaN elsewhere. raw[n_tensors] (may be
 * NULL): the measure itself. AQ_ERR_USAGE: what the method needs is missing; the message and hint say what to collect and how. */
AQ_API aq_status aq_plan_sensitivity(const aq_model *model, const aq_plan_options *options, aq_sensitivity method, double *scores, double *raw, aq_error *err);

#ifdef __cplusplus
}
#endif
#endif
