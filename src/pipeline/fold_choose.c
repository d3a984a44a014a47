/* Which equalizations are folded, and how strong (see fold.h).
 *
 * Before the layers, for every producer that the model's structure shows: its consumers are coded at each strength with one s for all of them, without a shift
 * and, near the best, with the inputs' mean as one, and measured as the layers will be (weights, and 8-bit inputs where they are asked for). The best sum
 * is folded unless scales of their own, which would have to be stored and multiplied when the model runs, are better by more than they are worth. Codes are
 * not kept: memory is that of one layer. Nothing depends on threads, so an interrupted run chooses the same again.
 */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "base/error.h"
#include "base/mem.h"
#include "base/size.h"
#include "base/threads.h"
#include "pipeline/layers.h"
#include "pipeline/source.h"

/* What multiplying inputs when the model runs, and storing the scales, has to gain. */
#define STORING_COSTS 1.01

enum { STRENGTHS = AQ_EQUALIZE_LIMIT_6 + 1 };

/* Relative output errors of the consumers under one choice. */
typedef struct trial {
    double error[AQ_PRODUCER_CONSUMERS], sqnr_db[AQ_PRODUCER_CONSUMERS], sum;
    bool is_good; /* all measured and above the floor */
} trial;

typedef struct choosing {
    quantize_run *run;
    uint64_t n_done, n_total; /* consumers */
    aq_error *err;
} choosing;

/* ---- which producers ---- */

static bool is_eligible(const quantize_run *run, const aq_producer *p) {
    for (size_t i = 0; i < p->n_consumers; i++) {
        size_t index = p->consumers[i];
        const aq_layer_choice *choice = &run->choices[index];
        if (!choice->quantize || choice->spec.axis != 1 || aq_inputs_known(run, index, NULL) != INPUTS_METRIC || !aq_spatial_is_possible(run, index))
            return false;
    }
    return true;
}

aq_status aq_folds_find(quantize_run *run, aq_error *err) {
    aq_producer *producers;
    size_t n = 0;
    if (!run->calib || !aq_config_bool(run->config, "fold_equalization")) return AQ_OK;
    aq_status status = aq_model_producers(run->model, &producers, &n, err);
    if (status != AQ_OK) return status;
    run->folds.items = n ? aq_calloc(n, sizeof *run->folds.items) : NULL;
    if (n && !run->folds.items) status = aq_fail_memory(err, n * sizeof *run->folds.items, "the structure of the model");
    for (size_t i = 0; status == AQ_OK && i < n; i++)
        if (is_eligible(run, &producers[i])) run->folds.items[run->folds.n++].producer = producers[i];
    aq_free(producers);
    return status;
}

/* ---- measuring ---- */

/* A layer whose slabs are coded and measured, the codes not kept. */
typedef struct measuring {
    const quantize_run *run;
    size_t index;
    const aq_coder *coder;
    uint64_t rows, cols, slab_rows;
    double *bias_change; /* [rows] */
    aq_coded *parts;     /* one per slab */
    aq_error *errors;    /* one per slab */
} measuring;

static bool measure_slab(void *context, size_t slab) {
    measuring *m = context;
    uint64_t begin = slab * m->slab_rows, n = m->rows - begin < m->slab_rows ? m->rows - begin : m->slab_rows;
    aq_error *err = &m->errors[slab];
    aq_quant_layout layout;
    aq_status status = aq_quant_layout_init(&layout, &m->coder->spec, n, m->cols, err);
    if (status != AQ_OK) return false;
    float *w = aq_alloc(n * m->cols * sizeof *w);
    aq_coder coder = *m->coder;
    if (coder.corrected) coder.bias_change = m->bias_change + begin;
    uint8_t *codes = aq_alloc(layout.codes_bytes), *params = aq_alloc(layout.params_bytes);
    status = w && codes && params ? aq_run_read_f32(m->run, m->index, begin * m->cols, n * m->cols, w, err)
                                  : aq_fail_memory(err, n * m->cols * sizeof *w, "a slab of weights");
    if (status == AQ_OK) status = aq_code_rows(&coder, w, n, m->cols, 1, codes, params, &m->parts[slab], NULL, NULL, err);
    aq_free(w);
    aq_free(codes);
    aq_free(params);
    return status == AQ_OK;
}

