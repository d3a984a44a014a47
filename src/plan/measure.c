/* The errors of all candidates of all layers (see plan.h): layers in parallel within a bound of memory, taken over in order, so that the problem does not
 * depend on threads.
 *
 * What is measured on a layer depends on its sampled rows, its candidates and the calibration: their hash is the key under which figures are kept. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <xxhash.h>

#include "base/error.h"
#include "base/file.h"
#include "base/mem.h"
#include "base/ordered.h"
#include "plan/plan_internal.h"

/* One layer while it is measured. */
typedef struct {
    aq_plan_choice choices[AQ_PLAN_MOST_CHOICES];
    bool wide[AQ_PLAN_MOST_CHOICES];     /* its parameters do not fit half precision: it becomes F32, or drops out */
    bool searched[AQ_PLAN_MOST_CHOICES]; /* H has no factor: searched in place of solved */
    size_t n_choices;
    double energy;  /* of the layer's output, over all rows, by the mean of H's diagonal */
    uint64_t n_bad; /* values that are not finite */
    char key[33];
    bool cached;
    aq_error error;
} layer;

/* Everything of one call. */
typedef struct {
    const aq_model *model;
    const aq_plan_options *options;
    aq_plan_problem *problem;
    size_t *tensors; /* [n] of the items */
    layer *open[AQ_ORDERED_WINDOW];
    aq_plan_cache *cache;
    uint64_t file_bytes; /* about what the container takes, for the length of its offsets */
    double *energies;    /* [n] */
    size_t n_done;
    aq_error error;
} work;

void aq_plan_options_init(aq_plan_options *options) { *options = (aq_plan_options){.sample_values = 1 << 16}; }

void aq_plan_problem_free(aq_plan_problem *problem) {
    if (!problem) return;
    for (size_t i = 0; problem->items && i < problem->n_items; i++) aq_free(problem->items[i].choices);
    aq_free(problem->items);
    aq_free(problem);
}

static const aq_tensor_info *tensor_of(const work *w, size_t item) { return aq_model_tensor(w->model, w->tensors[item]); }
static const aq_plan_request *request_of(const work *w, size_t item) { return &w->options->requests[w->tensors[item]]; }

/* ---- one layer ---- */

static aq_status list_choices(const work *w, size_t item, layer *l, aq_error *err) {
    const aq_tensor_info *t = tensor_of(w, item);
    const aq_plan_request *request = request_of(w, item);
    uint64_t rows, cols;
    aq_shape_matrix(&t->shape, &rows, &cols);
    if (request->open == AQ_PLAN_FIXED) {
        l->choices[0] = (aq_plan_choice){.bits = request->spec.bits, .spec = request->spec, .cosine = 1};
        l->n_choices = 1;
        return AQ_OK;
    }
    bool solves = request->spec.method == AQ_METHOD_GPTQ || request->spec.method == AQ_METHOD_R2Q;
    bool knows = aq_plan_inputs_known(w->options, t) == AQ_PLAN_KNOWS_HESSIAN;
    aq_method method = !solves ? request->spec.method : knows ? AQ_METHOD_GPTQ : AQ_METHOD_SEARCH;
    l->n_choices = aq_plan_list_choices(w->options, request, cols, method, solves && knows, l->choices);
    if (l->n_choices > 0) return AQ_OK;
    aq_fail_at(err, AQ_ERR_USAGE, NULL, t->name, "none of the allowed bit widths can be used for it: it takes %d bits or more", request->least_bits);
    aq_hint(err, "allow 8 or 16 bits, or exclude the layer");
    return AQ_ERR_USAGE;
}

