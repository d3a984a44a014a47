/* A collection: its layers, where their statistics lie, and reading them (see arrowquant/calibration.h). Rows come in through update.c.
 *
 * What is kept in memory is decided when a layer is added, from the sizes alone: the same calls give the same bytes whatever threads do. */
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <xxhash.h>

#include "base/mem.h"
#include "base/size.h"
#include "calibration/internal.h"

enum { ALIGN = 64, BYTES_PER_INPUT = 2 * sizeof(double) + 3 * sizeof(float) };

void aq_calib_options_init(aq_calib_options *o) {
    memset(o, 0, sizeof *o);
    o->n_groups = 1;
    o->hessian_most = 16384;
}

/* ---- options ---- */

aq_status aq_calib_keep_text(const char **to, const char *text, aq_error *err) {
    char *copy = text ? aq_strdup(text) : NULL;
    if (text && !copy) return aq_fail_memory(err, strlen(text), "a name");
    aq_free((void *)(uintptr_t)*to);
    *to = copy;
    return AQ_OK;
}

/* 64 lower-case hex digits, or several such joined by " + ". */
static bool is_sha256_list(const char *text) {
    for (;;) {
        if (strspn(text, "0123456789abcdef") != 64) return false;
        text += 64;
        if (!*text) return true;
        if (strncmp(text, " + ", 3) != 0) return false;
        text += 3;
    }
}

static aq_status check_options(const aq_calib_options *o, aq_error *err) {
    if (o->n_groups < 1 || o->n_groups > AQ_CALIB_LIMIT_GROUPS)
        return aq_fail(err, AQ_ERR_USAGE, "n_groups is %u, expected 1 to %d", o->n_groups, AQ_CALIB_LIMIT_GROUPS);
    if (o->n_timesteps > AQ_CALIB_LIMIT_TIMESTEPS)
        return aq_fail(err, AQ_ERR_USAGE, "n_timesteps is %u, expected at most %d", o->n_timesteps, AQ_CALIB_LIMIT_TIMESTEPS);
    if (o->n_timesteps == 0 && o->n_groups > 1) return aq_fail(err, AQ_ERR_USAGE, "%u time groups need a schedule: n_timesteps is 0", o->n_groups);
    if (o->n_timesteps > 0 && o->n_groups > o->n_timesteps)
        return aq_fail(err, AQ_ERR_USAGE, "%u time groups are more than the %u timesteps", o->n_groups, o->n_timesteps);
    if (o->data_sha256 && !is_sha256_list(o->data_sha256)) return aq_fail(err, AQ_ERR_USAGE, "data_sha256 is not 64 hex digits in lower case");
    if (o->diagonal_only && (o->hessian || o->n_groups > 1)) return aq_fail(err, AQ_ERR_USAGE, "a diagonal alone has one time group and no second moment");
    if (o->seed > INT64_MAX) return aq_fail(err, AQ_ERR_USAGE, "seed is beyond 2^63 - 1");
    return AQ_OK;
}

aq_status aq_calib_create(aq_calib **out, const aq_calib_options *options, aq_error *err) {
    aq_error_clear(err);
    *out = NULL;
    aq_calib_options defaults;
    aq_calib_options_init(&defaults);
    if (!options) options = &defaults;
    aq_status status = check_options(options, err);
    if (status != AQ_OK) return status;
    aq_calib *c = aq_calloc(1, sizeof *c);
    if (!c) return aq_fail_memory(err, sizeof *c, "a collection");
    aq_moment_pool_init(&c->pool);
    c->map.fd = -1;
    c->long_work = AQ_CALIB_LONG_WORK;
    c->options = *options;
    c->options.data_name = c->options.data_sha256 = c->options.spill_folder = NULL;
    if (c->options.hessian_most == 0) c->options.hessian_most = defaults.hessian_most;
    status = aq_calib_keep_text(&c->options.data_name, options->data_name, err);
    if (status == AQ_OK) status = aq_calib_keep_text(&c->options.data_sha256, options->data_sha256, err);
    if (status == AQ_OK) status = aq_calib_keep_text(&c->options.spill_folder, options->spill_folder, err);
    if (status == AQ_OK && options->spill_folder && !(c->pool.folder = aq_strdup(options->spill_folder)))
        status = aq_fail_memory(err, strlen(options->spill_folder), "a path");
    if (status != AQ_OK) {
        aq_calib_free(c);
        return status;
    }
    *out = c;
    return AQ_OK;
}

