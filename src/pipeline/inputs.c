/* The pool of what is known about layers' inputs (see inputs.h). */
#include "pipeline/inputs.h"

#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>

#include "base/error.h"
#include "base/mem.h"
#include "base/size.h"
#include "pipeline/source.h"

typedef struct entry {
    layer_inputs inputs; /* first: released by its address */
    size_t first, last;  /* tensors that may use it: a run of neighbours */
    inputs_want want;
    inputs_basis basis;
    bool ready;
    size_t n_users;
    struct entry *next;
} entry;

struct inputs_pool {
    const quantize_run *run;
    size_t *first, *last; /* [n_tensors] run of neighbours with the same inputs */
    bool *finished;       /* [n_tensors] */
    entry *entries;
    pthread_mutex_t mutex;
    pthread_cond_t made;
};

inputs_want aq_inputs_known(const quantize_run *run, size_t index, size_t *layer) {
    if (!run->calib) return INPUTS_NONE;
    const aq_tensor_info *t = aq_model_tensor(run->model, index);
    int64_t found = aq_calib_find(run->calib, t->name);
    uint64_t rows, cols;
    aq_shape_matrix(&t->shape, &rows, &cols);
    if (found < 0 || aq_calib_n_inputs(run->calib, (size_t)found) != cols || aq_calib_count(run->calib, (size_t)found) == 0) return INPUTS_NONE;
    if (layer) *layer = (size_t)found;
    return aq_calib_has_hessian(run->calib, (size_t)found) ? INPUTS_METRIC : INPUTS_DIAGONAL;
}

uint64_t aq_inputs_bytes(inputs_want want, uint64_t n, uint64_t *making) {
    uint64_t square, vectors = 4 * n * sizeof(float);
    *making = 0;
    if (want == INPUTS_NONE) return 0;
    if (want == INPUTS_DIAGONAL) return vectors;
    if (n > UINT32_MAX / 4 || !aq_mul(n, n * sizeof(float), &square)) return *making = UINT64_MAX;
    /* H is read as one triangle and written as a square; the factor is made beside it. */
    *making = want == INPUTS_FACTOR ? square + aq_hessian_bytes(n) : square;
    return square + vectors;
}

/* ---- making ---- */

aq_status aq_run_read_f32(const quantize_run *run, size_t index, uint64_t begin, uint64_t count, float *out, aq_error *err) {
    return aq_folds_read(&run->folds, run->model, index, begin, count, out, err);
}

aq_status aq_weight_ranges(const quantize_run *run, size_t index, float *out, aq_error *err) {
    uint64_t rows, n;
    aq_shape_matrix(&aq_model_tensor(run->model, index)->shape, &rows, &n);
    uint64_t slab = aq_slab_rows(1 << 20, n, 1);
    float *w = aq_alloc(slab * n * sizeof *w);
    aq_status status = w ? AQ_OK : aq_fail_memory(err, slab * n * sizeof *w, "equalization scales");
    for (uint64_t row = 0; row < rows && status == AQ_OK; row += slab) {
        uint64_t m = rows - row < slab ? rows - row : slab;
        if ((status = aq_run_read_f32(run, index, row * n, m * n, w, err)) == AQ_OK) aq_column_absmax(w, m, n, out);
    }
    aq_free(w);
    return status;
}

/* From the first timesteps of sampling, the noisiest, to the last. */
void aq_input_ranges(const quantize_run *run, size_t layer, const float *shift, float *out) {
    bool averages = strcmp(aq_config_string(run->config, "temporal_aggregation"), "momentum") == 0, is_first = true;
    double momentum = averages ? aq_config_float(run->config, "aggregation_momentum") : -1;
    uint64_t n = aq_calib_n_inputs(run->calib, layer);
    for (uint32_t g = aq_calib_settings(run->calib)->n_groups; g-- > 0;) {
        aq_calib_stats stats = aq_calib_group(run->calib, layer, g);
        for (uint64_t i = 0; stats.count && i < n; i++) {
            float a = shift ? fmaxf(fabsf(stats.max[i] - shift[i]), fabsf(stats.min[i] - shift[i])) : stats.absmax[i];
            aq_temporal_absmax(&a, 1, is_first, momentum, &out[i]);
        }
        is_first &= stats.count == 0;
    }
}

