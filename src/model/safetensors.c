/* The safetensors header (format: README of the safetensors project).
 *
 * 8 bytes little-endian length N, N bytes of JSON `{name: {dtype, shape, data_offsets: [begin, end)}, "__metadata__": {string: string}}`, data.
 * Stricter than the reference reader where leniency hides things: no space before `{`, no duplicate keys, no NUL in names. Tensors must cover the
 * data without holes or overlap, so every byte of the file is accounted for. Rows ST01-ST16 of the design.
 */
#include "model/safetensors.h"

#include <stdlib.h>
#include <string.h>

#include "base/error.h"
#include "base/mem.h"
#include "base/size.h"
#include "model/internal.h"
#include "model/scan.h"

enum { MAX_UNKNOWN_FIELDS = 16 };

/* Types of newer versions of the format: not converted here, but their size can be compared with the span. */
static const struct {
    const char *name;
    uint32_t bits;
} g_other_types[] = {{"F4", 4}, {"F6_E2M3", 6}, {"F6_E3M2", 6}, {"F8_E8M0", 8}, {"F8_E4M3FNUZ", 8}, {"F8_E5M2FNUZ", 8}, {"C64", 64}};

/* What an entry says, with what is still missing. */
typedef struct entry {
    bool has_dtype, has_shape, has_offsets;
    uint64_t begin, end;
    const char *unknown[MAX_UNKNOWN_FIELDS];
    size_t n_unknown;
} entry;

static aq_status parse_shape(aq_scan *s, aq_shape *shape) {
    bool first = true, more;
    aq_status status = aq_scan_expect(s, '[', "a list of dimensions");
    while (status == AQ_OK && (status = aq_scan_next(s, ']', &first, &more)) == AQ_OK && more) {
        if (shape->rank == AQ_MAX_RANK) return aq_scan_fail(s, "more dimensions than the limit of %d", AQ_MAX_RANK);
        status = aq_scan_u64(s, &shape->dims[shape->rank], "a dimension (whole number)");
        shape->rank++;
    }
    return status;
}

static aq_status parse_offsets(aq_scan *s, uint64_t *begin, uint64_t *end) {
    bool first = true, more;
    int n = 0;
    aq_status status = aq_scan_expect(s, '[', "a pair of offsets");
    while (status == AQ_OK && (status = aq_scan_next(s, ']', &first, &more)) == AQ_OK && more) {
        if (n == 2) return aq_scan_fail(s, "more than two data_offsets");
        status = aq_scan_u64(s, n++ ? end : begin, "an offset (whole number)");
    }
    return status == AQ_OK && n != 2 ? aq_scan_fail(s, "%d data_offsets, expected two", n) : status;
}

static aq_status parse_field(aq_scan *s, entry *e, aq_tensor_info *t) {
    char *key, *word;
    size_t n;
    aq_status status = aq_scan_key(s, &key, &n, "a field name");
    if (status != AQ_OK) return status;
    bool *seen = strcmp(key, "dtype") == 0          ? &e->has_dtype
                 : strcmp(key, "shape") == 0        ? &e->has_shape
                 : strcmp(key, "data_offsets") == 0 ? &e->has_offsets
                                                    : NULL;
    if (seen && *seen) return aq_scan_fail(s, "field \"%s\" appears twice", key);
    if (seen) *seen = true;
    if (seen == &e->has_shape) return parse_shape(s, &t->shape);
    if (seen == &e->has_offsets) return parse_offsets(s, &e->begin, &e->end);
    if (seen == &e->has_dtype) {
        status = aq_scan_string(s, &word, &n, "a type name");
        if (status == AQ_OK && n > 64) return aq_scan_fail(s, "a type name of %zu bytes", n);
        t->dtype_name = word;
        return status;
    }
    for (size_t i = 0; i < e->n_unknown; i++)
        if (strcmp(e->unknown[i], key) == 0) return aq_scan_fail(s, "a field appears twice");
    if (e->n_unknown == MAX_UNKNOWN_FIELDS) return aq_scan_fail(s, "more than %d fields that the format does not define", MAX_UNKNOWN_FIELDS);
    e->unknown[e->n_unknown++] = key;
    return aq_scan_skip(s);
}

