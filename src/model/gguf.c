/* The GGUF header (format: the GGUF specification; layout in store/gguf.c, which writes it).
 *
 * Read through a window, front to back, and never by a count from the file alone: a count must fit the bytes that are left before anything is done with it, and
 * values that are not wanted are stepped over. As strict as the reference C reader and more: tensors lie one after the other at aligned places, in the order of
 * the header, and the file ends with the last of them, so every byte is accounted for. Counts in the metadata (`block_count` and the like) size nothing.
 */
#include "model/gguf.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/error.h"
#include "base/file.h"
#include "base/mem.h"
#include "base/size.h"
#include "base/utf8.h"
#include "model/internal.h"
#include "quant/ggml.h"

enum { WINDOW = 64 << 10, MAX_KEY = 65535, MAX_DIMS = 4, MAX_KEYS = 65536, MAX_TOLD = 2, DEFAULT_ALIGNMENT = 32, MIN_ALIGNMENT = 8, MAX_ALIGNMENT = 1 << 20 };
#define MAX_STRING (UINT64_C(16) << 20)
#define MAX_ELEMENTS (UINT64_C(16) << 20)
/* Least bytes of a key-value pair (empty key, one byte) and of a tensor (empty name, one dimension). */
enum { MIN_PAIR = 8 + 4 + 1, MIN_TENSOR = 8 + 4 + 8 + 4 + 8 };

typedef enum { G_U8, G_I8, G_U16, G_I16, G_U32, G_I32, G_F32, G_BOOL, G_STRING, G_ARRAY, G_U64, G_I64, G_F64, G_TYPES } value_type;
static const uint8_t value_sizes[G_TYPES] = {1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8};

/* A shape that a key tells for a tensor: ggml has four dimensions, and the file's are folded then. */
typedef struct {
    const char *name; /* of the tensor; first member, for the name table */
    aq_shape shape;
} told_shape;

typedef struct {
    int fd;
    const char *file;
    aq_error *err;
    const aq_model_options *options;
    uint64_t at, size; /* position in the file, its size */
    uint8_t *window;
    uint64_t window_begin, window_size;
    /* Text kept for later: terminated strings one after the other. It may move while it grows, so what points into it is an offset until the end. */
    char *text;
    uint64_t text_size, text_capacity;
    uint64_t *name_at, *key_at; /* [n_tensors], [n_keys] */
    uint64_t n_keys, n_tensors;
    told_shape *shapes;
    uint64_t *shape_name_at;
    size_t n_shapes, shapes_capacity, shape_names_capacity;
    uint64_t metadata_at[2][MAX_TOLD]; /* key and value of what is kept as metadata */
    size_t n_metadata;
    uint64_t alignment;
} reader;

static aq_status fail(reader *r, const char *format, ...) __attribute__((format(printf, 2, 3)));
static aq_status fail(reader *r, const char *format, ...) {
    char text[512], at[32];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    return aq_fail_at(r->err, AQ_ERR_FORMAT, r->file, NULL, "at byte %s: %s", aq_format_count(at, r->at), text);
}

static uint64_t left(const reader *r) { return r->size - r->at; }

static aq_status get(reader *r, void *out, uint64_t n) {
    if (n > left(r)) return fail(r, "the file ends within its header");
    uint8_t *to = out;
    while (n > 0) {
        if (r->at < r->window_begin || r->at >= r->window_begin + r->window_size) {
            r->window_begin = r->at;
            r->window_size = left(r) < WINDOW ? left(r) : WINDOW;
            aq_status status = aq_file_pread(r->fd, r->window, r->window_size, r->at, r->file, r->err);
            if (status != AQ_OK) return status;
        }
        uint64_t within = r->window_begin + r->window_size - r->at, m = n < within ? n : within;
        memcpy(to, r->window + (r->at - r->window_begin), (size_t)m);
        to += m;
        r->at += m;
        n -= m;
    }
    return AQ_OK;
}

static aq_status get_number(reader *r, int bytes, uint64_t *out) {
    uint8_t b[8] = {0};
    aq_status status = get(r, b, (uint64_t)bytes);
    *out = 0;
    for (int i = bytes; status == AQ_OK && i-- > 0;) *out = *out << 8 | b[i];
    return status;
}

