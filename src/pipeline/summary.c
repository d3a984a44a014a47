/* What a quantize run tells about itself (see quantize.h): metadata.json inside the container, and the report.
 *
 * metadata.json is part of the output: it holds nothing that differs between two runs of the same input and options (no times, paths, threads). The report
 * is read back from the finished container, so that its figures are those of the bytes on disk, also after a continued run.
 */
#include <math.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>

#include "base/error.h"
#include "base/file.h"
#include "base/json.h"
#include "base/mem.h"
#include "pipeline/compare.h"
#include "pipeline/inputs.h"
#include "pipeline/planning.h"
#include "pipeline/quantize.h"

const char *aq_side_file_stored_name(const char *relative_path) { return strcmp(relative_path, "metadata.json") == 0 ? "source_metadata.json" : relative_path; }
const char *aq_side_file_original_name(const char *relative_path) {
    return strcmp(relative_path, "source_metadata.json") == 0 ? "metadata.json" : relative_path;
}

char *aq_run_config_json(const aq_config *config) {
    /* Fields that change how a run works and not what it writes. */
    static const char *const neutral[] = {"num_threads",         "enable_streaming", "enable_memory_aware_scheduling",
                                          "max_memory_limit_mb", "enable_simd",      "simd_threshold",
                                          "calibration_path",    "plan_path",        "fail_fast"};
    char *text = aq_config_to_json(config, false);
    json_t *object = text ? aq_report_parsed(text) : NULL;
    aq_config_free_text(text);
    if (!object) return NULL;
    for (size_t i = 0; i < sizeof neutral / sizeof *neutral; i++) json_object_del(object, neutral[i]);
    text = aq_json_dump(object, false);
    json_decref(object);
    return text;
}

/* Figures of the quantized layers that both texts hold. */
typedef struct {
    uint64_t n_layers, n_kept, n_widened, n_zeroed_tensors, n_zeroed, n_kept_nonfinite;
    uint64_t n_fallen;     /* layers with a fallback of any kind */
    uint64_t n_calibrated; /* layers whose inputs were known */
    uint64_t bits_count[9];
    aq_mean mean;
    double output_error, output_weight; /* relative errors of measured outputs, weighted by size */
    json_t *fallbacks;                  /* {"int4": 2, "keep": 1, "per-channel": 3} */
} figures;

/* What took the place of the step `what` of a fallback: the width where the layer ended, or the simpler form of a method. */
static const char *fallback_key(const char *what, size_t n, const layer_outcome *o, char width[16]) {
    static const struct { const char *what, *instead; } known[] = {{"spatial", "per-channel"}, {"time-aware", "base"}, {"gptq", "search"}, {"r2q", "affine"}};
    for (size_t i = 0; i < sizeof known / sizeof *known; i++)
        if (strlen(known[i].what) == n && strncmp(known[i].what, what, n) == 0) return known[i].instead;
    snprintf(width, 16, "int%d", o->bits);
    return o->bits < 16 ? width : "keep";
}

/* Counts each kind of fallback of a layer once. */
static void count_fallbacks(json_t *counts, const layer_outcome *o) {
    char seen[256] = "|", width[16], entry[24];
    for (const char *at = o->fallback_from; at && *at;) {
        const char *key = fallback_key(at, strcspn(at, ":"), o, width), *next = strstr(at, "; ");
        snprintf(entry, sizeof entry, "|%s|", key);
        if (!strstr(seen, entry)) {
            snprintf(seen + strlen(seen), sizeof seen - strlen(seen), "%s|", key);
            json_object_set_new(counts, key, json_integer(json_integer_value(json_object_get(counts, key)) + 1));
        }
        at = next ? next + 2 : NULL;
    }
}

