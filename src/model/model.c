/* Opening a model: which kind of path it is, its files, the tensors of all of them in one list, and what is known about them. */
#include "model/internal.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>

#include "base/error.h"
#include "base/mem.h"

void aq_model_limits_init(aq_model_limits *limits) {
    *limits = (aq_model_limits){.header_bytes = 100000000,
                                .n_tensors = 1000000,
                                .name_bytes = 1024,
                                .index_bytes = UINT64_C(64) << 20,
                                .config_bytes = UINT64_C(16) << 20,
                                .n_shards = 10000,
                                .json_depth = 64};
}

void aq_model_options_init(aq_model_options *options) {
    memset(options, 0, sizeof *options);
    aq_model_limits_init(&options->limits);
}

void *aq_grow(void *items, size_t *capacity, size_t n, size_t size) {
    if (n < *capacity) return items;
    size_t larger = *capacity ? *capacity * 2 : 16;
    void *p = aq_realloc(items, larger, size);
    if (p) *capacity = larger;
    return p;
}

aq_status aq_model_warn(aq_model *model, aq_error *err, const char *file, const char *format, ...) {
    char text[2048], escaped[512];
    va_list args;
    int n = file ? snprintf(text, sizeof text, "%s: ", aq_escape(escaped, sizeof escaped, file, strlen(file))) : 0;
    va_start(args, format);
    vsnprintf(text + n, sizeof text - (size_t)n, format, args);
    va_end(args);
    char **grown = aq_grow(model->warnings, &model->warnings_capacity, model->n_warnings, sizeof *grown);
    if (grown) model->warnings = grown;
    if (!grown || !(grown[model->n_warnings] = aq_strdup(text))) return aq_fail_memory(err, sizeof text, "a warning");
    model->n_warnings++;
    return AQ_OK;
}

aq_status aq_read_limited(char **out, uint64_t *size, const char *path, uint64_t limit, const char *limit_name, aq_error *err) {
    struct stat st;
    if (stat(path, &st) == 0 && S_ISREG(st.st_mode) && (uint64_t)st.st_size > limit) {
        char count[32];
        return aq_fail_limit(err, path, NULL, limit_name, limit, "is %s bytes long", aq_format_count(count, (uint64_t)st.st_size));
    }
    return aq_file_read(out, size, path, limit, err);
}

aq_status aq_fail_pickle(aq_error *err, const char *path) {
    aq_fail_at(err, AQ_ERR_FORMAT, path, NULL, "pickle is never read; convert first");
    aq_hint(err, "pickle files (.bin, .pt, .ckpt) can run code when loaded: get the .safetensors files, or convert them on a machine that you can lose");
    return AQ_ERR_FORMAT;
}

aq_status aq_fail_gguf(aq_error *err, const char *path) {
    aq_fail_at(err, AQ_ERR_FORMAT, path, NULL, "no .safetensors weights in this folder, only GGUF files");
    aq_hint(err, "give the .gguf file itself");
    return AQ_ERR_FORMAT;
}

aq_status aq_fail_container(aq_error *err, const char *path) {
    aq_fail_at(err, AQ_ERR_FORMAT, path, NULL, "is an ArrowQuant container (Parquet), not a source model");
    aq_hint(err, "`arrowquant inspect`, `quantize`, `plan`, `verify`, `diff` and `export` read it");
    return AQ_ERR_FORMAT;
}

/* ---- the tensors of all files ---- */

static aq_status join_tensors(aq_model *model, const aq_model_options *options, aq_error *err) {
    size_t n = 0;
    for (size_t f = 0; f < model->n_files; f++) n += model->files[f].header.n_tensors;
    if (n > options->limits.n_tensors) return aq_fail_limit(err, model->path, NULL, "n_tensors", options->limits.n_tensors, "%zu tensors", n);
    if (model->n_files == 1) {
        model->tensors = model->files[0].header.tensors;
        model->files[0].header.tensors = NULL;
    } else if (!(model->tensors = aq_calloc(n, sizeof *model->tensors))) {
        return aq_fail_memory(err, n * sizeof *model->tensors, "the list of tensors");
    }
    for (size_t f = 0; f < model->n_files; f++) {
        aq_st_header *header = &model->files[f].header;
        if (header->tensors) memcpy(model->tensors + model->n_tensors, header->tensors, header->n_tensors * sizeof *header->tensors);
        aq_free(header->tensors);
        header->tensors = NULL;
        model->n_tensors += header->n_tensors;
    }
    return aq_model_index_tensors(model, err);
}