static void make_key(const work *w, const layer *l, const aq_plan_inputs *inputs, const aq_plan_rows *rows, const float *values, char out[33]) {
    XXH3_state_t *state = XXH3_createState();
    out[0] = 0;
    if (!state) return; /* no key: not looked for and not kept */
    XXH3_128bits_reset(state);
    XXH3_128bits_update(state, AQ_VERSION, sizeof AQ_VERSION);
    const uint64_t shape[] = {rows->rows, rows->cols, rows->n_rows, l->n_choices, inputs->h ? 2 : inputs->diagonal ? 1 : 0, l->n_bad};
    XXH3_128bits_update(state, shape, sizeof shape);
    if (inputs->h)
        XXH3_128bits_update(state, inputs->h, (size_t)(inputs->n * inputs->n * sizeof *inputs->h));
    else if (inputs->diagonal)
        XXH3_128bits_update(state, inputs->diagonal, (size_t)(inputs->n * sizeof *inputs->diagonal));
    if (inputs->mean) XXH3_128bits_update(state, inputs->mean, (size_t)(inputs->n * sizeof *inputs->mean));
    aq_solve_options solve;
    aq_solve_options_init(&solve);
    if (w->options->solve) solve = *w->options->solve;
    const double solving[] = {solve.damp, (double)solve.order, solve.refine_sweeps, solve.no_feedback};
    XXH3_128bits_update(state, solving, sizeof solving);
    for (size_t c = 0; c < l->n_choices; c++) {
        const aq_quant_spec *s = &l->choices[c].spec;
        const uint64_t spec[] = {(uint64_t)l->choices[c].bits, s->group_size, (uint64_t)s->axis, (uint64_t)s->params, (uint64_t)s->method, s->symmetric};
        XXH3_128bits_update(state, spec, sizeof spec);
    }
    XXH3_128bits_update(state, values, (size_t)(rows->n_rows * rows->cols * sizeof *values));
    XXH128_canonical_t digest;
    XXH128_canonicalFromHash(&digest, XXH3_128bits_digest(state));
    XXH3_freeState(state);
    for (size_t i = 0; i < sizeof digest.digest; i++) snprintf(out + 2 * i, 3, "%02x", digest.digest[i]);
}

/* Figures of a layer, for the cache: its energy, then error, cosine and width of each candidate. */
enum { FIGURES = 3 };
static void pack(const layer *l, double *figures) {
    figures[0] = l->energy;
    for (size_t c = 0; c < l->n_choices; c++) {
        double *f = figures + 1 + FIGURES * c;
        f[0] = l->choices[c].error;
        f[1] = l->choices[c].cosine;
        f[2] = l->wide[c] + 2 * l->searched[c];
    }
}

static void unpack(layer *l, const double *figures) {
    l->energy = figures[0];
    for (size_t c = 0; c < l->n_choices; c++) {
        const double *f = figures + 1 + FIGURES * c;
        l->choices[c].error = f[0];
        l->choices[c].cosine = f[1];
        l->wide[c] = f[2] == 1 || f[2] == 3;
        if (f[2] >= 2) l->choices[c].spec.method = AQ_METHOD_SEARCH;
    }
}

/* Figures of a candidate that cannot be had stay NaN: it drops out. */
static aq_status try_choice(layer *l, size_t c, aq_plan_inputs *inputs, const float *values, const aq_plan_rows *rows, aq_error *err) {
    aq_plan_choice *choice = &l->choices[c];
    aq_plan_trial trial;
    if (choice->bits == 16) return AQ_OK; /* as it is */
    bool solves = choice->spec.method == AQ_METHOD_GPTQ || choice->spec.method == AQ_METHOD_R2Q;
    aq_status status = solves ? aq_plan_inputs_factor(inputs, err) : AQ_OK;
    if (status != AQ_OK) return status;
    if (solves && !inputs->hessian) { /* its H has no factor */
        choice->error = (double)NAN;
        if (choice->spec.method == AQ_METHOD_R2Q) return AQ_OK;
        choice->spec.method = AQ_METHOD_SEARCH;
        l->searched[c] = true;
    }
    status = aq_plan_try(inputs, &choice->spec, values, rows->n_rows, rows->cols, &trial, err);
    if (status != AQ_OK) return status;
    l->wide[c] = trial.needs_f32;
    if (trial.needs_f32 && choice->spec.params == AQ_PARAMS_F16) {
        aq_quant_spec wide = choice->spec;
        wide.params = AQ_PARAMS_F32;
        status = aq_plan_try(inputs, &wide, values, rows->n_rows, rows->cols, &trial, err);
    }
    choice->error = trial.needs_f32 ? (double)NAN : trial.ref > 0 ? trial.err / trial.ref : 0; /* no form fits: nothing was measured */
    choice->cosine = trial.cosine;
    return status;
}