static aq_status skip(reader *r, uint64_t n) {
    if (n > left(r)) return fail(r, "the file ends within its header");
    r->at += n;
    return AQ_OK;
}

/* ---- text ---- */

static bool is_utf8(const char *text, uint64_t n) {
    for (uint64_t i = 0; i < n;) {
        uint32_t code;
        size_t len = aq_utf8_decode((const unsigned char *)text + i, (size_t)(n - i), &code);
        if (len == 0 || code == 0) return false;
        i += len;
    }
    return true;
}

/* Reads a string of at most `limit` bytes into the kept text; *at is its offset there. */
static aq_status keep_string(reader *r, uint64_t limit, const char *limit_name, const char *what, uint64_t *at) {
    uint64_t n, need, begin = r->at;
    aq_status status = get_number(r, 8, &n);
    if (status != AQ_OK) return status;
    if (n > left(r)) {
        char count[32];
        r->at = begin;
        return fail(r, "%s of %s bytes, more than the file has", what, aq_format_count(count, n));
    }
    if (n > limit && limit_name) return aq_fail_limit(r->err, r->file, NULL, limit_name, limit, "%s of %llu bytes", what, (unsigned long long)n);
    if (n > limit) return fail(r, "%s of %llu bytes, more than the limit of %llu", what, (unsigned long long)n, (unsigned long long)limit);
    need = r->text_size + n + 1; /* both far below the file's size */
    if (need > r->text_capacity) {
        uint64_t larger = need < 2 * r->text_capacity ? 2 * r->text_capacity : need + 4096;
        char *grown = aq_realloc(r->text, larger, 1);
        if (!grown) return aq_fail_memory(r->err, larger, "the names of a GGUF file");
        r->text = grown;
        r->text_capacity = larger;
    }
    *at = r->text_size;
    if ((status = get(r, r->text + *at, n)) != AQ_OK) return status;
    r->text[*at + n] = 0;
    if (!is_utf8(r->text + *at, n)) {
        r->at = begin;
        return fail(r, "%s is not valid UTF-8 without NUL", what);
    }
    r->text_size = need;
    return AQ_OK;
}

/* ---- metadata ---- */

static aq_status skip_string(reader *r, const char *what) {
    uint64_t n, begin = r->at;
    aq_status status = get_number(r, 8, &n);
    if (status != AQ_OK) return status;
    if (n <= MAX_STRING && n <= left(r)) return skip(r, n);
    char count[32];
    r->at = begin;
    return fail(r, "%s of %s bytes, more than the %s", what, aq_format_count(count, n), n > left(r) ? "file has" : "limit of 16 MiB");
}

static aq_status skip_array(reader *r, uint64_t *type, uint64_t *count) {
    uint64_t begin = r->at, bytes;
    aq_status status = get_number(r, 4, type);
    if (status == AQ_OK) status = get_number(r, 8, count);
    if (status != AQ_OK) return status;
    if (*type >= G_TYPES || *type == G_ARRAY) {
        r->at = begin;
        return fail(r, *type == G_ARRAY ? "an array of arrays" : "an array of elements of unknown type %llu", (unsigned long long)*type);
    }
    uint64_t least = *type == G_STRING ? 8 : value_sizes[*type];
    if (*count > MAX_ELEMENTS || !aq_mul(*count, least, &bytes) || bytes > left(r)) {
        char text[32];
        r->at = begin;
        return fail(r, "an array of %s elements, more than the %s", aq_format_count(text, *count),
                    *count > MAX_ELEMENTS ? "limit of 16,777,216" : "file has room for");
    }
    if (*type != G_STRING) return skip(r, bytes);
    for (uint64_t i = 0; i < *count && status == AQ_OK; i++) status = skip_string(r, "a string");
    return status;
}

static const char shape_prefix[] = "comfy.gguf.orig_shape.";

