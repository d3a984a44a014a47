/* `arrowquant plan`: bits and groups for a budget, without writing a model. */
#include <arrowquant/pipeline.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/draft.h"
#include "base/file.h"
#include "base/json.h"
#include "job.h"
#include "log.h"
#include "settings.h"
#include "signals.h"
#include "tensors.h"
#include "term.h"

static const char *const heading[] = {"tensor", "bits", "group", "params", "method", "size", "est. dB"};

static const char *text_or(const json_t *object, const char *key, const char *other) {
    const char *text = json_string_value(json_object_get(object, key));
    return text ? text : other;
}

static const char *group_text(const json_t *layer) {
    const json_t *group = json_object_get(layer, "group_size");
    size_t size;
    char *out = cli_buffer(&size);
    if (!json_is_integer(group)) return "-";
    if (json_integer_value(group) == 0) return "row";
    snprintf(out, size, "%lld", (long long)json_integer_value(group));
    return out;
}

static void print_layer(cli_table *table, const char *name, const json_t *layer) {
    json_int_t bits = json_integer_value(json_object_get(layer, "bits"));
    double error = cli_json_real(layer, "error");
    size_t size;
    char *count = cli_buffer(&size);
    snprintf(count, size, "%lld", (long long)bits);
    cli_table_row(table, (const char *const[]){cli_safe(name), bits == 16 ? "kept" : count, group_text(layer), text_or(layer, "params", "-"),
                                               text_or(layer, "method", "-"), cli_size(cli_json_count(layer, "size_bytes")),
                                               error > 0 ? cli_decibel(-10 * log10(error)) : "exact"});
}

static void print_summary(const json_t *s) {
    uint64_t budget = cli_json_count(s, "budget_bytes");
    const json_t *counts = json_object_get(s, "bits"), *n;
    bool synthetic = json_is_true(json_object_get(json_object_get(s, "calibration"), "synthetic"));
    const char *bits;
    cli_print(stdout, "plan: %s", cli_size_both(cli_json_count(s, "bytes")));
    if (budget) cli_print(stdout, " of %s", cli_size(budget));
    cli_print(stdout, "  %.2f bit/weight ", cli_json_real(s, "bits_per_weight"));
    json_object_foreach((json_t *)(uintptr_t)counts, bits, n) {
        cli_print(stdout, " %lld %s%s", (long long)json_integer_value(n), strcmp(bits, "kept") == 0 ? "" : "at int", bits);
    }
    cli_print(stdout, "\nestimated error %s dB of the %s%s, weighted by %s", cli_decibel(cli_json_real(s, "estimated_sqnr_db")),
              cli_safe(cli_json_text(s, "error_measure")), synthetic ? " of SYNTHETIC inputs" : "", cli_safe(cli_json_text(s, "weighting")));
    uint64_t rows = cli_json_count(s, "sampled_rows");
    if (rows) cli_print(stdout, ", on %llu rows of a layer", (unsigned long long)rows);
    cli_print(stdout, "; reachable: %s to %s\n", cli_size(cli_json_count(s, "minimum_bytes")), cli_size(cli_json_count(s, "maximum_bytes")));
    uint64_t below = cli_json_count(s, "n_below_floor");
    if (below) cli_print(stdout, "%llu layers stay below the accuracy floor at every allowed width: they get the best one\n", (unsigned long long)below);
    const json_t *wish = json_object_get(s, "wish");
    if (json_is_object(wish))
        cli_print(stdout, "the profile's size of %.0f MiB is %s\n", cli_json_real(wish, "target_mb"),
                  json_is_true(json_object_get(wish, "met")) ? "met" : "not met");
}

static void print_plan(const cli_args *args, const json_t *report) {
    enum { MOST_ROWS = 60 };
    const json_t *layers = json_object_get(report, "layers"), *layer;
    const char *name;
    size_t n = json_object_size(layers), i = 0;
    if (args->quiet) return;
    cli_table *table = cli_table_create("frrllrr");
    cli_table_row(table, heading);
    json_object_foreach((json_t *)(uintptr_t)layers, name, layer) {
        if (i++ < MOST_ROWS || args->verbose) print_layer(table, name, layer);
    }
    cli_table_print(table);
    if (n > MOST_ROWS && !args->verbose) cli_print(stdout, "... %zu more: -v shows all\n", n - MOST_ROWS);
    print_summary(json_object_get(report, "summary"));
}

static aq_status read_count(const cli_args *args, const char *option, uint64_t most, uint64_t *out, aq_error *err) {
    const char *text = cli_args_value(args, option);
    char source[32];
    if (!text) return AQ_OK;
    snprintf(source, sizeof source, "--%s", option);
    aq_status status = cli_parse_count(out, text, source, err);
    if (status == AQ_OK && *out > most) return aq_fail(err, AQ_ERR_USAGE, "%s: must be at most %llu", source, (unsigned long long)most);
    return status;
}

