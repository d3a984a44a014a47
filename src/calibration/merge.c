/* Adding one collection to another: sums are added, layers that only one has are taken as they are, and what says where the data come from is united. */
#include <stdlib.h>
#include <string.h>

#include "base/mem.h"
#include "base/size.h"
#include "calibration/internal.h"

static const char joint[] = " + ";

static int by_text(const void *a, const void *b) { return strcmp(*(char *const *)a, *(char *const *)b); }

/* The distinct names of "a + b" and "b + c", sorted: "a + b + c". Either may be NULL. */
static aq_status unite(const char **into, const char *from, aq_error *err) {
    if (!from || (*into && strcmp(*into, from) == 0)) return AQ_OK;
    if (!*into) return aq_calib_keep_text(into, from, err);
    size_t size = strlen(*into) + strlen(from) + sizeof joint, n = 0, at = 0;
    char *both = aq_alloc(size), *out = aq_alloc(size), **names = aq_alloc((size / sizeof joint + 2) * sizeof *names);
    aq_status status = both && out && names ? AQ_OK : aq_fail_memory(err, size, "the data set's name");
    if (status == AQ_OK) {
        snprintf(both, size, "%s%s%s", *into, joint, from);
        for (char *p = both, *next; p; p = next) {
            next = strstr(p, joint);
            if (next) *next = 0, next += sizeof joint - 1;
            names[n++] = p;
        }
        qsort(names, n, sizeof *names, by_text);
        for (size_t i = 0; i < n; i++)
            if (i == 0 || strcmp(names[i], names[i - 1]) != 0) at += (size_t)snprintf(out + at, size - at, "%s%s", at ? joint : "", names[i]);
        status = aq_calib_keep_text(into, out, err);
    }
    aq_free(both);
    aq_free(out);
    aq_free(names);
    return status;
}

static aq_status check_settings(const aq_calib_options *a, const aq_calib_options *b, aq_error *err) {
    if (a->n_timesteps != b->n_timesteps) return aq_fail(err, AQ_ERR_USAGE, "the schedules differ: %u and %u timesteps", a->n_timesteps, b->n_timesteps);
    if (a->n_groups != b->n_groups) return aq_fail(err, AQ_ERR_USAGE, "the numbers of time groups differ: %u and %u", a->n_groups, b->n_groups);
    if (a->diagonal_only != b->diagonal_only) return aq_fail(err, AQ_ERR_USAGE, "one is an imported importance matrix, the other a recording");
    if (a->hessian && b->hessian && a->hessian_pooled != b->hessian_pooled)
        return aq_fail(err, AQ_ERR_USAGE, "one holds second moments per time group, the other over all of them");
    if (a->modality != b->modality && a->modality != AQ_MODALITY_UNKNOWN && b->modality != AQ_MODALITY_UNKNOWN)
        return aq_fail(err, AQ_ERR_USAGE, "the modalities differ: %s and %s", aq_modality_name(a->modality), aq_modality_name(b->modality));
    return AQ_OK;
}

static aq_status check_layers(const aq_calib *into, const aq_calib *from, aq_error *err) {
    for (size_t i = 0; i < from->n_layers; i++) {
        const aq_calib_layer *f = &from->layers[i];
        int64_t at = aq_calib_find(into, f->name);
        if (at < 0) continue;
        const aq_calib_layer *t = &into->layers[at];
        if (t->n_inputs != f->n_inputs)
            return aq_fail_at(err, AQ_ERR_USAGE, NULL, f->name, "has %llu inputs in one collection and %llu in the other", (unsigned long long)t->n_inputs,
                              (unsigned long long)f->n_inputs);
        if (t->n_gradients > 0 && f->n_gradients > 0 && t->n_gradient_rows != f->n_gradient_rows)
            return aq_fail_at(err, AQ_ERR_USAGE, NULL, f->name, "has gradients of %llu rows in one collection and of %llu in the other",
                              (unsigned long long)t->n_gradient_rows, (unsigned long long)f->n_gradient_rows);
        /* A layer that shares its statistics here must share the same ones there, or they would be added twice or not at all. */
        bool shares = t->source != (size_t)at;
        if (shares && strcmp(into->layers[t->source].name, from->layers[f->source].name) != 0)
            return aq_fail_at(err, AQ_ERR_USAGE, NULL, f->name, "shares the statistics of another layer in one collection only");
    }
    return AQ_OK;
}

