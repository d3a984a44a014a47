/* Footer check (see footer.h): a walk over the Thrift compact encoding that trusts nothing and allocates only the list of chunk spans.
 *
 * Every declared count is compared with the bytes that are left before anything is done with it; a column chunk must take as many bytes as an honest one
 * does, so that the memory for the parsed footer is bounded by the file's size. Structure ids: parquet.thrift of the Parquet format. */
#include "base/footer.h"

#include <stdlib.h>

#include "base/mem.h"
#include "base/size.h"

enum {
    STOP = 0,
    BOOL_TRUE = 1,
    BOOL_FALSE = 2,
    I8 = 3,
    I16 = 4,
    I32 = 5,
    I64 = 6,
    DOUBLE = 7,
    BINARY = 8,
    LIST = 9,
    SET = 10,
    MAP = 11,
    STRUCT = 12,
    UUID = 13
};
enum { MAX_DEPTH = 64, MAX_ELEMENTS = 3 * 4096, MAX_ROW_GROUPS = 1000000, MIN_CHUNK_BYTES = 24 };

typedef struct {
    const uint8_t *at, *end;
    const char *wrong; /* first thing that did not fit, or NULL */
} walker;

typedef struct {
    uint64_t begin, end;
} span;

typedef struct {
    walker w;
    uint64_t data_end;
    uint64_t n_leaves;
    span *spans;
    uint64_t n_spans, spans_cap;
    bool no_memory;
} footer;

static bool fail(walker *w, const char *what) {
    if (!w->wrong) w->wrong = what;
    return false;
}

static uint64_t left(const walker *w) { return (uint64_t)(w->end - w->at); }

static bool skip(walker *w, uint64_t n) {
    if (n > left(w)) return fail(w, "a value runs past the end");
    w->at += n;
    return true;
}

static bool read_byte(walker *w, uint8_t *out) {
    if (left(w) == 0) return fail(w, "it ends inside a value");
    *out = *w->at++;
    return true;
}

static bool read_varint(walker *w, uint64_t *out) {
    uint64_t v = 0;
    for (int shift = 0; shift < 70; shift += 7) {
        uint8_t b = 0;
        if (!read_byte(w, &b)) return false;
        v |= shift < 64 ? (uint64_t)(b & 0x7F) << shift : 0;
        if (!(b & 0x80)) {
            *out = v;
            return true;
        }
    }
    return fail(w, "a number is longer than 10 bytes");
}

static bool read_int(walker *w, int64_t *out) {
    uint64_t v;
    if (!read_varint(w, &v)) return false;
    *out = (int64_t)(v >> 1) ^ -(int64_t)(v & 1);
    return true;
}

/* Next field of a struct: its type and id; type STOP at the end. */
static bool next_field(walker *w, uint8_t *type, int64_t *id) {
    uint8_t b = 0;
    if (!read_byte(w, &b)) return false;
    *type = b & 15;
    if (*type == STOP) return b == 0 || fail(w, "a struct ends in a field that is no stop");
    if (*type > UUID) return fail(w, "a field has an unknown type");
    if (b >> 4)
        *id += b >> 4;
    else if (!read_int(w, id))
        return false;
    return (*id > 0 && *id < 32768) || fail(w, "a field number is out of range");
}

/* Header of a list: each element takes at least one byte. */
static bool begin_list(walker *w, uint8_t *type, uint64_t *n) {
    uint8_t b = 0;
    if (!read_byte(w, &b)) return false;
    *type = b & 15;
    *n = b >> 4;
    if (*n == 15 && !read_varint(w, n)) return false;
    if (*type == STOP || *type > UUID) return fail(w, "a list has an unknown element type");
    return *n <= left(w) || fail(w, "a list is longer than what is left");
}

static bool skip_value(walker *w, uint8_t type, int depth, bool in_list);

static bool skip_struct(walker *w, int depth) {
    int64_t id = 0;
    uint8_t type;
    while (next_field(w, &type, &id)) {
        if (type == STOP) return true;
        if (!skip_value(w, type, depth, false)) return false;
    }
    return false;
}