static bool tell_generation(void *user, uint32_t generation, double best, double mean, double worst, uint64_t n_evaluations) {
    (void)user;
    (void)worst;
    char text[160];
    snprintf(text, sizeof text, "generation %u: best %.6g, mean %.6g, %llu evaluations", generation, best, mean, (unsigned long long)n_evaluations);
    const aq_job_hooks *hooks = cli_job_hooks();
    if (hooks->log) hooks->log(hooks->user, AQ_LOG_INFO, text);
    return !cli_signal_received();
}

static aq_status read_options(aq_plan_job *out, aq_evolution *evolution, const cli_args *args, aq_error *err) {
    uint64_t generations = 0, population = 20, seed = 0;
    *out = (aq_plan_job){.allow_unmatched = cli_args_has(args, "allow-unmatched"),
                         .weights_path = cli_args_value(args, "layer-weights"),
                         .cache_dir = cli_args_value(args, "cache"),
                         .sensitivity = cli_args_value(args, "sensitivity")};
    aq_status status = cli_settings_model(&out->model, args, err);
    if (status == AQ_OK) status = read_count(args, "sample", UINT64_MAX - 1, &out->sample_values, err);
    if (status == AQ_OK && cli_args_has(args, "sample") && out->sample_values == 0) out->sample_values = UINT64_MAX;
    if (status == AQ_OK) status = read_count(args, "generations", 1000000, &generations, err);
    if (status == AQ_OK) status = read_count(args, "population", 100000, &population, err);
    if (status == AQ_OK) status = read_count(args, "seed", UINT64_MAX, &seed, err);
    aq_evolution_init(evolution);
    evolution->generations = (uint32_t)generations;
    evolution->population = (uint32_t)population;
    evolution->max_evaluations = 0;
    evolution->seed = seed;
    evolution->generation = tell_generation;
    if (generations) out->evolution = evolution;
    return status;
}

/* ---- group sizes at one width ---- */

typedef struct {
    const char *name;
    double score;
    const json_t *layer;
} scored;

static int by_falling_score(const void *a, const void *b) {
    const scored *p = a, *q = b;
    if (p->score != q->score) return p->score > q->score ? -1 : 1;
    return strcmp(p->name, q->name);
}

static void print_most_sensitive(const json_t *layers) {
    enum { MOST = 10 };
    size_t n = json_object_size(layers), i = 0;
    scored *all = n ? calloc(n, sizeof *all) : NULL;
    const char *name;
    json_t *layer;
    if (!all) return;
    json_object_foreach((json_t *)(uintptr_t)layers, name, layer) all[i++] = (scored){name, cli_json_real(layer, "sensitivity"), layer};
    qsort(all, n, sizeof *all, by_falling_score);
    cli_print(stdout, "most sensitive layers:\n");
    cli_table *table = cli_table_create("frrrr");
    cli_table_row(table, (const char *const[]){"tensor", "sensitivity", "group", "est. accuracy", "est. compression"});
    for (i = 0; i < n && i < MOST; i++) {
        size_t size;
        char *text[4];
        for (int k = 0; k < 4; k++) text[k] = cli_buffer(&size);
        snprintf(text[0], size, "%.3f", all[i].score);
        snprintf(text[1], size, "%llu", (unsigned long long)cli_json_count(all[i].layer, "group_size"));
        snprintf(text[2], size, "%.3f", cli_json_real(all[i].layer, "estimated_accuracy"));
        snprintf(text[3], size, "%.2f", cli_json_real(all[i].layer, "estimated_compression"));
        cli_table_row(table, (const char *const[]){cli_safe(all[i].name), text[0], text[1], text[2], text[3]});
    }
    cli_table_print(table);
    free(all);
}

static void print_groups(const cli_args *args, const json_t *report) {
    const json_t *s = json_object_get(report, "summary"), *count;
    const char *size;
    if (args->quiet) return;
    cli_print(stdout, "%lld layers at int%lld, sensitivity by %s\n", (long long)cli_json_count(s, "num_layers"), (long long)cli_json_count(s, "bit_width"),
              cli_safe(cli_json_text(s, "sensitivity_method")));
    cli_print(stdout, "average accuracy %.3f (estimated; measured %.4f on the weights, the estimate is off by %+.3f)\n", cli_json_real(s, "avg_accuracy"),
              cli_json_real(s, "measured_accuracy"), cli_json_real(s, "estimate_error"));
    cli_print(stdout, "average compression %.2f (estimated, against F32 with F32 parameters; target %.2f)\ngroup sizes:", cli_json_real(s, "avg_compression"),
              cli_json_real(s, "target_compression"));
    json_object_foreach(json_object_get(s, "group_sizes"), size, count) { cli_print(stdout, "  %s: %lld layers", size, (long long)json_integer_value(count)); }
    cli_print(stdout, "\n");
    print_most_sensitive(json_object_get(report, "layers"));
}

