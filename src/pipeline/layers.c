/* Quantizing all tensors (see quantize.h): slabs of rows in parallel, finished tensors to the writer in source order.
 *
 * A slab is converted to F32, coded and measured while it is in the cache; sums of a layer are added in slab order, so figures and bytes do not depend on
 * threads. A layer whose parameters do not fit half precision starts again with F32 ones; one below its floor starts again a step up the ladder; beyond
 * the last step it is kept. A kept tensor has no slabs: it goes from the source's memory map to the writer as it is.
 */
#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>

#include "base/error.h"
#include "base/half.h"
#include "base/mem.h"
#include "base/ordered.h"
#include "base/size.h"
#include "pipeline/quantize.h"
#include "pipeline/source.h"

enum { MAX_THREADS = 256 };

typedef struct {
    aq_quant_metrics metrics;
    uint64_t n_nonfinite, first_nonfinite; /* flat index in the tensor */
} slab_result;

/* A layer while it is open. */
typedef struct {
    aq_quant_spec spec;
    aq_quant_layout layout;
    uint64_t slab_rows;
    size_t n_slabs;
    uint8_t *codes, *params;
    slab_result *slabs;
    atomic_bool needs_f32;
    char fallback_from[256];
    size_t error_slab;
    aq_error error;
} layer;

typedef struct {
    quantize_run *run;
    layer *open[AQ_ORDERED_WINDOW]; /* by position in the ring; NULL: kept or closed */
    float *scratch[MAX_THREADS];    /* one slab each, made when first used */
    pthread_mutex_t error_mutex;
    size_t first_tensor; /* the writer already holds the tensors before it … */
    uint64_t parts_done; /* … and so many parts of it */
    _Atomic uint64_t bytes_worked;
    uint64_t n_done, bytes_done; /* committed */
    aq_error error;              /* of a commit */
} work;

static layer **slot_of(work *w, size_t item) { return &w->open[item % AQ_ORDERED_WINDOW]; }

static void free_layer(layer *l) {
    if (!l) return;
    aq_free(l->codes);
    aq_free(l->params);
    aq_free(l->slabs);
    aq_free(l);
}

static void free_buffers(layer *l) {
    aq_free(l->codes);
    aq_free(l->params);
    aq_free(l->slabs);
    l->codes = l->params = NULL;
    l->slabs = NULL;
}

/* Sets up the layer for one try with l->spec. */
static aq_status start_try(layer *l, const aq_tensor_info *t, aq_error *err) {
    uint64_t rows, cols;
    free_buffers(l);
    aq_shape_matrix(&t->shape, &rows, &cols);
    aq_status status = aq_quant_layout_init(&l->layout, &l->spec, rows, cols, err);
    if (status != AQ_OK) return status;
    l->slab_rows = aq_slab_rows(rows, cols, l->spec.axis == 0 ? l->spec.group_size : 1);
    l->n_slabs = (size_t)aq_div_up(rows, l->slab_rows);
    l->codes = aq_alloc(l->layout.codes_bytes);
    l->params = aq_alloc(l->layout.params_bytes);
    l->slabs = aq_calloc(l->n_slabs, sizeof *l->slabs);
    atomic_store(&l->needs_f32, false);
    if (!l->codes || !l->params || !l->slabs) return aq_fail_memory(err, l->layout.codes_bytes + l->layout.params_bytes, "the codes of a layer");
    return AQ_OK;
}

static uint64_t layer_cost(void *context, size_t item) {
    const work *w = context;
    return w->run->needs[item + w->first_tensor];
}

static bool begin_layer(void *context, size_t item, size_t *n_parts) {
    work *w = context;
    size_t index = item + w->first_tensor;
    *n_parts = 0;
    *slot_of(w, item) = NULL;
    if (!w->run->choices[index].quantize) return true;
    layer *l = *slot_of(w, item) = aq_calloc(1, sizeof *l);
    if (!l) return false;
    l->spec = w->run->choices[index].spec;
    if (start_try(l, aq_model_tensor(w->run->model, index), &l->error) != AQ_OK) return false;
    *n_parts = l->n_slabs;
    return true;
}

static bool is_bad(float x) { return (aq_f32_bits(x) & 0x7F800000) == 0x7F800000; }

