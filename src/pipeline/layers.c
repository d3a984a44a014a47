/* Quantizing all tensors (see quantize.h): attempts at each layer, the best of them, and the fallback ladder.
 *
 * A layer goes through attempts (attempts.c), each a pass over its slabs of rows: a slab is converted to F32, coded and measured while it is in the cache.
 * Sums are added in slab order, so figures and bytes do not depend on threads. The attempt with the least output error stays. When parameters do not fit
 * half precision the pass is made again with F32 ones. A layer below its floor is tried again without the spatial parts that were asked for, then a step up
 * the ladder; beyond the last step it is kept. Each step leaves its reason in `fallback_from`.
 */
#include "pipeline/layers.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

#include "base/error.h"
#include "base/file.h"
#include "base/half.h"
#include "base/mem.h"
#include "base/size.h"
#include "pipeline/source.h"

#define TICK_S 0.05

static void free_candidate(candidate *c) {
    aq_free(c->codes);
    aq_free(c->params);
    aq_free(c->equalization);
    aq_free(c->bias_change);
    aq_activations_free(&c->activations);
    c->codes = c->params = NULL;
    c->equalization = NULL;
    c->bias_change = NULL;
}

static void drop_inputs(work *w, layer *l) {
    aq_inputs_release(w->pool, l->inputs);
    l->inputs = NULL;
}

void aq_layer_free(work *w, layer *l) {
    if (!l) return;
    drop_inputs(w, l);
    free_candidate(&l->now);
    free_candidate(&l->best);
    aq_free(l->slabs);
    aq_free(l);
}

/* Adds a step to what was tried before: "int2: cosine 0.612 < 0.850". */
static void note_step(layer *l, const char *what, const char *why) {
    size_t at = strlen(l->fallback_from);
    snprintf(l->fallback_from + at, sizeof l->fallback_from - at, "%s%s: %s", at ? "; " : "", what, why);
}

/* ---- starting ---- */

/* Buffers for a pass over the slabs with l->now.attempt. */
static aq_status start_pass(layer *l, const aq_tensor_info *t, aq_error *err) {
    uint64_t rows, cols;
    candidate *c = &l->now;
    free_candidate(c);
    aq_free(l->slabs);
    l->slabs = NULL;
    aq_shape_matrix(&t->shape, &rows, &cols);
    aq_status status = aq_quant_layout_init(&c->layout, &c->attempt.spec, rows, cols, err);
    if (status != AQ_OK) return status;
    l->slab_rows = aq_slab_rows(rows, cols, c->attempt.spec.axis == 0 ? c->attempt.spec.group_size : 1);
    l->n_slabs = (size_t)aq_div_up(rows, l->slab_rows);
    c->codes = aq_alloc(c->layout.codes_bytes);
    c->params = aq_alloc(c->layout.params_bytes);
    l->slabs = aq_calloc(l->n_slabs, sizeof *l->slabs);
    atomic_store(&l->needs_f32, false);
    if (l->inputs && l->inputs->corrected && !(c->bias_change = aq_alloc(rows * sizeof *c->bias_change)))
        return aq_fail_memory(err, rows * sizeof *c->bias_change, "the correction of a bias");
    if (!c->codes || !c->params || !l->slabs) return aq_fail_memory(err, c->layout.codes_bytes + c->layout.params_bytes, "the codes of a layer");
    return AQ_OK;
}

static bool same_inputs(const attempt *a, const attempt *b) { return a->want == b->want && aq_same_basis(&a->basis, &b->basis); }

/* Begins attempt l->at: by making its inputs, when those at hand are others. */
static aq_status start_attempt(work *w, layer *l, const aq_tensor_info *t, size_t *n_parts, aq_error *err) {
    const attempt *a = &l->attempts[l->at];
    if (l->inputs && !same_inputs(a, &l->prepared)) drop_inputs(w, l);
    l->now.attempt = *a;
    l->now.widened = false;
    l->preparing = a->want != INPUTS_NONE && !l->inputs;
    *n_parts = 1;
    if (l->preparing) return AQ_OK;
    aq_status status = start_pass(l, t, err);
    *n_parts = l->n_slabs;
    return status;
}

