/* From a configuration to a plan (see planning.h): what is open about each tensor, the budget, the summary.
 *
 * A layer is open unless an override or layer_bit_widths names its bits. Layers that names alone would keep (embeddings, first and last projections) are open
 * too, but not below 8 bits: names suggest, measured errors decide (user-interface.md, presets). What is excluded or named as sensitive stays kept.
 */
#include "pipeline/planning.h"

#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/error.h"
#include "base/file.h"
#include "base/json.h"
#include "base/mem.h"
#include "pipeline/config_fields.h"
#include "pipeline/report.h"
#include "pipeline/source.h"

#define MIB (UINT64_C(1) << 20)
enum { LEAST_BITS_BY_NAME = 8, MOST_BITS = 8 };

/* Everything that a plan is made from. */
typedef struct {
    const aq_model *model;
    const aq_calib *calib;
    const aq_config *config;
    const aq_plan_job *options;
    aq_job *job;
    const char *stage;
    aq_plan_request *requests;
    int bits[MOST_BITS];
    const char **weight_names;
    double *weights;
    json_t *weights_json;
    double *scores; /* [n_tensors] or NULL */
    aq_plan_options measure;
    aq_plan_problem *problem;
    uint64_t budget;
    size_t *choice;
    double start_error; /* of the knapsack's answer, when evolution went on from it */
} planner;

/* ---- what is open ---- */

/* The number of bits of this layer was set by its name. */
static aq_status is_pinned(const aq_config *config, const aq_tensor_info *t, bool *out, aq_error *err) {
    *out = false;
    for (size_t i = 0; i < aq_config_list_size(config, "layer_overrides"); i++) {
        aq_layer_override o;
        aq_status status = aq_layer_override_parse(&o, aq_config_list_string(config, "layer_overrides", i), err);
        if (status != AQ_OK) return status;
        if (o.bits >= 0 && aq_glob_match(o.glob, t->name)) *out = true;
    }
    if (!aq_config_bool(config, "enable_mixed_precision")) return AQ_OK;
    for (size_t i = 0; i < aq_config_list_size(config, "layer_bit_widths"); i++) {
        const char *given = aq_config_list_string(config, "layer_bit_widths", i);
        size_t n = strlen(given);
        if (strncmp(given, t->name, n) == 0 && (t->name[n] == 0 || strcmp(t->name + n, ".weight") == 0)) *out = true;
    }
    return AQ_OK;
}

/* Kept by its name alone: a suggestion. */
static bool is_suggestion(const aq_config *config, const aq_tensor_info *t, const aq_layer_choice *choice) {
    return (t->role == AQ_ROLE_KEEP_EMBED || t->role == AQ_ROLE_KEEP_EDGE) && !aq_config_bool(config, "skip_sensitive_layers") && t->shape.rank >= 2 &&
           t->count >= 4096 && strcmp(choice->reason, aq_role_reason(t->role)) == 0;
}

static aq_method method_of(const aq_config *config) {
    const char *word = aq_config_string(config, "method");
    return strcmp(word, "rtn") == 0 ? AQ_METHOD_RTN : strcmp(word, "search") == 0 ? AQ_METHOD_SEARCH : AQ_METHOD_GPTQ;
}

static aq_status request_of(const aq_config *config, const aq_tensor_info *t, bool names_decide, aq_plan_request *out, aq_error *err) {
    aq_layer_choice choice;
    bool pinned;
    *out = (aq_plan_request){.open = AQ_PLAN_KEEP};
    aq_status status = aq_config_choose(config, t, &choice, err);
    if (status == AQ_OK) status = is_pinned(config, t, &pinned, err);
    if (status != AQ_OK || !aq_dtype_is_float(t->dtype) || t->count == 0) return status;
    aq_quant_spec base = {
        .bits = 4, .axis = 1, .method = method_of(config), .symmetric = aq_config_bool(config, "symmetric"), .no_simd = !aq_config_bool(config, "enable_simd")};
    if (choice.quantize && pinned)
        *out = (aq_plan_request){.open = AQ_PLAN_FIXED, .spec = choice.spec};
    else if (choice.quantize)
        *out = (aq_plan_request){.open = AQ_PLAN_OPEN, .spec = base};
    else if (!names_decide && !pinned && is_suggestion(config, t, &choice))
        *out = (aq_plan_request){.open = AQ_PLAN_OPEN, .spec = base, .least_bits = LEAST_BITS_BY_NAME};
    return AQ_OK;
}

