/* Sensitive layers by score (sensitive_layer_score): a measure of every layer, brought to 0..1 over the model, finds those that stay as they are.
 *
 * Scores are those of aq_plan_sensitivity: by gradients where the calibration has them, else by its second moments, else by the weights alone, unless
 * sensitivity_method names one. Layers whose bits were set by name, or by a plan, have no score: what was said of one layer goes before what is said of all.
 */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "base/error.h"
#include "base/mem.h"
#include "base/size.h"
#include "pipeline/planning.h"
#include "pipeline/quantize.h"

/* By the method that the settings name, or by the best of those whose data are there. */
static aq_status measure(const aq_model *model, const aq_plan_options *options, const char *word, double *scores, aq_sensitivity *method, aq_error *err) {
    static const aq_sensitivity order[] = {AQ_SENSITIVITY_GRADIENT, AQ_SENSITIVITY_HESSIAN, AQ_SENSITIVITY_VARIANCE};
    if (strcmp(word, "auto") != 0) {
        *method = (aq_sensitivity)aq_sensitivity_from_name(word);
        return aq_plan_sensitivity(model, options, *method, scores, NULL, err);
    }
    aq_status status = AQ_ERR_USAGE;
    for (size_t i = 0; i < 3 && status == AQ_ERR_USAGE; i++) status = aq_plan_sensitivity(model, options, *method = order[i], scores, NULL, err);
    if (status == AQ_OK) aq_error_clear(err);
    return status;
}

aq_status aq_sensitive_scores(double **out, aq_sensitivity *method, const aq_model *model, const aq_calib *calib, const aq_config *config,
                              const aq_plan_request *requests, aq_error *err) {
    size_t n = aq_model_n_tensors(model);
    aq_plan_options options;
    aq_plan_options_from(&options, config, calib);
    options.requests = requests;
    *out = NULL;
    if (!(aq_config_float(config, "sensitive_layer_score") >= 0)) return AQ_OK;
    if (!(*out = aq_alloc((n + 1) * sizeof **out))) return aq_fail_memory(err, n * sizeof **out, "scores");
    aq_status status = measure(model, &options, aq_config_string(config, "sensitivity_method"), *out, method, err);
    if (status == AQ_OK) return AQ_OK;
    aq_free(*out);
    *out = NULL;
    return status;
}

bool aq_is_sensitive(const aq_config *config, const double *scores, size_t tensor) {
    return scores && scores[tensor] >= aq_config_float(config, "sensitive_layer_score"); /* NaN, of layers without a score, is not */
}

/* ---- in a run ---- */

aq_status aq_sensitive_find(quantize_run *run, aq_error *err) {
    aq_plan_request *requests = NULL;
    aq_sensitivity method = AQ_SENSITIVITY_VARIANCE;
    if (!(aq_config_float(run->config, "sensitive_layer_score") >= 0)) return AQ_OK;
    aq_status status = aq_plan_requests(&requests, run->config, run->model, true, err);
    for (size_t i = 0; i < run->n_tensors && status == AQ_OK; i++)
        if (!run->choices[i].quantize || aq_planned(run, aq_model_tensor(run->model, i))) requests[i].open = AQ_PLAN_KEEP;
    if (status == AQ_OK) status = aq_sensitive_scores(&run->scores, &method, run->model, run->calib, run->config, requests, err);
    aq_free(requests);
    if (status == AQ_OK && !(run->score_reasons = aq_calloc(run->n_tensors + 1, sizeof *run->score_reasons)))
        status = aq_fail_memory(err, run->n_tensors * sizeof *run->score_reasons, "reasons");
    if (status != AQ_OK) return status;
    run->score_method = aq_sensitivity_name(method);
    aq_sensitive_keep(run);
    return AQ_OK;
}

void aq_sensitive_keep(quantize_run *run) {
    for (size_t i = 0; run->score_reasons && i < run->n_tensors; i++) {
        const aq_plan_layer *planned = aq_planned(run, aq_model_tensor(run->model, i));
        if (!aq_is_sensitive(run->config, run->scores, i) || (planned && planned->bits != 16)) continue;
        char score[32];
        snprintf(run->score_reasons[i], sizeof run->score_reasons[i], "sensitive: score %s by %s", aq_text_fixed(score, run->scores[i], 2), run->score_method);
        run->choices[i] = (aq_layer_choice){.bits = 16, .reason = run->score_reasons[i], .spec.no_simd = run->choices[i].spec.no_simd};
        run->outcomes[i].bits = 16;
    }
}