/* An array of numbers that is the shape of the tensor named behind the prefix. Its key is the last kept text. */
static aq_status read_shape(reader *r, uint64_t key_at) {
    uint64_t type, count, end, value;
    uint64_t begin = r->at;
    aq_status status = skip_array(r, &type, &count);
    if (status != AQ_OK) return status;
    end = r->at;
    if ((type != G_I32 && type != G_U32 && type != G_I64 && type != G_U64) || count == 0 || count > AQ_MAX_RANK) {
        r->at = begin;
        return fail(r, "\"%s\" is no shape of 1 to %d whole numbers", shape_prefix, AQ_MAX_RANK);
    }
    told_shape *shapes = aq_grow(r->shapes, &r->shapes_capacity, r->n_shapes, sizeof *shapes);
    if (shapes) r->shapes = shapes;
    uint64_t *names = shapes ? aq_grow(r->shape_name_at, &r->shape_names_capacity, r->n_shapes, sizeof *names) : NULL;
    if (!names) return aq_fail_memory(r->err, sizeof *shapes, "shapes of tensors");
    r->shape_name_at = names;
    told_shape *s = &shapes[r->n_shapes];
    *s = (told_shape){.shape = {.rank = (uint32_t)count}};
    names[r->n_shapes++] = key_at + strlen(shape_prefix);
    r->at = begin + 12;
    for (uint32_t i = 0; i < count && status == AQ_OK; i++) {
        status = get_number(r, value_sizes[type], &value);
        s->shape.dims[i] = value; /* a negative one is huge, and then contradicts the tensor's size */
    }
    r->at = end;
    return status;
}

/* What a few keys mean to us; *taken: the value was read. */
static aq_status read_known(reader *r, uint64_t key_at, uint64_t type, bool *taken) {
    const char *key = r->text + key_at;
    uint64_t value, begin = r->at;
    aq_status status = AQ_OK;
    *taken = true;
    if (strcmp(key, "general.alignment") == 0) {
        if (type != G_U32) return fail(r, "general.alignment is not a 32 bit number");
        status = get_number(r, 4, &r->alignment);
        if (status == AQ_OK && (r->alignment < MIN_ALIGNMENT || r->alignment > MAX_ALIGNMENT || (r->alignment & (r->alignment - 1)) != 0)) {
            r->at = begin;
            return fail(r, "general.alignment is %llu, not a power of two from %d to %d", (unsigned long long)r->alignment, MIN_ALIGNMENT, MAX_ALIGNMENT);
        }
        return status;
    }
    if (strcmp(key, "split.count") == 0 && (type == G_U16 || type == G_U32)) {
        status = get_number(r, value_sizes[type], &value);
        if (status == AQ_OK && value > 1) {
            aq_fail_at(r->err, AQ_ERR_FORMAT, r->file, NULL, "is one of %llu parts of a split GGUF model", (unsigned long long)value);
            aq_hint(r->err, "join the parts into one file first");
            return AQ_ERR_FORMAT;
        }
        return status;
    }
    bool is_told = strcmp(key, "general.architecture") == 0 || strcmp(key, "general.name") == 0;
    if (type == G_STRING && is_told && r->n_metadata < MAX_TOLD) {
        r->metadata_at[0][r->n_metadata] = key_at + strlen("general."); /* "architecture", as in the metadata of other formats */
        return keep_string(r, MAX_KEY, NULL, "a string", &r->metadata_at[1][r->n_metadata++]);
    }
    if (type == G_ARRAY && strncmp(key, shape_prefix, strlen(shape_prefix)) == 0) return read_shape(r, key_at);
    *taken = false;
    return AQ_OK;
}

static aq_status read_pair(reader *r) {
    uint64_t type = 0, value = 0, key_at = 0, count = 0;
    bool taken;
    aq_status status = keep_string(r, MAX_KEY, NULL, "a key", &key_at);
    if (status != AQ_OK) return status;
    r->key_at[r->n_keys++] = key_at;
    if ((status = get_number(r, 4, &type)) != AQ_OK) return status;
    if (type >= G_TYPES) {
        r->at -= 4;
        return fail(r, "a value of unknown type %llu", (unsigned long long)type);
    }
    status = read_known(r, key_at, type, &taken);
    if (status != AQ_OK || taken) return status;
    if (type == G_STRING) return skip_string(r, "a string");
    if (type == G_ARRAY) return skip_array(r, &type, &count);
    if (type != G_BOOL) return skip(r, value_sizes[type]);
    status = get_number(r, 1, &value);
    if (status == AQ_OK && value > 1) {
        r->at--;
        return fail(r, "a truth value of %llu, neither 0 nor 1", (unsigned long long)value);
    }
    return status;
}

