/* Output rules (see quantize.h): a default name, and the source is never touched — not by its own name, a link, a folder inside it or one around it. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/error.h"
#include "base/file.h"
#include "base/mem.h"
#include "pipeline/quantize.h"

/* "<name>-int<bits>" beside the source: "models/dit" -> "models/dit-int4", "a/flux.safetensors" -> "a/flux-int4". */
static char *default_output(const quantize_run *run, const char *model_path) {
    char *real = realpath(model_path, NULL);
    if (!real) return NULL;
    char *dir = aq_path_dirname(aq_path_is_dir(model_path) ? real : model_path), *base = aq_path_basename(aq_path_is_dir(model_path) ? real : model_path);
    char *path = NULL;
    if (dir && base) {
        static const char *const endings[] = {".index.json", ".safetensors"};
        for (size_t i = 0; i < 2; i++)
            if (aq_text_ends_with(base, endings[i])) base[strlen(base) - strlen(endings[i])] = 0;
        size_t size = strlen(base) + 32;
        char *name = aq_alloc(size);
        if (name) {
            snprintf(name, size, "%s-int%d", base, (int)aq_config_int(run->config, "bit_width", 4));
            path = strcmp(dir, ".") == 0 ? aq_strdup(name) : aq_path_join(dir, name);
            aq_free(name);
        }
    }
    aq_free(dir);
    aq_free(base);
    free(real);
    return path;
}

static aq_status refuse(aq_error *err, const char *out_path, const char *what, const char *source) {
    aq_fail_at(err, AQ_ERR_USAGE, out_path, NULL, "the output %s %s", what, source);
    aq_hint(err, "choose an output path outside the source model; the source is never changed");
    return AQ_ERR_USAGE;
}

aq_status aq_check_output(quantize_run *run, const char *out_path, aq_error *err) {
    const char *source = aq_model_path(run->model);
    run->out_path = out_path ? aq_strdup(out_path) : default_output(run, source);
    if (!run->out_path) return aq_fail_memory(err, strlen(source), "the output path");
    out_path = run->out_path;
    if (!out_path[0]) return aq_fail(err, AQ_ERR_USAGE, "the output path is empty");
    if (aq_path_same(out_path, source)) return refuse(err, out_path, "is the source model", source);
    for (size_t i = 0; i < aq_model_n_files(run->model); i++)
        if (aq_path_same(out_path, aq_model_file(run->model, i))) return refuse(err, out_path, "is a file of the source model,", aq_model_file(run->model, i));
    if (aq_path_is_dir(source) && aq_path_is_inside(out_path, source)) return refuse(err, out_path, "lies inside the source model", source);
    /* An output that holds the source would replace it. */
    if (aq_path_is_dir(out_path) && aq_path_is_inside(source, out_path)) return refuse(err, out_path, "is a folder that holds the source model", source);
    for (size_t i = 0; i < aq_model_n_files(run->model); i++)
        if (aq_path_is_dir(out_path) && aq_path_is_inside(aq_model_file(run->model, i), out_path))
            return refuse(err, out_path, "is a folder that holds a file of the source model,", aq_model_file(run->model, i));
    return AQ_OK;
}
