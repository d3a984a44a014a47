/* ArrowQuant data sets: the samples that calibration feeds to a model, read one by one from a file.
 *
 *   .jsonl, .ndjson  one object a line: {"text": "…"}, {"prompt": "…"}, {"input": [...]} (nested lists give the shape), or
 *                    {"data": [numbers], "timestep": int or null, "shape": [ints] or null}; other keys are ignored
 *   .npz             one sample per entry of an array's first axis (stored or deflated members)
 *   .npy             the same for a single array
 *   .parquet         rows with a column text or prompt, or with data (list of numbers), timestep, shape
 *
 * Files are untrusted: sizes are checked before anything is allocated, a bad line, row or member is an error that names it. One data set serves one thread.
 */
#ifndef ARROWQUANT_DATASET_H
#define ARROWQUANT_DATASET_H

#include <arrowquant/base.h>
#include <arrowquant/model.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct aq_dataset aq_dataset;

typedef struct aq_dataset_options {
    const char *array;       /* .npz: member with the samples; NULL: the only one, or one named data, input, inputs, images, latents, samples or x */
    uint64_t max_line_bytes; /* a longer line of JSONL is bad; 0: 16 MiB */
    /* A bad line, row or member: told here, and reading goes on with the next when it returns true. NULL: the first one is the error of aq_dataset_next. */
    bool (*on_bad)(void *user, uint64_t line, const aq_error *problem);
    void *on_bad_user;
} aq_dataset_options;
AQ_API void aq_dataset_options_init(aq_dataset_options *options);

typedef enum aq_sample_kind {
    AQ_SAMPLE_TEXT,   /* `text`: {"text": …} */
    AQ_SAMPLE_PROMPT, /* `text`: {"prompt": …}, what a pipeline is asked */
    AQ_SAMPLE_INPUT,  /* `values`: {"input": …}, or an entry of an array: what the model gets */
    AQ_SAMPLE_DATA    /* `values`: {"data": …}: model inputs or activations, with their timestep where there is one */
} aq_sample_kind;

/* One sample. Pointers are valid until the next call or close. */
typedef struct aq_sample {
    aq_sample_kind kind;
    uint64_t line;    /* number of the line, row or entry, from 1 */
    const char *text; /* UTF-8, NUL-terminated, of text_bytes; may hold NULs itself */
    uint64_t text_bytes;
    const float *values; /* row-major, of `shape`; integers up to 2^24 are exact */
    uint64_t n_values;
    aq_shape shape;
    bool integers;    /* all values are written as integers: token ids, bytes of an image */
    aq_dtype dtype;   /* element type in an .npy array, F64 elsewhere */
    int32_t timestep; /* -1: none */
    bool synthetic;   /* marked so ("synthetic": true): statistics from it are synthetic too */
} aq_sample;

/* Opens by extension. AQ_ERR_IO, AQ_ERR_FORMAT (unknown kind of file, damaged, no array with samples), AQ_ERR_USAGE. options may be NULL. */
AQ_API aq_status aq_dataset_open(aq_dataset **out, const char *path, const aq_dataset_options *options, aq_error *err);
AQ_API void aq_dataset_close(aq_dataset *dataset);

/* Next sample; *end (and no sample) after the last. AQ_ERR_FORMAT names the line; the next call goes on with the following one. On failure *out has the
 * number of the line and nothing else. */
AQ_API aq_status aq_dataset_next(aq_dataset *dataset, aq_sample *out, bool *end, aq_error *err);

/* Number of samples, 0 when only reading tells (JSONL). */
AQ_API uint64_t aq_dataset_n_samples(const aq_dataset *dataset);
/* SHA-256 of the file, 64 hex digits + NUL: for aq_calib_options.data_sha256. */
AQ_API aq_status aq_dataset_sha256(const char *path, char out[65], aq_error *err);

/* ---- synthetic data, when there is none ---- */

typedef struct aq_synthetic_options {
    uint64_t n_samples;   /* 0: 128 */
    aq_shape shape;       /* of one sample, without batch; rank 0: from the model's config.json */
    uint32_t n_timesteps; /* of the schedule; 0: from the model's scheduler, else 1000 */
    aq_modality modality; /* AQ_MODALITY_UNKNOWN: the model's */
    uint32_t vocabulary;  /* text; 0: from config.json */
    int64_t mask_token;   /* text; -1: from config.json, or none */
    uint64_t seed;
} aq_synthetic_options;
AQ_API void aq_synthetic_options_init(aq_synthetic_options *options);

/* Writes `path` (.jsonl), n_samples rows {"data", "timestep", "shape", "synthetic": true}: inputs for the model, to be run through it, not statistics.
 * Image and audio: standard normal values. Text: tokens drawn evenly from the vocabulary; of sample i of N the part (i + 1/2) / N is masked where there is a
 * mask token. Timesteps lie evenly over the schedule. The same options give the same bytes. *used (may be NULL) takes the options with what was read from the
 * model. AQ_ERR_USAGE says what has to be given when the configuration does not tell. */
AQ_API aq_status aq_dataset_synthesize(const char *path, const aq_model *model, const aq_synthetic_options *options, bool overwrite, aq_synthetic_options *used,
                                       aq_error *err);

#ifdef __cplusplus
}
#endif
#endif