/* Counts what is not finite in w and, when asked, sets it to zero. */
static void scan_nonfinite(float *w, uint64_t n, uint64_t begin, bool zero, slab_result *out) {
    for (uint64_t i = 0; i < n; i++) {
        if (!is_bad(w[i])) continue;
        if (out->n_nonfinite++ == 0) out->first_nonfinite = begin + i;
        if (zero) w[i] = 0;
    }
}

static uint8_t *params_of_row(const layer *l, uint64_t row) {
    const aq_quant_layout *y = &l->layout;
    if (l->spec.axis == 1) return l->params + row * (y->params_bytes / y->rows);
    return l->params + (l->spec.group_size ? row / l->spec.group_size * (y->params_bytes / y->n_groups) : 0);
}

static aq_status code_slab(work *w, layer *l, size_t index, size_t slab, float *values, aq_error *err) {
    const quantize_run *run = w->run;
    uint64_t row = (uint64_t)slab * l->slab_rows, cols = l->layout.cols;
    uint64_t n_rows = l->layout.rows - row < l->slab_rows ? l->layout.rows - row : l->slab_rows;
    slab_result *result = &l->slabs[slab];
    aq_quant_layout part;
    aq_status status = aq_quant_layout_init(&part, &l->spec, n_rows, cols, err);
    if (status == AQ_OK) status = aq_model_read_f32(run->model, index, row * cols, n_rows * cols, values, err);
    if (status != AQ_OK) return status;
    bool needs_f32 = false;
    for (int attempt = 0; attempt < 2; attempt++) {
        status = aq_quantize(values, &l->spec, &part, NULL, 1, l->codes + row * l->layout.row_bytes, params_of_row(l, row), &result->metrics, &needs_f32, err);
        if (needs_f32) {
            atomic_store(&l->needs_f32, true);
            return AQ_OK;
        }
        if (status != AQ_ERR_FORMAT || attempt > 0) return status;
        /* Not finite: what that means is decided when the whole layer was seen; zeroed values are coded at once. */
        scan_nonfinite(values, n_rows * cols, row * cols, run->nonfinite == NONFINITE_ZERO, result);
        if (result->n_nonfinite == 0) return status;
        if (run->nonfinite != NONFINITE_ZERO) return AQ_OK;
    }
    return status;
}

static bool do_slab(void *context, size_t item, size_t slab, size_t thread) {
    work *w = context;
    layer *l = *slot_of(w, item);
    size_t index = item + w->first_tensor;
    const aq_tensor_info *t = aq_model_tensor(w->run->model, index);
    aq_error error;
    aq_status status = AQ_OK;
    if (!atomic_load(&l->needs_f32)) {
        if (!w->scratch[thread]) w->scratch[thread] = aq_alloc(w->run->memory.slab_values * sizeof(float));
        status = w->scratch[thread] ? code_slab(w, l, index, slab, w->scratch[thread], &error)
                                    : aq_fail_memory(&error, w->run->memory.slab_values * sizeof(float), "a slab of weights");
    }
    atomic_fetch_add(&w->bytes_worked, t->size_bytes / l->n_slabs);
    if (status == AQ_OK) return true;
    pthread_mutex_lock(&w->error_mutex); /* the first slab's error is told, whichever thread was first */
    if (l->error.code == AQ_OK || slab < l->error_slab) {
        l->error = error;
        l->error_slab = slab;
    }
    pthread_mutex_unlock(&w->error_mutex);
    return false;
}

/* "int2: cosine 0.612 < 0.850", added to what was tried before. */
static void note_fallback(layer *l, const char *what) {
    size_t at = strlen(l->fallback_from);
    snprintf(l->fallback_from + at, sizeof l->fallback_from - at, "%sint%d: %s", at ? "; " : "", l->spec.bits, what);
}

static aq_status set_fallback(layer_outcome *outcome, const layer *l, aq_error *err) {
    if (!l->fallback_from[0]) return AQ_OK;
    outcome->fallback_from = aq_strdup(l->fallback_from);
    return outcome->fallback_from ? AQ_OK : aq_fail_memory(err, sizeof l->fallback_from, "the reason of a fallback");
}

