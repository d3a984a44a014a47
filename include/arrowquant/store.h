/* ArrowQuant store: the Parquet V2 extended container (docs/format.md), written atomically and resumably, read back memory-mapped.
 *
 * A container is a folder: metadata.json, model-XXXXX-of-NNNNN.parquet (one row group per tensor; a tensor whose stored form
 * exceeds AQ_STORE_PART_BYTES takes several consecutive row groups, each a slab of rows), and copied side files.
 */
#ifndef ARROWQUANT_STORE_H
#define ARROWQUANT_STORE_H

#include <arrowquant/base.h>
#include <arrowquant/model.h>
#include <arrowquant/quant.h>
#include <arrowquant/time.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Largest `data` value of one row group; larger tensors are split by rows (raw tensors: by elements). Keeps pages below 2^31 and memory bounded: adding a
 * record takes up to twice its size on top of it. */
#define AQ_STORE_PART_BYTES (UINT64_C(64) << 20)

/* What was measured when a tensor was made. NaN = not measured (stored as null). */
/* The method of a kept bias that makes up for the mean error of its layer: it is not the source's. */
#define AQ_STORE_CORRECTED "corrected"

typedef struct aq_store_quality {
    double cosine;
    double sqnr_db; /* +infinity for an exact tensor is stored as null */
    double output_sqnr_db;
    const char *method;        /* "rtn", "search", "keep" … */
    const char *fallback_from; /* NULL, or what was tried first and why it was not kept, e.g. "int2: cosine 0.612 < 0.850" */
    const char
        *compared_with; /* NULL, or what gave the output more error, with its SQNR: "search 25.3 dB; gptq + hadamard 33.9 dB; bias uncorrected 32.1 dB" */
} aq_store_quality;

/* One tensor, or one part of one. Pointers are borrowed: by the writer for the call, from the reader until it is closed. */
typedef struct aq_store_record {
    const char *name;
    const char *dtype;      /* source dtype word: "BF16" */
    const char *quant_type; /* "int2" "int4" "int8" for codes; else the stored element type in lower case: "f32" "bf16" "i64" … */
    aq_shape shape;         /* of the whole tensor */
    bool quantized;
    aq_quant_spec spec; /* when quantized */
    /* Slab: rows [row_begin, row_begin + row_count) of the matrix view (raw tensors: of elements). Whole tensor: 0 and all. */
    uint64_t row_begin, row_count;
    const void *data; /* packed codes of the slab, or raw little-endian elements */
    uint64_t data_bytes;
    const void *params; /* stored parameters of the slab, layout of quant.h; NULL when raw */
    uint64_t params_bytes;
    aq_store_quality quality; /* of the whole tensor; the same in each part */
    /* Spatial and time-aware parts. The codes are those of W R / s (s: equalization_scales by column, R: Hadamard rotation of `hadamard_group` inputs,
     * applied after the division); aq_store_read_f32 gives back W. */
    const float *equalization_scales; /* [cols] or NULL */
    uint64_t n_equalization_scales;
    bool equalization_folded;         /* the operation before the layer already multiplies its output by s: aq_store_read_f32 gives W / s then */
    const float *folded_shift;        /* [cols] or NULL; with a folded equalization: that operation gives (x - m) s, and the layer's bias holds W m */
    uint32_t hadamard_group;          /* 0: not rotated */
    float smoothing_alpha;            /* of the statistics the activation parameters come from; 0: none */
    const aq_time_group *time_groups; /* activation parameters per time group, or NULL */
    size_t n_time_groups;
    const float *activation_stats[4]; /* mean, std, min, max per time group [n_activation_stats], or NULL */
    size_t n_activation_stats;
} aq_store_record;

/* ---- writing ---- */

typedef struct aq_store_writer aq_store_writer;

typedef struct aq_store_writer_options {
    const char *fingerprint; /* of program version, canonical options and input; a partial run with another one is refused */
    const char *config_json; /* canonical JSON of the configuration, stored in each file */
    aq_modality modality;
    bool is_diffusion_model;
    bool overwrite;                 /* replace an existing output when the new one is complete */
    bool make_parents;              /* create missing parent folders (--mkdir) */
    bool restart;                   /* discard the state of an interrupted run */
    bool no_verify;                 /* skip the re-read before the rename */
    bool (*keep_going)(void *user); /* NULL, or asked during the re-read: false ends it with AQ_ERR_INTERRUPTED, state kept */
    void *keep_going_user;
    uint64_t shard_bytes;     /* start a new file beyond this size; 0: 5 GB */
    uint64_t predicted_bytes; /* of the output: free space is checked before the start, and checkpoints are spaced by it */
    aq_log_fn log;
    void *log_user;
} aq_store_writer_options;

