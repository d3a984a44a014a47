/* Inside of aq_quantize_model, in the order of a run:
 *   preflight.c  opens and checks everything, chooses what happens to each tensor, plans memory
 *   attempts.c   what is tried for a layer; inputs.c, activations.c: what calibration says about its inputs
 *   budget.c     a plan that meets the target size
 *   fold_choose.c  equalization that is folded into the operation before (fold.h)
 *   correction.c which biases are corrected
 *   layers.c     quantizes tensors in parallel: attempts, the best of them, the fallback ladder
 *   handover.c   hands finished tensors to the writer in order, and continues an interrupted run
 *   summary.c    metadata.json and the report
 *   quantize.c   the run itself
 */
#ifndef AQ_PIPELINE_QUANTIZE_H
#define AQ_PIPELINE_QUANTIZE_H

#include <arrowquant/calibration.h>
#include <arrowquant/pipeline.h>
#include <arrowquant/plan.h>
#include <arrowquant/solve.h>
#include <arrowquant/store.h>
#include <jansson.h>

#include "pipeline/fold.h"
#include "pipeline/job.h"
#include "pipeline/report.h"

typedef enum { NONFINITE_ERROR, NONFINITE_KEEP, NONFINITE_ZERO } nonfinite_mode;

/* What became of one tensor that was to be quantized. */
typedef struct layer_outcome {
    int bits;             /* 2, 4, 8; 16: kept */
    bool corrected;       /* a bias that makes up for the mean error of its layer */
    bool widened;         /* parameters did not fit half precision */
    uint64_t n_nonfinite; /* values that were not finite: set to zero, or the reason to keep it */
    double cosine, sqnr_db;
    double output_sqnr_db; /* NaN: nothing is known of the inputs */
    const char *method;    /* static word */
    aq_quant_spec spec;    /* bits < 16 */
    char *fallback_from;   /* NULL, or what was tried first: steps "int2: cosine 0.612 < 0.850", joined by "; " */
    char *compared_with;   /* NULL, or what did worse: "search 25.3 dB" */
} layer_outcome;

/* Memory of a run, announced before it starts and kept to. */
typedef struct memory_plan {
    uint64_t limit_bytes; /* UINT64_MAX: none */
    uint64_t minimum_bytes;
    uint64_t budget_bytes; /* for tensors in flight */
    uint64_t slab_values;  /* F32 values of the largest slab */
    uint64_t predicted_peak_bytes;
    int n_threads;
} memory_plan;

typedef struct quantize_run {
    const aq_config *config;
    const aq_quantize_options *options;
    aq_job job;
    const char *stage; /* beyond the layers: "copy", "verify" */
    aq_model *model;
    const aq_calib *calib; /* NULL: none */
    aq_calib *own_calib;   /* what this run opened itself */
    const aq_plan *plan;   /* NULL: none */
    aq_plan *own_plan;
    bool plan_follows;      /* it was made from the settings, a budget: nobody gave it */
    aq_solve_options solve; /* from the configuration */
    aq_folds folds;         /* producers that equalization may be folded into; chosen before the layers */
    int64_t *biases;        /* [n_tensors] of a weight: the bias that is corrected with it; -1: none */
    bool *is_corrected;     /* [n_tensors] one of those biases */
    size_t *order;          /* [n_tensors] in which tensors are worked on and stored: that of the source, but such a bias directly after its weight */
    aq_store_writer *writer;
    char *out_path;
    char *config_json; /* what determines the bytes, canonical: see aq_run_config_json */
    size_t n_tensors;
    aq_layer_choice *choices; /* [n_tensors] */
    layer_outcome *outcomes;  /* [n_tensors] */
    uint64_t *needs;          /* [n_tensors] bytes of codes and parameters in flight, at most */
    uint64_t source_bytes;    /* of all tensors */
    uint64_t predicted_bytes; /* of the output */
    memory_plan memory;
    nonfinite_mode nonfinite;
    double min_accuracy;
    bool fail_fast;
    int ladder[4]; /* bits to try, rising; n_ladder of them */
    size_t n_ladder;
    double *scores;            /* [n_tensors] of sensitivity; NULL: not asked for */
    const char *score_method;  /* by which */
    char (*score_reasons)[48]; /* [n_tensors] why sensitive layers are kept */
    aq_sentences warnings;
} quantize_run;

