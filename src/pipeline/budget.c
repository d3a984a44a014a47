/* A size budget (see quantize.h): a plan that meets it before work, and the promise that what is written does.
 *
 * The planner knows codes, parameters, what calibration adds to a layer, and what the container adds to each tensor. A layer that the plan names is coded as
 * it says, so nothing else is stored with it.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/error.h"
#include "pipeline/attempts.h"
#include "pipeline/planning.h"
#include "pipeline/quantize.h"

#define MIB (UINT64_C(1) << 20)
enum { REPORT_BYTES = 128 }; /* of the methods that a layer was compared with */

/* The share of the planner in the time of a run, for the progress bar. */
#define PLAN_SHARE 0.2

static bool is_budget(const aq_config *config) {
    bool size = aq_config_float(config, "target_model_size_mb") > 0 && !aq_config_bool(config, "target_size_is_wish");
    return size || aq_config_float(config, "target_bpw") > 0;
}

/* Bytes that calibration may add to tensor `index`. */
static uint64_t calibrated_bytes(const quantize_run *run, size_t index, const aq_quant_spec *spec) {
    const aq_tensor_info *t = aq_model_tensor(run->model, index);
    uint64_t rows, cols;
    aq_shape_matrix(&t->shape, &rows, &cols);
    if (aq_inputs_known(run, index, NULL) == INPUTS_NONE) return 0;
    bool timed = aq_config_bool(run->config, "enable_time_aware") || aq_config_int(run->config, "act_bits", 16) == 8;
    aq_store_predicted with = {.name = t->name, .shape = &t->shape, .spec = spec, .file_bytes = run->source_bytes}, without = with;
    with.n_time_groups = timed ? (uint64_t)aq_config_int(run->config, "num_time_groups", 10) : 0;
    with.n_equalization_scales = aq_spatial_is_possible(run, index) ? cols : 0;
    if (aq_config_bool(run->config, "fold_equalization")) with.n_folded_shift = with.n_equalization_scales;
    return aq_store_predict(&with) - aq_store_predict(&without) + REPORT_BYTES;
}

/* The target is a number in it: as if of the most digits, so that the smallest possible size does not depend on the size that was asked for. */
static uint64_t config_bytes(const quantize_run *run) {
    enum { MOST_DIGITS = 24 };
    char *config = aq_run_config_json(run->config), *target = aq_config_get_json(run->config, "target_model_size_mb");
    uint64_t bytes = config ? strlen(config) : 4096;
    if (target && strlen(target) < MOST_DIGITS) bytes += MOST_DIGITS - strlen(target);
    aq_config_free_text(target);
    free(config);
    return bytes;
}

/* Of what calibration adds to its layers the planner counts time groups and equalization, not the sentence about the methods compared or a fold's shift. */
static uint64_t uncounted_bytes(const quantize_run *run) {
    uint64_t n = 0, rows, cols;
    for (size_t i = 0; i < run->n_tensors; i++) {
        const aq_tensor_info *t = aq_model_tensor(run->model, i);
        if (t->role == AQ_ROLE_SCALE || aq_inputs_known(run, i, NULL) == INPUTS_NONE) continue;
        n += REPORT_BYTES;
        if (!aq_config_bool(run->config, "fold_equalization") || !aq_spatial_is_possible(run, i)) continue;
        aq_shape_matrix(&t->shape, &rows, &cols);
        aq_store_predicted plain = {.name = t->name, .shape = &t->shape, .data_bytes = t->count, .file_bytes = run->source_bytes}, shifted = plain;
        shifted.n_folded_shift = cols;
        n += aq_store_predict(&shifted) - aq_store_predict(&plain);
    }
    return n;
}

uint64_t aq_predict_frame(const quantize_run *run) { return aq_store_predict_frame(config_bytes(run)); }

