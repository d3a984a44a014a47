/* Error between two models of any kind, tensor by tensor (see pipeline.h); a is what b is measured against. */
#include <math.h>
#include <string.h>

#include "base/error.h"
#include "base/file.h"
#include "base/mem.h"
#include "pipeline/compare.h"
#include "pipeline/report.h"

typedef struct {
    aq_source a, b;
    aq_job job;
    aq_pair *pairs;
    aq_pair_result *results;
    size_t n_pairs;
    json_t *only_in_a, *only_in_b, *shapes;
} difference;

static aq_status pair_up(difference *d, aq_error *err) {
    d->pairs = aq_calloc(d->b.n_tensors, sizeof *d->pairs);
    d->results = aq_calloc(d->b.n_tensors, sizeof *d->results);
    d->only_in_a = json_array();
    d->only_in_b = json_array();
    d->shapes = json_array();
    if (!d->pairs || !d->results || !d->only_in_a || !d->only_in_b || !d->shapes)
        return aq_fail_memory(err, d->b.n_tensors * sizeof *d->results, "the tensor list");
    aq_source_tensor a, b;
    char shape_a[192], shape_b[192];
    for (size_t i = 0; i < d->b.n_tensors; i++) {
        aq_source_tensor_at(&d->b, i, &b);
        int64_t partner = aq_source_find(&d->a, b.name);
        if (partner < 0) {
            json_array_append_new(d->only_in_b, aq_report_text(b.name));
            continue;
        }
        aq_source_tensor_at(&d->a, (size_t)partner, &a);
        if (strcmp(aq_text_shape(shape_a, &a.shape), aq_text_shape(shape_b, &b.shape)) != 0 || a.is_float != b.is_float)
            json_array_append_new(d->shapes,
                                  json_pack("{s:o, s:o, s:o, s:o, s:o}", "name", aq_report_text(b.name), "a", aq_report_shape(&a.shape), "b",
                                            aq_report_shape(&b.shape), "a_type", aq_report_text(a.stored_as), "b_type", aq_report_text(b.stored_as)));
        else
            d->pairs[d->n_pairs++] = (aq_pair){partner, i};
    }
    for (size_t i = 0; i < d->a.n_tensors; i++) {
        aq_source_tensor_at(&d->a, i, &a);
        if (aq_source_find(&d->b, a.name) < 0) json_array_append_new(d->only_in_a, aq_report_text(a.name));
    }
    return AQ_OK;
}

static json_t *side_json(const aq_source *s) {
    return json_pack("{s:o, s:s, s:I, s:I}", "path", aq_report_text(aq_source_path(s)), "kind", s->store ? "container" : "model", "n_tensors",
                     (json_int_t)s->n_tensors, "size_bytes", (json_int_t)aq_source_size_bytes(s));
}

static bool is_corrected(const aq_source_tensor *t) {
    return t->stored && !t->stored->quantized && t->stored->quality.method && strcmp(t->stored->quality.method, AQ_STORE_CORRECTED) == 0;
}

static json_t *tensor_json(const difference *d, size_t i, aq_mean *mean, uint64_t *n_equal) {
    const aq_pair_result *r = &d->results[i];
    aq_source_tensor a, b;
    aq_source_tensor_at(&d->a, (size_t)d->pairs[i].a, &a);
    aq_source_tensor_at(&d->b, d->pairs[i].b, &b);
    bool measured = r->is_float && !r->failure;
    double cosine = !measured  ? (double)NAN
                    : r->equal ? 1
                               : aq_quant_metrics_cosine(&r->metrics),
           sqnr = measured ? aq_quant_metrics_sqnr_db(&r->metrics) : (double)NAN;
    *n_equal += r->equal;
    bool corrected = is_corrected(&a) != is_corrected(&b); /* a bias of a run: meant to differ, and no error of its own */
    if (measured && !corrected) aq_mean_add(mean, b.name, b.count, cosine, sqnr, r->metrics.err_max);
    return json_pack("{s:o, s:o, s:o, s:o, s:I, s:I, s:b, s:b, s:o, s:o, s:o, s:I, s:o}", "name", aq_report_text(b.name), "shape", aq_report_shape(&b.shape),
                     "a_type", aq_report_text(a.stored_as), "b_type", aq_report_text(b.stored_as), "a_bytes", (json_int_t)a.stored_bytes, "b_bytes",
                     (json_int_t)b.stored_bytes, "equal", r->equal, "corrected", corrected, "cosine", aq_report_real(cosine), "sqnr_db", aq_report_real(sqnr),
                     "max_error", measured ? aq_report_real(r->metrics.err_max) : json_null(), "n_nonfinite_differ", (json_int_t)r->n_odd, "failure",
                     aq_report_text(r->failure));
}

