/* ArrowQuant calibration: what the inputs of a model's layers look like, per group of timesteps.
 *
 * A collection holds, for each layer and time group, the count of input rows, their sum, sum of squares, largest magnitude, minimum and maximum per input
 * channel, and optionally the second moment H = E[x x^T]. It is filled row by row (streaming), collections of several runs or machines are merged, and one
 * file holds the result (docs/format.md, "Calibration statistics"). A layer is named by its weight tensor ("blocks.0.attn.to_q.weight").
 * Layers that read the same input (q, k, v) share one set of statistics.
 *
 * `t` counts as the scheduler counts it: T-1 is pure noise, 0 is clean. Group g holds the timesteps [g T / G, (g + 1) T / G).
 *
 * Rounding: squares of F32 values are exact in double, and sums are kept in double, added row by row within pieces of a call's rows and these in their order;
 * a collection that is fed the same rows in other calls or merged in another order gives the same figures to the rounding of double. Products for H are
 * summed in F32 over blocks of at most 512 rows (4096 for layers whose H is spilled) and these sums added in double: each element of H is right to
 * 3e-5 (H_ii H_jj)^1/2 whatever the number of rows. The rows of a call are a block or several, or wait for more where they are few.
 * Nothing depends on the number of threads. Inputs with NaN or infinity are refused.
 */
#ifndef ARROWQUANT_CALIBRATION_H
#define ARROWQUANT_CALIBRATION_H

#include <arrowquant/base.h>
#include <arrowquant/model.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct aq_calib aq_calib;

typedef struct aq_calib_options {
    uint32_t n_timesteps;      /* T of the schedule; 0: the model has none (one group) */
    uint32_t n_groups;         /* G >= 1 */
    bool hessian;              /* keep H of layers with at most `hessian_most` inputs */
    bool hessian_pooled;       /* one H a layer over all time groups instead of one each: G times less memory and disk */
    uint64_t hessian_most;     /* 0: 16384 */
    uint64_t hessian_full;     /* cost bound: layers of up to this many inputs enter every row in H, a wider one evenly one of ceil(n / hessian_full) rows.
                                * 0: every row. Everything else always counts every row */
    uint64_t max_memory_bytes; /* what may be held between calls; the H of further layers are spilled to a file in `spill_folder`. 0: no bound.
                                * A call takes up to about 32 MB a thread more while it runs */
    const char *spill_folder;  /* NULL: TMPDIR, else /tmp */
    const char *data_name;     /* data set, for the report; may be NULL. After a merge: the names, sorted, joined by " + " */
    const char *data_sha256;   /* of the data set, 64 hex digits; may be NULL. After a merge: the distinct ones, sorted, joined by " + " */
    uint64_t seed;             /* after a merge: the smallest */
    bool synthetic;            /* made from random inputs; told in every report */
    bool diagonal_only; /* an imported importance matrix: mean squares of the inputs and nothing else. aq_calib_diagonal serves, aq_calib_group has no rows */
    aq_modality modality;
} aq_calib_options;
AQ_API void aq_calib_options_init(aq_calib_options *options);

/* An empty collection. AQ_ERR_USAGE: bad option. */
AQ_API aq_status aq_calib_create(aq_calib **out, const aq_calib_options *options, aq_error *err);
AQ_API void aq_calib_free(aq_calib *calib);

/* Adds a layer with `n_inputs` columns of its weight's matrix view; *index (may be NULL) is its number. same_input_as: an earlier layer whose statistics
 * hold for this one too, or NULL. AQ_ERR_USAGE: a name twice, or another number of inputs than the layer it shares with. AQ_ERR_MEMORY: the sums alone are
 * beyond max_memory_bytes. */
AQ_API aq_status aq_calib_add_layer(aq_calib *calib, const char *name, uint64_t n_inputs, const char *same_input_as, size_t *index, aq_error *err);

/* Adds rows x [n_rows, n_inputs] of F32, `row_stride` floats apart. timesteps [n_rows], or NULL: `timestep` for all of them (-1: unknown, counted in group 0
 * and warned of). Different layers may be updated from several threads at once. n_threads: 0 all.
 * AQ_ERR_FORMAT names layer, row and channel of a value that is not finite (or, with H, beyond 1e16), or a timestep outside the schedule; nothing of the call
 * is added then. AQ_ERR_USAGE: the layer shares the statistics of another; that one is updated. After AQ_ERR_MEMORY or AQ_ERR_IO (spill file) the collection
 * may hold a part of the call. AQ_ERR_INTERRUPTED: stopped by aq_calib_set_keep_going; nothing of the call was added. */
