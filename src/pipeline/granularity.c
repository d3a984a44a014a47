/* Group sizes per layer at one bit width: allocation by sensitivity, and evolutionary search (python-api 7; algorithms 7). */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/error.h"
#include "base/json.h"
#include "base/mem.h"
#include "pipeline/planning.h"
#include "pipeline/report.h"

static const uint64_t usual_sizes[] = {32, 64, 128, 256};
enum { MOST_SIZES = 8, BITS_F32 = 32, PARAMETER_BITS = 64 };

void aq_granularity_init(aq_granularity_job *job) {
    *job = (aq_granularity_job){.target_compression = 10, .min_accuracy = 0.70, .accuracy_weight = 0.7};
    aq_model_options_init(&job->model);
}

uint64_t aq_granularity_recommend(double score, const uint64_t *sizes, size_t n_sizes) {
    uint64_t wanted = score >= 0.75 ? 32 : score >= 0.5 ? 64 : score >= 0.25 ? 128 : 256, best = sizes[0];
    for (size_t i = 0; i < n_sizes; i++)
        if (sizes[i] <= wanted) best = sizes[i];
    return best;
}

double aq_granularity_impact(double score, uint64_t group_size) {
    double loss = 0.15 * score * log2((double)group_size / 16);
    return loss < 0 ? 0 : loss > 1 ? 1 : loss;
}

double aq_granularity_compression(uint64_t group_size, int bits) { return BITS_F32 / (bits + (double)PARAMETER_BITS / (double)group_size); }

/* One call. */
typedef struct {
    const aq_config *config;
    const aq_granularity_job *options;
    aq_model *model;
    aq_calib *calib;
    aq_job job;
    uint64_t sizes[MOST_SIZES]; /* rising, without repeats */
    size_t n_sizes;
    int bits;
    aq_plan_request *requests;
    double *scores; /* [n_tensors] */
    aq_plan_options measure;
    aq_plan_problem *problem;
    json_t *history;
    const char *metric;
    double source_bytes;
} allocator;

/* ---- opening ---- */

static int rising(const void *a, const void *b) {
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return x < y ? -1 : x > y;
}

static aq_status read_sizes(allocator *a, aq_error *err) {
    const uint64_t *given = a->options->group_sizes ? a->options->group_sizes : usual_sizes;
    size_t n = a->options->group_sizes ? a->options->n_group_sizes : 4;
    if (n == 0 || n > MOST_SIZES) return aq_fail(err, AQ_ERR_USAGE, "available group sizes: give between 1 and %d", MOST_SIZES);
    memcpy(a->sizes, given, n * sizeof *given);
    qsort(a->sizes, n, sizeof *a->sizes, rising);
    for (size_t i = 0; i < n; i++) {
        uint64_t size = a->sizes[i];
        if (size != 32 && size != 64 && size != 128 && size != 256)
            return aq_fail(err, AQ_ERR_USAGE, "Invalid group size: %llu. Must be 32, 64, 128, or 256", (unsigned long long)size);
        if (a->n_sizes == 0 || size != a->sizes[a->n_sizes - 1]) a->sizes[a->n_sizes++] = size;
    }
    return AQ_OK;
}

static aq_status check_options(const aq_granularity_job *o, aq_error *err) {
    if (!(o->min_accuracy >= 0 && o->min_accuracy <= 1)) return aq_fail(err, AQ_ERR_USAGE, "Invalid min_accuracy. Must be between 0.0 and 1.0");
    if (!(o->accuracy_weight >= 0 && o->accuracy_weight <= 1)) return aq_fail(err, AQ_ERR_USAGE, "Invalid accuracy_weight. Must be between 0.0 and 1.0");
    if (!(o->target_compression > 0) || isinf(o->target_compression)) return aq_fail(err, AQ_ERR_USAGE, "Invalid target_compression_ratio. Must be above 0");
    return AQ_OK;
}

static bool same_layer(const char *given, const char *tensor) {
    size_t n = strlen(given);
    return strncmp(given, tensor, n) == 0 && (tensor[n] == 0 || strcmp(tensor + n, ".weight") == 0);
}

