/* ArrowQuant model: reading models.
 *
 * A model is a list of named tensors in memory-mapped safetensors files or a GGUF file, in source order (shards by name, then by offset in the file), the
 * JSON files beside them, a modality, and for each tensor the decision whether it is a layer to quantize and why not.
 *
 * Accepted paths: a .safetensors file; a .gguf file; an *.index.json; a diffusers folder (model_index.json); a component or transformers-style folder
 * (config.json + *.safetensors or index); a plain folder with metadata.json and safetensors files.
 * A Parquet model folder is opened as a model by aq_store_open_model (store.h); aq_model_open refuses it with a hint.
 *
 * A model that is open does not change: its functions may be called from several threads at once.
 * All files are checked whole at open (ST01-ST17, IX01-IX10 of the design); ST18 by aq_model_check_unchanged at the end of a run.
 */
#ifndef ARROWQUANT_MODEL_H
#define ARROWQUANT_MODEL_H

#include <arrowquant/base.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef enum aq_modality { AQ_MODALITY_UNKNOWN, AQ_MODALITY_TEXT, AQ_MODALITY_CODE, AQ_MODALITY_IMAGE, AQ_MODALITY_AUDIO } aq_modality;
AQ_API const char *aq_modality_name(aq_modality modality);  /* "text" …; "unknown" */
AQ_API aq_modality aq_modality_from_name(const char *name); /* AQ_MODALITY_UNKNOWN when it is none of the four */

typedef struct aq_model aq_model;

/* Limits on untrusted input (`--limit name=value`). aq_model_limits_init gives the defaults (docs/models.md). */
typedef struct aq_model_limits {
    uint64_t header_bytes; /* safetensors header: 100,000,000 */
    uint64_t n_tensors;    /* 1,000,000 */
    uint64_t name_bytes;   /* 1,024 */
    uint64_t index_bytes;  /* 64 MiB */
    uint64_t config_bytes; /* 16 MiB */
    uint64_t n_shards;     /* 10,000 */
    uint32_t json_depth;   /* 64 */
} aq_model_limits;
AQ_API void aq_model_limits_init(aq_model_limits *limits);

typedef struct aq_model_options {
    aq_model_limits limits;
    const char *component;   /* NULL: the denoiser (transformer, else unet); or a folder name of model_index.json. */
    const char *variant;     /* NULL, or "fp16" … or a file name: which weights when there are several (IX07) */
    bool no_follow_symlinks; /* refuse shards that are links (IX02) */
    bool skip_unknown_dtype; /* carry tensors of unknown dtype verbatim instead of refusing (ST09) */
    aq_modality modality;    /* AQ_MODALITY_UNKNOWN: detect */
    bool require_modality;   /* AQ_ERR_FORMAT when it cannot be told and is not given */
    /* Adapters "FILE" or "FILE:STRENGTH" (LoRA; a .safetensors file, or a folder that PEFT wrote), merged in F32 by aq_model_read_f32. A key that matches no
     * layer is AQ_ERR_FORMAT and lists them. */
    const char *const *lora;
    size_t n_lora;
} aq_model_options;
AQ_API void aq_model_options_init(aq_model_options *options);

/* Why a tensor is quantized or kept. */
typedef enum aq_role {
    AQ_ROLE_LAYER,      /* weight of a linear or convolution layer: quantized */
    AQ_ROLE_KEEP_DTYPE, /* not floating */
    AQ_ROLE_KEEP_RANK,  /* fewer than two dimensions: biases, norms, scalars */
    AQ_ROLE_KEEP_SMALL, /* fewer than 4096 elements */
    AQ_ROLE_KEEP_NAME,  /* not *.weight */
    AQ_ROLE_KEEP_EMBED, /* token, class, position or time embedding */
    AQ_ROLE_KEEP_NORM,  /* normalization */
    AQ_ROLE_KEEP_EDGE,  /* first or last projection */
    AQ_ROLE_SCALE       /* scale of an fp8 weight (or what goes with it: input scales, the scaled_fp8 mark); consumed with it, not stored on its own */
} aq_role;
/* The built-in rule, from name, dtype, shape and count of a tensor alone. */
typedef struct aq_tensor_info aq_tensor_info;
AQ_API aq_role aq_role_of(const aq_tensor_info *tensor);
AQ_API const char *aq_role_reason(aq_role role); /* one phrase for a table, e.g. "time, position or class embedding" */