AQ_API aq_status aq_calib_update(aq_calib *calib, size_t layer, const float *x, uint64_t n_rows, uint64_t row_stride, const int32_t *timesteps,
                                 int32_t timestep, int n_threads, aq_error *err);

/* Input of a convolution: x [batch, channels, d0, d1, d2] contiguous (d0 = 1 for 2-D, d0 = d1 = 1 for 1-D), unfolded into rows of
 * channels * k0 * k1 * k2 values in the order of the weight's matrix view. */
typedef struct aq_conv_shape {
    uint32_t batch, channels, groups; /* groups > 1: the rows of every group are added (n_inputs = channels / groups * kernel) */
    uint32_t size[3], kernel[3], stride[3], padding[3], dilation[3];
} aq_conv_shape;
/* The same for a convolution. timesteps [batch] or NULL. */
AQ_API aq_status aq_calib_update_conv(aq_calib *calib, size_t layer, const float *x, const aq_conv_shape *shape, const int32_t *timesteps, int32_t timestep,
                                      int n_threads, aq_error *err);

/* keep_going(user), NULL: never, is asked by calls of the two functions above that take about half a second or more and by aq_calib_save, on their own threads
 * and many times a second; false ends the call with AQ_ERR_INTERRUPTED, and neither the collection nor a file has changed. A long call holds what it has
 * summed apart until it is complete, for which it takes the memory of one more H (in the spill file where max_memory_bytes would be exceeded). */
AQ_API void aq_calib_set_keep_going(aq_calib *calib, bool (*keep_going)(void *user), void *user);

/* Adds a gradient dL/dW [rows, n_inputs] of the layer's weight: kept as means of squares per row and per column (for the "gradient" sensitivity). */
AQ_API aq_status aq_calib_add_gradient(aq_calib *calib, size_t layer, const float *gradient, uint64_t rows, aq_error *err);

/* Adds everything of `from`. AQ_ERR_USAGE names what disagrees: schedule, groups, inputs of a layer. Layers of only one of them are taken as they are. */
AQ_API aq_status aq_calib_merge(aq_calib *into, const aq_calib *from, aq_error *err);

/* Writes the file atomically (an existing one is replaced only with `overwrite`), and reads it back: small columns at once, H when asked for.
 * A damaged or foreign file is AQ_ERR_FORMAT with the reason. */
AQ_API aq_status aq_calib_save(const aq_calib *calib, const char *path, bool overwrite, aq_error *err);
AQ_API aq_status aq_calib_open(aq_calib **out, const char *path, aq_error *err);
/* Compares every stored H with its hash, which else happens when it is first used. AQ_ERR_FORMAT names the layer. */
AQ_API aq_status aq_calib_verify(const aq_calib *calib, aq_error *err);

/* ---- reading ---- */

AQ_API const aq_calib_options *aq_calib_settings(const aq_calib *calib); /* strings live as long as the collection */
AQ_API uint64_t aq_calib_held_bytes(const aq_calib *calib);              /* memory that the collection holds now, for max_memory_bytes */
AQ_API size_t aq_calib_n_layers(const aq_calib *calib);
AQ_API const char *aq_calib_layer_name(const aq_calib *calib, size_t layer);
AQ_API uint64_t aq_calib_n_inputs(const aq_calib *calib, size_t layer);
AQ_API int64_t aq_calib_find(const aq_calib *calib, const char *name); /* -1: not there */
AQ_API size_t aq_calib_source(const aq_calib *calib, size_t layer);    /* the layer whose statistics hold for it: itself, or that of same_input_as */
AQ_API uint64_t aq_calib_count(const aq_calib *calib, size_t layer);   /* rows over all time groups; 0: nothing is known of its inputs */
AQ_API bool aq_calib_has_hessian(const aq_calib *calib, size_t layer);
/* [start, end) of a time group, in timesteps; [0, 0) without a schedule. */
AQ_API void aq_calib_group_range(const aq_calib *calib, uint32_t group, uint32_t *start, uint32_t *end);

/* One layer and time group (with diagonal_only: nothing). Arrays [n_inputs], borrowed; NULL and count 0 where nothing was seen. */
typedef struct aq_calib_stats {
    uint64_t count;         /* rows */
    uint64_t hessian_count; /* rows in H (with hessian_pooled those of all groups); 0: it has none */
    const double *sum, *sum_sq;
    const float *absmax, *min, *max;
} aq_calib_stats;
AQ_API aq_calib_stats aq_calib_group(const aq_calib *calib, size_t layer, uint32_t group);
/* Mean and standard deviation (of the population) of each channel, from those sums; mean, std [n_inputs], either may be NULL. False, and nothing written, where
 * nothing was seen. */
