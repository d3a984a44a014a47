/* Do statistics belong to a model (CA01)? By names and numbers of inputs: weights may have been fine-tuned since. */
#include <stdio.h>
#include <string.h>

#include "calibration/internal.h"

enum { MOST_NAMED = 5 };

/* Appends "NAME: what" to the list in `text`. */
static void name_it(char *text, size_t size, size_t *at, uint64_t n_before, const char *name, const char *what) {
    char shown[128];
    if (n_before >= MOST_NAMED || *at >= size) return;
    aq_escape(shown, sizeof shown, name, strlen(name));
    int n = snprintf(text + *at, size - *at, "%s\"%s\" %s", *at ? "; " : "", shown, what);
    *at += n > 0 ? (size_t)n : 0;
}

aq_status aq_calib_check(const aq_calib *c, const aq_model *model, void (*missing)(void *user, const char *name), void *user, aq_error *err) {
    aq_error_clear(err);
    char list[1024] = "", what[128];
    size_t at = 0;
    uint64_t n_wrong = 0;
    for (size_t i = 0; i < c->n_layers; i++) {
        const aq_calib_layer *layer = &c->layers[i];
        int64_t index = aq_model_find(model, layer->name);
        uint64_t rows, cols = 0;
        if (index >= 0) aq_shape_matrix(&aq_model_tensor(model, (size_t)index)->shape, &rows, &cols);
        if (index >= 0 && cols == layer->n_inputs) continue;
        if (index < 0)
            snprintf(what, sizeof what, "is no tensor of the model");
        else
            snprintf(what, sizeof what, "has %llu inputs in the statistics and %llu in the model", (unsigned long long)layer->n_inputs,
                     (unsigned long long)cols);
        name_it(list, sizeof list, &at, n_wrong++, layer->name, what);
    }
    if (n_wrong > 0) {
        aq_fail(err, AQ_ERR_FORMAT, "the statistics are of another model: %s%s", list, n_wrong > MOST_NAMED ? "; and more" : "");
        aq_hint(err, "%llu of %zu layers disagree; record statistics with this model", (unsigned long long)n_wrong, c->n_layers);
        return AQ_ERR_FORMAT;
    }
    for (size_t i = 0; missing && i < aq_model_n_tensors(model); i++) {
        const aq_tensor_info *tensor = aq_model_tensor(model, i);
        if (tensor->role == AQ_ROLE_LAYER && aq_calib_find(c, tensor->name) < 0) missing(user, tensor->name);
    }
    return AQ_OK;
}
