/* Inside of aq_export. A target says what becomes of each tensor (plan), and turns slabs of rows into bytes (make); export.c runs it over all tensors with
 * several threads, writes what comes at fixed places of the file, and adds up the error that the target's grid adds.
 *   export.c         the run, checks before work, report
 *   export_files.c   files of weights: where each begins, and the index of several
 *   export_folder.c  folders: layout and side files of the source, put into place at once
 *   export_plain.c   safetensors; export_gguf.c, export_comfy.c, export_gptq.c
 */
#ifndef AQ_PIPELINE_EXPORT_H
#define AQ_PIPELINE_EXPORT_H

#include <arrowquant/pipeline.h>
#include <arrowquant/store.h>
#include <jansson.h>

#include "base/ordered.h"
#include "pipeline/job.h"
#include "pipeline/report.h"
#include "pipeline/source.h"
#include "quant/ggml.h"
#include "store/outfile.h"
#include "store/tensor_file.h"

enum { EXPORT_MAX_THREADS = 256 };

/* One tensor of the output. Rows of the source tensor follow each other in it with `row_bytes` each; or it is written once, from `blob`. */
typedef struct export_out {
    char *name;        /* owned */
    const char *dtype; /* safetensors word; GGUF: ggml type in `type` */
    uint32_t type;
    aq_shape shape;
    uint64_t size_bytes, row_bytes, offset;
    uint8_t *blob; /* owned, size_bytes; NULL: by rows */
} export_out;

typedef enum export_from {
    EXPORT_COPIED,    /* the stored bytes */
    EXPORT_CONVERTED, /* another element type */
    EXPORT_RECODED    /* codes of the target's own format */
} export_from;

/* What becomes of one tensor of the container, and what it cost. */
typedef struct export_plan {
    size_t first_out, n_outs;
    export_from from;
    aq_dtype dtype;                   /* of what is converted */
    const aq_ggml_format *format;     /* GGUF blocks */
    uint32_t group;                   /* comfy-int8: inputs that are rotated together, 0: none; gptq: inputs of a group */
    bool whole;                       /* the target wants all rows at once */
    bool use_source;                  /* values come from --source where the grids differ */
    size_t layer;                     /* of a bias that was corrected for its layer's codes, with --source: that layer + 1; 0: no such bias */
    const char *refused;              /* why it is not in the format that was asked for; static text */
    uint64_t n_units, n_taken;        /* blocks or groups, and those whose codes were taken over */
    aq_quant_metrics added;           /* the container's weights against what was written */
    aq_quant_metrics written, before; /* with --source: source against what was written, and against the container */
} export_plan;

typedef struct export_slab {
    size_t tensor;
    uint64_t row, n_rows;
    aq_source_tensor t;
    const export_plan *plan;
} export_slab;

/* A slab on its way. */
typedef struct export_piece {
    uint8_t *bytes; /* n_rows * row_bytes of each output by rows, one after the other */
    uint64_t n_infinite, n_units, n_taken;
    uint64_t n_shifted; /* gptq: groups whose zero point is not in the middle */
    aq_quant_metrics added, written, before;
    aq_error error;
} export_piece;

/* Scratch of one thread, [slabs.max_values] each. */
typedef struct export_scratch {
    float *reference; /* the container's weights */
    float *values;    /* what is to be coded: of the source, or the same pointer as reference */
    float *result;    /* what the bytes mean: filled by make */
    float *source;    /* with --source */
    aq_ggml_encoder *encoder;
} export_scratch;

/* Where one file of weights begins. All outputs of a tensor lie in one file. */
typedef struct export_shard {
    size_t first_tensor, first_out;
} export_shard;

typedef struct exporting exporting;

typedef struct export_target {
    const char *name;   /* of --to */
    const char *suffix; /* of a file */
    bool file, folder;  /* what the output may be */
    bool recodes;       /* has codes of its own: takes --source, reports the added error */
    aq_status (*plan)(exporting *x, size_t tensor, const aq_source_tensor *t, aq_error *err);
    bool (*make)(exporting *x, const export_slab *slab, export_scratch *scratch, export_piece *piece); /* NULL: only conversions */
    /* Header of a file with outputs [first, first + n), whose offsets it sets. */
    aq_status (*header)(exporting *x, size_t first, size_t n, uint8_t **bytes, uint64_t *size, uint64_t *file_size, aq_error *err);
    /* Changes config.json on its way into a folder; NULL: copied. */
    aq_status (*config)(const exporting *x, json_t *config, aq_error *err);
} export_target;