static bool add_up(const quantize_run *run, figures *f) {
    *f = (figures){.fallbacks = json_object()};
    for (size_t i = 0; i < run->n_tensors; i++) {
        const aq_tensor_info *t = aq_model_tensor(run->model, i);
        const layer_outcome *o = &run->outcomes[i];
        if (t->role == AQ_ROLE_SCALE) continue;
        if (o->fallback_from && f->fallbacks) count_fallbacks(f->fallbacks, o);
        f->n_fallen += o->fallback_from != NULL;
        if (o->bits == 16) {
            f->n_kept++;
            if (o->n_nonfinite) f->n_kept_nonfinite++;
            continue;
        }
        f->n_layers++;
        f->bits_count[o->bits]++;
        f->n_widened += o->widened;
        f->n_zeroed += o->n_nonfinite;
        f->n_zeroed_tensors += o->n_nonfinite > 0;
        aq_mean_add(&f->mean, t->name, t->count, o->cosine, o->sqnr_db, 0);
        f->n_calibrated += aq_inputs_known(run, i, NULL) != INPUTS_NONE;
        if (isnan(o->output_sqnr_db)) continue;
        f->output_error += (double)t->count * pow(10, -o->output_sqnr_db / 10);
        f->output_weight += (double)t->count;
    }
    return f->fallbacks != NULL;
}

/* Mean of the relative output errors, in dB; NaN where nothing was measured. */
static double output_db(const figures *f) { return f->output_weight > 0 ? -10 * log10(f->output_error / f->output_weight) : (double)NAN; }

static double fallback_rate(const figures *f) {
    uint64_t n = 0;
    for (int bits = 2; bits <= 8; bits++) n += f->bits_count[bits];
    uint64_t tried = n + (uint64_t)json_integer_value(json_object_get(f->fallbacks, "keep"));
    return tried ? (double)f->n_fallen / (double)tried : 0;
}

/* What to change, by what took the place of what was asked (fallback_key). */
#define MORE_BITS "use more bits or smaller groups, or lower --min-accuracy"
#define BETTER_H "calibrate with more samples, or raise --damping"
static const struct {
    const char *key, *todo;
} advice[] = {{"int2", MORE_BITS},
              {"int4", MORE_BITS},
              {"int8", MORE_BITS},
              {"keep", MORE_BITS},
              {"search", BETTER_H},
              {"affine", BETTER_H},
              {"per-channel", "leave equalization out with --smooth=none"},
              {"base", "record inputs at timesteps that cover the whole schedule, or use fewer --time-groups"}};

/* More than a fifth of the layers went another way than was asked: the settings do not suit the model. */
void aq_warn_fallback_rate(quantize_run *run) {
    figures f;
    if (!add_up(run, &f)) return;
    double rate = fallback_rate(&f);
    char percent[32], todo[400] = "";
    for (size_t i = 0; i < sizeof advice / sizeof *advice; i++) {
        size_t at = strlen(todo);
        if (!json_object_get(f.fallbacks, advice[i].key) || strstr(todo, advice[i].todo)) continue;
        snprintf(todo + at, sizeof todo - at, "%s%s", at ? "; " : "", advice[i].todo);
    }
    if (rate > 0.2) aq_sentences_add(&run->warnings, "%s %% of the layers fell back: %s", aq_text_fixed(percent, 100 * rate, 0), todo);
    if (rate > 0.2) aq_job_log(&run->job, AQ_LOG_WARNING, "%s", run->warnings.items[run->warnings.n_items - 1]);
    json_decref(f.fallbacks);
}

/* The most frequent width; the larger of two that tie. */
static int usual_bits(const figures *f) {
    int best = 0;
    for (int bits = 2; bits <= 8; bits++)
        if (f->bits_count[bits] && (!best || f->bits_count[bits] >= f->bits_count[best])) best = bits;
    return best;
}

static json_t *nonfinite_json(const figures *f) {
    return json_pack("{s:I, s:I, s:I}", "zeroed_values", (json_int_t)f->n_zeroed, "zeroed_tensors", (json_int_t)f->n_zeroed_tensors, "kept_tensors",
                     (json_int_t)f->n_kept_nonfinite);
}

/* Where the weights lay below the root: "transformer", "" for the root itself. */
static const char *weights_folder(const aq_model *model) {
    const char *root = aq_model_root(model), *dir = aq_model_weights_dir(model);
    size_t n = strlen(root);
    if (strncmp(dir, root, n) != 0) return "";
    dir += n;
    while (*dir == '/') dir++;
    return dir;
}

static uint64_t count_weights(const aq_model *model, size_t *n_tensors) {
    uint64_t n = 0;
    *n_tensors = 0;
    for (size_t i = 0; i < aq_model_n_tensors(model); i++) {
        const aq_tensor_info *t = aq_model_tensor(model, i);
        if (t->role == AQ_ROLE_SCALE) continue;
        n += t->count;
        ++*n_tensors;
    }
    return n;
}