static bool skip_value(walker *w, uint8_t type, int depth, bool in_list) {
    uint64_t n;
    uint8_t kinds, element;
    if (depth >= MAX_DEPTH) return fail(w, "it is nested deeper than 64");
    switch (type) {
    case BOOL_TRUE:
    case BOOL_FALSE: return in_list ? skip(w, 1) : true;
    case I8: return skip(w, 1);
    case I16:
    case I32:
    case I64: return read_varint(w, &n);
    case DOUBLE: return skip(w, 8);
    case UUID: return skip(w, 16);
    case BINARY: return read_varint(w, &n) && skip(w, n);
    case STRUCT: return skip_struct(w, depth + 1);
    case LIST:
    case SET:
        if (!begin_list(w, &element, &n)) return false;
        for (uint64_t i = 0; i < n; i++)
            if (!skip_value(w, element, depth + 1, true)) return false;
        return true;
    case MAP:
        if (!read_varint(w, &n)) return false;
        if (n == 0) return true;
        if (n > left(w) || !read_byte(w, &kinds)) return fail(w, "a map is longer than what is left");
        for (uint64_t i = 0; i < n; i++)
            if (!skip_value(w, kinds >> 4, depth + 1, true) || !skip_value(w, kinds & 15, depth + 1, true)) return false;
        return true;
    default: return fail(w, "a field has an unknown type");
    }
}

/* ---- schema ---- */

/* One schema element: the number of its children, and whether it has what it needs. */
static bool read_element(walker *w, int64_t *n_children, bool *has_type, bool *has_name) {
    int64_t id = 0;
    uint8_t type;
    *n_children = 0;
    *has_type = *has_name = false;
    while (next_field(w, &type, &id)) {
        if (type == STOP) return true;
        if (id == 5 && type == I32) {
            if (!read_int(w, n_children)) return false;
        } else {
            *has_type = *has_type || (id == 1 && type == I32);
            *has_name = *has_name || (id == 4 && type == BINARY);
            if (!skip_value(w, type, 2, false)) return false;
        }
    }
    return false;
}

/* The child counts of the elements, in depth-first order, describe one tree. */
static bool read_schema(footer *f) {
    walker *w = &f->w;
    uint64_t n;
    uint8_t type;
    int64_t open[MAX_DEPTH]; /* children that each open group still waits for */
    int depth = 0;
    if (!begin_list(w, &type, &n)) return false;
    if (type != STRUCT || n < 2 || n > MAX_ELEMENTS) return fail(w, "the schema has no columns, or too many");
    for (uint64_t i = 0; i < n; i++) {
        int64_t n_children;
        bool has_type, has_name;
        if (!read_element(w, &n_children, &has_type, &has_name)) return false;
        if (!has_name) return fail(w, "a column has no name");
        if (n_children < 0 || n_children >= (int64_t)n || (i == 0 && n_children == 0)) return fail(w, "the schema's child counts are out of range");
        if (i > 0) {
            while (depth > 0 && open[depth - 1] == 0) depth--;
            if (depth == 0) return fail(w, "the schema's child counts do not form a tree");
            open[depth - 1]--;
        }
        if (n_children > 0) {
            if (depth == MAX_DEPTH) return fail(w, "the schema is nested deeper than 64");
            open[depth++] = n_children;
        } else if (!has_type) {
            return fail(w, "a column has no type");
        } else {
            f->n_leaves++;
        }
    }
    while (depth > 0 && open[depth - 1] == 0) depth--;
    if (depth > 0) return fail(w, "the schema's child counts do not form a tree");
    return f->n_leaves <= 4096 || fail(w, "the schema has more than 4096 columns");
}

/* ---- column chunks ---- */

static bool add_span(footer *f, int64_t data_page, int64_t dictionary_page, int64_t size) {
    int64_t begin = dictionary_page > 0 && dictionary_page < data_page ? dictionary_page : data_page;
    if (size < 0 || begin < 4 || (uint64_t)begin > f->data_end || (uint64_t)size > f->data_end - (uint64_t)begin || dictionary_page < 0 ||
        (uint64_t)data_page > f->data_end)
        return fail(&f->w, "a column chunk lies outside the data");
    if (size == 0) return true;
    if (f->n_spans == f->spans_cap) {
        uint64_t cap = f->spans_cap ? 2 * f->spans_cap : 256;
        span *spans = aq_realloc(f->spans, cap, sizeof *spans);
        if (!spans) {
            f->no_memory = true;
            return false;
        }
        f->spans = spans;
        f->spans_cap = cap;
    }
    f->spans[f->n_spans++] = (span){(uint64_t)begin, (uint64_t)begin + (uint64_t)size};
    return true;
}

