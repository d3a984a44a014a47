/* A tensor's bytes, and its values as F32.
 *
 * Values are read in pieces that stay in the cache between pread and conversion; F32 goes straight to its place. fp8 goes through a table of its 256 values
 * and is multiplied by its scale, one number or one per row.
 */
#include <string.h>

#include "base/error.h"
#include "base/half.h"
#include "base/mem.h"
#include "kernels/kernels.h"
#include "model/internal.h"
#include "quant/ggml.h"

enum { PIECE_BYTES = 64 << 10 };

const void *aq_model_data(const aq_model *model, size_t index) {
    const aq_tensor_info *t = &model->tensors[index];
    if (model->source.tensor) return model->source.data(model->source.user, index);
    return model->files[t->file_index].map.data + t->offset;
}

void aq_model_release(const aq_model *model, size_t index) {
    const aq_tensor_info *t = &model->tensors[index];
    if (model->source.tensor)
        model->source.release(model->source.user, index);
    else
        aq_file_map_release(&model->files[t->file_index].map, t->offset, t->size_bytes);
}

static void convert_f64(const unsigned char *in, size_t n, float *out) {
    for (size_t i = 0; i < n; i++) {
        double x;
        memcpy(&x, in + 8 * i, 8);
        out[i] = (float)x;
    }
}

static void convert(aq_dtype dtype, const unsigned char *in, size_t n, const float *fp8, float *out) {
    if (dtype == AQ_F16)
        aq_kernels_get()->f16_to_f32((const uint16_t *)(const void *)in, out, n); /* `in` is a block of its own: aligned */
    else if (dtype == AQ_BF16)
        aq_kernels_get()->bf16_to_f32((const uint16_t *)(const void *)in, out, n);
    else if (dtype == AQ_F64)
        convert_f64(in, n, out);
    else
        for (size_t i = 0; i < n; i++) out[i] = fp8[in[i]];
}

static aq_status read_pieces(const aq_weights_file *file, const aq_tensor_info *t, uint64_t begin, uint64_t count, float *out, aq_error *err) {
    size_t size = aq_dtype_size(t->dtype), piece = PIECE_BYTES / size;
    float fp8[256];
    if (size == 1)
        for (int v = 0; v < 256; v++) fp8[v] = t->dtype == AQ_F8_E4M3 ? aq_e4m3_to_f32((uint8_t)v) : aq_e5m2_to_f32((uint8_t)v);
    unsigned char *raw = aq_alloc(PIECE_BYTES);
    if (!raw) return aq_fail_memory(err, PIECE_BYTES, "reading a tensor");
    aq_status status;
    int fd;
    if ((status = aq_weights_file_reopen(&fd, file, err)) == AQ_OK) {
        for (uint64_t at = 0; at < count && status == AQ_OK; at += piece) {
            size_t n = count - at < piece ? (size_t)(count - at) : piece;
            status = aq_file_pread(fd, raw, n * size, t->offset + (begin + at) * size, file->path, err);
            if (status == AQ_OK) convert(t->dtype, raw, n, fp8, out + at);
        }
        aq_weights_file_done(fd);
    }
    aq_free(raw);
    return status;
}

/* Elements of GGUF blocks: whole blocks are decoded, those at the ends in part. */
static aq_status read_blocks(const aq_weights_file *file, const aq_tensor_info *t, uint64_t begin, uint64_t count, float *out, aq_error *err) {
    const aq_ggml_format *f = aq_ggml_format_of(t->block_type);
    uint64_t per_piece = PIECE_BYTES / f->n_bytes, end = begin + count;
    unsigned char *raw = aq_alloc(PIECE_BYTES);
    if (!raw) return aq_fail_memory(err, PIECE_BYTES, "reading a tensor");
    int fd;
    aq_status status = aq_weights_file_reopen(&fd, file, err);
    for (uint64_t block = begin / f->n_values, last = (end + f->n_values - 1) / f->n_values; block < last && status == AQ_OK;) {
        uint64_t n = last - block < per_piece ? last - block : per_piece;
        status = aq_file_pread(fd, raw, n * f->n_bytes, t->offset + block * f->n_bytes, file->path, err);
        for (uint64_t i = 0; i < n && status == AQ_OK; i++, block++) {
            uint64_t at = block * f->n_values;
            float v[AQ_GGML_MAX_BLOCK];
            if (at >= begin && at + f->n_values <= end) {
                f->decode(raw + i * f->n_bytes, out + (at - begin));
                continue;
            }
            f->decode(raw + i * f->n_bytes, v);
            uint64_t from = at > begin ? at : begin, to = at + f->n_values < end ? at + f->n_values : end;
            memcpy(out + (from - begin), v + (from - at), (size_t)(to - from) * sizeof *v);
        }
    }
    if (fd >= 0) aq_weights_file_done(fd);
    aq_free(raw);
    return status;
}

