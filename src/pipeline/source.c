/* Reading models and containers by one mechanism (see source.h). */
#include "pipeline/source.h"

#include <string.h>

#include "base/error.h"
#include "base/half.h"
#include "base/mem.h"
#include "base/size.h"

static aq_status list_tensors(aq_source *s, aq_error *err) {
    size_t n = aq_model_n_tensors(s->model);
    if (!(s->indexes = aq_calloc(n, sizeof *s->indexes))) return aq_fail_memory(err, n * sizeof *s->indexes, "the tensor list");
    for (size_t i = 0; i < n; i++)
        if (aq_model_tensor(s->model, i)->role != AQ_ROLE_SCALE) s->indexes[s->n_tensors++] = i;
    return AQ_OK;
}

aq_status aq_source_open(aq_source *out, const char *path, const aq_model_options *options, aq_error *err) {
    *out = (aq_source){0};
    aq_status status;
    if (aq_store_is_container(path)) {
        status = aq_store_open(&out->store, path, err);
        if (status == AQ_OK) out->n_tensors = aq_store_n_tensors(out->store);
    } else {
        status = aq_model_open(&out->model, path, options, err);
        if (status == AQ_OK) status = list_tensors(out, err);
    }
    if (status != AQ_OK) aq_source_close(out);
    return status;
}

aq_status aq_source_open_model(aq_model **out, const char *path, const aq_model_options *options, aq_error *err) {
    return path && aq_store_is_container(path) ? aq_store_open_model(out, path, options, err) : aq_model_open(out, path, options, err);
}

aq_status aq_component_check(const aq_model *model, const char *path, const aq_model_options *options, aq_error *err) {
    if (!options || !options->component || (model && aq_model_component(model)[0])) return AQ_OK;
    aq_fail_at(err, AQ_ERR_USAGE, path, NULL, "--component needs a diffusers folder, and this is %s", model ? "none" : "a container");
    aq_hint(err, "leave --component out, or give the folder that holds model_index.json");
    return AQ_ERR_USAGE;
}

aq_status aq_source_align_folds(aq_source *model, aq_source *container, aq_error *err) {
    if (container->store) container->unfolds = true;
    if (!model->model || !container->store) return AQ_OK;
    aq_folds_free(&model->folds);
    return aq_folds_open(&model->folds, container->store, model->model, err);
}

void aq_source_close(aq_source *source) {
    aq_folds_free(&source->folds);
    if (source->model) aq_model_close(source->model);
    if (source->store) aq_store_close(source->store);
    aq_free(source->indexes);
    *source = (aq_source){0};
}

void aq_source_tensor_at(const aq_source *source, size_t index, aq_source_tensor *out) {
    *out = (aq_source_tensor){0};
    if (source->model) {
        const aq_tensor_info *t = aq_model_tensor(source->model, source->indexes[index]);
        out->info = t;
        out->name = t->name;
        out->dtype = out->stored_as = t->dtype_name;
        out->shape = t->shape;
        out->count = t->count;
        out->stored_bytes = t->size_bytes;
        out->is_float = aq_dtype_is_float(t->dtype);
        aq_shape_matrix(&t->shape, &out->rows, &out->cols);
    } else {
        const aq_store_tensor *t = aq_store_tensor_at(source->store, index);
        out->stored = t;
        out->name = t->name;
        out->dtype = t->dtype;
        out->stored_as = t->quant_type;
        out->shape = t->shape;
        out->count = t->num_params;
        out->stored_bytes = t->stored_bytes;
        out->is_float = t->quantized || aq_dtype_is_float(t->raw_dtype);
        out->rows = t->rows;
        out->cols = t->cols;
    }
}

int64_t aq_source_find(const aq_source *source, const char *name) {
    if (source->store) return aq_store_find(source->store, name);
    int64_t at = aq_model_find(source->model, name);
    if (at < 0 || aq_model_tensor(source->model, (size_t)at)->role == AQ_ROLE_SCALE) return -1;
    /* indexes[] rises: the wanted position is at most `at`. */
    size_t low = 0, high = source->n_tensors;
    while (low < high) {
        size_t middle = low + (high - low) / 2;
        if (source->indexes[middle] < (size_t)at)
            low = middle + 1;
        else
            high = middle;
    }
    return (int64_t)low;
}

aq_status aq_source_read_f32(const aq_source *source, size_t index, uint64_t row_begin, uint64_t n_rows, float *out, aq_error *err) {
    uint64_t rows, cols;
    if (source->store) {
        const aq_store_tensor *t = aq_store_tensor_at(source->store, index);
        aq_status status = aq_store_read_f32(source->store, index, row_begin, n_rows, out, err);
        if (status == AQ_OK && source->unfolds && t->equalization_folded) aq_scale_columns(out, n_rows, t->cols, t->equalization_scales, false);
        return status;
    }
    aq_shape_matrix(&aq_model_tensor(source->model, source->indexes[index])->shape, &rows, &cols);
    return aq_folds_read(&source->folds, source->model, source->indexes[index], row_begin * cols, n_rows * cols, out, err);
}

