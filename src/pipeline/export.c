/* Exports of a container (see pipeline.h and export.h): plans every tensor, converts or recodes slabs of rows in several threads, writes them at their places.
 *
 * What is in flight is bounded, and the bytes do not depend on the number of threads. Where a target has codes of its own, the weights that its bytes mean are
 * compared with the container's, so that an error added by another grid is always known.
 */
#include "pipeline/export.h"

#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "base/error.h"
#include "base/file.h"
#include "base/half.h"
#include "base/mem.h"
#include "base/size.h"

#define IN_FLIGHT_BYTES (UINT64_C(64) << 20)

/* ---- plans ---- */

export_out *aq_export_add(exporting *x, size_t tensor, const char *name, size_t name_length, const char *suffix) {
    size_t n_suffix = suffix ? strlen(suffix) : 0;
    if (x->n_outs == x->outs_capacity) {
        size_t larger = x->outs_capacity ? 2 * x->outs_capacity : 64;
        export_out *grown = aq_realloc(x->outs, larger, sizeof *grown);
        if (!grown) return NULL;
        x->outs = grown;
        x->outs_capacity = larger;
    }
    export_out *out = &x->outs[x->n_outs];
    *out = (export_out){.name = aq_alloc(name_length + n_suffix + 1)};
    if (!out->name) return NULL;
    memcpy(out->name, name, name_length);
    if (suffix) memcpy(out->name + name_length, suffix, n_suffix);
    out->name[name_length + n_suffix] = 0;
    if (x->plans[tensor].n_outs++ == 0) x->plans[tensor].first_out = x->n_outs;
    x->n_outs++;
    return out;
}

aq_dtype aq_export_kept_dtype(const aq_source_tensor *t, aq_dtype wanted) {
    aq_dtype source = aq_dtype_from_name(t->dtype);
    if (!t->is_float) return source;
    if (wanted != AQ_DTYPE_OTHER) return wanted;
    if (!t->stored->quantized) return t->stored->raw_dtype;
    return source == AQ_F64 || source == AQ_F32 || source == AQ_F16 ? source : AQ_BF16; /* reduced ones come out as BF16 */
}

aq_status aq_export_plan_kept(exporting *x, size_t tensor, const aq_source_tensor *t, aq_dtype dtype, aq_error *err) {
    if (dtype == AQ_DTYPE_OTHER)
        return aq_fail_at(err, AQ_ERR_FORMAT, aq_source_path(&x->source), t->name, "has the element type %s, which %s files here cannot hold", t->dtype,
                          x->target->name);
    export_out *out = aq_export_add(x, tensor, t->name, strlen(t->name), NULL);
    if (!out) return aq_fail_memory(err, strlen(t->name), "the tensor list");
    bool same = !t->stored->quantized && (!t->is_float || dtype == t->stored->raw_dtype);
    x->plans[tensor].from = same ? EXPORT_COPIED : EXPORT_CONVERTED;
    x->plans[tensor].dtype = dtype;
    out->dtype = aq_dtype_name(dtype);
    out->shape = t->shape;
    out->row_bytes = t->cols * aq_dtype_size(dtype);
    out->size_bytes = t->count * aq_dtype_size(dtype);
    return AQ_OK;
}

bool aq_export_has_plain_codes(const aq_store_tensor *stored) {
    return stored->quantized && stored->hadamard_group == 0 && stored->n_equalization_scales == 0 && stored->spec.params != AQ_PARAMS_R2Q;
}

aq_status aq_export_codes_at(const exporting *x, size_t tensor, uint64_t *row, aq_store_record *part, aq_quant_layout *layout, aq_error *err) {
    size_t n = aq_store_tensor_at(x->source.store, tensor)->n_parts;
    for (size_t i = 0; i < n; i++) {
        aq_status status = aq_store_part(x->source.store, tensor, i, part, err);
        if (status != AQ_OK) return status;
        if (*row >= part->row_begin + part->row_count) continue;
        *row -= part->row_begin;
        return aq_quant_layout_init(layout, &part->spec, part->row_count, aq_store_tensor_at(x->source.store, tensor)->cols, err);
    }
    return aq_fail_at(err, AQ_ERR_INTERNAL, NULL, aq_store_tensor_at(x->source.store, tensor)->name, "row %llu is in no part", (unsigned long long)*row);
}

