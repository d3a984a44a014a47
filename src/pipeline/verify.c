/* Is a container whole, and how good is it (see pipeline.h): hashes, bounds, every value read; against a source the real error of each tensor. */
#include <arrowquant/store.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "base/error.h"
#include "base/file.h"
#include "base/mem.h"
#include "pipeline/compare.h"
#include "pipeline/report.h"

typedef struct {
    aq_source b, a;
    bool against;
    aq_job job;
    double floor_given;  /* negative: by the container */
    double floor_stored; /* of the stored configuration, negative when there is none */
    bool zeroed;         /* values of the source that are not finite were set to zero on purpose */
    aq_sentences problems, warnings;
    aq_pair *pairs;
    aq_pair_result *results;
    size_t n_pairs;
    aq_mean mean;
    uint64_t n_layers, source_bytes, stored_bytes;
} verification;

static void on_problem(void *user, const char *problem) { aq_sentences_add(&((verification *)user)->problems, "%s", problem); }

static bool keep_going(void *user) {
    verification *v = user;
    return aq_job_tell(&v->job, "verify", NULL, NULL, 0, 0, 0);
}

static const char *escaped(char out[512], const char *name) { return aq_escape(out, 512, name, strlen(name)); }

static double floor_of(const verification *v, const aq_store_tensor *t) {
    if (v->floor_given >= 0) return v->floor_given;
    if (v->floor_stored >= 0) return v->floor_stored;
    return t->spec.bits == 2 ? 0.70 : t->spec.bits == 4 ? 0.90 : 0.95;
}

static void read_stored_config(verification *v) {
    json_t *config = aq_report_parsed(aq_store_config_json(v->b.store));
    json_t *floor = json_object_get(config, "min_accuracy");
    v->floor_stored = json_is_number(floor) ? json_number_value(floor) : -1;
    const char *nonfinite = json_string_value(json_object_get(config, "nonfinite"));
    v->zeroed = nonfinite && strcmp(nonfinite, "zero") == 0;
    json_decref(config);
}

/* Pairs every tensor of the container with its source; what does not pair is a problem. */
static aq_status pair_up(verification *v, aq_error *err) {
    size_t n = v->b.n_tensors;
    v->pairs = aq_calloc(n, sizeof *v->pairs);
    v->results = aq_calloc(n, sizeof *v->results);
    if (!v->pairs || !v->results) return aq_fail_memory(err, n * (sizeof *v->pairs + sizeof *v->results), "the tensor list");
    char name[512], in_a[192], in_b[192];
    aq_source_tensor a, b;
    for (size_t i = 0; i < n; i++) {
        aq_source_tensor_at(&v->b, i, &b);
        int64_t partner = v->against ? aq_source_find(&v->a, b.name) : -1;
        if (v->against && partner < 0) aq_sentences_add(&v->problems, "tensor \"%s\" is not in %s", escaped(name, b.name), aq_source_path(&v->a));
        if (partner >= 0) {
            aq_source_tensor_at(&v->a, (size_t)partner, &a);
            if (strcmp(aq_text_shape(in_a, &a.shape), aq_text_shape(in_b, &b.shape)) != 0 || a.is_float != b.is_float) {
                aq_sentences_add(&v->problems, "tensor \"%s\": %s %s here, %s %s in the source", escaped(name, b.name), b.stored_as, in_b, a.stored_as, in_a);
                partner = -1;
            }
        }
        v->pairs[v->n_pairs++] = (aq_pair){partner, i};
    }
    for (size_t i = 0; v->against && i < v->a.n_tensors; i++) {
        aq_source_tensor_at(&v->a, i, &a);
        if (aq_source_find(&v->b, a.name) < 0) aq_sentences_add(&v->problems, "tensor \"%s\" of the source is missing", escaped(name, a.name));
    }
    return AQ_OK;
}

/* True when the container holds this tensor in the source's own element type. */
static bool is_verbatim(const aq_source_tensor *t) { return !t->stored->quantized && strcasecmp(t->dtype, t->stored_as) == 0; }