static void free_gradient(aq_calib_layer *l) {
    aq_free(l->gradient_rows);
    aq_free(l->gradient_cols);
    aq_free(l->gradient_rows_mean);
    aq_free(l->gradient_cols_mean);
}

void aq_calib_layer_free(aq_calib *c, aq_calib_layer *layer) {
    for (uint32_t g = 0; layer->groups && g < c->options.n_groups; g++) aq_sums_free(c, &layer->groups[g], layer->n_inputs);
    for (uint32_t g = 0; layer->moments && g < aq_calib_n_moments(c); g++) aq_moment_free(&layer->moments[g], &c->pool);
    aq_free(layer->groups);
    aq_free(layer->moments);
    aq_free(layer->timesteps);
    free_gradient(layer);
    aq_free(layer->name);
}

void aq_calib_free(aq_calib *c) {
    if (!c) return;
    for (size_t i = 0; i < c->n_layers; i++) aq_calib_layer_free(c, &c->layers[i]);
    aq_moment_pool_free(&c->pool);
    if (c->map.data || c->map.fd >= 0) aq_file_map_close(&c->map);
    aq_free((void *)(uintptr_t)c->options.data_name);
    aq_free((void *)(uintptr_t)c->options.data_sha256);
    aq_free((void *)(uintptr_t)c->options.spill_folder);
    for (size_t i = 0; i < c->n_owned; i++) aq_free(c->owned[i]);
    aq_free(c->owned);
    aq_free(c->layers);
    aq_free(c->table);
    aq_free(c->path);
    aq_free(c);
}

/* ---- layers ---- */

static size_t slot(const aq_calib *c, const char *name) {
    size_t at = (size_t)XXH3_64bits(name, strlen(name)) & (c->table_size - 1);
    while (c->table[at] && strcmp(c->layers[c->table[at] - 1].name, name) != 0) at = (at + 1) & (c->table_size - 1);
    return at;
}

int64_t aq_calib_find(const aq_calib *c, const char *name) { return c->table_size ? (int64_t)c->table[slot(c, name)] - 1 : -1; }

static bool grow(aq_calib *c) {
    if (c->n_layers == c->layers_cap) {
        size_t cap = c->layers_cap ? 2 * c->layers_cap : 64;
        aq_calib_layer *layers = aq_realloc(c->layers, cap, sizeof *layers);
        if (!layers) return false;
        c->layers = layers;
        c->layers_cap = cap;
    }
    if (2 * (c->n_layers + 1) <= c->table_size) return true;
    size_t size = c->table_size ? 2 * c->table_size : 128;
    uint32_t *table = aq_calloc(size, sizeof *table);
    if (!table) return false;
    aq_free(c->table);
    c->table = table;
    c->table_size = size;
    for (size_t i = 0; i < c->n_layers; i++) c->table[slot(c, c->layers[i].name)] = (uint32_t)i + 1;
    return true;
}

/* Room for a layer's statistics: sums in memory, H there too or spilled. */
static aq_status plan(aq_calib *c, aq_calib_layer *layer, aq_error *err) {
    uint64_t n = layer->n_inputs, groups = c->options.n_groups, sums = groups * (n * BYTES_PER_INPUT + sizeof(aq_sums) + ALIGN),
             bound = c->options.max_memory_bytes;
    if (bound && (sums > bound || c->planned_bytes > bound - sums)) {
        aq_fail_at(err, AQ_ERR_MEMORY, NULL, layer->name, "the sums of its inputs would take the statistics beyond max_memory_bytes, %llu",
                   (unsigned long long)bound);
        aq_hint(err, "give more memory, fewer time groups, or record fewer layers at a time and merge");
        return AQ_ERR_MEMORY;
    }
    layer->groups = aq_calloc(groups, sizeof *layer->groups);
    if (!layer->groups) return aq_fail_memory(err, groups * sizeof *layer->groups, "a layer's statistics");
    c->planned_bytes += sums;
    if (!c->options.hessian || n > c->options.hessian_most) return AQ_OK;

    uint64_t triangle = 0, rows = 0, n_moments = aq_calib_n_moments(c), total = 0;
    layer->moments = aq_calloc(n_moments, sizeof *layer->moments);
    if (!layer->moments || !aq_moment_cost(n, &triangle, &rows) || !aq_mul(n_moments, triangle + rows, &total))
        return aq_fail_memory(err, n_moments * sizeof *layer->moments, "a layer's second moments");
    bool spilled = bound && (total > bound || c->planned_bytes > bound - total);
    if (!spilled) c->planned_bytes += total;
    for (uint64_t g = 0; g < n_moments; g++) {
        layer->moments[g].n = n;
        layer->moments[g].spilled = spilled;
    }
    return AQ_OK;
}