/* Elements; a 0 among the dimensions does not excuse an overflow in the others, which would come back in the matrix view. */
static bool count_elements(const aq_shape *shape, uint64_t *count) {
    aq_shape positive = *shape;
    bool zero = false;
    for (uint32_t i = 0; i < shape->rank; i++) {
        if (shape->dims[i] != 0) continue;
        positive.dims[i] = 1;
        zero = true;
    }
    if (!aq_shape_count(&positive, count)) return false;
    if (zero) *count = 0;
    return true;
}

/* Bits per element, 0 when not known. */
static uint32_t dtype_bits(const aq_tensor_info *t) {
    if (t->dtype != AQ_DTYPE_OTHER) return 8 * (uint32_t)aq_dtype_size(t->dtype);
    for (size_t i = 0; i < sizeof g_other_types / sizeof *g_other_types; i++)
        if (strcmp(g_other_types[i].name, t->dtype_name) == 0) return g_other_types[i].bits;
    return 0;
}

/* The two sizes, from shape and from offsets, must agree (ST07). */
static aq_status check_size(const aq_scan *s, const entry *e, aq_tensor_info *t) {
    uint64_t bits = 0, span = e->end - e->begin;
    uint32_t element = dtype_bits(t);
    bool fits = count_elements(&t->shape, &t->count) && aq_mul(t->count, element, &bits);
    t->size_bytes = span;
    if (fits && (element == 0 || (bits % 8 == 0 && bits / 8 == span))) return AQ_OK; /* of an unknown type the span is all there is */
    char shape[256], word[160], wanted[32], found[32];
    aq_format_shape(shape, sizeof shape, &t->shape);
    aq_escape(word, sizeof word, t->dtype_name, strlen(t->dtype_name));
    if (!fits) return aq_fail_at(s->err, AQ_ERR_FORMAT, s->file, t->name, "shape %s \xc3\x97 %s overflows 64 bits", shape, word);
    if (bits % 8 != 0) return aq_fail_at(s->err, AQ_ERR_FORMAT, s->file, t->name, "shape %s \xc3\x97 %s is not a whole number of bytes", shape, word);
    return aq_fail_at(s->err, AQ_ERR_FORMAT, s->file, t->name, "shape %s \xc3\x97 %s = %s bytes, file gives %s", shape, word, aq_format_count(wanted, bits / 8),
                      aq_format_count(found, span));
}

/* By offset; tensors without bytes that share a place stay in the order of the header, which is that of their names' addresses. */
static int compare_offsets(const void *a, const void *b) {
    const aq_tensor_info *x = a, *y = b;
    if (x->offset != y->offset) return x->offset < y->offset ? -1 : 1;
    if (x->size_bytes != y->size_bytes) return x->size_bytes < y->size_bytes ? -1 : 1;
    return x->name < y->name ? -1 : x->name > y->name;
}

/* Sorts the tensors by offset and refuses two that share a byte (ST06). */
static aq_status check_overlap(aq_st_header *header, const char *file, aq_error *err) {
    aq_tensor_info *t = header->tensors;
    size_t n_sorted = 1; /* most files are in order: then the sort's scratch memory is saved */
    while (n_sorted < header->n_tensors && compare_offsets(&t[n_sorted - 1], &t[n_sorted]) <= 0) n_sorted++;
    if (n_sorted < header->n_tensors) qsort(t, header->n_tensors, sizeof *t, compare_offsets);
    for (size_t i = 1; i < header->n_tensors; i++) {
        uint64_t end = t[i - 1].offset + t[i - 1].size_bytes; /* within the file */
        if (t[i].offset >= end) continue;
        char other[256], begin[32], at[32];
        if (strcmp(t[i].name, t[i - 1].name) == 0) return aq_fail_at(err, AQ_ERR_FORMAT, file, t[i].name, "the name appears more than once in the header");
        return aq_fail_at(err, AQ_ERR_FORMAT, file, t[i].name, "its data begins at %s, inside that of tensor \"%s\", which ends at %s",
                          aq_format_count(begin, t[i].offset), aq_escape(other, sizeof other, t[i - 1].name, strlen(t[i - 1].name)), aq_format_count(at, end));
    }
    return AQ_OK;
}