/* The next step of the ladder above `bits`; 16 when there is none: kept. */
int aq_next_bits(const quantize_run *run, int bits);
/* What the run's plan says about a tensor, or NULL. */
const aq_plan_layer *aq_planned(const quantize_run *run, const aq_tensor_info *t);
/* How far the plan's estimates were from what was measured; null without a plan. */
json_t *aq_estimates_json(const quantize_run *run);
/* What tensor `index` becomes at the bits of a ladder step. */
aq_status aq_spec_at(const quantize_run *run, size_t index, int bits, aq_quant_spec *spec, aq_error *err);
/* The same with F32 parameters, for values that do not fit half precision. */
aq_quant_spec aq_widened(const quantize_run *run, const aq_quant_spec *spec);

/* Opens the model and checks everything that can be checked before work; all problems found are listed together in *err. */
aq_status aq_preflight(quantize_run *run, const char *model_path, const char *out_path, aq_error *err);
/* Output rules: a name when none was given, and never the source in any disguise (FA06). */
aq_status aq_check_output(quantize_run *run, const char *out_path, aq_error *err);
aq_status aq_plan_memory(quantize_run *run, aq_error *err);

/* budget.c: makes a plan when the configuration has a budget and none is given; compares the prediction with the target; and what came out with it. */
aq_status aq_budget_plan(quantize_run *run, aq_error *err);
aq_status aq_budget_check(const quantize_run *run, aq_error *err);
aq_status aq_budget_check_outcome(const quantize_run *run, aq_error *err);
/* Bytes of the container beside its tensors, and the most that tensor `index` takes in the container with `spec` (NULL: kept). */
uint64_t aq_predict_frame(const quantize_run *run);
aq_status aq_predict_stored(const quantize_run *run, size_t index, const aq_quant_spec *spec, uint64_t *bytes, aq_error *err);

/* sensitive.c: scores the layers when that is asked for, and keeps those that score enough; again after all tensors were chosen anew. */
aq_status aq_sensitive_find(quantize_run *run, aq_error *err);
void aq_sensitive_keep(quantize_run *run);

/* Which producers equalization may be folded into, from the model's structure and the settings; and whether it is, by measured output error. */
aq_status aq_folds_find(quantize_run *run, aq_error *err);
aq_status aq_folds_choose(quantize_run *run, aq_error *err);

/* correction.c: finds the biases to correct and the order that follows from it; and whether tensor `index` is a weight with such a bias. */
aq_status aq_biases_find(quantize_run *run, aq_error *err);
bool aq_bias_is_corrected(const quantize_run *run, size_t index);

/* Quantizes or copies all tensors that the writer does not hold yet. */
aq_status aq_quantize_layers(quantize_run *run, aq_error *err);

/* Warns when more than a fifth of the layers fell back, saying what to change. */
void aq_warn_fallback_rate(quantize_run *run);

/* The configuration without what does not change the bytes (threads, memory, paths). Freed by aq_config_free_text. */
char *aq_run_config_json(const aq_config *config);
/* metadata.json: nothing that differs between two runs of the same input and options. NULL: no memory. */
char *aq_metadata_text(const quantize_run *run);
/* "arrowquant.quantize/1", from the finished container. */
aq_status aq_quantize_report(quantize_run *run, char **report_json, aq_error *err);

/* Name under which a side file is stored: the container has a metadata.json of its own. */
const char *aq_side_file_stored_name(const char *relative_path);
const char *aq_side_file_original_name(const char *relative_path);

#endif
