/* Folds applied to a source model, and told (see fold.h). Each value is computed in double and rounded once. */
#include "pipeline/fold.h"

#include <math.h>
#include <string.h>

#include "base/error.h"
#include "base/json.h"
#include "base/mem.h"
#include "base/threads.h"
#include "pipeline/report.h"

void aq_folds_free(aq_folds *folds) {
    for (size_t i = 0; i < folds->n; i++) {
        aq_free(folds->items[i].scales);
        aq_free(folds->items[i].shift);
        for (size_t k = 0; k < AQ_PRODUCER_CONSUMERS; k++) aq_free(folds->items[i].compared[k]);
    }
    aq_free(folds->items);
    *folds = (aq_folds){0};
}

const aq_fold *aq_fold_of(const aq_folds *folds, size_t tensor, size_t *consumer) {
    for (size_t i = 0; i < folds->n; i++)
        for (size_t k = 0; folds->items[i].scales && k < folds->items[i].producer.n_consumers; k++) {
            if (folds->items[i].producer.consumers[k] != tensor) continue;
            if (consumer) *consumer = k;
            return &folds->items[i];
        }
    return NULL;
}

/* The consumer whose bias the tensor is, -1: none. */
static int bias_of(const aq_fold *f, size_t tensor) {
    for (size_t k = 0; f->scales && f->shift && k < f->producer.n_consumers; k++)
        if (f->producer.biases[k] == (int64_t)tensor) return (int)k;
    return -1;
}

static const aq_producer_part *part_of(const aq_fold *f, size_t tensor, size_t at) {
    return f->scales && at < f->producer.n_parts && f->producer.parts[at].tensor == tensor ? &f->producer.parts[at] : NULL;
}

bool aq_folds_change(const aq_folds *folds, size_t tensor) {
    for (size_t i = 0; i < folds->n; i++) {
        if (bias_of(&folds->items[i], tensor) >= 0) return true;
        for (size_t k = 0; k < AQ_PRODUCER_PARTS; k++)
            if (part_of(&folds->items[i], tensor, k)) return true;
    }
    return false;
}

/* b + W m, W being the source's own. */
static aq_status add_shift(const aq_fold *f, int consumer, const aq_model *model, uint64_t begin, uint64_t count, float *out, aq_error *err) {
    uint64_t n = f->producer.n;
    float *w = aq_alloc(n * sizeof *w);
    aq_status status = w ? AQ_OK : aq_fail_memory(err, n * sizeof *w, "a row of weights");
    for (uint64_t r = 0; r < count && status == AQ_OK; r++) {
        double sum = 0;
        status = aq_model_read_f32(model, f->producer.consumers[consumer], (begin + r) * n, n, w, err);
        for (uint64_t i = 0; i < n && status == AQ_OK; i++) sum += (double)w[i] * (double)f->shift[i];
        if (status == AQ_OK) out[r] = (float)((double)out[r] + sum);
    }
    aq_free(w);
    return status;
}

/* Rows of `cols` values: the elements of a vector are rows of one. */
static void change_rows(const aq_fold *f, const aq_producer_part *part, uint64_t cols, uint64_t begin, uint64_t count, float *out) {
    for (uint64_t k = 0; k < count; k++) {
        uint64_t row = (begin + k) / cols, i = row - part->row_begin;
        if (row < part->row_begin || i >= f->producer.n) continue;
        double s = (double)f->scales[i], plus = part->adds_one ? s - 1 : part->shifted && f->shift ? -(double)f->shift[i] * s : 0;
        out[k] = (float)((double)out[k] * s + plus);
    }
}

