/* Second moments (see moment.h): a symmetric rank-k update per block of rows, panels as tasks of the threads. */
#include "calibration/moment.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/cpu.h"
#include "base/file.h"
#include "base/mem.h"
#include "base/size.h"
#include "base/threads.h"
#include "calibration/products.h"
#include "kernels/gemm.h"

#define SPILL_BLOCK_BYTES (UINT64_C(32) << 20) /* rows gathered in one call for a spilled triangle */
enum { SPILL_BLOCK_ROWS = 4096, WHOLE_INPUTS = 512 };
enum { COPY_SHARED = 1 << 17 }; /* values from which on several threads gather rows, each from what it read for the sums */

/* ---- geometry ---- */

static uint64_t panel_height(uint64_t n) { return n <= 512 ? 64 : n <= 2048 ? 128 : 256; }

uint64_t aq_moment_n_panels(uint64_t n) { return aq_div_up(n, panel_height(n)); }

void aq_moment_panel_rows(uint64_t n, uint64_t p, uint64_t *begin, uint64_t *end) {
    uint64_t height = panel_height(n);
    *begin = p * height;
    *end = n - *begin < height ? n : *begin + height;
}

uint64_t aq_moment_panel_size(uint64_t n) { return (n < panel_height(n) ? n : panel_height(n)) * n; }

/* Doubles before panel p: p panels of `height` rows, n, n - height, … wide. */
static uint64_t panel_offset(uint64_t n, uint64_t p) {
    uint64_t height = panel_height(n);
    return p == 0 ? 0 : height * (p * n - height * (p * (p - 1) / 2));
}

static uint64_t triangle_size(uint64_t n) {
    uint64_t last = aq_moment_n_panels(n) - 1, begin, end;
    aq_moment_panel_rows(n, last, &begin, &end);
    return panel_offset(n, last) + (end - begin) * (n - begin);
}

bool aq_moment_cost(uint64_t n, uint64_t *triangle, uint64_t *rows) {
    if (n > UINT32_MAX) return false; /* 8 n^2 fits 64 bits with room */
    *triangle = 8 * triangle_size(n);
    *rows = 4 * n * AQ_MOMENT_ROWS;
    return true;
}

/* Place of row i in the packed triangle. */
static uint64_t packed_offset(uint64_t n, uint64_t i) { return i * n - (i > 0 ? i * (i - 1) / 2 : 0); }

/* ---- the pool ---- */

void aq_moment_pool_init(aq_moment_pool *pool) {
    memset(pool, 0, sizeof *pool);
    pthread_mutex_init(&pool->lock, NULL);
    pool->fd = -1;
}

void aq_moment_pool_free(aq_moment_pool *pool) {
    if (pool->fd >= 0) close(pool->fd);
    aq_free(pool->folder);
    aq_room_empty(&pool->room);
    pthread_mutex_destroy(&pool->lock);
}

/* A file without a name: it is gone with the process, however that ends. */
static aq_status open_spill(aq_moment_pool *pool, aq_error *err) {
    const char *folder = pool->folder ? pool->folder : getenv("TMPDIR");
    if (!folder || !*folder) folder = "/tmp";
    char *path = aq_path_join(folder, "arrowquant-spill-XXXXXX");
    if (!path) return aq_fail_memory(err, 64, "a path");
    pool->fd = mkostemp(path, O_CLOEXEC);
    aq_status status = pool->fd < 0 ? aq_fail_io(err, errno, folder, "cannot create a spill file") : AQ_OK;
    if (pool->fd >= 0) unlink(path);
    aq_free(path);
    return status;
}

/* A place for a triangle, all zero. */
static aq_status reserve_spill(aq_moment *m, aq_moment_pool *pool, aq_error *err) {
    aq_status status = AQ_OK;
    pthread_mutex_lock(&pool->lock);
    if (pool->fd < 0) status = open_spill(pool, err);
    if (status == AQ_OK) {
        uint64_t size = 8 * triangle_size(m->n), end;
        if (!aq_add(pool->end, size, &end) || end > INT64_MAX || ftruncate(pool->fd, (off_t)end) != 0) {
            status = aq_fail_io(err, errno ? errno : EFBIG, pool->folder ? pool->folder : "the temporary folder", "cannot make room for a second moment");
        } else {
            m->spill_at = pool->end;
            pool->end = end;
            m->is_spilled = true;
        }
    }
    pthread_mutex_unlock(&pool->lock);
    return status;
}

