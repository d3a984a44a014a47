/* Reading one tensor of an open container: its parts, expanded parameters, and values as F32. */
#include "store/store_internal.h"

#include <arrowquant/solve.h>
#include <string.h>

#include "base/half.h"
#include "base/mem.h"
#include "store/extension.h"
#include "store/row.h"

static const aq_stored *at(const aq_store *s, size_t index, aq_error *err) {
    if (index < s->n_tensors) return &s->tensors[index];
    aq_fail_at(err, AQ_ERR_USAGE, s->path, NULL, "there is no tensor %zu, it has %zu", index, s->n_tensors);
    return NULL;
}

/* The first use of a part compares its bytes with the hash stored beside them, so that damage never passes for weights; about 10 GB/s. */
static aq_status check_part(const aq_store *s, const aq_stored *t, aq_part *p, aq_error *err) {
    char hash[33];
    if (!p->hash[0] || atomic_load(&p->is_checked)) return AQ_OK;
    aq_store_record_hash(p->data, p->data_bytes, p->params, p->params_bytes, hash);
    if (!AQ_HASHES_IGNORED && strcmp(hash, p->hash) != 0) {
        aq_fail_at(err, AQ_ERR_FORMAT, s->files[p->file].path, t->info.name, "its bytes are damaged: their hash is %s, stored was %s", hash, p->hash);
        aq_hint(err, "copy the file again from where it came, or make it anew from the source model");
        return AQ_ERR_FORMAT;
    }
    atomic_store(&p->is_checked, true);
    return AQ_OK;
}

aq_status aq_store_part(const aq_store *s, size_t index, size_t part, aq_store_record *out, aq_error *err) {
    aq_error_clear(err);
    const aq_stored *t = at(s, index, err);
    if (!t) return AQ_ERR_USAGE;
    if (part >= t->info.n_parts) return aq_fail_at(err, AQ_ERR_USAGE, s->path, t->info.name, "there is no part %zu, it has %zu", part, t->info.n_parts);
    aq_part *p = &s->parts[t->first_part + part];
    aq_status status = check_part(s, t, p, err);
    if (status != AQ_OK) return status;
    *out = (aq_store_record){.name = t->info.name,
                             .dtype = t->info.dtype,
                             .quant_type = t->info.quant_type,
                             .shape = t->info.shape,
                             .quantized = t->info.quantized,
                             .spec = t->info.spec,
                             .row_begin = p->row_begin,
                             .row_count = p->row_count,
                             .data = p->data,
                             .data_bytes = p->data_bytes,
                             .params = p->params,
                             .params_bytes = p->params_bytes,
                             .quality = t->info.quality};
    aq_extension_of(&t->info, out);
    return AQ_OK;
}

void aq_store_release(const aq_store *s, size_t index) {
    if (index >= s->n_tensors) return;
    const aq_stored *t = &s->tensors[index];
    for (size_t i = 0; i < t->info.n_parts; i++) {
        const aq_part *p = &s->parts[t->first_part + i];
        const aq_file_map *map = &s->files[p->file].map;
        const uint8_t *data = p->data;
        if (data >= map->data && data < map->data + map->size) aq_file_map_release(map, (uint64_t)(data - map->data), p->data_bytes);
    }
}

aq_status aq_store_pairs(const aq_store *s, size_t index, float *scales, float *zero_points, aq_error *err) {
    aq_error_clear(err);
    const aq_stored *t = at(s, index, err);
    if (!t) return AQ_ERR_USAGE;
    if (!t->info.quantized) return aq_fail_at(err, AQ_ERR_USAGE, s->path, t->info.name, "is not quantized and has no scales");
    uint64_t done = 0;
    for (size_t i = 0; i < t->info.n_parts; i++) {
        aq_part *p = &s->parts[t->first_part + i];
        aq_quant_layout layout;
        aq_status status = check_part(s, t, p, err);
        if (status != AQ_OK) return status;
        status = aq_quant_layout_init(&layout, &t->info.spec, p->row_count, t->info.cols, err);
        if (status != AQ_OK) return status;
        aq_quant_pairs(&t->info.spec, &layout, p->params, scales + done, zero_points + done);
        done += layout.n_pairs;
    }
    return AQ_OK;
}

/* Raw elements to F32; F64 is rounded to nearest. */
static void convert(aq_dtype dtype, const uint8_t *p, uint64_t n, float *out) {
    for (uint64_t i = 0; i < n; i++) {
        uint16_t h;
        double d;
        switch (dtype) {
        case AQ_F64:
            memcpy(&d, p + 8 * i, 8);
            out[i] = (float)d;
            break;
        case AQ_F32: memcpy(&out[i], p + 4 * i, 4); break;
        case AQ_F16:
            memcpy(&h, p + 2 * i, 2);
            out[i] = aq_f16_to_f32(h);
            break;
        case AQ_BF16:
            memcpy(&h, p + 2 * i, 2);
            out[i] = aq_bf16_to_f32(h);
            break;
        case AQ_F8_E4M3: out[i] = aq_e4m3_to_f32(p[i]); break;
        default: out[i] = aq_e5m2_to_f32(p[i]); break;
        }
    }
}

/* Rows of dequantized codes to rows of W: (codes R) s, see aq_store_record. */
static void undo_spatial(const aq_store_tensor *t, uint64_t n_rows, float *rows) {
    if (t->hadamard_group) aq_hadamard(rows, n_rows, t->cols, t->hadamard_group);
    if (t->equalization_scales && !t->equalization_folded) aq_scale_columns(rows, n_rows, t->cols, t->equalization_scales, false);
}

aq_status aq_store_read_f32(const aq_store *s, size_t index, uint64_t row_begin, uint64_t n_rows, float *out, aq_error *err) {
    aq_error_clear(err);
    const aq_stored *t = at(s, index, err);
    if (!t) return AQ_ERR_USAGE;
    if (row_begin > t->info.rows || n_rows > t->info.rows - row_begin)
        return aq_fail_at(err, AQ_ERR_USAGE, s->path, t->info.name, "rows %llu + %llu are not within its %llu rows", (unsigned long long)row_begin,
                          (unsigned long long)n_rows, (unsigned long long)t->info.rows);
    if (!t->info.quantized && !aq_dtype_is_float(t->info.raw_dtype))
        return aq_fail_at(err, AQ_ERR_USAGE, s->path, t->info.name, "holds %s elements, which are not floating", t->info.dtype);
    /* In units of the parts: rows of codes, elements of raw data. */
    uint64_t scale = t->info.quantized ? 1 : t->info.cols, begin = row_begin * scale, end = begin + n_rows * scale;
    for (size_t i = 0; i < t->info.n_parts; i++) {
        aq_part *p = &s->parts[t->first_part + i];
        uint64_t from = begin > p->row_begin ? begin : p->row_begin, to = end < p->row_begin + p->row_count ? end : p->row_begin + p->row_count;
        if (from >= to) continue;
        aq_status status = check_part(s, t, p, err);
        if (status != AQ_OK) return status;
        if (t->info.quantized) {
            aq_quant_layout layout;
            status = aq_quant_layout_init(&layout, &t->info.spec, p->row_count, t->info.cols, err);
            if (status != AQ_OK) return status;
            float *rows = out + (from - begin) * t->info.cols;
            aq_dequantize(&t->info.spec, &layout, p->data, p->params, from - p->row_begin, to - from, rows);
            undo_spatial(&t->info, to - from, rows);
        } else {
            convert(t->info.raw_dtype, p->data + (from - p->row_begin) * aq_dtype_size(t->info.raw_dtype), to - from, out + (from - begin));
        }
    }
    return AQ_OK;
}