static aq_status keep_layer(layer *l, layer_outcome *outcome, aq_error *err) {
    free_buffers(l);
    outcome->bits = 16;
    outcome->widened = false;
    outcome->cosine = outcome->sqnr_db = (double)NAN;
    return set_fallback(outcome, l, err);
}

/* Decides about non-finite values; *decided: the layer's way is clear. */
static aq_status judge_nonfinite(const quantize_run *run, layer *l, const aq_tensor_info *t, layer_outcome *outcome, bool *decided, aq_error *err) {
    uint64_t n = 0, first = 0;
    for (size_t i = l->n_slabs; i-- > 0;) {
        n += l->slabs[i].n_nonfinite;
        if (l->slabs[i].n_nonfinite) first = l->slabs[i].first_nonfinite;
    }
    outcome->n_nonfinite = n;
    if (n == 0 || run->nonfinite == NONFINITE_ZERO) return AQ_OK;
    *decided = true;
    if (run->nonfinite == NONFINITE_KEEP) {
        char text[96];
        snprintf(text, sizeof text, "%llu values are not finite, the first at index %llu", (unsigned long long)n, (unsigned long long)first);
        note_fallback(l, text);
        return keep_layer(l, outcome, err);
    }
    aq_fail_at(err, AQ_ERR_FORMAT, aq_model_file(run->model, t->file_index), t->name, "%llu of %llu values are NaN or infinite, the first at index %llu",
               (unsigned long long)n, (unsigned long long)t->count, (unsigned long long)first);
    aq_hint(err, "--nonfinite keep stores this tensor unquantized, --nonfinite zero replaces such values by 0");
    return AQ_ERR_FORMAT;
}

/* All slabs are done: takes the layer, or says what to try next by *again. */
static aq_status judge(const quantize_run *run, layer *l, size_t index, bool *again, aq_error *err) {
    const aq_tensor_info *t = aq_model_tensor(run->model, index);
    layer_outcome *outcome = &run->outcomes[index];
    if (atomic_load(&l->needs_f32)) {
        outcome->widened = true;
        l->spec = aq_widened(run, &l->spec);
        *again = true;
        return AQ_OK;
    }
    bool decided = false;
    aq_status status = judge_nonfinite(run, l, t, outcome, &decided, err);
    if (status != AQ_OK || decided) return status;
    aq_quant_metrics sum = {0};
    for (size_t i = 0; i < l->n_slabs; i++) aq_quant_metrics_add(&sum, &l->slabs[i].metrics);
    outcome->bits = l->spec.bits;
    outcome->cosine = aq_quant_metrics_cosine(&sum);
    outcome->sqnr_db = aq_quant_metrics_sqnr_db(&sum);
    if (outcome->cosine >= run->min_accuracy) return set_fallback(outcome, l, err);
    char got[32], floor[32], text[96];
    aq_text_below(got, floor, outcome->cosine, run->min_accuracy);
    if (run->fail_fast) {
        aq_fail_at(err, AQ_ERR_QUALITY, aq_model_file(run->model, t->file_index), t->name, "cosine similarity %s at %d bits is below the floor %s", got,
                   l->spec.bits, floor);
        aq_hint(err, "use more bits or smaller groups, lower --min-accuracy, or leave out --fail-fast to let such layers go up in bits");
        return AQ_ERR_QUALITY;
    }
    snprintf(text, sizeof text, "cosine %s < %s", got, floor);
    note_fallback(l, text);
    int bits = aq_next_bits(run, l->spec.bits);
    if (bits == 16) return keep_layer(l, outcome, err);
    *again = true;
    outcome->widened = false;
    return aq_spec_at(run, index, bits, &l->spec, err);
}

static aq_ordered_next end_layer(void *context, size_t item, size_t *n_parts) {
    work *w = context;
    layer *l = *slot_of(w, item);
    size_t index = item + w->first_tensor;
    const aq_tensor_info *t = aq_model_tensor(w->run->model, index);
    bool again = false;
    aq_status status = judge(w->run, l, index, &again, &l->error);
    if (status == AQ_OK && again) status = start_try(l, t, &l->error);
    if (status != AQ_OK) return AQ_ORDERED_FAIL;
    if (!again) return AQ_ORDERED_READY;
    *n_parts = l->n_slabs;
    return AQ_ORDERED_AGAIN;
}

/* ---- handing over to the writer ---- */

