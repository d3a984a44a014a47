/* A model whose values another room reads (aq_model_open_from): a Parquet model folder as the source of a run.
 *
 * Names, roles, modality, side files and adapters are as for any other model. Files are known by what they looked like at open, so that a changed one is found.
 */
#include "base/error.h"
#include "base/mem.h"
#include "model/internal.h"

#include <string.h>

static aq_status fail_text(aq_error *err) { return aq_fail_memory(err, 4096, "a model"); }

static aq_status set_paths(aq_model *model, const char *path, aq_error *err) {
    const aq_model_source *s = &model->source;
    model->path = aq_strdup(path);
    model->root = aq_path_is_dir(path) ? aq_strdup(path) : aq_path_dirname(path);
    model->component = aq_strdup(s->component);
    model->weights_name = aq_strdup(s->weights_name);
    if (!model->path || !model->root || !model->component || !model->weights_name) return fail_text(err);
    model->weights_dir = s->weights_folder[0] ? aq_path_join(model->root, s->weights_folder) : aq_strdup(model->root);
    return model->weights_dir ? AQ_OK : fail_text(err);
}

static aq_status check_component(const aq_model *model, const aq_model_options *options, aq_error *err) {
    const char *wanted = options->component;
    char has[128], asked[128];
    if (!wanted || !model->component[0] || strcmp(wanted, model->component) == 0) return AQ_OK; /* none at all: aq_component_check */
    return aq_fail_at(err, AQ_ERR_USAGE, model->path, NULL, "holds the component \"%s\", not \"%s\"",
                      aq_escape(has, sizeof has, model->component, strlen(model->component)), aq_escape(asked, sizeof asked, wanted, strlen(wanted)));
}

static aq_status take_files(aq_model *model, aq_error *err) {
    const aq_model_source *s = &model->source;
    aq_status status = AQ_OK;
    for (size_t i = 0; i < s->n_files && status == AQ_OK; i++) status = aq_model_add_stamp(model, s->file(s->user, i), err);
    for (size_t i = 0; i < s->n_side_files && status == AQ_OK; i++) {
        const char *absolute, *relative = s->side_file(s->user, i, &absolute);
        if (aq_path_is_file(absolute)) status = aq_model_add_side_file(model, relative, absolute, err);
    }
    return status;
}

static aq_status take_tensors(aq_model *model, const aq_model_options *options, aq_error *err) {
    const aq_model_source *s = &model->source;
    if (s->n_tensors > options->limits.n_tensors)
        return aq_fail_limit(err, model->path, NULL, "n_tensors", options->limits.n_tensors, "%zu tensors", s->n_tensors);
    if (!(model->tensors = aq_calloc(s->n_tensors + 1, sizeof *model->tensors)))
        return aq_fail_memory(err, s->n_tensors * sizeof *model->tensors, "the list of tensors");
    model->n_tensors = s->n_tensors;
    for (size_t i = 0; i < s->n_tensors; i++) {
        aq_status status = s->tensor(s->user, i, &model->tensors[i], err);
        if (status != AQ_OK) return status;
    }
    return aq_model_index_tensors(model, err);
}

/* The configuration that was copied beside the weights; else the class that the container names. */
static aq_status take_config(aq_model *model, const aq_model_options *options, aq_error *err) {
    aq_status status = aq_folder_config(model, model->weights_dir, options, err);
    if (status != AQ_OK || model->class_name[0]) return status;
    aq_free(model->class_name);
    model->class_name = aq_strdup(model->source.class_name);
    return model->class_name ? AQ_OK : fail_text(err);
}

aq_status aq_model_open_from(aq_model **out, const char *path, const aq_model_source *source, const aq_model_options *options, aq_error *err) {
    aq_model_options defaults;
    *out = NULL;
    aq_model_options_init(&defaults);
    if (!options) options = &defaults;
    aq_model *model = aq_calloc(1, sizeof *model);
    if (!model) {
        source->close(source->user);
        return aq_fail_memory(err, sizeof *model, "a model");
    }
    model->source = *source;
    model->format = source->format;
    aq_status status = set_paths(model, path, err);
    if (status == AQ_OK) status = check_component(model, options, err);
    if (status == AQ_OK) status = take_files(model, err);
    if (status == AQ_OK) status = take_tensors(model, options, err);
    if (status == AQ_OK) status = take_config(model, options, err);
    if (status == AQ_OK) status = aq_lora_open(model, options, err);
    if (status == AQ_OK) status = aq_model_mark_computed(model, err);
    if (status == AQ_OK) aq_roles_assign(model);
    if (status == AQ_OK && source->n_coded > 0)
        status =
            aq_model_warn(model, err, NULL, "%zu tensors are quantized already: their values carry that error, which is not measured here", source->n_coded);
    aq_model_options known = *options;
    if (known.modality == AQ_MODALITY_UNKNOWN) known.modality = source->modality;
    if (status == AQ_OK) status = aq_modality_detect(model, &known, err);
    if (status == AQ_OK)
        *out = model;
    else
        aq_model_close(model);
    return status;
}