aq_status aq_model_index_tensors(aq_model *model, aq_error *err) {
    aq_name_list twice = {0};
    size_t n = model->n_tensors;
    aq_status status = aq_name_table_init(&model->names, model->tensors, sizeof *model->tensors, n, err);
    for (size_t i = 0; status == AQ_OK && i < n; i++) {
        model->total_bytes += model->tensors[i].size_bytes; /* sizes of existing files: no overflow */
        if (aq_name_table_add(&model->names, i) >= 0) aq_name_list_add(&twice, model->tensors[i].name);
    }
    if (twice.n > 0) status = aq_fail_at(err, AQ_ERR_FORMAT, model->path, NULL, "%zu tensors are in two files: %s", twice.n, aq_name_list_text(&twice));
    return status;
}

/* ---- kinds of paths ---- */

/* A single file stands for a model of the folder only under the names that diffusers and transformers load; then the config beside it is its own. */
static bool has_standard_name(const char *name) { return strncmp(name, "diffusion_pytorch_model", 23) == 0 || strcmp(name, "model.safetensors") == 0; }

static aq_status open_file_path(aq_model *model, const aq_model_options *options, aq_error *err) {
    const char *path = model->path;
    if (aq_is_pickle_name(path)) return aq_fail_pickle(err, path);
    if (aq_text_ends_with(path, ".parquet")) return aq_fail_container(err, path);
    model->root = aq_path_dirname(path);
    char *name = aq_path_basename(path);
    if (!model->root || !name || !(model->weights_dir = aq_strdup(model->root))) {
        aq_free(name);
        return aq_fail_memory(err, strlen(path), "a path");
    }
    model->weights_name = name;
    bool is_index = aq_text_ends_with(name, ".json");
    if (is_index && !strstr(name, ".index.")) {
        aq_fail_at(err, AQ_ERR_FORMAT, path, NULL, "is neither a .safetensors file nor an .index.json");
        aq_hint(err, "give the folder, the weights file or its index");
        return AQ_ERR_FORMAT;
    }
    model->format = is_index ? "sharded safetensors" : aq_text_ends_with(name, ".gguf") ? "gguf" : "safetensors";
    aq_status status = AQ_OK;
    if (is_index || has_standard_name(name)) status = aq_folder_config(model, model->root, options, err);
    if (status == AQ_OK && is_index) {
        status = aq_index_open(model, path, options, err);
        char *suffix = strstr(name, ".safetensors");
        if (suffix) suffix[strlen(".safetensors")] = 0;
    } else if (status == AQ_OK) {
        char *copy = aq_strdup(path);
        status = copy ? aq_model_add_file(model, copy, options, err) : aq_fail_memory(err, strlen(path), "a path");
    }
    return status;
}

static aq_status open_path(aq_model *model, const aq_model_options *options, aq_error *err) {
    struct stat st;
    if (!model->path || !model->component) return aq_fail_memory(err, 4096, "a path");
    if (stat(model->path, &st) != 0) {
        int e = errno;
        if (e == ELOOP) return aq_fail_at(err, AQ_ERR_FORMAT, model->path, NULL, "is a loop of symbolic links");
        if (e != ENOENT && e != ENOTDIR) return aq_fail_io(err, e, model->path, "cannot open");
        char escaped[512];
        aq_fail(err, AQ_ERR_IO, "Model not found: %s", aq_escape(escaped, sizeof escaped, model->path, strlen(model->path)));
        if (err) {
            err->os_errno = e;
            snprintf(err->file, sizeof err->file, "%s", escaped);
        }
        aq_hint(err, "give a file or folder that is there; names of online models are not looked up");
        return AQ_ERR_IO;
    }
    if (!S_ISDIR(st.st_mode)) return open_file_path(model, options, err);
    model->root = aq_strdup(model->path);
    model->weights_dir = aq_strdup(model->path);
    if (!model->root || !model->weights_dir) return aq_fail_memory(err, strlen(model->path), "a path");
    return aq_folder_open(model, model->path, options, err);
}