/* Only the layers that were asked for stay open; one that is not there is an error. */
static aq_status restrict_layers(allocator *a, aq_error *err) {
    const aq_granularity_job *o = a->options;
    size_t n = aq_model_n_tensors(a->model);
    for (size_t k = 0; o->layers && k < o->n_layers; k++) {
        bool found = false;
        for (size_t i = 0; i < n && !found; i++) found = same_layer(o->layers[k], aq_model_tensor(a->model, i)->name) && a->requests[i].open != AQ_PLAN_KEEP;
        if (!found) return aq_fail_at(err, AQ_ERR_USAGE, NULL, o->layers[k], "is not among the layers that would be quantized");
    }
    for (size_t i = 0; i < n; i++) {
        bool wanted = !o->layers;
        for (size_t k = 0; o->layers && k < o->n_layers && !wanted; k++) wanted = same_layer(o->layers[k], aq_model_tensor(a->model, i)->name);
        if (a->requests[i].open == AQ_PLAN_FIXED) a->requests[i] = (aq_plan_request){.open = AQ_PLAN_OPEN, .spec = a->requests[i].spec};
        if (!wanted) a->requests[i].open = AQ_PLAN_KEEP;
    }
    return AQ_OK;
}

static bool progress(void *user, const char *name, size_t n_done, size_t n_total) {
    allocator *a = user;
    a->job.n_total = n_total;
    return aq_job_tell(&a->job, "plan", name, NULL, n_done, 0, n_total ? 0.9 * (double)n_done / (double)n_total : 0.9);
}

/* The only form that has every width and size. */
static void keep_plain_forms(aq_plan_problem *p) {
    for (size_t i = 0; i < p->n_items; i++) {
        aq_plan_item *item = &p->items[i];
        size_t n = 0;
        for (size_t c = 0; c < item->n_choices; c++)
            if (item->choices[c].spec.params == AQ_PARAMS_F16 || item->choices[c].spec.params == AQ_PARAMS_F32) item->choices[n++] = item->choices[c];
        item->n_choices = n;
    }
}

static aq_status open_all(allocator *a, const char *path, aq_error *err) {
    aq_status status = check_options(a->options, err);
    if (status == AQ_OK) status = read_sizes(a, err);
    if (status == AQ_OK) status = aq_plan_open_inputs(path, a->config, &a->options->model, a->options->allow_unmatched, &a->job, &a->model, &a->calib, err);
    if (status == AQ_OK) status = aq_plan_requests(&a->requests, a->config, a->model, true, err);
    if (status == AQ_OK) status = restrict_layers(a, err);
    if (status != AQ_OK) return status;
    a->bits = (int)aq_config_int(a->config, "bit_width", 4);
    aq_plan_options_from(&a->measure, a->config, a->calib);
    a->measure.requests = a->requests;
    a->measure.bits = &a->bits;
    a->measure.n_bits = 1;
    a->measure.groups = a->sizes;
    a->measure.n_groups = a->n_sizes;
    a->measure.min_cosine = 0;
    a->measure.progress = progress;
    a->measure.user = a;
    if (a->options->sample_values) a->measure.sample_values = a->options->sample_values;
    return AQ_OK;
}

static aq_status measure(allocator *a, aq_error *err) {
    aq_status status = aq_plan_measure(&a->problem, a->model, &a->measure, err);
    if (status != AQ_OK) return status;
    keep_plain_forms(a->problem);
    return a->problem->n_items ? AQ_OK : aq_fail(err, AQ_ERR_USAGE, "the model has no layer that would be quantized");
}

static void close_all(allocator *a) {
    aq_plan_problem_free(a->problem);
    aq_free(a->requests);
    aq_free(a->scores);
    aq_calib_free(a->calib);
    if (a->model) aq_model_close(a->model);
    json_decref(a->history);
}

/* The candidate that stands for a size: a longer group than the row is the row, of which the shortest one was tried. */
static size_t choice_of_size(const aq_plan_item *item, uint64_t size) {
    size_t best = 0;
    for (size_t c = 1; c < item->n_choices; c++) {
        uint64_t g = item->choices[c].spec.group_size, now = item->choices[best].spec.group_size;
        if (g <= size && (g > now || now > size)) best = c;
    }
    return best;
}

