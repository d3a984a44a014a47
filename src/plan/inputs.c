/* What calibration knows of a layer's inputs, and the error of one candidate by it (see plan.h). */
#include <math.h>
#include <string.h>

#include "base/error.h"
#include "base/mem.h"
#include "plan/plan_internal.h"
#include "quant/code.h"

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

int64_t aq_plan_bias_of(const aq_plan_options *options, const aq_model *model, size_t tensor) {
    uint64_t cols;
    if (!options->corrects_biases || find(options, aq_model_tensor(model, tensor), &cols) < 0 || aq_calib_settings(options->calib)->diagonal_only) return -1;
    return aq_model_bias_of(model, tensor);
}

/* Makes H and its diagonal those of x less its mean. Statistics that lack rows of the mean, or hardly vary, stay as they are. */
static aq_status centre(aq_plan_inputs *in, size_t layer, aq_error *err) {
    bool whole;
    float *mean = aq_alloc(in->n * sizeof *mean);
    aq_status status =
        mean ? aq_calib_mean(in->options->calib, layer, NULL, mean, &whole, err) : aq_fail_memory(err, in->n * sizeof *mean, "means of a layer's inputs");
    if (status != AQ_OK || (in->h && !whole) || !aq_moment_varies(in->diagonal, 1, in->n, mean)) {
        aq_free(mean);
        return status;
    }
    in->mean = mean;
    if (in->h) aq_shift_moment(in->h, in->n, mean, mean);
    for (uint64_t i = 0; i < in->n; i++) {
        double all = (double)in->diagonal[i], m = (double)mean[i];
        in->diagonal[i] = in->h ? in->h[i * in->n + i] : (float)fmax(all - m * m, 1e-6 * all);
    }
    return AQ_OK;
}

aq_status aq_plan_inputs_make(aq_plan_inputs *out, const aq_plan_options *options, const aq_model *model, size_t tensor, aq_error *err) {
    *out = (aq_plan_inputs){.trace = 1, .options = options};
    int64_t at = find(options, aq_model_tensor(model, tensor), &out->n);
    if (at < 0) return AQ_OK;
    bool whole = aq_calib_has_hessian(options->calib, (size_t)at);
    out->diagonal = aq_alloc(out->n * sizeof *out->diagonal);
    out->h = whole ? aq_alloc(out->n * out->n * sizeof *out->h) : NULL;
    aq_status status =
        out->diagonal && (out->h || !whole) ? AQ_OK : aq_fail_memory(err, out->n * out->n * sizeof *out->h, "the second moment of a layer's inputs");
    if (status == AQ_OK && whole) status = aq_calib_hessian(options->calib, (size_t)at, NULL, out->h, err);
    if (status == AQ_OK && !whole) status = aq_calib_diagonal(options->calib, (size_t)at, NULL, out->diagonal, err);
    double trace = 0;
    for (uint64_t i = 0; i < out->n && status == AQ_OK; i++) {
        if (whole) out->diagonal[i] = out->h[i * out->n + i];
        trace += (double)out->diagonal[i];
    }
    if (status == AQ_OK && trace > 0) out->trace = trace / (double)out->n;
    if (status == AQ_OK && aq_plan_bias_of(options, model, tensor) >= 0) status = centre(out, (size_t)at, err);
    if (status == AQ_OK) return AQ_OK;
    uint64_t n = out->n;
    aq_plan_inputs_free(out);
    if (status != AQ_ERR_QUALITY) return status;
    *out = (aq_plan_inputs){.trace = 1, .options = options, .n = n}; /* not finite: as if nothing were known */
    aq_error_clear(err);
    return AQ_OK;
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
    aq_free(inputs->mean);
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

/* What the output has by the mean of the inputs, in the measure that is used: H's, or that of its diagonal. */
static double power_of_mean(const aq_plan_inputs *inputs, const float *w, uint64_t n_rows, uint64_t cols) {
    double power = 0;
    for (uint64_t r = 0; inputs->mean && r < n_rows; r++) {
        double sum = 0, squares = 0;
        for (uint64_t i = 0; i < cols; i++) {
            double y = (double)w[r * cols + i] * (double)inputs->mean[i];
            sum += y;
            squares += y * y;
        }
        power += inputs->h ? sum * sum : squares;
    }
    return power;
}

aq_status aq_plan_energy(const aq_plan_inputs *inputs, const float *w, uint64_t n_rows, uint64_t cols, double *out, aq_error *err) {
    if (!inputs->h) {
        *out = weighted(w, NULL, inputs->diagonal, n_rows, cols) + power_of_mean(inputs, w, n_rows, cols);
        return AQ_OK;
    }
    float *zeros = aq_calloc(n_rows * cols, sizeof *zeros);
    if (!zeros) return aq_fail_memory(err, n_rows * cols * sizeof *zeros, "rows of a layer");
    aq_output_error e = {0};
    aq_status status = aq_output_error_add(w, zeros, n_rows, cols, inputs->h, 1, &e, err);
    *out = e.ref + power_of_mean(inputs, w, n_rows, cols);
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
    if (!solved && inputs->diagonal) status = compare(inputs, spec, layout, codes, params, w, out, err);
    if (status == AQ_OK) out->ref += power_of_mean(inputs, w, layout->rows, layout->cols);
    return status;
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