aq_status aq_model_mark_computed(aq_model *model, aq_error *err) {
    size_t n_blocks = 0, first = 0;
    for (size_t i = model->n_tensors; i-- > 0;) {
        aq_tensor_info *t = &model->tensors[i];
        bool fp8 = t->dtype == AQ_F8_E4M3 || t->dtype == AQ_F8_E5M2;
        t->is_computed |= t->scale_index >= 0 || t->block_type != 0 || t->adapter_index >= 0;
        t->kept_dtype = t->adapter_index >= 0 ? AQ_F32 : fp8 && t->is_computed ? AQ_BF16 : t->dtype;
        if (t->block_type != 0) n_blocks++, first = i;
    }
    if (n_blocks == 0) return AQ_OK;
    return aq_model_warn(model, err, NULL,
                         "%zu tensors are quantized already, as the first of them in %s: their values carry that error, which is not measured here", n_blocks,
                         model->tensors[first].dtype_name);
}

aq_status aq_model_open(aq_model **out, const char *path, const aq_model_options *options, aq_error *err) {
    aq_model_options defaults;
    *out = NULL;
    aq_model_options_init(&defaults);
    if (!options) options = &defaults;
    if (!path || !*path) return aq_fail(err, AQ_ERR_IO, "Model not found: the path is empty");
    aq_model *model = aq_calloc(1, sizeof *model);
    if (!model) return aq_fail_memory(err, sizeof *model, "a model");
    model->path = aq_strdup(path);
    model->component = aq_strdup("");
    model->format = "";
    aq_status status = open_path(model, options, err);
    if (status == AQ_OK) status = join_tensors(model, options, err);
    if (status == AQ_OK) status = aq_reduced_check(model, err);
    if (status == AQ_OK) status = aq_lora_open(model, options, err);
    if (status == AQ_OK) status = aq_model_mark_computed(model, err);
    if (status == AQ_OK) aq_roles_assign(model);
    if (status == AQ_OK) status = aq_modality_detect(model, options, err);
    if (status == AQ_OK)
        *out = model;
    else
        aq_model_close(model);
    return status;
}

void aq_model_close(aq_model *model) {
    if (!model) return;
    for (size_t i = 0; i < model->n_files; i++) aq_weights_file_free(&model->files[i]);
    for (size_t i = 0; i < model->n_warnings; i++) aq_free(model->warnings[i]);
    for (size_t i = 0; i < model->n_side_files; i++) {
        aq_free(model->side_files[i].relative);
        aq_free(model->side_files[i].absolute);
    }
    aq_name_table_free(&model->names);
    aq_free(model->files);
    aq_free(model->tensors);
    aq_free(model->warnings);
    aq_free(model->side_files);
    aq_free(model->path);
    aq_free(model->root);
    aq_free(model->weights_dir);
    aq_free(model->weights_name);
    aq_free(model->component);
    aq_free(model->class_name);
    json_decref(model->config);
    json_decref(model->model_index);
    aq_lora_close(model->lora);
    if (model->source.close) model->source.close(model->source.user);
    aq_free(model);
}

/* ---- what is known ---- */

size_t aq_model_n_tensors(const aq_model *model) { return model->n_tensors; }
const aq_tensor_info *aq_model_tensor(const aq_model *model, size_t index) { return index < model->n_tensors ? &model->tensors[index] : NULL; }
int64_t aq_model_find(const aq_model *model, const char *name) { return aq_name_table_find(&model->names, name); }

