/* JSON lines: read piece by piece, one line in memory at a time. A bad line is skipped to its end, whatever its length, and the next one is read (CA03). */
#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/file.h"
#include "base/json.h"
#include "base/mem.h"
#include "base/utf8.h"
#include "calibration/dataset.h"

enum { CHUNK = 1 << 16, MAX_DEPTH = AQ_MAX_RANK + 4 };
#define DEFAULT_LINE_BYTES (UINT64_C(16) << 20)

typedef struct {
    int fd;
    char chunk[CHUNK];
    size_t at, n; /* what is left of the chunk */
    char *line;
    uint64_t line_bytes, line_cap, number, most;
    json_t *root; /* of the sample that was given out: its text lives here */
} lines;

/* ---- lines ---- */

static aq_status append(lines *l, const char *text, size_t n, aq_error *err) {
    if (l->line_bytes + n > l->line_cap) {
        uint64_t cap = 2 * l->line_cap > l->line_bytes + n ? 2 * l->line_cap : l->line_bytes + n;
        char *line = aq_realloc(l->line, cap, 1);
        if (!line) return aq_fail_memory(err, cap, "a line");
        l->line = line;
        l->line_cap = cap;
    }
    if (n > 0) memcpy(l->line + l->line_bytes, text, n);
    l->line_bytes += n;
    return AQ_OK;
}

/* The next line without its end; *end when there is none. A line over the limit is skipped and an error. */
static aq_status next_line(aq_dataset *d, bool *end, aq_error *err) {
    lines *l = d->state;
    uint64_t total = 0;
    l->line_bytes = 0;
    l->number++;
    for (;;) {
        if (l->at == l->n) {
            ssize_t n = read(l->fd, l->chunk, CHUNK);
            if (n < 0 && errno == EINTR) continue;
            if (n < 0) return aq_fail_io(err, errno, d->path, "cannot read");
            l->at = 0;
            l->n = (size_t)n;
            if (n == 0) {
                *end = total == 0;
                break;
            }
        }
        const char *from = l->chunk + l->at, *newline = memchr(from, '\n', l->n - l->at);
        size_t some = newline ? (size_t)(newline - from) : l->n - l->at;
        l->at += some + (newline != NULL);
        total += some + (newline != NULL);
        if (l->line_bytes + some <= l->most) {
            aq_status status = append(l, from, some, err);
            if (status != AQ_OK) return status;
        } else {
            l->line_bytes = UINT64_MAX - CHUNK; /* beyond the limit for good */
        }
        if (newline) break;
    }
    if (l->line_bytes > l->most) {
        l->line_bytes = 0;
        return aq_dataset_fail(d, "line", l->number, err, "is %llu bytes long, over the limit of %llu", (unsigned long long)total, (unsigned long long)l->most);
    }
    if (l->line_bytes > 0 && l->line[l->line_bytes - 1] == '\r') l->line_bytes--;
    return AQ_OK;
}

static bool is_blank(const lines *l) {
    for (uint64_t i = 0; i < l->line_bytes; i++)
        if (l->line[i] != ' ' && l->line[i] != '\t') return false;
    return true;
}

/* ---- values ---- */

typedef struct {
    aq_dataset *d;
    aq_error *err;
    uint64_t line, n;
    aq_shape shape;
    bool integers;
} values;

static aq_status bad(const values *v, const char *what) { return aq_dataset_fail(v->d, "line", v->line, v->err, "%s", what); }

static aq_status add_value(values *v, const json_t *number) {
    if (!json_is_number(number)) return bad(v, "a value is no number");
    if (v->n == v->d->values_cap) {
        aq_status status = aq_dataset_reserve(v->d, v->n ? 2 * v->n : 256, v->err);
        if (status != AQ_OK) return status;
    }
    float value = (float)json_number_value(number);
    if (!isfinite(value)) return bad(v, "a value is too large");
    v->integers = v->integers && json_is_integer(number);
    v->d->values[v->n++] = value;
    return AQ_OK;
}

/* A nested list at `depth`: every list of one depth has the same length. */
static aq_status add_list(values *v, const json_t *list, uint32_t depth) {
    size_t i, n = json_array_size(list);
    const json_t *item;
    if (depth >= AQ_MAX_RANK) return bad(v, "the lists are nested deeper than 8");
    if (n == 0) return bad(v, "a list is empty");
    if (depth == v->shape.rank && v->n == 0) v->shape.dims[v->shape.rank++] = n;
    if (depth >= v->shape.rank || v->shape.dims[depth] != n) return bad(v, "the nested lists differ in length");
    json_array_foreach(list, i, item) {
        bool inner = json_is_array(item);
        if (!inner && depth + 1 != v->shape.rank) return bad(v, json_is_number(item) ? "the nested lists differ in depth" : "a value is no number");
        aq_status status = inner ? add_list(v, item, depth + 1) : add_value(v, item);
        if (status != AQ_OK) return status;
    }
    return AQ_OK;
}

