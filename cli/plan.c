/* `arrowquant plan`: bits and groups for a budget, without writing a model. */
#include <arrowquant/pipeline.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

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

static void print_summary(const cli_args *args, const json_t *s) {
    uint64_t budget = cli_json_count(s, "budget_bytes");
    const json_t *counts = json_object_get(s, "bits"), *n;
    const char *bits;
    cli_print(stdout, "plan: %s", cli_size_both(cli_json_count(s, "bytes")));
    if (budget) cli_print(stdout, " of %s", cli_size(budget));
    cli_print(stdout, "  %.2f bit/weight ", cli_json_real(s, "bits_per_weight"));
    json_object_foreach((json_t *)(uintptr_t)counts, bits, n) {
        cli_print(stdout, " %lld %s%s", (long long)json_integer_value(n), strcmp(bits, "kept") == 0 ? "" : "at int", bits);
    }
    cli_print(stdout, "\nestimated error %s dB of the %s, weighted by %s", cli_decibel(cli_json_real(s, "estimated_sqnr_db")),
              cli_safe(cli_json_text(s, "error_measure")), cli_safe(cli_json_text(s, "weighting")));
    uint64_t rows = cli_json_count(s, "sampled_rows");
    if (rows) cli_print(stdout, ", on %llu rows of a layer", (unsigned long long)rows);
    cli_print(stdout, "; reachable: %s to %s\n", cli_size(cli_json_count(s, "minimum_bytes")), cli_size(cli_json_count(s, "maximum_bytes")));
    uint64_t below = cli_json_count(s, "n_below_floor");
    if (below) cli_print(stdout, "%llu layers stay below the accuracy floor at every allowed width: they get the best one\n", (unsigned long long)below);
    const json_t *wish = json_object_get(s, "wish");
    if (json_is_object(wish))
        cli_print(stdout, "the profile's size of %.0f MiB is %s\n", cli_json_real(wish, "target_mb"),
                  json_is_true(json_object_get(wish, "met")) ? "met" : "not met");
    const char *output = cli_args_value(args, "output");
    if (output)
        cli_print(stdout, "wrote %s\nnext: arrowquant quantize %s --plan %s\n", cli_safe(output), cli_shell_word(args->operands[0]), cli_shell_word(output));
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
    print_summary(args, json_object_get(report, "summary"));
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

int cli_run_plan(const cli_args *args) {
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
    if (status == AQ_OK) {
        cli_signals_catch_interrupts();
        status = aq_plan_model(args->operands[0], config, &options, cli_job_hooks(), &plan, &report, &err);
    }
    if (status == AQ_OK && output) aq_plan_save(plan, output, cli_args_has(args, "overwrite"), &err);
    aq_plan_free(plan);
    aq_config_destroy(config);
    return cli_job_end(args, &err, report, print_plan);
}
