/* The journal (see journal.h). A record on disk: "AQJ1", u32 payload size, u32 XXH32 of these 8 bytes, u64 XXH3-64 of the payload, payload.
 * All numbers little-endian. The first sum tells a damaged size from a record that was cut off. */
#include "store/journal.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include <xxhash.h>

#include "base/file.h"
#include "base/mem.h"
#include "base/size.h"

enum { HEAD = 20, KIND_START = 1, KIND_CHECKPOINT = 2, KIND_FINAL = 3 };
#define JOURNAL_LIMIT (UINT64_C(8) << 30)

void (*aq_store_step)(const char *step) = NULL;

static void step(const char *what) {
    if (aq_store_step) aq_store_step(what);
}

/* ---- growing payload ---- */

typedef struct {
    uint8_t *data;
    uint64_t size, cap;
    bool failed;
} payload;

static void put(payload *p, const void *data, uint64_t n) {
    uint64_t need;
    if (p->failed || !aq_add(p->size, n, &need)) {
        p->failed = true;
        return;
    }
    if (need > p->cap) {
        uint64_t cap = need < 2 * p->cap ? 2 * p->cap : need;
        uint8_t *grown = aq_realloc(p->data, cap, 1);
        if (!grown) {
            p->failed = true;
            return;
        }
        p->data = grown;
        p->cap = cap;
    }
    if (n) memcpy(p->data + p->size, data, (size_t)n);
    p->size += n;
}

static void put_u64(payload *p, uint64_t v) {
    uint8_t b[8];
    for (int i = 0; i < 8; i++) b[i] = (uint8_t)(v >> 8 * i);
    put(p, b, 8);
}

static void put_f64(payload *p, double v) {
    uint64_t u;
    memcpy(&u, &v, 8);
    put_u64(p, u);
}

/* Size + 1, then the text; 0 for NULL. */
static void put_text(payload *p, const char *text) {
    put_u64(p, text ? strlen(text) + 1 : 0);
    if (text) put(p, text, strlen(text));
}

/* ---- reading a payload ---- */

typedef struct {
    const uint8_t *data;
    uint64_t left;
    bool failed;
} cursor;

static const uint8_t *get(cursor *c, uint64_t n) {
    if (c->failed || n > c->left) {
        c->failed = true;
        return NULL;
    }
    const uint8_t *p = c->data;
    c->data += n;
    c->left -= n;
    return p;
}

static uint64_t load_u64(const uint8_t *p) {
    uint64_t v = 0;
    for (int i = 7; i >= 0; i--) v = v << 8 | p[i];
    return v;
}