/* A bias that makes up for the mean error of its layer is not the source's: its layer must be one of the container's quantized ones. */
static bool is_corrected(const verification *v, const aq_source_tensor *t) {
    const char *method = t->stored->quality.method;
    size_t stem = strlen(t->name);
    if (t->stored->quantized || !method || strcmp(method, AQ_STORE_CORRECTED) != 0 || stem < 5 || strcmp(t->name + stem - 5, ".bias") != 0) return false;
    char *weight = aq_alloc(stem + 3);
    if (!weight) return false;
    snprintf(weight, stem + 3, "%.*sweight", (int)(stem - 4), t->name);
    int64_t layer = aq_store_find(v->b.store, weight);
    aq_free(weight);
    return layer >= 0 && aq_store_tensor_at(v->b.store, (size_t)layer)->quantized && aq_store_tensor_at(v->b.store, (size_t)layer)->rows == t->count;
}

/* What the check of the files has found already is told once. */
static void add_failure(verification *v, const char *name, const char *failure) {
    for (size_t i = 0; i < v->problems.n_items; i++)
        if (strcmp(v->problems.items[i], failure) == 0) return;
    if (strstr(failure, name))
        aq_sentences_add(&v->problems, "%s", failure);
    else
        aq_sentences_add(&v->problems, "tensor \"%s\": %s", name, failure);
}

static json_t *judge_tensor(verification *v, size_t i) {
    const aq_pair *pair = &v->pairs[i];
    const aq_pair_result *r = &v->results[i];
    aq_source_tensor t;
    aq_source_tensor_at(&v->b, pair->b, &t);
    char name[512], got[32], floor_text[32];
    escaped(name, t.name);
    size_t before = v->problems.n_items;
    bool quantized = t.stored->quantized, measured = pair->a >= 0 && r->is_float;
    double cosine = !measured ? t.stored->quality.cosine : r->equal ? 1 : aq_quant_metrics_cosine(&r->metrics);
    double sqnr = measured ? aq_quant_metrics_sqnr_db(&r->metrics) : t.stored->quality.sqnr_db, floor = quantized ? floor_of(v, t.stored) : (double)NAN;
    if (r->failure) add_failure(v, name, r->failure);
    if (quantized && r->n_nonfinite_b)
        aq_sentences_add(&v->problems, "tensor \"%s\": %llu dequantized values are not finite", name, (unsigned long long)r->n_nonfinite_b);
    if (!quantized && r->n_nonfinite_b)
        aq_sentences_add(&v->warnings, "tensor \"%s\": %llu values are NaN or infinite", name, (unsigned long long)r->n_nonfinite_b);
    if (quantized && r->n_nonfinite_a)
        aq_sentences_add(v->zeroed ? &v->warnings : &v->problems, "tensor \"%s\": %llu values of the source are not finite", name,
                         (unsigned long long)r->n_nonfinite_a);
    if (pair->a >= 0 && !r->failure && is_verbatim(&t) && !r->equal && !is_corrected(v, &t))
        aq_sentences_add(&v->problems, "tensor \"%s\" is kept and differs from the source", name);
    if (quantized && !r->failure && isfinite(cosine) && cosine < floor) {
        aq_text_below(got, floor_text, cosine, floor);
        aq_sentences_add(&v->problems, "layer \"%s\": cosine similarity %s is below the floor %s", name, got, floor_text);
    }
    if (quantized) {
        v->n_layers++;
        if (measured || !v->against) aq_mean_add(&v->mean, t.name, t.count, cosine, sqnr, measured ? r->metrics.err_max : 0);
    }
    if (pair->a >= 0) {
        aq_source_tensor a;
        aq_source_tensor_at(&v->a, (size_t)pair->a, &a);
        v->source_bytes += a.stored_bytes;
        v->stored_bytes += t.stored_bytes;
    }
    return json_pack("{s:o, s:o, s:o, s:o, s:I, s:o, s:o, s:o, s:o, s:s, s:b}", "name", aq_report_text(t.name), "shape", aq_report_shape(&t.shape),
                     "quant_type", aq_report_text(t.stored_as), "bits", quantized ? json_integer(t.stored->spec.bits) : json_null(), "bytes",
                     (json_int_t)t.stored_bytes, "cosine", aq_report_real(cosine), "sqnr_db", aq_report_real(sqnr), "max_error",
                     measured ? aq_report_real(r->metrics.err_max) : json_null(), "floor", aq_report_real(floor), "measured",
                     measured    ? "against"
                     : quantized ? "stored"
                                 : "none",
                     "ok", !r->failure && v->problems.n_items == before);
}