int64_t aq_model_bias_of(const aq_model *model, size_t index) {
    static const char ending[] = ".weight";
    const aq_tensor_info *w = aq_model_tensor(model, index);
    size_t length = strlen(w->name), stem = length - (sizeof ending - 1);
    if (length < sizeof ending || strcmp(w->name + stem, ending) != 0) return -1;
    char *name = aq_alloc(length + 1);
    if (!name) return -1;
    snprintf(name, length + 1, "%.*s.bias", (int)stem, w->name);
    int64_t at = aq_model_find(model, name);
    aq_free(name);
    uint64_t rows, cols;
    aq_shape_matrix(&w->shape, &rows, &cols);
    const aq_tensor_info *b = at >= 0 ? aq_model_tensor(model, (size_t)at) : NULL;
    return b && b->shape.rank == 1 && b->count == rows && rows > 0 && aq_dtype_is_float(b->dtype) ? at : -1;
}

size_t aq_model_n_files(const aq_model *model) { return model->n_files; }
const char *aq_model_file(const aq_model *model, size_t file_index) { return file_index < model->n_files ? model->files[file_index].path : NULL; }
uint64_t aq_model_total_bytes(const aq_model *model) { return model->total_bytes; }
const char *aq_model_path(const aq_model *model) { return model->path; }
const char *aq_model_root(const aq_model *model) { return model->root; }
const char *aq_model_component(const aq_model *model) { return model->component; }
const char *aq_model_weights_dir(const aq_model *model) { return model->weights_dir; }
const char *aq_model_weights_name(const aq_model *model) { return model->weights_name; }
const char *aq_model_format(const aq_model *model) { return model->format; }
const char *aq_model_class(const aq_model *model) { return model->class_name ? model->class_name : ""; }
aq_modality aq_model_modality(const aq_model *model) { return model->modality; }
const char *aq_model_modality_source(const aq_model *model) { return model->modality_source; }
size_t aq_model_n_warnings(const aq_model *model) { return model->n_warnings; }
const char *aq_model_warning(const aq_model *model, size_t index) { return index < model->n_warnings ? model->warnings[index] : NULL; }
size_t aq_model_n_side_files(const aq_model *model) { return model->n_side_files; }

const char *aq_model_side_file(const aq_model *model, size_t index, const char **absolute_path) {
    if (index >= model->n_side_files) return NULL;
    if (absolute_path) *absolute_path = model->side_files[index].absolute;
    return model->side_files[index].relative;
}

bool aq_model_metadata(const aq_model *model, size_t index, const char **key, const char **value) {
    if (model->n_files == 0 || index >= model->files[0].header.n_metadata) return false;
    *key = model->files[0].header.metadata[index].name;
    *value = model->files[0].header.metadata[index].value;
    return true;
}

void aq_model_fingerprint(const aq_model *model, char out[33]) {
    char state[33 + 512], hash[33];
    aq_xxh3_hex(model->index_hash, strlen(model->index_hash), hash);
    for (size_t i = 0; i < model->n_files; i++) { /* a chain: each file's line with the hash of those before */
        const aq_weights_file *file = &model->files[i];
        const char *slash = strrchr(file->path, '/');
        int n = snprintf(state, sizeof state, "%s %s %llu %lld %.255s", hash, file->header_hash, (unsigned long long)file->stamp.size,
                         (long long)file->stamp.mtime_ns, slash ? slash + 1 : file->path);
        aq_xxh3_hex(state, n > 0 ? (uint64_t)n : 0, hash);
    }
    for (size_t i = 0; i < aq_model_n_adapters(model); i++) {
        char adapter[33];
        aq_model_fingerprint(aq_lora_model(model, i), adapter);
        uint64_t strength;
        memcpy(&strength, &aq_model_adapter(model, i)->strength, sizeof strength);
        int n = snprintf(state, sizeof state, "%s lora %s %llx", hash, adapter, (unsigned long long)strength);
        aq_xxh3_hex(state, n > 0 ? (uint64_t)n : 0, hash);
    }
    memcpy(out, hash, sizeof hash);
}