/* Sums in the order of the slabs: those of the layer when it is coded for good. */
static aq_status measure_layer(const quantize_run *run, size_t index, const aq_coder *coder, aq_coded *out, aq_error *err) {
    measuring m = {.run = run, .index = index, .coder = coder};
    aq_shape_matrix(&aq_model_tensor(run->model, index)->shape, &m.rows, &m.cols);
    m.slab_rows = aq_slab_rows(m.rows, m.cols, 1);
    size_t n = (size_t)aq_div_up(m.rows, m.slab_rows);
    m.parts = aq_calloc(n, sizeof *m.parts);
    m.errors = aq_calloc(n, sizeof *m.errors);
    m.bias_change = aq_calloc(m.rows, sizeof *m.bias_change);
    *out = (aq_coded){0};
    aq_status status = m.parts && m.errors && m.bias_change ? AQ_OK : aq_fail_memory(err, n * sizeof *m.parts, "a layer's measurements");
    if (status == AQ_OK && !aq_parallel_for(n, run->memory.n_threads, measure_slab, &m))
        for (size_t i = 0; i < n && status == AQ_OK; i++)
            if ((status = m.errors[i].code) != AQ_OK && err) *err = m.errors[i];
    for (size_t i = 0; i < n && status == AQ_OK; i++) {
        aq_quant_metrics_add(&out->metrics, &m.parts[i].metrics);
        out->output.err += m.parts[i].output.err;
        out->output.ref += m.parts[i].output.ref;
        out->code_sq += m.parts[i].code_sq;
        out->needs_f32 |= m.parts[i].needs_f32;
    }
    aq_free(m.parts);
    aq_free(m.errors);
    aq_free(m.bias_change);
    return status;
}

/* What cannot be coded in a way is not chosen; only what ends the run is an error. */
static bool ends_run(aq_status status) { return status != AQ_OK && status != AQ_ERR_FORMAT && status != AQ_ERR_QUALITY; }

static aq_status measure_attempt(const quantize_run *run, size_t index, attempt *a, const layer_inputs *in, double *error, double *sqnr_db, aq_error *err) {
    aq_coder coder = aq_inputs_coder(run, in);
    aq_coded coded = {.needs_f32 = true};
    aq_status status = AQ_OK;
    for (int pass = 0; pass < 2 && coded.needs_f32 && status == AQ_OK; pass++) {
        coder.spec = pass ? aq_widened(run, &a->spec) : a->spec;
        status = measure_layer(run, index, &coder, &coded, err);
    }
    if (status != AQ_OK || coded.needs_f32 || !(coded.output.ref > 0)) return status;
    layer_activations activations;
    char problem[160];
    status = aq_activations(run, index, in->equalization, in->shift, NULL, &activations, problem, err);
    if (status != AQ_OK) return status;
    double found = aq_relative_error(run, &coded.output, coded.code_sq, &activations);
    aq_activations_free(&activations);
    if (!(found < *error) || !(aq_similarity(&coded.metrics, found) >= run->min_accuracy)) return AQ_OK;
    *error = found;
    *sqnr_db = aq_output_sqnr_db(&coded.output);
    return AQ_OK;
}

/* The best of the attempts that the layer will make, unrotated; INFINITY when none is good enough. */
static aq_status measure_consumer(const quantize_run *run, size_t index, aq_equalize strength, double *error, double *sqnr_db, aq_error *err) {
    attempt attempts[MOST_ATTEMPTS];
    size_t n, n_main = 0;
    *error = INFINITY;
    *sqnr_db = (double)NAN;
    aq_status status = aq_attempts(run, index, run->choices[index].spec.bits, true, attempts, &n, err);
    for (size_t i = 0; i < n; i++) n_main += attempts[i].spec.method != AQ_METHOD_SEARCH;
    for (size_t i = 0; i < n && !ends_run(status); i++) {
        attempt *a = &attempts[i];
        bool is_other = a->basis.equalized != strength || a->basis.hadamard_group > 1 || (n_main > 0 && a->spec.method == AQ_METHOD_SEARCH);
        layer_inputs *in = NULL;
        if (is_other) continue;
        status = aq_inputs_make(run, index, a->want, a->basis, &in, err);
        if (status == AQ_OK && !in->problem[0]) status = measure_attempt(run, index, a, in, error, sqnr_db, err);
        aq_inputs_free(in);
    }
    return ends_run(status) ? status : AQ_OK;
}

/* All consumers with what the fold holds now, or, without scales, as they are. */
static aq_status measure_fold(choosing *c, const aq_fold *f, aq_equalize strength, trial *out) {
    *out = (trial){.is_good = true};
    for (size_t i = 0; i < f->producer.n_consumers; i++) {
        if (!aq_job_tell(&c->run->job, "quantize", NULL, NULL, 0, 0, 0.5 * (double)c->n_done / (double)c->n_total))
            return aq_job_cancelled(c->err, "the state is kept; the same command continues");
        aq_status status = measure_consumer(c->run, f->producer.consumers[i], strength, &out->error[i], &out->sqnr_db[i], c->err);
        if (status != AQ_OK) return status;
        out->sum += out->error[i];
        out->is_good &= isfinite(out->error[i]);
    }
    return AQ_OK;
}