static json_t *summary(const verification *v) {
    uint64_t size = aq_store_size_bytes(v->b.store);
    return json_pack("{s:I, s:I, s:o, s:o, s:o, s:o, s:o, s:o, s:I}", "n_tensors", (json_int_t)v->b.n_tensors, "n_layers", (json_int_t)v->n_layers, "cosine",
                     aq_report_real(aq_mean_cosine(&v->mean)), "sqnr_db", aq_report_real(aq_mean_sqnr_db(&v->mean)), "worst", aq_mean_worst_json(&v->mean),
                     "max_error", v->against ? aq_report_real(v->mean.max_error) : json_null(), "compression_ratio",
                     v->stored_bytes ? aq_report_real((double)v->source_bytes / (double)v->stored_bytes) : json_null(), "model_size_mb",
                     aq_report_real((double)size / (double)(1 << 20)), "size_bytes", (json_int_t)size);
}

static aq_status give_report(verification *v, char **report_json, aq_error *err) {
    json_t *tensors = json_array();
    for (size_t i = 0; tensors && i < v->n_pairs; i++) json_array_append_new(tensors, judge_tensor(v, i));
    bool ok = v->problems.n_items == 0;
    json_t *report = json_pack("{s:s, s:o, s:o, s:b, s:o, s:o, s:o, s:o, s:{s:o}}", "schema", "arrowquant.verify/1", "path",
                               aq_report_text(aq_source_path(&v->b)), "against", v->against ? aq_report_text(aq_source_path(&v->a)) : json_null(), "ok", ok,
                               "problems", aq_sentences_json(&v->problems), "warnings", aq_sentences_json(&v->warnings), "tensors", tensors, "summary",
                               summary(v), "time", "elapsed_s", aq_report_real(aq_now_s() - v->job.start_s));
    aq_status status = aq_report_finish(report, report_json, err);
    if (status != AQ_OK || ok) return status;
    aq_fail_at(err, AQ_ERR_QUALITY, aq_source_path(&v->b), NULL, "%zu problem%s: %s", v->problems.n_items, v->problems.n_items == 1 ? "" : "s",
               v->problems.items[0]);
    return AQ_ERR_QUALITY;
}

aq_status aq_verify(const char *path, const char *against, const aq_model_options *options, const aq_job_hooks *hooks, int n_threads, double min_accuracy,
                    char **report_json, aq_error *err) {
    verification v = {.against = against != NULL, .floor_given = min_accuracy};
    if (report_json) *report_json = NULL;
    aq_error_clear(err);
    aq_job_init(&v.job, hooks, 0, 0);
    aq_status status = aq_source_open(&v.b, path, options, err);
    if (status == AQ_OK && !v.b.store) {
        status = aq_fail_at(err, AQ_ERR_FORMAT, path, NULL, "is a source model, not a container that ArrowQuant wrote");
        aq_hint(err, "arrowquant inspect checks a source model; arrowquant diff compares two models");
    }
    if (status == AQ_OK && against) status = aq_source_open(&v.a, against, options, err);
    if (status == AQ_OK && against) status = aq_source_align_folds(&v.a, &v.b, err);
    if (status == AQ_OK) status = aq_job_tell(&v.job, "verify", NULL, NULL, 0, 0, 0) ? AQ_OK : aq_job_cancelled(err, "nothing was changed");
    if (status == AQ_OK) {
        read_stored_config(&v);
        if (aq_path_is_dir(path) && *aq_store_schema_version(v.b.store) && !*aq_store_metadata_json(v.b.store))
            aq_sentences_add(&v.warnings, "metadata.json is missing: each tensor is checked against its own hash, the files are not against theirs");
        status = aq_store_verify_while(v.b.store, on_problem, &v, keep_going, &v, err);
        if (status == AQ_ERR_QUALITY) status = AQ_OK; /* what it found is in the list */
    }
    if (status == AQ_OK) status = pair_up(&v, err);
    if (status == AQ_OK) status = aq_compare(&v.a, &v.b, v.pairs, v.n_pairs, v.results, &v.job, "verify", n_threads, err);
    if (status == AQ_OK && against && v.a.model) status = aq_model_check_unchanged(v.a.model, err);
    if (status == AQ_OK) status = give_report(&v, report_json, err);
    aq_pair_results_free(v.results, v.n_pairs);
    aq_free(v.pairs);
    aq_sentences_free(&v.problems);
    aq_sentences_free(&v.warnings);
    aq_source_close(&v.a);
    aq_source_close(&v.b);
    return status;
}