/* No holes, nothing behind (ST06); offsets become absolute. */
static aq_status check_cover(aq_st_header *header, uint64_t data_begin, uint64_t data_bytes, const char *file, aq_error *err) {
    uint64_t expected = 0;
    char begin[32], at[32];
    for (size_t i = 0; i < header->n_tensors; i++) {
        aq_tensor_info *t = &header->tensors[i];
        if (t->offset != expected)
            return aq_fail_at(err, AQ_ERR_FORMAT, file, t->name, "its data begins at %s, but the data before it ends at %s: no gap is allowed",
                              aq_format_count(begin, t->offset), aq_format_count(at, expected));
        expected = t->offset + t->size_bytes;
        t->offset += data_begin;
    }
    if (expected != data_bytes)
        return aq_fail_at(err, AQ_ERR_FORMAT, file, NULL, "%s bytes follow the last tensor's data, which ends at byte %s: none are allowed",
                          aq_format_count(begin, data_bytes - expected), aq_format_count(at, data_begin + expected));
    return AQ_OK;
}

static aq_status check_entry(aq_scan *s, aq_st_header *header, const entry *e, aq_tensor_info *t, uint64_t data_bytes, const aq_model_options *options) {
    const char *missing = !e->has_dtype ? "dtype" : !e->has_shape ? "shape" : !e->has_offsets ? "data_offsets" : NULL;
    if (missing) return aq_scan_fail(s, "field \"%s\" is missing", missing);
    if (e->begin > e->end || e->end > data_bytes) {
        char begin[32], end[32], size[32];
        aq_scan_fail(s, "data_offsets [%s, %s] do not lie within the %s bytes of data", aq_format_count(begin, e->begin), aq_format_count(end, e->end),
                     aq_format_count(size, data_bytes));
        if (e->begin <= e->end) aq_hint(s->err, "if the file was downloaded, it is cut short: get it again");
        return AQ_ERR_FORMAT;
    }
    t->dtype = aq_dtype_from_name(t->dtype_name);
    t->offset = e->begin; /* relative until all are known to fit */
    aq_status status = check_size(s, e, t);
    if (status != AQ_OK) return status;
    if (t->dtype == AQ_DTYPE_OTHER) {
        if (!options->skip_unknown_dtype) {
            char word[160];
            aq_fail_at(s->err, AQ_ERR_FORMAT, s->file, t->name, "unknown dtype \"%s\"", aq_escape(word, sizeof word, t->dtype_name, strlen(t->dtype_name)));
            aq_hint(s->err, "--skip-unknown-dtype copies such tensors as they are");
            return AQ_ERR_FORMAT;
        }
        aq_name_list_add(&header->unknown_dtypes, t->name);
    }
    if (e->n_unknown > 0) aq_name_list_add(&header->unknown_fields, t->name);
    /* More bytes than there are: some are claimed twice. Said now, before a hundred thousand entries of the kind are taken in (ST12). */
    header->span_bytes += t->size_bytes; /* both at most data_bytes: no overflow */
    return header->span_bytes > data_bytes ? check_overlap(header, s->file, s->err) : AQ_OK;
}

static aq_status parse_tensor(aq_scan *s, aq_st_header *header, const char *name, size_t name_bytes, uint64_t data_bytes, const aq_model_options *options) {
    if (name_bytes > options->limits.name_bytes)
        return aq_fail_limit(s->err, s->file, name, "name_bytes", options->limits.name_bytes, "a name of %zu bytes", name_bytes);
    if (header->n_tensors >= options->limits.n_tensors)
        return aq_fail_limit(s->err, s->file, NULL, "n_tensors", options->limits.n_tensors, "more than %zu tensors", header->n_tensors);
    aq_tensor_info *grown = aq_grow(header->tensors, &header->capacity, header->n_tensors, sizeof *grown);
    if (!grown) return aq_fail_memory(s->err, header->capacity * sizeof *grown, s->file);
    header->tensors = grown;
    aq_tensor_info *t = &grown[header->n_tensors++];
    memset(t, 0, sizeof *t);
    t->name = s->tensor = name;
    t->scale_index = -1;
    entry e = {0};
    bool first = true, more;
    aq_status status = aq_scan_expect(s, '{', "an object with dtype, shape and data_offsets");
    while (status == AQ_OK && (status = aq_scan_next(s, '}', &first, &more)) == AQ_OK && more) status = parse_field(s, &e, t);
    if (status == AQ_OK) status = check_entry(s, header, &e, t, data_bytes, options);
    s->tensor = NULL;
    return status;
}