/* ---- choosing ---- */

/* Scales of a strength for all consumers at once, of inputs less `shift`. */
static aq_status make_scales(const choosing *c, const aq_fold *f, aq_equalize strength, const float *shift, float *scales) {
    uint64_t n = f->producer.n;
    size_t recorded = 0;
    float *of_weights = aq_calloc(n, sizeof *of_weights), *of_inputs = aq_calloc(n, sizeof *of_inputs);
    aq_status status = of_weights && of_inputs ? AQ_OK : aq_fail_memory(c->err, 2 * n * sizeof *scales, "equalization scales");
    for (size_t i = 0; i < f->producer.n_consumers && status == AQ_OK; i++) status = aq_weight_ranges(c->run, f->producer.consumers[i], of_weights, c->err);
    if (status == AQ_OK) {
        aq_inputs_known(c->run, f->producer.consumers[0], &recorded);
        aq_input_ranges(c->run, recorded, shift, of_inputs);
        aq_equalization_scales_by(strength, of_weights, of_inputs, n, scales);
    }
    aq_free(of_weights);
    aq_free(of_inputs);
    return status;
}

/* Mean of the inputs over all rows. */
static void make_shift(const quantize_run *run, const aq_fold *f, float *shift) {
    size_t recorded = 0;
    double count = 0;
    aq_inputs_known(run, f->producer.consumers[0], &recorded);
    for (uint64_t i = 0; i < f->producer.n; i++) {
        double sum = count = 0;
        for (uint32_t g = 0; g < aq_calib_settings(run->calib)->n_groups; g++) {
            aq_calib_stats s = aq_calib_group(run->calib, recorded, g);
            if (s.count) sum += s.sum[i];
            count += (double)s.count;
        }
        shift[i] = count > 0 ? (float)(sum / count) : 0;
    }
}

static aq_status note_losers(const aq_fold *f, aq_fold *to, const trial *plain, const trial *own, aq_error *err) {
    for (size_t i = 0; i < f->producer.n_consumers; i++) {
        char text[128], a[32], b[32];
        if (!isfinite(plain->error[i])) continue;
        snprintf(text, sizeof text, "as it is %s dB%s%s%s", aq_text_fixed(a, plain->sqnr_db[i], 1), isfinite(own->error[i]) ? "; scales stored " : "",
                 isfinite(own->error[i]) ? aq_text_fixed(b, own->sqnr_db[i], 1) : "", isfinite(own->error[i]) ? " dB" : "");
        if (!(to->compared[i] = aq_strdup(text))) return aq_fail_memory(err, sizeof text, "the report of a layer");
    }
    return AQ_OK;
}

/* Strengths that the settings have for the consumers: those of the attempts of the first one. */
static bool is_offered(const quantize_run *run, const aq_fold *f, aq_equalize strength) {
    attempt attempts[MOST_ATTEMPTS];
    size_t n = 0, index = f->producer.consumers[0];
    if (aq_attempts(run, index, run->choices[index].spec.bits, true, attempts, &n, NULL) != AQ_OK) return false;
    for (size_t i = 0; i < n; i++)
        if (attempts[i].basis.equalized == strength) return true;
    return false;
}

/* Room for what is tried and for the best so far. */
typedef struct search {
    float *scales, *shift, *best_scales;
    bool best_shifted;
    aq_equalize best_strength;
    trial best, plain, own; /* own: each consumer at its best strength, scales stored */
    bool offered[STRENGTHS];
} search;

static aq_status try_strength(choosing *c, aq_fold *f, search *s, aq_equalize strength, bool shifted) {
    trial t;
    uint64_t bytes = f->producer.n * sizeof(float);
    bool is_plain = strength == AQ_EQUALIZE_NONE && !shifted;
    aq_status status = is_plain ? AQ_OK : make_scales(c, f, strength, shifted ? s->shift : NULL, s->scales);
    if (status != AQ_OK) return status;
    f->strength = strength;
    f->scales = is_plain ? NULL : s->scales;
    f->shift = shifted ? s->shift : NULL;
    status = measure_fold(c, f, strength, &t);
    f->scales = f->shift = NULL;
    if (status != AQ_OK) return status;
    if (is_plain) s->plain = t;
    for (size_t i = 0; !shifted && i < f->producer.n_consumers; i++)
        if (t.error[i] < s->own.error[i]) s->own.error[i] = t.error[i], s->own.sqnr_db[i] = t.sqnr_db[i];
    if (!t.is_good || !(t.sum < s->best.sum)) return AQ_OK;
    s->best = t;
    s->best_strength = strength;
    s->best_shifted = shifted;
    if (!is_plain) memcpy(s->best_scales, s->scales, bytes);
    return AQ_OK;
}