aq_status aq_calib_add_layer(aq_calib *c, const char *name, uint64_t n_inputs, const char *same_input_as, size_t *index, aq_error *err) {
    aq_error_clear(err);
    size_t length = name ? strlen(name) : 0;
    if (length == 0 || length > AQ_CALIB_LIMIT_NAME_BYTES)
        return aq_fail(err, AQ_ERR_USAGE, "a layer's name has %zu bytes, expected 1 to %d", length, AQ_CALIB_LIMIT_NAME_BYTES);
    if (n_inputs == 0 || n_inputs > AQ_CALIB_LIMIT_INPUTS)
        return aq_fail_at(err, AQ_ERR_USAGE, NULL, name, "has %llu inputs, expected 1 to %llu", (unsigned long long)n_inputs,
                          (unsigned long long)AQ_CALIB_LIMIT_INPUTS);
    if (c->n_layers >= AQ_CALIB_LIMIT_LAYERS) return aq_fail(err, AQ_ERR_USAGE, "more than %d layers", AQ_CALIB_LIMIT_LAYERS);
    if (aq_calib_find(c, name) >= 0) return aq_fail_at(err, AQ_ERR_USAGE, NULL, name, "is in the collection already");
    int64_t shared = same_input_as ? aq_calib_find(c, same_input_as) : -1;
    if (same_input_as && shared < 0) {
        char shown[256];
        return aq_fail_at(err, AQ_ERR_USAGE, NULL, name, "shares the input of \"%s\", which is not in the collection",
                          aq_escape(shown, sizeof shown, same_input_as, strlen(same_input_as)));
    }
    if (shared >= 0 && c->layers[shared].n_inputs != n_inputs)
        return aq_fail_at(err, AQ_ERR_USAGE, NULL, name, "has %llu inputs, and the layer it shares its input with %llu", (unsigned long long)n_inputs,
                          (unsigned long long)c->layers[shared].n_inputs);

    if (!grow(c)) return aq_fail_memory(err, c->n_layers * sizeof *c->layers, "the list of layers");
    aq_calib_layer layer = {.n_inputs = n_inputs, .source = shared >= 0 ? c->layers[shared].source : c->n_layers, .name = aq_strdup(name)};
    aq_status status = layer.name ? AQ_OK : aq_fail_memory(err, length, "a name");
    if (status == AQ_OK && shared < 0) status = plan(c, &layer, err);
    if (status != AQ_OK) {
        aq_calib_layer_free(c, &layer);
        return status;
    }
    size_t at = slot(c, name);
    atomic_store(&c->is_changed, true);
    c->layers[c->n_layers] = layer;
    c->table[at] = (uint32_t)++c->n_layers;
    if (index) *index = c->n_layers - 1;
    return AQ_OK;
}

/* ---- sums ---- */

static uint64_t sums_bytes(uint64_t n) { return n * BYTES_PER_INPUT; } /* n is bounded by AQ_CALIB_LIMIT_INPUTS */

bool aq_sums_reserve(aq_calib *c, aq_sums *s, uint64_t n) {
    if (s->sum) return true;
    s->sum = aq_calloc(1, sums_bytes(n));
    if (!s->sum) return false;
    atomic_fetch_add(&c->pool.held_bytes, sums_bytes(n));
    s->sum_sq = s->sum + n;
    s->absmax = (void *)(s->sum_sq + n);
    s->min = s->absmax + n;
    s->max = s->min + n;
    for (uint64_t j = 0; j < n; j++) s->min[j] = INFINITY, s->max[j] = -INFINITY;
    return true;
}

