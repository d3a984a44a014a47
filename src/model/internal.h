/* The model's inside: what the files of this room share. */
#ifndef AQ_MODEL_INTERNAL_H
#define AQ_MODEL_INTERNAL_H

#include <arrowquant/model.h>
#include <jansson.h>

#include "base/file.h"
#include "model/names.h"
#include "model/safetensors.h"

/* What a file looked like at open: a later read of something else is "changed during read" (ST18). */
typedef struct aq_file_stamp {
    uint64_t device, inode, size;
    int64_t mtime_ns;
} aq_file_stamp;

typedef struct aq_weights_file {
    char *path;
    aq_file_map map; /* its descriptor is closed: ten thousand shards would exhaust them */
    aq_file_stamp stamp;
    uint64_t header_bytes; /* with the 8 bytes of its length */
    char header_hash[33];
    aq_st_header header; /* its tensors move to the model's array */
} aq_weights_file;

typedef struct aq_side_file {
    char *relative, *absolute;
} aq_side_file;

typedef struct aq_lora aq_lora;

struct aq_model {
    char *path, *root, *weights_dir, *weights_name, *component, *class_name;
    const char *format;
    char index_hash[33]; /* of the index file, "" without one */
    aq_modality modality;
    char modality_source[256];
    aq_weights_file *files;
    size_t n_files, files_capacity;
    aq_tensor_info *tensors;
    size_t n_tensors;
    uint64_t total_bytes;
    aq_name_table names;
    char **warnings;
    size_t n_warnings, warnings_capacity;
    aq_side_file *side_files;
    size_t n_side_files, side_files_capacity;
    json_t *config;         /* config.json of the weights, NULL without one */
    json_t *model_index;    /* model_index.json of a diffusers folder, NULL without one */
    aq_lora *lora;          /* NULL without adapters */
    aq_model_source source; /* tensor is NULL unless another room reads the values */
};

/* Sums, names and doubles of the tensors in the model's array. */
aq_status aq_model_index_tensors(aq_model *model, aq_error *err);
/* Tensors whose values are not the bytes of the file, and what becomes of those that are kept. */
aq_status aq_model_mark_computed(aq_model *model, aq_error *err);

/* Adds `FILE: text` to the warnings; the file, which may be NULL, is escaped. */
aq_status aq_model_warn(aq_model *model, aq_error *err, const char *file, const char *format, ...) __attribute__((format(printf, 4, 5)));
/* An array with room for one more element, doubled as needed; NULL: no memory, the old one stays. */
void *aq_grow(void *items, size_t *capacity, size_t n, size_t size);

/* file.c: opens, checks and maps one safetensors file, which becomes the model's last one. Takes over `path`. */
aq_status aq_model_add_file(aq_model *model, char *path, const aq_model_options *options, aq_error *err);
/* A file that another room reads: its path, and what it looked like. */
aq_status aq_model_add_stamp(aq_model *model, const char *path, aq_error *err);
void aq_weights_file_free(aq_weights_file *file);
/* Opens the file again, which must still be the one that was opened first; closed by aq_weights_file_done. */
aq_status aq_weights_file_reopen(int *fd, const aq_weights_file *file, aq_error *err);
void aq_weights_file_done(int fd);
/* The same around one read. */
aq_status aq_weights_file_read(const aq_weights_file *file, uint64_t offset, void *out, uint64_t size, aq_error *err);

/* Reads a whole file under a limit, which the refusal names. */
aq_status aq_read_limited(char **out, uint64_t *size, const char *path, uint64_t limit, const char *limit_name, aq_error *err);

/* Source of a text that is parsed while it is read (see scan.h): reads a file from `begin` and hashes each piece before the parser changes it. */
typedef struct aq_text_reader {
    int fd;
    uint64_t begin;
    const char *path;
    char *hash; /* [33], starts as "" */
} aq_text_reader;
aq_status aq_text_read(void *context, uint64_t offset, char *to, uint64_t n, aq_error *err);

/* What is not read here, and which command is for it. */
aq_status aq_fail_pickle(aq_error *err, const char *path);
aq_status aq_fail_gguf(aq_error *err, const char *path);
aq_status aq_fail_container(aq_error *err, const char *path);

/* index.c: reads a shard index, opens its shards and compares both. */
aq_status aq_index_open(aq_model *model, const char *index_path, const aq_model_options *options, aq_error *err);
/* True for one plain file name: no folder, drive, device name or anything else that a file system would bend (IX01). */
bool aq_is_plain_file_name(const char *name);

/* weights.c: chooses and opens the weights of a folder. */
aq_status aq_weights_open(aq_model *model, const char *dir, bool plain_folder, const aq_model_options *options, aq_error *err);
/* By its name: a file that holds weights, in whatever format. */
bool aq_is_weights_name(const char *name);
/* By its name: a format that executes code when it is loaded, and is never read. */
bool aq_is_pickle_name(const char *name);

/* folder.c: a diffusers, transformers-style or plain folder. */
aq_status aq_folder_open(aq_model *model, const char *path, const aq_model_options *options, aq_error *err);
/* Loads a JSON object from DIR/NAME; *out stays NULL when there is none. */
aq_status aq_config_load(json_t **out, const char *dir, const char *name, const aq_model_options *options, aq_error *err);
/* The configuration beside the weights, the class it names, and whether it says that they are quantized already. */
aq_status aq_folder_config(aq_model *model, const char *dir, const aq_model_options *options, aq_error *err);

/* Adds a file that goes with the model. */
aq_status aq_model_add_side_file(aq_model *model, const char *relative, const char *absolute, aq_error *err);

/* reduced.c: refuses quantized weights by kind and pairs fp8 weights with their scales (IX09). */
aq_status aq_reduced_check(aq_model *model, aq_error *err);
/* lora.c: opens the adapters that the options name and finds their layers. */
aq_status aq_lora_open(aq_model *model, const aq_model_options *options, aq_error *err);
void aq_lora_close(aq_lora *lora);
/* Adds the changes of all adapters to elements [begin, begin + count) of a weight. */
aq_status aq_lora_apply(const aq_model *model, size_t index, uint64_t begin, uint64_t count, float *out, aq_error *err);
const aq_model *aq_lora_model(const aq_model *model, size_t index);
/* roles.c: the role of each tensor whose role is not AQ_ROLE_SCALE. */
void aq_roles_assign(aq_model *model);
/* modality.c */
aq_status aq_modality_detect(aq_model *model, const aq_model_options *options, aq_error *err);

#endif
