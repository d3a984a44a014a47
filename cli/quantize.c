/* `arrowquant quantize`. */
#include <arrowquant/pipeline.h>
#include <math.h>
#include <string.h>

#include "base/mem.h"
#include "export.h"
#include "job.h"
#include "log.h"
#include "settings.h"
#include "signals.h"
#include "term.h"

enum { MOST_REASONS = 8 };

/* "kept 12 tensors (34.5 kB): 10 fewer than two dimensions, 2 time, position or class embedding" */
static void print_kept(const json_t *kept) {
    const char *reasons[MOST_REASONS];
    size_t counts[MOST_REASONS] = {0}, n_reasons = 0, others = 0, i;
    uint64_t bytes = 0;
    const json_t *tensor;
    if (json_array_size(kept) == 0) return;
    json_array_foreach(kept, i, tensor) {
        const char *reason = cli_json_text(tensor, "reason");
        size_t at = 0;
        bytes += cli_json_count(tensor, "bytes");
        while (at < n_reasons && strcmp(reasons[at], reason) != 0) at++;
        if (at == MOST_REASONS) {
            others++;
            continue;
        }
        if (at == n_reasons) reasons[n_reasons++] = reason;
        counts[at]++;
    }
    cli_print(stdout, "kept %zu tensor%s (%s):", json_array_size(kept), json_array_size(kept) == 1 ? "" : "s", cli_size(bytes));
    for (size_t at = 0; at < n_reasons; at++) cli_print(stdout, "%s %zu %s", at ? ";" : "", counts[at], cli_safe(reasons[at]));
    if (others) cli_print(stdout, "; %zu for other reasons", others);
    cli_print(stdout, "\n");
}

/* "plan: estimated errors were off by 0.05 dB on average, at most 0.41 dB (blocks.0.attn.to_q.weight: 33.1 dB, measured 32.7)" */
static void print_estimates(const json_t *estimates) {
    if (!json_is_object(estimates)) return;
    const json_t *worst = json_object_get(estimates, "worst");
    double estimated = cli_json_real(worst, "estimated_db"), measured = cli_json_real(worst, "measured_db");
    cli_print(stdout, "plan: estimated errors of %llu layers were off by %.2f dB on average, at most by %.2f dB (%s: %.1f dB, measured %.1f)\n",
              (unsigned long long)cli_json_count(estimates, "n_layers"), cli_json_real(estimates, "mean_off_db"), fabs(estimated - measured),
              cli_safe(cli_json_text(worst, "name")), estimated, measured);
}

static void print_report(const cli_args *args, const json_t *report) {
    if (args->quiet) return;
    const json_t *output = json_object_get(report, "output"), *summary = json_object_get(report, "summary"), *worst = json_object_get(summary, "worst");
    const char *path = cli_json_text(output, "path");
    size_t n_warnings = json_array_size(json_object_get(report, "warnings")), n = strlen(path);
    print_kept(json_object_get(report, "kept"));
    print_estimates(json_object_get(report, "estimates"));
    cli_print(stdout, "%swrote %s%s%s  %s", cli_color_on(stdout, COLOR_GREEN), cli_safe(path), n && path[n - 1] == '/' ? "" : "/", cli_color_off(stdout),
              cli_size_both(cli_json_count(output, "size_bytes")));
    double bits = cli_json_real(summary, "bits_per_weight");
    if (!isnan(bits)) cli_print(stdout, "  %.2f bit/weight", bits);
    cli_print(stdout, "  %s", json_is_true(json_object_get(summary, "verified")) ? "verified" : "not verified");
    if (worst && !json_is_null(worst))
        cli_print(stdout, "  cos %s (worst %s %s)", cli_cosine(cli_json_real(summary, "cosine")), cli_cosine(cli_json_real(worst, "cosine")),
                  cli_safe(cli_json_text(worst, "name")));
    double output_db = cli_json_real(summary, "output_sqnr_db");
    if (!isnan(output_db)) cli_print(stdout, "  outputs %s dB", cli_decibel(output_db));
    if (n_warnings) cli_print(stdout, "  %s%zu warning%s%s", cli_color_on(stdout, COLOR_YELLOW), n_warnings, n_warnings == 1 ? "" : "s", cli_color_off(stdout));
    if (json_object_get(report, "export")) {
        cli_print(stdout, "\n");
        cli_print_export(args, json_object_get(report, "export"));
    } else {
        cli_print(stdout, "\nnext: arrowquant export %s --to gguf\n", cli_shell_word(path));
    }
}

