/* `arrowquant calib show|merge|check|import|synth`. */
#include <arrowquant/calibration.h>
#include <arrowquant/dataset.h>
#include <arrowquant/pipeline.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "job.h"
#include "log.h"
#include "settings.h"
#include "term.h"

/* ---- show ---- */

/* Figures over time groups and channels. */
typedef struct {
    uint64_t count, hessian_count, n_seen;
    double sum, sum_sq;
    float min, max;
} totals;

static totals total_of(const aq_calib *c, size_t layer, uint32_t first, uint32_t last) {
    totals t = {.min = INFINITY, .max = -INFINITY};
    bool pooled = aq_calib_settings(c)->hessian_pooled;
    for (uint32_t g = first; g < last; g++) {
        aq_calib_stats s = aq_calib_group(c, layer, g);
        t.hessian_count = pooled ? s.hessian_count : t.hessian_count + s.hessian_count;
        t.count += s.count;
        t.n_seen += s.count > 0;
        for (uint64_t j = 0; s.count > 0 && j < aq_calib_n_inputs(c, layer); j++) {
            t.sum += s.sum[j];
            t.sum_sq += s.sum_sq[j];
            t.min = s.min[j] < t.min ? s.min[j] : t.min;
            t.max = s.max[j] > t.max ? s.max[j] : t.max;
        }
    }
    return t;
}

static json_t *real_or_null(double value) { return isfinite(value) ? json_real(value) : json_null(); }

static void add_totals(json_t *object, const totals *t, uint64_t n_inputs) {
    double n = (double)t->count * (double)n_inputs, mean = t->sum / n, variance = t->sum_sq / n - mean * mean;
    json_object_set_new(object, "count", json_integer((json_int_t)t->count));
    json_object_set_new(object, "hessian_count", json_integer((json_int_t)t->hessian_count));
    json_object_set_new(object, "min", real_or_null((double)t->min));
    json_object_set_new(object, "max", real_or_null((double)t->max));
    json_object_set_new(object, "mean", real_or_null(mean));
    json_object_set_new(object, "std", real_or_null(sqrt(variance > 0 ? variance : variance <= 0 ? 0 : (double)NAN)));
}

static json_t *layer_json(const aq_calib *c, size_t layer) {
    uint64_t n = aq_calib_n_inputs(c, layer), n_rows;
    size_t source = aq_calib_source(c, layer);
    uint32_t n_groups = aq_calib_settings(c)->n_groups, start, end;
    const double *rows, *cols;
    totals all = total_of(c, layer, 0, n_groups);
    json_t *out = json_object(), *groups = json_array();
    json_object_set_new(out, "name", json_string(cli_safe(aq_calib_layer_name(c, layer))));
    json_object_set_new(out, "n_inputs", json_integer((json_int_t)n));
    json_object_set_new(out, "same_input_as", source == layer ? json_null() : json_string(cli_safe(aq_calib_layer_name(c, source))));
    json_object_set_new(out, "groups_seen", json_integer((json_int_t)all.n_seen));
    add_totals(out, &all, n);
    json_object_set_new(out, "gradient", json_boolean(aq_calib_gradient(c, layer, &rows, &n_rows, &cols)));
    for (uint32_t g = 0; source == layer && g < n_groups; g++) {
        totals t = total_of(c, layer, g, g + 1);
        if (t.count == 0) continue;
        aq_calib_group_range(c, g, &start, &end);
        json_t *group = json_pack("{s:i, s:i, s:i}", "group", (int)g, "start", (int)start, "end", (int)end);
        add_totals(group, &t, n);
        json_array_append_new(groups, group);
    }
    json_object_set_new(out, "groups", groups);
    return out;
}

static void add_warning(void *user, const char *sentence) { json_array_append_new(user, json_string(sentence)); }

static json_t *text_or_null(const char *text) { return text ? json_string(text) : json_null(); }