aq_status aq_export_row_at(const exporting *x, size_t tensor, uint64_t row, export_row *out, float *s, float *z, aq_error *err) {
    aq_store_record part;
    aq_quant_layout layout, one;
    aq_status status = aq_export_codes_at(x, tensor, &row, &part, &layout, err);
    if (status == AQ_OK) status = aq_quant_layout_init(&one, &part.spec, 1, layout.cols, err);
    if (status != AQ_OK) return status;
    uint64_t at = part.spec.axis == 1 ? row : part.spec.group_size ? row / part.spec.group_size : 0;
    aq_quant_pairs(&part.spec, &one, (const uint8_t *)part.params + at * one.params_bytes, s, z);
    *out = (export_row){(const uint8_t *)part.data + row * layout.row_bytes, part.spec.bits, one.pair_width};
    return AQ_OK;
}

/* A matching tensor of --source may stand for the container's weights: the same name and shape. */
static bool source_has(const exporting *x, const aq_source_tensor *t) {
    int64_t at = x->options->source && t->stored->quantized ? aq_source_find(&x->original, t->name) : -1;
    aq_source_tensor other;
    if (at < 0) return false;
    aq_source_tensor_at(&x->original, (size_t)at, &other);
    return other.is_float && other.rows == t->rows && other.cols == t->cols;
}

static void shape_of(void *user, size_t i, uint64_t *rows, uint64_t *cols) {
    const exporting *x = user;
    aq_source_tensor t;
    aq_source_tensor_at(&x->source, i, &t);
    bool copied = x->plans[i].from == EXPORT_COPIED, whole = x->plans[i].whole && t.count > 0;
    *rows = copied || whole ? 1 : t.rows;
    *cols = copied ? 1 : whole ? t.count : t.cols;
}

/* A bias that the container's codes made, and --source has it as it was: which of the two goes with what is written is known after its layer. */
static void plan_bias(exporting *x, size_t tensor, const aq_source_tensor *t) {
    export_plan *plan = &x->plans[tensor];
    size_t n = strlen(t->name);
    const char *method = t->stored->quality.method;
    int64_t other = x->options->source && x->target->recodes ? aq_source_find(&x->original, t->name) : -1;
    if (other < 0 || t->stored->quantized || !method || strcmp(method, AQ_STORE_CORRECTED) != 0 || n < 5 || plan->whole) return;
    aq_source_tensor original;
    aq_source_tensor_at(&x->original, (size_t)other, &original);
    if (tensor > 0) { /* it is stored after its layer */
        aq_source_tensor layer;
        aq_source_tensor_at(&x->source, tensor - 1, &layer);
        if (strncmp(layer.name, t->name, n - 4) == 0 && strcmp(layer.name + n - 4, "weight") == 0) plan->layer = tensor;
    }
    if (plan->layer && original.is_float && original.rows == t->rows && original.cols == t->cols && plan->from != EXPORT_RECODED)
        plan->from = EXPORT_CONVERTED;
    else
        plan->layer = 0;
}

static aq_status plan_all(exporting *x, aq_error *err) {
    size_t n = x->source.n_tensors;
    if (!(x->plans = aq_calloc(n, sizeof *x->plans))) return aq_fail_memory(err, n * sizeof *x->plans, "the tensor list");
    for (size_t i = 0; i < n; i++) {
        aq_source_tensor t;
        aq_source_tensor_at(&x->source, i, &t);
        x->plans[i].use_source = x->target->recodes && source_has(x, &t);
        aq_status status = x->target->plan(x, i, &t, err);
        if (status != AQ_OK) return status;
        plan_bias(x, i, &t);
        if (x->options->source && x->target->recodes && t.stored->quantized && x->plans[i].from == EXPORT_RECODED && !x->plans[i].use_source)
            aq_sentences_add(&x->warnings, "%s is not in --source with this shape", t.name);
    }
    for (size_t i = 0; i < x->n_outs; i++) x->job.bytes_total += x->outs[i].size_bytes;
    x->job.n_total = n;
    return aq_slabs_init(&x->slabs, n, shape_of, x, err);
}

/* ---- conversion ---- */

/* What the converted bytes mean. */
static void read_back(const void *from, uint64_t n, aq_dtype dtype, float *out) {
    if (dtype == AQ_F32)
        memcpy(out, from, (size_t)n * 4);
    else if (dtype == AQ_F64)
        for (uint64_t i = 0; i < n; i++) out[i] = (float)((const double *)from)[i];
    else
        for (uint64_t i = 0; i < n; i++) out[i] = dtype == AQ_BF16 ? aq_bf16_to_f32(((const uint16_t *)from)[i]) : aq_f16_to_f32(((const uint16_t *)from)[i]);
}