/* Everything anew at l->bits. */
static aq_status start_bits(work *w, layer *l, size_t index, size_t *n_parts, aq_error *err) {
    free_candidate(&l->best);
    size_t consumer = 0;
    const aq_fold *fold = aq_fold_of(&w->run->folds, index, &consumer);
    l->best = (candidate){.error = (double)NAN};
    snprintf(l->compared_with, sizeof l->compared_with, "%s", fold && fold->compared[consumer] ? fold->compared[consumer] : "");
    l->at = 0;
    aq_status status = aq_attempts(w->run, index, l->bits, l->spatial, l->attempts, &l->n_attempts, err);
    return status == AQ_OK ? start_attempt(w, l, aq_model_tensor(w->run->model, index), n_parts, err) : status;
}

static uint64_t layer_cost(void *context, size_t item) {
    const work *w = context;
    return w->run->needs[aq_layer_tensor(w, item)];
}

static bool begin_layer(void *context, size_t item, size_t *n_parts) {
    work *w = context;
    size_t index = aq_layer_tensor(w, item);
    *n_parts = 0;
    *aq_layer_slot(w, item) = NULL;
    if (!w->run->choices[index].quantize) return true;
    layer *l = *aq_layer_slot(w, item) = aq_calloc(1, sizeof *l);
    if (!l) return false;
    l->bits = w->run->choices[index].spec.bits;
    l->spatial = true;
    return start_bits(w, l, index, n_parts, &l->error) == AQ_OK;
}

/* ---- one slab ---- */

static bool is_bad(float x) { return (aq_f32_bits(x) & 0x7F800000) == 0x7F800000; }

void aq_scan_nonfinite(float *w, uint64_t n, uint64_t begin, bool zero, slab_result *out) {
    for (uint64_t i = 0; i < n; i++) {
        if (!is_bad(w[i])) continue;
        if (out->n_nonfinite++ == 0) out->first_nonfinite = begin + i;
        if (zero) w[i] = 0;
    }
}

uint8_t *aq_params_of_row(const candidate *c, uint64_t row) {
    const aq_quant_layout *y = &c->layout;
    const aq_quant_spec *spec = &c->attempt.spec;
    if (spec->axis == 1) return c->params + row * (y->params_bytes / y->rows);
    return c->params + (spec->group_size ? row / spec->group_size * (y->params_bytes / y->n_groups) : 0);
}

typedef struct thread_work {
    work *w;
    size_t thread;
} thread_work;

/* Asked by the solvers from any thread; the calling one (0) asks the hook. */
static bool keep_going(void *user) {
    const thread_work *t = user;
    if (t->thread == 0 && aq_now_s() - t->w->last_tick > TICK_S) {
        t->w->last_tick = aq_now_s();
        aq_layers_tick(t->w);
    }
    return !atomic_load(&t->w->cancelled);
}

static aq_coder coder_of(const work *w, const layer *l, uint64_t row) {
    aq_coder coder = aq_inputs_coder(w->run, l->inputs);
    coder.spec = l->now.attempt.spec;
    coder.hadamard_group = l->now.attempt.basis.hadamard_group;
    coder.bias_change = l->now.bias_change ? l->now.bias_change + row : NULL;
    return coder;
}

