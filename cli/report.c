/* `arrowquant report`. */
#include <arrowquant/pipeline.h>
#include <string.h>

#include "base/mem.h"
#include "job.h"
#include "log.h"
#include "settings.h"
#include "signals.h"
#include "term.h"

static void print_report(const cli_args *args, const json_t *report) {
    if (args->quiet) return;
    cli_print(stdout, "%swrote %s%s  %s, %llu layers%s\n", cli_color_on(stdout, COLOR_GREEN), cli_safe(cli_json_text(report, "output")), cli_color_off(stdout),
              cli_size(cli_json_count(report, "size_bytes")), (unsigned long long)cli_json_count(report, "n_layers"),
              json_is_true(json_object_get(report, "measured")) ? "" : "; --against SOURCE adds measured errors");
}

/* "model-int4.html" for model-int4. NULL: no memory. */
static char *default_output(const char *path) {
    size_t n = strlen(path);
    while (n > 1 && path[n - 1] == '/') n--;
    char *out = aq_alloc(n + 6);
    if (out) snprintf(out, n + 6, "%.*s.html", (int)n, path);
    return out;
}

int cli_run_report(const cli_args *args) {
    aq_error err;
    aq_error_clear(&err);
    aq_page_options options = {.against = cli_args_value(args, "against"),
                               .calib = cli_args_value(args, "calib"),
                               .layer = cli_args_value(args, "show"),
                               .overwrite = cli_args_has(args, "overwrite")};
    aq_config *config = NULL;
    char *report = NULL, *own = NULL;
    const char *out = cli_args_value(args, "output");
    if (!out && !(out = own = default_output(args->operands[0]))) aq_fail_memory(&err, strlen(args->operands[0]), "the output path");
    if (out && cli_settings_model(&options.model, args, &err) == AQ_OK && cli_settings_config(&config, args, &err) == AQ_OK) {
        options.n_threads = (int)aq_config_int(config, "num_threads", 0);
        cli_signals_catch_interrupts();
        aq_write_page(args->operands[0], out, &options, cli_job_hooks(), &report, &err);
    }
    aq_config_destroy(config);
    aq_free(own);
    return cli_job_end(args, &err, report, print_report);
}