/* Scales of the layers that share the inputs. */
static aq_status make_equalization(const quantize_run *run, const entry *e, size_t layer, float *scales, aq_error *err) {
    uint64_t n = e->inputs.n;
    float *of_weights = aq_calloc(n, sizeof *of_weights), *of_inputs = aq_calloc(n, sizeof *of_inputs);
    aq_status status = of_weights && of_inputs ? AQ_OK : aq_fail_memory(err, 2 * n * sizeof *scales, "equalization scales");
    for (size_t i = e->first; i <= e->last && status == AQ_OK; i++) {
        size_t other;
        if (!run->choices[i].quantize || aq_inputs_known(run, i, &other) == INPUTS_NONE) continue;
        if (aq_calib_source(run->calib, other) == aq_calib_source(run->calib, layer)) status = aq_weight_ranges(run, i, of_weights, err);
    }
    if (status == AQ_OK) {
        aq_input_ranges(run, layer, NULL, of_inputs);
        aq_equalization_scales_by(e->basis.equalized, of_weights, of_inputs, n, scales);
    }
    aq_free(of_weights);
    aq_free(of_inputs);
    return status;
}

/* tr(W H W^T) of a whole tensor. */
static aq_status output_power(const quantize_run *run, size_t index, const float *h, uint64_t n, double *out, aq_error *err) {
    uint64_t rows, cols, slab = aq_slab_rows(1 << 20, n, 1);
    aq_shape_matrix(&aq_model_tensor(run->model, index)->shape, &rows, &cols);
    float *w = aq_alloc(slab * n * sizeof *w);
    aq_status status = w ? AQ_OK : aq_fail_memory(err, slab * n * sizeof *w, "a slab of weights");
    aq_output_error sum = {0};
    for (uint64_t row = 0; row < rows && status == AQ_OK; row += slab) {
        uint64_t m = rows - row < slab ? rows - row : slab;
        status = aq_run_read_f32(run, index, row * n, m * n, w, err);
        if (status == AQ_OK) status = aq_output_error_add(w, w, m, n, h, 1, &sum, err);
    }
    aq_free(w);
    *out = sum.ref;
    return status;
}

/* Weights of the time groups that make the relative output error of each count the same: 1 / tr(W H_g W^T) (algorithms.md 6). *any: there are some; a layer
 * of zeros has no output in any group. */
static aq_status make_balance(const quantize_run *run, size_t index, size_t layer, float *h, uint64_t n, double *weights, bool *any, aq_error *err) {
    uint32_t n_groups = aq_calib_settings(run->calib)->n_groups;
    aq_status status = AQ_OK;
    *any = false;
    for (uint32_t g = 0; g < n_groups && status == AQ_OK; g++) {
        double only[128] = {0}, power = 0;
        weights[g] = 0;
        if (aq_calib_group(run->calib, layer, g).hessian_count == 0) continue;
        only[g] = 1;
        status = aq_calib_hessian(run->calib, layer, only, h, err);
        if (status == AQ_OK) status = output_power(run, index, h, n, &power, err);
        if (status != AQ_OK || !(power > 0) || isinf(power)) continue;
        weights[g] = 1 / power;
        *any = true;
    }
    return status;
}

static bool is_balanced(const quantize_run *run) {
    const aq_calib_options *o = run->calib ? aq_calib_settings(run->calib) : NULL;
    return o && strcmp(aq_config_string(run->config, "time_weighting"), "balanced") == 0 && !o->hessian_pooled && o->n_groups > 1 && o->n_groups <= 128;
}

/* The mean, where it is needed: for the shift of a fold, or for a bias that makes up for it. Not finite, it says nothing. */
static aq_status make_mean(const quantize_run *run, size_t layer, const double *weights, entry *e, bool *of_hessian, aq_error *err) {
    layer_inputs *in = &e->inputs;
    *of_hessian = false;
    if (!in->shift && !e->basis.corrected) return AQ_OK;
    if (!(in->mean = aq_alloc(in->n * sizeof *in->mean))) return aq_fail_memory(err, in->n * sizeof *in->mean, "means of a layer's inputs");
    aq_status status = aq_calib_mean(run->calib, layer, weights, in->mean, of_hessian, err);
    if (status != AQ_OK || !e->basis.corrected) return status;
    if (!(in->corrected = aq_alloc(in->n * sizeof *in->mean))) return aq_fail_memory(err, in->n * sizeof *in->mean, "means of a layer's inputs");
    for (uint64_t i = 0; i < in->n; i++) in->corrected[i] = in->mean[i] - (in->shift ? in->shift[i] : 0);
    return AQ_OK;
}

