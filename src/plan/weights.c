/* What a relative error of 1 in each layer costs the model (aq_plan_weighting): the factors that make errors of different layers comparable. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/error.h"
#include "base/mem.h"
#include "plan/plan_internal.h"

static bool same_layer(const char *given, const char *tensor) {
    size_t n = strlen(given);
    return strncmp(given, tensor, n) == 0 && (tensor[n] == 0 || strcmp(tensor + n, ".weight") == 0);
}

static int rising(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

/* The median of the n given weights stands in for those that are not given. */
static aq_status given(aq_plan_problem *p, const aq_plan_options *o, aq_error *err) {
    for (size_t k = 0; k < o->n_weights; k++)
        if (!(o->weights[k] >= 0) || isinf(o->weights[k]))
            return aq_fail_at(err, AQ_ERR_USAGE, NULL, o->weight_names[k], "its weight is negative or not finite");
    double *sorted = aq_alloc(o->n_weights * sizeof *sorted);
    if (!sorted) return aq_fail_memory(err, o->n_weights * sizeof *sorted, "weights");
    memcpy(sorted, o->weights, o->n_weights * sizeof *sorted);
    qsort(sorted, o->n_weights, sizeof *sorted, rising);
    double median = sorted[o->n_weights / 2];
    aq_free(sorted);
    for (size_t i = 0; i < p->n_items; i++) {
        p->items[i].weight = median;
        for (size_t k = 0; k < o->n_weights; k++)
            if (same_layer(o->weight_names[k], p->items[i].name)) p->items[i].weight = o->weights[k];
    }
    p->weighting = "given";
    return AQ_OK;
}

/* ---- gradients ---- */

typedef struct {
    const double *rows, *cols;
    uint64_t n_rows, n_cols;
} gradient;

static bool find_gradient(const aq_plan_options *o, const aq_tensor_info *t, gradient *out) {
    uint64_t rows, cols;
    aq_shape_matrix(&t->shape, &rows, &cols);
    int64_t at = o->calib ? aq_calib_find(o->calib, t->name) : -1;
    if (at < 0 || !aq_calib_gradient(o->calib, (size_t)at, &out->rows, &out->n_rows, &out->cols)) return false;
    out->n_cols = aq_calib_n_inputs(o->calib, (size_t)at);
    return out->n_rows == rows && out->n_cols == cols;
}

bool aq_plan_has_gradient(const aq_plan_options *options, const aq_tensor_info *t) {
    gradient g;
    return find_gradient(options, t, &g);
}

static double mean(const double *values, uint64_t n) {
    double sum = 0;
    for (uint64_t i = 0; i < n; i++) sum += values[i];
    return n ? sum / (double)n : 0;
}

/* The square of a single gradient is taken as the product of its row's and its column's mean square over the mean of all. */
aq_status aq_plan_gradient_error(const aq_plan_options *options, const aq_tensor_info *t, const aq_quant_spec *spec, const aq_plan_rows *rows,
                                 const float *values, double *out, aq_error *err) {
    gradient g;
    aq_quant_layout layout;
    aq_status status = find_gradient(options, t, &g) ? AQ_OK : aq_fail_at(err, AQ_ERR_USAGE, NULL, t->name, "the calibration has no gradients of this layer");
    if (status == AQ_OK) status = aq_quant_layout_init(&layout, spec, rows->n_rows, rows->cols, err);
    if (status != AQ_OK) return status;
    uint64_t n = rows->n_rows * rows->cols;
    uint8_t *codes = aq_alloc(layout.codes_bytes), *params = aq_alloc(layout.params_bytes);
    float *back = aq_alloc(n * sizeof *back);
    status = codes && params && back ? aq_quantize(values, spec, &layout, NULL, 1, codes, params, NULL, NULL, err) : aq_fail_memory(err, n, "a candidate");
    double sum = 0, all = mean(g.rows, g.n_rows);
    if (status == AQ_OK) {
        aq_dequantize(spec, &layout, codes, params, 0, rows->n_rows, back);
        for (uint64_t r = 0; r < rows->n_rows; r++)
            for (uint64_t c = 0; c < rows->cols; c++) {
                double e = (double)values[r * rows->cols + c] - (double)back[r * rows->cols + c];
                sum += g.rows[aq_plan_row_at(rows, r)] * g.cols[c] * e * e;
            }
        *out = all > 0 ? sqrt(sum / all / (double)n) : 0;
    }
    aq_free(codes);
    aq_free(params);
    aq_free(back);
    return status;
}

/* ---- all of them ---- */

static size_t count_gradients(const aq_plan_problem *p, const aq_model *model, const aq_plan_options *o, const size_t *tensors, size_t *n_open) {
    size_t n = 0;
    *n_open = 0;
    for (size_t i = 0; i < p->n_items; i++) {
        if (p->items[i].fixed) continue;
        ++*n_open;
        n += aq_plan_has_gradient(o, aq_model_tensor(model, tensors[i]));
    }
    return n;
}

/* In the Kronecker form of the curvature (K-FAC: Martens, Grosse 2015) a row's mean square gradient is that of its output times the mean of H's diagonal.
 * A layer without gradients (an embedding, say) counts as the costliest one. */
static void by_gradients(aq_plan_problem *p, const aq_model *model, const aq_plan_options *o, const size_t *tensors, const double *energies) {
    double most = 0;
    for (size_t i = 0; i < p->n_items; i++) {
        gradient g;
        bool found = find_gradient(o, aq_model_tensor(model, tensors[i]), &g);
        p->items[i].weight = found ? mean(g.rows, g.n_rows) * energies[i] : -1;
        if (p->items[i].weight > most) most = p->items[i].weight;
    }
    for (size_t i = 0; i < p->n_items; i++)
        if (p->items[i].weight < 0) p->items[i].weight = most;
    p->weighting = "gradient";
}

aq_status aq_plan_weigh(aq_plan_problem *p, const aq_model *model, const aq_plan_options *o, const size_t *tensors, const double *energies, aq_error *err) {
    if (o->n_weights) return given(p, o, err);
    size_t n_open, n = count_gradients(p, model, o, tensors, &n_open);
    if (o->weighting == AQ_PLAN_WEIGHT_GRADIENT && n == 0) {
        aq_fail(err, AQ_ERR_USAGE, "weights by gradients need gradients of the layers, and %s",
                o->calib ? "the calibration has none" : "no calibration is given");
        aq_hint(
            err,
            "collect them in torch with arrow_quant_v2.torch.Recorder(model, \"FILE.aqcal\", gradients=\"output\"), or gradients=True around loss.backward()");
        return AQ_ERR_USAGE;
    }
    if (o->weighting == AQ_PLAN_WEIGHT_GRADIENT || (o->weighting == AQ_PLAN_WEIGHT_AUTO && 2 * n > n_open)) {
        by_gradients(p, model, o, tensors, energies);
        return AQ_OK;
    }
    bool equal = o->weighting == AQ_PLAN_WEIGHT_EQUAL;
    for (size_t i = 0; i < p->n_items; i++) p->items[i].weight = equal ? 1 : sqrt((double)aq_model_tensor(model, tensors[i])->count);
    p->weighting = equal ? "equal" : "size";
    return AQ_OK;
}