static export_slab slab_at(const exporting *x, size_t item) {
    export_slab s = {.tensor = aq_slabs_tensor(&x->slabs, item)};
    aq_source_tensor_at(&x->source, s.tensor, &s.t);
    s.plan = &x->plans[s.tensor];
    uint64_t rows = s.plan->whole ? s.t.rows : aq_slab_rows(s.t.rows, s.t.cols, 1);
    s.row = (item - x->slabs.first[s.tensor]) * rows;
    if (s.plan->from != EXPORT_COPIED) s.n_rows = s.t.rows - s.row < rows ? s.t.rows - s.row : rows;
    return s;
}

/* Bytes that a slab has of one output. */
static uint64_t slab_bytes(const export_slab *s, const export_out *out) {
    return out->blob ? 0 : s->plan->whole ? out->size_bytes : s->n_rows * out->row_bytes;
}

static uint64_t piece_bytes(const exporting *x, const export_slab *s) {
    uint64_t bytes = 0;
    for (size_t i = 0; i < s->plan->n_outs; i++) bytes += slab_bytes(s, &x->outs[s->plan->first_out + i]);
    return bytes;
}

static uint64_t slab_cost(void *context, size_t item) {
    export_slab s = slab_at(context, item);
    return piece_bytes(context, &s);
}

static bool room(exporting *x, export_scratch *t) {
    uint64_t n = x->slabs.max_values;
    if (t->reference) return true;
    t->reference = aq_alloc(n * sizeof(float));
    if (x->target->recodes) t->result = aq_alloc(n * sizeof(float));
    if (x->target->recodes && x->options->source) t->source = aq_alloc(n * sizeof(float));
    if (x->target->recodes) t->encoder = aq_ggml_encoder_create();
    return t->reference && (!x->target->recodes || (t->result && t->encoder && (!x->options->source || t->source)));
}

static aq_status read_values(exporting *x, const export_slab *s, export_scratch *t, aq_error *err) {
    aq_status status = aq_source_read_f32(&x->source, s->tensor, s->row, s->n_rows, t->reference, err);
    t->values = t->reference;
    if (status != AQ_OK || !s->plan->use_source) return status;
    status = aq_source_read_f32(&x->original, (size_t)aq_source_find(&x->original, s->t.name), s->row, s->n_rows, t->source, err);
    if (status == AQ_OK && s->t.stored->equalization_folded) /* what the container's layer stands for: W / s */
        aq_scale_columns(t->source, s->n_rows, s->t.cols, s->t.stored->equalization_scales, true);
    t->values = t->source;
    return status;
}

static bool do_slab(void *context, size_t item, size_t part, size_t thread) {
    (void)part;
    exporting *x = context;
    export_slab s = slab_at(x, item);
    export_piece *piece = &x->pieces[item % AQ_ORDERED_WINDOW];
    export_scratch *t = &x->scratch[thread];
    uint64_t n = s.n_rows * s.t.cols;
    *piece = (export_piece){.bytes = NULL};
    if (s.plan->from == EXPORT_COPIED) return true; /* when it is its turn */
    piece->bytes = aq_calloc(piece_bytes(x, &s), 1);
    if (!room(x, t) || !piece->bytes) {
        aq_fail_memory(&piece->error, n * sizeof(float), "a slab of weights");
        return false;
    }
    if (read_values(x, &s, t, &piece->error) != AQ_OK) return false;
    if (s.plan->from == EXPORT_RECODED) {
        if (!x->target->make(x, &s, t, piece)) return false;
    } else {
        piece->n_infinite = aq_f32_to_elements(t->reference, n, s.plan->dtype, piece->bytes);
        if (!x->target->recodes || !s.t.stored->quantized) return true;
        read_back(piece->bytes, n, s.plan->dtype, t->result);
    }
    aq_quant_metrics_compute(t->reference, t->result, n, &piece->added);
    if (!s.plan->use_source) return true;
    aq_quant_metrics_compute(t->source, t->result, n, &piece->written);
    aq_quant_metrics_compute(t->source, t->reference, n, &piece->before);
    return true;
}

