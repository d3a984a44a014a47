/* NumPy arrays, alone (.npy) or as members of an archive (.npz): a sample is an entry of the first axis.
 *
 * Format: "NEP 1, A Simple File Format for NumPy Arrays": magic, version, length and text of a Python dictionary with the keys descr, fortran_order and
 * shape, then the values. Arrays of objects are pickles, programs in fact: refused. */
#include <fcntl.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/file.h"
#include "base/half.h"
#include "base/mem.h"
#include "base/size.h"
#include "base/zip.h"
#include "calibration/dataset.h"

enum { MAX_HEADER = 1 << 16 };

typedef struct {
    aq_dtype dtype;
    aq_shape shape;
    uint64_t count;
} header;

typedef struct {
    int fd;
    aq_zip zip;
    aq_zip_stream *stream; /* of the samples */
    header head;
    uint64_t entry_values, at; /* values of one entry; the next one */
    uint8_t *raw;              /* one entry as it is stored */
    int32_t *timesteps;        /* of each entry, or NULL */
} numpy;

/* ---- header ---- */

typedef struct {
    const char *at, *end;
} text;

static void skip_space(text *t) {
    while (t->at < t->end && (*t->at == ' ' || *t->at == '\t' || *t->at == '\n' || *t->at == '\r')) t->at++;
}
static bool take(text *t, char c) {
    skip_space(t);
    if (t->at == t->end || *t->at != c) return false;
    t->at++;
    return true;
}
/* A quoted string without escapes. */
static bool take_string(text *t, const char **out, size_t *n) {
    skip_space(t);
    if (t->at == t->end || (*t->at != '\'' && *t->at != '"')) return false;
    char quote = *t->at++;
    *out = t->at;
    while (t->at < t->end && *t->at != quote && *t->at != '\\') t->at++;
    *n = (size_t)(t->at - *out);
    return take(t, quote);
}
static bool take_word(text *t, const char *word) {
    skip_space(t);
    size_t n = strlen(word);
    if ((size_t)(t->end - t->at) < n || memcmp(t->at, word, n) != 0) return false;
    t->at += n;
    return true;
}
static bool take_number(text *t, uint64_t *out) {
    skip_space(t);
    *out = 0;
    const char *begin = t->at;
    for (; t->at < t->end && *t->at >= '0' && *t->at <= '9'; t->at++)
        if (!aq_mul(*out, 10, out) || !aq_add(*out, (uint64_t)(*t->at - '0'), out)) return false;
    return t->at > begin;
}

/* "(512, 28, 28)", "(512,)", "()" */
static bool take_shape(text *t, aq_shape *shape) {
    shape->rank = 0;
    if (!take(t, '(')) return false;
    while (!take(t, ')')) {
        if (shape->rank == AQ_MAX_RANK || !take_number(t, &shape->dims[shape->rank++])) return false;
        if (!take(t, ',')) return take(t, ')');
    }
    return true;
}

/* "<f4", "|u1": little-endian or of one byte. */
static aq_dtype dtype_of(const char *descr, size_t n) {
    static const struct {
        const char *code;
        aq_dtype dtype;
    } known[] = {{"f2", AQ_F16}, {"f4", AQ_F32}, {"f8", AQ_F64}, {"i1", AQ_I8},  {"i2", AQ_I16}, {"i4", AQ_I32},
                 {"i8", AQ_I64}, {"u1", AQ_U8},  {"u2", AQ_U16}, {"u4", AQ_U32}, {"u8", AQ_U64}, {"b1", AQ_BOOL}};
    if (n != 3 || !(descr[0] == '<' || descr[0] == '|' || descr[0] == '=')) return AQ_DTYPE_OTHER;
    for (size_t i = 0; i < sizeof known / sizeof *known; i++)
        if (memcmp(descr + 1, known[i].code, 2) == 0) return known[i].dtype;
    return AQ_DTYPE_OTHER;
}