aq_status aq_plan_requests(aq_plan_request **out, const aq_config *config, const aq_model *model, bool names_decide, aq_error *err) {
    size_t n = aq_model_n_tensors(model);
    aq_plan_request *requests = *out = aq_calloc(n + 1, sizeof *requests);
    aq_status status = requests ? AQ_OK : aq_fail_memory(err, n * sizeof *requests, "the layers of a plan");
    for (size_t i = 0; i < n && status == AQ_OK; i++) status = request_of(config, aq_model_tensor(model, i), names_decide, &requests[i], err);
    if (status == AQ_OK) return AQ_OK;
    aq_free(requests);
    *out = NULL;
    return status;
}

/* ---- settings ---- */

aq_status aq_check_layer_name(const aq_model *model, const char *name, const char *file, const char *what, aq_error *err) {
    char full[1100], shown[256];
    snprintf(full, sizeof full, "%s.weight", name);
    if (aq_model_find(model, name) >= 0 || aq_model_find(model, full) >= 0) return AQ_OK;
    aq_fail_at(err, AQ_ERR_USAGE, file, NULL, "%s names \"%s\", which is not in the model", what, aq_escape(shown, sizeof shown, name, strlen(name)));
    aq_hint(err, "it was made for another model, or is misspelt; --allow-unmatched goes by what is there");
    return AQ_ERR_USAGE;
}

static aq_status read_weights(planner *p, const char *path, aq_error *err) {
    aq_status status = aq_json_load(&p->weights_json, path, 64 * MIB, 4, err);
    if (status != AQ_OK) return status;
    const char *name;
    json_t *value;
    size_t n = json_object_size(p->weights_json), i = 0;
    if (n == 0) return aq_fail_at(err, AQ_ERR_FORMAT, path, NULL, "weights of layers are a JSON object of numbers by layer name");
    p->weight_names = aq_calloc(n, sizeof *p->weight_names);
    p->weights = aq_calloc(n, sizeof *p->weights);
    if (!p->weight_names || !p->weights) return aq_fail_memory(err, n * sizeof *p->weights, "weights");
    json_object_foreach(p->weights_json, name, value) {
        if (!json_is_number(value) || json_number_value(value) < 0) {
            char *text = json_dumps(value, JSON_ENCODE_ANY | JSON_COMPACT);
            status = aq_fail_at(err, AQ_ERR_FORMAT, path, name, "its weight must be a number, not negative, found %.60s", text ? text : "another value");
            free(text);
        } else if (!p->options->allow_unmatched) {
            status = aq_check_layer_name(p->model, name, path, "the list of weights", err);
        }
        if (status != AQ_OK) return status;
        p->weight_names[i] = name;
        p->weights[i++] = json_number_value(value);
    }
    p->measure.weight_names = p->weight_names;
    p->measure.weights = p->weights;
    p->measure.n_weights = n;
    return AQ_OK;
}

static bool progress(void *user, const char *name, size_t n_done, size_t n_total) {
    planner *p = user;
    if (!p->job) return true;
    p->job->n_total = n_total;
    return aq_job_tell(p->job, p->stage, name, NULL, n_done, 0, n_total ? 0.9 * (double)n_done / (double)n_total : 0.9);
}

static void read_allowed(planner *p) {
    p->measure.bits = p->bits;
    for (size_t i = 0; i < aq_config_list_size(p->config, "allow_bits") && i < MOST_BITS; i++)
        p->bits[p->measure.n_bits++] = aq_config_list_int(p->config, "allow_bits", i);
}

