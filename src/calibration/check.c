/* Do statistics belong to a model (CA01)? By names and numbers of inputs: weights may have been fine-tuned since. */
#include <math.h>
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

/* ---- what is weak ---- */

typedef struct {
    uint64_t layers, empty, no_group, short_of_rows, constant, unknown;
    char first_group[200];
} findings;

static void look_at_layer(const aq_calib *c, size_t index, findings *f) {
    const aq_calib_layer *layer = &c->layers[index];
    uint64_t n_seen = 0, rows = 0;
    uint32_t missing = 0;
    for (uint32_t g = c->options.n_groups; g-- > 0;) {
        if (layer->groups[g].count == 0) missing = g;
        n_seen += layer->groups[g].count > 0;
        rows += layer->groups[g].count;
    }
    f->layers++;
    if (n_seen == 0) {
        f->empty++;
        return;
    }
    if (n_seen < c->options.n_groups && f->no_group++ == 0) {
        char shown[128];
        uint32_t start, end;
        aq_calib_group_range(c, missing, &start, &end);
        snprintf(f->first_group, sizeof f->first_group, "%s, timesteps %u to %u", aq_escape(shown, sizeof shown, layer->name, strlen(layer->name)), start, end);
    }
    f->short_of_rows += rows < layer->n_inputs;
    for (uint64_t j = 0; !c->options.diagonal_only && j < layer->n_inputs; j++) {
        float lo = INFINITY, hi = -INFINITY;
        for (uint32_t g = 0; g < c->options.n_groups; g++) {
            const aq_sums *s = &layer->groups[g];
            if (s->count == 0) continue;
            lo = s->min[j] < lo ? s->min[j] : lo;
            hi = s->max[j] > hi ? s->max[j] : hi;
        }
        f->constant += lo == hi;
    }
    if (layer->n_inputs > 0 && layer->n_timesteps > 0 && layer->timesteps[0].timestep == -1 && c->options.n_timesteps > 0)
        f->unknown += layer->timesteps[0].count / layer->n_inputs;
}

void aq_calib_warnings(const aq_calib *c, void (*tell)(void *user, const char *sentence), void *user) {
    findings f = {0};
    char text[400];
    for (size_t i = 0; i < c->n_layers; i++)
        if (c->layers[i].source == i) look_at_layer(c, i, &f);
    if (c->options.synthetic) tell(user, "the statistics are synthetic: made from random inputs, not from data");
    if (c->options.diagonal_only) tell(user, "the statistics are an imported importance matrix: mean squares of the inputs, no second moments and no ranges");
    if (f.layers == 0) tell(user, "the statistics hold no layer");
    if (f.empty > 0) {
        snprintf(text, sizeof text, "%llu of %llu layers saw no input; they count as not calibrated", (unsigned long long)f.empty,
                 (unsigned long long)f.layers);
        tell(user, text);
    }
    if (f.no_group > 0) {
        snprintf(text, sizeof text, "%llu layers have time groups without rows (first: %s); the groups that were seen stand for them",
                 (unsigned long long)f.no_group, f.first_group);
        tell(user, text);
    }
    if (f.short_of_rows > 0) {
        snprintf(text, sizeof text, "%llu layers saw fewer rows than they have inputs; record more samples", (unsigned long long)f.short_of_rows);
        tell(user, text);
    }
    if (f.constant > 0) {
        snprintf(text, sizeof text, "%llu inputs never change; their weights matter only as an offset", (unsigned long long)f.constant);
        tell(user, text);
    }
    if (f.unknown > 0) {
        snprintf(text, sizeof text, "%llu rows came without a timestep and count in the first time group", (unsigned long long)f.unknown);
        tell(user, text);
    }
}