/* "shape": [ints] replaces the shape of the list. */
static aq_status read_shape(values *v, const json_t *shape) {
    int64_t dims[AQ_MAX_RANK];
    size_t i, n = json_array_size(shape);
    const json_t *item;
    if (!shape || json_is_null(shape)) return AQ_OK;
    if (!json_is_array(shape) || n > AQ_MAX_RANK) return bad(v, "shape is no list of at most 8 integers");
    json_array_foreach(shape, i, item) {
        if (!json_is_integer(item)) return bad(v, "shape is no list of at most 8 integers");
        dims[i] = json_integer_value(item);
    }
    return aq_dataset_shape(&v->shape, dims, n, v->n) ? AQ_OK : bad(v, "shape does not multiply to the number of values");
}

static aq_status read_values(aq_dataset *d, aq_sample *out, const json_t *list, const json_t *root, aq_error *err) {
    values v = {.d = d, .err = err, .line = out->line, .integers = true};
    if (!json_is_array(list)) return bad(&v, "data and input are lists of numbers");
    aq_status status = add_list(&v, list, 0);
    if (status == AQ_OK) status = read_shape(&v, json_object_get(root, "shape"));
    out->values = d->values;
    out->n_values = v.n;
    out->shape = v.shape;
    out->integers = v.integers;
    return status;
}

static aq_status read_sample(aq_dataset *d, aq_sample *out, const json_t *root, aq_error *err) {
    static const char *const keys[] = {"text", "prompt", "input", "data"};
    const json_t *value = NULL, *timestep = json_object_get(root, "timestep");
    if (!json_is_object(root)) return aq_dataset_fail(d, "line", out->line, err, "is no JSON object");
    for (int i = 0; i < 4 && !value; i++) {
        value = json_object_get(root, keys[i]);
        if (json_is_null(value)) value = NULL;
        out->kind = (aq_sample_kind)i;
    }
    if (!value) return aq_dataset_fail(d, "line", out->line, err, "has none of the keys text, prompt, input, data");
    if (timestep && !json_is_null(timestep)) {
        if (!json_is_integer(timestep) || json_integer_value(timestep) < 0 || json_integer_value(timestep) > INT32_MAX)
            return aq_dataset_fail(d, "line", out->line, err, "timestep is no integer of at least 0");
        out->timestep = (int32_t)json_integer_value(timestep);
    }
    out->synthetic = json_is_true(json_object_get(root, "synthetic"));
    if (out->kind >= AQ_SAMPLE_INPUT) return read_values(d, out, value, root, err);
    if (!json_is_string(value)) return aq_dataset_fail(d, "line", out->line, err, "%s is no string", keys[out->kind]);
    out->text = json_string_value(value);
    out->text_bytes = json_string_length(value);
    return AQ_OK;
}

/* ---- the reader ---- */

static aq_status next(aq_dataset *d, aq_sample *out, bool *end, aq_error *err) {
    lines *l = d->state;
    aq_status status;
    json_decref(l->root);
    l->root = NULL;
    do {
        status = next_line(d, end, err);
        out->line = l->number;
        if (status != AQ_OK || *end) return status;
        if (l->number == 1 && l->line_bytes >= 3 && memcmp(l->line, "\xEF\xBB\xBF", 3) == 0) { /* a byte order mark */
            memmove(l->line, l->line + 3, (size_t)(l->line_bytes - 3));
            l->line_bytes -= 3;
        }
    } while (is_blank(l));
    uint32_t code;
    for (uint64_t i = 0, n; i < l->line_bytes; i += n)
        if ((n = aq_utf8_decode((const unsigned char *)l->line + i, (size_t)(l->line_bytes - i), &code)) == 0)
            return aq_dataset_fail(d, "line", l->number, err, "is not UTF-8 at byte %llu", (unsigned long long)i + 1);
    aq_error inner;
    aq_error_clear(&inner);
    status = aq_json_parse(&l->root, l->line, l->line_bytes, MAX_DEPTH, NULL, &inner);
    if (status == AQ_ERR_MEMORY) {
        if (err) *err = inner;
        return status;
    }
    if (status != AQ_OK) { /* it is always line 1 of what was parsed */
        const char *place = strncmp(inner.message, "invalid JSON at line 1, ", 24) == 0 ? inner.message + 24 : NULL;
        return aq_dataset_fail(d, "line", l->number, err, "%s%s", place ? "invalid JSON at " : "", place ? place : inner.message);
    }
    return read_sample(d, out, l->root, err);
}

static void close_lines(aq_dataset *d) {
    lines *l = d->state;
    if (!l) return;
    json_decref(l->root);
    if (l->fd >= 0) close(l->fd);
    aq_free(l->line);
    aq_free(l);
}

aq_status aq_dataset_open_lines(aq_dataset *d, aq_error *err) {
    static const aq_dataset_reader reader = {next, close_lines};
    lines *l = aq_calloc(1, sizeof *l);
    if (!l) return aq_fail_memory(err, sizeof *l, "a data set");
    d->state = l;
    d->reader = &reader;
    l->most = d->options.max_line_bytes ? d->options.max_line_bytes : DEFAULT_LINE_BYTES;
    if (l->most > INT64_MAX) l->most = INT64_MAX;
    uint64_t size;
    return aq_file_open(&l->fd, &size, d->path, err);
}