extern const export_target aq_export_safetensors, aq_export_gguf, aq_export_comfy, aq_export_gptq;

struct exporting {
    const export_target *target;
    const aq_export_options *options;
    aq_source source;   /* the container */
    aq_source original; /* --source, when given */
    aq_job job;
    aq_dtype dtype;               /* --dtype, or AQ_DTYPE_OTHER */
    const aq_ggml_format *format; /* --type; NULL: auto */
    const char *out_path;
    bool single_file;
    int n_threads;
    json_t *metadata;   /* of the container */
    export_plan *plans; /* [source.n_tensors] */
    export_out *outs;
    size_t n_outs, outs_capacity;
    const char *weights_path; /* of the file, or from which names of several are made */
    export_shard *shards;     /* [n_shards + 1] */
    size_t n_shards, n_begun; /* files are written one after the other */
    aq_outfile *file;         /* the last one begun */
    aq_slabs slabs;
    export_piece pieces[AQ_ORDERED_WINDOW];
    export_scratch scratch[EXPORT_MAX_THREADS];
    uint64_t n_infinite, n_shifted, bytes_done, n_done;
    aq_sentences warnings, files;
};

/* Adds an output tensor to the plan of `tensor`, which must be the last one planned. The name is copied; `suffix` may be NULL. NULL: no memory. */
export_out *aq_export_add(exporting *x, size_t tensor, const char *name, size_t name_length, const char *suffix);
/* Element type that a tensor keeps or gets when it is not recoded: `wanted` for floating ones (AQ_DTYPE_OTHER: what the source had). */
aq_dtype aq_export_kept_dtype(const aq_source_tensor *t, aq_dtype wanted);
/* Plans a tensor as it is, converted to `dtype` where it has another one. */
aq_status aq_export_plan_kept(exporting *x, size_t tensor, const aq_source_tensor *t, aq_dtype dtype, aq_error *err);
/* A quantized tensor whose stored codes are those of the weight itself: not rotated, not equalized. */
bool aq_export_has_plain_codes(const aq_store_tensor *stored);
/* The stored codes and parameters around a row: `part` is the part, `row` becomes the row in it. */
aq_status aq_export_codes_at(const exporting *x, size_t tensor, uint64_t *row, aq_store_record *part, aq_quant_layout *layout, aq_error *err);
/* One row's codes with their pairs (s, z), each for `width` consecutive inputs; s and z have room for the layout's pairs_per_row. */
typedef struct export_row {
    const uint8_t *codes;
    int bits;
    uint64_t width;
} export_row;
aq_status aq_export_row_at(const exporting *x, size_t tensor, uint64_t row, export_row *out, float *s, float *z, aq_error *err);
static inline int export_code(const export_row *row, uint64_t i) {
    uint64_t bit = i * (uint64_t)row->bits;
    return row->codes[bit / 8] >> bit % 8 & ((1 << row->bits) - 1);
}
/* Header of a safetensors file. */
aq_status aq_export_st_header(exporting *x, size_t first, size_t n, uint8_t **bytes, uint64_t *size, uint64_t *file_size, aq_error *err);
/* Writes the weights to a file that appears at once; in a folder to several with an index where they take more than a shard. */
aq_status aq_export_weights(exporting *x, const char *path, aq_error *err);
/* True while nobody cancelled; for aq_file_copy_while. */
bool aq_export_tick(void *context);

/* export_files.c */
/* Divides the tensors among files. */
aq_status aq_export_files_plan(exporting *x, aq_error *err);
/* Finishes files and begins new ones until the one that holds `tensor` is open. */
aq_status aq_export_files_reach(exporting *x, size_t tensor, aq_error *err);
/* Finishes the last file; writes the index of several. */
aq_status aq_export_files_finish(exporting *x, aq_error *err);
/* "model.safetensors" of one file; "model-00001-of-00003.safetensors" of several. aq_free; NULL: no memory. */
char *aq_export_file_path(const exporting *x, const char *weights, size_t shard);
/* The index beside files of this name. aq_free; NULL: no memory. */
char *aq_export_index_path(const char *weights);

/* export_folder.c */
aq_status aq_export_folder(exporting *x, aq_error *err);
/* Path of the weights below the root of a folder. */
void aq_export_weights_path(const exporting *x, char out[512]);

#endif