aq_status aq_folds_read(const aq_folds *folds, const aq_model *model, size_t tensor, uint64_t begin, uint64_t count, float *out, aq_error *err) {
    const aq_tensor_info *t = aq_model_tensor(model, tensor);
    aq_status status = aq_model_read_f32(model, tensor, begin, count, out, err);
    if (status != AQ_OK || !folds->n) return status;
    uint64_t rows, cols = 1;
    if (t->shape.rank > 1) aq_shape_matrix(&t->shape, &rows, &cols);
    aq_fp_state fp = aq_fp_enter();
    for (size_t i = 0; i < folds->n && status == AQ_OK; i++) { /* as consumers first: what they give is what others get scaled */
        int consumer = bias_of(&folds->items[i], tensor);
        if (consumer >= 0) status = add_shift(&folds->items[i], consumer, model, begin, count, out, err);
    }
    for (size_t i = 0; i < folds->n && cols && status == AQ_OK; i++)
        for (size_t k = 0; k < AQ_PRODUCER_PARTS; k++) {
            const aq_producer_part *part = part_of(&folds->items[i], tensor, k);
            if (part) change_rows(&folds->items[i], part, cols, begin, count, out);
        }
    aq_fp_leave(fp);
    return status;
}

/* ---- metadata.json ---- */

static json_t *fold_json(const aq_fold *f, const aq_model *model) {
    json_t *parts = json_array(), *consumers = json_array(), *biases = json_array();
    for (size_t i = 0; i < f->producer.n_parts; i++) {
        const aq_producer_part *p = &f->producer.parts[i];
        json_array_append_new(parts, json_pack("{s:o, s:I, s:b, s:b}", "tensor", aq_report_text(aq_model_tensor(model, p->tensor)->name), "row_begin",
                                               (json_int_t)p->row_begin, "adds_one", p->adds_one, "shifted", p->shifted));
    }
    for (size_t i = 0; i < f->producer.n_consumers; i++) {
        json_array_append_new(consumers, aq_report_text(aq_model_tensor(model, f->producer.consumers[i])->name));
        bool has = f->shift && f->producer.biases[i] >= 0;
        json_array_append_new(biases, has ? aq_report_text(aq_model_tensor(model, (size_t)f->producer.biases[i])->name) : json_null());
    }
    return json_pack("{s:s, s:I, s:b, s:o, s:o, s:o}", "kind", aq_producer_kind_name(f->producer.kind), "inputs", (json_int_t)f->producer.n, "shifted",
                     f->shift != NULL, "producer", parts, "consumers", consumers, "biases", biases);
}

json_t *aq_folds_json(const aq_folds *folds, const aq_model *model) {
    json_t *list = json_array();
    for (size_t i = 0; list && i < folds->n; i++) {
        if (!folds->items[i].scales || json_array_append_new(list, fold_json(&folds->items[i], model)) == 0) continue;
        json_decref(list);
        return NULL;
    }
    return list;
}

static aq_status bad(const aq_store *store, aq_error *err, const char *what) {
    return aq_fail_at(err, AQ_ERR_FORMAT, aq_store_path(store), NULL, "metadata.json: a fold %s", what);
}

static int64_t index_of(const aq_model *model, const json_t *name) {
    const char *text = json_string_value(name);
    return text ? aq_model_find(model, text) : -1;
}

static float *copy_of(const float *values, uint64_t n) {
    float *copy = values ? aq_alloc(n * sizeof *copy) : NULL;
    if (copy) memcpy(copy, values, (size_t)n * sizeof *copy);
    return copy;
}