AQ_API bool aq_calib_mean_std(const aq_calib *calib, size_t layer, uint32_t group, double *mean, double *std);

/* H = sum_g weight_g E_g[x x^T] / sum_g weight_g over the groups that were seen, full and symmetric, F32 [n, n]. weights NULL: by count. With
 * hessian_pooled there is one E alone and weights say nothing.
 * AQ_ERR_USAGE when the layer has none. AQ_ERR_MEMORY. Safe to call from several threads. */
AQ_API aq_status aq_calib_hessian(const aq_calib *calib, size_t layer, const double *weights, float *h, aq_error *err);
/* Its diagonal alone, from the sums of squares: there for every layer. h [n]. */
AQ_API aq_status aq_calib_diagonal(const aq_calib *calib, size_t layer, const double *weights, float *h, aq_error *err);
/* The mean of the inputs over the groups that were seen, weighted like H; mean [n]. *of_hessian (may be NULL): H has every row that the mean has, so that
 * H - mean mean^T is their covariance. AQ_ERR_USAGE with diagonal_only, which knows no means. AQ_ERR_QUALITY when it is not finite. */
AQ_API aq_status aq_calib_mean(const aq_calib *calib, size_t layer, const double *weights, float *mean, bool *of_hessian, aq_error *err);

/* Mean squares of the gradient per row and column; false when none was added. rows [*n_rows], cols [n_inputs], borrowed. */
AQ_API bool aq_calib_gradient(const aq_calib *calib, size_t layer, const double **rows, uint64_t *n_rows, const double **cols);

/* Scalars over all channels of a layer at one timestep of those seen: rows of (timestep, mean, std, min, max), sorted. */
typedef struct aq_timestep_stats {
    int32_t timestep; /* -1: rows whose timestep was not known */
    float min, max;
    uint64_t count; /* values */
    double mean, std;
    double sum, sum_sq;
} aq_timestep_stats;
AQ_API const aq_timestep_stats *aq_calib_timesteps(const aq_calib *calib, size_t layer, size_t *n);

/* Agreement with a model: every layer of the collection is a tensor of it with that many inputs (CA01). AQ_ERR_FORMAT lists what disagrees. Layers of the
 * model that the collection lacks are told by `missing` (may be NULL), one name each. */
AQ_API aq_status aq_calib_check(const aq_calib *calib, const aq_model *model, void (*missing)(void *user, const char *name), void *user, aq_error *err);

/* What is weak about the statistics, one sentence each: synthetic data, layers or time groups without rows, inputs that never change, fewer rows than inputs,
 * rows of unknown timestep (CA02). */
AQ_API void aq_calib_warnings(const aq_calib *calib, void (*tell)(void *user, const char *sentence), void *user);

/* SHA-256 over everything that counts (not the path): part of a run's fingerprint and of cache keys. 64 hex digits + NUL. */
AQ_API aq_status aq_calib_fingerprint(const aq_calib *calib, char out[65], aq_error *err);

/* Reads an importance matrix of llama.cpp, legacy .dat or GGUF (NAME.in_sum2 and NAME.counts), as a collection without schedule and with diagonal_only. With a
 * model only layers that are tensors of it, with as many inputs, are taken; others are told by `skipped` (may be NULL). AQ_ERR_FORMAT: damaged, foreign, or
 * nothing in it fits the model. */
AQ_API aq_status aq_calib_import(aq_calib **out, const char *path, const aq_model *model, void (*skipped)(void *user, const char *name), void *user,
                                 aq_error *err);

/* ---- cache: recordings that need not be made again ---- */

/* Key of a recording: SHA-256 over the content of the model's files, the data set's SHA-256, the options and the version of the library. `extra` (may be NULL):
 * whatever else it depends on, such as the number of samples. model and options may be NULL. 64 hex digits + NUL. */
AQ_API aq_status aq_calib_cache_key(const aq_model *model, const char *data_sha256, const aq_calib_options *options, const char *extra, char out[65],
                                    aq_error *err);
/* The recording of this key in `folder`, checked whole; *out NULL (and AQ_OK) when there is none. AQ_ERR_FORMAT says why one that is there is not used:
 * damaged, or foreign (made under another key). It is left where it is. */
AQ_API aq_status aq_calib_cache_find(aq_calib **out, const char *folder, const char *key, aq_error *err);
/* Keeps a recording under its key; the folder is made when it is missing, an older entry is replaced. */
AQ_API aq_status aq_calib_cache_store(const aq_calib *calib, const char *folder, const char *key, aq_error *err);

#ifdef __cplusplus
}
#endif
#endif