/* One tensor. Strings and shape live as long as the model. */
struct aq_tensor_info {
    const char *name;       /* as in the file: data, never a path; escape before printing (aq_escape) */
    const char *dtype_name; /* the file's own word */
    aq_dtype dtype;
    aq_shape shape;
    uint64_t count;      /* elements */
    uint64_t size_bytes; /* bytes in the file */
    uint32_t file_index;
    uint64_t offset;       /* absolute, in that file */
    aq_role role;          /* by the built-in rule; patterns are applied by the pipeline */
    int64_t scale_index;   /* fp8 with a scale: index of the scale tensor, else -1 */
    uint32_t block_type;   /* GGUF blocks: their type number, dtype is AQ_F32 and dtype_name the type's; 0: plain elements */
    bool is_computed;      /* the values are not the bytes of the file: fp8 with a scale, GGUF blocks, merged adapters. Only aq_model_read_f32 gives them */
    int64_t adapter_index; /* first change that an adapter makes of it (model room), else -1 */
    aq_dtype kept_dtype;   /* element type that holds the values of a kept tensor: BF16 of scaled fp8, F32 of blocks and merged weights, else dtype */
};

/* Opens and checks a model. `*out` is freed by aq_model_close. options may be NULL.
 * AQ_ERR_IO (path missing, permission), AQ_ERR_FORMAT (refused), AQ_ERR_USAGE (ambiguous variant or component). */
AQ_API aq_status aq_model_open(aq_model **out, const char *path, const aq_model_options *options, aq_error *err);
AQ_API void aq_model_close(aq_model *model);

/* A model whose values another room reads: the container as a source. Functions take `user` and an index of a tensor. */
typedef struct aq_model_source {
    void *user;
    const char *format;                                                                /* "parquet" */
    const char *weights_folder, *weights_name;                                         /* below the root, as the model was before: "transformer"; "" */
    const char *component, *class_name;                                                /* "" when unknown */
    aq_modality modality;                                                              /* that it names itself; AQ_MODALITY_UNKNOWN: look for it */
    size_t n_tensors, n_files, n_side_files, n_coded;                                  /* coded: tensors whose values stand for codes, which the user is told */
    aq_status (*tensor)(void *user, size_t index, aq_tensor_info *out, aq_error *err); /* all but the role; strings live as long as `user` */
    aq_status (*read_f32)(void *user, size_t index, uint64_t begin, uint64_t count, float *out, aq_error *err);
    const void *(*data)(void *user, size_t index); /* of a tensor that is not computed; not NULL */
    void (*release)(void *user, size_t index);
    const char *(*file)(void *user, size_t index);
    const char *(*side_file)(void *user, size_t index, const char **absolute_path);
    void (*close)(void *user);
} aq_model_source;
/* Takes over source->user, in case of failure too. A path of a folder is the model's root, else the folder that holds the file. */
AQ_API aq_status aq_model_open_from(aq_model **out, const char *path, const aq_model_source *source, const aq_model_options *options, aq_error *err);

AQ_API size_t aq_model_n_tensors(const aq_model *model);
AQ_API const aq_tensor_info *aq_model_tensor(const aq_model *model, size_t index);
/* Index of a tensor by name, -1 when there is none. */
AQ_API int64_t aq_model_find(const aq_model *model, const char *name);
/* The vector of floats that is added to the outputs of weight `index`: "X.bias" of "X.weight" with one value per row; -1 when there is none. */
AQ_API int64_t aq_model_bias_of(const aq_model *model, size_t index);

/* Adapters that are merged into the values. */
typedef struct aq_adapter_info {
    const char *path;
    double strength;
    size_t n_layers; /* that it changes */
} aq_adapter_info;
AQ_API size_t aq_model_n_adapters(const aq_model *model);
AQ_API const aq_adapter_info *aq_model_adapter(const aq_model *model, size_t index);

