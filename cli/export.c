/* `arrowquant export`. */
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
    const json_t *output = json_object_get(report, "output"), *files = json_object_get(output, "files"), *file;
    const char *path = cli_json_text(output, "path");
    bool single = json_array_size(files) == 1 && strcmp(json_string_value(json_array_get(files, 0)), path) == 0;
    cli_print(stdout, "%swrote %s%s  %s of tensors", cli_color_on(stdout, COLOR_GREEN), cli_safe(path), cli_color_off(stdout),
              cli_size_both(cli_json_count(output, "size_bytes")));
    cli_print(stdout, "  %llu tensors, dequantized\n", (unsigned long long)cli_json_count(report, "n_tensors"));
    if (single || !args->verbose) return;
    size_t i;
    json_array_foreach(files, i, file) { cli_print(stdout, "  %s\n", cli_safe(json_string_value(file))); }
}

/* "model-int4-safetensors" for model-int4. NULL: no memory. */
static char *default_output(const char *path, const char *to) {
    size_t n = strlen(path), size;
    while (n > 1 && path[n - 1] == '/') n--;
    char *out = aq_alloc(size = n + strlen(to) + 2);
    if (out) snprintf(out, size, "%.*s-%s", (int)n, path, to);
    return out;
}

int cli_run_export(const cli_args *args) {
    aq_error err;
    aq_error_clear(&err);
    aq_config *config = NULL;
    char *report = NULL, *own = NULL;
    const char *to = cli_args_value(args, "to"), *out = cli_args_value(args, "output");
    if (!to) {
        aq_fail(&err, AQ_ERR_USAGE, "export needs --to FORMAT; must be safetensors");
        aq_hint(&err, "arrowquant export %s --to safetensors", cli_shell_word(args->operands[0]));
        return cli_report_error(&err, args->json, NULL);
    }
    if (!out && !(out = own = default_output(args->operands[0], to))) aq_fail_memory(&err, strlen(args->operands[0]), "the output path");
    if (out && cli_settings_config(&config, args, &err) == AQ_OK) {
        cli_signals_catch_interrupts();
        aq_export(args->operands[0], to, cli_args_value(args, "dtype"), out, cli_args_has(args, "overwrite"), cli_args_has(args, "mkdir"), cli_job_hooks(),
                  (int)aq_config_int(config, "num_threads", 0), &report, &err);
    }
    aq_config_destroy(config);
    aq_free(own);
    return cli_job_end(args, &err, report, print_report);
}
