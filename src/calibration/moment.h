/* The second moment of a layer's inputs, H = sum of x x^T, in one of four places: nowhere yet, in memory, in a spill file, or in the file that the collection
 * was read from.
 *
 * Only the upper triangle is kept, as panels: panel p holds rows [p P, (p + 1) P) from column p P on, so that each is a plain matrix for aq_gemm_f32. Rows
 * are gathered until a block is full; its products are summed in F32 in a scratch panel, and the panel is added in double. A spilled triangle is read and
 * written panel by panel, and never stands in memory as a whole.
 */
#ifndef AQ_CALIBRATION_MOMENT_H
#define AQ_CALIBRATION_MOMENT_H

#include <pthread.h>
#include <stdatomic.h>

#include "base/room.h"
#include "base/error.h"

enum { AQ_MOMENT_ROWS = 512 }; /* rows of a full block in memory */

/* What all moments of a collection share: the spill file (opened when first needed, without a name) and the count of bytes held. */
typedef struct aq_moment_pool {
    pthread_mutex_t lock;
    char *folder; /* of the spill file */
    int fd;       /* -1: not open yet */
    uint64_t end; /* first free byte */
    _Atomic uint64_t held_bytes;
    aq_room room; /* for what a call works with */
} aq_moment_pool;

/* A part of a stored triangle: rows [row_begin, row_end) of E[x x^T], packed, F32, little-endian. */
typedef struct aq_moment_part {
    const uint8_t *data; /* in the map of the file */
    uint64_t row_begin, row_end;
    char hash[33]; /* XXH3-128 of the bytes */
} aq_moment_part;

/* Whether a long call is to go on: asked by its tasks, but on the thread of the call alone. */
typedef struct aq_watch {
    bool (*keep_going)(void *user);
    void *user;
    pthread_t thread;
    atomic_bool stopped;
} aq_watch;
bool aq_watch_goes_on(aq_watch *watch); /* NULL: always */
aq_status aq_watch_fail(const char *layer, aq_error *err);

typedef struct aq_moment {
    uint64_t n;         /* inputs */
    uint64_t count;     /* rows so far, the gathered ones included */
    uint64_t n_offered; /* rows offered, of which every so-many-th is taken */
    bool is_broken;     /* an addition failed half-way: it cannot be used any more */
    bool spilled;       /* the triangle belongs into the spill file */
    bool is_spilled;    /* and is there, at spill_at */
    uint64_t spill_at;  /* byte in the spill file */
    double *sum;        /* panels in memory, or NULL */
    float *rows;        /* gathered rows [n_rows, n] */
    uint64_t n_rows;
    aq_moment_part *parts; /* stored form; NULL when there is none or it was changed since */
    size_t n_parts;
    uint64_t stored_count;    /* rows in the stored form */
    const char *file, *layer; /* of the stored form, for messages */
    atomic_bool is_checked;   /* the parts were compared with their hashes */
    aq_watch *watch;          /* of the one call that it is for (stage.c), or NULL */
} aq_moment;

void aq_moment_pool_init(aq_moment_pool *pool);
void aq_moment_pool_free(aq_moment_pool *pool);

void aq_moment_free(aq_moment *moment, aq_moment_pool *pool);
/* Bytes that a triangle of n inputs takes in memory, gathered rows included; false on overflow. */
bool aq_moment_cost(uint64_t n, uint64_t *triangle, uint64_t *rows);

/* Offers rows x [n_rows, n]; one of `every` is taken, spread evenly. */
aq_status aq_moment_add(aq_moment *moment, aq_moment_pool *pool, const float *x, uint64_t n_rows, uint64_t stride, uint64_t every, int n_threads,
                        aq_error *err);
/* Adds what is gathered to the triangle. */
aq_status aq_moment_flush(aq_moment *moment, aq_moment_pool *pool, int n_threads, aq_error *err);
/* Frees the room for gathered rows; flushed before. */
void aq_moment_trim(aq_moment *moment, aq_moment_pool *pool);
/* Adds `from`, whose own pool is from_pool and which is flushed. */
aq_status aq_moment_merge(aq_moment *into, aq_moment_pool *pool, const aq_moment *from, aq_moment_pool *from_pool, aq_error *err);

/* ---- reading, panel by panel; the moment is flushed ---- */

uint64_t aq_moment_n_panels(uint64_t n);
/* Rows [*begin, *end) of panel p; element (i, j) lies at (i - begin) (n - begin) + (j - begin), defined for j >= i. */
void aq_moment_panel_rows(uint64_t n, uint64_t p, uint64_t *begin, uint64_t *end);
/* Doubles of the largest panel: room for `buffer` below. */
uint64_t aq_moment_panel_size(uint64_t n);
/* Sums of panel p: in `buffer`, or where they lie. count > 0. */
aq_status aq_moment_panel(const aq_moment *moment, const aq_moment_pool *pool, uint64_t p, double *buffer, const double **out, aq_error *err);
/* Compares the stored parts with their hashes, once: AQ_ERR_FORMAT names the layer. AQ_ERR_MEMORY when an addition failed before. Before panels are read. */
aq_status aq_moment_check(const aq_moment *moment, aq_error *err);

#endif
