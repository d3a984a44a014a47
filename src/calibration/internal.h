/* What the files of the calibration room share: a collection in memory (see arrowquant/calibration.h). */
#ifndef AQ_CALIBRATION_INTERNAL_H
#define AQ_CALIBRATION_INTERNAL_H

#include <arrowquant/calibration.h>

#include "base/file.h"
#include "calibration/moment.h"

#define AQ_CALIB_SCHEMA_VERSION "1.0"
#define AQ_CALIB_LIMIT_GROUPS 4096
#define AQ_CALIB_LIMIT_LAYERS 1000000
#define AQ_CALIB_LIMIT_INPUTS (UINT64_C(1) << 24)
#define AQ_CALIB_LIMIT_TIMESTEPS (1 << 24)
#define AQ_CALIB_LIMIT_NAME_BYTES 1024
#define AQ_CALIB_LONG_WORK 0x1p37 /* about half a second on two threads of a laptop */
#define AQ_CALIB_HUGE 1e16f       /* squares of larger inputs, summed over a block, could leave F32 */

/* Column sums of rows; arrays [n_inputs] in one block of memory that begins at `sum`; NULL and count 0 when nothing was seen. */
typedef struct aq_sums {
    uint64_t count;
    double *sum, *sum_sq;
    float *absmax, *min, *max;
} aq_sums;

typedef struct aq_calib_layer {
    char *name;
    uint64_t n_inputs;
    size_t source;      /* whose statistics hold: its own number, or that of same_input_as (which has its own) */
    aq_sums *groups;    /* [n_groups]; NULL when it shares */
    aq_moment *moments; /* [n_groups], or one when pooled; NULL without H */
    aq_timestep_stats *timesteps;
    size_t n_timesteps, timesteps_cap;
    double *gradient_rows, *gradient_cols; /* sums of squares over the other dimension */
    uint64_t n_gradient_rows, n_gradients;
    double *gradient_rows_mean, *gradient_cols_mean; /* as they are shown */
    aq_watch *watch;                                 /* of the one call that it is for (stage.c), or NULL */
} aq_calib_layer;

struct aq_calib {
    aq_calib_options options; /* strings owned */
    aq_calib_layer *layers;
    size_t n_layers, layers_cap;
    uint32_t *table; /* open addressing by name: number + 1 */
    size_t table_size;
    uint64_t planned_bytes; /* what the layers so far will hold in memory */
    aq_moment_pool pool;
    char *path;      /* of the file it was read from, or NULL */
    aq_file_map map; /* of that file: stored triangles lie in it */
    void **owned;    /* those that do not */
    size_t n_owned;
    char fingerprint[65];   /* of the content as it was read, "" before */
    atomic_bool is_changed; /* since then */
    char cache_key[65];     /* that the file was kept under, "" */
    bool (*keep_going)(void *user);
    void *keep_going_user;
    double long_work; /* from which on a call is long (stage.c) */
};

/* ---- layers ---- */

static inline uint32_t aq_calib_n_moments(const aq_calib *c) { return c->options.hessian_pooled ? 1 : c->options.n_groups; }
static inline aq_moment *aq_calib_moment(const aq_calib *c, const aq_calib_layer *layer, uint32_t group) {
    return layer->moments ? &layer->moments[c->options.hessian_pooled ? 0 : group] : NULL;
}
/* Group of a timestep; -1 and everything without a schedule: 0. */
uint32_t aq_calib_group_of(const aq_calib *c, int32_t timestep);
/* Copies a text to *to, which owned another; NULL stays NULL. */
aq_status aq_calib_keep_text(const char **to, const char *text, aq_error *err);
/* All gathered rows into their triangles: what readers see is complete. Logically const. */
aq_status aq_calib_settle(const aq_calib *c, const aq_calib_layer *layer, aq_error *err);

/* Room for gradients of so many rows; false: no memory. And the means that are shown, from the sums. */
bool aq_gradient_reserve(aq_calib_layer *layer, uint64_t rows);
void aq_gradient_finish(aq_calib_layer *layer);

/* aq_calib_save with the key of a cache (may be NULL). */
aq_status aq_calib_save_keyed(const aq_calib *c, const char *path, bool overwrite, const char *key, aq_error *err);
#define AQ_CALIB_KEY_CACHE "arrowquant.calibration.cache_key"

/* ---- long calls (stage.c) ---- */

typedef struct aq_stage {
    aq_calib *calib;
    aq_calib_layer *layer, held; /* where the call's rows go in the end, and until then where the call is a long one */
    aq_watch watch;
} aq_stage;
/* The layer to add a call's n_rows to: the given one, or an empty one that takes its place until aq_stage_end. NULL: no memory. */
aq_calib_layer *aq_stage_begin(aq_stage *stage, aq_calib *c, aq_calib_layer *layer, uint64_t n_rows, aq_error *err);
/* Adds everything to the given one when `status`, which is what comes back, is AQ_OK. */
aq_status aq_stage_end(aq_stage *stage, aq_status status, int n_threads, aq_error *err);

/* Adds the sums, moments and timesteps of another layer, of collection `from`, whose moments are flushed. */
aq_status aq_calib_layer_add(aq_calib *into, aq_calib_layer *t, const aq_calib *from, const aq_calib_layer *f, aq_error *err);
void aq_calib_layer_free(aq_calib *c, aq_calib_layer *layer);

/* ---- sums ---- */

bool aq_sums_reserve(aq_calib *c, aq_sums *sums, uint64_t n); /* allocates an empty one; nothing when it is there */
void aq_sums_free(aq_calib *c, aq_sums *sums, uint64_t n);
void aq_sums_add(aq_sums *into, const aq_sums *from, uint64_t n); /* both there */

/* Adds one timestep's scalars; false: no memory. */
bool aq_timesteps_add(aq_calib_layer *layer, const aq_timestep_stats *stats);
/* mean and std from the sums. */
void aq_timestep_finish(aq_timestep_stats *stats);

#endif