static uint32_t load_u32(const uint8_t *p) { return (uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24; }

static uint64_t get_u64(cursor *c) {
    const uint8_t *p = get(c, 8);
    return p ? load_u64(p) : 0;
}

static double get_f64(cursor *c) {
    uint64_t u = get_u64(c);
    double v;
    memcpy(&v, &u, 8);
    return v;
}

static char *get_text(cursor *c) {
    uint64_t n = get_u64(c);
    if (n == 0) return NULL;
    const uint8_t *p = get(c, n - 1);
    char *text = p ? aq_alloc(n) : NULL;
    if (!text) {
        c->failed = true;
        return NULL;
    }
    memcpy(text, p, (size_t)(n - 1));
    text[n - 1] = 0;
    return text;
}

/* ---- records ---- */

static aq_status append(aq_journal *j, payload *p, aq_error *err) {
    uint8_t head[HEAD] = {'A', 'Q', 'J', '1'};
    if (p->failed || p->size > UINT32_MAX) {
        aq_free(p->data);
        return aq_fail_memory(err, p->size, "the journal");
    }
    for (int i = 0; i < 4; i++) head[4 + i] = (uint8_t)(p->size >> 8 * i);
    uint32_t head_sum = XXH32(head, 8, 0);
    uint64_t sum = XXH3_64bits(p->data, (size_t)p->size);
    for (int i = 0; i < 4; i++) head[8 + i] = (uint8_t)(head_sum >> 8 * i);
    for (int i = 0; i < 8; i++) head[12 + i] = (uint8_t)(sum >> 8 * i);
    aq_status status = aq_fd_write(j->fd, head, HEAD, j->path, err);
    step("half a journal record");
    if (status == AQ_OK) status = aq_fd_write(j->fd, p->data, p->size, j->path, err);
    if (status == AQ_OK && fsync(j->fd) != 0) status = aq_fail_io(err, errno, j->path, "cannot sync");
    step("journal record");
    aq_free(p->data);
    return status;
}

static void free_done(aq_done_record *d) {
    aq_free(d->name);
    aq_free(d->quant_type);
    aq_free(d->method);
    aq_free(d->fallback_from);
    aq_free(d->compared_with);
}

/* Takes the record, also on failure. */
static bool keep_done(aq_journal *j, aq_done_record *d) {
    if (j->n_done == j->done_cap) {
        uint64_t cap = j->done_cap ? 2 * j->done_cap : 64;
        aq_done_record *done = aq_realloc(j->done, cap, sizeof *done);
        if (!done) {
            free_done(d);
            return false;
        }
        j->done = done;
        j->done_cap = cap;
    }
    d->quality.method = d->method;
    d->quality.fallback_from = d->fallback_from;
    d->quality.compared_with = d->compared_with;
    j->done[j->n_done++] = *d;
    return true;
}

static void put_done(payload *p, const aq_done_record *d) {
    put_text(p, d->name);
    put_text(p, d->quant_type);
    put_text(p, d->method);
    put_text(p, d->fallback_from);
    put_text(p, d->compared_with);
    put_u64(p, d->quantized);
    put_u64(p, (uint64_t)d->spec.bits);
    put_u64(p, d->spec.group_size);
    put_u64(p, (uint64_t)d->spec.axis);
    put_u64(p, (uint64_t)d->spec.params);
    put_u64(p, (uint64_t)d->spec.method);
    put_u64(p, d->spec.symmetric);
    put_u64(p, d->row_begin);
    put_u64(p, d->row_count);
    put_f64(p, d->quality.cosine);
    put_f64(p, d->quality.sqnr_db);
    put_f64(p, d->quality.output_sqnr_db);
}

static bool get_done(aq_journal *j, cursor *c) {
    aq_done_record d = {0};
    d.name = get_text(c);
    d.quant_type = get_text(c);
    d.method = get_text(c);
    d.fallback_from = get_text(c);
    d.compared_with = get_text(c);
    d.quantized = get_u64(c) != 0;
    d.spec.bits = (int)get_u64(c);
    d.spec.group_size = get_u64(c);
    d.spec.axis = (int)get_u64(c);
    d.spec.params = (aq_params_form)get_u64(c);
    d.spec.method = (aq_method)get_u64(c);
    d.spec.symmetric = get_u64(c) != 0;
    d.row_begin = get_u64(c);
    d.row_count = get_u64(c);
    d.quality.cosine = get_f64(c);
    d.quality.sqnr_db = get_f64(c);
    d.quality.output_sqnr_db = get_f64(c);
    if (c->failed || !d.name || !d.quant_type) {
        free_done(&d);
        return false;
    }
    return keep_done(j, &d);
}

static bool parse_checkpoint(aq_journal *j, cursor *c) {
    uint64_t file_index = get_u64(c);
    j->file_closed = get_u64(c) != 0;
    j->data_end = get_u64(c);
    j->file_bytes = get_u64(c);
    j->row_groups = get_u64(c);
    uint64_t footer_size = get_u64(c);
    const uint8_t *footer = get(c, footer_size);
    uint64_t n = get_u64(c);
    if (c->failed || file_index == 0 || file_index > UINT32_MAX) return false;
    aq_free(j->footer);
    j->footer = aq_alloc(footer_size);
    if (!j->footer) return false;
    memcpy(j->footer, footer, (size_t)footer_size);
    j->footer_size = footer_size;
    j->file_index = (uint32_t)file_index;
    for (uint64_t i = 0; i < n; i++)
        if (!get_done(j, c)) return false;
    j->n_durable = j->n_done;
    return true;
}

static bool parse_record(aq_journal *j, const uint8_t *data, uint64_t size, bool first) {
    cursor c = {data, size, false};
    uint64_t kind = get_u64(&c);
    if (first != (kind == KIND_START)) return false;
    if (kind == KIND_START) {
        j->fingerprint = get_text(&c);
        if (!j->fingerprint) return false;
    } else if (kind == KIND_CHECKPOINT) {
        if (!parse_checkpoint(j, &c)) return false;
    } else if (kind == KIND_FINAL) {
        const uint8_t *sha = get(&c, 64);
        if (!sha) return false;
        memcpy(j->final_sha256, sha, 64);
    } else {
        return false;
    }
    return !c.failed && c.left == 0;
}

/* Reads all complete records; *end is where they end. */
static aq_status parse(aq_journal *j, const uint8_t *text, uint64_t size, uint64_t *end, aq_error *err) {
    uint64_t at = 0;
    while (size - at >= HEAD) {
        const uint8_t *head = text + at, *data = head + HEAD;
        uint64_t n = load_u32(head + 4);
        bool head_intact = memcmp(head, "AQJ1", 4) == 0 && XXH32(head, 8, 0) == load_u32(head + 8);
        if (head_intact && n > size - at - HEAD) break; /* cut off while it was written */
        bool intact = head_intact && XXH3_64bits(data, (size_t)n) == load_u64(head + 12);
        if (!intact && head_intact && at > 0 && n == size - at - HEAD) break; /* power was lost before the last record's data arrived */
        if (!intact || !parse_record(j, data, n, at == 0)) {
            aq_fail_at(err, AQ_ERR_USAGE, j->path, NULL, "the state of the interrupted run is damaged at byte %llu", (unsigned long long)at);
            aq_hint(err, "--restart discards it and starts over");
            return AQ_ERR_USAGE;
        }
        at += HEAD + n;
    }
    *end = at;
    return AQ_OK;
}

aq_status aq_journal_create(aq_journal *j, const char *path, const char *fingerprint, aq_error *err) {
    memset(j, 0, sizeof *j);
    j->fd = -1;
    j->path = aq_strdup(path);
    j->fingerprint = aq_strdup(fingerprint);
    if (!j->path || !j->fingerprint) return aq_fail_memory(err, strlen(path), "the journal");
    j->fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    if (j->fd < 0) return aq_fail_io(err, errno, path, "cannot create");
    payload p = {0};
    put_u64(&p, KIND_START);
    put_text(&p, fingerprint);
    return append(j, &p, err);
}

aq_status aq_journal_open(aq_journal *j, const char *path, bool *empty, aq_error *err) {
    memset(j, 0, sizeof *j);
    j->fd = -1;
    *empty = true;
    if (!aq_path_exists(path)) return AQ_OK;
    char *text;
    uint64_t size, end = 0;
    aq_status status = aq_file_read(&text, &size, path, JOURNAL_LIMIT, err);
    if (status != AQ_OK) return status;
    j->path = aq_strdup(path);
    status = j->path ? parse(j, (const uint8_t *)text, size, &end, err) : aq_fail_memory(err, size, "the journal");
    aq_free(text);
    if (status != AQ_OK) return status;
    *empty = end == 0;
    if (*empty) return AQ_OK;
    j->fd = open(path, O_WRONLY | O_CLOEXEC);
    if (j->fd < 0) return aq_fail_io(err, errno, path, "cannot open");
    if (ftruncate(j->fd, (off_t)end) != 0 || lseek(j->fd, (off_t)end, SEEK_SET) < 0) return aq_fail_io(err, errno, path, "cannot continue");
    return AQ_OK;
}

void aq_journal_close(aq_journal *j) {
    if (j->path && j->fd >= 0) close(j->fd);
    for (uint64_t i = 0; i < j->n_done; i++) free_done(&j->done[i]);
    aq_free(j->done);
    aq_free(j->path);
    aq_free(j->fingerprint);
    aq_free(j->footer);
    memset(j, 0, sizeof *j);
    j->fd = -1;
}

aq_status aq_journal_remember(aq_journal *j, const aq_store_record *r, aq_error *err) {
    aq_done_record d = {.quantized = r->quantized, .row_begin = r->row_begin, .row_count = r->row_count, .quality = r->quality};
    if (r->quantized) d.spec = r->spec;
    d.name = aq_strdup(r->name);
    d.quant_type = aq_strdup(r->quant_type);
    if (r->quality.method) d.method = aq_strdup(r->quality.method);
    if (r->quality.fallback_from) d.fallback_from = aq_strdup(r->quality.fallback_from);
    if (r->quality.compared_with) d.compared_with = aq_strdup(r->quality.compared_with);
    if (!d.name || !d.quant_type || (r->quality.method && !d.method) || (r->quality.fallback_from && !d.fallback_from) ||
        (r->quality.compared_with && !d.compared_with)) {
        free_done(&d);
        return aq_fail_memory(err, sizeof d, "the journal");
    }
    return keep_done(j, &d) ? AQ_OK : aq_fail_memory(err, sizeof d, "the journal");
}

aq_status aq_journal_checkpoint(aq_journal *j, uint32_t file_index, bool file_closed, uint64_t data_end, uint64_t file_bytes, uint64_t row_groups,
                                uint8_t *footer, uint64_t footer_size, aq_error *err) {
    payload p = {0};
    put_u64(&p, KIND_CHECKPOINT);
    put_u64(&p, file_index);
    put_u64(&p, file_closed);
    put_u64(&p, data_end);
    put_u64(&p, file_bytes);
    put_u64(&p, row_groups);
    put_u64(&p, footer_size);
    put(&p, footer, footer_size);
    put_u64(&p, j->n_done - j->n_durable);
    for (uint64_t i = j->n_durable; i < j->n_done; i++) put_done(&p, &j->done[i]);
    aq_free(j->footer);
    j->footer = footer;
    j->footer_size = footer_size;
    j->file_index = file_index;
    j->file_closed = file_closed;
    j->data_end = data_end;
    aq_status status = append(j, &p, err);
    if (status == AQ_OK) j->n_durable = j->n_done;
    return status;
}

aq_status aq_journal_final(aq_journal *j, const char sha256[65], aq_error *err) {
    payload p = {0};
    put_u64(&p, KIND_FINAL);
    put(&p, sha256, 64);
    return append(j, &p, err);
}
