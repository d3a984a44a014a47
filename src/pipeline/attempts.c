/* Strategy per layer (see attempts.h).
 *
 * With a second moment of the inputs every attempt is measured in the layer's output, so the strategy only has to name what is worth a try:
 *   auto, image and audio   search, gptq; gptq on equalized channels (spatial)
 *   auto, text and code     search, gptq; at 2 bits r2q
 *   --rotate hadamard       the main method once more on rotated inputs
 *   --act-bits 8            the widest inputs scaled down, as far as the noise of 8-bit inputs is worth it
 * The better one stays. A method that is named is taken as it is, with rotation and equalization tried where asked for. Without a second moment nothing can
 * be compared: gptq is the search, r2q its own fit with every input counting the same.
 */
#include "pipeline/attempts.h"

#include <stdio.h>
#include <string.h>

typedef struct list {
    attempt *out;
    size_t n;
    bool corrected;
} list;

static void add(list *l, const aq_quant_spec *spec, aq_method method, inputs_want want, aq_equalize equalized, uint32_t hadamard_group) {
    if (l->n == MOST_ATTEMPTS) return;
    attempt *a = &l->out[l->n++];
    *a = (attempt){.spec = *spec, .want = want, .basis = {.equalized = equalized, .hadamard_group = hadamard_group, .corrected = l->corrected}};
    a->spec.method = method;
}

/* An attempt beside the main one that this layer's form does not have is left out. */
static void drop_last_if_impossible(list *l, uint64_t rows, uint64_t cols) {
    aq_quant_layout layout;
    if (l->n > 1 && aq_quant_layout_init(&layout, &l->out[l->n - 1].spec, rows, cols, NULL) != AQ_OK) l->n--;
}

static bool word_is(const quantize_run *run, const char *field, const char *word) { return strcmp(aq_config_string(run->config, field), word) == 0; }

bool aq_spatial_is_asked(const quantize_run *run, size_t index) {
    if (aq_inputs_known(run, index, NULL) == INPUTS_NONE || aq_calib_settings(run->calib)->diagonal_only) return false; /* nothing is known of ranges */
    return word_is(run, "smooth", "ditas") && aq_config_bool(run->config, "enable_spatial");
}

/* A plan that names the method is carried out as it is: equalization scales would take what other layers were given. */
static bool spatial_is_tried(const quantize_run *run, size_t index) {
    const aq_plan_layer *planned = aq_planned(run, aq_model_tensor(run->model, index));
    if (planned && planned->method && strcmp(planned->method, "auto") != 0) return false;
    aq_modality m = aq_model_modality(run->model);
    return word_is(run, "smooth", "auto") && aq_config_bool(run->config, "enable_spatial") && (m == AQ_MODALITY_IMAGE || m == AQ_MODALITY_AUDIO);
}

bool aq_spatial_is_possible(const quantize_run *run, size_t index) {
    return aq_spatial_is_asked(run, index) || (spatial_is_tried(run, index) && aq_inputs_known(run, index, NULL) == INPUTS_METRIC);
}

/* R2Q's own parameters in place of the pairs. */
static aq_quant_spec r2q_spec(const quantize_run *run, const aq_quant_spec *spec) {
    aq_quant_spec r2q = *spec;
    r2q.params = AQ_PARAMS_R2Q;
    r2q.symmetric = false;
    if (spec->params == AQ_PARAMS_TWO_LEVEL) r2q.group_size = (uint64_t)aq_config_int(run->config, "group_size", 128);
    return r2q;
}

/* Method `main` on the bases that the settings name. */
static void add_bases(const quantize_run *run, size_t index, list *l, const aq_quant_spec *spec, aq_method main, inputs_want want, bool spatial,
                      uint64_t cols) {
    bool asked = spatial && aq_spatial_is_asked(run, index);
    aq_equalize as_asked = asked ? AQ_EQUALIZE_HALF : AQ_EQUALIZE_NONE;
    uint64_t group = word_is(run, "rotate", "hadamard") && want >= INPUTS_METRIC ? aq_hadamard_size(cols) : 1;
    add(l, spec, main, want, as_asked, 0);
    if (group > 1) add(l, spec, main, want, as_asked, (uint32_t)group);
    if (!spatial || asked || !spatial_is_tried(run, index) || want < INPUTS_METRIC) return;
    add(l, spec, main, want, AQ_EQUALIZE_HALF, 0);
    if (aq_config_int(run->config, "act_bits", 16) != 8) return;
    for (int k = AQ_EQUALIZE_LIMIT_1; k <= AQ_EQUALIZE_LIMIT_6; k++) add(l, spec, main, want, (aq_equalize)k, 0);
}