static aq_status search_fold(choosing *c, aq_fold *f, search *s) {
    aq_status status = AQ_OK;
    for (size_t i = 0; i < AQ_PRODUCER_CONSUMERS; i++) s->own.error[i] = s->plain.error[i] = INFINITY;
    s->best.sum = INFINITY;
    for (int k = 0; k < STRENGTHS; k++) s->offered[k] = is_offered(c->run, f, (aq_equalize)k);
    for (int k = 0; k < STRENGTHS && status == AQ_OK; k++)
        if (s->offered[k]) status = try_strength(c, f, s, (aq_equalize)k, false);
    if (!f->producer.can_shift || !s->offered[AQ_EQUALIZE_NONE]) return status; /* asked for by name, it is what was asked for */
    make_shift(c->run, f, s->shift);
    int unshifted = (int)s->best_strength;
    for (int k = 0; k < STRENGTHS && status == AQ_OK; k++) {
        bool is_near = k >= unshifted - 1 && k <= unshifted + 1;
        if (s->offered[k] && (is_near || k == AQ_EQUALIZE_NONE)) status = try_strength(c, f, s, (aq_equalize)k, true);
    }
    return status;
}

/* With inputs as they are, what is stored of a fold (scales and shifts, by which the original is found again) has to lower the error by more than the same bits
 * in the codes would: 6.02 dB a bit, by its tangent. Inputs of 8 bits err by themselves, which no bits of the codes mend. */
static bool is_worth_its_bits(const quantize_run *run, const aq_fold *f, const search *s) {
    if (aq_config_int(run->config, "act_bits", 16) == 8 || !s->offered[AQ_EQUALIZE_NONE]) return true;
    double stored = 0, weights = 0;
    for (size_t i = 0; i < f->producer.n_consumers; i++) {
        stored += 32.0 * (s->best_shifted ? 2 : 1) * (double)f->producer.n;
        weights += (double)aq_model_tensor(run->model, f->producer.consumers[i])->count;
    }
    return s->best.sum <= (1 - 1.386 * stored / weights) * s->plain.sum;
}

static aq_status choose_fold(choosing *c, aq_fold *f) {
    uint64_t bytes = f->producer.n * sizeof(float);
    search s = {.scales = aq_alloc(bytes), .shift = aq_alloc(bytes), .best_scales = aq_alloc(bytes)};
    aq_status status = s.scales && s.shift && s.best_scales ? search_fold(c, f, &s) : aq_fail_memory(c->err, 3 * bytes, "equalization scales");
    for (size_t i = 0; i < f->producer.n_consumers; i++) s.own.sum += s.own.error[i];
    bool is_plain = s.best_strength == AQ_EQUALIZE_NONE && !s.best_shifted;
    bool is_folded = status == AQ_OK && isfinite(s.best.sum) && !is_plain && s.best.sum <= STORING_COSTS * s.own.sum && is_worth_its_bits(c->run, f, &s);
    if (is_folded) status = note_losers(f, f, &s.plain, &s.own, c->err);
    f->strength = s.best_strength;
    f->scales = is_folded ? s.best_scales : NULL;
    f->shift = is_folded && s.best_shifted ? s.shift : NULL;
    if (!f->scales) aq_free(s.best_scales);
    if (!f->shift) aq_free(s.shift);
    aq_free(s.scales);
    return status;
}

aq_status aq_folds_choose(quantize_run *run, aq_error *err) {
    aq_folds *folds = &run->folds;
    choosing c = {.run = run, .err = err};
    aq_status status = AQ_OK;
    size_t n_folded = 0;
    for (size_t i = 0; i < folds->n; i++) c.n_total += folds->items[i].producer.n_consumers;
    /* Linear producers first: other folds' consumers are among them, and are measured as they will be. */
    for (int pass = 0; pass < 2; pass++)
        for (size_t i = 0; i < folds->n && status == AQ_OK; i++) {
            aq_fold *f = &folds->items[i];
            if ((f->producer.kind == AQ_PRODUCER_LINEAR) != (pass == 0)) continue;
            status = choose_fold(&c, f);
            c.n_done += f->producer.n_consumers;
            n_folded += f->scales != NULL;
        }
    if (status == AQ_OK && folds->n > 0) {
        run->job.base_fraction = 0.5;
        aq_job_log(&run->job, AQ_LOG_INFO, "equalization: folded into the operation before the layers in %zu of %zu places", n_folded, folds->n);
    }
    return status;
}