static void change_basis(const entry *e, float *h) {
    uint64_t n = e->inputs.n;
    const float *s = e->inputs.equalization;
    if (e->inputs.centre) aq_shift_moment(h, n, e->inputs.mean, e->inputs.centre);
    for (uint64_t i = 0; s && i < n; i++)
        for (uint64_t k = 0; k < n; k++) h[i * n + k] = h[i * n + k] * s[i] * s[k];
    if (e->basis.hadamard_group > 1) aq_hadamard_hessian(h, n, e->basis.hadamard_group);
}

static aq_status make_second_moment(const quantize_run *run, size_t index, size_t layer, entry *e, aq_error *err) {
    layer_inputs *in = &e->inputs;
    uint64_t n = in->n;
    double weights[128];
    bool balanced = is_balanced(run), whole = false;
    if (!(in->h = aq_calloc(n, n * sizeof *in->h))) return aq_fail_memory(err, n * n * sizeof *in->h, "the second moment of a layer's inputs");
    aq_status status = AQ_OK;
    if (in->made_up) {
        for (uint64_t i = 0; i < n; i++) in->h[i * n + i] = 1;
    } else {
        if (balanced) status = make_balance(run, index, layer, in->h, n, weights, &balanced, err);
        if (status == AQ_OK) status = aq_calib_hessian(run->calib, layer, balanced ? weights : NULL, in->h, err);
    }
    if (status == AQ_OK && !in->made_up) status = make_mean(run, layer, balanced ? weights : NULL, e, &whole, err);
    in->centre = in->shift;
    if (status == AQ_OK && in->corrected && whole && aq_moment_varies(in->h, n + 1, n, in->mean)) in->centre = in->mean;
    if (status == AQ_OK) change_basis(e, in->h);
    for (uint64_t i = 0; status == AQ_OK && i < n; i++) in->importance[i] = in->h[i * n + i];
    return status;
}

static aq_status make_diagonal(const quantize_run *run, size_t layer, entry *e, aq_error *err) {
    layer_inputs *in = &e->inputs;
    bool unused;
    aq_status status = aq_calib_diagonal(run->calib, layer, NULL, in->importance, err);
    if (status == AQ_OK) status = make_mean(run, layer, NULL, e, &unused, err);
    if (status != AQ_OK || !in->corrected || !aq_moment_varies(in->importance, 1, in->n, in->mean)) return status;
    in->centre = in->mean;
    for (uint64_t i = 0; i < in->n; i++) {
        float all = in->importance[i], variance = (float)((double)all - (double)in->mean[i] * (double)in->mean[i]);
        in->importance[i] = fmaxf(variance, 1e-6F * all);
    }
    return AQ_OK;
}

static aq_status make_factor(const quantize_run *run, entry *e, aq_error *err) {
    layer_inputs *in = &e->inputs;
    aq_error e2;
    aq_error_clear(&e2);
    aq_status status = aq_hessian_create(&in->hessian, in->h, in->n, &run->solve, run->memory.n_threads, &e2);
    if (status == AQ_OK) {
        aq_free(in->h);
        in->h = NULL;
    } else if (status == AQ_ERR_QUALITY || status == AQ_ERR_FORMAT) {
        snprintf(in->problem, sizeof in->problem, "%s", e2.message);
        return AQ_OK;
    } else if (err) {
        *err = e2;
    }
    return status;
}

/* A second moment that is zero, or not finite, says nothing of the inputs: the layer is coded by its weights alone. */
static void forget(layer_inputs *in, const char *problem) {
    snprintf(in->problem, sizeof in->problem, "%s", problem);
    aq_free(in->h);
    aq_free(in->importance);
    aq_free(in->corrected);
    in->h = in->importance = in->corrected = NULL;
}

static bool is_zero(const layer_inputs *in) {
    for (uint64_t i = 0; i < in->n; i++)
        if (in->importance[i] != 0) return false;
    return in->n > 0;
}