static void drop(void *pointer, uint64_t size, aq_moment_pool *pool) {
    if (pointer) atomic_fetch_sub(&pool->held_bytes, size);
    aq_free(pointer);
}

void aq_moment_trim(aq_moment *m, aq_moment_pool *pool) {
    drop(m->rows, 4 * m->n * AQ_MOMENT_ROWS, pool);
    m->rows = NULL;
}

/* The last place in the spill file is free again. */
static void release_spill(aq_moment *m, aq_moment_pool *pool) {
    pthread_mutex_lock(&pool->lock);
    bool is_last = m->is_spilled && pool->end == m->spill_at + 8 * triangle_size(m->n);
    if (is_last && ftruncate(pool->fd, (off_t)m->spill_at) == 0) pool->end = m->spill_at;
    m->is_spilled = false;
    pthread_mutex_unlock(&pool->lock);
}

void aq_moment_free(aq_moment *m, aq_moment_pool *pool) {
    aq_moment_trim(m, pool);
    if (m->is_spilled) release_spill(m, pool);
    drop(m->sum, m->sum ? 8 * triangle_size(m->n) : 0, pool);
    aq_free(m->parts);
    m->sum = NULL;
    m->parts = NULL;
}

/* ---- adding panels ---- */

/* Writes a whole panel back. */
static bool write_all(int fd, const void *data, uint64_t size, uint64_t offset) {
    const uint8_t *at = data;
    while (size > 0) {
        ssize_t n = pwrite(fd, at, size < (1u << 30) ? (size_t)size : 1u << 30, (off_t)offset);
        if (n < 0 && errno == EINTR) continue;
        if (n <= 0) return false;
        at += n;
        offset += (uint64_t)n;
        size -= (uint64_t)n;
    }
    return true;
}

/* Stored E[x x^T] of rows [begin, end) as sums; the corner below the diagonal is zero. */
static void load_stored(const aq_moment *m, uint64_t begin, uint64_t end, double *out) {
    uint64_t width = m->n - begin;
    size_t k = 0;
    memset(out, 0, (size_t)((end - begin) * width * sizeof *out));
    for (uint64_t i = begin; i < end; i++) {
        while (k + 1 < m->n_parts && i >= m->parts[k].row_end) k++;
        const uint8_t *at = m->parts[k].data + 4 * (packed_offset(m->n, i) - packed_offset(m->n, m->parts[k].row_begin));
        double *row = out + (i - begin) * width;
        for (uint64_t j = i; j < m->n; j++, at += 4) {
            float v;
            memcpy(&v, at, sizeof v);
            row[j - begin] = (double)v * (double)m->stored_count;
        }
    }
}

typedef struct {
    aq_moment *m;
    aq_moment_pool *pool;
    /* What is added: products of rows, or the panels of another moment. */
    const float *x;
    uint64_t n_rows, stride;
    const aq_moment *from;
    const aq_moment_pool *from_pool;
    pthread_mutex_t lock; /* of what follows */
    aq_error *err;
    aq_status status;
} addition;

static bool addition_fails(addition *a, const aq_error *err) {
    pthread_mutex_lock(&a->lock);
    if (a->status == AQ_OK) {
        a->status = err->code;
        if (a->err) *a->err = *err;
    }
    pthread_mutex_unlock(&a->lock);
    return false;
}

/* The products of the block's rows for one panel, in F32: the square on the diagonal (its upper half), then what lies right of it. */
static bool multiply(const addition *a, uint64_t begin, uint64_t end, float *out) {
    uint64_t height = end - begin, width = a->m->n - begin;
    aq_matrix_f32 left = {a->x + begin, 1, a->stride}, square = {a->x + begin, a->stride, 1}, right = {a->x + end, a->stride, 1};
    return aq_gemm_f32(height, height, a->n_rows, left, square, out, width, false, AQ_GEMM_SCRATCH, 1) &&
           (width == height || aq_gemm_f32(height, width - height, a->n_rows, left, right, out + height, width, false, AQ_GEMM_FULL, 1));
}