static aq_status file_json(json_t **out, const char *path, aq_error *err) {
    aq_calib *c;
    char fingerprint[65];
    aq_status status = aq_calib_open(&c, path, err);
    if (status != AQ_OK) return status;
    status = aq_calib_verify(c, err);
    if (status == AQ_OK) status = aq_calib_fingerprint(c, fingerprint, err);
    if (status == AQ_OK) {
        const aq_calib_options *o = aq_calib_settings(c);
        json_t *layers = json_array(), *warnings = json_array();
        for (size_t i = 0; i < aq_calib_n_layers(c); i++) json_array_append_new(layers, layer_json(c, i));
        aq_calib_warnings(c, add_warning, warnings);
        *out = json_pack("{s:s, s:s, s:I, s:I, s:b, s:b, s:I, s:b, s:o, s:o, s:I, s:b, s:o, s:o, s:o}", "path", cli_safe(path), "fingerprint", fingerprint,
                         "n_timesteps", (json_int_t)o->n_timesteps, "n_groups", (json_int_t)o->n_groups, "hessian", (int)o->hessian, "hessian_pooled",
                         (int)o->hessian_pooled, "hessian_full", (json_int_t)o->hessian_full, "diagonal_only", (int)o->diagonal_only, "data_name",
                         text_or_null(o->data_name), "data_sha256", text_or_null(o->data_sha256), "seed", (json_int_t)o->seed, "synthetic", (int)o->synthetic,
                         "modality", o->modality == AQ_MODALITY_UNKNOWN ? json_null() : json_string(aq_modality_name(o->modality)), "layers", layers,
                         "warnings", warnings);
        if (!*out) status = aq_fail_memory(err, 1, "the report");
    }
    aq_calib_free(c);
    return status;
}

/* Most characters of a short number: "-1.2e+03". */
static const char *figure(const json_t *object, const char *key) { return cli_short(cli_json_real(object, key)); }

static void print_layers(const cli_args *args, const json_t *file) {
    static const char *const heading[] = {"layer", "inputs", "rows", "groups", "min", "max", "std", "H"};
    const json_t *layer, *group;
    size_t i, k;
    cli_table *table = cli_table_create("frrrrrrl");
    cli_table_row(table, heading);
    json_array_foreach(json_object_get(file, "layers"), i, layer) {
        char counts[4][32];
        const char *same = cli_json_text(layer, "same_input_as");
        snprintf(counts[0], 32, "%llu", (unsigned long long)cli_json_count(layer, "n_inputs"));
        snprintf(counts[1], 32, "%llu", (unsigned long long)cli_json_count(layer, "count"));
        snprintf(counts[2], 32, "%llu/%llu", (unsigned long long)cli_json_count(layer, "groups_seen"), (unsigned long long)cli_json_count(file, "n_groups"));
        uint64_t h = cli_json_count(layer, "hessian_count");
        if (h == cli_json_count(layer, "count") || h == 0)
            snprintf(counts[3], 32, "%s", h ? "yes" : "-");
        else
            snprintf(counts[3], 32, "%llu rows", (unsigned long long)h);
        const char *cells[] = {cli_safe(cli_json_text(layer, "name")),
                               counts[0],
                               counts[1],
                               counts[2],
                               figure(layer, "min"),
                               figure(layer, "max"),
                               figure(layer, "std"),
                               *same ? "shared" : counts[3]};
        cli_table_row(table, cells);
        if (!args->verbose) continue;
        json_array_foreach(json_object_get(layer, "groups"), k, group) {
            char range[64], rows[32];
            snprintf(range, sizeof range, "  timesteps %llu to %llu", (unsigned long long)cli_json_count(group, "start"),
                     (unsigned long long)cli_json_count(group, "end"));
            snprintf(rows, sizeof rows, "%llu", (unsigned long long)cli_json_count(group, "count"));
            const char *inner[] = {range, "", rows, "", figure(group, "min"), figure(group, "max"), figure(group, "std"), ""};
            cli_table_row(table, inner);
        }
    }
    cli_table_print(table);
}

static void print_warnings(const json_t *report) {
    const json_t *item;
    size_t i;
    json_array_foreach(json_object_get(report, "warnings"), i, item) { cli_log(AQ_LOG_WARNING, cli_safe(json_string_value(item))); }
}

static void print_file(const cli_args *args, const json_t *file) {
    const char *data = cli_json_text(file, "data_name"), *modality = cli_json_text(file, "modality");
    unsigned long long n_timesteps = cli_json_count(file, "n_timesteps");
    cli_print(stdout, "%s%s%s  %zu layers, %s%s%sdata %s\n", cli_color_on(stdout, COLOR_BOLD), cli_safe(cli_json_text(file, "path")), cli_color_off(stdout),
              json_array_size(json_object_get(file, "layers")), modality, *modality ? ", " : "",
              json_is_true(json_object_get(file, "synthetic")) ? "SYNTHETIC, " : "", *data ? cli_safe(data) : "not named");
    if (n_timesteps)
        cli_print(stdout, "%llu timesteps in %llu groups%s\n", n_timesteps, (unsigned long long)cli_json_count(file, "n_groups"),
                  json_is_true(json_object_get(file, "hessian_pooled")) ? ", H over all of them" : "");
    if (!args->quiet) print_layers(args, file);
    print_warnings(file);
}