/* Multiplies elements [begin, begin + count) by their scales. */
static aq_status apply_scale(const aq_model *model, const aq_tensor_info *t, uint64_t begin, uint64_t count, float *out, aq_error *err) {
    const aq_tensor_info *scale = &model->tensors[t->scale_index];
    uint64_t rows, cols;
    aq_shape_matrix(&t->shape, &rows, &cols);
    if (scale->count == 1) rows = 1, cols = t->count;
    uint64_t first = begin / cols, n = (begin + count - 1) / cols - first + 1;
    float *scales = aq_alloc(n * sizeof *scales);
    if (!scales) return aq_fail_memory(err, n * sizeof *scales, "the scales of an fp8 weight");
    aq_status status = aq_model_read_f32(model, (size_t)t->scale_index, first, n, scales, err);
    for (uint64_t i = 0; status == AQ_OK && i < count;) {
        uint64_t row = (begin + i) / cols, end = (row + 1) * cols - begin;
        for (end = end < count ? end : count; i < end; i++) out[i] *= scales[row - first];
    }
    aq_free(scales);
    return status;
}

aq_status aq_model_read_bytes(const aq_model *model, size_t index, uint64_t begin, uint64_t size, void *out, aq_error *err) {
    if (index >= model->n_tensors) return aq_fail(err, AQ_ERR_USAGE, "tensor %zu of %zu", index, model->n_tensors);
    const aq_tensor_info *t = &model->tensors[index];
    const aq_weights_file *file = &model->files[t->file_index];
    if (begin > t->size_bytes || size > t->size_bytes - begin)
        return aq_fail_at(err, AQ_ERR_USAGE, file->path, t->name, "bytes %llu + %llu of %llu", (unsigned long long)begin, (unsigned long long)size,
                          (unsigned long long)t->size_bytes);
    if (!model->source.tensor) return aq_weights_file_read(file, t->offset + begin, out, size, err);
    if (t->is_computed) return aq_fail_at(err, AQ_ERR_USAGE, file->path, t->name, "has no bytes of its own: its values are computed");
    memcpy(out, (const uint8_t *)model->source.data(model->source.user, index) + begin, (size_t)size);
    return AQ_OK;
}

aq_status aq_model_read_f32(const aq_model *model, size_t index, uint64_t begin, uint64_t count, float *out, aq_error *err) {
    if (index >= model->n_tensors) return aq_fail(err, AQ_ERR_USAGE, "tensor %zu of %zu", index, model->n_tensors);
    const aq_tensor_info *t = &model->tensors[index];
    const aq_weights_file *file = &model->files[t->file_index];
    if (!aq_dtype_is_float(t->dtype))
        return aq_fail_at(err, AQ_ERR_USAGE, file->path, t->name, "is of dtype %s, which has no F32 values", aq_dtype_name(t->dtype));
    if (begin > t->count || count > t->count - begin)
        return aq_fail_at(err, AQ_ERR_USAGE, file->path, t->name, "elements %llu + %llu of %llu", (unsigned long long)begin, (unsigned long long)count,
                          (unsigned long long)t->count);
    if (count == 0) return AQ_OK;
    aq_status status;
    if (model->source.tensor)
        status = model->source.read_f32(model->source.user, index, begin, count, out, err);
    else if (t->block_type != 0)
        status = read_blocks(file, t, begin, count, out, err);
    else if (t->dtype == AQ_F32)
        status = aq_weights_file_read(file, t->offset + begin * 4, out, count * 4, err);
    else
        status = read_pieces(file, t, begin, count, out, err);
    if (status == AQ_OK && t->scale_index >= 0) status = apply_scale(model, t, begin, count, out, err);
    return status == AQ_OK && t->adapter_index >= 0 ? aq_lora_apply(model, index, begin, count, out, err) : status;
}