static aq_status make(const quantize_run *run, size_t index, entry *e, aq_error *err) {
    layer_inputs *in = &e->inputs;
    size_t layer = 0;
    uint64_t rows;
    aq_shape_matrix(&aq_model_tensor(run->model, index)->shape, &rows, &in->n);
    in->made_up = aq_inputs_known(run, index, &layer) == INPUTS_NONE;
    if (!(in->importance = aq_calloc(in->n, sizeof *in->importance))) return aq_fail_memory(err, in->n * sizeof *in->importance, "importances");
    aq_status status = AQ_OK;
    if (e->basis.fold) {
        if (!(in->equalization = aq_alloc(in->n * sizeof *in->equalization))) return aq_fail_memory(err, in->n * 4, "equalization scales");
        memcpy(in->equalization, e->basis.fold->scales, in->n * sizeof *in->equalization);
        in->shift = e->basis.fold->shift;
    } else if (e->basis.equalized) {
        in->equalization = aq_calloc(in->n, sizeof *in->equalization);
        status = in->equalization ? make_equalization(run, e, layer, in->equalization, err) : aq_fail_memory(err, in->n * 4, "equalization scales");
    }
    if (status == AQ_OK && e->want == INPUTS_DIAGONAL) {
        status = make_diagonal(run, layer, e, err);
        for (uint64_t i = 0; in->equalization && i < in->n; i++) in->importance[i] *= in->equalization[i] * in->equalization[i];
    } else if (status == AQ_OK) {
        status = make_second_moment(run, index, layer, e, err);
    }
    if (status == AQ_ERR_QUALITY) {
        forget(in, err ? err->message : "the second moment of the inputs is not finite");
        aq_error_clear(err);
        return AQ_OK;
    }
    if (status == AQ_OK && is_zero(in))
        forget(in, "the inputs were 0 whenever they were recorded");
    else if (status == AQ_OK && e->want == INPUTS_FACTOR)
        status = make_factor(run, e, err);
    return status;
}

static void free_entry(entry *e) {
    aq_free(e->inputs.importance);
    aq_free(e->inputs.h);
    aq_hessian_free(e->inputs.hessian);
    aq_free(e->inputs.equalization);
    aq_free(e->inputs.mean);
    aq_free(e->inputs.corrected);
    aq_free(e);
}

bool aq_same_basis(const inputs_basis *a, const inputs_basis *b) {
    return a->fold == b->fold && a->equalized == b->equalized && a->hadamard_group == b->hadamard_group && a->corrected == b->corrected;
}

aq_status aq_inputs_make(const quantize_run *run, size_t index, inputs_want want, inputs_basis basis, layer_inputs **out, aq_error *err) {
    entry *e = aq_calloc(1, sizeof *e);
    *out = NULL;
    if (!e) return aq_fail_memory(err, sizeof *e, "a layer's inputs");
    *e = (entry){.first = index, .last = index, .want = want, .basis = basis};
    aq_status status = make(run, index, e, err);
    if (status == AQ_OK)
        *out = &e->inputs;
    else
        free_entry(e);
    return status;
}

void aq_inputs_free(layer_inputs *inputs) {
    if (inputs) free_entry((entry *)inputs); /* its first member */
}

aq_coder aq_inputs_coder(const quantize_run *run, const layer_inputs *in) {
    if (!in) return (aq_coder){.solve = run->solve};
    return (aq_coder){.hessian = in->hessian,
                      .h = in->h,
                      .importance = in->importance,
                      .solve = run->solve,
                      .equalization = in->equalization,
                      .shift = in->centre,
                      .mean = in->mean,
                      .corrected = in->corrected,
                      .h_has_mean = in->corrected && in->centre != in->mean};
}

aq_status aq_inputs_rms(const layer_inputs *in, uint32_t hadamard_group, float *out, aq_error *err) {
    float *mean = aq_calloc(in->n, sizeof *mean); /* that the importances lack */
    if (!mean) return aq_fail_memory(err, in->n * sizeof *mean, "ranges of a layer's inputs");
    for (uint64_t i = 0; in->corrected && in->centre == in->mean && i < in->n; i++) mean[i] = in->corrected[i] * (in->equalization ? in->equalization[i] : 1);
    if (hadamard_group > 1) aq_hadamard(mean, 1, in->n, hadamard_group);
    for (uint64_t i = 0; i < in->n; i++) {
        double square = (in->importance ? fmax((double)in->importance[i], 0) : 1) + (double)mean[i] * (double)mean[i];
        out[i] = (float)sqrt(square);
    }
    aq_free(mean);
    return AQ_OK;
}

/* ---- the pool ---- */

/* Runs of quantized neighbours that read the same input. Balanced weights depend on the layer: then nothing is shared. */
static void find_runs(inputs_pool *pool) {
    const quantize_run *run = pool->run;
    size_t before = SIZE_MAX, source_before = SIZE_MAX;
    bool shares = !is_balanced(run);
    for (size_t i = 0; i < run->n_tensors; i++) {
        size_t layer = 0;
        pool->first[i] = pool->last[i] = i;
        pool->finished[i] = !run->choices[i].quantize;
        if (!run->choices[i].quantize || aq_inputs_known(run, i, &layer) == INPUTS_NONE) continue;
        size_t source = aq_calib_source(run->calib, layer);
        if (shares && before != SIZE_MAX && source == source_before) {
            pool->first[i] = pool->first[before];
            for (size_t k = pool->first[i]; k < i; k++)
                if (pool->first[k] == pool->first[i]) pool->last[k] = i;
        }
        before = i;
        source_before = source;
    }
}