aq_status aq_source_raw(const aq_source *source, size_t index, size_t piece, const void **data, uint64_t *size_bytes, aq_error *err) {
    *data = NULL;
    *size_bytes = 0;
    if (source->model) {
        if (piece > 0) return AQ_OK;
        *data = aq_model_data(source->model, source->indexes[index]);
        *size_bytes = aq_model_tensor(source->model, source->indexes[index])->size_bytes;
        return AQ_OK;
    }
    if (piece >= aq_store_tensor_at(source->store, index)->n_parts) return AQ_OK;
    aq_store_record record;
    aq_status status = aq_store_part(source->store, index, piece, &record, err);
    if (status != AQ_OK) return status;
    *data = record.data;
    *size_bytes = record.data_bytes;
    return AQ_OK;
}

void aq_source_release(const aq_source *source, size_t index) {
    if (source->model) aq_model_release(source->model, source->indexes[index]);
    if (source->store) aq_store_release(source->store, index);
}

uint64_t aq_source_size_bytes(const aq_source *source) { return source->store ? aq_store_size_bytes(source->store) : aq_model_total_bytes(source->model); }

const char *aq_source_path(const aq_source *source) { return source->store ? aq_store_path(source->store) : aq_model_path(source->model); }

static bool is_infinite(float x) { return (aq_f32_bits(x) & 0x7FFFFFFF) == 0x7F800000; }

uint64_t aq_f32_to_elements(const float *from, uint64_t n, aq_dtype dtype, void *to) {
    uint64_t lost = 0;
    if (dtype == AQ_F32) {
        memcpy(to, from, (size_t)n * 4);
    } else if (dtype == AQ_F64) {
        for (uint64_t i = 0; i < n; i++) ((double *)to)[i] = (double)from[i];
    } else if (dtype == AQ_BF16) {
        for (uint64_t i = 0; i < n; i++) {
            uint16_t h = ((uint16_t *)to)[i] = aq_f32_to_bf16(from[i]);
            lost += (h & 0x7FFF) == 0x7F80 && !is_infinite(from[i]);
        }
    } else {
        for (uint64_t i = 0; i < n; i++) {
            uint16_t h = ((uint16_t *)to)[i] = aq_f32_to_f16(from[i]);
            lost += (h & 0x7FFF) == 0x7C00 && !is_infinite(from[i]);
        }
    }
    return lost;
}

uint64_t aq_slab_rows(uint64_t rows, uint64_t cols, uint64_t unit) {
    if (unit == 0 || cols == 0) return rows ? rows : 1;
    uint64_t n = AQ_SLAB_VALUES / cols / unit * unit;
    return n ? n : unit;
}

aq_status aq_slabs_init(aq_slabs *out, size_t n_tensors, void (*shape)(void *user, size_t tensor, uint64_t *rows, uint64_t *cols), void *user, aq_error *err) {
    *out = (aq_slabs){.n_tensors = n_tensors};
    if (!(out->first = aq_calloc((uint64_t)n_tensors + 1, sizeof *out->first))) return aq_fail_memory(err, n_tensors * sizeof *out->first, "the work list");
    for (size_t i = 0; i < n_tensors; i++) {
        uint64_t rows, cols, values;
        shape(user, i, &rows, &cols);
        uint64_t slab = aq_slab_rows(rows, cols, 1);
        if (slab > rows) slab = rows;
        out->first[i] = out->n_slabs;
        if (rows == 0 || cols == 0) continue;
        if (!aq_mul(slab, cols, &values)) return aq_fail(err, AQ_ERR_FORMAT, "a row of %llu values is too long", (unsigned long long)cols);
        if (values > out->max_values) out->max_values = values;
        out->n_slabs += aq_div_up(rows, slab);
    }
    out->first[n_tensors] = out->n_slabs;
    return AQ_OK;
}

void aq_slabs_free(aq_slabs *slabs) {
    aq_free(slabs->first);
    *slabs = (aq_slabs){0};
}

size_t aq_slabs_tensor(const aq_slabs *slabs, uint64_t slab) {
    size_t low = 0, high = slabs->n_tensors; /* the last tensor whose first slab is <= slab */
    while (high - low > 1) {
        size_t middle = low + (high - low) / 2;
        if (slabs->first[middle] <= slab)
            low = middle;
        else
            high = middle;
    }
    return low;
}