static aq_status give_report(difference *d, char **report_json, aq_error *err) {
    json_t *tensors = json_array();
    aq_mean mean = {0};
    uint64_t n_equal = 0;
    for (size_t i = 0; tensors && i < d->n_pairs; i++) json_array_append_new(tensors, tensor_json(d, i, &mean, &n_equal));
    bool same_names = json_array_size(d->only_in_a) == 0 && json_array_size(d->only_in_b) == 0 && json_array_size(d->shapes) == 0;
    json_t *report =
        json_pack("{s:s, s:o, s:o, s:b, s:o, s:O, s:O, s:O, s:{s:I, s:I, s:o, s:o, s:o, s:o}, s:{s:o}}", "schema", "arrowquant.diff/1", "a", side_json(&d->a),
                  "b", side_json(&d->b), "equal", same_names && n_equal == d->n_pairs, "tensors", tensors, "only_in_a", d->only_in_a, "only_in_b", d->only_in_b,
                  "shape_differs", d->shapes, "summary", "n_compared", (json_int_t)d->n_pairs, "n_equal", (json_int_t)n_equal, "cosine",
                  aq_report_real(aq_mean_cosine(&mean)), "sqnr_db", aq_report_real(aq_mean_sqnr_db(&mean)), "max_error", aq_report_real(mean.max_error),
                  "worst", aq_mean_worst_json(&mean), "time", "elapsed_s", aq_report_real(aq_now_s() - d->job.start_s));
    return aq_report_finish(report, report_json, err);
}

aq_status aq_diff(const char *a, const char *b, const aq_model_options *options, const aq_job_hooks *hooks, int n_threads, char **report_json, aq_error *err) {
    difference d = {0};
    if (report_json) *report_json = NULL;
    aq_error_clear(err);
    aq_job_init(&d.job, hooks, 0, 0);
    aq_status status = aq_source_open(&d.a, a, options, err);
    if (status == AQ_OK) status = aq_source_open(&d.b, b, options, err);
    if (status == AQ_OK) status = d.b.store ? aq_source_align_folds(&d.a, &d.b, err) : aq_source_align_folds(&d.b, &d.a, err);
    if (status == AQ_OK) d.a.unfolds = d.b.unfolds = true;
    if (status == AQ_OK) status = pair_up(&d, err);
    if (status == AQ_OK) status = aq_compare(&d.a, &d.b, d.pairs, d.n_pairs, d.results, &d.job, "diff", n_threads, err);
    if (status == AQ_OK && d.a.model) status = aq_model_check_unchanged(d.a.model, err);
    if (status == AQ_OK && d.b.model) status = aq_model_check_unchanged(d.b.model, err);
    if (status == AQ_OK) status = give_report(&d, report_json, err);
    aq_pair_results_free(d.results, d.n_pairs);
    aq_free(d.pairs);
    json_decref(d.only_in_a);
    json_decref(d.only_in_b);
    json_decref(d.shapes);
    aq_source_close(&d.a);
    aq_source_close(&d.b);
    return status;
}