static aq_status write_copied(exporting *x, const export_slab *s, aq_error *err) {
    uint64_t at = x->outs[s->plan->first_out].offset;
    for (size_t piece = 0;; piece++) {
        const void *data;
        uint64_t size;
        aq_status status = aq_source_raw(&x->source, s->tensor, piece, &data, &size, err);
        if (status != AQ_OK || size == 0) return status;
        if ((status = aq_outfile_write(x->file, at, data, size, err)) != AQ_OK) return status;
        at += size;
    }
}

static aq_status write_piece(exporting *x, const export_slab *s, const export_piece *piece, aq_error *err) {
    const uint8_t *bytes = piece->bytes;
    for (size_t i = s->plan->first_out; i < s->plan->first_out + s->plan->n_outs; i++) {
        const export_out *out = &x->outs[i];
        aq_status status = aq_outfile_write(x->file, out->offset + s->row * out->row_bytes, bytes, slab_bytes(s, out), err);
        if (status != AQ_OK) return status;
        bytes += slab_bytes(s, out);
    }
    return AQ_OK;
}

/* The source's own bias, where most of its layer was coded from the source. */
static aq_status restore_bias(exporting *x, const export_slab *s, export_piece *piece, aq_error *err) {
    const export_plan *layer = s->plan->layer ? &x->plans[s->plan->layer - 1] : NULL;
    if (!layer || layer->from != EXPORT_RECODED || !layer->use_source || 2 * layer->n_taken > layer->n_units) return AQ_OK;
    uint64_t n = s->n_rows * s->t.cols;
    float *values = aq_alloc(n * sizeof *values);
    aq_status status = values ? AQ_OK : aq_fail_memory(err, n * sizeof *values, "a bias");
    if (status == AQ_OK) status = aq_source_read_f32(&x->original, (size_t)aq_source_find(&x->original, s->t.name), s->row, s->n_rows, values, err);
    if (status == AQ_OK) aq_f32_to_elements(values, n, s->plan->dtype, piece->bytes);
    aq_free(values);
    return status;
}

static bool commit_slab(void *context, size_t item) {
    exporting *x = context;
    export_slab s = slab_at(x, item);
    export_piece *piece = &x->pieces[item % AQ_ORDERED_WINDOW];
    export_plan *plan = &x->plans[s.tensor];
    bool copied = plan->from == EXPORT_COPIED;
    aq_status status = aq_export_files_reach(x, s.tensor, &piece->error);
    if (status == AQ_OK) status = restore_bias(x, &s, piece, &piece->error);
    if (status == AQ_OK) status = copied ? write_copied(x, &s, &piece->error) : write_piece(x, &s, piece, &piece->error);
    aq_free(piece->bytes);
    piece->bytes = NULL;
    if (status != AQ_OK) return false;
    x->bytes_done += copied ? x->outs[plan->first_out].size_bytes : piece_bytes(x, &s);
    x->n_infinite += piece->n_infinite;
    x->n_shifted += piece->n_shifted;
    plan->n_units += piece->n_units;
    plan->n_taken += piece->n_taken;
    aq_quant_metrics_add(&plan->added, &piece->added);
    aq_quant_metrics_add(&plan->written, &piece->written);
    aq_quant_metrics_add(&plan->before, &piece->before);
    if (item + 1 < x->slabs.first[s.tensor + 1]) return true;
    aq_source_release(&x->source, s.tensor);
    x->n_done++;
    double fraction = x->job.bytes_total ? (double)x->bytes_done / (double)x->job.bytes_total : 1;
    aq_job_tell(&x->job, "export", s.t.name, NULL, x->n_done, x->bytes_done, 0.98 * fraction);
    return true;
}

bool aq_export_tick(void *context) {
    exporting *x = context;
    return aq_job_tell(&x->job, "export", NULL, NULL, x->n_done, x->bytes_done, 0);
}

static aq_status run_slabs(exporting *x, aq_error *err) {
    aq_ordered work = {.n_items = (size_t)x->slabs.n_slabs,
                       .n_threads = x->n_threads,
                       .budget = IN_FLIGHT_BYTES,
                       .context = x,
                       .cost = slab_cost,
                       .part = do_slab,
                       .commit = commit_slab,
                       .tick = aq_export_tick};
    size_t failed;
    aq_ordered_result result = aq_ordered_run(&work, &failed);
    if (result == AQ_ORDERED_FAILED) {
        if (err) *err = x->pieces[failed % AQ_ORDERED_WINDOW].error;
        return x->pieces[failed % AQ_ORDERED_WINDOW].error.code;
    }
    return result == AQ_ORDERED_CANCELLED || x->job.cancelled ? aq_job_cancelled(err, "nothing was written") : AQ_OK;
}