static void print_show(const cli_args *args, const json_t *report) {
    const json_t *file;
    size_t i;
    json_array_foreach(json_object_get(report, "files"), i, file) { print_file(args, file); }
}

static aq_status show(const cli_args *args, json_t *report, aq_error *err) {
    json_t *files = json_array(), *file = NULL;
    aq_status status = AQ_OK;
    json_object_set_new(report, "files", files);
    for (size_t i = 1; status == AQ_OK && i < args->n_operands; i++) {
        status = file_json(&file, args->operands[i], err);
        if (status == AQ_OK) json_array_append_new(files, file);
    }
    return status;
}

/* ---- merge ---- */

static aq_status needs_output(const cli_args *args, const char *example, const char **out, aq_error *err) {
    *out = cli_args_value(args, "output");
    if (*out) return AQ_OK;
    aq_fail(err, AQ_ERR_USAGE, "calib %s needs -o OUT", args->operands[0]);
    aq_hint(err, "arrowquant calib %s %s -o %s", args->operands[0], cli_shell_word(args->operands[1]), example);
    return AQ_ERR_USAGE;
}

static aq_status merge(const cli_args *args, json_t *report, aq_error *err) {
    const char *out, *memory = cli_args_value(args, "max-memory");
    uint64_t max_memory = 0, rows = 0;
    aq_calib *all = NULL, *one = NULL;
    aq_status status = needs_output(args, "all.aqcal", &out, err);
    if (status == AQ_OK && args->n_operands < 3) status = aq_fail(err, AQ_ERR_USAGE, "calib merge needs two files or more");
    if (status == AQ_OK && memory) status = cli_parse_size(&max_memory, memory, "--max-memory", err);
    json_t *inputs = json_array();
    json_object_set_new(report, "inputs", inputs);
    for (size_t i = 1; status == AQ_OK && i < args->n_operands; i++) {
        status = aq_calib_open(&one, args->operands[i], err);
        if (status == AQ_OK && !all) { /* an empty one with its settings: what is spilled is decided there */
            aq_calib_options o = *aq_calib_settings(one);
            o.max_memory_bytes = max_memory;
            status = aq_calib_create(&all, &o, err);
        }
        if (status == AQ_OK) status = aq_calib_merge(all, one, err);
        if (status == AQ_ERR_USAGE) { /* the files disagree */
            char text[sizeof err->message];
            snprintf(text, sizeof text, "%s", err->message);
            aq_fail_at(err, AQ_ERR_FORMAT, args->operands[i], NULL, "cannot be merged with the files before it: %s", text);
            status = AQ_ERR_FORMAT;
        }
        aq_calib_free(one);
        one = NULL;
        json_array_append_new(inputs, json_string(cli_safe(args->operands[i])));
    }
    if (status == AQ_OK) status = aq_calib_save(all, out, cli_args_has(args, "overwrite"), err);
    if (status == AQ_OK) {
        json_t *warnings = json_array();
        for (size_t i = 0; i < aq_calib_n_layers(all); i++)
            if (aq_calib_source(all, i) == i) rows += total_of(all, i, 0, aq_calib_settings(all)->n_groups).count;
        aq_calib_warnings(all, add_warning, warnings);
        json_object_set_new(report, "output", json_string(cli_safe(out)));
        json_object_set_new(report, "n_layers", json_integer((json_int_t)aq_calib_n_layers(all)));
        json_object_set_new(report, "count", json_integer((json_int_t)rows));
        json_object_set_new(report, "warnings", warnings);
    }
    aq_calib_free(all);
    return status;
}

static void print_merge(const cli_args *args, const json_t *report) {
    print_warnings(report);
    if (!args->quiet)
        cli_print(stdout, "%swrote %s%s  %llu layers, %llu rows of %zu files\n", cli_color_on(stdout, COLOR_GREEN), cli_safe(cli_json_text(report, "output")),
                  cli_color_off(stdout), (unsigned long long)cli_json_count(report, "n_layers"), (unsigned long long)cli_json_count(report, "count"),
                  json_array_size(json_object_get(report, "inputs")));
}