/* Consumers with their biases; *missing: the source has not all of it. */
static aq_status read_consumers(const json_t *json, const aq_store *store, const aq_model *model, aq_fold *f, bool *missing, aq_error *err) {
    const json_t *consumers = json_object_get(json, "consumers"), *biases = json_object_get(json, "biases");
    size_t n = json_array_size(consumers);
    if (n == 0 || n > AQ_PRODUCER_CONSUMERS || json_array_size(biases) != n) return bad(store, err, "has no list of consumers and biases of one length");
    for (size_t i = 0; i < n; i++) {
        const char *name = json_string_value(json_array_get(consumers, i));
        int64_t stored = name ? aq_store_find(store, name) : -1, at = index_of(model, json_array_get(consumers, i));
        if (stored < 0) return bad(store, err, "names a consumer that is not there");
        const aq_store_tensor *t = aq_store_tensor_at(store, (size_t)stored);
        if (!t->equalization_folded || t->cols != f->producer.n) return bad(store, err, "names a consumer whose equalization is not folded");
        if (i == 0 && !(f->scales = copy_of(t->equalization_scales, t->cols))) return aq_fail_memory(err, 4 * t->cols, "equalization scales");
        if (i == 0 && t->folded_shift && !(f->shift = copy_of(t->folded_shift, t->cols))) return aq_fail_memory(err, 4 * t->cols, "a folded shift");
        if (memcmp(f->scales, t->equalization_scales, 4 * t->cols) != 0) return bad(store, err, "has consumers with different scales");
        f->producer.biases[i] = index_of(model, json_array_get(biases, i));
        *missing |= at < 0 || (f->shift && f->producer.biases[i] < 0);
        if (at < 0) continue;
        uint64_t rows, cols;
        aq_shape_matrix(&aq_model_tensor(model, (size_t)at)->shape, &rows, &cols);
        *missing |= cols != f->producer.n || (f->shift && f->producer.biases[i] >= 0 && aq_model_tensor(model, (size_t)f->producer.biases[i])->count != rows);
        f->producer.consumers[i] = (size_t)at;
    }
    f->producer.n_consumers = n;
    if (json_is_true(json_object_get(json, "shifted")) != (f->shift != NULL)) return bad(store, err, "and its first consumer disagree about a shift");
    return AQ_OK;
}

static aq_status read_parts(const json_t *json, const aq_store *store, const aq_model *model, aq_fold *f, bool *missing, aq_error *err) {
    const json_t *parts = json_object_get(json, "producer");
    size_t n = json_array_size(parts);
    if (n == 0 || n > AQ_PRODUCER_PARTS) return bad(store, err, "has no list of producers");
    for (size_t i = 0; i < n; i++) {
        const json_t *part = json_array_get(parts, i), *row = json_object_get(part, "row_begin");
        int64_t at = index_of(model, json_object_get(part, "tensor"));
        if (!json_is_integer(row) || json_integer_value(row) < 0) return bad(store, err, "has a producer without its first row");
        f->producer.parts[i] = (aq_producer_part){.tensor = at < 0 ? SIZE_MAX : (size_t)at,
                                                  .row_begin = (uint64_t)json_integer_value(row),
                                                  .adds_one = json_is_true(json_object_get(part, "adds_one")),
                                                  .shifted = json_is_true(json_object_get(part, "shifted"))};
        *missing |= at < 0;
    }
    f->producer.n_parts = n;
    return AQ_OK;
}

static aq_status read_fold(const json_t *json, const aq_store *store, const aq_model *model, aq_fold *f, aq_error *err) {
    const json_t *inputs = json_object_get(json, "inputs");
    bool missing = false;
    if (!json_is_integer(inputs) || json_integer_value(inputs) <= 0) return bad(store, err, "does not say how many inputs it has");
    f->producer.n = (uint64_t)json_integer_value(inputs);
    aq_status status = read_consumers(json, store, model, f, &missing, err);
    if (status == AQ_OK) status = read_parts(json, store, model, f, &missing, err);
    if (!missing) return status;
    aq_free(f->scales);
    f->scales = NULL;
    return status;
}

aq_status aq_folds_open(aq_folds *out, const aq_store *store, const aq_model *model, aq_error *err) {
    const char *text = aq_store_metadata_json(store);
    json_t *root = NULL;
    *out = (aq_folds){0};
    if (!*text) return AQ_OK;
    aq_status status = aq_json_parse(&root, text, strlen(text), 64, "metadata.json", err);
    const json_t *list = json_object_get(root, "folds");
    size_t n = json_array_size(list);
    if (status == AQ_OK && n > 0 && !(out->items = aq_calloc(n, sizeof *out->items))) status = aq_fail_memory(err, n * sizeof *out->items, "folds");
    for (size_t i = 0; i < n && status == AQ_OK; i++) {
        out->n = i + 1;
        status = read_fold(json_array_get(list, i), store, model, &out->items[i], err);
    }
    json_decref(root);
    if (status != AQ_OK) aq_folds_free(out);
    return status;
}