/* ---- tensors ---- */

static aq_status fail_tensor(const reader *r, uint64_t name_at, const char *format, ...) __attribute__((format(printf, 3, 4)));
static aq_status fail_tensor(const reader *r, uint64_t name_at, const char *format, ...) {
    char text[512];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    return aq_fail_at(r->err, AQ_ERR_FORMAT, r->file, r->text + name_at, "%s", text);
}

static aq_status set_type(const reader *r, uint64_t name_at, uint64_t type, aq_tensor_info *t) {
    const aq_ggml_format *f = type <= UINT32_MAX ? aq_ggml_format_of((uint32_t)type) : NULL;
    uint64_t inner = t->shape.dims[t->shape.rank - 1];
    if (!f) return fail_tensor(r, name_at, "is of type %llu, which GGUF does not have", (unsigned long long)type);
    if (!aq_ggml_is_block(f) && f->dtype == AQ_DTYPE_OTHER) {
        fail_tensor(r, name_at, "is of type %s, which is not read here", f->name);
        aq_hint(r->err, "read are F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1 and Q2_K to Q6_K");
        return AQ_ERR_FORMAT;
    }
    if (inner % f->n_values != 0)
        return fail_tensor(r, name_at, "rows of %llu values are no multiple of the %u of a block of %s", (unsigned long long)inner, f->n_values, f->name);
    t->dtype_name = f->name;
    t->dtype = aq_ggml_is_block(f) ? AQ_F32 : f->dtype;
    t->block_type = aq_ggml_is_block(f) ? f->type : 0;
    if (!aq_shape_count(&t->shape, &t->count)) return fail_tensor(r, name_at, "the product of its dimensions overflows 64 bits");
    if (!aq_mul(t->count / f->n_values, f->n_bytes, &t->size_bytes)) return fail_tensor(r, name_at, "its size in bytes overflows 64 bits");
    return AQ_OK;
}

static aq_status read_tensor(reader *r, aq_tensor_info *t) {
    uint64_t name_at = 0, n_dims = 0, type = 0;
    aq_status status = keep_string(r, r->options->limits.name_bytes, "name_bytes", "a tensor's name", &name_at);
    if (status != AQ_OK) return status;
    r->name_at[r->n_tensors++] = name_at;
    *t = (aq_tensor_info){.scale_index = -1};
    if ((status = get_number(r, 4, &n_dims)) != AQ_OK) return status;
    if (n_dims == 0 || n_dims > MAX_DIMS) return fail_tensor(r, name_at, "has %llu dimensions, expected 1 to %d", (unsigned long long)n_dims, MAX_DIMS);
    t->shape.rank = (uint32_t)n_dims;
    for (uint32_t i = t->shape.rank; i-- > 0 && status == AQ_OK;) status = get_number(r, 8, &t->shape.dims[i]); /* the file has the innermost first */
    if (status == AQ_OK) status = get_number(r, 4, &type);
    if (status == AQ_OK) status = get_number(r, 8, &t->offset);
    return status == AQ_OK ? set_type(r, name_at, type, t) : status;
}

