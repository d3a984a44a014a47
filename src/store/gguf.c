/* The header of a GGUF file (see tensor_file.h; format: the GGUF specification, version 3).
 *
 * "GGUF", u32 version, u64 tensors, u64 key-values; each key-value a string (u64 length, bytes), u32 type, value; each tensor a string, u32 number of
 * dimensions, u64 dimensions from the innermost, u32 type, u64 offset from the start of the data; zeros up to the alignment; data, each tensor aligned. */
#include <string.h>

#include "base/error.h"
#include "base/mem.h"
#include "base/size.h"
#include "store/tensor_file.h"

enum { ALIGNMENT = 32, TYPE_UINT32 = 4, TYPE_INT32 = 5, TYPE_STRING = 8, TYPE_ARRAY = 9 };

/* Bytes in writing; with NULL data only their number is counted. */
typedef struct {
    uint8_t *data;
    uint64_t size;
} out_bytes;

static void put(out_bytes *o, const void *p, uint64_t n) {
    if (o->data) memcpy(o->data + o->size, p, (size_t)n);
    o->size += n;
}

static void put_u32(out_bytes *o, uint32_t x) {
    uint8_t b[4];
    for (int i = 0; i < 4; i++) b[i] = (uint8_t)(x >> 8 * i);
    put(o, b, 4);
}

static void put_u64(out_bytes *o, uint64_t x) {
    put_u32(o, (uint32_t)x);
    put_u32(o, (uint32_t)(x >> 32));
}

static void put_text(out_bytes *o, const char *text) {
    put_u64(o, strlen(text));
    put(o, text, strlen(text));
}

static void put_value(out_bytes *o, const aq_gguf_value *v) {
    put_text(o, v->key);
    if (v->text) {
        put_u32(o, TYPE_STRING);
        put_text(o, v->text);
    } else if (v->ints) {
        put_u32(o, TYPE_ARRAY);
        put_u32(o, TYPE_INT32);
        put_u64(o, v->ints->rank);
        for (uint32_t i = 0; i < v->ints->rank; i++) put_u32(o, (uint32_t)v->ints->dims[i]);
    } else {
        put_u32(o, TYPE_UINT32);
        put_u32(o, v->number);
    }
}

static void put_header(out_bytes *o, const aq_gguf_entry *entries, size_t n_entries, const aq_gguf_value *values, size_t n_values, uint64_t data_begin) {
    put(o, "GGUF", 4);
    put_u32(o, 3);
    put_u64(o, n_entries);
    put_u64(o, n_values);
    for (size_t i = 0; i < n_values; i++) put_value(o, &values[i]);
    for (size_t i = 0; i < n_entries; i++) {
        const aq_gguf_entry *e = &entries[i];
        put_text(o, e->name);
        put_u32(o, e->shape.rank);
        for (uint32_t d = e->shape.rank; d-- > 0;) put_u64(o, e->shape.dims[d]);
        put_u32(o, e->type);
        put_u64(o, e->offset - data_begin);
    }
}

aq_status aq_gguf_header_build(uint8_t **out, uint64_t *size, uint64_t *file_size, aq_gguf_entry *entries, size_t n_entries, const aq_gguf_value *values,
                               size_t n_values, aq_error *err) {
    out_bytes o = {0};
    *out = NULL;
    put_header(&o, entries, n_entries, values, n_values, 0);
    uint64_t at = (o.size + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT, begin = at;
    for (size_t i = 0; i < n_entries; i++) {
        entries[i].offset = at;
        if (!aq_add(at, entries[i].size_bytes, &at) || !aq_align(at, ALIGNMENT, &at) || at > INT64_MAX)
            return aq_fail_at(err, AQ_ERR_FORMAT, NULL, entries[i].name, "the file would not fit 63 bits");
    }
    if (!(o.data = aq_calloc(begin, 1))) return aq_fail_memory(err, begin, "a GGUF header");
    o.size = 0;
    put_header(&o, entries, n_entries, values, n_values, begin);
    *out = o.data;
    *size = begin;
    *file_size = at;
    return AQ_OK;
}
