/* `arrowquant export`. */
#include <arrowquant/pipeline.h>
#include <stdio.h>
#include <string.h>

#include "base/mem.h"
#include "export.h"
#include "job.h"
#include "log.h"
#include "settings.h"
#include "signals.h"
#include "term.h"

/* What became of the codes: nothing is added silently. */
static void print_recoding(const json_t *recoding) {
    if (!json_is_object(recoding)) return;
    const json_t *added = json_object_get(recoding, "added_sqnr_db"), *error = json_object_get(recoding, "sqnr_db");
    cli_print(stdout, "  layers: %llu with the container's codes, %llu coded from the source, %llu from the dequantized weights\n",
              (unsigned long long)cli_json_count(recoding, "n_codes"), (unsigned long long)cli_json_count(recoding, "n_source"),
              (unsigned long long)cli_json_count(recoding, "n_dequantized"));
    if (json_is_number(error))
        cli_print(stdout, "  error against the source: %s dB below the weights, in the container %s dB\n", cli_decibel(json_number_value(error)),
                  cli_decibel(cli_json_real(recoding, "container_sqnr_db")));
    else if (json_is_number(added))
        cli_print(stdout, "  added error: %s dB below the weights\n", cli_decibel(json_number_value(added)));
    else
        cli_print(stdout, "  added error: none\n");
    size_t i;
    const json_t *tensor, *reason;
    json_array_foreach(json_object_get(recoding, "tensors"), i, tensor) {
        if (!json_is_string(reason = json_object_get(tensor, "refused"))) continue;
        cli_print(stdout, "  %s: %s, so it is %s\n", cli_safe(cli_json_text(tensor, "name")), cli_safe(json_string_value(reason)),
                  cli_json_text(tensor, "type"));
    }
}

void cli_print_export(const cli_args *args, const json_t *report) {
    if (args->quiet) return;
    const json_t *output = json_object_get(report, "output"), *files = json_object_get(output, "files"), *recoding = json_object_get(report, "recoding"), *file;
    const char *path = cli_json_text(output, "path");
    bool single = json_array_size(files) == 1 && strcmp(json_string_value(json_array_get(files, 0)), path) == 0;
    cli_print(stdout, "%swrote %s%s  %s of tensors", cli_color_on(stdout, COLOR_GREEN), cli_safe(path), cli_color_off(stdout),
              cli_size_both(cli_json_count(output, "size_bytes")));
    cli_print(stdout, "  %llu tensors%s\n", (unsigned long long)cli_json_count(report, "n_tensors"), json_is_object(recoding) ? "" : ", dequantized");
    print_recoding(recoding);
    if (single || !args->verbose) return;
    size_t i;
    json_array_foreach(files, i, file) { cli_print(stdout, "  %s\n", cli_safe(json_string_value(file))); }
}

char *cli_export_path(const char *path, const char *to) {
    size_t n = strlen(path), size;
    const char *suffix = strcmp(to, "gguf") == 0 ? "" : strcmp(to, "comfy-int8") == 0 ? ".safetensors" : "";
    while (n > 1 && path[n - 1] == '/') n--;
    char *out = aq_alloc(size = n + strlen(to) + strlen(suffix) + 2);
    if (out) snprintf(out, size, "%.*s%c%s%s", (int)n, path, strcmp(to, "gguf") == 0 ? '.' : '-', to, suffix);
    return out;
}

int cli_run_export(const cli_args *args) {
    aq_error err;
    aq_error_clear(&err);
    aq_config *config = NULL;
    aq_model_options model;
    char *report = NULL, *own = NULL;
    const char *out = cli_args_value(args, "output"), *rotate = cli_args_value(args, "rotate");
    aq_export_options options = {.to = cli_args_value(args, "to"),
                                 .dtype = cli_args_value(args, "dtype"),
                                 .type = cli_args_value(args, "type"),
                                 .source = cli_args_value(args, "source"),
                                 .model = &model,
                                 .rotate = rotate && strcmp(rotate, "hadamard") == 0,
                                 .overwrite = cli_args_has(args, "overwrite"),
                                 .make_parents = cli_args_has(args, "mkdir")};
    if (!options.to) {
        aq_fail(&err, AQ_ERR_USAGE, "export needs --to FORMAT; must be safetensors, gguf, comfy-int8 or gptq");
        aq_hint(&err, "arrowquant export %s --to safetensors", cli_shell_word(args->operands[0]));
        return cli_report_error(&err, args->json, NULL);
    }
    if (!out && !(out = own = cli_export_path(args->operands[0], options.to))) aq_fail_memory(&err, strlen(args->operands[0]), "the output path");
    if (out && cli_settings_model(&model, args, &err) == AQ_OK && cli_settings_shards(&options.shard_bytes, args, &err) == AQ_OK &&
        cli_settings_config(&config, args, &err) == AQ_OK) {
        cli_signals_catch_interrupts();
        options.n_threads = (int)aq_config_int(config, "num_threads", 0);
        aq_export(args->operands[0], out, &options, cli_job_hooks(), &report, &err);
    }
    aq_config_destroy(config);
    aq_free(own);
    return cli_job_end(args, &err, report, cli_print_export);
}