/* ---- allocation ---- */

static uint64_t best_size(const allocator *a, double score, bool *found) {
    const aq_granularity_job *o = a->options;
    double best = 0;
    uint64_t size = a->sizes[0];
    *found = false;
    for (size_t i = 0; i < a->n_sizes; i++) {
        double accuracy = 1 - aq_granularity_impact(score, a->sizes[i]), compression = aq_granularity_compression(a->sizes[i], a->bits) / o->target_compression;
        double value = accuracy * o->accuracy_weight + compression * (1 - o->accuracy_weight);
        if (accuracy < o->min_accuracy || (*found && value <= best)) continue;
        best = value;
        size = a->sizes[i];
        *found = true;
    }
    return size;
}

typedef struct {
    double accuracy, compression, measured, n;
    json_t *sizes;
} totals;

static json_t *layer_json(const allocator *a, const aq_plan_item *item, double score, uint64_t size, totals *sum) {
    double accuracy = 1 - aq_granularity_impact(score, size), compression = aq_granularity_compression(size, a->bits);
    double measured = item->choices[choice_of_size(item, size)].cosine;
    char key[16];
    snprintf(key, sizeof key, "%llu", (unsigned long long)size);
    json_object_set_new(sum->sizes, key, json_integer(json_integer_value(json_object_get(sum->sizes, key)) + 1));
    sum->accuracy += accuracy;
    sum->compression += compression;
    sum->measured += measured;
    sum->n += 1;
    return json_pack("{s:f, s:I, s:I, s:f, s:f, s:o}", "sensitivity", score, "group_size", (json_int_t)size, "recommended_group_size",
                     (json_int_t)aq_granularity_recommend(score, a->sizes, a->n_sizes), "estimated_accuracy", accuracy, "estimated_compression", compression,
                     "measured_accuracy", aq_report_real(measured));
}

static aq_status allocate(allocator *a, char **report_json, aq_error *err) {
    const aq_granularity_job *o = a->options;
    const char *method = o->sensitivity ? o->sensitivity : "gradient";
    totals sum = {.sizes = json_object()};
    json_t *layers = json_object();
    aq_status status = layers && sum.sizes ? AQ_OK : aq_fail_memory(err, 0, "the report");
    for (size_t i = 0; i < a->n_sizes && status == AQ_OK; i++) { /* in rising order */
        char key[16];
        snprintf(key, sizeof key, "%llu", (unsigned long long)a->sizes[i]);
        json_object_set_new(sum.sizes, key, json_integer(0));
    }
    for (size_t i = 0; i < a->problem->n_items && status == AQ_OK; i++) {
        const aq_plan_item *item = &a->problem->items[i];
        bool found;
        double score = a->scores[aq_model_find(a->model, item->name)];
        uint64_t size = best_size(a, score, &found);
        if (!found) {
            status = aq_fail_at(err, AQ_ERR_QUALITY, NULL, item->name,
                                "no available group size keeps its estimated accuracy at %.3g: the smallest, %llu, gives %.3g (sensitivity %.3g)",
                                o->min_accuracy, (unsigned long long)size, 1 - aq_granularity_impact(score, size), score);
            aq_hint(err, "lower --min-accuracy, or make smaller group sizes available");
        } else if (json_object_set_new(layers, item->name, layer_json(a, item, score, size, &sum)) != 0) {
            status = aq_fail_memory(err, 0, "the report");
        }
    }
    double n = sum.n > 0 ? sum.n : 1;
    if (status == AQ_OK) {
        json_t *report = json_pack("{s:O, s:{s:I, s:f, s:f, s:f, s:f, s:f, s:i, s:s, s:f, s:f, s:O, s:I}}", "layers", layers, "summary", "num_layers",
                                   (json_int_t)sum.n, "avg_accuracy", sum.accuracy / n, "avg_compression", sum.compression / n, "min_accuracy", o->min_accuracy,
                                   "target_compression", o->target_compression, "accuracy_weight", o->accuracy_weight, "bit_width", a->bits,
                                   "sensitivity_method", method, "measured_accuracy", sum.measured / n, "estimate_error", (sum.accuracy - sum.measured) / n,
                                   "group_sizes", sum.sizes, "sampled_rows", (json_int_t)a->problem->sampled_rows);
        status = aq_report_finish(report, report_json, err);
    }
    json_decref(layers);
    json_decref(sum.sizes);
    return status;
}