static bool add_panel(void *context, size_t p) {
    addition *a = context;
    aq_moment *m = a->m;
    uint64_t begin, end, n = m->n;
    aq_moment_panel_rows(n, p, &begin, &end);
    uint64_t size = (end - begin) * (n - begin), offset = panel_offset(n, p);
    aq_error err;
    aq_error_clear(&err);
    if (!aq_watch_goes_on(m->watch)) {
        aq_watch_fail(m->layer, &err);
        return addition_fails(a, &err);
    }
    float *products = a->x ? aq_calloc(size, sizeof *products) : NULL;
    double *loaded = m->is_spilled ? aq_alloc(size * sizeof *loaded) : NULL, *buffer = a->from ? aq_alloc(size * sizeof *buffer) : NULL;
    const double *sums = NULL;
    bool ok = (!a->x || products) && (!m->is_spilled || loaded) && (!a->from || buffer);
    if (ok && a->x) ok = multiply(a, begin, end, products);
    if (!ok) aq_fail_memory(&err, size * sizeof *loaded, "a part of a second moment");
    if (ok && a->from) ok = aq_moment_panel(a->from, a->from_pool, p, buffer, &sums, &err) == AQ_OK;
    if (ok && m->is_spilled) ok = aq_file_pread(a->pool->fd, loaded, 8 * size, m->spill_at + 8 * offset, "spill file", &err) == AQ_OK;
    if (ok) {
        double *to = m->is_spilled ? loaded : m->sum + offset;
        for (uint64_t i = begin; i < end; i++) {
            uint64_t first = (i - begin) * (n - begin + 1), last = (i - begin + 1) * (n - begin);
            if (a->x)
                for (uint64_t k = first; k < last; k++) to[k] += (double)products[k];
            else if (sums)
                for (uint64_t k = first; k < last; k++) to[k] += sums[k];
        }
        if (m->is_spilled && !write_all(a->pool->fd, to, 8 * size, m->spill_at + 8 * offset)) {
            aq_fail_io(&err, errno ? errno : ENOSPC, a->pool->folder ? a->pool->folder : "the temporary folder", "cannot write a second moment");
            ok = false;
        }
    }
    aq_free(products);
    aq_free(loaded);
    aq_free(buffer);
    return ok || addition_fails(a, &err);
}

/* ---- narrow layers: whole triangles ---- */

/* All products of one piece of the rows, for a layer so narrow that they fit a thread's cache: its rows are packed once, and by the thread that summed them. */
typedef struct {
    aq_moment *m;
    const float *x;
    uint64_t n_rows, stride, n_pieces, done; /* pieces in all, and those added */
    float *products;                         /* [pieces at once][n, n] */
    size_t at_once;
} whole;

static bool multiply_piece(void *context, size_t at) {
    const whole *w = context;
    uint64_t n = w->m->n, piece = w->done + at, begin = w->n_rows * piece / w->n_pieces, end = w->n_rows * (piece + 1) / w->n_pieces;
    const float *x = w->x + begin * w->stride;
    float *out = w->products + at * n * n;
    memset(out, 0, (size_t)(n * n * sizeof *out));
    return aq_gemm_f32(n, n, end - begin, (aq_matrix_f32){x, 1, w->stride}, (aq_matrix_f32){x, w->stride, 1}, out, n, false, AQ_GEMM_SCRATCH, 1);
}

static bool add_products(void *context, size_t p) {
    const whole *w = context;
    uint64_t begin, end, n = w->m->n;
    aq_moment_panel_rows(n, p, &begin, &end);
    for (uint64_t i = begin; i < end; i++) {
        double *to = w->m->sum + panel_offset(n, p) + (i - begin) * (n - begin + 1);
        for (size_t at = 0; at < w->at_once; at++) {
            const float *from = w->products + at * n * n + i * n + i;
            for (uint64_t j = 0; j < n - i; j++) to[j] += (double)from[j];
        }
    }
    return true;
}