void aq_sums_free(aq_calib *c, aq_sums *s, uint64_t n) {
    if (s->sum) atomic_fetch_sub(&c->pool.held_bytes, sums_bytes(n));
    aq_free(s->sum);
    memset(s, 0, sizeof *s);
}

void aq_sums_add(aq_sums *into, const aq_sums *from, uint64_t n) {
    into->count += from->count;
    for (uint64_t j = 0; j < n; j++) into->sum[j] += from->sum[j];
    for (uint64_t j = 0; j < n; j++) into->sum_sq[j] += from->sum_sq[j];
    for (uint64_t j = 0; j < n; j++) into->min[j] = from->min[j] < into->min[j] ? from->min[j] : into->min[j];
    for (uint64_t j = 0; j < n; j++) into->max[j] = from->max[j] > into->max[j] ? from->max[j] : into->max[j];
    for (uint64_t j = 0; j < n; j++) {
        float low = fabsf(into->min[j]), high = fabsf(into->max[j]);
        into->absmax[j] = low > high ? low : high;
    }
}

void aq_timestep_finish(aq_timestep_stats *t) {
    double n = (double)t->count;
    t->mean = n > 0 ? t->sum / n : 0;
    double variance = n > 0 ? t->sum_sq / n - t->mean * t->mean : 0;
    t->std = variance > 0 ? sqrt(variance) : 0;
}

bool aq_timesteps_add(aq_calib_layer *layer, const aq_timestep_stats *add) {
    size_t low = 0, high = layer->n_timesteps;
    while (low < high) {
        size_t middle = low + (high - low) / 2;
        if (layer->timesteps[middle].timestep < add->timestep)
            low = middle + 1;
        else
            high = middle;
    }
    aq_timestep_stats *t = layer->timesteps ? layer->timesteps + low : NULL;
    if (!t || low == layer->n_timesteps || t->timestep != add->timestep) {
        if (!layer->timesteps || layer->n_timesteps == layer->timesteps_cap) {
            size_t cap = layer->timesteps_cap ? 2 * layer->timesteps_cap : 16;
            aq_timestep_stats *grown = aq_realloc(layer->timesteps, cap, sizeof *grown);
            if (!grown) return false;
            layer->timesteps = grown;
            layer->timesteps_cap = cap;
        }
        t = layer->timesteps + low;
        memmove(t + 1, t, (layer->n_timesteps++ - low) * sizeof *t);
        *t = *add;
    } else {
        t->count += add->count;
        t->sum += add->sum;
        t->sum_sq += add->sum_sq;
        t->min = add->min < t->min ? add->min : t->min;
        t->max = add->max > t->max ? add->max : t->max;
    }
    aq_timestep_finish(t);
    return true;
}

/* ---- reading ---- */

const aq_calib_options *aq_calib_settings(const aq_calib *c) { return &c->options; }
uint64_t aq_calib_held_bytes(const aq_calib *c) { return atomic_load(&c->pool.held_bytes); }
size_t aq_calib_n_layers(const aq_calib *c) { return c->n_layers; }
const char *aq_calib_layer_name(const aq_calib *c, size_t layer) { return c->layers[layer].name; }
uint64_t aq_calib_n_inputs(const aq_calib *c, size_t layer) { return c->layers[layer].n_inputs; }
size_t aq_calib_source(const aq_calib *c, size_t layer) { return c->layers[layer].source; }

static const aq_calib_layer *source_of(const aq_calib *c, size_t layer) { return &c->layers[c->layers[layer].source]; }

void aq_calib_group_range(const aq_calib *c, uint32_t group, uint32_t *start, uint32_t *end) {
    uint64_t t = c->options.n_timesteps, g = c->options.n_groups;
    *start = (uint32_t)(group * t / g);
    *end = (uint32_t)((group + UINT64_C(1)) * t / g);
}

uint32_t aq_calib_group_of(const aq_calib *c, int32_t timestep) {
    uint64_t t = c->options.n_timesteps, g = c->options.n_groups;
    if (timestep < 0 || t == 0) return 0;
    return (uint32_t)((((uint64_t)timestep + 1) * g - 1) / t); /* the largest group that starts at or before it */
}