aq_status aq_calib_layer_add(aq_calib *into, aq_calib_layer *t, const aq_calib *from, const aq_calib_layer *f, aq_error *err) {
    aq_status status = AQ_OK;
    for (uint32_t g = 0; status == AQ_OK && g < into->options.n_groups; g++) {
        if (f->groups[g].count == 0) continue;
        if (!aq_sums_reserve(into, &t->groups[g], t->n_inputs)) return aq_fail_memory(err, 28 * t->n_inputs, "a layer's statistics");
        aq_sums_add(&t->groups[g], &f->groups[g], t->n_inputs);
    }
    aq_moment_pool *from_pool = &((aq_calib *)(uintptr_t)from)->pool;
    for (uint32_t g = 0; status == AQ_OK && t->moments && f->moments && g < aq_calib_n_moments(into); g++)
        status = aq_moment_merge(&t->moments[g], &into->pool, &f->moments[g], from_pool, err);
    for (size_t i = 0; status == AQ_OK && i < f->n_timesteps; i++)
        if (!aq_timesteps_add(t, &f->timesteps[i])) status = aq_fail_memory(err, sizeof *t->timesteps, "the list of timesteps");
    return status;
}

static aq_status add_gradients(aq_calib_layer *t, const aq_calib_layer *f, aq_error *err) {
    uint64_t rows = f->n_gradient_rows, n = f->n_inputs;
    if (f->n_gradients == 0) return AQ_OK;
    if (!aq_gradient_reserve(t, rows)) return aq_fail_memory(err, 8 * (rows + n), "a gradient");
    t->n_gradients += f->n_gradients;
    for (uint64_t i = 0; i < rows; i++) t->gradient_rows[i] += f->gradient_rows[i];
    for (uint64_t j = 0; j < n; j++) t->gradient_cols[j] += f->gradient_cols[j];
    aq_gradient_finish(t);
    return AQ_OK;
}

/* The layer of `into` with this one's name, added when there is none. */
static aq_status find_or_add(aq_calib *into, const aq_calib *from, const aq_calib_layer *f, size_t *at, aq_error *err) {
    int64_t found = aq_calib_find(into, f->name);
    if (found >= 0) {
        *at = (size_t)found;
        return AQ_OK;
    }
    const char *shared = f == &from->layers[f->source] ? NULL : from->layers[f->source].name;
    return aq_calib_add_layer(into, f->name, f->n_inputs, shared, at, err);
}

aq_status aq_calib_merge(aq_calib *into, const aq_calib *from, aq_error *err) {
    aq_error_clear(err);
    if (into == from) return aq_fail(err, AQ_ERR_USAGE, "a collection cannot be added to itself");
    aq_status status = check_settings(&into->options, &from->options, err);
    if (status == AQ_OK) status = check_layers(into, from, err);
    aq_calib_options *o = &into->options;
    if (status == AQ_OK) {
        atomic_store(&into->is_changed, true);
        if (from->options.hessian_most > o->hessian_most) o->hessian_most = from->options.hessian_most;
    }
    if (status == AQ_OK && !o->hessian && from->options.hessian) { /* layers that are new have theirs */
        o->hessian = true;
        o->hessian_pooled = from->options.hessian_pooled;
    }
    for (size_t i = 0; status == AQ_OK && i < from->n_layers; i++) {
        const aq_calib_layer *f = &from->layers[i];
        size_t at;
        status = find_or_add(into, from, f, &at, err);
        if (status != AQ_OK) break;
        aq_calib_layer *t = &into->layers[at];
        f = &from->layers[f->source];
        if (t->source == at) {
            status = aq_calib_settle(from, f, err);
            if (status == AQ_OK) status = aq_calib_settle(into, t, err);
            if (status == AQ_OK) status = aq_calib_layer_add(into, t, from, f, err);
        }
        if (status == AQ_OK) status = add_gradients(t, &from->layers[i], err);
    }
    if (status == AQ_OK) status = unite(&into->options.data_name, from->options.data_name, err);
    if (status == AQ_OK) status = unite(&into->options.data_sha256, from->options.data_sha256, err);
    if (status != AQ_OK) return status;
    o->synthetic = o->synthetic || from->options.synthetic;
    if (from->options.seed < o->seed) o->seed = from->options.seed;
    if (o->modality == AQ_MODALITY_UNKNOWN) o->modality = from->options.modality;
    return AQ_OK;
}