void aq_plan_options_from(aq_plan_options *out, const aq_config *config, const aq_calib *calib) {
    const char *nonfinite = aq_config_string(config, "nonfinite");
    int64_t memory_mb = aq_config_int(config, "max_memory_limit_mb", 0);
    aq_plan_options_init(out);
    out->min_cosine = aq_config_float(config, "min_accuracy");
    out->calib = calib;
    out->nonfinite = strcmp(nonfinite, "keep") == 0   ? AQ_PLAN_NONFINITE_KEEP
                     : strcmp(nonfinite, "zero") == 0 ? AQ_PLAN_NONFINITE_ZERO
                                                      : AQ_PLAN_NONFINITE_ERROR;
    bool timed = aq_config_bool(config, "enable_time_aware") || aq_config_int(config, "act_bits", 16) == 8;
    out->n_time_groups = timed ? (uint64_t)aq_config_int(config, "num_time_groups", 10) : 0;
    out->equalizes = aq_config_bool(config, "enable_spatial") && strcmp(aq_config_string(config, "smooth"), "ditas") == 0;
    out->corrects_biases = aq_config_bool(config, "bias_correction");
    out->n_threads = (int)aq_config_int(config, "num_threads", 0);
    out->max_memory_bytes = memory_mb > 0 ? (uint64_t)memory_mb * MIB : aq_available_memory_bytes() / 2;
}

static aq_status read_settings(planner *p, aq_error *err) {
    aq_plan_options *m = &p->measure;
    aq_plan_options_from(m, p->config, p->calib);
    read_allowed(p);
    m->progress = progress;
    m->user = p;
    m->cache_dir = p->options->cache_dir;
    m->frame_bytes = p->options->config_bytes;
    if (p->options->sample_values) m->sample_values = p->options->sample_values == UINT64_MAX ? 0 : p->options->sample_values;
    return p->options->weights_path ? read_weights(p, p->options->weights_path, err) : AQ_OK;
}

/* ---- the budget ---- */

static uint64_t open_weights(const aq_plan_problem *problem, const aq_model *model) {
    uint64_t n = 0;
    for (size_t i = 0; i < problem->n_items; i++) n += aq_model_tensor(model, (size_t)aq_model_find(model, problem->items[i].name))->count;
    return n;
}

/* What the container adds to the codes and parameters of the layers. */
static uint64_t overheads(const aq_plan_problem *problem, const aq_model *model) {
    uint64_t n = 0;
    for (size_t i = 0; i < problem->n_items; i++) {
        const aq_tensor_info *t = aq_model_tensor(model, (size_t)aq_model_find(model, problem->items[i].name));
        n += aq_store_predict(&(aq_store_predicted){.name = t->name, .shape = &t->shape, .spec = &(aq_quant_spec){.bits = 8}, .file_bytes = t->size_bytes});
    }
    return n;
}

uint64_t aq_mib_bytes(double mib) {
    return mib > 0 ? (uint64_t)fmin(fmax(mib * (double)MIB + 0.01, 1), 1e18) : 0; /* decimals of a MiB end a little below the byte that was meant */
}

uint64_t aq_target_bytes(const aq_config *config) { return aq_mib_bytes(aq_config_float(config, "target_model_size_mb")); }

uint64_t aq_plan_budget(const aq_config *config, const aq_plan_problem *problem, const aq_model *model) {
    double bpw = aq_config_float(config, "target_bpw");
    uint64_t budget = aq_config_bool(config, "target_size_is_wish") ? 0 : aq_target_bytes(config);
    if (bpw > 0) {
        double bytes = bpw / 8 * (double)open_weights(problem, model) + (double)problem->other_bytes + (double)overheads(problem, model);
        uint64_t by_bits = (uint64_t)fmin(bytes, 1e18);
        if (budget == 0 || by_bits < budget) budget = by_bits;
    }
    return budget;
}

/* ---- the summary ---- */

static double relative_error(const planner *p) {
    double sum = 0, weights = 0;
    for (size_t i = 0; i < p->problem->n_items; i++) {
        const aq_plan_item *item = &p->problem->items[i];
        sum += item->weight * item->choices[p->choice[i]].error;
        weights += item->weight;
    }
    return weights > 0 ? sum / weights : 0;
}

/* Bits of codes and parameters over the weights of the layers in the plan; kept ones as they are stored. */
static double bits_per_weight(const planner *p) {
    double bits = 0, n = 0;
    for (size_t i = 0; i < p->problem->n_items; i++) {
        const aq_plan_choice *c = &p->problem->items[i].choices[p->choice[i]];
        const aq_tensor_info *t = aq_model_tensor(p->model, (size_t)aq_model_find(p->model, p->problem->items[i].name));
        uint64_t rows, cols;
        aq_quant_layout layout;
        aq_shape_matrix(&t->shape, &rows, &cols);
        if (c->bits == 16)
            bits += 8 * (double)t->size_bytes;
        else if (aq_quant_layout_init(&layout, &c->spec, rows, cols, NULL) == AQ_OK)
            bits += 8 * ((double)layout.codes_bytes + (double)layout.params_bytes);
        n += (double)t->count;
    }
    return n > 0 ? bits / n : (double)NAN;
}

