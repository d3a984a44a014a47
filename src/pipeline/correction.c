/* Bias correction: a layer whose codes stand for W^ errs by (W - W^) x, and the mean of that over the inputs is a constant that its bias can take back:
 * b' = b + (W - W^) E[x] (Nagel et al., "Data-Free Quantization through Weight Equalization and Bias Correction", 2019, section 4.2, with means that were
 * recorded in place of estimated ones). Then the part of the error that stays is that of x less its mean, and codes are chosen for it: by the covariance in
 * place of the second moment. It costs nothing when the model runs, and no bits.
 *
 * A bias becomes known when its layer is coded, so it is stored after it, whatever the order of the source.
 */
#include "base/error.h"
#include "base/mem.h"
#include "pipeline/inputs.h"
#include "pipeline/quantize.h"

bool aq_bias_is_corrected(const quantize_run *run, size_t index) { return run->biases && run->biases[index] >= 0; }

static bool is_wanted(const quantize_run *run, size_t index) {
    return run->choices[index].quantize && aq_inputs_known(run, index, NULL) != INPUTS_NONE && !aq_calib_settings(run->calib)->diagonal_only;
}

aq_status aq_biases_find(quantize_run *run, aq_error *err) {
    size_t n = run->n_tensors, at = 0;
    bool wanted = run->calib && aq_config_bool(run->config, "bias_correction");
    aq_free(run->biases);
    aq_free(run->is_corrected);
    aq_free(run->order);
    run->biases = aq_calloc(n + 1, sizeof *run->biases);
    run->is_corrected = aq_calloc(n + 1, sizeof *run->is_corrected);
    run->order = aq_calloc(n + 1, sizeof *run->order);
    if (!run->biases || !run->is_corrected || !run->order) return aq_fail_memory(err, n * sizeof *run->order, "the tensor list");
    for (size_t i = 0; i < n; i++) {
        int64_t bias = wanted && is_wanted(run, i) ? aq_model_bias_of(run->model, i) : -1;
        run->biases[i] = bias >= 0 && !run->choices[bias].quantize ? bias : -1;
        if (run->biases[i] >= 0) run->is_corrected[bias] = true;
    }
    for (size_t i = 0; i < n; i++) {
        if (!run->is_corrected[i]) run->order[at++] = i;
        if (run->biases[i] >= 0) run->order[at++] = (size_t)run->biases[i];
    }
    return AQ_OK;
}