static aq_status code_slab(work *w, layer *l, size_t index, size_t slab, size_t thread, float *values, aq_error *err) {
    const quantize_run *run = w->run;
    const candidate *c = &l->now;
    uint64_t row = (uint64_t)slab * l->slab_rows, cols = c->layout.cols;
    uint64_t n_rows = c->layout.rows - row < l->slab_rows ? c->layout.rows - row : l->slab_rows;
    slab_result *result = &l->slabs[slab];
    thread_work going = {w, thread};
    aq_coder coder = coder_of(w, l, row);
    aq_status status = aq_run_read_f32(run, index, row * cols, n_rows * cols, values, err);
    for (int pass = 0; pass < 2 && status == AQ_OK; pass++) {
        status = aq_code_rows(&coder, values, n_rows, cols, 1, c->codes + row * c->layout.row_bytes, aq_params_of_row(c, row), &result->coded, keep_going,
                              &going, err);
        if (result->coded.needs_f32) atomic_store(&l->needs_f32, true);
        if (status != AQ_ERR_FORMAT || pass > 0) return status;
        /* Not finite: what that means is decided when the whole layer was seen; zeroed values are coded at once. */
        aq_scan_nonfinite(values, n_rows * cols, row * cols, run->nonfinite == NONFINITE_ZERO, result);
        if (result->n_nonfinite == 0) return status;
        if (run->nonfinite != NONFINITE_ZERO) return AQ_OK;
        status = AQ_OK;
    }
    return status;
}

static aq_status do_part(work *w, layer *l, size_t index, size_t slab, size_t thread, aq_error *err) {
    if (l->preparing) {
        l->prepared = l->now.attempt;
        return aq_inputs_take(w->pool, index, l->prepared.want, l->prepared.basis, &l->inputs, err);
    }
    aq_status status = AQ_OK;
    if (!atomic_load(&l->needs_f32)) {
        uint64_t bytes = w->run->memory.slab_values * sizeof(float);
        if (!w->scratch[thread]) w->scratch[thread] = aq_alloc(bytes);
        status = w->scratch[thread] ? code_slab(w, l, index, slab, thread, w->scratch[thread], err) : aq_fail_memory(err, bytes, "a slab of weights");
    }
    atomic_fetch_add(&w->bytes_worked, aq_model_tensor(w->run->model, index)->size_bytes / l->n_slabs / l->n_attempts);
    return status;
}

static bool part_of_layer(void *context, size_t item, size_t slab, size_t thread) {
    work *w = context;
    layer *l = *aq_layer_slot(w, item);
    aq_error error;
    aq_error_clear(&error);
    aq_status status = do_part(w, l, aq_layer_tensor(w, item), slab, thread, &error);
    if (status == AQ_OK) return true;
    pthread_mutex_lock(&w->error_mutex); /* the first slab's error is told, whichever thread was first */
    if (l->error.code == AQ_OK || slab < l->error_slab) {
        l->error = error;
        l->error_slab = slab;
    }
    pthread_mutex_unlock(&w->error_mutex);
    return false;
}

/* ---- judging ---- */

/* What end_layer does next. */
typedef enum { NEXT_READY, NEXT_ATTEMPT, NEXT_SAME, NEXT_BITS } next_step;

/* The layer stays as it is in the source. */
static void keep_layer(work *w, layer *l) {
    drop_inputs(w, l);
    free_candidate(&l->now);
    free_candidate(&l->best);
}

/* Decides about non-finite values; *kept: the layer's way is clear. */
static aq_status judge_nonfinite(work *w, layer *l, size_t index, bool *kept, aq_error *err) {
    const quantize_run *run = w->run;
    const aq_tensor_info *t = aq_model_tensor(run->model, index);
    uint64_t n = 0, first = 0;
    for (size_t i = l->n_slabs; i-- > 0;) {
        n += l->slabs[i].n_nonfinite;
        if (l->slabs[i].n_nonfinite) first = l->slabs[i].first_nonfinite;
    }
    run->outcomes[index].n_nonfinite = n;
    if (n == 0 || run->nonfinite == NONFINITE_ZERO) return AQ_OK;
    if (run->nonfinite == NONFINITE_KEEP) {
        char what[16], why[96];
        *kept = true;
        snprintf(what, sizeof what, "int%d", l->bits);
        snprintf(why, sizeof why, "%llu values are not finite, the first at index %llu", (unsigned long long)n, (unsigned long long)first);
        note_step(l, what, why);
        keep_layer(w, l);
        return AQ_OK;
    }
    aq_fail_at(err, AQ_ERR_FORMAT, aq_model_file(run->model, t->file_index), t->name, "%llu of %llu values are NaN or infinite, the first at index %llu",
               (unsigned long long)n, (unsigned long long)t->count, (unsigned long long)first);
    aq_hint(err, "--nonfinite=keep stores this tensor unquantized, --nonfinite=zero replaces such values by 0");
    return AQ_ERR_FORMAT;
}