static json_t *bits_counts(const planner *p) {
    json_t *counts = json_object();
    for (size_t i = 0; counts && i < p->problem->n_items; i++) {
        char key[16];
        int bits = p->problem->items[i].choices[p->choice[i]].bits;
        snprintf(key, sizeof key, "%d", bits);
        json_object_set_new(counts, bits == 16 ? "kept" : key, json_integer(json_integer_value(json_object_get(counts, bits == 16 ? "kept" : key)) + 1));
    }
    return counts;
}

static json_t *count_or_null(uint64_t value) { return value ? json_integer(value > INT64_MAX ? INT64_MAX : (json_int_t)value) : json_null(); }

/* A wish of the profile: reported as met or not. */
static json_t *wish_json(const planner *p, uint64_t bytes) {
    double target_mb = aq_config_float(p->config, "target_model_size_mb");
    if (!(target_mb > 0) || !aq_config_bool(p->config, "target_size_is_wish")) return json_null();
    return json_pack("{s:f, s:b}", "target_mb", target_mb, "met", bytes <= aq_target_bytes(p->config));
}

static aq_status set_summary(const planner *p, aq_plan *plan, aq_error *err) {
    const aq_plan_problem *problem = p->problem;
    uint64_t minimum, maximum, bytes = aq_plan_bytes(problem, p->choice);
    aq_plan_extremes(problem, &minimum, &maximum);
    double error = relative_error(p);
    json_t *json =
        json_pack("{s:o, s:I, s:o, s:o, s:I, s:I, s:I, s:I, s:o, s:o, s:o, s:o, s:b, s:s, s:s, s:I, s:I, s:o, s:o, s:o}", "model",
                  aq_report_text(aq_model_path(p->model)), "n_layers", (json_int_t)problem->n_items, "bits", bits_counts(p), "budget_bytes",
                  count_or_null(p->budget), "bytes", (json_int_t)bytes, "other_bytes", (json_int_t)problem->other_bytes, "minimum_bytes", (json_int_t)minimum,
                  "maximum_bytes", (json_int_t)maximum, "bits_per_weight", aq_report_real(bits_per_weight(p)), "estimated_error", aq_report_real(error),
                  "estimated_sqnr_db", aq_report_real(error > 0 ? -10 * log10(error) : (double)INFINITY), "objective",
                  aq_report_real(aq_plan_error(problem, p->choice)), "feasible", 1, "error_measure", problem->error_measure, "weighting", problem->weighting,
                  "sampled_rows", (json_int_t)problem->sampled_rows, "n_below_floor", (json_int_t)problem->n_below_floor, "wish", wish_json(p, bytes),
                  "evolution", p->options->evolution ? json_pack("{s:o}", "start_objective", aq_report_real(p->start_error)) : json_null(), "calibration",
                  aq_report_calibration(p->calib));
    char *text = json ? aq_json_dump(json, false) : NULL;
    json_decref(json);
    if (!text) return aq_fail_memory(err, 0, "the summary of a plan");
    aq_status status = aq_plan_set_summary(plan, text, err);
    free(text);
    return status;
}

/* ---- the whole ---- */

static bool allows(const planner *p, int least) {
    for (size_t i = 0; i < p->measure.n_bits; i++)
        if (p->bits[i] >= least) return true;
    return false;
}

static aq_status score(planner *p, aq_error *err) {
    if (!p->options->sensitivity) return AQ_OK;
    int method = aq_sensitivity_from_name(p->options->sensitivity);
    if (method < 0) return aq_fail(err, AQ_ERR_USAGE, "Invalid sensitivity method: %s. Must be gradient, hessian, or variance", p->options->sensitivity);
    size_t n = aq_model_n_tensors(p->model);
    if (!(p->scores = aq_calloc(n + 1, sizeof *p->scores))) return aq_fail_memory(err, n * sizeof *p->scores, "scores");
    aq_status status = aq_plan_sensitivity(p->model, &p->measure, (aq_sensitivity)method, p->scores, NULL, err);
    for (size_t i = 0; i < p->problem->n_items && status == AQ_OK; i++)
        p->problem->items[i].sensitivity = p->scores[aq_model_find(p->model, p->problem->items[i].name)];
    return status;
}