static aq_status read_options(aq_quantize_options *out, const cli_args *args, aq_error *err) {
    *out = (aq_quantize_options){
        .overwrite = cli_args_has(args, "overwrite"),
        .make_parents = cli_args_has(args, "mkdir"),
        .restart = cli_args_has(args, "restart"),
        .no_verify = cli_args_has(args, "no-verify"),
        .strict = cli_args_has(args, "strict"),
        .allow_unmatched = cli_args_has(args, "allow-unmatched"),
        .no_side_files = cli_args_has(args, "no-side-files"),
    };
    aq_status status = cli_settings_model(&out->model, args, err);
    return status == AQ_OK ? cli_settings_shards(&out->shard_bytes, args, err) : status;
}

/* --report FILE: the page about what was just written. */
static void write_page(const cli_args *args, const aq_config *config, const aq_quantize_options *options, const char *report, aq_error *err) {
    json_t *done = json_loads(report, 0, NULL);
    aq_page_options page = {.against = args->operands[0],
                            .calib = aq_config_string(config, "calibration_path"),
                            .model = options->model,
                            .overwrite = options->overwrite,
                            .n_threads = (int)aq_config_int(config, "num_threads", 0)};
    if (done) aq_write_page(cli_json_text(json_object_get(done, "output"), "path"), cli_args_value(args, "report"), &page, cli_job_hooks(), NULL, err);
    json_decref(done);
}

/* --to FORMAT: an export beside the container that was just written; its report joins the other under "export". Layers whose codes do not fit the format are
 * coded from the source. */
static aq_status export_too(const cli_args *args, const aq_config *config, const aq_quantize_options *options, char **report, aq_error *err) {
    json_t *done = json_loads(*report, 0, NULL);
    const char *container = cli_json_text(json_object_get(done, "output"), "path");
    aq_export_options to = {.to = cli_args_value(args, "to"),
                            .type = cli_args_value(args, "type"),
                            .source = strcmp(cli_args_value(args, "to"), "safetensors") == 0 ? NULL : args->operands[0],
                            .model = &options->model,
                            .overwrite = options->overwrite,
                            .shard_bytes = options->shard_bytes,
                            .n_threads = (int)aq_config_int(config, "num_threads", 0)};
    char *out = done ? cli_export_path(container, to.to) : NULL, *text = NULL;
    aq_status status = out ? aq_export(container, out, &to, cli_job_hooks(), &text, err) : aq_fail_memory(err, strlen(*report), "a report");
    json_t *exported = text ? json_loads(text, 0, NULL) : NULL;
    if (exported && json_object_set_new(done, "export", exported) == 0) {
        aq_text_free(*report);
        *report = json_dumps(done, JSON_COMPACT);
    }
    aq_text_free(text);
    json_decref(done);
    aq_free(out);
    return status;
}

int cli_run_quantize(const cli_args *args) {
    aq_error err;
    aq_error_clear(&err);
    aq_quantize_options options;
    aq_config *config = NULL;
    char *report = NULL;
    aq_status status = read_options(&options, args, &err);
    if (status == AQ_OK) status = cli_settings_config(&config, args, &err);
    if (status == AQ_OK && cli_args_has(args, "print-config")) {
        status = cli_settings_print(config, args, &err);
        aq_config_destroy(config);
        return status ? cli_report_error(&err, args->json, NULL) : AQ_OK;
    }
    if (status == AQ_OK) {
        cli_signals_catch_interrupts();
        status = aq_quantize_model(args->operands[0], cli_args_value(args, "output"), config, &options, cli_job_hooks(), &report, &err);
        if (status == AQ_OK && report && cli_args_has(args, "to")) status = export_too(args, config, &options, &report, &err);
        if (status == AQ_OK && report && cli_args_has(args, "report")) write_page(args, config, &options, report, &err);
    }
    aq_config_destroy(config);
    return cli_job_end(args, &err, report, print_report);
}
