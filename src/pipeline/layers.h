/* Layers in flight: what layers.c computes and handover.c writes. */
#ifndef AQ_PIPELINE_LAYERS_H
#define AQ_PIPELINE_LAYERS_H

#include <pthread.h>
#include <stdatomic.h>

#include "base/ordered.h"
#include "pipeline/activations.h"
#include "pipeline/attempts.h"
#include "pipeline/inputs.h"
#include "pipeline/quantize.h"
#include "quant/code.h"

enum { MOST_THREADS = 256, FALLBACK_SIZE = 1024 };

typedef struct slab_result {
    aq_coded coded;
    uint64_t n_nonfinite, first_nonfinite; /* flat index in the tensor */
} slab_result;

/* A layer coded in one way. */
typedef struct candidate {
    attempt attempt;
    aq_quant_layout layout;
    uint8_t *codes, *params; /* NULL: none */
    float *equalization;     /* [cols] of an equalized basis, else NULL */
    double *bias_change;     /* [rows] what its bias grows by; NULL: it has none that is corrected */
    layer_activations activations;
    char time_problem[160]; /* why it has one pair for all timesteps */
    aq_quant_metrics metrics;
    double error;         /* relative output error, that of 8-bit inputs included; NaN: not measured */
    double sqnr_db;       /* of the output, weights alone; NaN: not measured */
    double plain_sqnr_db; /* the same with the bias as it was; NaN: not corrected, or not measured */
    bool widened;         /* parameters did not fit half precision */
} candidate;

/* A layer while it is open. */
typedef struct layer {
    attempt attempts[MOST_ATTEMPTS];
    size_t n_attempts, at;
    int bits;
    bool spatial;               /* with equalization, where the settings have it */
    const layer_inputs *inputs; /* at hand, and which: */
    attempt prepared;
    bool preparing; /* the next part makes the inputs */
    candidate now, best;
    uint64_t slab_rows;
    size_t n_slabs;
    slab_result *slabs;
    atomic_bool needs_f32;
    char fallback_from[FALLBACK_SIZE], compared_with[256];
    size_t error_slab;
    aq_error error;
} layer;

typedef struct work {
    quantize_run *run;
    inputs_pool *pool;
    layer *open[AQ_ORDERED_WINDOW]; /* by position in the ring; NULL: kept or closed */
    float *scratch[MOST_THREADS];   /* one slab each, made when first used */
    pthread_mutex_t error_mutex;
    size_t first;        /* the writer already holds the tensors before this one of the run's order … */
    uint64_t parts_done; /* … and so many parts from there */
    double *bias_change; /* of the layer that was written last, for the bias that follows it; NULL: none */
    _Atomic uint64_t bytes_worked;
    atomic_bool cancelled;
    double last_tick;
    uint64_t n_done, bytes_done; /* committed */
    aq_error error;              /* of a commit */
} work;

static inline layer **aq_layer_slot(work *w, size_t item) { return &w->open[item % AQ_ORDERED_WINDOW]; }
static inline size_t aq_layer_tensor(const work *w, size_t item) { return w->run->order[w->first + item]; }
void aq_layer_free(work *w, layer *l);

/* What the floor is compared with: the lesser of the similarities of the weights and, by their relative error (NaN: not measured), of the outputs. */
double aq_similarity(const aq_quant_metrics *metrics, double error);

/* ---- handover.c ---- */

/* Finds where the records of the writer end: w->first and w->parts_done. */
aq_status aq_layers_resume(work *w, aq_error *err);
/* Hands tensor `index` to the writer; l is NULL for one that is kept by choice. AQ_ERR_INTERRUPTED when the hook cancels. */
aq_status aq_layer_write(work *w, const layer *l, size_t index, aq_error *err);
/* Tells progress; false cancels. */
bool aq_layers_tick(void *work);
/* Everything about the finished tensor: its line, its warnings. False cancels. */
bool aq_layer_tell(work *w, const layer *l, size_t index);
/* Parameters of row `row`. */
uint8_t *aq_params_of_row(const candidate *c, uint64_t row);
/* Counts what is not finite in w and, when asked, sets it to zero; `begin` is the flat index of w[0]. */
void aq_scan_nonfinite(float *w, uint64_t n, uint64_t begin, bool zero, slab_result *out);

#endif
