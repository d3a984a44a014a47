/* Model folders: diffusers (model_index.json and one folder per component), transformers-style (config.json beside the weights), plain.
 *
 * Also which other files belong to the model, so that an output folder can be complete: configs, tokenizer, scheduler, the other components.
 */
#include <stdio.h>
#include <string.h>

#include "base/error.h"
#include "base/json.h"
#include "base/mem.h"
#include "model/internal.h"

enum { MAX_SIDE_FILES = 100000, MAX_SIDE_DEPTH = 8, MAX_VALUES = 300000 };

/* A tree of JSON takes some fifty bytes a value: a text of nothing but values would take many times its size. Commas inside strings count too; real configs
 * have thousands of values. */
static bool has_too_many_values(const char *text, uint64_t size) {
    uint64_t n = 0;
    for (uint64_t i = 0; i < size; i++) n += text[i] == ',' || text[i] == '[' || text[i] == '{';
    return n > MAX_VALUES;
}

aq_status aq_config_load(json_t **out, const char *dir, const char *name, const aq_model_options *options, aq_error *err) {
    *out = NULL;
    char *path = aq_path_join(dir, name), *text = NULL;
    uint64_t size;
    if (!path) return aq_fail_memory(err, strlen(dir), "a path");
    aq_status status = AQ_OK;
    if (aq_path_exists(path)) status = aq_read_limited(&text, &size, path, options->limits.config_bytes, "config_bytes", err);
    if (status == AQ_OK && text && has_too_many_values(text, size))
        status = aq_fail_at(err, AQ_ERR_FORMAT, path, NULL, "holds more than %d JSON values, the limit of a configuration", MAX_VALUES);
    if (status == AQ_OK && text) status = aq_json_parse(out, text, size, options->limits.json_depth, path, err);
    if (status == AQ_OK && text && !json_is_object(*out)) {
        json_decref(*out);
        *out = NULL;
        status = aq_fail_at(err, AQ_ERR_FORMAT, path, NULL, "expected a JSON object");
    }
    aq_free(text);
    aq_free(path);
    return status;
}

/* "bitsandbytes", "gptq" …: what a quantization_config says of itself. */
static const char *quantization_kind(const json_t *config) {
    const char *method = json_string_value(json_object_get(config, "quant_method"));
    return method ? method : "of unknown kind";
}

static aq_status refuse_quantized(const json_t *config, const char *dir, const char *name, aq_error *err) {
    const json_t *quantization = json_object_get(config, "quantization_config");
    if (!quantization) quantization = json_object_get(config, "compression_config");
    if (!quantization || json_is_null(quantization)) return AQ_OK;
    char kind[128], path[512];
    snprintf(path, sizeof path, "%s/%s", dir, name);
    aq_escape(kind, sizeof kind, quantization_kind(quantization), strlen(quantization_kind(quantization)));
    aq_fail_at(err, AQ_ERR_FORMAT, path, NULL, "quantization_config: the weights are already quantized (%s)", kind);
    aq_hint(err, "start from the original weights");
    return AQ_ERR_FORMAT;
}

/* _class_name of diffusers, the first of `architectures` of transformers, else model_type. */
static const char *class_of(const json_t *config) {
    const char *name = json_string_value(json_object_get(config, "_class_name"));
    if (!name) name = json_string_value(json_array_get(json_object_get(config, "architectures"), 0));
    if (!name) name = json_string_value(json_object_get(config, "model_type"));
    return name ? name : "";
}

aq_status aq_folder_config(aq_model *model, const char *dir, const aq_model_options *options, aq_error *err) {
    aq_status status = aq_config_load(&model->config, dir, "config.json", options, err);
    if (status == AQ_OK) status = refuse_quantized(model->config, dir, "config.json", err);
    if (status == AQ_OK && !(model->class_name = aq_strdup(model->config ? class_of(model->config) : ""))) status = aq_fail_memory(err, 64, "a class name");
    return status;
}

/* ---- side files ---- */

aq_status aq_model_add_side_file(aq_model *model, const char *relative, const char *absolute, aq_error *err) {
    if (model->n_side_files >= MAX_SIDE_FILES)
        return aq_fail_at(err, AQ_ERR_FORMAT, model->root, NULL, "more than %d files beside the weights", MAX_SIDE_FILES);
    aq_side_file *grown = aq_grow(model->side_files, &model->side_files_capacity, model->n_side_files, sizeof *grown);
    if (!grown) return aq_fail_memory(err, sizeof *grown, "a list of files");
    model->side_files = grown;
    aq_side_file *file = &grown[model->n_side_files++];
    file->relative = aq_strdup(relative);
    file->absolute = aq_strdup(absolute);
    return file->relative && file->absolute ? AQ_OK : aq_fail_memory(err, strlen(absolute), "a list of files");
}

/* What is carried over from one folder. */
typedef struct side_rule {
    bool keep_weights; /* another component: its weights belong to it */
    bool recurse;
    const char *component; /* at the root of a diffusers folder: the one whose weights are read */
} side_rule;

static bool is_component(const aq_model *model, const char *name) { return json_is_array(json_object_get(model->model_index, name)); }

static aq_status collect_side_files(aq_model *model, const char *dir, const char *prefix, side_rule rule, int depth, aq_error *err);