uint64_t aq_calib_count(const aq_calib *c, size_t layer) {
    const aq_calib_layer *l = source_of(c, layer);
    uint64_t count = 0;
    for (uint32_t g = 0; g < c->options.n_groups; g++) count += l->groups[g].count;
    return count;
}

bool aq_calib_has_hessian(const aq_calib *c, size_t layer) {
    const aq_calib_layer *l = source_of(c, layer);
    for (uint32_t g = 0; l->moments && g < aq_calib_n_moments(c); g++)
        if (l->moments[g].count > 0) return true;
    return false;
}

aq_calib_stats aq_calib_group(const aq_calib *c, size_t layer, uint32_t group) {
    const aq_calib_layer *l = source_of(c, layer);
    const aq_moment *moment = aq_calib_moment(c, l, group);
    aq_calib_stats out = {.hessian_count = moment ? moment->count : 0};
    const aq_sums *s = &l->groups[group];
    if (s->count > 0 && !c->options.diagonal_only) {
        out.count = s->count;
        out.sum = s->sum;
        out.sum_sq = s->sum_sq;
        out.absmax = s->absmax;
        out.min = s->min;
        out.max = s->max;
    }
    return out;
}

bool aq_calib_mean_std(const aq_calib *c, size_t layer, uint32_t group, double *mean, double *std) {
    aq_calib_stats s = aq_calib_group(c, layer, group);
    double rows = (double)s.count;
    for (uint64_t i = 0; s.count > 0 && i < aq_calib_n_inputs(c, layer); i++) {
        double m = s.sum[i] / rows, variance = s.min[i] < s.max[i] ? s.sum_sq[i] / rows - m * m : 0;
        if (mean) mean[i] = m;
        if (std) std[i] = variance > 0 ? sqrt(variance) : 0;
    }
    return s.count > 0;
}

const aq_timestep_stats *aq_calib_timesteps(const aq_calib *c, size_t layer, size_t *n) {
    const aq_calib_layer *l = source_of(c, layer);
    *n = l->n_timesteps;
    return l->timesteps;
}

/* Share of each group: weight (or count) over its rows, divided by the sum of weights of those seen. *total 0: none was seen. */
static double share(const double *weights, uint64_t count, uint32_t group, double *total) {
    double w = count == 0 ? 0 : weights ? weights[group] : (double)count;
    *total += w;
    return w;
}

static aq_status check_weights(const double *weights, uint32_t n, aq_error *err) {
    for (uint32_t g = 0; weights && g < n; g++)
        if (!(weights[g] >= 0) || !isfinite(weights[g])) return aq_fail(err, AQ_ERR_USAGE, "the weight of time group %u is not finite and at least 0", g);
    return AQ_OK;
}

aq_status aq_calib_diagonal(const aq_calib *c, size_t layer, const double *weights, float *h, aq_error *err) {
    aq_error_clear(err);
    const aq_calib_layer *l = source_of(c, layer);
    aq_status status = check_weights(weights, c->options.n_groups, err);
    if (status != AQ_OK) return status;
    double total = 0;
    for (uint32_t g = 0; g < c->options.n_groups; g++) share(weights, l->groups[g].count, g, &total);
    if (!(total > 0)) return aq_fail_at(err, AQ_ERR_USAGE, NULL, c->layers[layer].name, "no inputs were recorded, or all weights are 0");
    for (uint64_t j = 0; j < l->n_inputs; j++) {
        double sum = 0, unused = 0;
        for (uint32_t g = 0; g < c->options.n_groups; g++)
            if (l->groups[g].count > 0) sum += share(weights, l->groups[g].count, g, &unused) * (l->groups[g].sum_sq[j] / (double)l->groups[g].count);
        h[j] = (float)(sum / total);
    }
    return AQ_OK;
}

aq_status aq_calib_settle(const aq_calib *c, const aq_calib_layer *layer, aq_error *err) {
    aq_moment_pool *pool = &((aq_calib *)(uintptr_t)c)->pool;
    aq_status status = AQ_OK;
    static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; /* readers may be several threads; flushing is rare */
    pthread_mutex_lock(&lock);
    for (uint32_t g = 0; status == AQ_OK && layer->moments && g < aq_calib_n_moments(c); g++) status = aq_moment_flush(&layer->moments[g], pool, 1, err);
    pthread_mutex_unlock(&lock);
    return status;
}

