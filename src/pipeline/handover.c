/* Handing finished tensors to the writer in source order, and continuing an interrupted run (see quantize.h).
 *
 * A kept tensor has no slabs: it goes from the source's memory map to the writer as it is. What a run says about a layer follows from its outcome alone, which
 * the journal holds, so that a continued run says what the whole would have said.
 */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "base/error.h"
#include "base/half.h"
#include "base/mem.h"
#include "pipeline/layers.h"
#include "pipeline/source.h"

static double fraction_of(const work *w, uint64_t bytes) { return w->run->source_bytes ? 0.9 * ((double)bytes / (double)w->run->source_bytes) : 0.9; }

bool aq_layers_tick(void *context) {
    work *w = context;
    uint64_t bytes = atomic_load(&w->bytes_worked); /* a layer that starts again counts again, so this may run ahead */
    uint64_t most = w->run->source_bytes;
    bool go_on = aq_job_tell(&w->run->job, "quantize", NULL, NULL, w->n_done, w->bytes_done, fraction_of(w, bytes < most ? bytes : most));
    if (!go_on) atomic_store(&w->cancelled, true);
    return go_on;
}

/* Adds one part unless the writer has it from an earlier run. */
static aq_status add_part(work *w, const aq_store_record *record, aq_error *err) {
    if (w->parts_done > 0) {
        w->parts_done--;
        return AQ_OK;
    }
    if (!aq_layers_tick(w)) return AQ_ERR_INTERRUPTED;
    return aq_store_writer_add(w->run->writer, record, err);
}

static aq_status write_codes(work *w, const candidate *c, aq_store_record *record, aq_error *err) {
    const aq_quant_layout *y = &c->layout;
    const aq_quant_spec *spec = &c->attempt.spec;
    uint64_t unit = spec->axis == 0 ? spec->group_size ? spec->group_size : y->rows : 1;
    uint64_t step = y->row_bytes ? AQ_STORE_PART_BYTES / y->row_bytes / unit * unit : y->rows;
    if (step == 0) step = unit;
    aq_status status = AQ_OK;
    for (uint64_t row = 0; row < y->rows && status == AQ_OK; row += step) {
        uint64_t n = y->rows - row < step ? y->rows - row : step;
        aq_quant_layout part;
        if ((status = aq_quant_layout_init(&part, spec, n, y->cols, err)) != AQ_OK) break;
        record->row_begin = row;
        record->row_count = n;
        record->data = c->codes + row * y->row_bytes;
        record->data_bytes = part.codes_bytes;
        record->params = aq_params_of_row(c, row);
        record->params_bytes = part.params_bytes;
        status = add_part(w, record, err);
    }
    return status;
}

/* What a fold or a correction computes keeps the precision it is computed in. */
static aq_dtype kept_dtype_of(const work *w, size_t index) {
    return w->bias_change || aq_folds_change(&w->run->folds, index) ? AQ_F32 : aq_model_tensor(w->run->model, index)->kept_dtype;
}

/* A kept tensor whose values are computed: fp8 with a scale, GGUF blocks, what a fold changes, a bias that is corrected. */
static aq_status write_computed(work *w, size_t index, aq_store_record *record, aq_error *err) {
    const aq_tensor_info *t = aq_model_tensor(w->run->model, index);
    const aq_dtype kept_dtype = kept_dtype_of(w, index);
    const uint64_t size = aq_dtype_size(kept_dtype), step = AQ_STORE_PART_BYTES / size, chunk = AQ_SLAB_VALUES;
    uint64_t most = t->count < step ? t->count : step;
    uint8_t *kept = aq_alloc(size * most);
    float *values = aq_alloc(4 * chunk);
    aq_status status = kept && values ? AQ_OK : aq_fail_memory(err, size * most + 4 * chunk, "a kept tensor");
    for (uint64_t at = 0; (at < t->count || at == 0) && status == AQ_OK; at += step) {
        uint64_t n = t->count - at < step ? t->count - at : step;
        for (uint64_t i = 0; i < n && status == AQ_OK; i += chunk) {
            uint64_t m = n - i < chunk ? n - i : chunk;
            status = aq_run_read_f32(w->run, index, at + i, m, values, err);
            for (uint64_t k = 0; w->bias_change && k < m; k++) values[k] = (float)((double)values[k] + w->bias_change[at + i + k]);
            if (status == AQ_OK) aq_f32_to_elements(values, m, kept_dtype, kept + i * size);
        }
        record->row_begin = at;
        record->row_count = n;
        record->data = kept;
        record->data_bytes = size * n;
        if (status == AQ_OK) status = add_part(w, record, err);
    }
    aq_free(kept);
    aq_free(values);
    return status;
}