/* Why the smallest size is no smaller: what the codes alone take, at the fewest bits that each layer may have. */
static void explain(const aq_plan_problem *problem, const aq_model *model, aq_error *err) {
    uint64_t n_weights = open_weights(problem, model);
    double bits = 0;
    if (!err || n_weights == 0) return;
    for (size_t i = 0; i < problem->n_items; i++) {
        const aq_plan_item *item = &problem->items[i];
        int least = item->choices[0].bits;
        for (size_t c = 1; c < item->n_choices; c++) least = item->choices[c].bits < least ? item->choices[c].bits : least;
        bits += (double)least * (double)aq_model_tensor(model, (size_t)aq_model_find(model, item->name))->count;
    }
    size_t n = strlen(err->message);
    char each[32];
    snprintf(err->message + n, sizeof err->message - n, "; %" PRIu64 " weights at %s bits are %" PRIu64 " bytes before parameters", n_weights,
             aq_text_fixed(each, bits / (double)n_weights, 2), (uint64_t)(bits / 8));
}

static aq_status solve(planner *p, aq_plan **out, aq_error *err) {
    const aq_plan_problem *problem = p->problem;
    if (!(p->choice = aq_calloc(problem->n_items + 1, sizeof *p->choice))) return aq_fail_memory(err, problem->n_items * sizeof *p->choice, "a plan");
    p->problem->other_bytes += p->options->reserve_bytes;
    p->budget = aq_plan_budget(p->config, problem, p->model);
    aq_status status = aq_plan_choose(problem, p->budget, p->choice, NULL, err);
    if (status == AQ_ERR_BUDGET) explain(problem, p->model, err);
    p->start_error = status == AQ_OK ? aq_plan_error(problem, p->choice) : 0;
    if (status == AQ_OK && p->options->evolution) status = aq_plan_evolve(problem, p->budget, p->options->evolution, p->choice, NULL, NULL, err);
    if (status == AQ_OK) status = aq_plan_of_choice(out, problem, p->choice, err);
    if (status == AQ_OK) status = set_summary(p, *out, err);
    return status;
}

/* Sensitive layers have one candidate: as they are. */
static aq_status close_sensitive(planner *p, aq_error *err) {
    double *scores;
    aq_sensitivity method;
    aq_status status = aq_sensitive_scores(&scores, &method, p->model, p->calib, p->config, p->requests, err);
    for (size_t i = 0; scores && i < aq_model_n_tensors(p->model); i++) {
        if (!aq_is_sensitive(p->config, scores, i)) continue;
        p->requests[i].least_bits = 16;
        if (!allows(p, 16)) p->requests[i].open = AQ_PLAN_KEEP;
    }
    aq_free(scores);
    return status;
}

aq_status aq_plan_for(aq_plan **out, const aq_model *model, const aq_calib *calib, const aq_config *config, const aq_plan_job *options, aq_job *job,
                      aq_error *err) {
    aq_plan_job defaults = {0};
    planner p = {.model = model, .calib = calib, .config = config, .options = options ? options : &defaults, .job = job, .stage = "plan"};
    *out = NULL;
    aq_status status = read_settings(&p, err);
    bool names_decide = !allows(&p, LEAST_BITS_BY_NAME);
    if (status == AQ_OK) status = aq_plan_requests(&p.requests, config, model, names_decide, err);
    p.measure.requests = p.requests;
    if (status == AQ_OK) status = close_sensitive(&p, err);
    if (status == AQ_OK) status = aq_plan_measure(&p.problem, model, &p.measure, err);
    if (status == AQ_OK) status = score(&p, err);
    if (status == AQ_OK) status = solve(&p, out, err);
    if (status != AQ_OK) {
        aq_plan_free(*out);
        *out = NULL;
    }
    aq_plan_problem_free(p.problem);
    aq_free(p.choice);
    aq_free(p.scores);
    aq_free(p.requests);
    aq_free(p.weight_names);
    aq_free(p.weights);
    json_decref(p.weights_json);
    return status;
}

