/* `arrowquant verify`. */
#include <arrowquant/pipeline.h>
#include <math.h>
#include <string.h>

#include "job.h"
#include "log.h"
#include "settings.h"
#include "signals.h"
#include "tensors.h"
#include "term.h"

enum { MOST_ROWS = 10 };

static const char *const heading[] = {"layer", "shape", "stored", "size", "cos", "SQNR dB", "max error", ""};

static void add_row(cli_table *table, const json_t *tensor) {
    bool against = strcmp(cli_json_text(tensor, "measured"), "against") == 0;
    const char *cells[] = {
        cli_safe(cli_json_text(tensor, "name")),
        cli_shape(json_object_get(tensor, "shape")),
        cli_safe(cli_json_text(tensor, "quant_type")),
        cli_size(cli_json_count(tensor, "bytes")),
        cli_cosine(cli_json_real(tensor, "cosine")),
        cli_decibel(cli_json_real(tensor, "sqnr_db")),
        against ? cli_short(cli_json_real(tensor, "max_error")) : "",
        json_is_false(json_object_get(tensor, "ok")) ? "bad" : "",
    };
    cli_table_row(table, cells);
}

static bool is_layer(const json_t *tensor) { return json_is_integer(json_object_get(tensor, "bits")); }

static void print_report(const cli_args *args, const json_t *report) {
    const json_t *summary = json_object_get(report, "summary"), *worst = json_object_get(summary, "worst"), *problems = json_object_get(report, "problems"),
                 *item;
    size_t i;
    if (!args->quiet) cli_print_tensors(args, json_object_get(report, "tensors"), args->verbose ? NULL : is_layer, "frlrrrrl", heading, MOST_ROWS, add_row);
    json_array_foreach(json_object_get(report, "warnings"), i, item) { cli_log(AQ_LOG_WARNING, cli_safe(json_string_value(item))); }
    size_t n_problems = json_array_size(problems);
    cli_print_sentences(args, problems, "problem");
    cli_print(stdout, "%s  %s", cli_safe(cli_json_text(report, "path")), cli_color_on(stdout, n_problems ? COLOR_RED : COLOR_GREEN));
    if (n_problems)
        cli_print(stdout, "%zu problem%s", n_problems, n_problems == 1 ? "" : "s");
    else
        cli_print(stdout, "ok");
    cli_print(stdout, "%s  %llu tensors, %llu quantized  %s", cli_color_off(stdout), (unsigned long long)cli_json_count(summary, "n_tensors"),
              (unsigned long long)cli_json_count(summary, "n_layers"), cli_size_both(cli_json_count(summary, "size_bytes")));
    if (worst && !json_is_null(worst))
        cli_print(stdout, "  cos %s (worst %s %s)", cli_cosine(cli_json_real(summary, "cosine")), cli_cosine(cli_json_real(worst, "cosine")),
                  cli_safe(cli_json_text(worst, "name")));
    const char *against = cli_json_text(report, "against");
    cli_print(stdout, *against ? "  measured against %s\n" : "  as stored; --against SOURCE measures it\n", cli_safe(against));
}

int cli_run_verify(const cli_args *args) {
    aq_error err;
    aq_error_clear(&err);
    aq_model_options options;
    aq_config *config = NULL;
    char *report = NULL;
    aq_status status = cli_settings_model(&options, args, &err);
    if (status == AQ_OK) status = cli_settings_config(&config, args, &err);
    if (status == AQ_OK) {
        cli_signals_catch_interrupts();
        /* Without the option the floor is the one stored in the container. */
        double floor = cli_args_has(args, "min-accuracy") ? aq_config_float(config, "min_accuracy") : -1;
        aq_verify(args->operands[0], cli_args_value(args, "against"), &options, cli_job_hooks(), (int)aq_config_int(config, "num_threads", 0), floor, &report,
                  &err);
    }
    aq_config_destroy(config);
    return cli_job_end(args, &err, report, print_report);
}