static aq_status measure_choices(layer *l, aq_plan_inputs *inputs, const float *values, const aq_plan_rows *rows, aq_error *err) {
    aq_status status = aq_plan_energy(inputs, values, rows->n_rows, rows->cols, &l->energy, err);
    for (size_t c = 0; c < l->n_choices && status == AQ_OK; c++) status = try_choice(l, c, inputs, values, rows, err);
    return status;
}

static aq_status measure_rows(const work *w, size_t item, layer *l, const aq_plan_rows *rows, float *values, aq_error *err) {
    const aq_tensor_info *t = tensor_of(w, item);
    aq_status status = aq_plan_read_rows(w->model, w->tensors[item], rows, values, &l->n_bad, err);
    if (status != AQ_OK) return status;
    if (l->n_bad && w->options->nonfinite == AQ_PLAN_NONFINITE_ERROR) {
        aq_fail_at(err, AQ_ERR_FORMAT, aq_model_file(w->model, t->file_index), t->name, "%llu values of the %llu that were looked at are NaN or infinite",
                   (unsigned long long)l->n_bad, (unsigned long long)(rows->n_rows * rows->cols));
        aq_hint(err, "--nonfinite=keep stores this tensor unquantized, --nonfinite=zero replaces such values by 0");
        return AQ_ERR_FORMAT;
    }
    aq_plan_inputs inputs;
    status = aq_plan_inputs_make(&inputs, w->options, w->model, w->tensors[item], err);
    if (status != AQ_OK) return status;
    make_key(w, l, &inputs, rows, values, l->key);
    double figures[1 + FIGURES * AQ_PLAN_MOST_CHOICES];
    l->cached = aq_plan_cache_find(w->cache, l->key, figures, 1 + FIGURES * l->n_choices);
    if (l->cached) {
        unpack(l, figures);
    } else {
        status = measure_choices(l, &inputs, values, rows, err);
        l->energy *= (double)rows->rows / (double)rows->n_rows / inputs.trace;
    }
    aq_plan_inputs_free(&inputs);
    return status;
}

static layer **slot_of(work *w, size_t item) { return &w->open[item % AQ_ORDERED_WINDOW]; }

static uint64_t layer_cost(void *context, size_t item) {
    const work *w = context;
    const aq_tensor_info *t = tensor_of(w, item);
    aq_plan_rows rows = aq_plan_rows_of(t, w->options->sample_values);
    return rows.n_rows * rows.cols * 16 + aq_plan_inputs_bytes(w->options, t);
}

static bool begin_layer(void *context, size_t item, size_t *n_parts) {
    work *w = context;
    *n_parts = 1;
    return (*slot_of(w, item) = aq_calloc(1, sizeof(layer))) != NULL;
}

static bool do_layer(void *context, size_t item, size_t part, size_t thread) {
    (void)part;
    (void)thread;
    work *w = context;
    layer *l = *slot_of(w, item);
    aq_plan_rows rows = aq_plan_rows_of(tensor_of(w, item), w->options->sample_values);
    aq_status status = list_choices(w, item, l, &l->error);
    float *values = status == AQ_OK ? aq_alloc(rows.n_rows * rows.cols * sizeof *values) : NULL;
    if (status == AQ_OK && !values) status = aq_fail_memory(&l->error, rows.n_rows * rows.cols * sizeof *values, "rows of a layer");
    if (status == AQ_OK) status = measure_rows(w, item, l, &rows, values, &l->error);
    aq_free(values);
    if (status != AQ_OK && !l->error.tensor[0]) aq_context(&l->error, "layer '%s'", tensor_of(w, item)->name);
    return status == AQ_OK;
}

/* ---- taking over ---- */

