/* What calibration knows of a layer's inputs, and the error of one candidate by it (see plan.h). */
#include <math.h>
#include <string.h>

#include "base/error.h"
#include "base/mem.h"
#include "plan/plan_internal.h"

/* The layer's number in the collection, -1 when it has nothing about it. */
static int64_t find(const aq_plan_options *options, const aq_tensor_info *t, uint64_t *cols) {
    uint64_t rows;
    aq_shape_matrix(&t->shape, &rows, cols);
    int64_t at = options->calib ? aq_calib_find(options->calib, t->name) : -1;
    return at >= 0 && aq_calib_n_inputs(options->calib, (size_t)at) == *cols && aq_calib_count(options->calib, (size_t)at) > 0 ? at : -1;
}

aq_plan_knowledge aq_plan_inputs_known(const aq_plan_options *options, const aq_tensor_info *t) {
    uint64_t cols;
    int64_t at = find(options, t, &cols);
    if (at < 0) return AQ_PLAN_KNOWS_NOTHING;
    return aq_calib_has_hessian(options->calib, (size_t)at) ? AQ_PLAN_KNOWS_HESSIAN : AQ_PLAN_KNOWS_DIAGONAL;
}

uint64_t aq_plan_inputs_bytes(const aq_plan_options *options, const aq_tensor_info *t) {
    uint64_t cols;
    int64_t at = find(options, t, &cols);
    if (at < 0) return 0;
    if (!aq_calib_has_hessian(options->calib, (size_t)at)) return 4 * cols;
    return 4 * cols * (cols + 1) + aq_hessian_bytes(cols);
}

aq_status aq_plan_inputs_make(aq_plan_inputs *out, const aq_plan_options *options, const aq_tensor_info *t, aq_error *err) {
    *out = (aq_plan_inputs){.trace = 1, .options = options};
    int64_t at = find(options, t, &out->n);
    if (at < 0) return AQ_OK;
    bool whole = aq_calib_has_hessian(options->calib, (size_t)at);
    out->diagonal = aq_alloc(out->n * sizeof *out->diagonal);
    out->h = whole ? aq_alloc(out->n * out->n * sizeof *out->h) : NULL;
    aq_status status =
        out->diagonal && (out->h || !whole) ? AQ_OK : aq_fail_memory(err, out->n * out->n * sizeof *out->h, "the second moment of a layer's inputs");
    if (status == AQ_OK && whole) status = aq_calib_hessian(options->calib, (size_t)at, NULL, out->h, err);
    if (status == AQ_OK && !whole) status = aq_calib_diagonal(options->calib, (size_t)at, NULL, out->diagonal, err);
    if (status == AQ_ERR_QUALITY) { /* not finite: as if nothing were known */
        uint64_t n = out->n;
        aq_plan_inputs_free(out);
        *out = (aq_plan_inputs){.trace = 1, .options = options, .n = n};
        aq_error_clear(err);
        return AQ_OK;
    }
    double trace = 0;
    for (uint64_t i = 0; i < out->n && status == AQ_OK; i++) {
        if (whole) out->diagonal[i] = out->h[i * out->n + i];
        trace += (double)out->diagonal[i];
    }
    if (status != AQ_OK)
        aq_plan_inputs_free(out);
    else if (trace > 0)
        out->trace = trace / (double)out->n;
    return status;
}

aq_status aq_plan_inputs_factor(aq_plan_inputs *inputs, aq_error *err) {
    if (!inputs->h || inputs->hessian || inputs->unfactorable) return AQ_OK;
    aq_solve_options solve;
    aq_solve_options_init(&solve);
    aq_status status = aq_hessian_create(&inputs->hessian, inputs->h, inputs->n, inputs->options->solve ? inputs->options->solve : &solve, 1, err);
    inputs->unfactorable = status == AQ_ERR_QUALITY;
    return inputs->unfactorable ? AQ_OK : status;
}

void aq_plan_inputs_free(aq_plan_inputs *inputs) {
    aq_free(inputs->diagonal);
    aq_free(inputs->h);
    if (inputs->hessian) aq_hessian_free(inputs->hessian);
    *inputs = (aq_plan_inputs){0};
}

