/* Long calls: what their rows sum up to is held apart, and becomes a part of the collection only when the call is complete; until then it can be stopped, and
 * leaves the collection as it was.
 *
 * Rows of a layer with H cost seconds from some thousand of them on (n^2 multiplications each), more than a person who pressed Ctrl-C waits. A layer's sums and
 * moments have no way back, so a call that will take long by count fills a layer of its own, under a watch that its loops ask; merging that one is a pass over
 * the triangle, some hundredths of the work that led there. Shorter calls, and collections that nobody watches, go straight into the collection. */
#include <string.h>

#include "base/mem.h"
#include "calibration/internal.h"

bool aq_watch_goes_on(aq_watch *w) {
    if (!w) return true;
    if (!atomic_load(&w->stopped) && pthread_equal(w->thread, pthread_self()) && !w->keep_going(w->user)) atomic_store(&w->stopped, true);
    return !atomic_load(&w->stopped);
}

aq_status aq_watch_fail(const char *layer, aq_error *err) {
    return aq_fail_at(err, AQ_ERR_INTERRUPTED, NULL, layer, "interrupted while rows were summed; nothing of the call was added");
}

void aq_calib_set_keep_going(aq_calib *c, bool (*keep_going)(void *user), void *user) {
    c->keep_going = keep_going;
    c->keep_going_user = user;
}

/* Multiplications for H; a value that is only summed costs as much as some dozen of them. */
static double work_of(const aq_calib *c, const aq_calib_layer *layer, uint64_t n_rows) {
    double n = (double)layer->n_inputs, full = c->options.hessian_full ? (double)c->options.hessian_full : n;
    return (double)n_rows * n * ((layer->moments ? n < full ? n : full : 0) + 32);
}

aq_calib_layer *aq_stage_begin(aq_stage *s, aq_calib *c, aq_calib_layer *layer, uint64_t n_rows, aq_error *err) {
    memset(s, 0, sizeof *s);
    s->layer = layer;
    if (!c->keep_going || work_of(c, layer, n_rows) < c->long_work) return layer;
    uint32_t n_moments = aq_calib_n_moments(c);
    uint64_t n = layer->n_inputs, bound = c->options.max_memory_bytes, held = atomic_load(&c->pool.held_bytes), triangle = 0, rows = 0;
    s->watch = (aq_watch){.keep_going = c->keep_going, .user = c->keep_going_user, .thread = pthread_self()};
    s->held = (aq_calib_layer){.name = layer->name, .n_inputs = n, .watch = &s->watch};
    s->held.groups = aq_calloc(c->options.n_groups, sizeof *s->held.groups);
    if (layer->moments) s->held.moments = aq_calloc(n_moments, sizeof *s->held.moments);
    if (!s->held.groups || (layer->moments && (!s->held.moments || !aq_moment_cost(n, &triangle, &rows)))) {
        aq_fail_memory(err, n_moments * sizeof *s->held.moments, "the statistics of a call");
        aq_free(s->held.groups);
        aq_free(s->held.moments);
        return NULL;
    }
    for (uint32_t g = 0; layer->moments && g < n_moments; g++) {
        aq_moment *m = &s->held.moments[g];
        m->n = n;
        m->n_offered = layer->moments[g].n_offered; /* rows are taken from where the last call ended */
        m->spilled = layer->moments[g].spilled || (bound && held + triangle + rows > bound);
        m->layer = layer->name;
        m->watch = &s->watch;
    }
    s->calib = c;
    return &s->held;
}

aq_status aq_stage_end(aq_stage *s, aq_status status, int n_threads, aq_error *err) {
    if (!s->calib) return status;
    aq_calib *c = s->calib;
    for (uint32_t g = 0; s->held.moments && g < aq_calib_n_moments(c); g++) {
        aq_moment *m = &s->held.moments[g];
        if (status == AQ_OK) status = aq_moment_flush(m, &c->pool, n_threads, err);
        m->n_offered -= s->layer->moments[g].n_offered;
    }
    if (status == AQ_OK) status = aq_calib_layer_add(c, s->layer, c, &s->held, err);
    for (uint32_t g = s->held.moments ? aq_calib_n_moments(c) : 0; g > 0; g--) aq_moment_free(&s->held.moments[g - 1], &c->pool); /* the last place first */
    s->held.name = NULL;                                                                                                          /* the layer's own */
    aq_calib_layer_free(c, &s->held);
    return status;
}