aq_status aq_export_weights(exporting *x, const char *path, aq_error *err) {
    x->weights_path = path;
    aq_status status = aq_export_files_plan(x, err);
    if (status == AQ_OK) status = run_slabs(x, err);
    if (status == AQ_OK) status = aq_export_files_finish(x, err);
    aq_outfile_abort(x->file);
    x->file = NULL;
    x->weights_path = NULL;
    return status;
}

/* ---- checks before work ---- */

static const export_target *const targets[] = {&aq_export_safetensors, &aq_export_gguf, &aq_export_comfy, &aq_export_gptq};
enum { N_TARGETS = sizeof targets / sizeof targets[0] };

static aq_status check_target_name(exporting *x, aq_error *err) {
    const char *to = x->options->to ? x->options->to : "";
    char known[256] = "";
    for (size_t i = 0; i < N_TARGETS; i++) {
        if (strcmp(targets[i]->name, to) == 0) x->target = targets[i];
        size_t at = strlen(known);
        snprintf(known + at, sizeof known - at, "%s'%s'", i == 0 ? "" : i + 1 < N_TARGETS ? ", " : " or ", targets[i]->name);
    }
    return x->target ? AQ_OK : aq_fail(err, AQ_ERR_USAGE, "unknown export format '%s'. Must be %s", to, known);
}

static aq_status check_words(exporting *x, aq_error *err) {
    static const char *const words[][2] = {{"f32", "F32"}, {"f16", "F16"}, {"bf16", "BF16"}};
    const aq_export_options *o = x->options;
    x->dtype = AQ_DTYPE_OTHER;
    for (size_t i = 0; o->dtype && i < 3; i++)
        if (strcmp(o->dtype, words[i][0]) == 0) x->dtype = aq_dtype_from_name(words[i][1]);
    if (o->dtype && x->dtype == AQ_DTYPE_OTHER) return aq_fail(err, AQ_ERR_USAGE, "unknown element type '%s'. Must be 'f32', 'f16', or 'bf16'", o->dtype);
    if (o->type && x->target != &aq_export_gguf) return aq_fail(err, AQ_ERR_USAGE, "a type is for GGUF files only, not for %s", x->target->name);
    if (o->source && !x->target->recodes) return aq_fail(err, AQ_ERR_USAGE, "the source weights are of no use for %s, which dequantizes", x->target->name);
    if (o->rotate && x->target != &aq_export_comfy) return aq_fail(err, AQ_ERR_USAGE, "rotation is for comfy-int8 only, not for %s", x->target->name);
    if (o->type && strcmp(o->type, "auto") != 0) {
        const aq_ggml_format *f = aq_ggml_format_named(o->type);
        if (!f || (f->type != AQ_GGML_F16 && !aq_ggml_can_encode(f)))
            return aq_fail(err, AQ_ERR_USAGE, "unknown GGUF type '%s'. Must be auto, q8_0, q4_0, q4_1, q4_k, q2_k or f16", o->type);
        x->format = f;
    }
    return AQ_OK;
}

/* Weights from --source without the adapters that the container holds would be another model. */
static aq_status check_adapters(const exporting *x, aq_error *err) {
    size_t n = json_array_size(json_object_get(json_object_get(x->metadata, "source"), "lora"));
    if (!x->options->source || n == 0 || (x->original.model && aq_model_n_adapters(x->original.model) == n)) return AQ_OK;
    aq_fail(err, AQ_ERR_USAGE, "the container holds %zu merged adapters, which --source lacks", n);
    aq_hint(err, "give the same --lora options that it was made with");
    return AQ_ERR_USAGE;
}

/* The original weights in the form that the container's folds give them. */
static aq_status check_folds(exporting *x, aq_error *err) {
    size_t n = json_array_size(json_object_get(x->metadata, "folds"));
    if (!x->options->source || n == 0) return AQ_OK;
    aq_status status = x->original.model ? aq_folds_open(&x->original.folds, x->source.store, x->original.model, err) : AQ_OK;
    bool complete = x->original.model;
    for (size_t i = 0; i < x->original.folds.n; i++) complete &= x->original.folds.items[i].scales != NULL;
    if (status != AQ_OK || complete) return status;
    aq_fail(err, AQ_ERR_USAGE, "the container has equalization folded into %zu operations, which --source cannot follow", n);
    aq_hint(err, "give the whole model that it was made of, not a container or a part");
    return AQ_ERR_USAGE;
}

