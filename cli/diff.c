/* `arrowquant diff`. */
#include <arrowquant/pipeline.h>

#include "job.h"
#include "log.h"
#include "settings.h"
#include "signals.h"
#include "tensors.h"
#include "term.h"

enum { MOST_ROWS = 20 };

static const char *const heading[] = {"tensor", "shape", "A", "B", "cos", "SQNR dB", "max error"};

static void add_row(cli_table *table, const json_t *tensor) {
    bool equal = json_is_true(json_object_get(tensor, "equal"));
    const char *failure = cli_json_text(tensor, "failure");
    const char *cells[] = {
        cli_safe(cli_json_text(tensor, "name")),
        cli_shape(json_object_get(tensor, "shape")),
        cli_safe(cli_json_text(tensor, "a_type")),
        cli_safe(cli_json_text(tensor, "b_type")),
        *failure                                             ? "?"
        : equal                                              ? "equal"
        : json_is_true(json_object_get(tensor, "corrected")) ? "corrected"
                                                             : cli_cosine(cli_json_real(tensor, "cosine")),
        equal || *failure ? "" : cli_decibel(cli_json_real(tensor, "sqnr_db")),
        equal || *failure ? "" : cli_short(cli_json_real(tensor, "max_error")),
    };
    cli_table_row(table, cells);
}

static bool differs(const json_t *tensor) { return !json_is_true(json_object_get(tensor, "equal")); }

static void print_side(const char *letter, const json_t *side) {
    cli_print(stdout, "%s  %s  %s, %llu tensors, %s\n", letter, cli_safe(cli_json_text(side, "path")), cli_json_text(side, "kind"),
              (unsigned long long)cli_json_count(side, "n_tensors"), cli_size_both(cli_json_count(side, "size_bytes")));
}

static void print_shapes(const json_t *list) {
    const json_t *item;
    size_t i;
    json_array_foreach(list, i, item) {
        if (i == MOST_ROWS) {
            cli_print(stdout, "  %zu more differ in shape or type; --json lists all\n", json_array_size(list) - i);
            break;
        }
        cli_print(stdout, "  %s: %s %s in A, %s %s in B\n", cli_safe(cli_json_text(item, "name")), cli_safe(cli_json_text(item, "a_type")),
                  cli_shape(json_object_get(item, "a")), cli_safe(cli_json_text(item, "b_type")), cli_shape(json_object_get(item, "b")));
    }
}

static void print_failures(const json_t *tensors) {
    const json_t *tensor;
    size_t i;
    json_array_foreach(tensors, i, tensor) {
        const char *failure = cli_json_text(tensor, "failure");
        if (!*failure) continue;
        char line[1200];
        snprintf(line, sizeof line, "%s: %s", cli_safe(cli_json_text(tensor, "name")), cli_safe(failure));
        cli_log(AQ_LOG_WARNING, line);
    }
}

static void print_report(const cli_args *args, const json_t *report) {
    const json_t *summary = json_object_get(report, "summary"), *worst = json_object_get(summary, "worst"), *tensors = json_object_get(report, "tensors");
    unsigned long long n_compared = cli_json_count(summary, "n_compared"), n_equal = cli_json_count(summary, "n_equal");
    if (!args->quiet) {
        print_side("A", json_object_get(report, "a"));
        print_side("B", json_object_get(report, "b"));
        cli_print_tensors(args, tensors, args->verbose ? NULL : differs, "frllrrr", heading, MOST_ROWS, add_row);
        cli_print_sentences(args, json_object_get(report, "only_in_a"), "only in A");
        cli_print_sentences(args, json_object_get(report, "only_in_b"), "only in B");
        print_shapes(json_object_get(report, "shape_differs"));
    }
    print_failures(tensors);
    if (json_is_true(json_object_get(report, "equal"))) {
        cli_print(stdout, "equal: %llu tensors with the same values\n", n_compared);
        return;
    }
    cli_print(stdout, "different: %llu of %llu compared tensors have the same values", n_equal, n_compared);
    if (worst && !json_is_null(worst))
        cli_print(stdout, "  cos %s (worst %s %s)  SQNR %s dB", cli_cosine(cli_json_real(summary, "cosine")), cli_cosine(cli_json_real(worst, "cosine")),
                  cli_safe(cli_json_text(worst, "name")), cli_decibel(cli_json_real(summary, "sqnr_db")));
    cli_print(stdout, "\n");
}

int cli_run_diff(const cli_args *args) {
    aq_error err;
    aq_error_clear(&err);
    aq_model_options options;
    aq_config *config = NULL;
    char *report = NULL;
    aq_status status = cli_settings_model(&options, args, &err);
    if (status == AQ_OK) status = cli_settings_config(&config, args, &err);
    if (status == AQ_OK) {
        cli_signals_catch_interrupts();
        aq_diff(args->operands[0], args->operands[1], &options, cli_job_hooks(), (int)aq_config_int(config, "num_threads", 0), &report, &err);
    }
    aq_config_destroy(config);
    return cli_job_end(args, &err, report, print_report);
}