/* Gives the triangle its place, with what the stored form holds. */
static aq_status settle(aq_moment *m, aq_moment_pool *pool, aq_error *err) {
    aq_status status = aq_moment_check(m, err);
    if (status != AQ_OK || m->sum || m->is_spilled) return status;
    if (m->spilled) {
        status = reserve_spill(m, pool, err);
        if (status != AQ_OK) return status;
    } else {
        uint64_t size = triangle_size(m->n);
        m->sum = aq_calloc(size, sizeof *m->sum);
        if (!m->sum) return aq_fail_memory(err, 8 * size, "a second moment");
        atomic_fetch_add(&pool->held_bytes, 8 * size);
    }
    if (!m->parts) return AQ_OK;
    /* The stored rows count as another moment that is added. */
    aq_moment stored = {.n = m->n, .stored_count = m->stored_count, .parts = m->parts, .n_parts = m->n_parts};
    addition a = {.m = m, .pool = pool, .from = &stored, .from_pool = pool, .err = err, .lock = PTHREAD_MUTEX_INITIALIZER};
    aq_parallel_for(aq_moment_n_panels(m->n), 1, add_panel, &a);
    if (a.status != AQ_OK) m->is_broken = true;
    if (a.status != AQ_OK) return a.status;
    aq_free(m->parts);
    m->parts = NULL;
    m->n_parts = 0;
    return AQ_OK;
}

/* Threads worth using for n_rows rows: about 20 million multiplications each, ten times the cost of starting one; those that stand ready, a tenth. */
static int threads_for(uint64_t n, uint64_t n_rows, int n_threads) {
    uint64_t most = (uint64_t)aq_cpu_threads(n_threads), worth = n_rows * n / 1000 * n / (aq_threads_ready() ? 2000 : 20000);
    return worth < 2 ? 1 : (int)(worth < most ? worth : most);
}

static double *triangle_row(const void *context, uint64_t i) {
    const aq_moment *m = context;
    uint64_t p = i / panel_height(m->n), begin = p * panel_height(m->n);
    return m->sum + panel_offset(m->n, p) + (i - begin) * (m->n - begin) - begin;
}

/* The rows of one block. */
static aq_status add_rows(aq_moment *m, aq_moment_pool *pool, const float *x, uint64_t n_rows, uint64_t stride, int n_threads, aq_error *err) {
    aq_status status = settle(m, pool, err);
    if (status != AQ_OK) return status;
    int threads = threads_for(m->n, n_rows, n_threads);
    if (!m->is_spilled) {
        if (!aq_products_add(x, n_rows, stride, m->n, triangle_row, m, &pool->room, m->watch, threads))
            status = aq_watch_goes_on(m->watch) ? aq_fail_memory(err, 8 * m->n * n_rows, "products of rows") : aq_watch_fail(m->layer, err);
    } else {
        addition a = {.m = m, .pool = pool, .x = x, .n_rows = n_rows, .stride = stride, .err = err, .lock = PTHREAD_MUTEX_INITIALIZER};
        aq_parallel_for(aq_moment_n_panels(m->n), threads, add_panel, &a);
        status = a.status;
    }
    if (status != AQ_OK) m->is_broken = true;
    return status;
}

/* Rows of one call, any number: pieces of at most a block, cut evenly. Where there are threads for all of them, or but one thread, each is one task. */
static aq_status add_directly(aq_moment *m, aq_moment_pool *pool, const float *x, uint64_t n_rows, uint64_t stride, int n_threads, aq_error *err) {
    uint64_t n = m->n, threads = (uint64_t)threads_for(n, n_rows, n_threads);
    whole w = {.m = m, .x = x, .n_rows = n_rows, .stride = stride, .n_pieces = aq_div_up(n_rows, AQ_MOMENT_ROWS)};
    aq_status status = settle(m, pool, err);
    if (status == AQ_OK && n <= WHOLE_INPUTS && !(w.products = aq_room_take(&pool->room, threads * n * n * sizeof *w.products)))
        status = aq_fail_memory(err, 4 * threads * n * n, "products of rows");
    while (status == AQ_OK && w.done < w.n_pieces) {
        uint64_t left = w.n_pieces - w.done;
        if (!aq_watch_goes_on(m->watch)) {
            status = aq_watch_fail(m->layer, err);
        } else if (w.products && left >= threads) {
            w.at_once = (size_t)threads;
            if (!aq_parallel_for(w.at_once, (int)threads, multiply_piece, &w))
                status = aq_fail_memory(err, 4 * threads * n * n, "products of rows");
            else
                aq_parallel_for(aq_moment_n_panels(n), (int)threads, add_products, &w);
            w.done += threads;
        } else {
            uint64_t begin = n_rows * w.done / w.n_pieces, end = n_rows * ++w.done / w.n_pieces;
            status = add_rows(m, pool, x + begin * stride, end - begin, stride, n_threads, err);
        }
    }
    if (status != AQ_OK) m->is_broken = true;
    aq_room_give(&pool->room, w.products);
    return status;
}