/* Adds up the slabs and takes what the container needs beside the codes. */
static aq_status measure(work *w, layer *l, size_t index, aq_error *err) {
    candidate *c = &l->now;
    const layer_inputs *in = l->inputs;
    aq_output_error output = {0};
    double code_sq = 0, bias_sq = 0;
    c->metrics = (aq_quant_metrics){0};
    for (size_t i = 0; i < l->n_slabs; i++) {
        aq_quant_metrics_add(&c->metrics, &l->slabs[i].coded.metrics);
        output.err += l->slabs[i].coded.output.err;
        output.ref += l->slabs[i].coded.output.ref;
        code_sq += l->slabs[i].coded.code_sq;
        bias_sq += l->slabs[i].coded.bias_sq;
    }
    uint64_t n = c->layout.cols;
    float *rms = NULL;
    aq_status status = AQ_OK;
    if (in && in->equalization) {
        if (!(c->equalization = aq_alloc(n * sizeof *c->equalization))) return aq_fail_memory(err, n * sizeof *c->equalization, "equalization scales");
        memcpy(c->equalization, in->equalization, n * sizeof *c->equalization);
    }
    if (c->attempt.basis.hadamard_group > 1 && !(rms = aq_alloc(n * sizeof *rms))) return aq_fail_memory(err, n * sizeof *rms, "ranges of a layer's inputs");
    if (rms && in) status = aq_inputs_rms(in, c->attempt.basis.hadamard_group, rms, err);
    if (status == AQ_OK) status = aq_activations(w->run, index, c->equalization, in ? in->shift : NULL, rms, &c->activations, c->time_problem, err);
    aq_free(rms);
    bool measured = in && !in->made_up && (in->h || in->hessian) && output.ref > 0;
    c->sqnr_db = measured ? aq_output_sqnr_db(&output) : (double)NAN;
    output.err += bias_sq;
    c->plain_sqnr_db = measured && c->bias_change ? aq_output_sqnr_db(&output) : (double)NAN;
    output.err -= bias_sq;
    c->error = measured ? aq_relative_error(w->run, &output, code_sq, &c->activations) : (double)NAN;
    return status;
}

/* Similarity of the outputs, from their relative error as that of the best scale. */
static double output_similarity(double error) { return isnan(error) ? 1 : sqrt(error < 1 ? 1 - error : 0); }

/* NaN where values are beyond F32 when they are read back: that meets no floor. */
double aq_similarity(const aq_quant_metrics *metrics, double error) {
    double weights = aq_quant_metrics_cosine(metrics), output = output_similarity(error);
    return output < weights ? output : weights;
}

static double similarity(const candidate *c) { return aq_similarity(&c->metrics, c->error); }

static bool meets_floor(const quantize_run *run, const candidate *c) { return similarity(c) >= run->min_accuracy; }

/* Whether a is to be preferred to b, which came first. */
static bool is_better(const quantize_run *run, const candidate *a, const candidate *b) {
    if (!b->codes) return true;
    if (meets_floor(run, a) != meets_floor(run, b)) return meets_floor(run, a);
    return a->error < b->error; /* false when not measured */
}

/* "search 25.3 dB", added to the others. */
static void note_comparison(layer *l, const candidate *loser) {
    char name[48], db[32];
    size_t at = strlen(l->compared_with);
    if (isnan(loser->sqnr_db)) return;
    snprintf(l->compared_with + at, sizeof l->compared_with - at, "%s%s %s dB", at ? "; " : "", aq_attempt_name(&loser->attempt, name),
             aq_text_fixed(db, loser->sqnr_db, 1));
}

/* What the layer's bias as it was would have left of its output. */
static void note_plain_bias(layer *l) {
    char db[32];
    size_t at = strlen(l->compared_with);
    if (isnan(l->best.plain_sqnr_db)) return;
    snprintf(l->compared_with + at, sizeof l->compared_with - at, "%sbias uncorrected %s dB", at ? "; " : "", aq_text_fixed(db, l->best.plain_sqnr_db, 1));
}