static json_t *header_metadata(const aq_model *model) {
    json_t *map = json_object();
    const char *key, *value;
    for (size_t i = 0; map && aq_model_metadata(model, i, &key, &value); i++) json_object_set_new(map, key, aq_report_text(value));
    return map;
}

/* Merged adapters, by the names of their files. */
static json_t *lora_json(const aq_model *m) {
    json_t *list = json_array();
    for (size_t i = 0; list && i < aq_model_n_adapters(m); i++) {
        const aq_adapter_info *a = aq_model_adapter(m, i);
        char *name = aq_path_basename(a->path);
        json_t *entry =
            json_pack("{s:o, s:o, s:I}", "name", aq_report_text(name), "strength", aq_report_real(a->strength), "n_layers", (json_int_t)a->n_layers);
        aq_free(name);
        if (json_array_append_new(list, entry) == 0) continue;
        json_decref(list);
        return NULL;
    }
    return list;
}

static json_t *source_json(const quantize_run *run) {
    const aq_model *m = run->model;
    char *name = aq_path_basename(aq_model_path(m));
    size_t n_tensors;
    uint64_t n_weights = count_weights(m, &n_tensors);
    json_t *json =
        json_pack("{s:o, s:s, s:o, s:o, s:o, s:o, s:I, s:I, s:I, s:I, s:o}", "name", aq_report_text(name), "format", aq_model_format(m), "class",
                  aq_report_text(aq_model_class(m)), "component", aq_report_text(aq_model_component(m)), "weights_folder", aq_report_text(weights_folder(m)),
                  "weights_name", aq_report_text(aq_model_weights_name(m)), "n_files", (json_int_t)aq_model_n_files(m), "n_tensors", (json_int_t)n_tensors,
                  "n_weights", (json_int_t)n_weights, "size_bytes", (json_int_t)run->source_bytes, "metadata", header_metadata(m));
    aq_free(name);
    if (json && aq_model_n_adapters(m) > 0 && json_object_set_new(json, "lora", lora_json(m)) != 0) {
        json_decref(json);
        return NULL;
    }
    return json;
}

static json_t *modality_json(const aq_model *model) {
    aq_modality m = aq_model_modality(model);
    return m == AQ_MODALITY_UNKNOWN ? json_null() : json_string(aq_modality_name(m));
}

/* A plan that was given: one that was made from a budget follows from the settings. */
static json_t *plan_json(const quantize_run *run) {
    char fingerprint[65];
    if (!run->plan || run->plan_follows) return json_null();
    return aq_plan_fingerprint(run->plan, fingerprint, NULL) == AQ_OK ? json_pack("{s:s}", "fingerprint", fingerprint) : NULL;
}

char *aq_metadata_text(const quantize_run *run) {
    figures f;
    if (!add_up(run, &f)) return NULL;
    json_t *summary =
        json_pack("{s:I, s:I, s:i, s:o, s:o, s:o, s:o, s:O, s:I, s:o, s:b}", "n_layers", (json_int_t)f.n_layers, "n_kept", (json_int_t)f.n_kept, "bit_width",
                  usual_bits(&f), "cosine", aq_report_real(aq_mean_cosine(&f.mean)), "sqnr_db", aq_report_real(aq_mean_sqnr_db(&f.mean)), "output_sqnr_db",
                  aq_report_real(output_db(&f)), "worst", aq_mean_worst_json(&f.mean), "fallbacks", f.fallbacks, "n_widened", (json_int_t)f.n_widened,
                  "nonfinite", nonfinite_json(&f), "calibrated", f.n_calibrated > 0);
    json_t *json = json_pack("{s:s, s:s, s:s, s:o, s:s, s:o, s:o, s:o, s:o, s:o, s:o}", "format", "arrowquant", "schema_version", AQ_SCHEMA_VERSION,
                             "arrowquant_version", AQ_VERSION, "modality", modality_json(run->model), "modality_source", aq_model_modality_source(run->model),
                             "config", aq_report_parsed(run->config_json), "source", source_json(run), "calibration", aq_report_calibration(run->calib), "plan",
                             plan_json(run), "folds", aq_folds_json(&run->folds, run->model), "summary", summary);
    json_decref(f.fallbacks);
    char *text = json ? aq_json_dump(json, false) : NULL;
    json_decref(json);
    return text;
}

/* ---- the report ---- */

