/* The main job: a model in, a smaller verified container out (see quantize.h for its parts). */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/error.h"
#include "base/file.h"
#include "base/mem.h"
#include "pipeline/quantize.h"

/* Identifies a run: program, settings that change bytes, input, calibration, plan. */
static aq_status fingerprint(const quantize_run *run, char out[65], aq_error *err) {
    char model[33];
    aq_model_fingerprint(run->model, model);
    const aq_quantize_options *o = run->options;
    const char *component = aq_model_component(run->model), *modality = aq_modality_name(aq_model_modality(run->model));
    char calibration[65] = "", plan[65] = "";
    aq_status status = run->calib ? aq_calib_fingerprint(run->calib, calibration, err) : AQ_OK;
    if (status == AQ_OK && run->plan) status = aq_plan_fingerprint(run->plan, plan, err);
    if (status != AQ_OK) return status;
    size_t size = strlen(run->config_json) + strlen(component) + 512;
    char *text = aq_alloc(size);
    if (!text) return aq_fail_memory(err, size, "the fingerprint of the run");
    snprintf(text, size, "%s %s\n%s\n%s\n%s\n%s\n%d%d %llu\n%s\n%s", AQ_VERSION, AQ_SCHEMA_VERSION, run->config_json, model, component, modality,
             o->no_side_files, o->model.skip_unknown_dtype, (unsigned long long)o->shard_bytes, calibration, plan);
    aq_sha256_hex(text, strlen(text), out);
    aq_free(text);
    return AQ_OK;
}

static bool keep_going(void *user) {
    quantize_run *run = user;
    return aq_job_tell(&run->job, run->stage, NULL, NULL, run->job.n_total, run->job.bytes_total, strcmp(run->stage, "copy") == 0 ? 0.9 : 0.92);
}

static aq_status create_writer(quantize_run *run, aq_error *err) {
    char print[65];
    aq_status status = fingerprint(run, print, err);
    if (status != AQ_OK) return status;
    const aq_quantize_options *o = run->options;
    aq_store_writer_options options = {.fingerprint = print,
                                       .config_json = run->config_json,
                                       .modality = aq_model_modality(run->model),
                                       .is_diffusion_model = true,
                                       .overwrite = o->overwrite,
                                       .make_parents = o->make_parents,
                                       .restart = o->restart,
                                       .no_verify = o->no_verify,
                                       .shard_bytes = o->shard_bytes,
                                       .predicted_bytes = run->predicted_bytes,
                                       .keep_going = keep_going,
                                       .keep_going_user = run,
                                       .log = run->job.hooks->log,
                                       .log_user = run->job.hooks->user};
    return aq_store_writer_create(&run->writer, run->out_path, &options, err);
}

/* A container that is the source has the metadata.json of what it was made from among its files. */
static bool has_source_metadata(const aq_model *model) {
    const char *relative;
    for (size_t i = 0; (relative = aq_model_side_file(model, i, NULL)) != NULL; i++)
        if (strcmp(relative, aq_side_file_stored_name("metadata.json")) == 0) return true;
    return false;
}

/* A folder's own metadata.json cannot keep its name: the container has one. */
static aq_status copy_metadata(quantize_run *run, aq_error *err) {
    if (!aq_path_is_dir(aq_model_path(run->model)) || has_source_metadata(run->model)) return AQ_OK;
    char *path = aq_path_join(aq_model_root(run->model), "metadata.json");
    if (!path) return aq_fail_memory(err, 0, "a path");
    aq_status status = aq_path_is_file(path) ? aq_store_writer_copy(run->writer, aq_side_file_stored_name("metadata.json"), path, err) : AQ_OK;
    aq_free(path);
    return status;
}

static aq_status copy_side_files(quantize_run *run, aq_error *err) {
    if (run->options->no_side_files) return AQ_OK;
    aq_status status = copy_metadata(run, err);
    for (size_t i = 0; i < aq_model_n_side_files(run->model) && status == AQ_OK; i++) {
        const char *absolute, *relative = aq_model_side_file(run->model, i, &absolute);
        status = aq_store_writer_copy(run->writer, aq_side_file_stored_name(relative), absolute, err);
    }
    return status;
}

static aq_status check_strict(const quantize_run *run, aq_error *err) {
    if (!run->options->strict || run->warnings.n_items == 0) return AQ_OK;
    aq_fail(err, AQ_ERR_QUALITY, "%zu warnings, and --strict allows none; nothing was written. The first: %s", run->warnings.n_items, run->warnings.items[0]);
    return AQ_ERR_QUALITY;
}