/* l->now is finished: it or the best so far stays. */
static void compare(work *w, layer *l) {
    candidate *loser = is_better(w->run, &l->now, &l->best) ? &l->best : &l->now;
    if (loser->codes) note_comparison(l, loser);
    free_candidate(loser);
    if (loser != &l->best) return;
    l->best = l->now;
    l->now = (candidate){0};
}

static void describe_floor(const quantize_run *run, const candidate *c, char out[96]) {
    char got[32], floor[32];
    double weights = aq_quant_metrics_cosine(&c->metrics);
    bool by_weights = weights <= output_similarity(c->error);
    if (isnan(weights)) {
        snprintf(out, 96, "values are beyond F32 when they are read back");
        return;
    }
    aq_text_below(got, floor, by_weights ? weights : output_similarity(c->error), run->min_accuracy);
    snprintf(out, 96, "%s %s < %s", by_weights ? "cosine" : "output cosine", got, floor);
}

/* All attempts at these bits are done. */
static aq_status judge_best(work *w, layer *l, size_t index, next_step *next, aq_error *err) {
    const quantize_run *run = w->run;
    const aq_tensor_info *t = aq_model_tensor(run->model, index);
    char why[512] = "no method gave codes", what[16];
    *next = NEXT_READY;
    if (l->best.codes) {
        if (meets_floor(run, &l->best)) {
            if (l->best.time_problem[0]) note_step(l, "time-aware", l->best.time_problem);
            return AQ_OK;
        }
        if (aq_fold_of(&run->folds, index, NULL))
            return aq_fail_at(err, AQ_ERR_INTERNAL, NULL, t->name, "met the floor when its equalization was folded, and does not now");
        if (aq_planned(run, t) && !isnan(similarity(&l->best))) return AQ_OK; /* a plan is carried out as it is; the report warns */
        describe_floor(run, &l->best, why);
    }
    if (run->fail_fast) {
        char got[32], floor[32];
        if (!l->best.codes) return aq_fail_at(err, AQ_ERR_QUALITY, aq_model_file(run->model, t->file_index), t->name, "%s", why);
        aq_text_below(got, floor, similarity(&l->best), run->min_accuracy);
        aq_fail_at(err, AQ_ERR_QUALITY, aq_model_file(run->model, t->file_index), t->name, "cosine similarity %s at %d bits is below the floor %s", got,
                   l->bits, floor);
        aq_hint(err, "use more bits or smaller groups, lower --min-accuracy, or leave out --fail-fast to let such layers go up in bits");
        return AQ_ERR_QUALITY;
    }
    *next = NEXT_BITS;
    if (l->spatial && aq_spatial_is_asked(run, index)) { /* the same bits without it */
        note_step(l, "spatial", why);
        l->spatial = false;
        return AQ_OK;
    }
    snprintf(what, sizeof what, "int%d", l->bits);
    note_step(l, what, why);
    l->spatial = true;
    l->bits = aq_next_bits(run, l->bits);
    if (l->bits < 16) return AQ_OK;
    keep_layer(w, l);
    *next = NEXT_READY;
    return AQ_OK;
}

/* Skips the attempts that need a factor that there is not; a search on what is known takes the place of the last one. */
static aq_status skip_unsolvable(work *w, layer *l, size_t index, aq_error *err) {
    bool noted = l->inputs->problem[0] && strstr(l->fallback_from, l->inputs->problem); /* by an attempt on another basis */
    while (l->at < l->n_attempts && l->inputs->problem[0] && l->attempts[l->at].spec.method != AQ_METHOD_SEARCH &&
           same_inputs(&l->attempts[l->at], &l->prepared)) {
        const char *method = aq_method_name(l->attempts[l->at].spec.method);
        if (w->run->fail_fast) {
            const aq_tensor_info *t = aq_model_tensor(w->run->model, index);
            return aq_fail_at(err, AQ_ERR_QUALITY, aq_model_file(w->run->model, t->file_index), t->name, "%s: %s", method, l->inputs->problem);
        }
        if (!noted) note_step(l, method, l->inputs->problem);
        noted = true;
        if (l->at + 1 == l->n_attempts && !l->best.codes) {
            aq_quant_spec *spec = &l->attempts[l->at].spec;
            spec->method = AQ_METHOD_SEARCH;
            if (spec->params == AQ_PARAMS_R2Q) spec->params = AQ_PARAMS_F16;
            break;
        }
        l->at++;
    }
    return AQ_OK;
}