aq_status aq_granularity(const char *model_path, const aq_config *config, const aq_granularity_job *options, const aq_job_hooks *hooks, char **report_json,
                         aq_error *err) {
    allocator a = {.config = config, .options = options};
    const char *word = options->sensitivity ? options->sensitivity : "gradient";
    int method = aq_sensitivity_from_name(word);
    *report_json = NULL;
    aq_error_clear(err);
    if (method < 0) {
        char shown[64];
        return aq_fail(err, AQ_ERR_USAGE, "Invalid sensitivity method: %s. Must be gradient, hessian, or variance",
                       aq_escape(shown, sizeof shown, word, strlen(word)));
    }
    aq_job_init(&a.job, hooks, 0, 0);
    aq_status status = open_all(&a, model_path, err);
    if (status == AQ_OK && !(a.scores = aq_calloc(aq_model_n_tensors(a.model) + 1, sizeof *a.scores))) status = aq_fail_memory(err, 0, "scores");
    if (status == AQ_OK) status = aq_plan_sensitivity(a.model, &a.measure, (aq_sensitivity)method, a.scores, NULL, err);
    if (status == AQ_OK) status = measure(&a, err);
    if (status == AQ_OK) status = allocate(&a, report_json, err);
    if (status == AQ_OK) aq_job_tell(&a.job, "done", NULL, NULL, a.job.n_total, 0, 1);
    close_all(&a);
    return status;
}

/* ---- evolution ---- */

typedef struct {
    double cosine, compression;
} metrics;

static metrics metrics_of(const allocator *a, const size_t *choice) {
    double cosine = 0, weights = 0, bytes = 0;
    for (size_t i = 0; i < a->problem->n_items; i++) {
        const aq_plan_item *item = &a->problem->items[i];
        double n = (double)aq_model_tensor(a->model, (size_t)aq_model_find(a->model, item->name))->count;
        cosine += n * item->choices[choice[i]].cosine;
        weights += n;
        bytes += (double)item->choices[choice[i]].bytes;
    }
    return (metrics){weights > 0 ? cosine / weights : 1, bytes > 0 ? a->source_bytes / bytes : 1};
}

/* Higher is better. */
static double value_of(const allocator *a, metrics m) {
    if (strcmp(a->metric, "compression_ratio") == 0) return m.compression;
    if (strcmp(a->metric, "balanced") == 0) return (m.cosine + fmin(1, m.compression / a->options->target_compression)) / 2;
    return m.cosine;
}

static bool fitness(void *user, const aq_plan_problem *problem, const size_t *choice, double *out) {
    (void)problem;
    const allocator *a = user;
    *out = -value_of(a, metrics_of(a, choice));
    return true;
}

static bool generation(void *user, uint32_t number, double best, double mean, double worst, uint64_t n_evaluations) {
    allocator *a = user;
    (void)n_evaluations;
    json_t *entry = json_pack("{s:i, s:f, s:f, s:f}", "generation", (int)number, "best_fitness", -best, "avg_fitness", -mean, "worst_fitness", -worst);
    char text[128], shown[32];
    snprintf(text, sizeof text, "generation %u: best %s", number, aq_text_fixed(shown, -best, 6));
    aq_job_log(&a->job, AQ_LOG_INFO, "%s", text);
    return json_array_append_new(a->history, entry) == 0 && aq_job_tell(&a->job, "evolve", NULL, text, number, 0, 0.95);
}