/* From here on the writer exists; it is finished or aborted. What an interrupted or failed run computed stays for the next, unless it can't help it. */
static aq_status write_all(quantize_run *run, aq_error *err) {
    bool go_on = aq_job_tell(&run->job, "quantize", NULL, NULL, 0, 0, 0); /* from here on a failure is one of the work */
    aq_status status = go_on ? aq_folds_choose(run, err) : aq_job_cancelled(err, "the state is kept; the same command continues");
    if (status == AQ_OK) status = aq_quantize_layers(run, err);
    if (status == AQ_OK) aq_warn_fallback_rate(run);
    if (status == AQ_OK) status = check_strict(run, err);
    if (status == AQ_OK) status = aq_budget_check_outcome(run, err);
    run->stage = "copy";
    if (status == AQ_OK) status = copy_side_files(run, err);
    run->stage = "verify";
    if (status == AQ_OK) status = aq_model_check_unchanged(run->model, err);
    if (status == AQ_ERR_INTERRUPTED || (status == AQ_OK && !keep_going(run))) status = aq_job_cancelled(err, "the state is kept; the same command continues");
    char *metadata = NULL;
    if (status == AQ_OK && !(metadata = aq_metadata_text(run))) status = aq_fail_memory(err, 0, "metadata.json");
    if (status != AQ_OK) {
        bool keep = status == AQ_ERR_INTERRUPTED || status == AQ_ERR_IO || status == AQ_ERR_MEMORY;
        bool kept = aq_store_writer_abort(run->writer, keep);
        if (status == AQ_ERR_INTERRUPTED && !kept) aq_job_cancelled(err, "so early that nothing is kept; the same command begins again");
        return status;
    }
    status = aq_store_writer_finish(run->writer, metadata, err);
    free(metadata);
    return status;
}

static void free_run(quantize_run *run) {
    for (size_t i = 0; run->outcomes && i < run->n_tensors; i++) {
        aq_free(run->outcomes[i].fallback_from);
        aq_free(run->outcomes[i].compared_with);
    }
    aq_folds_free(&run->folds);
    aq_calib_free(run->own_calib);
    aq_plan_free(run->own_plan);
    aq_free(run->outcomes);
    aq_free(run->choices);
    aq_free(run->biases);
    aq_free(run->is_corrected);
    aq_free(run->order);
    aq_free(run->needs);
    aq_free(run->scores);
    aq_free(run->score_reasons);
    aq_free(run->out_path);
    free(run->config_json);
    aq_sentences_free(&run->warnings);
    if (run->model) aq_model_close(run->model);
}

aq_status aq_quantize_model(const char *model_path, const char *out_path, const aq_config *config, const aq_quantize_options *options,
                            const aq_job_hooks *hooks, char **report_json, aq_error *err) {
    aq_quantize_options defaults = {0};
    aq_model_options_init(&defaults.model);
    aq_config *own = config ? NULL : aq_config_create();
    quantize_run run = {.config = config ? config : own, .options = options ? options : &defaults};
    if (report_json) *report_json = NULL;
    aq_error_clear(err);
    if (!run.config) return aq_fail_memory(err, 0, "the configuration");
    aq_job_init(&run.job, hooks, 0, 0);
    aq_status status = aq_job_tell(&run.job, "check", NULL, NULL, 0, 0, 0) ? AQ_OK : aq_job_cancelled(err, "nothing was done");
    if (status == AQ_OK) status = aq_preflight(&run, model_path, out_path, err);
    if (status == AQ_OK && !(run.config_json = aq_run_config_json(run.config))) status = aq_fail_memory(err, 0, "the configuration");
    if (status == AQ_OK) {
        run.job.n_total = run.n_tensors;
        run.job.bytes_total = run.source_bytes;
        run.job.first_fraction = -1; /* the estimate counts from the first layer */
        for (size_t i = 0; i < run.warnings.n_items; i++) aq_job_log(&run.job, AQ_LOG_WARNING, "%s", run.warnings.items[i]);
        status = create_writer(&run, err);
    }
    if (status == AQ_OK) status = write_all(&run, err);
    if (status == AQ_OK && report_json) status = aq_quantize_report(&run, report_json, err);
    if (status == AQ_OK) aq_job_tell(&run.job, "done", NULL, NULL, run.job.n_total, run.job.bytes_total, 1);
    free_run(&run);
    aq_config_destroy(own);
    return status;
}