/* Candidates that count: widened ones with their real size, none below the floor (but the best, when all are). */
static aq_status take_choices(work *w, size_t item, layer *l, aq_error *err) {
    const aq_tensor_info *t = tensor_of(w, item);
    bool calibrated = aq_plan_inputs_known(w->options, t) != AQ_PLAN_KNOWS_NOTHING;
    const aq_plan_extras extras = {calibrated && w->options->equalizes, calibrated ? w->options->n_time_groups : 0};
    aq_plan_item *to = &w->problem->items[item];
    aq_plan_choice kept[AQ_PLAN_MOST_CHOICES];
    size_t n = 0, best = 0, n_good = 0;
    bool keep_whole = l->n_bad && w->options->nonfinite == AQ_PLAN_NONFINITE_KEEP;
    for (size_t c = 0; c < l->n_choices && !keep_whole; c++) {
        aq_plan_choice choice = l->choices[c];
        if (isnan(choice.error)) continue;
        if (l->wide[c] && choice.spec.params != AQ_PARAMS_F16) continue;
        if (l->wide[c]) choice.spec.params = AQ_PARAMS_F32;
        aq_status status = AQ_OK;
        if (choice.bits == 16)
            choice.bytes = aq_plan_kept_bytes(t, w->file_bytes);
        else
            status = aq_plan_coded_bytes(t, &choice.spec, &extras, w->file_bytes, &choice.bytes, err);
        if (status != AQ_OK) return status;
        kept[n++] = choice;
    }
    if (n == 0) kept[n++] = (aq_plan_choice){.bits = 16, .cosine = 1, .bytes = aq_plan_kept_bytes(t, w->file_bytes)};
    if (!to->fixed) {
        for (size_t c = 1; c < n; c++)
            if (kept[c].cosine > kept[best].cosine) best = c;
        aq_plan_choice best_one = kept[best];
        for (size_t c = 0; c < n; c++)
            if (kept[c].cosine >= w->options->min_cosine) kept[n_good++] = kept[c];
        if (n_good == 0) {
            kept[0] = best_one;
            n_good = 1;
            w->problem->n_below_floor++;
        }
        n = n_good;
    }
    if (!(to->choices = aq_alloc(n * sizeof *to->choices))) return aq_fail_memory(err, n * sizeof *to->choices, "the candidates of a layer");
    memcpy(to->choices, kept, n * sizeof *kept);
    to->n_choices = n;
    return AQ_OK;
}

static bool tell(work *w, const char *name, aq_error *err) {
    if (!w->options->progress || w->options->progress(w->options->user, name, w->n_done, w->problem->n_items)) return true;
    aq_fail(err, AQ_ERR_INTERRUPTED, "interrupted: nothing was written");
    return false;
}

static bool commit_layer(void *context, size_t item) {
    work *w = context;
    layer *l = *slot_of(w, item);
    aq_status status = take_choices(w, item, l, &w->error);
    if (status == AQ_OK && !l->cached && l->key[0]) {
        double figures[1 + FIGURES * AQ_PLAN_MOST_CHOICES];
        pack(l, figures);
        status = aq_plan_cache_add(w->cache, l->key, figures, 1 + FIGURES * l->n_choices, &w->error);
    }
    if (status != AQ_OK) return false;
    w->energies[item] = l->energy;
    w->problem->n_cached += l->cached;
    w->n_done++;
    aq_model_release(w->model, w->tensors[item]);
    aq_free(l);
    *slot_of(w, item) = NULL;
    return tell(w, tensor_of(w, item)->name, &w->error);
}

static bool tick(void *context) {
    work *w = context;
    return tell(w, NULL, &w->error);
}

/* ---- all of them ---- */