aq_status aq_calib_hessian(const aq_calib *c, size_t layer, const double *weights, float *h, aq_error *err) {
    aq_error_clear(err);
    const aq_calib_layer *l = source_of(c, layer);
    uint32_t n_moments = aq_calib_n_moments(c);
    if (c->options.hessian_pooled) weights = NULL;
    aq_status status = check_weights(weights, n_moments, err);
    if (status == AQ_OK) status = aq_calib_settle(c, l, err);
    double total = 0;
    for (uint32_t g = 0; l->moments && g < n_moments; g++) share(weights, l->moments[g].count, g, &total);
    if (status == AQ_OK && (!l->moments || !(total > 0))) {
        status = aq_fail_at(err, AQ_ERR_USAGE, NULL, c->layers[layer].name, "the statistics hold no second moment of its inputs");
        aq_hint(err, "record with hessian on; layers of more than %llu inputs have none", (unsigned long long)c->options.hessian_most);
    }
    for (uint32_t g = 0; status == AQ_OK && g < n_moments; g++)
        if (l->moments[g].count > 0) status = aq_moment_check(&l->moments[g], err);
    if (status != AQ_OK) return status;

    uint64_t n = l->n_inputs, size = aq_moment_panel_size(n);
    double *sum = aq_alloc(size * sizeof *sum), *buffer = aq_alloc(size * sizeof *buffer);
    if (!sum || !buffer) status = aq_fail_memory(err, 16 * size, "a part of a second moment");
    for (uint64_t p = 0; status == AQ_OK && p < aq_moment_n_panels(n); p++) {
        uint64_t begin, end;
        aq_moment_panel_rows(n, p, &begin, &end);
        uint64_t width = n - begin;
        memset(sum, 0, (size_t)((end - begin) * width * sizeof *sum));
        for (uint32_t g = 0; status == AQ_OK && g < n_moments; g++) {
            const aq_moment *m = &l->moments[g];
            const double *panel;
            double unused = 0, factor = share(weights, m->count, g, &unused) / total / (double)(m->count ? m->count : 1);
            if (factor == 0) continue;
            status = aq_moment_panel(m, &c->pool, p, buffer, &panel, err);
            for (uint64_t i = 0; status == AQ_OK && i < (end - begin) * width; i++) sum[i] += factor * panel[i];
        }
        for (uint64_t i = begin; status == AQ_OK && i < end; i++)
            for (uint64_t j = i; j < n; j++) h[i * n + j] = h[j * n + i] = (float)sum[(i - begin) * width + (j - begin)];
    }
    aq_free(sum);
    aq_free(buffer);
    return status;
}

aq_status aq_calib_mean(const aq_calib *c, size_t layer, const double *weights, float *mean, bool *of_hessian, aq_error *err) {
    aq_error_clear(err);
    if (of_hessian) *of_hessian = false;
    if (c->options.diagonal_only) return aq_fail_at(err, AQ_ERR_USAGE, NULL, c->layers[layer].name, "the statistics hold no means of its inputs");
    if (c->options.hessian_pooled) weights = NULL;
    aq_status status = check_weights(weights, c->options.n_groups, err);
    uint64_t n = aq_calib_n_inputs(c, layer), rows = 0, in_hessian = 0;
    double total = 0, *sum = aq_calloc(n, sizeof *sum);
    if (status == AQ_OK && !sum) status = aq_fail_memory(err, n * sizeof *sum, "means of a layer's inputs");
    for (uint32_t g = 0; status == AQ_OK && g < c->options.n_groups; g++) {
        aq_calib_stats s = aq_calib_group(c, layer, g);
        double factor = share(weights, s.count, g, &total) / (double)(s.count ? s.count : 1);
        rows += s.count;
        in_hessian = c->options.hessian_pooled ? s.hessian_count : in_hessian + s.hessian_count;
        for (uint64_t i = 0; factor != 0 && s.sum && i < n; i++) sum[i] += factor * s.sum[i];
    }
    for (uint64_t i = 0; status == AQ_OK && i < n; i++) {
        mean[i] = total > 0 ? (float)(sum[i] / total) : 0;
        if (!isfinite(mean[i])) status = aq_fail_at(err, AQ_ERR_QUALITY, NULL, c->layers[layer].name, "the mean of its inputs is not finite");
    }
    if (of_hessian) *of_hessian = in_hessian > 0 && in_hessian >= rows;
    aq_free(sum);
    return status;
}