static aq_status write_raw(work *w, size_t index, aq_store_record *record, aq_error *err) {
    const aq_tensor_info *t = aq_model_tensor(w->run->model, index);
    uint64_t size = aq_dtype_size(t->dtype);
    const uint8_t *data = aq_model_data(w->run->model, index);
    /* A type of unknown element size is one part. */
    uint64_t step = size && t->count ? AQ_STORE_PART_BYTES / size : t->count;
    aq_status status = AQ_OK;
    for (uint64_t at = 0; (at < t->count || at == 0) && status == AQ_OK; at += step) {
        uint64_t n = t->count - at < step ? t->count - at : step;
        record->row_begin = at;
        record->row_count = n;
        record->data = data + at * size;
        record->data_bytes = size ? n * size : t->size_bytes;
        status = add_part(w, record, err);
        if (step == 0) break;
    }
    return status;
}

/* What the codes mean beside bits and groups: the basis they are made in, and the parameters of the inputs. */
static void describe_basis(const candidate *c, aq_store_record *record) {
    const layer_activations *a = &c->activations;
    record->equalization_scales = c->equalization;
    record->n_equalization_scales = c->equalization ? c->layout.cols : 0;
    record->equalization_folded = c->attempt.basis.fold != NULL;
    record->folded_shift = c->attempt.basis.fold ? c->attempt.basis.fold->shift : NULL;
    record->hadamard_group = c->attempt.basis.hadamard_group;
    record->time_groups = a->groups;
    record->n_time_groups = a->n;
    for (size_t i = 0; i < 4; i++) record->activation_stats[i] = a->stats[i];
    record->n_activation_stats = a->n;
}

aq_status aq_layer_write(work *w, const layer *l, size_t index, aq_error *err) {
    const aq_tensor_info *t = aq_model_tensor(w->run->model, index);
    const layer_outcome *o = &w->run->outcomes[index];
    if (t->role == AQ_ROLE_SCALE) return AQ_OK; /* consumed with its weight */
    char type[64];
    aq_store_record record = {.name = t->name, .dtype = t->dtype_name, .quant_type = type, .shape = t->shape, .quality = {.output_sqnr_db = (double)NAN}};
    record.quality.fallback_from = o->fallback_from;
    record.quality.compared_with = o->compared_with;
    if (l && l->best.codes) {
        const aq_quant_spec *spec = &l->best.attempt.spec;
        if (spec->params == AQ_PARAMS_R2Q)
            snprintf(type, sizeof type, "r2q2");
        else
            snprintf(type, sizeof type, "int%d", spec->bits);
        record.quantized = true;
        record.spec = *spec;
        record.quality.cosine = o->cosine;
        record.quality.sqnr_db = o->sqnr_db;
        record.quality.output_sqnr_db = o->output_sqnr_db;
        record.quality.method = o->method;
        describe_basis(&l->best, &record);
        return write_codes(w, &l->best, &record, err);
    }
    record.quality.cosine = record.quality.sqnr_db = (double)NAN;
    record.quality.method = w->bias_change ? AQ_STORE_CORRECTED : "keep";
    bool is_computed = t->is_computed || w->bias_change || aq_folds_change(&w->run->folds, index);
    const char *word = is_computed ? aq_dtype_name(kept_dtype_of(w, index)) : t->dtype_name;
    size_t i = 0;
    for (; word[i] && i + 1 < sizeof type; i++) type[i] = word[i] >= 'A' && word[i] <= 'Z' ? (char)(word[i] - 'A' + 'a') : word[i];
    type[i] = 0;
    return is_computed ? write_computed(w, index, &record, err) : write_raw(w, index, &record, err);
}

/* "gptq + hadamard (34.1 dB; search 25.3 dB)": the method, and where it was measured its output and what did worse. */
static void describe_method(const layer *l, const layer_outcome *o, char out[352]) {
    char name[48], db[32];
    aq_attempt_name(&l->best.attempt, name);
    if (isnan(o->output_sqnr_db))
        snprintf(out, 352, "%s", name);
    else
        snprintf(out, 352, "%s (%s dB%s%s)", name, aq_text_fixed(db, o->output_sqnr_db, 1), o->compared_with ? "; " : "",
                 o->compared_with ? o->compared_with : "");
}