/* Sizes for the layers that were asked for; other layers begin with the largest. */
static void start_from(const allocator *a, const uint64_t *sizes, size_t *choice) {
    for (size_t i = 0; i < a->problem->n_items; i++) {
        const aq_plan_item *item = &a->problem->items[i];
        uint64_t size = a->sizes[a->n_sizes - 1];
        for (size_t k = 0; k < a->options->n_layers; k++)
            if (same_layer(a->options->layers[k], item->name)) size = sizes[k];
        choice[i] = choice_of_size(item, size);
    }
}

static aq_status evolve(allocator *a, const aq_evolution *evolution, const uint64_t *start, char **report_json, aq_error *err) {
    const aq_plan_problem *p = a->problem;
    size_t *choice = aq_calloc(p->n_items + 1, sizeof *choice);
    if (!choice) return aq_fail_memory(err, p->n_items * sizeof *choice, "a plan");
    for (size_t i = 0; i < p->n_items; i++) a->source_bytes += (double)aq_model_tensor(a->model, (size_t)aq_model_find(a->model, p->items[i].name))->size_bytes;
    uint64_t budget = aq_plan_budget(a->config, p, a->model), minimum, maximum;
    aq_plan_extremes(p, &minimum, &maximum);
    aq_status status = AQ_OK;
    if (start)
        start_from(a, start, choice);
    else
        status = aq_plan_choose(p, budget || strcmp(a->metric, "compression_ratio") != 0 ? budget : minimum, choice, NULL, err);
    aq_evolution e = *evolution;
    e.fitness = fitness;
    e.generation = generation;
    e.user = a;
    if (status == AQ_OK && budget && aq_plan_bytes(p, choice) > budget) status = aq_plan_choose(p, budget, choice, NULL, err);
    uint64_t n_evaluations = 0;
    if (status == AQ_OK) status = aq_plan_evolve(p, budget, &e, choice, NULL, &n_evaluations, err);
    if (status == AQ_OK) {
        json_t *sizes = json_object();
        for (size_t i = 0; sizes && i < p->n_items; i++)
            json_object_set_new(sizes, p->items[i].name, json_integer((json_int_t)p->items[i].choices[choice[i]].spec.group_size));
        metrics m = metrics_of(a, choice);
        json_t *report = json_pack("{s:{s:o, s:f, s:{s:f, s:f}}, s:O, s:I, s:s, s:i}", "best", "layer_group_sizes", sizes, "fitness", value_of(a, m), "metrics",
                                   "cosine_similarity", m.cosine, "compression_ratio", m.compression, "generation_history", a->history, "total_evaluations",
                                   (json_int_t)n_evaluations, "target_metric", a->metric, "bit_width", a->bits);
        status = aq_report_finish(report, report_json, err);
    }
    aq_free(choice);
    return status;
}

aq_status aq_evolve_groups(const char *model_path, const aq_config *config, const aq_granularity_job *options, const aq_evolution *evolution,
                           const char *metric, const uint64_t *start, const aq_job_hooks *hooks, char **report_json, aq_error *err) {
    static const char *const known[] = {"cosine_similarity", "accuracy", "compression_ratio", "balanced"};
    allocator a = {.config = config, .options = options};
    *report_json = NULL;
    aq_error_clear(err);
    for (size_t i = 0; i < 4; i++)
        if (strcmp(metric, known[i]) == 0) a.metric = known[i];
    if (!a.metric) {
        char shown[64];
        return aq_fail(err, AQ_ERR_USAGE, "Invalid target_metric: %s. Must be cosine_similarity, accuracy, compression_ratio, or balanced",
                       aq_escape(shown, sizeof shown, metric, strlen(metric)));
    }
    aq_job_init(&a.job, hooks, 0, 0);
    a.history = json_array();
    aq_status status = a.history ? open_all(&a, model_path, err) : aq_fail_memory(err, 0, "the report");
    if (status == AQ_OK) status = measure(&a, err);
    if (status == AQ_OK) status = evolve(&a, evolution, start, report_json, err);
    if (status == AQ_OK) aq_job_tell(&a.job, "done", NULL, NULL, a.job.n_total, 0, 1);
    close_all(&a);
    return status;
}