/* After the last part of a pass, or of making the inputs. */
static aq_status judge(work *w, layer *l, size_t index, next_step *next, aq_error *err) {
    const quantize_run *run = w->run;
    if (l->preparing) {
        l->preparing = false;
        aq_status status = skip_unsolvable(w, l, index, err);
        if (status != AQ_OK) return status;
        *next = NEXT_ATTEMPT;
        return l->at < l->n_attempts ? AQ_OK : judge_best(w, l, index, next, err);
    }
    if (atomic_load(&l->needs_f32)) {
        aq_params_form form = l->now.attempt.spec.params;
        *next = NEXT_SAME;
        if (form != AQ_PARAMS_R2Q && form != AQ_PARAMS_F32) {
            l->now.widened = true;
            l->now.attempt.spec = aq_widened(run, &l->now.attempt.spec);
            return AQ_OK;
        }
        char name[48]; /* there is no wider form */
        note_step(l, aq_attempt_name(&l->now.attempt, name), form == AQ_PARAMS_R2Q ? "levels do not fit half precision" : "values do not fit F32");
        free_candidate(&l->now);
    } else {
        bool kept = false;
        *next = NEXT_READY;
        aq_status status = judge_nonfinite(w, l, index, &kept, err);
        if (status != AQ_OK || kept) return status;
        if ((status = measure(w, l, index, err)) != AQ_OK) return status;
        compare(w, l);
    }
    *next = NEXT_ATTEMPT;
    l->at++;
    if (l->at < l->n_attempts && l->inputs) {
        aq_status status = skip_unsolvable(w, l, index, err);
        if (status != AQ_OK) return status;
    }
    return l->at < l->n_attempts ? AQ_OK : judge_best(w, l, index, next, err);
}

static aq_status copy_text(char **to, const char *text, aq_error *err) {
    if (!text[0]) return AQ_OK;
    *to = aq_strdup(text);
    return *to ? AQ_OK : aq_fail_memory(err, strlen(text), "the report of a layer");
}

/* The layer's way is clear: what the report says of it. */
static aq_status settle(work *w, layer *l, size_t index, aq_error *err) {
    layer_outcome *o = &w->run->outcomes[index];
    const candidate *c = &l->best;
    drop_inputs(w, l);
    free_candidate(&l->now);
    aq_free(l->slabs);
    l->slabs = NULL;
    if (c->codes && c->bias_change) note_plain_bias(l);
    aq_inputs_finish(w->pool, index);
    o->bits = c->codes ? c->attempt.spec.bits : 16;
    o->method = c->codes ? aq_method_name(c->attempt.spec.method) : "keep";
    if (c->codes) o->spec = c->attempt.spec;
    o->widened = c->codes && c->widened;
    o->cosine = c->codes ? aq_quant_metrics_cosine(&c->metrics) : (double)NAN;
    o->sqnr_db = c->codes ? aq_quant_metrics_sqnr_db(&c->metrics) : (double)NAN;
    o->output_sqnr_db = c->codes ? c->sqnr_db : (double)NAN;
    aq_status status = copy_text(&o->fallback_from, l->fallback_from, err);
    return status == AQ_OK && c->codes ? copy_text(&o->compared_with, l->compared_with, err) : status;
}

