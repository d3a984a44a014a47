/* `arrowquant inspect`. */
#include <arrowquant/pipeline.h>
#include <stdlib.h>
#include <string.h>

#include "job.h"
#include "log.h"
#include "settings.h"
#include "tensors.h"
#include "term.h"

enum { MOST_ROWS = 40 };

static const char *const model_heading[] = {"", "tensor", "shape", "type", "size", "decision"};
static const char *const container_heading[] = {"", "tensor", "shape", "from", "stored", "size", "cos", "SQNR dB"};

/* ---- grouping: the layers of equal blocks are one line, "12 x blocks.*.attn.to_q.weight" ---- */

/* The name with each part that is a number replaced by "*". */
static void name_pattern(char *out, size_t size, const char *name) {
    size_t used = 0;
    for (const char *at = name; *at && used + 2 < size;) {
        size_t n = strcspn(at, "."), digits = strspn(at, "0123456789");
        if (n > 0 && digits == n)
            out[used++] = '*';
        else
            used += (size_t)snprintf(out + used, size - used, "%.*s", (int)n, at);
        if (used >= size) used = size - 1;
        at += n;
        if (*at && used + 1 < size) out[used++] = *at++;
    }
    out[used] = 0;
}

/* Adds a tensor to the entry of those that differ from it in the numbers of the name only: sizes add up, of the quality the worst is kept. */
static bool merge(json_t *entry, const json_t *tensor) {
    json_t *cosine = json_object_get(tensor, "cosine"), *sqnr = json_object_get(tensor, "sqnr_db");
    bool worse = json_is_number(cosine) && json_number_value(cosine) < json_number_value(json_object_get(entry, "cosine"));
    uint64_t bytes = cli_json_count(entry, "bytes") + cli_json_count(tensor, "bytes");
    return json_object_set_new(entry, "n", json_integer((json_int_t)cli_json_count(entry, "n") + 1)) == 0 &&
           json_object_set_new(entry, "bytes", json_integer((json_int_t)bytes)) == 0 &&
           (!worse || (json_object_set(entry, "cosine", cosine) == 0 && json_object_set(entry, "sqnr_db", sqnr) == 0));
}

/* What must be equal for two tensors to share a line: everything shown but size and quality. NULL: no memory. */
static char *group_key(const json_t *tensor, const char *pattern) {
    json_t *parts =
        json_pack("[s,O,O,O?,O?,O?,O?]", pattern, json_object_get(tensor, "shape"), json_object_get(tensor, "dtype"), json_object_get(tensor, "decision"),
                  json_object_get(tensor, "quant_type"), json_object_get(tensor, "group_size"), json_object_get(tensor, "method"));
    char *key = parts ? json_dumps(parts, JSON_COMPACT) : NULL;
    json_decref(parts);
    return key;
}

/* The list with equal ones put together; NULL: no memory. */
static json_t *grouped(const json_t *tensors) {
    json_t *list = json_array(), *by_key = json_object(), *entry;
    const json_t *tensor;
    bool ok = list && by_key;
    char pattern[1200];
    size_t i;
    json_array_foreach(tensors, i, tensor) {
        name_pattern(pattern, sizeof pattern, cli_json_text(tensor, "name"));
        char *key = ok ? group_key(tensor, pattern) : NULL;
        if (key && (entry = json_object_get(by_key, key))) {
            ok = merge(entry, tensor);
        } else if (key) {
            entry = json_copy((json_t *)(uintptr_t)tensor);
            ok = entry && json_object_set_new(entry, "n", json_integer(1)) == 0 && json_object_set(by_key, key, entry) == 0 &&
                 json_array_append(list, entry) == 0;
            json_decref(entry);
        }
        ok = ok && key;
        free(key);
        if (!ok) break;
    }
    json_array_foreach(list, i, entry) {
        name_pattern(pattern, sizeof pattern, cli_json_text(entry, "name"));
        if (ok && cli_json_count(entry, "n") > 1) ok = json_object_set_new(entry, "name", json_string(pattern)) == 0;
    }
    json_decref(by_key);
    if (ok) return list;
    json_decref(list);
    return NULL;
}

static const char *times(const json_t *tensor) {
    size_t size;
    char *out = cli_buffer(&size);
    uint64_t n = cli_json_count(tensor, "n");
    if (n < 2) return "";
    snprintf(out, size, "%llu ×", (unsigned long long)n);
    return out;
}

static const char *group_text(const json_t *tensor) {
    size_t size;
    char *out = cli_buffer(&size);
    unsigned long long group = cli_json_count(tensor, "group_size");
    if (group)
        snprintf(out, size, "g%llu", group);
    else
        snprintf(out, size, "row");
    return out;
}

