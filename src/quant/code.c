/* Coding rows by any method, measured in the layer's output (see code.h). */
#include "quant/code.h"

#include <math.h>
#include <string.h>

#include <arrowquant/time.h>

#include "base/error.h"
#include "base/mem.h"

static bool is_changed(const aq_coder *c) { return c->equalization || c->hadamard_group > 1; }

/* Rows of W in the basis of the codes, and back. */
static void change_basis(const aq_coder *c, float *w, uint64_t rows, uint64_t cols) {
    if (c->equalization) aq_scale_columns(w, rows, cols, c->equalization, true);
    if (c->hadamard_group > 1) aq_hadamard(w, rows, cols, c->hadamard_group);
}

static void restore_basis(const aq_coder *c, float *v, uint64_t rows, uint64_t cols) {
    if (c->hadamard_group > 1) aq_hadamard(v, rows, cols, c->hadamard_group);
    if (c->equalization) aq_scale_columns(v, rows, cols, c->equalization, false);
}

static bool all_finite(const float *x, uint64_t n) {
    uint64_t i = 0;
    while (i < n && isfinite(x[i])) i++;
    return i == n;
}

static bool needs_solver(const aq_coder *c) { return c->spec.method != AQ_METHOD_RTN && c->hessian; }

static aq_status choose_codes(const aq_coder *c, const float *w, const aq_quant_layout *layout, int n_threads, uint8_t *codes, void *params, aq_coded *out,
                              aq_going keep_going, void *user, aq_error *err) {
    if (!needs_solver(c)) return aq_quantize(w, &c->spec, layout, c->importance, n_threads, codes, params, &out->metrics, &out->needs_f32, err);
    aq_quant_spec spec = c->spec;
    aq_solve_options options = c->solve;
    if (spec.method == AQ_METHOD_SEARCH) { /* the same search, measured */
        spec.method = AQ_METHOD_GPTQ;
        options.no_feedback = true;
        options.refine_sweeps = 0;
    }
    return aq_solve(w, &spec, layout, c->hessian, &options, n_threads, codes, params, &out->metrics, &out->output, &out->needs_f32, keep_going, user, err);
}

void aq_shift_moment(float *h, uint64_t n, const float *mean, const float *shift) {
    for (uint64_t i = 0; i < n; i++) {
        double a = (double)mean[i], m = (double)shift[i], least = 1e-6 * (double)h[i * n + i];
        for (uint64_t k = 0; k < n; k++) h[i * n + k] = (float)((double)h[i * n + k] - a * (double)shift[k] - m * (double)mean[k] + m * (double)shift[k]);
        if ((double)h[i * n + i] < least) h[i * n + i] = (float)least;
    }
}

bool aq_moment_varies(const float *diagonal, uint64_t stride, uint64_t n, const float *mean) {
    double all = 0, of_mean = 0;
    for (uint64_t i = 0; i < n; i++) {
        all += (double)diagonal[i * stride];
        of_mean += (double)mean[i] * (double)mean[i];
    }
    return all - of_mean > 1e-3 * all;
}

/* What the bias makes up for, v being the weights that are run with. */
static void correct(const aq_coder *c, const float *w, const float *v, uint64_t rows, uint64_t cols, aq_coded *out) {
    for (uint64_t r = 0; r < rows; r++, w += cols, v += cols) {
        double sum = 0;
        for (uint64_t i = 0; i < cols; i++) sum += ((double)w[i] - (double)v[i]) * (double)c->corrected[i];
        c->bias_change[r] = sum;
        out->bias_sq += sum * sum;
    }
    if (c->h_has_mean) out->output.err = fmax(out->output.err - out->bias_sq, 0);
}

/* What is measured on the dequantized values: the output error without a solver, the metrics of W itself when the codes are those of W R / s, and what the
 * bias makes up for. */
static aq_status measure(const aq_coder *c, const float *w, const float *changed, const aq_quant_layout *layout, const uint8_t *codes, const void *params,
                         int n_threads, aq_coded *out, aq_error *err) {
    bool wants_output = c->h && !needs_solver(c);
    if (!wants_output && !is_changed(c) && !c->corrected) return AQ_OK;
    uint64_t n = layout->rows * layout->cols;
    float *v = aq_alloc(n * sizeof *v);
    if (!v) return aq_fail_memory(err, n * sizeof *v, "dequantized values");
    aq_dequantize(&c->spec, layout, codes, params, 0, layout->rows, v);
    aq_status status = AQ_OK;
    if (wants_output) status = aq_output_error_add(changed, v, layout->rows, layout->cols, c->h, n_threads, &out->output, err);
    if (status == AQ_OK && is_changed(c)) {
        restore_basis(c, v, layout->rows, layout->cols);
        aq_quant_metrics_compute(w, v, n, &out->metrics);
    }
    if (status == AQ_OK && c->corrected) correct(c, w, v, layout->rows, layout->cols, out);
    aq_free(v);
    return status;
}

/* tr(W H W^T) of x beyond that of x - m: sum of 2 (w m)(w a) - (w m)^2, a the mean. */
static double power_of_shift(const aq_coder *c, const float *w, uint64_t rows, uint64_t cols) {
    double power = 0;
    for (uint64_t r = 0; c->shift && r < rows; r++, w += cols) {
        double m = 0, a = 0;
        for (uint64_t i = 0; i < cols; i++) {
            m += (double)w[i] * (double)c->shift[i];
            a += (double)w[i] * (double)c->mean[i];
        }
        power += 2 * m * a - m * m;
    }
    return power;
}

aq_status aq_code_rows(const aq_coder *coder, const float *w, uint64_t rows, uint64_t cols, int n_threads, uint8_t *codes, void *params, aq_coded *out,
                       aq_going keep_going, void *user, aq_error *err) {
    *out = (aq_coded){0};
    aq_quant_layout layout;
    aq_status status = aq_quant_layout_init(&layout, &coder->spec, rows, cols, err);
    if (status != AQ_OK) return status;
    float *changed = NULL;
    uint64_t n = rows * cols;
    if (is_changed(coder)) {
        if (!(changed = aq_alloc(n * sizeof *changed))) return aq_fail_memory(err, n * sizeof *changed, "weights in another basis");
        memcpy(changed, w, n * sizeof *changed);
        change_basis(coder, changed, rows, cols);
    }
    const float *basis = changed ? changed : w;
    if (changed && !all_finite(changed, n) && all_finite(w, n)) { /* beyond F32 in this basis alone */
        aq_free(changed);
        out->needs_f32 = true;
        return AQ_OK;
    }
    status = choose_codes(coder, basis, &layout, n_threads, codes, params, out, keep_going, user, err);
    out->code_sq = out->metrics.v_sq;
    if (out->needs_f32)
        status = AQ_OK;
    else if (status == AQ_OK)
        status = measure(coder, w, basis, &layout, codes, params, n_threads, out, err);
    if (status == AQ_OK && !out->needs_f32) out->output.ref += power_of_shift(coder, w, rows, cols);
    aq_free(changed);
    return status;
}