/* ---- check ---- */

static aq_status open_model(aq_model **model, const cli_args *args, const char *path, aq_error *err) {
    aq_model_options options;
    aq_status status = cli_settings_model(&options, args, err);
    return status == AQ_OK ? aq_model_open(model, path, &options, err) : status;
}

static void add_missing(void *user, const char *name) { json_array_append_new(user, json_string(cli_safe(name))); }

static aq_status check(const cli_args *args, json_t *report, aq_error *err) {
    aq_calib *c = NULL;
    aq_model *model = NULL;
    if (args->n_operands != 3) {
        aq_fail(err, AQ_ERR_USAGE, "calib check needs a file and a model");
        aq_hint(err, "arrowquant calib check model.aqcal model.safetensors");
        return AQ_ERR_USAGE;
    }
    json_t *missing = json_array(), *warnings = json_array();
    json_object_set_new(report, "path", json_string(cli_safe(args->operands[1])));
    json_object_set_new(report, "model", json_string(cli_safe(args->operands[2])));
    json_object_set_new(report, "missing", missing);
    json_object_set_new(report, "warnings", warnings);
    aq_status status = aq_calib_open(&c, args->operands[1], err);
    if (status == AQ_OK) status = aq_calib_verify(c, err);
    if (status == AQ_OK) status = open_model(&model, args, args->operands[2], err);
    if (status == AQ_OK) aq_calib_warnings(c, add_warning, warnings);
    if (status == AQ_OK) status = aq_calib_check(c, model, add_missing, missing, err);
    if (status == AQ_OK) json_object_set_new(report, "n_layers", json_integer((json_int_t)aq_calib_n_layers(c)));
    aq_calib_free(c);
    aq_model_close(model);
    return status;
}

static void print_check(const cli_args *args, const json_t *report) {
    enum { MOST = 10 };
    const json_t *missing = json_object_get(report, "missing"), *name;
    size_t i, n = json_array_size(missing);
    print_warnings(report);
    json_array_foreach(missing, i, name) {
        if (i == MOST && !args->verbose) {
            cli_print(stdout, "  %zu more; -v lists all\n", n - MOST);
            break;
        }
        cli_print(stdout, "  not in the statistics: %s\n", cli_safe(json_string_value(name)));
    }
    cli_print(stdout, "%s  %sok%s  %llu layers fit the model", cli_safe(cli_json_text(report, "path")), cli_color_on(stdout, COLOR_GREEN),
              cli_color_off(stdout), (unsigned long long)cli_json_count(report, "n_layers"));
    cli_print(stdout, n ? ", %zu of its layers have no statistics\n" : "\n", n);
}

/* ---- import ---- */

static aq_status import_matrix(const cli_args *args, json_t *report, aq_error *err) {
    const char *out, *path = args->operands[1];
    aq_calib *c = NULL;
    aq_model *model = NULL;
    if (args->n_operands > 3) return aq_fail(err, AQ_ERR_USAGE, "calib import takes an importance matrix and a model");
    json_t *skipped = json_array();
    json_object_set_new(report, "input", json_string(cli_safe(path)));
    json_object_set_new(report, "skipped", skipped);
    aq_status status = needs_output(args, "model.aqcal", &out, err);
    if (status == AQ_OK && args->n_operands == 3) status = open_model(&model, args, args->operands[2], err);
    if (status == AQ_OK) status = aq_calib_import(&c, path, model, add_missing, skipped, err);
    if (status == AQ_OK) status = aq_calib_save(c, out, cli_args_has(args, "overwrite"), err);
    if (status == AQ_OK) {
        json_object_set_new(report, "output", json_string(cli_safe(out)));
        json_object_set_new(report, "n_layers", json_integer((json_int_t)aq_calib_n_layers(c)));
    }
    aq_calib_free(c);
    aq_model_close(model);
    return status;
}

static void print_import(const cli_args *args, const json_t *report) {
    size_t n = json_array_size(json_object_get(report, "skipped"));
    if (!args->quiet)
        cli_print(stdout, "%swrote %s%s  %llu layers, mean squares of their inputs alone%s", cli_color_on(stdout, COLOR_GREEN),
                  cli_safe(cli_json_text(report, "output")), cli_color_off(stdout), (unsigned long long)cli_json_count(report, "n_layers"), n ? "" : "\n");
    if (!args->quiet && n) cli_print(stdout, "; %zu fit no layer of the model\n", n);
}