/* One line about a finished tensor: "[3072, 3072] BF16 -> int4 g64 search  18.9 MB -> 5.03 MB  cos 0.999123". */
static void describe(const quantize_run *run, const layer *l, size_t index, char *out, size_t size) {
    const aq_tensor_info *t = aq_model_tensor(run->model, index);
    const layer_outcome *o = &run->outcomes[index];
    char shape[192], before[32], after[32], cosine[32], dtype[32], method[352];
    aq_escape(dtype, sizeof dtype, t->dtype_name, strlen(t->dtype_name));
    aq_text_shape(shape, &t->shape);
    aq_text_bytes(before, t->size_bytes);
    if (l && l->best.codes) {
        const candidate *c = &l->best;
        describe_method(l, o, method);
        aq_text_bytes(after, c->layout.codes_bytes + c->layout.params_bytes);
        snprintf(out, size, "%s %s -> int%d g%llu %s  %s -> %s  cos %s%s%s", shape, dtype, c->attempt.spec.bits, (unsigned long long)c->attempt.spec.group_size,
                 method, before, after, aq_text_fixed(cosine, o->cosine, 6), l->fallback_from[0] ? "  after " : "", l->fallback_from);
    } else {
        const char *reason = l ? l->fallback_from : run->choices[index].reason;
        snprintf(out, size, "%s %s kept, %s: %s%s", shape, dtype, before, reason ? reason : "",
                 o->corrected ? ", corrected by the mean error of its layer" : "");
    }
}

/* A layer that a plan puts below the floor. */
static bool is_below_plan(const quantize_run *run, size_t index) {
    const layer_outcome *o = &run->outcomes[index];
    return o->bits < 16 && o->cosine < run->min_accuracy && aq_planned(run, aq_model_tensor(run->model, index));
}

/* Warnings follow from the outcome alone, so that a continued run gives those of the whole. */
static void warn(quantize_run *run, size_t index) {
    const layer_outcome *o = &run->outcomes[index];
    bool zeroed = o->n_nonfinite && o->bits < 16, below = is_below_plan(run, index);
    if (!o->fallback_from && !o->widened && !zeroed && !below) return;
    char name[256], to[48], got[32], floor[32];
    const char *raw = aq_model_tensor(run->model, index)->name;
    aq_escape(name, sizeof name, raw, strlen(raw));
    snprintf(to, sizeof to, "int%d %s", o->bits, o->method ? o->method : "");
    size_t before = run->warnings.n_items;
    if (o->fallback_from) aq_sentences_add(&run->warnings, "%s: %s; %s", name, o->fallback_from, o->bits < 16 ? to : "kept as it is");
    if (o->widened) aq_sentences_add(&run->warnings, "%s: scales do not fit half precision, F32 parameters are used", name);
    if (zeroed) aq_sentences_add(&run->warnings, "%s: %llu values that are NaN or infinite were set to 0", name, (unsigned long long)o->n_nonfinite);
    if (below) {
        aq_text_below(got, floor, o->cosine, run->min_accuracy);
        aq_sentences_add(&run->warnings, "%s: cosine %s is below the floor %s; the plan is carried out as it is", name, got, floor);
    }
    for (size_t i = before; i < run->warnings.n_items; i++) aq_job_log(&run->job, AQ_LOG_WARNING, "%s", run->warnings.items[i]);
}

bool aq_layer_tell(work *w, const layer *l, size_t index) {
    const aq_tensor_info *t = aq_model_tensor(w->run->model, index);
    char detail[2048];
    describe(w->run, l, index, detail, sizeof detail);
    warn(w->run, index);
    if (!w->run->choices[index].quantize) atomic_fetch_add(&w->bytes_worked, t->size_bytes);
    return aq_job_tell(&w->run->job, "quantize", t->name, detail, w->n_done, w->bytes_done, fraction_of(w, w->bytes_done));
}

/* ---- continuing an interrupted run ---- */

/* Non-finite values of a layer that an earlier run finished are counted again: the journal does not hold them. */
static aq_status recount(quantize_run *run, size_t index, aq_error *err) {
    const aq_tensor_info *t = aq_model_tensor(run->model, index);
    float *values = aq_alloc(AQ_SLAB_VALUES * sizeof *values);
    if (!values) return aq_fail_memory(err, AQ_SLAB_VALUES * sizeof *values, "a slab of weights");
    slab_result found = {0};
    aq_status status = AQ_OK;
    for (uint64_t at = 0; at < t->count && status == AQ_OK; at += AQ_SLAB_VALUES) {
        uint64_t n = t->count - at < AQ_SLAB_VALUES ? t->count - at : AQ_SLAB_VALUES;
        if ((status = aq_model_read_f32(run->model, index, at, n, values, err)) == AQ_OK) aq_scan_nonfinite(values, n, at, false, &found);
    }
    run->outcomes[index].n_nonfinite = found.n_nonfinite;
    aq_model_release(run->model, index);
    aq_free(values);
    return status;
}