/* Tensors follow each other at aligned places, and nothing follows the last but its padding. */
static aq_status place_tensors(const reader *r, aq_tensor_info *tensors, uint64_t data_begin) {
    uint64_t expected = 0, data_bytes = r->size - data_begin, end, last = 0;
    char is[32], other[32];
    for (uint64_t i = 0; i < r->n_tensors; i++) {
        aq_tensor_info *t = &tensors[i];
        if (t->offset % r->alignment != 0)
            return fail_tensor(r, r->name_at[i], "its data begins at %s, which is not aligned to %llu", aq_format_count(is, t->offset),
                               (unsigned long long)r->alignment);
        if (t->offset != expected)
            return fail_tensor(r, r->name_at[i], "its data begins at %s, expected %s, where the data before it ends", aq_format_count(is, t->offset),
                               aq_format_count(other, expected));
        if (t->offset > data_bytes || t->size_bytes > data_bytes - t->offset) {
            fail_tensor(r, r->name_at[i], "its %s bytes of data reach beyond the file, which has %s for it", aq_format_count(is, t->size_bytes),
                        aq_format_count(other, t->offset < data_bytes ? data_bytes - t->offset : 0));
            aq_hint(r->err, "if the file was downloaded, it is cut short: get it again");
            return AQ_ERR_FORMAT;
        }
        last = t->offset + t->size_bytes;
        if (!aq_align(last, r->alignment, &expected)) return fail_tensor(r, r->name_at[i], "its end overflows 64 bits");
        t->offset += data_begin;
    }
    end = data_bytes < expected ? last : expected; /* the padding of the last may be missing */
    if (data_bytes != end && data_bytes > expected)
        return aq_fail_at(r->err, AQ_ERR_FORMAT, r->file, NULL, "%s bytes follow the last tensor's data: none are allowed",
                          aq_format_count(is, data_bytes - expected));
    return AQ_OK;
}

/* Text does not move any more: names become pointers, and shapes that keys tell replace folded ones. */
static aq_status finish(reader *r, aq_st_header *out) {
    aq_st_pair *keys = aq_calloc(r->n_keys, sizeof *keys);
    aq_st_pair *metadata = aq_calloc(r->n_metadata, sizeof *metadata);
    aq_name_table table = {0};
    aq_status status = keys && metadata ? AQ_OK : aq_fail_memory(r->err, r->n_keys * sizeof *keys, "the keys of a GGUF file");
    for (uint64_t i = 0; i < r->n_keys && status == AQ_OK; i++) keys[i].name = r->text + r->key_at[i];
    for (uint64_t i = 0; i < r->n_tensors; i++) out->tensors[i].name = r->text + r->name_at[i];
    for (size_t i = 0; i < r->n_metadata && status == AQ_OK; i++) metadata[i] = (aq_st_pair){r->text + r->metadata_at[0][i], r->text + r->metadata_at[1][i]};
    if (status == AQ_OK) status = aq_st_check_unique(keys, sizeof *keys, (size_t)r->n_keys, "keys", r->file, r->err);
    if (status == AQ_OK) status = aq_st_check_unique(out->tensors, sizeof *out->tensors, (size_t)r->n_tensors, "tensor names", r->file, r->err);
    if (status == AQ_OK) status = aq_name_table_init(&table, out->tensors, sizeof *out->tensors, (size_t)r->n_tensors, r->err);
    for (uint64_t i = 0; i < r->n_tensors && status == AQ_OK; i++) aq_name_table_add(&table, (size_t)i);
    for (size_t i = 0; i < r->n_shapes && status == AQ_OK; i++) {
        uint64_t count;
        const char *name = r->text + r->shape_name_at[i];
        int64_t at = aq_name_table_find(&table, name);
        if (at < 0) continue; /* of a tensor that was left out */
        if (!aq_shape_count(&r->shapes[i].shape, &count) || count != out->tensors[at].count)
            status = fail_tensor(r, r->shape_name_at[i], "its shape by %s contradicts its dimensions", shape_prefix);
        out->tensors[at].shape = r->shapes[i].shape;
    }
    aq_name_table_free(&table);
    aq_free(keys);
    out->metadata = metadata;
    out->n_metadata = out->metadata_capacity = status == AQ_OK ? r->n_metadata : 0;
    return status;
}