aq_status aq_inputs_pool_create(inputs_pool **out, const quantize_run *run, aq_error *err) {
    inputs_pool *pool = aq_calloc(1, sizeof *pool);
    if (!pool) return aq_fail_memory(err, sizeof *pool, "the pool of inputs");
    pool->run = run;
    pthread_mutex_init(&pool->mutex, NULL);
    pthread_cond_init(&pool->made, NULL);
    pool->first = aq_calloc(run->n_tensors, sizeof *pool->first);
    pool->last = aq_calloc(run->n_tensors, sizeof *pool->last);
    pool->finished = aq_calloc(run->n_tensors, sizeof *pool->finished);
    if (!pool->first || !pool->last || !pool->finished) {
        aq_inputs_pool_free(pool);
        return aq_fail_memory(err, run->n_tensors * 2 * sizeof *pool->first, "the pool of inputs");
    }
    find_runs(pool);
    *out = pool;
    return AQ_OK;
}

void aq_inputs_pool_free(inputs_pool *pool) {
    if (!pool) return;
    while (pool->entries) {
        entry *e = pool->entries;
        pool->entries = e->next;
        free_entry(e);
    }
    pthread_mutex_destroy(&pool->mutex);
    pthread_cond_destroy(&pool->made);
    aq_free(pool->first);
    aq_free(pool->last);
    aq_free(pool->finished);
    aq_free(pool);
}

/* With the lock, as the two below. */
static entry *find(inputs_pool *pool, size_t first, inputs_want want, inputs_basis basis) {
    entry *e = pool->entries;
    while (e && !(e->first == first && e->want == want && aq_same_basis(&e->basis, &basis))) e = e->next;
    return e;
}

static void take_out(inputs_pool *pool, entry *e) {
    entry **at = &pool->entries;
    while (*at != e) at = &(*at)->next;
    *at = e->next;
}

/* Frees what no layer uses and none will. */
static void tidy(inputs_pool *pool) {
    for (entry **at = &pool->entries; *at;) {
        entry *e = *at;
        bool needed = e->n_users > 0;
        for (size_t i = e->first; i <= e->last && !needed; i++) needed = !pool->finished[i] && pool->first[i] == e->first;
        if (needed) {
            at = &e->next;
        } else {
            *at = e->next;
            free_entry(e);
        }
    }
}

aq_status aq_inputs_take(inputs_pool *pool, size_t index, inputs_want want, inputs_basis basis, const layer_inputs **out, aq_error *err) {
    aq_status status = AQ_OK;
    entry *e;
    pthread_mutex_lock(&pool->mutex);
    while ((e = find(pool, pool->first[index], want, basis)) && !e->ready) pthread_cond_wait(&pool->made, &pool->mutex);
    if (e) {
        e->n_users++;
    } else if (!(e = aq_calloc(1, sizeof *e))) {
        status = aq_fail_memory(err, sizeof *e, "a layer's inputs");
    } else {
        *e = (entry){.first = pool->first[index], .last = pool->last[index], .want = want, .basis = basis, .n_users = 1, .next = pool->entries};
        pool->entries = e;
        pthread_mutex_unlock(&pool->mutex);
        status = make(pool->run, index, e, err);
        pthread_mutex_lock(&pool->mutex);
        if (status == AQ_OK) {
            e->ready = true;
        } else { /* who waits for it tries for itself */
            take_out(pool, e);
            free_entry(e);
        }
        pthread_cond_broadcast(&pool->made);
    }
    pthread_mutex_unlock(&pool->mutex);
    if (status == AQ_OK) *out = &e->inputs;
    return status;
}

void aq_inputs_release(inputs_pool *pool, const layer_inputs *inputs) {
    if (!inputs) return;
    pthread_mutex_lock(&pool->mutex);
    for (entry *e = pool->entries; e; e = e->next)
        if (&e->inputs == inputs) e->n_users--;
    tidy(pool);
    pthread_mutex_unlock(&pool->mutex);
}

void aq_inputs_finish(inputs_pool *pool, size_t index) {
    pthread_mutex_lock(&pool->mutex);
    pool->finished[index] = true;
    tidy(pool);
    pthread_mutex_unlock(&pool->mutex);
}