aq_status aq_predict_stored(const quantize_run *run, size_t index, const aq_quant_spec *spec, uint64_t *bytes, aq_error *err) {
    const aq_tensor_info *t = aq_model_tensor(run->model, index);
    aq_store_predicted p = {.name = t->name, .shape = &t->shape, .spec = spec, .file_bytes = run->source_bytes};
    aq_status status = AQ_OK;
    if (spec) {
        uint64_t rows, cols;
        aq_quant_layout layout;
        aq_shape_matrix(&t->shape, &rows, &cols);
        if ((status = aq_quant_layout_init(&layout, spec, rows, cols, err)) != AQ_OK) return status;
        p.data_bytes = layout.codes_bytes;
        p.params_bytes = layout.params_bytes;
    } else {
        p.data_bytes = run->is_corrected[index] ? 4 * t->count : t->is_computed ? t->count * aq_dtype_size(t->kept_dtype) : t->size_bytes;
    }
    *bytes = aq_store_predict(&p) + (spec ? calibrated_bytes(run, index, spec) : 0);
    return status;
}

/* Progress of the planner as the first part of the run's. */
static bool tell_scaled(void *user, const aq_progress *progress) {
    quantize_run *run = user;
    return aq_job_tell(&run->job, "plan", progress->tensor, NULL, progress->n_done, 0, PLAN_SHARE * progress->fraction);
}

aq_status aq_budget_plan(quantize_run *run, aq_error *err) {
    if (run->plan || !is_budget(run->config)) return AQ_OK;
    if (!run->calib && !aq_config_bool(run->config, "enable_entropy_adaptation")) return AQ_OK; /* the planner may not go by the weights alone */
    aq_plan_job options = {.model = run->options->model, .allow_unmatched = true, .config_bytes = config_bytes(run), .reserve_bytes = uncounted_bytes(run)};
    aq_job_hooks hooks = {.progress = run->job.hooks->progress ? tell_scaled : NULL, .user = run};
    aq_job job;
    aq_job_init(&job, &hooks, run->n_tensors, run->source_bytes);
    run->job.n_total = run->n_tensors;
    aq_status status = aq_plan_for(&run->own_plan, run->model, run->calib, run->config, &options, &job, err);
    if (status != AQ_OK) return status;
    run->plan = run->own_plan;
    run->plan_follows = true;
    run->job.base_fraction = PLAN_SHARE;
    return AQ_OK;
}

aq_status aq_budget_check(const quantize_run *run, aq_error *err) {
    double target_mb = aq_config_float(run->config, "target_model_size_mb");
    char size[32], target[32];
    if (!(target_mb > 0) || aq_config_bool(run->config, "target_size_is_wish") || run->predicted_bytes <= aq_target_bytes(run->config)) return AQ_OK;
    aq_fail(err, AQ_ERR_BUDGET, "the target size of %s MiB is not met: %s give about %s MiB", aq_text_fixed(target, target_mb, 1),
            run->plan ? "this plan and these settings" : "these settings", aq_text_fixed(size, (double)run->predicted_bytes / (double)MIB, 1));
    aq_hint(err, "use fewer bits or larger groups, or a larger --target-size");
    return AQ_ERR_BUDGET;
}

/* After the layers: some may have become larger than planned (parameters that do not fit half precision, layers that fell back). */
aq_status aq_budget_check_outcome(const quantize_run *run, aq_error *err) {
    double target_mb = aq_config_float(run->config, "target_model_size_mb");
    bool changed = false;
    uint64_t bytes = aq_predict_frame(run);
    if (!(target_mb > 0) || aq_config_bool(run->config, "target_size_is_wish")) return AQ_OK;
    for (size_t i = 0; i < run->n_tensors; i++) {
        const layer_outcome *o = &run->outcomes[i];
        uint64_t more = 0;
        if (aq_model_tensor(run->model, i)->role == AQ_ROLE_SCALE) continue;
        changed |= o->widened || o->fallback_from;
        aq_status status = aq_predict_stored(run, i, o->bits < 16 ? &o->spec : NULL, &more, err);
        if (status != AQ_OK) return status;
        bytes += more;
    }
    if (!changed || bytes <= aq_target_bytes(run->config)) return AQ_OK;
    char size[32], target[32];
    aq_fail(err, AQ_ERR_BUDGET, "layers that became larger than planned make it %s MiB, above the target size of %s MiB; nothing was written",
            aq_text_fixed(size, (double)bytes / (double)MIB, 1), aq_text_fixed(target, target_mb, 1));
    aq_hint(err, "--params=f32 plans with parameters that fit every layer; a larger --target-size leaves room");
    return AQ_ERR_BUDGET;
}
