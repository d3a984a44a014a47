/* ArrowQuant pipeline: the jobs that a person or program asks for.
 *
 * Each job checks all its inputs before it works, reports progress, can be cancelled, and leaves either a complete verified result or none
 * (an interrupted quantize leaves a resumable work folder). Results are JSON texts with a `schema` key, described in docs/json.md:
 * the command line prints them, the Python module parses them, so there is one description of every figure.
 */
#ifndef ARROWQUANT_PIPELINE_H
#define ARROWQUANT_PIPELINE_H

#include <arrowquant/base.h>
#include <arrowquant/calibration.h>
#include <arrowquant/config.h>
#include <arrowquant/model.h>
#include <arrowquant/plan.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct aq_progress {
    const char *stage;                /* "check", "quantize", "verify", "export" */
    const char *tensor;               /* the one just finished, or NULL */
    uint64_t n_done, n_total;         /* tensors */
    uint64_t bytes_done, bytes_total; /* of source data */
    double fraction;                  /* 0..1, never falling over the whole job */
    double elapsed_s;
    double eta_s;       /* estimate; NaN until it can be told */
    const char *detail; /* one line about the finished tensor for -v, or NULL */
} aq_progress;

/* Hooks of a job. All members may be NULL. Called from the calling thread only. */
typedef struct aq_job_hooks {
    bool (*progress)(void *user, const aq_progress *progress); /* false cancels: AQ_ERR_INTERRUPTED */
    aq_log_fn log;
    void *user;
} aq_job_hooks;

typedef struct aq_quantize_options {
    aq_model_options model;
    bool overwrite, make_parents, restart, no_verify, strict, allow_unmatched;
    bool no_side_files;
    uint64_t shard_bytes;  /* 0: 5 GB */
    const aq_calib *calib; /* statistics in memory, in place of the setting calibration_path; NULL: as set */
    const aq_plan *plan;   /* a plan in memory, in place of plan_path; NULL: as set */
} aq_quantize_options;

/* Quantizes a model into a container folder. out_path NULL: "<name>-int<bits>" beside the source.
 * `*report_json` (may be NULL) receives "arrowquant.quantize/1"; freed by aq_text_free. Error codes: as the command line's exit codes. */
AQ_API aq_status aq_quantize_model(const char *model_path, const char *out_path, const aq_config *config, const aq_quantize_options *options,
                                   const aq_job_hooks *hooks, char **report_json, aq_error *err);

/* What a plan is made by, beside the configuration. */
typedef struct aq_plan_job {
    aq_model_options model;
    bool allow_unmatched;
    const char *sensitivity;       /* NULL, or "variance", "hessian", "gradient": scores are part of the plan */
    const char *weights_path;      /* JSON object {layer: weight}, what a relative error of 1 in the layer costs the model; NULL: computed */
    const char *cache_dir;         /* measured figures are kept here; NULL: not */
    uint64_t sample_values;        /* weights of a layer that are measured; 0: 65536; UINT64_MAX: all */
    uint64_t config_bytes;         /* of the configuration's text that the container will hold; 0: about 2 KB */
    uint64_t reserve_bytes;        /* what else the caller stores in the container, and the planner does not know of */
    const aq_evolution *evolution; /* goes on from the knapsack's answer; NULL: does not */
} aq_plan_job;

/* Solves bits, groups and parameter forms of every layer for the budget of the configuration (target_model_size_mb unless it is a wish, or target_bpw; none:
 * the least error that allow_bits has) and writes no model. `*plan` (may be NULL) is freed by aq_plan_free, `*report_json` (may be NULL): its text,
 * "arrowquant.plan/1". AQ_ERR_BUDGET: nothing fits; the message names the smallest size. */
AQ_API aq_status aq_plan_model(const char *model_path, const aq_config *config, const aq_plan_job *options, const aq_job_hooks *hooks, aq_plan **plan,
                               char **report_json, aq_error *err);

/* ---- group sizes per layer at one bit width (python-api 7) ---- */

typedef struct aq_granularity_job {
    aq_model_options model;
    bool allow_unmatched;
    const char *sensitivity;     /* "gradient" (default, NULL), "hessian", "variance" */
    double target_compression;   /* against F32, two 32-bit parameters a group: 10 */
    double min_accuracy;         /* no layer's estimated accuracy is below: 0.70 */
    double accuracy_weight;      /* 0.7 */
    const uint64_t *group_sizes; /* NULL: 32, 64, 128, 256 */
    size_t n_group_sizes;
    const char *const *layers; /* names, with or without ".weight"; NULL: all that would be quantized */
    size_t n_layers;
    uint64_t sample_values; /* 0: 65536 */
} aq_granularity_job;
AQ_API void aq_granularity_init(aq_granularity_job *job);

/* Size for a sensitivity score: 0.75 or more 32, 0.5 or more 64, 0.25 or more 128, else 256, restricted to the sizes (rising; n >= 1): the largest that is
 * not larger, else the smallest. */
AQ_API uint64_t aq_granularity_recommend(double score, const uint64_t *sizes, size_t n_sizes);
/* Estimated loss of accuracy, 0.15 score log2(group / 16): a rule of thumb under which the objective at its default weights picks the recommended sizes. */
AQ_API double aq_granularity_impact(double score, uint64_t group_size);
/* 32 / (bits + 64 / group): against F32 with two F32 parameters a group. An estimate: the container stores smaller ones. */
AQ_API double aq_granularity_compression(uint64_t group_size, int bits);