/* ---- rows ---- */

/* Rows of a block: fixed in memory; for a spilled triangle, whose panels go through the disk, as many as fit a bounded buffer. */
static uint64_t block_rows(const aq_moment *m) {
    if (!m->spilled) return AQ_MOMENT_ROWS;
    uint64_t most = SPILL_BLOCK_BYTES / (4 * m->n);
    return most < AQ_MOMENT_ROWS ? AQ_MOMENT_ROWS : most < SPILL_BLOCK_ROWS ? most : SPILL_BLOCK_ROWS;
}

aq_status aq_moment_flush(aq_moment *m, aq_moment_pool *pool, int n_threads, aq_error *err) {
    if (m->n_rows == 0) return AQ_OK;
    aq_status status = settle(m, pool, err);
    if (status != AQ_OK) return status; /* the rows are still there */
    uint64_t n_rows = m->n_rows;
    m->n_rows = 0;
    return add_rows(m, pool, m->rows, n_rows, m->n, n_threads, err);
}

/* Rows of a call from which on it is cheaper to add their products to the triangle than to keep the rows until there are more. */
static uint64_t worth_at_once(uint64_t n) { return n >= 4 * (AQ_MOMENT_ROWS - 64) ? AQ_MOMENT_ROWS : 64 + n / 4; }

typedef struct {
    const float *x;
    uint64_t stride, n, n_spans, n_rows, at[AQ_MOMENT_ROWS];
    float *to;
} copies;

static bool copy_span(void *context, size_t span) {
    const copies *c = context;
    for (uint64_t i = c->n_rows * span / c->n_spans; i < c->n_rows * (span + 1) / c->n_spans; i++)
        memcpy(c->to + i * c->n, c->x + c->at[i] * c->stride, (size_t)(c->n * sizeof *c->to));
    return true;
}

/* Rows `at` of x, as many as there is room for at most, to those that wait. */
static aq_status gather(aq_moment *m, aq_moment_pool *pool, copies *c, int n_threads, aq_error *err) {
    aq_status full = m->n_rows == AQ_MOMENT_ROWS ? aq_moment_flush(m, pool, n_threads, err) : AQ_OK; /* an earlier call had no memory for its block */
    if (full != AQ_OK) return full;
    if (!m->rows) {
        m->rows = aq_alloc(4 * m->n * AQ_MOMENT_ROWS);
        if (!m->rows) return aq_fail_memory(err, 4 * m->n * AQ_MOMENT_ROWS, "gathered rows");
        atomic_fetch_add(&pool->held_bytes, 4 * m->n * AQ_MOMENT_ROWS);
    }
    c->to = m->rows + m->n_rows * m->n;
    c->n_spans = aq_threads_ready() && c->n_rows * m->n >= COPY_SHARED ? (uint64_t)aq_cpu_threads(n_threads) : 1;
    aq_parallel_for(c->n_spans, (int)c->n_spans, copy_span, c);
    m->n_rows += c->n_rows;
    m->count += c->n_rows;
    return m->n_rows == AQ_MOMENT_ROWS ? aq_moment_flush(m, pool, n_threads, err) : AQ_OK;
}

/* Of the b-th run of `every` rows the one at floor(every * frac(b * golden ratio)) is taken: as many of each remainder, with no beat against rows that
 * repeat (the tokens of a sample). */
static uint64_t chosen(uint64_t b, uint64_t every) { return (uint64_t)(((unsigned __int128)(b * UINT64_C(0x9E3779B97F4A7C15)) * every) >> 64); }