static void warn_idle(void *user, const char *sentence) { aq_job_log(user, AQ_LOG_WARNING, "%s", sentence); }

static void warn_missing(void *user, const char *name) {
    char shown[256];
    aq_job_log(user, AQ_LOG_WARNING, "the calibration has nothing about \"%s\": its error is that of its weights",
               aq_escape(shown, sizeof shown, name, strlen(name)));
}

static void warn_weak(void *user, const char *sentence) { aq_job_log(user, AQ_LOG_WARNING, "calibration: %s", sentence); }

/* The statistics that are named, else those that lie in the model's folder, where a run finds them too. */
static aq_status open_calibration(aq_calib **out, const char *path, const aq_model *model, aq_error *err) {
    if (path) return aq_calib_open(out, path, err);
    if (!aq_path_is_dir(aq_model_path(model))) return AQ_OK;
    char *found = aq_path_join(aq_model_root(model), "calibration.aqcal");
    if (!found) return aq_fail_memory(err, 0, "a path");
    aq_status status = aq_path_is_file(found) ? aq_calib_open(out, found, err) : AQ_OK;
    aq_free(found);
    return status;
}

aq_status aq_plan_open_inputs(const char *path, const aq_config *config, const aq_model_options *options, bool allow_unmatched, aq_job *job, aq_model **model,
                              aq_calib **calib, aq_error *err) {
    aq_model_options open = *options;
    const char *modality = aq_config_string(config, "modality"), *calibration = aq_config_string(config, "calibration_path");
    if (open.modality == AQ_MODALITY_UNKNOWN && modality) open.modality = aq_modality_from_name(modality);
    aq_status status = aq_config_validate(config, err);
    if (status == AQ_OK) aq_config_idle(config, warn_idle, job);
    if (status == AQ_OK) status = aq_source_open_model(model, path, &open, err);
    if (status == AQ_OK) status = aq_component_check(*model, path, &open, err);
    if (status == AQ_OK && !allow_unmatched) status = aq_config_check_patterns(config, *model, err);
    if (status == AQ_OK) status = open_calibration(calib, calibration, *model, err);
    if (status == AQ_OK && *calib) status = aq_calib_check(*calib, *model, warn_missing, job, err);
    if (status == AQ_OK && *calib) aq_calib_warnings(*calib, warn_weak, job);
    return status;
}

aq_status aq_plan_model(const char *model_path, const aq_config *config, const aq_plan_job *options, const aq_job_hooks *hooks, aq_plan **plan,
                        char **report_json, aq_error *err) {
    aq_plan_job defaults = {0};
    aq_model_options_init(&defaults.model);
    if (!options) options = &defaults;
    aq_config *own = config ? NULL : aq_config_create();
    aq_model *model = NULL;
    aq_calib *calib = NULL;
    aq_plan *made = NULL;
    aq_job job;
    if (plan) *plan = NULL;
    if (report_json) *report_json = NULL;
    aq_error_clear(err);
    if (!config && !own) return aq_fail_memory(err, 0, "the configuration");
    aq_job_init(&job, hooks, 0, 0);
    aq_status status = aq_job_tell(&job, "check", NULL, NULL, 0, 0, 0) ? AQ_OK : aq_job_cancelled(err, "nothing was done");
    if (status == AQ_OK) status = aq_plan_open_inputs(model_path, config ? config : own, &options->model, options->allow_unmatched, &job, &model, &calib, err);
    if (status == AQ_OK) {
        job.n_total = aq_model_n_tensors(model);
        status = aq_plan_for(&made, model, calib, config ? config : own, options, &job, err);
    }
    if (status == AQ_OK) status = aq_model_check_unchanged(model, err);
    if (status == AQ_OK && report_json && !(*report_json = aq_plan_to_json(made))) status = aq_fail_memory(err, 0, "a plan");
    if (status == AQ_OK) aq_job_tell(&job, "done", NULL, NULL, job.n_total, 0, 1);
    if (status == AQ_OK && plan)
        *plan = made;
    else
        aq_plan_free(made);
    aq_calib_free(calib);
    if (model) aq_model_close(model);
    aq_config_destroy(own);
    return status;
}