static json_t *layer_json(const aq_store_tensor *s, uint64_t source_bytes) {
    json_t *json = json_pack(
        "{s:o, s:o, s:o, s:o, s:i, s:I, s:s, s:o, s:o, s:o, s:o, s:I, s:I, s:o, s:o}", "name", aq_report_text(s->name), "shape", aq_report_shape(&s->shape),
        "dtype", aq_report_text(s->dtype), "quant_type", aq_report_text(s->quant_type), "bits", s->spec.bits, "group_size", (json_int_t)s->spec.group_size,
        "params", aq_params_form_name(s->spec.params), "method", aq_report_text(s->quality.method), "cosine", aq_report_real(s->quality.cosine), "sqnr_db",
        aq_report_real(s->quality.sqnr_db), "output_sqnr_db", aq_report_real(s->quality.output_sqnr_db), "source_bytes", (json_int_t)source_bytes, "bytes",
        (json_int_t)s->stored_bytes, "fallback_from", aq_report_text(s->quality.fallback_from), "compared_with", aq_report_text(s->quality.compared_with));
    json_t *basis = json_pack("{s:b, s:b, s:I, s:I}", "equalized", s->equalization_scales != NULL, "folded", s->equalization_folded, "hadamard_group",
                              (json_int_t)s->hadamard_group, "time_groups", (json_int_t)s->n_time_groups);
    if (json && basis && json_object_update(json, basis) == 0) {
        json_decref(basis);
        return json;
    }
    json_decref(basis);
    json_decref(json);
    return NULL;
}

static json_t *kept_json(const aq_store_tensor *s, const char *reason) {
    bool corrected = s->quality.method && strcmp(s->quality.method, AQ_STORE_CORRECTED) == 0;
    return json_pack("{s:o, s:o, s:o, s:I, s:o, s:o, s:b}", "name", aq_report_text(s->name), "dtype", aq_report_text(s->dtype), "shape",
                     aq_report_shape(&s->shape), "bytes", (json_int_t)s->stored_bytes, "reason", aq_report_text(reason), "fallback_from",
                     aq_report_text(s->quality.fallback_from), "corrected", corrected);
}

typedef struct {
    json_t *layers, *kept;
    uint64_t layer_weights, layer_bytes; /* of the quantized ones, as stored */
    uint64_t stored_bytes;               /* of all tensors */
} listing;

static bool list_tensors(const quantize_run *run, const aq_store *store, listing *out) {
    *out = (listing){.layers = json_array(), .kept = json_array()};
    for (size_t i = 0; i < run->n_tensors; i++) {
        const aq_tensor_info *t = aq_model_tensor(run->model, i);
        if (t->role == AQ_ROLE_SCALE) continue;
        int64_t at = aq_store_find(store, t->name);
        if (at < 0) return false;
        const aq_store_tensor *s = aq_store_tensor_at(store, (size_t)at);
        out->stored_bytes += s->stored_bytes;
        if (s->quantized) {
            uint64_t scale_bytes = t->scale_index >= 0 ? aq_model_tensor(run->model, (size_t)t->scale_index)->size_bytes : 0;
            out->layer_weights += s->num_params;
            out->layer_bytes += s->layout.codes_bytes + s->layout.params_bytes + 4 * s->n_equalization_scales * (s->folded_shift ? 2 : 1);
            if (json_array_append_new(out->layers, layer_json(s, t->size_bytes + scale_bytes)) != 0) return false;
        } else {
            const char *reason = s->quality.fallback_from ? s->quality.fallback_from : run->choices[i].reason;
            if (json_array_append_new(out->kept, kept_json(s, reason)) != 0) return false;
        }
    }
    return true;
}

static json_t *output_json(const quantize_run *run, const aq_store *store) {
    json_t *files = json_array();
    for (size_t i = 0; i < aq_store_n_files(store); i++) {
        char *name = aq_path_basename(aq_store_file(store, i));
        json_array_append_new(files, aq_report_text(name));
        aq_free(name);
    }
    json_array_append_new(files, json_string("metadata.json"));
    for (size_t i = 0; i < aq_store_n_side_files(store); i++) {
        const char *absolute;
        json_array_append_new(files, aq_report_text(aq_store_side_file(store, i, &absolute)));
    }
    return json_pack("{s:o, s:I, s:o}", "path", aq_report_text(run->out_path), "size_bytes", (json_int_t)aq_store_size_bytes(store), "files", files);
}