static aq_status check_request(exporting *x, aq_error *err) {
    aq_status status = check_target_name(x, err);
    if (status == AQ_OK) status = check_words(x, err);
    if (status != AQ_OK) return status;
    if (!x->out_path || !x->out_path[0]) return aq_fail(err, AQ_ERR_USAGE, "the output path is empty");
    x->single_file = x->target->file && aq_text_ends_with(x->out_path, x->target->suffix);
    if (!x->single_file && !x->target->folder) {
        aq_fail_at(err, AQ_ERR_USAGE, x->out_path, NULL, "%s is one file, whose name must end in %s", x->target->name, x->target->suffix);
        return AQ_ERR_USAGE;
    }
    return AQ_OK;
}

/* Only a model folder like the one that is written is ever replaced: a wrong path must not cost a home folder. */
static bool may_replace(const exporting *x) {
    char relative[512];
    aq_export_weights_path(x, relative);
    char *weights = aq_path_join(x->out_path, relative);
    char *index = weights ? aq_export_index_path(weights) : NULL;
    bool same_kind = (weights && aq_path_is_file(weights)) || (index && aq_path_is_file(index));
    aq_free(weights);
    aq_free(index);
    aq_names names = {0};
    bool empty = !same_kind && aq_list_dir(&names, x->out_path, 1000000, NULL) == AQ_OK && names.n_names == 0;
    aq_names_free(&names);
    return same_kind || empty;
}

static aq_status check_target(const exporting *x, aq_error *err) {
    if (aq_path_same(x->out_path, aq_source_path(&x->source))) {
        aq_fail_at(err, AQ_ERR_USAGE, x->out_path, NULL, "the output is the container itself");
        return AQ_ERR_USAGE;
    }
    for (size_t i = 0; i < aq_store_n_files(x->source.store); i++)
        if (aq_path_same(x->out_path, aq_store_file(x->source.store, i)))
            return aq_fail_at(err, AQ_ERR_USAGE, x->out_path, NULL, "the output is a file of the container");
    if (aq_path_is_inside(x->out_path, aq_source_path(&x->source)))
        return aq_fail_at(err, AQ_ERR_USAGE, x->out_path, NULL, "the output lies inside the container");
    if (aq_path_is_dir(x->out_path) && aq_path_is_inside(aq_source_path(&x->source), x->out_path))
        return aq_fail_at(err, AQ_ERR_USAGE, x->out_path, NULL, "the output is a folder that holds the container");
    if (aq_path_exists(x->out_path)) {
        if (!x->options->overwrite) {
            aq_fail_at(err, AQ_ERR_IO, x->out_path, NULL, "exists already");
            if (err) err->os_errno = EEXIST;
            aq_hint(err, "--overwrite replaces it when the new one is complete");
            return AQ_ERR_IO;
        }
        if (x->single_file == aq_path_is_dir(x->out_path))
            return aq_fail_at(err, AQ_ERR_IO, x->out_path, NULL,
                              x->single_file ? "is a folder, and a file would replace it" : "is a file, and a folder would replace it");
        if (!x->single_file && !may_replace(x)) {
            aq_fail_at(err, AQ_ERR_IO, x->out_path, NULL, "is not an exported model like this one and is not replaced");
            aq_hint(err, "choose another output, or remove it yourself");
            return AQ_ERR_IO;
        }
    }
    char *parent = aq_path_dirname(x->out_path);
    if (!parent) return aq_fail_memory(err, strlen(x->out_path), "a path");
    aq_status status = AQ_OK;
    if (!aq_path_is_dir(parent)) {
        status = x->options->make_parents ? aq_make_dirs(parent, err) : aq_fail_at(err, AQ_ERR_IO, parent, NULL, "the folder for the output does not exist");
        if (!x->options->make_parents) {
            if (err) err->os_errno = ENOENT;
            aq_hint(err, "--mkdir creates it");
        }
    }
    aq_free(parent);
    return status;
}

/* ---- report ---- */