/* A size for each layer: accuracy * accuracy_weight + compression / target * (1 - accuracy_weight) is largest, accuracy = 1 - impact of the layer's score,
 * and not below min_accuracy. The real accuracy (cosine of the weights at these sizes) is measured on the sampled rows beside it. The report is a plan of
 * group sizes (docs/json.md, "Granularity"). AQ_ERR_QUALITY: no size keeps a layer above min_accuracy. AQ_ERR_USAGE: what the method needs is missing. */
AQ_API aq_status aq_granularity(const char *model_path, const aq_config *config, const aq_granularity_job *options, const aq_job_hooks *hooks,
                                char **report_json, aq_error *err);

/* Evolutionary search of the sizes, each genome measured: metric "cosine_similarity" (or "accuracy"; mean over layers by size), "compression_ratio" (of the
 * layers' source bytes to their stored bytes) or "balanced" (mean of cosine and compression over target_compression, at most 1). `start`: sizes [n_layers]
 * for `layers`, or NULL: the knapsack's answer for the budget of the configuration, else the best by the metric. Of `evolution` fitness, generation and user
 * are not used; the history is in the report. */
AQ_API aq_status aq_evolve_groups(const char *model_path, const aq_config *config, const aq_granularity_job *options, const aq_evolution *evolution,
                                  const char *metric, const uint64_t *start, const aq_job_hooks *hooks, char **report_json, aq_error *err);

/* What is in a path (source model or container): "arrowquant.inspect/1". */
AQ_API aq_status aq_inspect(const char *path, const aq_config *config, const aq_model_options *options, char **report_json, aq_error *err);

/* Structure, hashes, non-finite values, parameter bounds; with `against`, the real error per tensor: "arrowquant.verify/1".
 * AQ_ERR_QUALITY when there is a problem or a layer is under the floor; the report is given then too. */
AQ_API aq_status aq_verify(const char *path, const char *against, const aq_model_options *options, const aq_job_hooks *hooks, int n_threads,
                           double min_accuracy, char **report_json, aq_error *err);

/* Error between two models of any readable kind, tensor by tensor: "arrowquant.diff/1". */
AQ_API aq_status aq_diff(const char *a, const char *b, const aq_model_options *options, const aq_job_hooks *hooks, int n_threads, char **report_json,
                         aq_error *err);

/* What an export writes. Zeroed, it has the defaults. */
typedef struct aq_export_options {
    const char *to;     /* "safetensors", "gguf", "comfy-int8" or "gptq" */
    const char *dtype;  /* "f32", "f16", "bf16": of the weights (safetensors), or of what is not coded (others); NULL: the source's, for gguf f16 */
    const char *type;   /* gguf: "auto" (or NULL), "q8_0", "q4_0", "q4_1", "q4_k", "q2_k", "f16" */
    const char *source; /* the original model: coded from where the container's codes do not fit the target's grid; NULL: from the dequantized weights */
    const aq_model_options *model; /* how to open the source, with the adapters that the container has merged; NULL: plainly */
    bool rotate;                   /* comfy-int8: rotate the inputs in groups of 256 */
    bool overwrite, make_parents;
    uint64_t shard_bytes; /* folders: a new file of weights begins beyond; 0: 5 GB */
    int n_threads;        /* 0: all */
} aq_export_options;

/* Exports a container for other programs (docs/exports.md). Codes are taken over where the target's grid agrees with ours; the error that recoding adds is in
 * the report, per layer, and in a warning. safetensors and gptq restore the folder layout and side files of a diffusers or transformers source; safetensors
 * with an out_path that ends so, gguf and comfy-int8 write one file. "arrowquant.export/1". */
AQ_API aq_status aq_export(const char *path, const char *out_path, const aq_export_options *options, const aq_job_hooks *hooks, char **report_json,
                           aq_error *err);

typedef struct aq_page_options {
    const char *against; /* the source model: errors and sensitivities are measured. NULL: those stored in the container */
    const char *calib;   /* calibration statistics: errors of outputs over the schedule. NULL: none; without `against` only its data set is named */
    const char *layer;   /* whose histograms are drawn; NULL: the one with the largest error */
    aq_model_options model;
    bool overwrite;
    int n_threads;
} aq_page_options;
/* Writes one self-contained HTML page about a container: sizes, errors per layer and over the schedule, sensitivity against bits, histograms of a layer,
 * fallbacks with their reasons, the command that makes it again. "arrowquant.report/1". AQ_ERR_IO: out_path exists, or cannot be written. */
AQ_API aq_status aq_write_page(const char *path, const char *out_path, const aq_page_options *options, const aq_job_hooks *hooks, char **report_json,
                               aq_error *err);

/* Speed of the kernels on this machine, each instruction set that it has: codes to F32 against copying memory, products on codes against F32 weights. A few
 * seconds and 20 MiB; the process's choice of kernels changes meanwhile, so nothing else should run. n_threads 0: all. "arrowquant.bench/1". AQ_ERR_MEMORY. */
AQ_API aq_status aq_bench(int n_threads, const aq_job_hooks *hooks, char **report_json, aq_error *err);

AQ_API void aq_text_free(char *text);

#ifdef __cplusplus
}
#endif
#endif