/* The JSON of the tool as it is, for those who read its keys. */
static aq_status save_groups(const char *path, const char *report, bool overwrite, aq_error *err) {
    aq_status status = aq_draft_check(path, overwrite, err);
    if (status != AQ_OK) return status;
    json_t *json = json_loads(report, 0, NULL);
    char *text = json ? aq_json_dump(json, true) : NULL;
    json_decref(json);
    status = text ? aq_file_write(path, text, strlen(text), err) : aq_fail_memory(err, strlen(report), "the allocation");
    free(text);
    return status;
}

static aq_status read_ratio(const cli_args *args, const char *option, double *out, aq_error *err) {
    const char *text = cli_args_value(args, option);
    if (!text) return AQ_OK;
    json_t *number = json_loads(text, JSON_DECODE_ANY, NULL); /* digits with a point, in every locale */
    bool ok = json_is_number(number);
    if (ok) *out = json_number_value(number);
    json_decref(number);
    return ok ? AQ_OK : aq_fail(err, AQ_ERR_USAGE, "--%s: invalid number \"%s\"", option, cli_safe(text));
}

static bool has_setting(const cli_args *args, const char *field) {
    for (size_t i = 0; i < args->n_settings; i++)
        if (args->settings[i].option->field && strcmp(args->settings[i].option->field, field) == 0) return true;
    return false;
}

static int run_groups(const cli_args *args) {
    aq_error err;
    aq_error_clear(&err);
    aq_config *config = NULL;
    char *report = NULL;
    const char *output = cli_args_value(args, "output");
    aq_granularity_job options;
    aq_granularity_init(&options);
    options.sensitivity = cli_args_value(args, "sensitivity");
    options.allow_unmatched = cli_args_has(args, "allow-unmatched");
    aq_status status = cli_settings_model(&options.model, args, &err);
    if (status == AQ_OK) status = read_ratio(args, "target-compression", &options.target_compression, &err);
    if (status == AQ_OK) status = read_ratio(args, "accuracy-weight", &options.accuracy_weight, &err);
    if (status == AQ_OK) status = read_count(args, "sample", UINT64_MAX, &options.sample_values, &err);
    if (status == AQ_OK) status = cli_settings_config(&config, args, &err);
    if (status == AQ_OK && output) status = aq_draft_check(output, cli_args_has(args, "overwrite"), &err);
    if (status == AQ_OK) {
        if (has_setting(args, "min_accuracy")) options.min_accuracy = aq_config_float(config, "min_accuracy");
        cli_signals_catch_interrupts();
        status = aq_granularity(args->operands[0], config, &options, cli_job_hooks(), &report, &err);
    }
    if (status == AQ_OK && output) save_groups(output, report, cli_args_has(args, "overwrite"), &err);
    aq_config_destroy(config);
    int code = cli_job_end(args, &err, report, print_groups);
    if (code == AQ_OK && output && !args->json && !args->quiet) cli_print(stdout, "wrote %s\n", cli_safe(output));
    return code;
}

/* ---- both ---- */

int cli_run_plan(const cli_args *args) {
    if (cli_args_has(args, "target-compression") || cli_args_has(args, "accuracy-weight")) return run_groups(args);
    aq_error err;
    aq_error_clear(&err);
    aq_plan_job options;
    aq_evolution evolution;
    aq_config *config = NULL;
    aq_plan *plan = NULL;
    char *report = NULL;
    const char *output = cli_args_value(args, "output");
    aq_status status = read_options(&options, &evolution, args, &err);
    if (status == AQ_OK) status = cli_settings_config(&config, args, &err);
    if (status == AQ_OK && output) status = aq_draft_check(output, cli_args_has(args, "overwrite"), &err);
    if (status == AQ_OK) {
        cli_signals_catch_interrupts();
        status = aq_plan_model(args->operands[0], config, &options, cli_job_hooks(), &plan, &report, &err);
    }
    if (status == AQ_OK && output) aq_plan_save(plan, output, cli_args_has(args, "overwrite"), &err);
    aq_plan_free(plan);
    aq_config_destroy(config);
    int code = cli_job_end(args, &err, report, print_plan);
    if (code == AQ_OK && output && !args->json && !args->quiet)
        cli_print(stdout, "wrote %s\nnext: arrowquant quantize %s --plan %s\n", cli_safe(output), cli_shell_word(args->operands[0]), cli_shell_word(output));
    return code;
}