/* How the values of a recoded tensor came about. */
static const char *how(const export_plan *p) {
    return p->from == EXPORT_CONVERTED || p->from == EXPORT_COPIED ? "converted"
           : p->n_taken == p->n_units                              ? "codes"
           : p->use_source                                         ? "source"
                                                                   : "dequantized";
}

static json_t *tensor_report(const exporting *x, size_t i) {
    const export_plan *p = &x->plans[i];
    const export_out *out = &x->outs[p->first_out];
    aq_source_tensor t;
    aq_source_tensor_at(&x->source, i, &t);
    json_t *entry = json_pack("{s:o, s:s, s:s, s:s, s:o, s:o, s:o}", "name", aq_report_text(t.name), "stored_as", t.stored_as, "type",
                              p->format ? p->format->name : out->dtype, "from", how(p), "codes_kept",
                              p->n_units ? aq_report_real((double)p->n_taken / (double)p->n_units) : json_null(), "added_sqnr_db",
                              aq_report_real(aq_quant_metrics_sqnr_db(&p->added)), "refused", aq_report_text(p->refused));
    if (p->use_source)
        json_object_update_new(entry, json_pack("{s:o, s:o}", "sqnr_db", aq_report_real(aq_quant_metrics_sqnr_db(&p->written)), "container_sqnr_db",
                                                aq_report_real(aq_quant_metrics_sqnr_db(&p->before))));
    return entry;
}

static json_t *sqnr_or_null(const exporting *x, const aq_quant_metrics *m) {
    return x->options->source ? aq_report_real(aq_quant_metrics_sqnr_db(m)) : json_null();
}

/* Sums over the recoded tensors, and what must not go unsaid. */
static json_t *recoding_report(exporting *x) {
    aq_quant_metrics added = {0}, written = {0}, before = {0};
    json_t *tensors = json_array();
    size_t n_timed = 0, n_codes = 0, n_source = 0, n_dequantized = 0, n_refused = 0, worst = SIZE_MAX;
    double worst_db = (double)INFINITY;
    for (size_t i = 0; tensors && i < x->source.n_tensors; i++) {
        const export_plan *p = &x->plans[i];
        aq_source_tensor t;
        aq_source_tensor_at(&x->source, i, &t);
        if (!t.stored->quantized) continue;
        json_array_append_new(tensors, tensor_report(x, i));
        aq_quant_metrics_add(&added, &p->added);
        aq_quant_metrics_add(&written, &p->written);
        aq_quant_metrics_add(&before, &p->before);
        n_timed += t.stored->n_time_groups > 0;
        const char *word = how(p);
        n_codes += strcmp(word, "codes") == 0;
        n_source += strcmp(word, "source") == 0;
        n_refused += p->refused != NULL;
        if (strcmp(word, "dequantized") != 0) continue;
        n_dequantized++;
        if (aq_quant_metrics_sqnr_db(&p->added) < worst_db) worst_db = aq_quant_metrics_sqnr_db(&p->added), worst = i;
    }
    if (n_dequantized > 0 && worst < SIZE_MAX) {
        char all[32], least[32], name[256];
        aq_source_tensor t;
        aq_source_tensor_at(&x->source, worst, &t);
        aq_sentences_add(&x->warnings,
                         "%zu layers do not fit the grid of the target and were coded again from the dequantized weights: added error %s dB below the "
                         "weights (all layers), %s dB in the worst, %s; with --source they are coded from the original weights",
                         n_dequantized, aq_text_fixed(all, aq_quant_metrics_sqnr_db(&added), 1), aq_text_fixed(least, worst_db, 1),
                         aq_escape(name, sizeof name, t.name, strlen(t.name)));
    }
    if (n_timed > 0)
        aq_sentences_add(&x->warnings, "%zu layers hold scales of their inputs by time groups, for which %s files have no place: inputs stay as they are there",
                         n_timed, x->target->name);
    return json_pack("{s:i, s:i, s:i, s:i, s:o, s:o, s:o, s:o}", "n_codes", (int)n_codes, "n_source", (int)n_source, "n_dequantized", (int)n_dequantized,
                     "n_refused", (int)n_refused, "added_sqnr_db", aq_report_real(aq_quant_metrics_sqnr_db(&added)), "sqnr_db", sqnr_or_null(x, &written),
                     "container_sqnr_db", sqnr_or_null(x, &before), "tensors", tensors);
}

