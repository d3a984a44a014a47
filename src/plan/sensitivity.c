/* Scores of layers (see plan.h): how much a layer suffers from coarse codes, before any budget. */
#include <math.h>
#include <pthread.h>
#include <string.h>

#include "base/error.h"
#include "base/mem.h"
#include "base/threads.h"
#include "plan/plan_internal.h"

static const char *const names[] = {"variance", "hessian", "gradient"};

int aq_sensitivity_from_name(const char *name) {
    for (int i = 0; i < 3; i++)
        if (strcmp(names[i], name) == 0) return i;
    return -1;
}

const char *aq_sensitivity_name(aq_sensitivity method) { return names[method]; }

typedef struct {
    const aq_model *model;
    const aq_plan_options *options;
    aq_sensitivity method;
    double *raw;
    pthread_mutex_t mutex;
    size_t failed; /* the first tensor that failed, of those that were tried */
    aq_error error;
} work;

/* Mean square of the ranges of groups of 128 over the variance, over all sampled values: uniform steps leave 1/12 step^2 of each value. */
static double spread(const float *w, const aq_plan_rows *rows) {
    enum { GROUP = 128 };
    double ranges = 0, sum = 0, sum_sq = 0, n = (double)rows->n_rows * (double)rows->cols;
    for (uint64_t r = 0; r < rows->n_rows; r++)
        for (uint64_t i = 0; i < rows->cols; i += GROUP) {
            uint64_t end = i + GROUP < rows->cols ? i + GROUP : rows->cols;
            float low = 0, high = 0;
            for (uint64_t k = i; k < end; k++) {
                float v = w[r * rows->cols + k];
                if (v < low) low = v;
                if (v > high) high = v;
                sum += (double)v;
                sum_sq += (double)v * (double)v;
            }
            double range = (double)high - (double)low;
            ranges += range * range * (double)(end - i);
        }
    double variance = sum_sq / n - sum / n * (sum / n);
    return variance > 0 ? ranges / n / variance : 0;
}

static aq_status score_rows(const work *w, size_t tensor, const aq_plan_rows *rows, const float *values, double *out, aq_error *err) {
    const aq_tensor_info *t = aq_model_tensor(w->model, tensor);
    if (w->method == AQ_SENSITIVITY_VARIANCE) {
        *out = spread(values, rows);
        return AQ_OK;
    }
    aq_quant_spec spec = {.bits = 4, .group_size = 128, .axis = 1, .params = AQ_PARAMS_F32, .method = AQ_METHOD_RTN};
    if (w->method == AQ_SENSITIVITY_GRADIENT) return aq_plan_gradient_error(w->options, t, &spec, rows, values, out, err);
    aq_plan_inputs inputs;
    aq_plan_trial trial;
    aq_status status = aq_plan_inputs_make(&inputs, w->options, w->model, tensor, err);
    if (status == AQ_OK) status = aq_plan_try(&inputs, &spec, values, rows->n_rows, rows->cols, &trial, err);
    if (status == AQ_OK) *out = trial.ref > 0 ? trial.err / trial.ref : 0;
    aq_plan_inputs_free(&inputs);
    return status;
}

static bool do_tensor(void *context, size_t index) {
    work *w = context;
    const aq_tensor_info *t = aq_model_tensor(w->model, index);
    if (w->options->requests[index].open != AQ_PLAN_OPEN || t->count == 0) return true;
    aq_plan_rows rows = aq_plan_rows_of(t, w->options->sample_values);
    aq_error error, *err = &error;
    uint64_t n_bad;
    float *values = aq_alloc(rows.n_rows * rows.cols * sizeof *values);
    aq_status status = values ? AQ_OK : aq_fail_memory(err, rows.n_rows * rows.cols * sizeof *values, "rows of a layer");
    if (status == AQ_OK) status = aq_plan_read_rows(w->model, index, &rows, values, &n_bad, err);
    if (status == AQ_OK) status = score_rows(w, index, &rows, values, &w->raw[index], err);
    aq_free(values);
    aq_model_release(w->model, index);
    if (status == AQ_OK) return true;
    pthread_mutex_lock(&w->mutex);
    if (w->error.code == AQ_OK || index < w->failed) {
        w->error = error;
        w->failed = index;
    }
    pthread_mutex_unlock(&w->mutex);
    return false;
}

/* 0..1 by the logarithm: the order stays, and ratios become distances. Zero is the least. */
static void scale(const double *raw, double *scores, size_t n) {
    double low = HUGE_VAL, high = -HUGE_VAL;
    for (size_t i = 0; i < n; i++)
        if (raw[i] > 0) low = fmin(low, log(raw[i])), high = fmax(high, log(raw[i]));
    for (size_t i = 0; i < n; i++) {
        if (isnan(raw[i]))
            scores[i] = raw[i];
        else if (!(raw[i] > 0))
            scores[i] = 0;
        else
            scores[i] = high > low ? (log(raw[i]) - low) / (high - low) : 0.5;
    }
}

/* What the method needs is there for every open layer. */
static aq_status check_data(const aq_model *model, const aq_plan_options *o, aq_sensitivity method, aq_error *err) {
    if (method == AQ_SENSITIVITY_VARIANCE) return AQ_OK;
    bool gradient = method == AQ_SENSITIVITY_GRADIENT;
    for (size_t i = 0; i < aq_model_n_tensors(model); i++) {
        const aq_tensor_info *t = aq_model_tensor(model, i);
        if (o->requests[i].open != AQ_PLAN_OPEN || t->count == 0) continue;
        if (gradient ? aq_plan_has_gradient(o, t) : aq_plan_inputs_known(o, t) != AQ_PLAN_KNOWS_NOTHING) continue;
        aq_fail_at(err, AQ_ERR_USAGE, NULL, t->name, "the sensitivity method \"%s\" needs %s, and %s", names[method],
                   gradient ? "gradients of the loss" : "calibration statistics",
                   o->calib ? "the calibration has none of this layer" : "no calibration is given");
        aq_hint(err, gradient
                         ? "collect them in torch with arrow_quant_v2.torch.Recorder(model, \"FILE.aqcal\", gradients=True) around loss.backward(), or with "
                           "gradients=\"output\", which needs no loss, then give --calib=FILE.aqcal; the method \"variance\" needs no data"
                         : "collect them in torch with arrow_quant_v2.torch.Recorder(model, \"FILE.aqcal\"), then give --calib=FILE.aqcal; the method "
                           "\"variance\" needs no data");
        return AQ_ERR_USAGE;
    }
    return AQ_OK;
}

aq_status aq_plan_sensitivity(const aq_model *model, const aq_plan_options *options, aq_sensitivity method, double *scores, double *raw, aq_error *err) {
    size_t n = aq_model_n_tensors(model);
    aq_status status = check_data(model, options, method, err);
    if (status != AQ_OK) return status;
    work w = {.model = model, .options = options, .method = method};
    if (!(w.raw = aq_alloc((n + 1) * sizeof *w.raw))) return aq_fail_memory(err, n * sizeof *w.raw, "scores");
    for (size_t i = 0; i < n; i++) w.raw[i] = (double)NAN;
    pthread_mutex_init(&w.mutex, NULL);
    if (aq_parallel_for(n, options->n_threads, do_tensor, &w)) {
        scale(w.raw, scores, n);
        if (raw) memcpy(raw, w.raw, n * sizeof *raw);
    } else {
        status = w.error.code;
        if (err) *err = w.error;
    }
    pthread_mutex_destroy(&w.mutex);
    aq_free(w.raw);
    return status;
}