static aq_ordered_next end_layer(void *context, size_t item, size_t *n_parts) {
    work *w = context;
    layer *l = *aq_layer_slot(w, item);
    size_t index = aq_layer_tensor(w, item);
    const aq_tensor_info *t = aq_model_tensor(w->run->model, index);
    next_step next = NEXT_READY;
    aq_status status = judge(w, l, index, &next, &l->error);
    if (status == AQ_OK && next == NEXT_READY) {
        status = settle(w, l, index, &l->error);
        return status == AQ_OK ? AQ_ORDERED_READY : AQ_ORDERED_FAIL;
    }
    if (status == AQ_OK && next == NEXT_ATTEMPT) status = start_attempt(w, l, t, n_parts, &l->error);
    if (status == AQ_OK && next == NEXT_BITS) status = start_bits(w, l, index, n_parts, &l->error);
    if (status == AQ_OK && next == NEXT_SAME) {
        status = start_pass(l, t, &l->error);
        *n_parts = l->n_slabs;
    }
    return status == AQ_OK ? AQ_ORDERED_AGAIN : AQ_ORDERED_FAIL;
}

static bool commit_layer(void *context, size_t item) {
    work *w = context;
    layer *l = *aq_layer_slot(w, item);
    size_t index = aq_layer_tensor(w, item);
    const aq_tensor_info *t = aq_model_tensor(w->run->model, index);
    aq_status status = aq_layer_write(w, l, index, &w->error);
    aq_model_release(w->run->model, index);
    if (status != AQ_OK) {
        if (status == AQ_ERR_INTERRUPTED) aq_job_cancelled(&w->error, "the state is kept; the same command continues");
        return false;
    }
    w->run->outcomes[index].corrected = w->bias_change != NULL;
    aq_free(w->bias_change);
    w->bias_change = NULL;
    if (l && l->best.codes) { /* for its bias, which comes next */
        w->bias_change = l->best.bias_change;
        l->best.bias_change = NULL;
    }
    w->n_done++;
    w->bytes_done += t->size_bytes;
    bool go_on = aq_layer_tell(w, l, index);
    aq_layer_free(w, l);
    *aq_layer_slot(w, item) = NULL;
    if (!go_on) aq_job_cancelled(&w->error, "the state is kept; the same command continues");
    return go_on;
}

/* ---- all layers ---- */

static aq_status run_layers(work *w, aq_error *err) {
    aq_ordered job = {.n_items = w->run->n_tensors - w->first,
                      .n_threads = w->run->memory.n_threads,
                      .budget = w->run->memory.budget_bytes,
                      .context = w,
                      .cost = layer_cost,
                      .begin = begin_layer,
                      .part = part_of_layer,
                      .end = end_layer,
                      .commit = commit_layer,
                      .tick = aq_layers_tick};
    size_t failed;
    aq_ordered_result result = aq_ordered_run(&job, &failed);
    if (result == AQ_ORDERED_DONE) return AQ_OK;
    if (result == AQ_ORDERED_CANCELLED || (atomic_load(&w->cancelled) && w->error.code == AQ_OK))
        return aq_job_cancelled(err, "the state is kept; the same command continues");
    const layer *l = *aq_layer_slot(w, failed);
    const aq_error *e = w->error.code != AQ_OK ? &w->error : l ? &l->error : NULL;
    if (!e) return aq_fail_memory(err, sizeof *l, "a layer");
    if (err) *err = *e;
    return e->code;
}

aq_status aq_quantize_layers(quantize_run *run, aq_error *err) {
    work *w = aq_calloc(1, sizeof *w);
    if (!w) return aq_fail_memory(err, sizeof *w, "the work list");
    w->run = run;
    pthread_mutex_init(&w->error_mutex, NULL);
    aq_status status = aq_inputs_pool_create(&w->pool, run, err);
    if (status == AQ_OK) status = aq_layers_resume(w, err);
    if (status == AQ_OK) status = run_layers(w, err);
    for (size_t i = 0; i < AQ_ORDERED_WINDOW; i++) aq_layer_free(w, w->open[i]);
    for (size_t i = 0; i < MOST_THREADS; i++) aq_free(w->scratch[i]);
    aq_free(w->bias_change);
    aq_inputs_pool_free(w->pool);
    pthread_mutex_destroy(&w->error_mutex);
    aq_free(w);
    return status;
}