static bool read_chunk_metadata(footer *f) {
    walker *w = &f->w;
    int64_t id = 0, data_page = -1, dictionary_page = 0, size = -1;
    uint8_t type;
    while (next_field(w, &type, &id)) {
        if (type == STOP)
            return (data_page >= 0 && size >= 0) ? add_span(f, data_page, dictionary_page, size) : fail(w, "a column chunk lacks its offset or size");
        bool ok = id == 7 && type == I64    ? read_int(w, &size)
                  : id == 9 && type == I64  ? read_int(w, &data_page)
                  : id == 11 && type == I64 ? read_int(w, &dictionary_page)
                                            : skip_value(w, type, 5, false);
        if (!ok) return false;
    }
    return false;
}

static bool read_chunk(footer *f) {
    walker *w = &f->w;
    const uint8_t *begin = w->at;
    int64_t id = 0;
    uint8_t type;
    bool has_metadata = false;
    while (next_field(w, &type, &id)) {
        if (type == STOP) {
            if (!has_metadata) return fail(w, "a column chunk has no metadata");
            return w->at - begin >= MIN_CHUNK_BYTES || fail(w, "a column chunk is too short to be one");
        }
        if (id == 1) return fail(w, "a column chunk names another file");
        if (id == 3 && type == STRUCT) {
            if (has_metadata) return fail(w, "a column chunk has its metadata twice");
            has_metadata = true;
            if (!read_chunk_metadata(f)) return false;
        } else if (!skip_value(w, type, 4, false)) {
            return false;
        }
    }
    return false;
}

static bool read_row_group(footer *f) {
    walker *w = &f->w;
    int64_t id = 0;
    uint8_t type, element;
    uint64_t n;
    bool has_columns = false;
    while (next_field(w, &type, &id)) {
        if (type == STOP) return has_columns || fail(w, "a row group has no columns");
        if (id == 1 && type == LIST) {
            if (!begin_list(w, &element, &n)) return false;
            if (has_columns || element != STRUCT || n != f->n_leaves) return fail(w, "a row group has another number of columns than the schema");
            has_columns = true;
            for (uint64_t i = 0; i < n; i++)
                if (!read_chunk(f)) return false;
        } else if (!skip_value(w, type, 2, false)) {
            return false;
        }
    }
    return false;
}

static bool read_row_groups(footer *f) {
    uint8_t type;
    uint64_t n;
    if (!begin_list(&f->w, &type, &n)) return false;
    if (n > MAX_ROW_GROUPS || (n > 0 && type != STRUCT)) return fail(&f->w, "there are more row groups than the limit of 1000000");
    for (uint64_t i = 0; i < n; i++)
        if (!read_row_group(f)) return false;
    return true;
}

static int by_begin(const void *a, const void *b) {
    const span *x = a, *y = b;
    return x->begin < y->begin ? -1 : x->begin > y->begin;
}

static bool read_footer(footer *f) {
    int64_t id = 0;
    uint8_t type;
    bool has_schema = false, has_groups = false;
    while (next_field(&f->w, &type, &id)) {
        if (type == STOP) break;
        if (id == 2 && type == LIST) {
            if (has_schema) return fail(&f->w, "the schema is there twice");
            has_schema = true;
            if (!read_schema(f)) return false;
        } else if (id == 4 && type == LIST) {
            if (!has_schema || has_groups) return fail(&f->w, "the row groups come before the schema, or twice");
            has_groups = true;
            if (!read_row_groups(f)) return false;
        } else if (!skip_value(&f->w, type, 0, false)) {
            return false;
        }
    }
    if (f->w.wrong) return false;
    if (!has_schema || !has_groups) return fail(&f->w, "the schema or the row groups are missing");
    if (left(&f->w) > 0) return fail(&f->w, "bytes are left after its end");
    if (f->n_spans > 1) qsort(f->spans, f->n_spans, sizeof *f->spans, by_begin);
    for (uint64_t i = 1; i < f->n_spans; i++)
        if (f->spans[i].begin < f->spans[i - 1].end) return fail(&f->w, "column chunks overlap");
    return true;
}

aq_status aq_footer_check(const uint8_t *data, uint64_t size, uint64_t data_end, const char *file, aq_error *err) {
    footer f = {.w = {data, data + size, NULL}, .data_end = data_end};
    bool ok = read_footer(&f);
    aq_free(f.spans);
    if (ok) return AQ_OK;
    if (f.no_memory) return aq_fail_memory(err, f.n_spans * sizeof *f.spans, "a footer");
    unsigned long long begin = data_end, near = begin + (uint64_t)(f.w.at - data);
    return aq_fail_at(err, AQ_ERR_FORMAT, file, NULL, "its footer at byte %llu cannot be used: %s (near byte %llu)", begin,
                      f.w.wrong ? f.w.wrong : "it ends early", near);
}