static aq_status list_items(work *w, aq_error *err) {
    static const char *const measures[] = {"weights", "outputs (diagonal of H)", "outputs (H)"};
    aq_plan_knowledge best = AQ_PLAN_KNOWS_NOTHING;
    size_t n_tensors = aq_model_n_tensors(w->model), n = 0;
    aq_plan_problem *p = w->problem;
    uint64_t raw = 0;
    w->tensors = aq_calloc(n_tensors + 1, sizeof *w->tensors);
    w->energies = aq_calloc(n_tensors + 1, sizeof *w->energies);
    p->items = aq_calloc(n_tensors + 1, sizeof *p->items);
    if (!w->tensors || !w->energies || !p->items) return aq_fail_memory(err, n_tensors * sizeof *p->items, "the layers of a plan");
    for (size_t i = 0; i < n_tensors; i++) raw += aq_model_tensor(w->model, i)->size_bytes;
    w->file_bytes = raw;
    p->other_bytes = aq_store_predict_frame(w->options->frame_bytes ? w->options->frame_bytes : 2048);
    for (size_t i = 0; i < n_tensors; i++) {
        const aq_tensor_info *t = aq_model_tensor(w->model, i);
        const aq_plan_request *request = &w->options->requests[i];
        if (t->role == AQ_ROLE_SCALE) continue;
        if (request->open == AQ_PLAN_KEEP || t->count == 0) {
            p->other_bytes += aq_plan_kept_bytes(t, raw);
            continue;
        }
        w->tensors[n] = i;
        int64_t bias = aq_plan_bias_of(w->options, w->model, i); /* corrected, it is stored as F32 */
        if (bias >= 0) {
            const aq_tensor_info *b = aq_model_tensor(w->model, (size_t)bias);
            p->other_bytes += 4 * b->count > b->size_bytes ? 4 * b->count - b->size_bytes : 0;
        }
        p->items[n++] = (aq_plan_item){.name = t->name, .weight = 1, .sensitivity = (double)NAN, .fixed = request->open == AQ_PLAN_FIXED};
        aq_plan_knowledge known = aq_plan_inputs_known(w->options, t);
        if (known > best) best = known;
        aq_plan_rows rows = aq_plan_rows_of(t, w->options->sample_values);
        if (rows.n_rows < rows.rows && rows.n_rows > p->sampled_rows) p->sampled_rows = rows.n_rows;
    }
    p->n_items = n;
    p->error_measure = measures[best];
    return AQ_OK;
}

static aq_status measure_all(work *w, aq_error *err) {
    aq_ordered job = {.n_items = w->problem->n_items,
                      .n_threads = w->options->n_threads,
                      .budget = w->options->max_memory_bytes ? w->options->max_memory_bytes : UINT64_MAX,
                      .context = w,
                      .cost = layer_cost,
                      .begin = begin_layer,
                      .part = do_layer,
                      .commit = commit_layer,
                      .tick = tick};
    size_t failed;
    aq_ordered_result result = aq_ordered_run(&job, &failed);
    aq_status status = AQ_OK;
    if (result == AQ_ORDERED_CANCELLED || w->error.code != AQ_OK) {
        status = w->error.code;
        if (err) *err = w->error;
    } else if (result == AQ_ORDERED_FAILED) {
        const layer *l = *slot_of(w, failed);
        status = l && l->error.code != AQ_OK ? l->error.code : aq_fail_memory(err, sizeof *l, "a layer");
        if (err && l && l->error.code != AQ_OK) *err = l->error;
    }
    for (size_t i = 0; i < AQ_ORDERED_WINDOW; i++) aq_free(w->open[i]);
    return status;
}

aq_status aq_plan_measure(aq_plan_problem **out, const aq_model *model, const aq_plan_options *options, aq_error *err) {
    *out = NULL;
    aq_status status = aq_plan_check_options(options, err);
    if (status != AQ_OK) return status;
    work *w = aq_calloc(1, sizeof *w);
    aq_plan_problem *p = aq_calloc(1, sizeof *p);
    if (!w || !p) {
        aq_free(w);
        aq_free(p);
        return aq_fail_memory(err, sizeof *w, "the planner");
    }
    w->model = model;
    w->options = options;
    w->problem = p;
    status = list_items(w, err);
    if (status == AQ_OK && options->cache_dir) status = aq_plan_cache_open(&w->cache, options->cache_dir, err);
    if (status == AQ_OK) status = measure_all(w, err);
    aq_status written = aq_plan_cache_close(w->cache, status == AQ_OK || status == AQ_ERR_INTERRUPTED, status == AQ_OK ? err : NULL);
    if (status == AQ_OK) status = written;
    if (status == AQ_OK) status = aq_plan_weigh(p, w->model, w->options, w->tensors, w->energies, err);
    aq_free(w->tensors);
    aq_free(w->energies);
    aq_free(w);
    if (status == AQ_OK)
        *out = p;
    else
        aq_plan_problem_free(p);
    return status;
}