static const char *parse_header(text t, header *h) {
    bool has_descr = false, has_order = false, has_shape = false;
    if (!take(&t, '{')) return "its header is no dictionary";
    while (!take(&t, '}')) {
        const char *key, *value;
        size_t n, n_value;
        if (!take_string(&t, &key, &n) || !take(&t, ':')) return "its header is damaged";
        if (n == 5 && memcmp(key, "descr", 5) == 0) {
            if (!take_string(&t, &value, &n_value)) return "holds records, only arrays of numbers are read";
            h->dtype = dtype_of(value, n_value);
            if (h->dtype == AQ_DTYPE_OTHER) return "holds elements of a type that is not read; expected little-endian floats, integers or booleans";
            has_descr = true;
        } else if (n == 13 && memcmp(key, "fortran_order", 13) == 0) {
            if (take_word(&t, "True")) return "lies in Fortran order; save numpy.ascontiguousarray of it";
            if (!take_word(&t, "False")) return "its header is damaged";
            has_order = true;
        } else if (n == 5 && memcmp(key, "shape", 5) == 0) {
            if (!take_shape(&t, &h->shape)) return "its shape cannot be read, or has more than 8 dimensions";
            has_shape = true;
        } else {
            return "its header has an unknown key";
        }
        take(&t, ',');
    }
    return has_descr && has_order && has_shape ? NULL : "its header lacks descr, fortran_order or shape";
}

/* The header at the start of a stream; what is left of it then are the values. */
static aq_status read_header(const aq_dataset *d, aq_zip_stream *s, const char *member, header *h, aq_error *err) {
    uint8_t start[12];
    if (aq_zip_stream_left(s) < 10) return aq_fail_at(err, AQ_ERR_FORMAT, d->path, member, "is no NumPy array: it is too short");
    aq_status status = aq_zip_stream_read(s, start, 10, err);
    if (status != AQ_OK) return status;
    if (memcmp(start, "\x93NUMPY", 6) != 0) return aq_fail_at(err, AQ_ERR_FORMAT, d->path, member, "is no NumPy array");
    uint64_t length = (uint64_t)start[8] | (uint64_t)start[9] << 8;
    if (start[6] < 1 || start[6] > 3) return aq_fail_at(err, AQ_ERR_FORMAT, d->path, member, "has version %u of the format", start[6]);
    if (start[6] > 1) {
        if (aq_zip_stream_left(s) < 2) return aq_fail_at(err, AQ_ERR_FORMAT, d->path, member, "ends inside its header");
        status = aq_zip_stream_read(s, start + 10, 2, err);
        if (status != AQ_OK) return status;
        length |= (uint64_t)start[10] << 16 | (uint64_t)start[11] << 24;
    }
    if (length > MAX_HEADER || length > aq_zip_stream_left(s))
        return aq_fail_at(err, AQ_ERR_FORMAT, d->path, member, "has a header of %llu bytes, which does not fit it", (unsigned long long)length);
    char *bytes = aq_alloc(length);
    if (!bytes) return aq_fail_memory(err, length, "a header");
    status = aq_zip_stream_read(s, bytes, length, err);
    const char *wrong = status == AQ_OK ? parse_header((text){bytes, bytes + length}, h) : NULL;
    aq_free(bytes);
    if (wrong) return aq_fail_at(err, AQ_ERR_FORMAT, d->path, member, "%s", wrong);
    uint64_t size;
    if (status == AQ_OK && (!aq_shape_count(&h->shape, &h->count) || !aq_mul(h->count, aq_dtype_size(h->dtype), &size) || size != aq_zip_stream_left(s)))
        return aq_fail_at(err, AQ_ERR_FORMAT, d->path, member, "holds %llu bytes of values, its shape asks for others",
                          (unsigned long long)aq_zip_stream_left(s));
    return status;
}

/* ---- values ---- */

#define CONVERT(type)                                                                                                                                          \
    for (uint64_t i = 0; i < n; i++) {                                                                                                                         \
        type v;                                                                                                                                                \
        memcpy(&v, raw + i * sizeof v, sizeof v);                                                                                                              \
        out[i] = (float)v;                                                                                                                                     \
    }                                                                                                                                                          \
    break