AQ_API size_t aq_model_n_files(const aq_model *model);
AQ_API const char *aq_model_file(const aq_model *model, size_t file_index); /* path */
AQ_API uint64_t aq_model_total_bytes(const aq_model *model);                /* of all tensors */

AQ_API const char *aq_model_path(const aq_model *model);         /* as given to open */
AQ_API const char *aq_model_root(const aq_model *model);         /* folder that holds it all: the diffusers root, or the weights' folder */
AQ_API const char *aq_model_component(const aq_model *model);    /* "transformer" …, "" outside a diffusers folder */
AQ_API const char *aq_model_weights_dir(const aq_model *model);  /* folder of the weights files */
AQ_API const char *aq_model_weights_name(const aq_model *model); /* base name without shard number: "diffusion_pytorch_model.safetensors" */
AQ_API const char *
aq_model_format(const aq_model *model); /* "safetensors", "gguf", "sharded safetensors", "diffusers", "diffusers component", "transformers", "folder" */
AQ_API const char *aq_model_class(const aq_model *model); /* class or architecture of the config, "" when unknown */
AQ_API aq_modality aq_model_modality(const aq_model *model);
AQ_API const char *aq_model_modality_source(const aq_model *model); /* where it was read: "metadata.json", "config.json _class_name", "option" … */
/* Warnings found while reading (IX05, ST11, …), one sentence each. */
AQ_API size_t aq_model_n_warnings(const aq_model *model);
AQ_API const char *aq_model_warning(const aq_model *model, size_t index);
/* __metadata__ of the first file: i-th key and value; false past the end. */
AQ_API bool aq_model_metadata(const aq_model *model, size_t index, const char **key, const char **value);

/* Files to carry over to an output folder (configs, scheduler, tokenizer, other components): path relative to the root, and path to open.
 * Not among them: other weights beside the chosen ones, hidden files, metadata.json (an output has its own). NULL past the end. */
AQ_API size_t aq_model_n_side_files(const aq_model *model);
AQ_API const char *aq_model_side_file(const aq_model *model, size_t index, const char **absolute_path);

/* AQ_ERR_FORMAT lists names that are equal after case folding: for writers to targets that ignore case (IX06). AQ_OK when there are none. */
AQ_API aq_status aq_model_case_clash(const aq_model *model, aq_error *err);

/* Bytes of one tensor, borrowed from the map, valid until aq_model_close. Unaligned. A file that shrinks meanwhile makes the access a SIGBUS;
 * aq_model_read_f32 and aq_model_read_bytes report it as an error instead. */
AQ_API const void *aq_model_data(const aq_model *model, size_t index);
/* Copies bytes [begin, begin + size) of a tensor as they are in the file. AQ_ERR_USAGE when the range is outside, AQ_ERR_FORMAT "changed during read". */
AQ_API aq_status aq_model_read_bytes(const aq_model *model, size_t index, uint64_t begin, uint64_t size, void *out, aq_error *err);
/* Converts elements [begin, begin + count) of a floating tensor to F32; fp8 weights are multiplied by their scale. F64 is rounded to nearest.
 * Reads the file (pread), so resident memory does not grow. AQ_ERR_USAGE when the tensor is not floating or the range is outside,
 * AQ_ERR_FORMAT "changed during read" when the file is not the one that was opened. */
AQ_API aq_status aq_model_read_f32(const aq_model *model, size_t index, uint64_t begin, uint64_t count, float *out, aq_error *err);
/* Tells the system that the tensor's pages, touched through aq_model_data, are no longer needed, so that resident memory stays bounded. */
AQ_API void aq_model_release(const aq_model *model, size_t index);

/* Size, modification time and header of each file are still those seen at open; AQ_ERR_FORMAT "changed during read" otherwise (ST18). */
AQ_API aq_status aq_model_check_unchanged(const aq_model *model, aq_error *err);
/* XXH3-128 over names, headers, sizes and modification times of all input files, adapters with their strengths included: the run's fingerprint of its input. 32
 * hex digits + NUL. */
AQ_API void aq_model_fingerprint(const aq_model *model, char out[33]);

#ifdef __cplusplus
}
#endif
#endif