/* ---- synth ---- */

/* "4,64,64" */
static aq_status parse_shape(aq_shape *out, const char *text, aq_error *err) {
    out->rank = 0;
    for (const char *at = text;; at++) {
        size_t n = strspn(at, "0123456789");
        if (n == 0 || n > 9 || out->rank == AQ_MAX_RANK || (at[n] && at[n] != ','))
            return aq_fail(err, AQ_ERR_USAGE, "--shape: invalid shape \"%s\"; must be sizes such as 4,64,64", cli_safe(text));
        out->dims[out->rank++] = strtoull(at, NULL, 10);
        at += n;
        if (!*at) return AQ_OK;
    }
}

static aq_status synth(const cli_args *args, json_t *report, aq_error *err) {
    const char *out, *shape = cli_args_value(args, "shape"), *samples = cli_args_value(args, "samples"), *seed = cli_args_value(args, "seed");
    aq_synthetic_options o, used;
    aq_synthetic_options_init(&o);
    aq_model *model = NULL;
    if (args->n_operands != 2) return aq_fail(err, AQ_ERR_USAGE, "calib synth takes one model");
    aq_status status = needs_output(args, "synthetic.jsonl", &out, err);
    if (status == AQ_OK && shape) status = parse_shape(&o.shape, shape, err);
    if (status == AQ_OK && samples) status = cli_parse_count(&o.n_samples, samples, "--samples", err);
    if (status == AQ_OK && seed) status = cli_parse_count(&o.seed, seed, "--seed", err);
    if (status == AQ_OK) status = open_model(&model, args, args->operands[1], err);
    if (status == AQ_OK) status = aq_dataset_synthesize(out, model, &o, cli_args_has(args, "overwrite"), &used, err);
    aq_model_close(model);
    if (status != AQ_OK) return status;
    json_t *dims = json_array();
    for (uint32_t i = 0; i < used.shape.rank; i++) json_array_append_new(dims, json_integer((json_int_t)used.shape.dims[i]));
    json_t *made =
        json_pack("{s:s, s:s, s:I, s:o, s:I, s:s, s:o, s:I, s:b}", "model", cli_safe(args->operands[1]), "output", cli_safe(out), "n_samples",
                  (json_int_t)used.n_samples, "shape", dims, "n_timesteps", (json_int_t)used.n_timesteps, "modality", aq_modality_name(used.modality),
                  "vocabulary", used.vocabulary ? json_integer((json_int_t)used.vocabulary) : json_null(), "seed", (json_int_t)used.seed, "synthetic", 1);
    json_object_update(report, made);
    json_decref(made);
    return AQ_OK;
}

static void print_synth(const cli_args *args, const json_t *report) {
    if (!args->quiet)
        cli_print(stdout, "%swrote %s%s  %llu synthetic inputs %s, timesteps over %llu; run the model on them to record statistics\n",
                  cli_color_on(stdout, COLOR_GREEN), cli_safe(cli_json_text(report, "output")), cli_color_off(stdout),
                  (unsigned long long)cli_json_count(report, "n_samples"), cli_shape(json_object_get(report, "shape")),
                  (unsigned long long)cli_json_count(report, "n_timesteps"));
}

/* ---- the command ---- */

int cli_run_calib(const cli_args *args) {
    static const struct {
        const char *name, *schema;
        aq_status (*run)(const cli_args *args, json_t *report, aq_error *err);
        void (*print)(const cli_args *args, const json_t *report);
    } actions[] = {{"show", "arrowquant.calib.show/1", show, print_show},
                   {"merge", "arrowquant.calib.merge/1", merge, print_merge},
                   {"check", "arrowquant.calib.check/1", check, print_check},
                   {"import", "arrowquant.calib.import/1", import_matrix, print_import},
                   {"synth", "arrowquant.calib.synth/1", synth, print_synth}};
    size_t i = 0;
    while (strcmp(actions[i].name, args->operands[0]) != 0) i++; /* the table of commands allows these five */
    aq_error err;
    aq_error_clear(&err);
    json_t *report = json_object();
    json_object_set_new(report, "schema", json_string(actions[i].schema));
    aq_status status = actions[i].run(args, report, &err);
    if (status != AQ_OK) {
        json_decref(report);
        return cli_report_error(&err, args->json, NULL);
    }
    if (args->json)
        cli_print_json(report);
    else
        actions[i].print(args, report);
    json_decref(report);
    return AQ_OK;
}
