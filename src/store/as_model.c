/* A container as a source model (aq_store_open_model): what quantize and plan do with a Parquet model folder.
 *
 * Element types that F32 holds are read as F32 whatever their parts; others must lie in one piece, which is checked at open. An equalization that was folded
 * into the operation before stays there: the tensors as stored are a model of their own.
 */
#include "store/store_internal.h"

#include <jansson.h>
#include <string.h>

#include "base/json.h"
#include "base/mem.h"

typedef struct {
    aq_store *store;
    json_t *source; /* of metadata.json: what the container was made from; NULL when unknown */
} opened;

static bool is_f32_exact(aq_dtype dtype) { return aq_dtype_is_float(dtype) && dtype != AQ_F64; }

static aq_status describe(void *user, size_t index, aq_tensor_info *out, aq_error *err) {
    const opened *o = user;
    const aq_store_tensor *t = aq_store_tensor_at(o->store, index);
    bool computed = t->quantized || is_f32_exact(t->raw_dtype);
    *out = (aq_tensor_info){.name = t->name,
                            .dtype_name = t->quantized ? aq_dtype_name(AQ_F32) : t->dtype,
                            .dtype = t->quantized ? AQ_F32 : t->raw_dtype,
                            .shape = t->shape,
                            .count = t->num_params,
                            .size_bytes = t->quantized ? t->stored_bytes : t->num_params * aq_dtype_size(t->raw_dtype),
                            .file_index = (uint32_t)t->file_index,
                            .scale_index = -1,
                            .adapter_index = -1,
                            .is_computed = computed};
    if (computed) return AQ_OK;
    aq_store_record whole;
    if (t->n_parts != 1)
        return aq_fail_at(err, AQ_ERR_FORMAT, aq_store_path(o->store), t->name, "is of type %s in %zu row groups: a source has it in one", t->dtype,
                          t->n_parts);
    aq_status status = aq_store_part(o->store, index, 0, &whole, err);
    if (status == AQ_OK) out->size_bytes = whole.data_bytes;
    return status;
}

/* Whole rows go straight to their place; the ends of a range that begins or ends within a row, through one row of memory. */
static aq_status read_f32(void *user, size_t index, uint64_t begin, uint64_t count, float *out, aq_error *err) {
    const opened *o = user;
    uint64_t cols = aq_store_tensor_at(o->store, index)->cols, end = begin + count;
    float *row = NULL;
    aq_status status = AQ_OK;
    for (uint64_t at = begin; at < end && status == AQ_OK;) {
        uint64_t first = at / cols, skip = at % cols, rows = (end - at) / cols, n = cols - skip;
        if (skip == 0 && rows > 0) {
            n = rows * cols;
            status = aq_store_read_f32(o->store, index, first, rows, out + (at - begin), err);
        } else {
            if (n > end - at) n = end - at;
            if (!row && !(row = aq_alloc(cols * sizeof *row))) return aq_fail_memory(err, cols * sizeof *row, "a row");
            status = aq_store_read_f32(o->store, index, first, 1, row, err);
            if (status == AQ_OK) memcpy(out + (at - begin), row + skip, (size_t)n * sizeof *row);
        }
        at += n;
    }
    aq_free(row);
    return status;
}

static const void *data_of(void *user, size_t index) {
    aq_store_record whole;
    aq_error err;
    return aq_store_part(((opened *)user)->store, index, 0, &whole, &err) == AQ_OK ? whole.data : NULL; /* it was checked at open */
}

static void release(void *user, size_t index) { aq_store_release(((opened *)user)->store, index); }
static const char *file(void *user, size_t index) { return aq_store_file(((opened *)user)->store, index); }
static const char *side_file(void *user, size_t index, const char **absolute) { return aq_store_side_file(((opened *)user)->store, index, absolute); }

static void close_opened(void *user) {
    opened *o = user;
    aq_store_close(o->store);
    json_decref(o->source);
    aq_free(o);
}

/* A plain word of metadata.json's "source", "" when it has none: a folder's name becomes part of a path. */
static const char *word(const opened *o, const char *key) {
    const char *text = json_string_value(json_object_get(o->source, key));
    return text && !strchr(text, '/') && !strchr(text, '\\') && strcmp(text, "..") != 0 && strcmp(text, ".") != 0 ? text : "";
}

static void read_source(opened *o) {
    const char *text = aq_store_metadata_json(o->store);
    json_t *metadata = *text ? json_loads(text, JSON_REJECT_DUPLICATES, NULL) : NULL; /* it was parsed and checked at open */
    json_t *source = json_object_get(metadata, "source");
    if (json_is_object(source)) o->source = json_incref(source);
    json_decref(metadata);
}

static size_t count_quantized(const aq_store *store) {
    size_t n = 0;
    for (size_t i = 0; i < aq_store_n_tensors(store); i++) n += aq_store_tensor_at(store, i)->quantized;
    return n;
}

aq_status aq_store_open_model(aq_model **out, const char *path, const aq_model_options *options, aq_error *err) {
    *out = NULL;
    opened *o = aq_calloc(1, sizeof *o);
    if (!o) return aq_fail_memory(err, sizeof *o, "the container");
    aq_status status = aq_store_open(&o->store, path, err);
    if (status != AQ_OK) {
        aq_free(o);
        return status;
    }
    read_source(o);
    aq_model_source source = {.user = o,
                              .format = "parquet",
                              .weights_folder = word(o, "weights_folder"),
                              .weights_name = word(o, "weights_name"),
                              .component = word(o, "component"),
                              .class_name = word(o, "class"),
                              .modality = aq_store_modality(o->store),
                              .n_tensors = aq_store_n_tensors(o->store),
                              .n_files = aq_store_n_files(o->store),
                              .n_side_files = aq_store_n_side_files(o->store),
                              .n_coded = count_quantized(o->store),
                              .tensor = describe,
                              .read_f32 = read_f32,
                              .data = data_of,
                              .release = release,
                              .file = file,
                              .side_file = side_file,
                              .close = close_opened};
    return aq_model_open_from(out, path, &source, options, err);
}