static void convert(aq_dtype dtype, const uint8_t *raw, uint64_t n, float *out) {
    switch (dtype) {
    case AQ_F64: CONVERT(double);
    case AQ_F32: CONVERT(float);
    case AQ_I64: CONVERT(int64_t);
    case AQ_I32: CONVERT(int32_t);
    case AQ_I16: CONVERT(int16_t);
    case AQ_I8: CONVERT(int8_t);
    case AQ_U64: CONVERT(uint64_t);
    case AQ_U32: CONVERT(uint32_t);
    case AQ_U16: CONVERT(uint16_t);
    case AQ_F16:
        for (uint64_t i = 0; i < n; i++) out[i] = aq_f16_to_f32((uint16_t)(raw[2 * i] | raw[2 * i + 1] << 8));
        break;
    default: CONVERT(uint8_t);
    }
}

static aq_status next(aq_dataset *d, aq_sample *out, bool *end, aq_error *err) {
    numpy *p = d->state;
    *end = p->at == d->n_samples;
    if (*end) return AQ_OK;
    out->line = ++p->at;
    aq_status status = aq_zip_stream_read(p->stream, p->raw, p->entry_values * aq_dtype_size(p->head.dtype), err);
    if (status != AQ_OK) {
        d->is_broken = true;
        return status;
    }
    convert(p->head.dtype, p->raw, p->entry_values, d->values);
    for (uint64_t i = 0; i < p->entry_values; i++)
        if (!isfinite(d->values[i])) return aq_dataset_fail(d, "entry", p->at, err, "value %llu is not finite in F32", (unsigned long long)i);
    out->kind = AQ_SAMPLE_INPUT;
    out->values = d->values;
    out->n_values = p->entry_values;
    out->shape.rank = p->head.shape.rank - 1;
    for (uint32_t i = 0; i < out->shape.rank; i++) out->shape.dims[i] = p->head.shape.dims[i + 1];
    out->integers = !aq_dtype_is_float(p->head.dtype);
    out->dtype = p->head.dtype;
    if (p->timesteps) out->timestep = p->timesteps[p->at - 1];
    return AQ_OK;
}

static void close_numpy(aq_dataset *d) {
    numpy *p = d->state;
    if (!p) return;
    aq_zip_stream_close(p->stream);
    aq_zip_close(&p->zip);
    if (p->fd >= 0) close(p->fd);
    aq_free(p->raw);
    aq_free(p->timesteps);
    aq_free(p);
}

/* ---- the archive ---- */

/* Name of a member without ".npy". */
static bool is_named(const aq_zip_member *m, const char *name) {
    size_t n = strlen(name);
    return strncmp(m->name, name, n) == 0 && (m->name[n] == 0 || strcmp(m->name + n, ".npy") == 0);
}

static const aq_zip_member *find_member(const aq_zip *zip, const char *const *names, size_t n) {
    for (size_t k = 0; k < n; k++)
        for (size_t i = 0; i < zip->n_members; i++)
            if (is_named(&zip->members[i], names[k])) return &zip->members[i];
    return NULL;
}

static aq_status choose_member(const aq_dataset *d, const aq_zip *zip, const aq_zip_member **out, aq_error *err) {
    static const char *const usual[] = {"data", "input", "inputs", "images", "latents", "samples", "x"};
    const char *asked = d->options.array;
    *out = asked ? find_member(zip, &asked, 1) : find_member(zip, usual, sizeof usual / sizeof *usual);
    if (!*out && !asked && zip->n_members == 1) *out = &zip->members[0];
    if (*out) return AQ_OK;
    char list[300] = "", shown[64];
    size_t at = 0;
    for (size_t i = 0; zip->members && i < zip->n_members && at + 80 < sizeof list; i++)
        at += (size_t)snprintf(list + at, sizeof list - at, "%s%s", at ? ", " : "",
                               aq_escape(shown, sizeof shown, zip->members[i].name, strlen(zip->members[i].name)));
    if (asked)
        aq_fail_at(err, AQ_ERR_FORMAT, d->path, NULL, "has no array \"%s\"; there are: %s", aq_escape(shown, sizeof shown, asked, strlen(asked)), list);
    else
        aq_fail_at(err, AQ_ERR_FORMAT, d->path, NULL, "has no array named data, input, inputs, images, latents, samples or x; there are: %s", list);
    aq_hint(err, "name the array that holds the samples");
    return AQ_ERR_FORMAT;
}