static aq_status collect_side_file(aq_model *model, const char *dir, const char *prefix, const char *name, side_rule rule, bool has_safetensors, int depth,
                                   aq_error *err) {
    if (name[0] == '.' || (depth == 0 && strcmp(name, "metadata.json") == 0)) return AQ_OK; /* a container has a metadata.json of its own */
    if (aq_is_weights_name(name) && !(rule.keep_weights && (!has_safetensors || strstr(name, ".safetensors")))) return AQ_OK;
    char *absolute = aq_path_join(dir, name), *relative = prefix[0] ? aq_path_join(prefix, name) : aq_strdup(name);
    aq_status status = AQ_OK;
    if (!absolute || !relative) {
        status = aq_fail_memory(err, strlen(dir), "a path");
    } else if (aq_path_is_file(absolute)) {
        status = aq_model_add_side_file(model, relative, absolute, err);
    } else if (rule.recurse && depth < MAX_SIDE_DEPTH && aq_path_is_dir(absolute)) {
        side_rule inner = rule;
        if (depth == 0) inner.keep_weights = strcmp(name, rule.component) != 0;
        if (depth > 0 || is_component(model, name)) status = collect_side_files(model, absolute, relative, inner, depth + 1, err);
    }
    aq_free(absolute);
    aq_free(relative);
    return status;
}

static aq_status collect_side_files(aq_model *model, const char *dir, const char *prefix, side_rule rule, int depth, aq_error *err) {
    aq_names names;
    bool has_safetensors = false;
    aq_status status = aq_list_dir(&names, dir, MAX_SIDE_FILES, err);
    if (status != AQ_OK) return status;
    for (size_t i = 0; i < names.n_names; i++) has_safetensors |= aq_text_ends_with(names.names[i], ".safetensors");
    for (size_t i = 0; i < names.n_names && status == AQ_OK; i++)
        status = collect_side_file(model, dir, prefix, names.names[i], rule, has_safetensors, depth, err);
    aq_names_free(&names);
    return status;
}

/* ---- diffusers ---- */

static aq_status fail_component(const aq_model *model, const char *path, const char *wanted, aq_error *err) {
    aq_name_list list = {0};
    const char *key;
    json_t *value;
    json_object_foreach(model->model_index, key, value) {
        if (json_is_array(value) && json_is_string(json_array_get(value, 0))) aq_name_list_add(&list, key);
    }
    char name[128];
    if (wanted)
        aq_fail_at(err, AQ_ERR_USAGE, path, NULL, "no component \"%s\"; there are: %s", aq_escape(name, sizeof name, wanted, strlen(wanted)),
                   aq_name_list_text(&list));
    else
        aq_fail_at(err, AQ_ERR_USAGE, path, NULL, "no denoiser (component transformer or unet); there are: %s", aq_name_list_text(&list));
    aq_hint(err, "choose one with --component=NAME");
    return AQ_ERR_USAGE;
}

static aq_status choose_component(aq_model *model, const char *path, const aq_model_options *options, aq_error *err) {
    const char *name = options->component;
    if (!name) name = is_component(model, "transformer") ? "transformer" : is_component(model, "unet") ? "unet" : NULL;
    if (!name || !is_component(model, name) || !aq_is_plain_file_name(name)) return fail_component(model, path, options->component, err);
    aq_free(model->weights_dir);
    model->weights_dir = aq_path_join(path, name);
    aq_free(model->component);
    model->component = aq_strdup(name);
    if (!model->weights_dir || !model->component) return aq_fail_memory(err, strlen(path), "a path");
    if (!aq_path_is_dir(model->weights_dir)) {
        aq_fail_at(err, AQ_ERR_FORMAT, model->weights_dir, NULL, "model_index.json names this component, but its folder is missing");
        aq_hint(err, "complete the download, or give the folder of the weights itself");
        return AQ_ERR_FORMAT;
    }
    return AQ_OK;
}

static aq_status open_diffusers(aq_model *model, const char *path, const aq_model_options *options, aq_error *err) {
    model->format = "diffusers";
    aq_status status = refuse_quantized(model->model_index, path, "model_index.json", err);
    if (status == AQ_OK) status = choose_component(model, path, options, err);
    if (status == AQ_OK) status = aq_folder_config(model, model->weights_dir, options, err);
    if (status == AQ_OK) status = aq_weights_open(model, model->weights_dir, false, options, err);
    side_rule rule = {.recurse = true, .component = model->component};
    if (status == AQ_OK) status = collect_side_files(model, path, "", rule, 0, err);
    return status;
}

/* Our own output has the source's model_index.json beside its Parquet files; a source has no such files. */
static aq_status refuse_container(const char *path, aq_error *err) {
    aq_names names;
    bool found = false;
    aq_status status = aq_list_dir(&names, path, 1000000, err);
    if (status != AQ_OK) return status;
    for (size_t i = 0; i < names.n_names && !found; i++) {
        unsigned index, n;
        int end = 0;
        found = sscanf(names.names[i], "model-%5u-of-%5u.parquet%n", &index, &n, &end) == 2 && end && !names.names[i][end];
    }
    aq_names_free(&names);
    return found ? aq_fail_container(err, path) : AQ_OK;
}

aq_status aq_folder_open(aq_model *model, const char *path, const aq_model_options *options, aq_error *err) {
    aq_status status = refuse_container(path, err);
    if (status != AQ_OK) return status;
    status = aq_config_load(&model->model_index, path, "model_index.json", options, err);
    if (status != AQ_OK) return status;
    if (model->model_index) return open_diffusers(model, path, options, err);
    if (options->component) {
        aq_fail_at(err, AQ_ERR_USAGE, path, NULL, "--component needs a diffusers folder, but there is no model_index.json");
        return AQ_ERR_USAGE;
    }
    if ((status = aq_folder_config(model, path, options, err)) != AQ_OK) return status;
    bool has_class = model->config && json_is_string(json_object_get(model->config, "_class_name"));
    model->format = has_class ? "diffusers component" : model->config ? "transformers" : "folder";
    status = aq_weights_open(model, path, model->config == NULL, options, err);
    side_rule rule = {.component = ""};
    if (status == AQ_OK) status = collect_side_files(model, path, "", rule, 0, err);
    return status;
}