static aq_status parse_metadata(aq_scan *s, aq_st_header *header) {
    if (header->has_metadata) return aq_scan_fail(s, "\"__metadata__\" appears twice");
    header->has_metadata = true;
    bool first = true, more;
    size_t n;
    char *key, *value;
    aq_status status = aq_scan_expect(s, '{', "the object of \"__metadata__\"");
    while (status == AQ_OK && (status = aq_scan_next(s, '}', &first, &more)) == AQ_OK && more) {
        status = aq_scan_key(s, &key, &n, "a key of \"__metadata__\"");
        if (status == AQ_OK) status = aq_scan_string(s, &value, &n, "a string (\"__metadata__\" maps strings to strings)");
        if (status != AQ_OK) return status;
        aq_st_pair *grown = aq_grow(header->metadata, &header->metadata_capacity, header->n_metadata, sizeof *grown);
        if (!grown) return aq_fail_memory(s->err, header->metadata_capacity * sizeof *grown, s->file);
        header->metadata = grown;
        grown[header->n_metadata++] = (aq_st_pair){key, value};
    }
    return status;
}

aq_status aq_st_check_unique(const void *items, size_t stride, size_t n, const char *what, const char *file, aq_error *err) {
    aq_name_table table;
    aq_name_list twice = {0};
    aq_status status = aq_name_table_init(&table, items, stride, n, err);
    for (size_t i = 0; status == AQ_OK && i < n; i++) {
        int64_t other = aq_name_table_add(&table, i);
        const char *name;
        memcpy(&name, (const char *)items + i * stride, sizeof name);
        if (other >= 0) aq_name_list_add(&twice, name);
    }
    aq_name_table_free(&table);
    if (twice.n > 0) return aq_fail_at(err, AQ_ERR_FORMAT, file, NULL, "%s appear more than once in the header: %s", what, aq_name_list_text(&twice));
    return status;
}

static aq_status parse_object(aq_scan *s, aq_st_header *header, uint64_t data_bytes, const aq_model_options *options) {
    if (!aq_scan_have(s, 1) || *s->at != '{') return aq_scan_fail(s, "a safetensors header begins with '{'");
    s->at++;
    bool first = true, more;
    aq_status status;
    while ((status = aq_scan_next(s, '}', &first, &more)) == AQ_OK && more) {
        char *name;
        size_t n;
        status = aq_scan_key(s, &name, &n, "a tensor's name");
        if (status == AQ_OK) status = strcmp(name, "__metadata__") == 0 ? parse_metadata(s, header) : parse_tensor(s, header, name, n, data_bytes, options);
        if (status != AQ_OK) return status;
    }
    while (status == AQ_OK && aq_scan_have(s, 1) && *s->at == ' ') s->at++; /* writers pad with spaces to align the data */
    if (status == AQ_OK && (aq_scan_have(s, 1) || s->broken != AQ_OK))
        return aq_scan_fail(s, "byte 0x%02x after the header's JSON, where only spaces may stand", (unsigned char)*s->at);
    return status;
}

aq_status aq_st_parse(aq_st_header *out, char *text, uint64_t n, const aq_scan_source *source, uint64_t file_size, const char *file,
                      const aq_model_options *options, aq_error *err) {
    memset(out, 0, sizeof *out);
    out->text = text;
    aq_scan s = {.start = text,
                 .at = text,
                 .end = source ? text : text + n,
                 .limit = text + n,
                 .source = source,
                 .file_offset = 8,
                 .max_depth = options->limits.json_depth,
                 .file = file,
                 .err = err};
    uint64_t data_begin = 8 + n, data_bytes = file_size - data_begin;
    aq_status status = parse_object(&s, out, data_bytes, options);
    if (status == AQ_OK) status = aq_st_check_unique(out->metadata, sizeof *out->metadata, out->n_metadata, "keys of \"__metadata__\"", file, err);
    if (status == AQ_OK) status = aq_st_check_unique(out->tensors, sizeof *out->tensors, out->n_tensors, "tensor names", file, err);
    if (status == AQ_OK) status = check_overlap(out, file, err);
    if (status == AQ_OK) status = check_cover(out, data_begin, data_bytes, file, err);
    if (status == AQ_OK && out->n_tensors == 0) status = aq_fail_at(err, AQ_ERR_FORMAT, file, NULL, "holds no tensors");
    return status;
}

void aq_st_header_free(aq_st_header *header) {
    aq_free(header->text);
    aq_free(header->tensors);
    aq_free(header->metadata);
    memset(header, 0, sizeof *header);
}