/* Creates (or adopts) the work folder `out_path`.partial-<pid> beside the target, takes its lock.
 * AQ_ERR_IO: target exists, parent missing, no permission, too little space, locked by a live run. AQ_ERR_USAGE: interrupted state of other options. */
AQ_API aq_status aq_store_writer_create(aq_store_writer **out, const char *out_path, const aq_store_writer_options *options, aq_error *err);
/* Records (parts count one each) that an interrupted run already made durable, in order; the caller continues with the next. */
AQ_API uint64_t aq_store_writer_n_done(const aq_store_writer *writer);
/* What the journal holds about the durable record `index`, so that a continued run reports it without computing it again: name, quant_type, quantized,
 * spec, row_begin, row_count and quality; data and params are NULL. Strings are borrowed from the writer. False past the end. */
AQ_API bool aq_store_writer_done(const aq_store_writer *writer, uint64_t index, aq_store_record *out);
/* Appends the next record as one row group. Call in canonical order from one thread at a time. */
AQ_API aq_status aq_store_writer_add(aq_store_writer *writer, const aq_store_record *record, aq_error *err);
/* Copies a side file to `relative_path` inside the output. */
AQ_API aq_status aq_store_writer_copy(aq_store_writer *writer, const char *relative_path, const char *source_path, aq_error *err);
/* Closes the files, writes metadata.json (`metadata_json`, an object, is completed with file sizes and SHA-256), re-reads and verifies everything,
 * renames into place and frees the writer. On failure the target is untouched and the work folder stays for resuming where that makes sense. */
AQ_API aq_status aq_store_writer_finish(aq_store_writer *writer, const char *metadata_json, aq_error *err);
/* Stops without a result and frees the writer. keep_state: the work folder stays for a later run when it holds anything durable, else it is removed.
 * True when it stays. */
AQ_API bool aq_store_writer_abort(aq_store_writer *writer, bool keep_state);

/* ---- sizes in advance ---- */

/* What is known of a tensor before it is written. */
typedef struct aq_store_predicted {
    const char *name;
    const aq_shape *shape;
    const aq_quant_spec *spec; /* NULL: raw */
    uint64_t data_bytes, params_bytes;
    uint64_t n_equalization_scales; /* 0: none */
    uint64_t n_folded_shift;        /* 0: none */
    uint64_t n_time_groups;         /* 0: none */
    uint64_t file_bytes;            /* about what the whole container will take: offsets in a large one are longer */
} aq_store_predicted;
/* Bytes of the tensor in a container, everything counted: values, page headers, its entries in the footer. A bound from above that a tensor without a
 * fallback's reason stays within, by at most 128 bytes a row group. */
AQ_API uint64_t aq_store_predict(const aq_store_predicted *tensor);
/* Bytes of the files beside their tensors: magic, schema, and the configuration of `config_bytes` as JSON. */
AQ_API uint64_t aq_store_predict_frame(uint64_t config_bytes);

/* ---- reading ---- */

typedef struct aq_store aq_store;

/* True when the path looks like a container (a folder with .parquet files, or a .parquet file) rather than a source model. Reads no content. */
AQ_API bool aq_store_is_container(const char *path);
/* Opens a container: V2 extended, base V2 or V1. Checks structure, schema and every small column (PQ01-PQ12); page CRCs of the codes are checked by
 * aq_store_verify. */
AQ_API aq_status aq_store_open(aq_store **out, const char *path, aq_error *err);
AQ_API void aq_store_close(aq_store *store);

/* Tensors in stored order, parts joined. */
AQ_API size_t aq_store_n_tensors(const aq_store *store);
AQ_API int64_t aq_store_find(const aq_store *store, const char *name);