/* ---- gradients ---- */

bool aq_gradient_reserve(aq_calib_layer *l, uint64_t rows) {
    if (l->n_gradients > 0) return true; /* all calls for a layer agree on the rows */
    free_gradient(l);                    /* of a gradient that was refused */
    l->gradient_rows = aq_calloc(rows, sizeof(double));
    l->gradient_cols = aq_calloc(l->n_inputs, sizeof(double));
    l->gradient_rows_mean = aq_calloc(rows, sizeof(double));
    l->gradient_cols_mean = aq_calloc(l->n_inputs, sizeof(double));
    l->n_gradient_rows = rows;
    return l->gradient_rows && l->gradient_cols && l->gradient_rows_mean && l->gradient_cols_mean;
}

void aq_gradient_finish(aq_calib_layer *l) {
    double of_rows = 1 / ((double)l->n_inputs * (double)l->n_gradients), of_cols = 1 / ((double)l->n_gradient_rows * (double)l->n_gradients);
    for (uint64_t i = 0; i < l->n_gradient_rows; i++) l->gradient_rows_mean[i] = l->gradient_rows[i] * of_rows;
    for (uint64_t j = 0; j < l->n_inputs; j++) l->gradient_cols_mean[j] = l->gradient_cols[j] * of_cols;
}

aq_status aq_calib_add_gradient(aq_calib *c, size_t layer, const float *gradient, uint64_t rows, aq_error *err) {
    aq_error_clear(err);
    if (layer >= c->n_layers) return aq_fail(err, AQ_ERR_USAGE, "there is no layer %zu", layer);
    aq_calib_layer *l = &c->layers[layer];
    uint64_t n = l->n_inputs;
    if (rows == 0 || rows > AQ_CALIB_LIMIT_INPUTS || (l->n_gradients > 0 && rows != l->n_gradient_rows))
        return aq_fail_at(err, AQ_ERR_USAGE, NULL, l->name, "a gradient has %llu rows, the ones before %llu", (unsigned long long)rows,
                          (unsigned long long)l->n_gradient_rows);
    double *row_sums = aq_alloc(rows * sizeof *row_sums), *col_sums = aq_calloc(n, sizeof *col_sums);
    aq_status status = aq_gradient_reserve(l, rows) && row_sums && col_sums ? AQ_OK : aq_fail_memory(err, 8 * (rows + n), "a gradient");
    for (uint64_t i = 0; status == AQ_OK && i < rows; i++) {
        double sum = 0;
        for (uint64_t j = 0; j < n; j++) {
            double square = (double)gradient[i * n + j] * (double)gradient[i * n + j];
            sum += square;
            col_sums[j] += square;
        }
        row_sums[i] = sum;
        if (!isfinite(sum)) status = aq_fail_at(err, AQ_ERR_FORMAT, NULL, l->name, "row %llu of a gradient is not finite", (unsigned long long)i);
    }
    if (status == AQ_OK) {
        l->n_gradients++;
        for (uint64_t i = 0; i < rows; i++) l->gradient_rows[i] += row_sums[i];
        for (uint64_t j = 0; j < n; j++) l->gradient_cols[j] += col_sums[j];
        aq_gradient_finish(l);
        atomic_store(&c->is_changed, true);
    }
    aq_free(row_sums);
    aq_free(col_sums);
    return status;
}

bool aq_calib_gradient(const aq_calib *c, size_t layer, const double **rows, uint64_t *n_rows, const double **cols) {
    const aq_calib_layer *l = &c->layers[layer];
    *rows = l->gradient_rows_mean;
    *n_rows = l->n_gradient_rows;
    *cols = l->gradient_cols_mean;
    return l->n_gradients > 0;
}