static aq_status take_over(quantize_run *run, size_t index, const aq_store_record *r, aq_error *err) {
    const aq_layer_choice *choice = &run->choices[index];
    layer_outcome *o = &run->outcomes[index];
    o->bits = r->quantized ? r->spec.bits : 16;
    o->spec = r->spec;
    o->cosine = r->quality.cosine;
    o->sqnr_db = r->quality.sqnr_db;
    o->output_sqnr_db = r->quality.output_sqnr_db;
    o->method = r->quantized ? aq_method_name(r->spec.method) : "keep";
    o->corrected = !r->quantized && r->quality.method && strcmp(r->quality.method, AQ_STORE_CORRECTED) == 0;
    o->widened = r->quantized && r->spec.params == AQ_PARAMS_F32 && choice->spec.params != AQ_PARAMS_F32;
    if (r->quality.fallback_from && !o->fallback_from && !(o->fallback_from = aq_strdup(r->quality.fallback_from)))
        return aq_fail_memory(err, 256, "the reason of a fallback");
    if (r->quality.compared_with && !o->compared_with && !(o->compared_with = aq_strdup(r->quality.compared_with)))
        return aq_fail_memory(err, 256, "what a method was compared with");
    return choice->quantize && run->nonfinite != NONFINITE_ERROR ? recount(run, index, err) : AQ_OK;
}

static aq_status bad_state(const quantize_run *run, aq_error *err) {
    aq_fail_at(err, AQ_ERR_USAGE, run->out_path, NULL, "the state of an interrupted run does not agree with this model");
    aq_hint(err, "--restart discards it");
    return AQ_ERR_USAGE;
}

/* The records of one tensor in the journal, from *at on. */
typedef struct stored {
    aq_store_record last;
    uint64_t parts;
    bool complete;
} stored;

static aq_status read_stored(const quantize_run *run, size_t index, uint64_t *at, stored *out, aq_error *err) {
    const aq_tensor_info *t = aq_model_tensor(run->model, index);
    uint64_t n = aq_store_writer_n_done(run->writer), rows, cols, expected = 0;
    aq_store_record *r = &out->last;
    *out = (stored){0};
    aq_shape_matrix(&t->shape, &rows, &cols);
    for (; *at < n && !out->complete; ++*at, out->parts++) {
        if (!aq_store_writer_done(run->writer, *at, r) || strcmp(r->name, t->name) != 0 || r->row_begin != expected) return bad_state(run, err);
        expected += r->row_count;
        out->complete = expected >= (r->quantized ? rows : t->count);
    }
    return AQ_OK;
}

/* A layer whose bias is corrected is coded again until that is stored too: the correction follows from the codes. Its parts are not stored again. */
aq_status aq_layers_resume(work *w, aq_error *err) {
    quantize_run *run = w->run;
    uint64_t n = aq_store_writer_n_done(run->writer), i = 0;
    while (i < n) {
        while (w->first < run->n_tensors && aq_model_tensor(run->model, run->order[w->first])->role == AQ_ROLE_SCALE) w->first++;
        if (w->first == run->n_tensors) return bad_state(run, err);
        size_t index = run->order[w->first];
        stored tensor, bias = {.complete = true};
        aq_status status = read_stored(run, index, &i, &tensor, err);
        uint64_t next = i;
        if (status == AQ_OK && tensor.complete && tensor.last.quantized && aq_bias_is_corrected(run, index))
            status = read_stored(run, (size_t)run->biases[index], &next, &bias, err);
        if (status != AQ_OK) return status;
        if (!tensor.complete || !bias.complete) {
            w->parts_done = tensor.parts + bias.parts;
            break;
        }
        status = take_over(run, index, &tensor.last, err);
        if (status != AQ_OK) return status;
        warn(run, index);
        aq_inputs_finish(w->pool, index);
        w->n_done++;
        w->bytes_done += aq_model_tensor(run->model, index)->size_bytes;
        w->first++;
    }
    if (n > 0) aq_job_log(&run->job, AQ_LOG_INFO, "continuing an interrupted run: %llu of %zu tensors are done", (unsigned long long)w->n_done, run->n_tensors);
    atomic_store(&w->bytes_worked, w->bytes_done);
    return AQ_OK;
}