static void add_model_row(cli_table *table, const json_t *tensor) {
    const json_t *decision = json_object_get(tensor, "decision");
    size_t size;
    char *what = cli_buffer(&size);
    if (strcmp(cli_json_text(decision, "action"), "quantize") == 0)
        snprintf(what, size, "int%llu %s %s %s", (unsigned long long)cli_json_count(decision, "bits"), group_text(decision), cli_json_text(decision, "params"),
                 cli_json_text(decision, "method"));
    else
        snprintf(what, size, "keep: %s", cli_json_text(decision, "reason"));
    const char *cells[] = {times(tensor),
                           cli_safe(cli_json_text(tensor, "name")),
                           cli_shape(json_object_get(tensor, "shape")),
                           cli_safe(cli_json_text(tensor, "dtype")),
                           cli_size(cli_json_count(tensor, "bytes")),
                           cli_safe(what)};
    cli_table_row(table, cells);
}

static void add_container_row(cli_table *table, const json_t *tensor) {
    bool quantized = json_is_integer(json_object_get(tensor, "bits"));
    size_t size;
    char *stored = cli_buffer(&size);
    snprintf(stored, size, "%s", cli_safe(cli_json_text(tensor, "quant_type")));
    if (quantized)
        snprintf(stored, size, "int%llu %s %s", (unsigned long long)cli_json_count(tensor, "bits"), group_text(tensor),
                 cli_safe(cli_json_text(tensor, "method")));
    const char *cells[] = {times(tensor),
                           cli_safe(cli_json_text(tensor, "name")),
                           cli_shape(json_object_get(tensor, "shape")),
                           cli_safe(cli_json_text(tensor, "dtype")),
                           stored,
                           cli_size(cli_json_count(tensor, "bytes")),
                           quantized ? cli_cosine(cli_json_real(tensor, "cosine")) : "",
                           quantized ? cli_decibel(cli_json_real(tensor, "sqnr_db")) : ""};
    cli_table_row(table, cells);
}

/* "model.safetensors: safetensors, DiTTransformer2DModel, component transformer, image (by config.json)" */
static void print_head(const json_t *report, bool container) {
    const char *class = cli_json_text(report, "class"), *component = cli_json_text(report, "component"), *modality = cli_json_text(report, "modality");
    cli_print(stdout, "%s%s%s: ", cli_color_on(stdout, COLOR_BOLD), cli_safe(cli_json_text(report, "path")), cli_color_off(stdout));
    if (container)
        cli_print(stdout, "container %s", cli_safe(cli_json_text(report, "schema_version")));
    else
        cli_print(stdout, "%s", cli_json_text(report, "format"));
    if (*class) cli_print(stdout, ", %s", cli_safe(class));
    if (*component) cli_print(stdout, ", component %s", cli_safe(component));
    if (*modality)
        cli_print(stdout, ", %s (by %s)", modality, cli_safe(cli_json_text(report, "modality_source")));
    else
        cli_print(stdout, ", modality unknown");
    cli_print(stdout, "\n");
}

/* "52 tensors, 3.2 M weights, 12.8 MB (12.2 MiB): 50 F32, 2 I64" */
static void print_sizes(const json_t *report) {
    cli_print(stdout, "%llu tensors, %s weights, %s", (unsigned long long)cli_json_count(report, "n_tensors"), cli_count(cli_json_count(report, "n_weights")),
              cli_size_both(cli_json_count(report, "size_bytes")));
    const char *between = ": ";
    for (void *at = json_object_iter(json_object_get(report, "dtypes")); at; at = json_object_iter_next(json_object_get(report, "dtypes"), at)) {
        cli_print(stdout, "%s%llu %s", between, (unsigned long long)cli_json_count(json_object_iter_value(at), "tensors"), cli_safe(json_object_iter_key(at)));
        between = ", ";
    }
    cli_print(stdout, "\n");
}

static void print_report(const cli_args *args, const json_t *report) {
    bool container = strcmp(cli_json_text(report, "kind"), "container") == 0;
    unsigned long long n_tensors = cli_json_count(report, "n_tensors"), n_layers = cli_json_count(report, "n_layers");
    const json_t *warnings = json_object_get(report, "warnings"), *item, *tensors = json_object_get(report, "tensors");
    size_t i;
    json_array_foreach(warnings, i, item) { cli_log(AQ_LOG_WARNING, cli_safe(json_string_value(item))); }
    print_head(report, container);
    print_sizes(report);
    cli_print(stdout, container ? "%llu quantized, %llu kept\n" : "quantize would take %llu and keep %llu\n", n_layers, n_tensors - n_layers);
    if (args->quiet) return;
    cli_print(stdout, "\n");
    json_t *groups = args->verbose ? NULL : grouped(tensors);
    const json_t *list = groups ? groups : tensors;
    if (container)
        cli_print_tensors(args, list, NULL, "rfrllrrr", container_heading, MOST_ROWS, add_container_row);
    else
        cli_print_tensors(args, list, NULL, "rfrlrt", model_heading, MOST_ROWS, add_model_row);
    json_decref(groups);
}

int cli_run_inspect(const cli_args *args) {
    aq_error err;
    aq_error_clear(&err);
    aq_model_options options;
    aq_config *config = NULL;
    char *report = NULL;
    aq_status status = cli_settings_model(&options, args, &err);
    if (status == AQ_OK) status = cli_settings_config(&config, args, &err);
    if (status == AQ_OK) aq_inspect(args->operands[0], config, &options, &report, &err);
    aq_config_destroy(config);
    return cli_job_end(args, &err, report, print_report);
}