typedef struct aq_store_tensor {
    const char *name, *dtype, *quant_type;
    aq_shape shape;
    uint64_t rows, cols; /* matrix view */
    uint64_t num_params;
    bool quantized;
    aq_quant_spec spec;     /* when quantized */
    aq_quant_layout layout; /* of the whole tensor */
    aq_dtype raw_dtype;     /* element type of the data when not quantized */
    aq_store_quality quality;
    uint64_t stored_bytes; /* bytes of its row groups in the file, everything counted */
    size_t n_parts;
    size_t file_index;
    const float *equalization_scales; /* these as in aq_store_record */
    uint64_t n_equalization_scales;
    bool equalization_folded;
    const float *folded_shift;
    uint32_t hadamard_group;
    float smoothing_alpha;
    const aq_time_group *time_groups;
    size_t n_time_groups;
    const float *activation_stats[4];
    size_t n_activation_stats;
} aq_store_tensor;
AQ_API const aq_store_tensor *aq_store_tensor_at(const aq_store *store, size_t index);
/* One part: rows, codes and parameters. The first use of a part compares its bytes with the hash stored beside them: AQ_ERR_FORMAT names file and tensor
 * when they are damaged. Packed codes of a V2 extended file are borrowed from the memory map without a copy. */
AQ_API aq_status aq_store_part(const aq_store *store, size_t index, size_t part, aq_store_record *out, aq_error *err);
/* Dequantizes (or converts) rows [row_begin, row_begin + n_rows) of the matrix view to F32. AQ_ERR_USAGE for a non-floating raw tensor. */
AQ_API aq_status aq_store_read_f32(const aq_store *store, size_t index, uint64_t row_begin, uint64_t n_rows, float *out, aq_error *err);
/* Tells the system that the tensor's pages of codes are no longer needed, so that resident memory stays bounded over a large container. */
AQ_API void aq_store_release(const aq_store *store, size_t index);
/* Expanded (s, z) pairs of the whole tensor [layout.n_pairs]. */
AQ_API aq_status aq_store_pairs(const aq_store *store, size_t index, float *scales, float *zero_points, aq_error *err);

AQ_API const char *aq_store_path(const aq_store *store);
AQ_API const char *aq_store_schema_version(const aq_store *store); /* "2.1", "2.0" (base), "1.0" */
AQ_API const char *aq_store_config_json(const aq_store *store);    /* "" when absent */
AQ_API const char *aq_store_metadata_json(const aq_store *store);  /* metadata.json as text, "" when absent */
AQ_API aq_modality aq_store_modality(const aq_store *store);
AQ_API uint64_t aq_store_size_bytes(const aq_store *store); /* bytes on disk of the Parquet files */
AQ_API size_t aq_store_n_files(const aq_store *store);
AQ_API const char *aq_store_file(const aq_store *store, size_t file_index);

/* Side files (everything in metadata.json's list that is not Parquet): relative and absolute path. */
AQ_API size_t aq_store_n_side_files(const aq_store *store);
AQ_API const char *aq_store_side_file(const aq_store *store, size_t index, const char **absolute_path);

/* Opens a container of any version as the source of a run: tensors without codes as they are, codes as the F32 values that they stand for, with a warning that
 * these carry the error of their codes. */
AQ_API aq_status aq_store_open_model(aq_model **out, const char *path, const aq_model_options *options, aq_error *err);

/* Full integrity check: SHA-256 of files against metadata.json, page CRCs, the hash of each tensor. Problems are passed to `report`, one sentence each,
 * naming the file and tensor. AQ_ERR_QUALITY when there was any. */
AQ_API aq_status aq_store_verify(const aq_store *store, void (*report)(void *user, const char *problem), void *user, aq_error *err);
/* The same, asking keep_going (may be NULL) about every 100 ms: false ends it with AQ_ERR_INTERRUPTED. */
AQ_API aq_status aq_store_verify_while(const aq_store *store, void (*report)(void *user, const char *problem), void *user, bool (*keep_going)(void *user),
                                       void *keep_going_user, aq_error *err);

/* ---- safetensors output (exports) ---- */

typedef struct aq_st_writer aq_st_writer;
typedef struct aq_st_entry {
    const char *name;
    const char *dtype; /* safetensors word */
    aq_shape shape;
    uint64_t size_bytes;
} aq_st_entry;
/* Starts a file whose entries are known; data follow in the same order by aq_st_writer_write. Written beside the target and renamed at the end.
 * `metadata_json`: string map or NULL. */
AQ_API aq_status aq_st_writer_create(aq_st_writer **out, const char *path, const aq_st_entry *entries, size_t n_entries, const char *metadata_json,
                                     bool overwrite, aq_error *err);
AQ_API aq_status aq_st_writer_write(aq_st_writer *writer, const void *data, uint64_t size_bytes, aq_error *err);
AQ_API aq_status aq_st_writer_finish(aq_st_writer *writer, aq_error *err); /* frees */
AQ_API void aq_st_writer_abort(aq_st_writer *writer);

#ifdef __cplusplus
}
#endif
#endif