static double fraction_of(const work *w, uint64_t bytes) { return w->run->source_bytes ? 0.9 * ((double)bytes / (double)w->run->source_bytes) : 0.9; }

static bool tick(void *context) {
    work *w = context;
    uint64_t bytes = atomic_load(&w->bytes_worked); /* a layer that starts again counts again, so this may run ahead */
    uint64_t most = w->run->source_bytes;
    return aq_job_tell(&w->run->job, "quantize", NULL, NULL, w->n_done, w->bytes_done, fraction_of(w, bytes < most ? bytes : most));
}

/* Adds one part unless the writer has it from an earlier run. */
static aq_status add_part(work *w, const aq_store_record *record, aq_error *err) {
    if (w->parts_done > 0) {
        w->parts_done--;
        return AQ_OK;
    }
    if (!tick(w)) return AQ_ERR_INTERRUPTED;
    return aq_store_writer_add(w->run->writer, record, err);
}

static aq_status write_codes(work *w, const layer *l, aq_store_record *record, aq_error *err) {
    const aq_quant_layout *y = &l->layout;
    uint64_t unit = l->spec.axis == 0 ? l->spec.group_size ? l->spec.group_size : y->rows : 1;
    uint64_t step = y->row_bytes ? AQ_STORE_PART_BYTES / y->row_bytes / unit * unit : y->rows;
    if (step == 0) step = unit;
    aq_status status = AQ_OK;
    for (uint64_t row = 0; row < y->rows && status == AQ_OK; row += step) {
        uint64_t n = y->rows - row < step ? y->rows - row : step;
        aq_quant_layout part;
        if ((status = aq_quant_layout_init(&part, &l->spec, n, y->cols, err)) != AQ_OK) break;
        record->row_begin = row;
        record->row_count = n;
        record->data = l->codes + row * y->row_bytes;
        record->data_bytes = part.codes_bytes;
        record->params = params_of_row(l, row);
        record->params_bytes = part.params_bytes;
        status = add_part(w, record, err);
    }
    return status;
}

