/* Figures that an earlier run measured, by the content they were measured on.
 *
 * One file, `measured.aqplan`: "AQPLAN1\n", then records of key (16 bytes), number of figures (u32), the figures (f64), XXH3-64 of the record; little-endian.
 * A cache is never needed: what is damaged, or longer than MOST_BYTES, counts as not there. It is read whole, and written whole and atomically, so that of two
 * runs at once the later one's file stays. */
#include <jansson.h>
#include <pthread.h>
#include <string.h>
#include <xxhash.h>

#include "base/error.h"
#include "base/file.h"
#include "base/mem.h"
#include "plan/plan_internal.h"

#define MOST_BYTES (UINT64_C(256) << 20)
static const char magic[8] = "AQPLAN1\n";
enum { KEY = 32, MOST_FIGURES = 1 << 16 };

typedef struct {
    char key[KEY + 1];
    double *figures;
    uint32_t n;
} record;

struct aq_plan_cache {
    char *path;
    record *records;
    size_t n, capacity;
    json_t *index; /* key -> number */
    bool changed;
};

static record *lookup(const aq_plan_cache *c, const char *key) {
    const json_t *at = json_object_get(c->index, key);
    return at ? &c->records[json_integer_value(at)] : NULL;
}

bool aq_plan_cache_find(const aq_plan_cache *cache, const char *key, double *figures, size_t n) {
    const record *r = cache ? lookup(cache, key) : NULL;
    if (!r || r->n != n) return false;
    memcpy(figures, r->figures, n * sizeof *figures);
    return true;
}

static aq_status put(aq_plan_cache *c, const char *key, const void *figures, uint32_t n, aq_error *err) {
    record *r = lookup(c, key);
    double *copy = aq_alloc((uint64_t)n * sizeof *copy);
    if (!copy) return aq_fail_memory(err, n * sizeof *copy, "the planner's cache");
    memcpy(copy, figures, n * sizeof *copy);
    if (!r) {
        if (c->n == c->capacity) {
            size_t capacity = c->capacity ? 2 * c->capacity : 256;
            record *more = aq_realloc(c->records, capacity, sizeof *more);
            if (!more) {
                aq_free(copy);
                return aq_fail_memory(err, capacity * sizeof *more, "the planner's cache");
            }
            c->records = more;
            c->capacity = capacity;
        }
        if (json_object_set_new(c->index, key, json_integer((json_int_t)c->n)) != 0) {
            aq_free(copy);
            return aq_fail_memory(err, 0, "the planner's cache");
        }
        r = &c->records[c->n++];
        *r = (record){0}; /* NOLINT(clang-analyzer-core.NullDereference): there is room */
        memcpy(r->key, key, KEY);
    }
    aq_free(r->figures);
    r->figures = copy;
    r->n = n;
    return AQ_OK;
}

aq_status aq_plan_cache_add(aq_plan_cache *cache, const char *key, const double *figures, size_t n, aq_error *err) {
    if (!cache || n > MOST_FIGURES) return AQ_OK;
    cache->changed = true;
    return put(cache, key, figures, (uint32_t)n, err);
}

/* Takes what is sound from the front of the file. */
static aq_status parse(aq_plan_cache *c, const uint8_t *data, uint64_t size, aq_error *err) {
    if (size < sizeof magic || memcmp(data, magic, sizeof magic) != 0) return AQ_OK;
    for (uint64_t at = sizeof magic; size - at >= KEY + 12;) {
        uint32_t n;
        uint64_t hash;
        char key[KEY + 1] = {0};
        memcpy(key, data + at, KEY);
        memcpy(&n, data + at + KEY, 4);
        uint64_t body = KEY + 4 + (uint64_t)n * 8;
        if (n > MOST_FIGURES || size - at < body + 8) return AQ_OK;
        memcpy(&hash, data + at + body, 8);
        if (hash != XXH3_64bits(data + at, body) || strspn(key, "0123456789abcdef") != KEY) return AQ_OK;
        aq_status status = put(c, key, data + at + KEY + 4, n, err);
        if (status != AQ_OK) return status;
        at += body + 8;
    }
    return AQ_OK;
}

static void free_cache(aq_plan_cache *c) {
    for (size_t i = 0; i < c->n; i++) aq_free(c->records[i].figures);
    aq_free(c->records);
    json_decref(c->index);
    aq_free(c->path);
    aq_free(c);
}

aq_status aq_plan_cache_open(aq_plan_cache **out, const char *dir, aq_error *err) {
    *out = NULL;
    aq_status status = aq_make_dirs(dir, err);
    if (status != AQ_OK) return status;
    aq_plan_cache *c = aq_calloc(1, sizeof *c);
    if (!c) return aq_fail_memory(err, sizeof *c, "the planner's cache");
    c->index = json_object();
    c->path = aq_path_join(dir, "measured.aqplan");
    if (!c->index || !c->path) {
        free_cache(c);
        return aq_fail_memory(err, 0, "the planner's cache");
    }
    char *data = NULL;
    uint64_t size;
    if (aq_file_read(&data, &size, c->path, MOST_BYTES, NULL) == AQ_OK) status = parse(c, (const uint8_t *)data, size, err);
    aq_free(data);
    if (status == AQ_OK)
        *out = c;
    else
        free_cache(c);
    return status;
}

static uint8_t *serialize(const aq_plan_cache *c, uint64_t *size) {
    *size = sizeof magic;
    for (size_t i = 0; i < c->n; i++) *size += KEY + 12 + (uint64_t)c->records[i].n * 8;
    uint8_t *data = *size <= MOST_BYTES ? aq_alloc(*size) : NULL, *at = data;
    if (!data) return NULL;
    memcpy(at, magic, sizeof magic);
    at += sizeof magic;
    for (size_t i = 0; i < c->n; i++) {
        const record *r = &c->records[i];
        uint64_t body = KEY + 4 + (uint64_t)r->n * 8;
        memcpy(at, r->key, KEY);
        memcpy(at + KEY, &r->n, 4);
        memcpy(at + KEY + 4, r->figures, (uint64_t)r->n * 8);
        uint64_t hash = XXH3_64bits(at, body);
        memcpy(at + body, &hash, 8);
        at += body + 8;
    }
    return data;
}

aq_status aq_plan_cache_close(aq_plan_cache *cache, bool write, aq_error *err) {
    if (!cache) return AQ_OK;
    aq_status status = AQ_OK;
    if (write && cache->changed) {
        uint64_t size;
        uint8_t *data = serialize(cache, &size);
        if (data) status = aq_file_write(cache->path, data, size, err); /* one that is too large stays as it was */
        aq_free(data);
    }
    free_cache(cache);
    return status;
}