aq_status aq_moment_add(aq_moment *m, aq_moment_pool *pool, const float *x, uint64_t n_rows, uint64_t stride, uint64_t every, int n_threads, aq_error *err) {
    aq_status status = AQ_OK;
    uint64_t i = 0, block = block_rows(m);
    copies c = {.x = x, .stride = stride, .n = m->n};
    while (status == AQ_OK && i < n_rows) {
        uint64_t room = AQ_MOMENT_ROWS - m->n_rows % AQ_MOMENT_ROWS;
        c.n_rows = 0;
        if (every > 1) {
            while (c.n_rows < room) {
                uint64_t b = (m->n_offered + i) / every, at = b * every + chosen(b, every);
                if (at < m->n_offered + i) at = (b + 1) * every + chosen(b + 1, every);
                i = at - m->n_offered;
                if (i >= n_rows) break;
                c.at[c.n_rows++] = i++;
            }
            if (c.n_rows > 0) status = gather(m, pool, &c, n_threads, err);
        } else if (!m->spilled && n_rows >= worth_at_once(m->n)) {
            status = add_directly(m, pool, x, n_rows, stride, n_threads, err);
            if (status == AQ_OK) m->count += n_rows;
            i = n_rows;
        } else if (m->n_rows == 0 && (n_rows - i >= block || m->spilled)) {
            uint64_t k = n_rows - i < block ? n_rows - i : block;
            status = add_rows(m, pool, x + i * stride, k, stride, n_threads, err);
            if (status == AQ_OK) m->count += k;
            i += k;
        } else {
            while (c.n_rows < room && i < n_rows) c.at[c.n_rows++] = i++;
            status = gather(m, pool, &c, n_threads, err);
        }
    }
    m->n_offered += n_rows;
    return status;
}

aq_status aq_moment_merge(aq_moment *into, aq_moment_pool *pool, const aq_moment *from, aq_moment_pool *from_pool, aq_error *err) {
    if (from->count == 0) into->n_offered += from->n_offered;
    if (from->count == 0) return AQ_OK;
    aq_status status = aq_moment_check(from, err);
    if (status == AQ_OK) status = settle(into, pool, err);
    if (status != AQ_OK) return status;
    addition a = {.m = into, .pool = pool, .from = from, .from_pool = from_pool, .err = err, .lock = PTHREAD_MUTEX_INITIALIZER};
    aq_parallel_for(aq_moment_n_panels(into->n), 1, add_panel, &a);
    into->count += from->count;
    into->n_offered += from->n_offered;
    if (a.status != AQ_OK) into->is_broken = true;
    return a.status;
}

/* ---- reading ---- */

aq_status aq_moment_check(const aq_moment *m, aq_error *err) {
    if (m->is_broken) return aq_fail(err, AQ_ERR_MEMORY, "a second moment is not complete: memory or disk space ran out while it was added to");
    if (!m->parts || atomic_load(&m->is_checked)) return AQ_OK;
    for (size_t k = 0; k < m->n_parts; k++) {
        const aq_moment_part *part = &m->parts[k];
        char hash[33];
        uint64_t size = 4 * (packed_offset(m->n, part->row_end) - packed_offset(m->n, part->row_begin));
        aq_xxh3_hex(part->data, size, hash);
        if (!AQ_HASHES_IGNORED && strcmp(hash, part->hash) != 0)
            return aq_fail_at(err, AQ_ERR_FORMAT, m->file, m->layer, "its second moment is damaged: the bytes do not match their hash");
        for (uint64_t i = 0; i < size; i += 4) { /* from a hostile writer the hash may be right */
            uint32_t bits;
            memcpy(&bits, part->data + i, sizeof bits);
            if ((bits & 0x7F800000) == 0x7F800000)
                return aq_fail_at(err, AQ_ERR_QUALITY, m->file, m->layer, "its second moment holds a value that is not finite");
        }
    }
    atomic_store(&((aq_moment *)(uintptr_t)m)->is_checked, true);
    return AQ_OK;
}

aq_status aq_moment_panel(const aq_moment *m, const aq_moment_pool *pool, uint64_t p, double *buffer, const double **out, aq_error *err) {
    uint64_t begin, end, offset = panel_offset(m->n, p);
    aq_moment_panel_rows(m->n, p, &begin, &end);
    *out = buffer;
    if (m->sum) {
        *out = m->sum + offset;
    } else if (m->is_spilled) {
        return aq_file_pread(pool->fd, buffer, 8 * (end - begin) * (m->n - begin), m->spill_at + 8 * offset, "spill file", err);
    } else {
        load_stored(m, begin, end, buffer);
    }
    return AQ_OK;
}