static json_t *input_json(const quantize_run *run) {
    const aq_model *m = run->model;
    size_t n_tensors;
    uint64_t n_weights = count_weights(m, &n_tensors);
    return json_pack("{s:o, s:s, s:o, s:o, s:o, s:s, s:I, s:I, s:I}", "path", aq_report_text(aq_model_path(m)), "format", aq_model_format(m), "class",
                     aq_report_text(aq_model_class(m)), "component", aq_report_text(aq_model_component(m)), "modality", modality_json(m), "modality_source",
                     aq_model_modality_source(m), "n_tensors", (json_int_t)n_tensors, "n_weights", (json_int_t)n_weights, "size_bytes",
                     (json_int_t)run->source_bytes);
}

static json_t *target_json(const quantize_run *run, uint64_t size) {
    uint64_t target = aq_target_bytes(run->config);
    return target > 0 ? json_boolean(size <= target) : json_null();
}

static double ratio(double a, double b) { return b > 0 ? a / b : (double)NAN; }

static json_t *summary_json(const quantize_run *run, const aq_store *store, const listing *list, const figures *f) {
    size_t n_tensors;
    double n_weights = (double)count_weights(run->model, &n_tensors), size = (double)aq_store_size_bytes(store), mb = size / (double)(1 << 20);
    json_t *json = json_pack(
        "{s:I, s:I, s:o, s:o, s:o, s:o, s:o, s:o, s:o, s:o, s:o, s:b, s:b, s:o, s:O, s:f, s:I, s:o}", "n_layers", (json_int_t)f->n_layers, "n_kept",
        (json_int_t)f->n_kept, "bits_per_weight", aq_report_real(ratio(8.0 * (double)list->layer_bytes, (double)list->layer_weights)), "bits_per_weight_file",
        aq_report_real(ratio(8 * size, n_weights)), "compression_ratio", aq_report_real(ratio((double)run->source_bytes, (double)list->stored_bytes)), "cosine",
        aq_report_real(aq_mean_cosine(&f->mean)), "sqnr_db", aq_report_real(aq_mean_sqnr_db(&f->mean)), "output_sqnr_db", aq_report_real(output_db(f)), "worst",
        aq_mean_worst_json(&f->mean), "model_size_mb", aq_report_real(mb), "bit_width", f->n_layers ? json_integer(usual_bits(f)) : json_null(), "calibrated",
        f->n_calibrated > 0, "verified", !run->options->no_verify, "target_met", target_json(run, aq_store_size_bytes(store)), "fallbacks", f->fallbacks,
        "fallback_rate", fallback_rate(f), "n_widened", (json_int_t)f->n_widened, "nonfinite", nonfinite_json(f));
    return json;
}

aq_status aq_quantize_report(quantize_run *run, char **report_json, aq_error *err) {
    aq_store *store;
    aq_status status = aq_store_open(&store, run->out_path, err);
    if (status != AQ_OK) return status;
    figures f;
    listing list;
    bool listed = list_tensors(run, store, &list) && add_up(run, &f);
    json_t *report = NULL;
    if (listed) {
        char *config = aq_config_to_json(run->config, false);
        report = json_pack("{s:s, s:o, s:o, s:o, s:o, s:o, s:o, s:o, s:O, s:O, s:o, s:{s:o}, s:{s:I, s:I}}", "schema", "arrowquant.quantize/1", "input",
                           input_json(run), "output", output_json(run, store), "config", aq_report_parsed(config), "calibration",
                           aq_report_calibration(run->calib), "summary", summary_json(run, store, &list, &f), "estimates", aq_estimates_json(run), "folds",
                           aq_folds_json(&run->folds, run->model), "layers", list.layers, "kept", list.kept, "warnings", aq_sentences_json(&run->warnings),
                           "time", "elapsed_s", aq_report_real(aq_now_s() - run->job.start_s), "memory", "peak_rss_bytes", (json_int_t)aq_peak_rss_bytes(),
                           "predicted_peak_bytes", (json_int_t)run->memory.predicted_peak_bytes);
        aq_config_free_text(config);
        json_decref(f.fallbacks);
    }
    json_decref(list.layers);
    json_decref(list.kept);
    aq_store_close(store);
    return aq_report_finish(report, report_json, err);
}