static aq_status give_report(exporting *x, char **report_json, aq_error *err) {
    size_t n_converted = 0;
    for (size_t i = 0; i < x->source.n_tensors; i++) n_converted += x->plans[i].from == EXPORT_CONVERTED;
    if (x->n_infinite > 0)
        aq_sentences_add(&x->warnings, "%llu values are too large for %s and became infinite; --dtype=f32 holds them", (unsigned long long)x->n_infinite,
                         x->dtype == AQ_DTYPE_OTHER ? "their type" : aq_dtype_name(x->dtype));
    json_t *recoding = x->target->recodes ? recoding_report(x) : json_null();
    for (size_t i = 0; i < x->warnings.n_items; i++) aq_job_log(&x->job, AQ_LOG_WARNING, "%s", x->warnings.items[i]);
    json_t *report = json_pack("{s:s, s:o, s:s, s:o, s:o, s:{s:o, s:I, s:o}, s:I, s:I, s:o, s:o, s:{s:o}}", "schema", "arrowquant.export/1", "path",
                               aq_report_text(aq_source_path(&x->source)), "to", x->target->name, "dtype",
                               aq_report_text(x->dtype == AQ_DTYPE_OTHER ? NULL : aq_dtype_name(x->dtype)), "source", aq_report_text(x->options->source),
                               "output", "path", aq_report_text(x->out_path), "size_bytes", (json_int_t)x->job.bytes_total, "files",
                               aq_sentences_json(&x->files), "n_tensors", (json_int_t)x->source.n_tensors, "n_dequantized", (json_int_t)n_converted, "recoding",
                               recoding, "warnings", aq_sentences_json(&x->warnings), "time", "elapsed_s", aq_report_real(aq_now_s() - x->job.start_s));
    return aq_report_finish(report, report_json, err);
}

static void clean_up(exporting *x) {
    for (size_t i = 0; i < AQ_ORDERED_WINDOW; i++) aq_free(x->pieces[i].bytes);
    for (size_t i = 0; i < EXPORT_MAX_THREADS; i++) {
        aq_free(x->scratch[i].reference);
        aq_free(x->scratch[i].result);
        aq_free(x->scratch[i].source);
        aq_ggml_encoder_free(x->scratch[i].encoder);
    }
    for (size_t i = 0; i < x->n_outs; i++) {
        aq_free(x->outs[i].name);
        aq_free(x->outs[i].blob);
    }
    aq_slabs_free(&x->slabs);
    aq_free(x->outs);
    aq_free(x->shards);
    aq_free(x->plans);
    aq_sentences_free(&x->warnings);
    aq_sentences_free(&x->files);
    json_decref(x->metadata);
    aq_source_close(&x->source);
    aq_source_close(&x->original);
    aq_free(x);
}

aq_status aq_export(const char *path, const char *out_path, const aq_export_options *options, const aq_job_hooks *hooks, char **report_json, aq_error *err) {
    if (report_json) *report_json = NULL;
    aq_error_clear(err);
    exporting *x = aq_calloc(1, sizeof *x);
    if (!x) return aq_fail_memory(err, sizeof *x, "the export");
    x->options = options;
    x->out_path = out_path;
    x->n_threads = options->n_threads;
    aq_job_init(&x->job, hooks, 0, 0);
    aq_status status = check_request(x, err);
    if (status == AQ_OK) status = aq_source_open(&x->source, path, NULL, err);
    if (status == AQ_OK && !x->source.store) status = aq_fail_at(err, AQ_ERR_FORMAT, path, NULL, "is a source model, not a container that ArrowQuant wrote");
    if (status == AQ_OK && options->source) status = aq_source_open(&x->original, options->source, options->model, err);
    if (status == AQ_OK) x->metadata = aq_report_parsed(aq_store_metadata_json(x->source.store));
    if (status == AQ_OK) status = check_adapters(x, err);
    if (status == AQ_OK) status = check_folds(x, err);
    if (status == AQ_OK) status = check_target(x, err);
    if (status == AQ_OK) status = plan_all(x, err);
    if (status == AQ_OK) status = x->single_file ? aq_export_weights(x, out_path, err) : aq_export_folder(x, err);
    if (status == AQ_OK) {
        if (x->single_file) aq_sentences_add(&x->files, "%s", out_path);
        status = give_report(x, report_json, err);
    }
    if (status == AQ_OK) aq_job_tell(&x->job, "done", NULL, NULL, x->n_done, x->bytes_done, 1);
    clean_up(x);
    return status;
}