/* The array of timesteps, one for each sample; none is fine. */
static aq_status read_timesteps(aq_dataset *d, numpy *p, aq_error *err) {
    static const char *const usual[] = {"timestep", "timesteps", "t"};
    const aq_zip_member *m = find_member(&p->zip, usual, 3);
    aq_zip_stream *s = NULL;
    header h;
    if (!m) return AQ_OK;
    aq_status status = aq_zip_stream_open(&s, &p->zip, m, err);
    if (status == AQ_OK) status = read_header(d, s, m->name, &h, err);
    if (status == AQ_OK && (h.shape.rank != 1 || h.count != d->n_samples || aq_dtype_is_float(h.dtype)))
        status = aq_fail_at(err, AQ_ERR_FORMAT, d->path, m->name, "is no list of one integer for each of the %llu samples", (unsigned long long)d->n_samples);
    uint64_t size = status == AQ_OK ? h.count * aq_dtype_size(h.dtype) : 0;
    uint8_t *raw = NULL;
    float *values = NULL;
    if (status == AQ_OK) {
        raw = aq_alloc(size);
        values = aq_calloc(h.count, sizeof *values);
        p->timesteps = aq_calloc(h.count, sizeof *p->timesteps);
        if (!raw || !values || !p->timesteps) status = aq_fail_memory(err, size, "timesteps");
    }
    if (status == AQ_OK) status = aq_zip_stream_read(s, raw, size, err);
    if (status == AQ_OK) convert(h.dtype, raw, h.count, values);
    for (uint64_t i = 0; status == AQ_OK && values && p->timesteps && i < h.count; i++) {
        if (!(values[i] >= -1) || values[i] > 16777216.0f)
            status = aq_fail_at(err, AQ_ERR_FORMAT, d->path, m->name, "entry %llu is no timestep", (unsigned long long)(i + 1));
        else
            p->timesteps[i] = (int32_t)values[i];
    }
    aq_free(raw);
    aq_free(values);
    aq_zip_stream_close(s);
    return status;
}

static aq_status prepare(aq_dataset *d, numpy *p, const char *member, aq_error *err) {
    aq_status status = read_header(d, p->stream, member, &p->head, err);
    if (status != AQ_OK) return status;
    if (p->head.shape.rank == 0 || p->head.count == 0) return aq_fail_at(err, AQ_ERR_FORMAT, d->path, member, "holds no samples: it is a scalar, or empty");
    d->n_samples = p->head.shape.dims[0];
    p->entry_values = p->head.count / d->n_samples;
    if (p->entry_values > AQ_DATASET_LIMIT_VALUES) return aq_fail_at(err, AQ_ERR_FORMAT, d->path, member, "has entries of more than 2^28 values");
    p->raw = aq_alloc(p->entry_values * aq_dtype_size(p->head.dtype));
    if (!p->raw) return aq_fail_memory(err, p->entry_values, "a sample");
    return aq_dataset_reserve(d, p->entry_values, err);
}

aq_status aq_dataset_open_numpy(aq_dataset *d, bool archive, aq_error *err) {
    static const aq_dataset_reader reader = {next, close_numpy};
    numpy *p = aq_calloc(1, sizeof *p);
    if (!p) return aq_fail_memory(err, sizeof *p, "a data set");
    p->fd = -1;
    d->state = p;
    d->reader = &reader;
    uint64_t size;
    const aq_zip_member *member = NULL;
    aq_status status = aq_file_open(&p->fd, &size, d->path, err);
    if (status == AQ_OK && archive) status = aq_zip_open(&p->zip, p->fd, size, d->path, err);
    if (status == AQ_OK && archive) status = choose_member(d, &p->zip, &member, err);
    if (status == AQ_OK) status = member ? aq_zip_stream_open(&p->stream, &p->zip, member, err) : aq_zip_stream_plain(&p->stream, p->fd, size, d->path, err);
    if (status == AQ_OK) status = prepare(d, p, member ? member->name : NULL, err);
    return status == AQ_OK && archive ? read_timesteps(d, p, err) : status;
}