/* Where the equalization is folded, what is left to try is in its basis. */
static size_t keep_folded(const quantize_run *run, size_t index, attempt *attempts, size_t n) {
    const aq_fold *fold = aq_fold_of(&run->folds, index, NULL);
    size_t kept = 0;
    if (!fold) return n;
    for (size_t i = 0; i < n; i++) {
        if (attempts[i].basis.equalized != fold->strength) continue;
        attempts[kept] = attempts[i];
        attempts[kept++].basis.fold = fold;
    }
    return kept;
}

aq_status aq_attempts(const quantize_run *run, size_t index, int bits, bool spatial, attempt out[MOST_ATTEMPTS], size_t *n, aq_error *err) {
    aq_quant_spec spec;
    *n = 0;
    aq_status status = aq_spec_at(run, index, bits, &spec, err);
    if (status != AQ_OK) return status;
    list l = {.out = out, .corrected = aq_bias_is_corrected(run, index)};
    uint64_t rows, cols;
    aq_shape_matrix(&aq_model_tensor(run->model, index)->shape, &rows, &cols);
    inputs_want known = aq_inputs_known(run, index, NULL);
    aq_modality m = aq_model_modality(run->model);
    if (spec.axis != 1 && known == INPUTS_METRIC) known = INPUTS_DIAGONAL;
    bool solves = known == INPUTS_METRIC, is_auto = run->choices[index].auto_method, asked = spatial && aq_spatial_is_asked(run, index);
    if (spec.method == AQ_METHOD_RTN) {
        add_bases(run, index, &l, &spec, AQ_METHOD_RTN, solves ? INPUTS_METRIC : asked ? INPUTS_DIAGONAL : INPUTS_NONE, spatial, cols);
    } else if (spec.method == AQ_METHOD_R2Q) {
        add_bases(run, index, &l, &spec, AQ_METHOD_R2Q, INPUTS_FACTOR, spatial && known != INPUTS_NONE, cols);
    } else if (solves && is_auto) {
        add(&l, &spec, AQ_METHOD_SEARCH, INPUTS_FACTOR, asked ? AQ_EQUALIZE_HALF : AQ_EQUALIZE_NONE, 0);
        add_bases(run, index, &l, &spec, AQ_METHOD_GPTQ, INPUTS_FACTOR, spatial, cols);
        aq_quant_spec r2q = r2q_spec(run, &spec);
        if (bits == 2 && (m == AQ_MODALITY_TEXT || m == AQ_MODALITY_CODE)) {
            add(&l, &r2q, AQ_METHOD_R2Q, INPUTS_FACTOR, asked ? AQ_EQUALIZE_HALF : AQ_EQUALIZE_NONE, 0);
            drop_last_if_impossible(&l, rows, cols);
        }
    } else if (solves && spec.method == AQ_METHOD_GPTQ) {
        add_bases(run, index, &l, &spec, AQ_METHOD_GPTQ, INPUTS_FACTOR, spatial, cols);
    } else {
        add_bases(run, index, &l, &spec, AQ_METHOD_SEARCH, known, spatial, cols);
    }
    *n = keep_folded(run, index, out, l.n);
    return AQ_OK;
}

const char *aq_attempt_name(const attempt *a, char out[48]) {
    snprintf(out, 48, "%s%s%s", aq_method_name(a->spec.method), a->basis.equalized || a->basis.fold ? " + spatial" : "",
             a->basis.hadamard_group > 1 ? " + hadamard" : "");
    return out;
}

uint64_t aq_attempts_bytes(const attempt *attempts, size_t n, uint64_t n_inputs, uint64_t *making) {
    uint64_t sum = 0;
    *making = 0;
    for (size_t i = 0; i < n; i++) {
        uint64_t extra, bytes = aq_inputs_bytes(attempts[i].want, n_inputs, &extra);
        bool seen = false;
        for (size_t k = 0; k < i; k++) seen |= attempts[k].want == attempts[i].want && aq_same_basis(&attempts[k].basis, &attempts[i].basis);
        if (seen) continue;
        sum = sum > UINT64_MAX - bytes ? UINT64_MAX : sum + bytes;
        if (extra > *making) *making = extra;
    }
    return sum;
}