static aq_status read_counts(reader *r, uint64_t *n_pairs, uint64_t *n_tensors) {
    char magic[4], is[32];
    uint64_t version;
    aq_status status = get(r, magic, 4);
    if (status == AQ_OK && memcmp(magic, "GGUF", 4) != 0) return aq_fail_at(r->err, AQ_ERR_FORMAT, r->file, NULL, "does not begin with \"GGUF\"");
    if (status == AQ_OK) status = get_number(r, 4, &version);
    if (status != AQ_OK) return status;
    if (version != 2 && version != 3) {
        bool swapped = version != 0 && (version & 0xFFFF) == 0;
        return aq_fail_at(r->err, AQ_ERR_FORMAT, r->file, NULL,
                          swapped ? "is a big-endian GGUF file, which is not read here (%llu)" : "is of GGUF version %llu, expected 2 or 3",
                          (unsigned long long)version);
    }
    if ((status = get_number(r, 8, n_tensors)) != AQ_OK || (status = get_number(r, 8, n_pairs)) != AQ_OK) return status;
    if (*n_pairs > MAX_KEYS || *n_pairs > left(r) / MIN_PAIR)
        return fail(r, "%s key-value pairs, more than the limit of 65,536 or the file's size", aq_format_count(is, *n_pairs));
    if (*n_tensors > left(r) / MIN_TENSOR) return fail(r, "%s tensors, more than the file has room for", aq_format_count(is, *n_tensors));
    if (*n_tensors > r->options->limits.n_tensors)
        return aq_fail_limit(r->err, r->file, NULL, "n_tensors", r->options->limits.n_tensors, "%s tensors", aq_format_count(is, *n_tensors));
    return *n_tensors == 0 ? aq_fail_at(r->err, AQ_ERR_FORMAT, r->file, NULL, "holds no tensors") : AQ_OK;
}

static aq_status check_length(reader *r) {
    uint64_t limit = r->options->limits.header_bytes;
    return r->at > limit ? aq_fail_limit(r->err, r->file, NULL, "header_bytes", limit, "its header is longer") : AQ_OK;
}

static aq_status parse(reader *r, aq_st_header *out, uint64_t *header_bytes) {
    uint64_t n_pairs = 0, n_tensors = 0, data_begin;
    if (!(r->window = aq_alloc(WINDOW))) return aq_fail_memory(r->err, WINDOW, "reading a header");
    aq_status status = read_counts(r, &n_pairs, &n_tensors);
    if (status != AQ_OK) return status;
    if (!(r->key_at = aq_calloc(n_pairs, sizeof *r->key_at))) return aq_fail_memory(r->err, n_pairs * sizeof *r->key_at, "the keys of a GGUF file");
    for (uint64_t i = 0; i < n_pairs && status == AQ_OK; i++)
        if ((status = read_pair(r)) == AQ_OK) status = check_length(r);
    if (status != AQ_OK) return status;
    if (n_tensors > left(r) / MIN_TENSOR) return fail(r, "%llu tensors, more than the rest of the file has room for", (unsigned long long)n_tensors);
    r->name_at = aq_calloc(n_tensors, sizeof *r->name_at);
    out->tensors = aq_calloc(n_tensors, sizeof *out->tensors);
    if (!r->name_at || !out->tensors) return aq_fail_memory(r->err, n_tensors * sizeof *out->tensors, "the tensor list");
    for (uint64_t i = 0; i < n_tensors; i++) {
        if ((status = read_tensor(r, &out->tensors[i])) != AQ_OK || (status = check_length(r)) != AQ_OK) return status;
    }
    out->n_tensors = out->capacity = (size_t)n_tensors;
    if (!aq_align(r->at, r->alignment, &data_begin) || data_begin > r->size) {
        uint64_t bytes = 0; /* a file of empty tensors may end with its header */
        for (uint64_t i = 0; i < n_tensors; i++) bytes |= out->tensors[i].size_bytes;
        if (bytes) return fail(r, "the file ends where its data should begin");
        data_begin = r->size;
    }
    *header_bytes = data_begin;
    status = place_tensors(r, out->tensors, data_begin);
    return status == AQ_OK ? finish(r, out) : status;
}

aq_status aq_gguf_parse(aq_st_header *out, int fd, uint64_t file_size, const char *file, const aq_model_options *options, uint64_t *header_bytes,
                        aq_error *err) {
    memset(out, 0, sizeof *out);
    reader r = {.fd = fd, .file = file, .err = err, .options = options, .size = file_size, .alignment = DEFAULT_ALIGNMENT};
    aq_status status = parse(&r, out, header_bytes);
    out->text = r.text;
    if (status != AQ_OK) out->n_tensors = 0;
    aq_free(r.window);
    aq_free(r.name_at);
    aq_free(r.key_at);
    aq_free(r.shapes);
    aq_free(r.shape_name_at);
    return status;
}