/* sum h_i (w_i - v_i)^2 over rows; v may be NULL: 0, h may be NULL: 1. */
static double weighted(const float *w, const float *v, const float *h, uint64_t n_rows, uint64_t cols) {
    double sum = 0;
    for (uint64_t r = 0; r < n_rows; r++)
        for (uint64_t i = 0; i < cols; i++) {
            double e = (double)w[r * cols + i] - (v ? (double)v[r * cols + i] : 0);
            sum += (h ? (double)h[i] : 1) * e * e;
        }
    return sum;
}

aq_status aq_plan_energy(const aq_plan_inputs *inputs, const float *w, uint64_t n_rows, uint64_t cols, double *out, aq_error *err) {
    if (!inputs->h) {
        *out = weighted(w, NULL, inputs->diagonal, n_rows, cols);
        return AQ_OK;
    }
    float *zeros = aq_calloc(n_rows * cols, sizeof *zeros);
    if (!zeros) return aq_fail_memory(err, n_rows * cols * sizeof *zeros, "rows of a layer");
    aq_output_error e = {0};
    aq_status status = aq_output_error_add(w, zeros, n_rows, cols, inputs->h, 1, &e, err);
    *out = e.ref;
    aq_free(zeros);
    return status;
}

/* Error of what `codes` decode to. */
static aq_status compare(const aq_plan_inputs *inputs, const aq_quant_spec *spec, const aq_quant_layout *layout, const uint8_t *codes, const void *params,
                         const float *w, aq_plan_trial *out, aq_error *err) {
    uint64_t n = layout->rows * layout->cols;
    float *back = aq_alloc(n * sizeof *back);
    if (!back) return aq_fail_memory(err, n * sizeof *back, "a candidate");
    aq_status status = AQ_OK;
    aq_dequantize(spec, layout, codes, params, 0, layout->rows, back);
    if (inputs->h) {
        aq_output_error e = {0};
        status = aq_output_error_add(w, back, layout->rows, layout->cols, inputs->h, 1, &e, err);
        out->err = e.err;
        out->ref = e.ref;
    } else {
        out->err = weighted(w, back, inputs->diagonal, layout->rows, layout->cols);
        out->ref = weighted(w, NULL, inputs->diagonal, layout->rows, layout->cols);
    }
    aq_free(back);
    return status;
}

static aq_status code(const aq_plan_inputs *inputs, const aq_quant_spec *spec, const aq_quant_layout *layout, const float *w, uint8_t *codes, void *params,
                      aq_plan_trial *out, aq_error *err) {
    aq_quant_metrics metrics = {0};
    aq_output_error output = {0};
    aq_solve_options solve;
    aq_solve_options_init(&solve);
    bool solved = spec->method == AQ_METHOD_GPTQ || spec->method == AQ_METHOD_R2Q;
    aq_status status;
    if (solved)
        status = aq_solve(w, spec, layout, inputs->hessian, inputs->options->solve ? inputs->options->solve : &solve, 1, codes, params, &metrics, &output,
                          &out->needs_f32, NULL, NULL, err);
    else
        status = aq_quantize(w, spec, layout, inputs->diagonal, 1, codes, params, &metrics, &out->needs_f32, err);
    if (out->needs_f32) return AQ_OK;
    if (status != AQ_OK) return status;
    out->cosine = aq_quant_metrics_cosine(&metrics);
    out->err = solved ? output.err : metrics.err_sq;
    out->ref = solved ? output.ref : metrics.w_sq;
    return !solved && inputs->diagonal ? compare(inputs, spec, layout, codes, params, w, out, err) : AQ_OK;
}

aq_status aq_plan_try(const aq_plan_inputs *inputs, const aq_quant_spec *spec, const float *w, uint64_t n_rows, uint64_t cols, aq_plan_trial *out,
                      aq_error *err) {
    aq_quant_layout layout;
    aq_status status = aq_quant_layout_init(&layout, spec, n_rows, cols, err);
    if (status != AQ_OK) return status;
    *out = (aq_plan_trial){0};
    uint8_t *codes = aq_alloc(layout.codes_bytes), *params = aq_alloc(layout.params_bytes);
    status = codes && params ? code(inputs, spec, &layout, w, codes, params, out, err) : aq_fail_memory(err, layout.codes_bytes, "a candidate");
    aq_free(codes);
    aq_free(params);
    return status;
}