/* A kept tensor whose values are computed: fp8 with a scale, GGUF blocks. */
static aq_status write_computed(work *w, size_t index, aq_store_record *record, aq_error *err) {
    const aq_tensor_info *t = aq_model_tensor(w->run->model, index);
    const uint64_t size = aq_dtype_size(t->kept_dtype), step = AQ_STORE_PART_BYTES / size, chunk = AQ_SLAB_VALUES;
    uint64_t most = t->count < step ? t->count : step;
    uint8_t *kept = aq_alloc(size * most);
    float *values = aq_alloc(4 * chunk);
    aq_status status = kept && values ? AQ_OK : aq_fail_memory(err, size * most + 4 * chunk, "a kept tensor");
    for (uint64_t at = 0; (at < t->count || at == 0) && status == AQ_OK; at += step) {
        uint64_t n = t->count - at < step ? t->count - at : step;
        for (uint64_t i = 0; i < n && status == AQ_OK; i += chunk) {
            uint64_t m = n - i < chunk ? n - i : chunk;
            status = aq_model_read_f32(w->run->model, index, at + i, m, values, err);
            if (status == AQ_OK) aq_f32_to_elements(values, m, t->kept_dtype, kept + i * size);
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

static aq_status write_tensor(work *w, const layer *l, size_t index, aq_error *err) {
    const aq_tensor_info *t = aq_model_tensor(w->run->model, index);
    const layer_outcome *o = &w->run->outcomes[index];
    if (t->role == AQ_ROLE_SCALE) return AQ_OK; /* consumed with its weight */
    char type[64];
    aq_store_record record = {.name = t->name, .dtype = t->dtype_name, .quant_type = type, .shape = t->shape, .quality = {.output_sqnr_db = (double)NAN}};
    record.quality.fallback_from = o->fallback_from;
    if (l && l->codes) {
        snprintf(type, sizeof type, "int%d", l->spec.bits);
        record.quantized = true;
        record.spec = l->spec;
        record.quality.cosine = o->cosine;
        record.quality.sqnr_db = o->sqnr_db;
        record.quality.method = aq_method_name(l->spec.method);
        return write_codes(w, l, &record, err);
    }
    record.quality.cosine = record.quality.sqnr_db = (double)NAN;
    record.quality.method = "keep";
    const char *word = t->is_computed ? aq_dtype_name(t->kept_dtype) : t->dtype_name;
    size_t i = 0;
    for (; word[i] && i + 1 < sizeof type; i++) type[i] = word[i] >= 'A' && word[i] <= 'Z' ? (char)(word[i] - 'A' + 'a') : word[i];
    type[i] = 0;
    return t->is_computed ? write_computed(w, index, &record, err) : write_raw(w, index, &record, err);
}

/* One line about a finished tensor: "[3072, 3072] BF16 -> int4 g64 search  18.9 MB -> 5.03 MB  cos 0.999123". */
static void describe(const quantize_run *run, const layer *l, size_t index, char out[512]) {
    const aq_tensor_info *t = aq_model_tensor(run->model, index);
    char shape[192], before[32], after[32], cosine[32], dtype[32];
    aq_escape(dtype, sizeof dtype, t->dtype_name, strlen(t->dtype_name));
    aq_text_shape(shape, &t->shape);
    aq_text_bytes(before, t->size_bytes);
    if (l && l->codes) {
        aq_text_bytes(after, l->layout.codes_bytes + l->layout.params_bytes);
        snprintf(out, 512, "%s %s -> int%d g%llu %s  %s -> %s  cos %s%s%s", shape, dtype, l->spec.bits, (unsigned long long)l->spec.group_size,
                 aq_method_name(l->spec.method), before, after, aq_text_fixed(cosine, run->outcomes[index].cosine, 6), l->fallback_from[0] ? "  after " : "",
                 l->fallback_from);
    } else {
        const char *reason = l ? l->fallback_from : run->choices[index].reason;
        snprintf(out, 512, "%s %s kept, %s: %s", shape, dtype, before, reason ? reason : "");
    }
}

/* Warnings follow from the outcome alone, so that a continued run gives those of the whole. */
static void warn(quantize_run *run, size_t index) {
    const layer_outcome *o = &run->outcomes[index];
    if (!o->fallback_from && !o->widened && !(o->n_nonfinite && o->bits < 16)) return;
    char name[256], to[16];
    const char *raw = aq_model_tensor(run->model, index)->name;
    aq_escape(name, sizeof name, raw, strlen(raw));
    snprintf(to, sizeof to, "int%d", o->bits);
    size_t before = run->warnings.n_items;
    if (o->fallback_from) aq_sentences_add(&run->warnings, "%s: %s; %s", name, o->fallback_from, o->bits < 16 ? to : "kept as it is");
    if (o->widened) aq_sentences_add(&run->warnings, "%s: scales do not fit half precision, F32 parameters are used", name);
    if (o->n_nonfinite && o->bits < 16)
        aq_sentences_add(&run->warnings, "%s: %llu values that are NaN or infinite were set to 0", name, (unsigned long long)o->n_nonfinite);
    for (size_t i = before; i < run->warnings.n_items; i++) aq_job_log(&run->job, AQ_LOG_WARNING, "%s", run->warnings.items[i]);
}

static bool commit_layer(void *context, size_t item) {
    work *w = context;
    layer *l = *slot_of(w, item);
    size_t index = item + w->first_tensor;
    const aq_tensor_info *t = aq_model_tensor(w->run->model, index);
    aq_status status = write_tensor(w, l, index, &w->error);
    w->parts_done = 0;
    aq_model_release(w->run->model, index);
    if (status != AQ_OK) {
        if (status == AQ_ERR_INTERRUPTED) aq_job_cancelled(&w->error, "the state is kept; the same command continues");
        return false;
    }
    char detail[512];
    describe(w->run, l, index, detail);
    warn(w->run, index);
    free_layer(l);
    *slot_of(w, item) = NULL;
    w->n_done++;
    w->bytes_done += t->size_bytes;
    if (!w->run->choices[index].quantize) atomic_fetch_add(&w->bytes_worked, t->size_bytes);
    if (aq_job_tell(&w->run->job, "quantize", t->name, detail, w->n_done, w->bytes_done, fraction_of(w, w->bytes_done))) return true;
    aq_job_cancelled(&w->error, "the state is kept; the same command continues");
    return false;
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
        if ((status = aq_model_read_f32(run->model, index, at, n, values, err)) == AQ_OK) scan_nonfinite(values, n, at, false, &found);
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
    o->cosine = r->quality.cosine;
    o->sqnr_db = r->quality.sqnr_db;
    o->widened = r->quantized && r->spec.params == AQ_PARAMS_F32 && choice->spec.params != AQ_PARAMS_F32;
    if (r->quality.fallback_from && !o->fallback_from && !(o->fallback_from = aq_strdup(r->quality.fallback_from)))
        return aq_fail_memory(err, 256, "the reason of a fallback");
    return choice->quantize && run->nonfinite != NONFINITE_ERROR ? recount(run, index, err) : AQ_OK;
}

static aq_status bad_state(const quantize_run *run, aq_error *err) {
    aq_fail_at(err, AQ_ERR_USAGE, run->out_path, NULL, "the state of an interrupted run does not agree with this model");
    aq_hint(err, "--restart discards it");
    return AQ_ERR_USAGE;
}

/* Finds where the records of the writer end: w->first_tensor and w->parts_done. */
static aq_status resume(work *w, aq_error *err) {
    quantize_run *run = w->run;
    uint64_t n = aq_store_writer_n_done(run->writer), i = 0;
    while (i < n) {
        while (w->first_tensor < run->n_tensors && aq_model_tensor(run->model, w->first_tensor)->role == AQ_ROLE_SCALE) w->first_tensor++;
        if (w->first_tensor == run->n_tensors) return bad_state(run, err);
        const aq_tensor_info *t = aq_model_tensor(run->model, w->first_tensor);
        uint64_t rows, cols, expected = 0, parts = 0;
        aq_shape_matrix(&t->shape, &rows, &cols);
        aq_store_record r = {0};
        bool complete = false;
        for (; i < n && !complete; i++, parts++) {
            if (!aq_store_writer_done(run->writer, i, &r) || strcmp(r.name, t->name) != 0 || r.row_begin != expected) return bad_state(run, err);
            expected += r.row_count;
            complete = expected >= (r.quantized ? rows : t->count);
        }
        if (!complete) {
            w->parts_done = parts;
            break;
        }
        aq_status status = take_over(run, w->first_tensor, &r, err);
        if (status != AQ_OK) return status;
        warn(run, w->first_tensor);
        w->n_done++;
        w->bytes_done += t->size_bytes;
        w->first_tensor++;
    }
    if (n > 0) aq_job_log(&run->job, AQ_LOG_INFO, "continuing an interrupted run: %llu of %zu tensors are done", (unsigned long long)w->n_done, run->n_tensors);
    atomic_store(&w->bytes_worked, w->bytes_done);
    return AQ_OK;
}

aq_status aq_quantize_layers(quantize_run *run, aq_error *err) {
    work *w = aq_calloc(1, sizeof *w);
    if (!w) return aq_fail_memory(err, sizeof *w, "the work list");
    w->run = run;
    pthread_mutex_init(&w->error_mutex, NULL);
    aq_status status = resume(w, err);
    if (status == AQ_OK) {
        aq_ordered job = {.n_items = run->n_tensors - w->first_tensor,
                          .n_threads = run->memory.n_threads,
                          .budget = run->memory.budget_bytes,
                          .context = w,
                          .cost = layer_cost,
                          .begin = begin_layer,
                          .part = do_slab,
                          .end = end_layer,
                          .commit = commit_layer,
                          .tick = tick};
        size_t failed;
        aq_ordered_result result = aq_ordered_run(&job, &failed);
        if (result == AQ_ORDERED_CANCELLED) {
            status = aq_job_cancelled(err, "the state is kept; the same command continues");
        } else if (result == AQ_ORDERED_FAILED) {
            const layer *l = *slot_of(w, failed);
            const aq_error *e = w->error.code != AQ_OK ? &w->error : l ? &l->error : NULL;
            status = e ? e->code : aq_fail_memory(err, sizeof *l, "a layer");
            if (e && err) *err = *e;
        }
    }
    for (size_t i = 0; i < AQ_ORDERED_WINDOW; i++) free_layer(w->open[i]);
    for (size_t i = 0; i < MAX_THREADS; i++) aq_free(w->scratch[i]);
    pthread_mutex_destroy(&w->error_mutex);
    aq_free(w);
    return status;
}
