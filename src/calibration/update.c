/* Rows of inputs become statistics: sums per column and time group, scalars per timestep, and rows for H.
 *
 * A call is added to sums of its own, which begin at zero; only when all of its values turn out finite are they added to the collection. Columns are cut
 * into tiles of fixed width, tasks of the threads; inside a tile the rows of a run (neighbours with the same timestep) go by in blocks that fit the cache. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/cpu.h"
#include "base/mem.h"
#include "base/size.h"
#include "base/threads.h"
#include "calibration/internal.h"
#include "kernels/kernels.h"

enum { TILE = 256, ROWS_AT_ONCE = 32 };

/* Rows [begin, end) have the same timestep. */
typedef struct {
    uint64_t begin, end;
    int32_t timestep;
    uint32_t group;
} run;

/* Scalars of one run over the columns of one tile. */
typedef struct {
    double sum, sum_sq;
    float min, max;
} tile_scalars;

typedef struct {
    aq_calib *calib;
    aq_calib_layer *layer;
    const float *x;
    uint64_t stride;
    run *runs;
    size_t n_runs, n_tiles;
    aq_sums *sums;         /* [n_groups]: of this call */
    tile_scalars *scalars; /* [n_runs][n_tiles] */
} update;

/* ---- runs ---- */

static aq_status find_runs(update *u, const int32_t *timesteps, int32_t timestep, uint64_t n_rows, uint64_t rows_per_timestep, aq_error *err) {
    uint32_t t_end = u->calib->options.n_timesteps;
    uint64_t n = timesteps ? n_rows / rows_per_timestep : 1;
    u->runs = aq_alloc(n * sizeof *u->runs);
    if (!u->runs) return aq_fail_memory(err, n * sizeof *u->runs, "the rows of a call");
    for (uint64_t i = 0; i < n; i++) {
        int32_t t = timesteps ? timesteps[i] : timestep;
        if (t < -1 || (t_end > 0 && t >= (int64_t)t_end))
            return aq_fail_at(err, AQ_ERR_FORMAT, NULL, u->layer->name, "row %llu: timestep %d is outside the schedule of %u",
                              (unsigned long long)(i * rows_per_timestep), (int)t, t_end);
        uint64_t begin = timesteps ? i * rows_per_timestep : 0, end = timesteps ? begin + rows_per_timestep : n_rows;
        if (u->n_runs > 0 && u->runs[u->n_runs - 1].timestep == t)
            u->runs[u->n_runs - 1].end = end;
        else
            u->runs[u->n_runs++] = (run){begin, end, t, aq_calib_group_of(u->calib, t)};
    }
    return AQ_OK;
}

/* ---- sums ---- */

static bool sum_tile(void *context, size_t tile) {
    update *u = context;
    const aq_kernels *k = aq_kernels_get();
    size_t begin = tile * TILE, n = u->layer->n_inputs - begin < TILE ? (size_t)(u->layer->n_inputs - begin) : TILE;
    double sum[TILE], sum_sq[TILE];
    float lo[TILE], hi[TILE];
    for (size_t r = 0; r < u->n_runs; r++) {
        const run *rows = &u->runs[r];
        for (size_t j = 0; j < n; j++) sum[j] = sum_sq[j] = 0, lo[j] = INFINITY, hi[j] = -INFINITY;
        for (uint64_t i = rows->begin; i < rows->end; i += ROWS_AT_ONCE) {
            size_t some = rows->end - i < ROWS_AT_ONCE ? (size_t)(rows->end - i) : ROWS_AT_ONCE;
            k->column_stats(u->x + i * u->stride + begin, some, (size_t)u->stride, n, sum, sum_sq, lo, hi);
        }
        aq_sums *to = &u->sums[rows->group];
        tile_scalars all = {0, 0, INFINITY, -INFINITY};
        for (size_t j = 0; j < n; j++) {
            to->sum[begin + j] += sum[j];
            to->sum_sq[begin + j] += sum_sq[j];
            to->min[begin + j] = lo[j] < to->min[begin + j] ? lo[j] + 0.0f : to->min[begin + j]; /* + 0: a zero is +0, whatever came first */
            to->max[begin + j] = hi[j] > to->max[begin + j] ? hi[j] + 0.0f : to->max[begin + j];
            all.sum += sum[j];
            all.sum_sq += sum_sq[j];
            all.min = lo[j] < all.min ? lo[j] + 0.0f : all.min;
            all.max = hi[j] > all.max ? hi[j] + 0.0f : all.max;
        }
        u->scalars[r * u->n_tiles + tile] = all;
    }
    return true;
}

static bool reserve(update *u) {
    uint64_t n = u->layer->n_inputs;
    u->n_tiles = (size_t)aq_div_up(n, TILE);
    u->sums = aq_calloc(u->calib->options.n_groups, sizeof *u->sums);
    uint64_t size;
    u->scalars = aq_mul(u->n_runs, u->n_tiles * sizeof *u->scalars, &size) ? aq_alloc(size) : NULL;
    if (!u->sums || !u->scalars) return false;
    for (size_t r = 0; r < u->n_runs; r++) {
        uint32_t g = u->runs[r].group;
        if (!aq_sums_reserve(u->calib, &u->sums[g], n) || !aq_sums_reserve(u->calib, &u->layer->groups[g], n)) return false;
        u->sums[g].count += u->runs[r].end - u->runs[r].begin;
    }
    return true;
}

/* Every value was finite, and small enough for H. Names the first that is not. */
static aq_status check_values(const update *u, aq_error *err) {
    uint64_t n = u->layer->n_inputs;
    bool ok = true;
    for (size_t i = 0; i < u->n_runs * u->n_tiles; i++) {
        const tile_scalars *s = &u->scalars[i];
        ok = ok && isfinite(s->sum_sq) && (!u->layer->moments || (s->min > -AQ_CALIB_HUGE && s->max < AQ_CALIB_HUGE));
    }
    if (ok) return AQ_OK;
    for (size_t r = 0; r < u->n_runs; r++)
        for (uint64_t i = u->runs[r].begin; i < u->runs[r].end; i++)
            for (uint64_t j = 0; j < n; j++) {
                float v = u->x[i * u->stride + j];
                if (isfinite(v) && (!u->layer->moments || fabsf(v) < AQ_CALIB_HUGE)) continue;
                return aq_fail_at(err, AQ_ERR_FORMAT, NULL, u->layer->name, "row %llu, channel %llu of its input is %s", (unsigned long long)i,
                                  (unsigned long long)j,
                                  isnan(v)   ? "NaN"
                                  : isinf(v) ? "infinite"
                                             : "beyond 1e16, too large for a second moment");
            }
    return aq_fail_at(err, AQ_ERR_FORMAT, NULL, u->layer->name, "its input is not finite");
}

/* Adds the scalars of the runs to those of the layer's timesteps. */
static bool add_timesteps(update *u) {
    for (size_t r = 0; r < u->n_runs; r++) {
        aq_timestep_stats t = {.timestep = u->runs[r].timestep, .min = INFINITY, .max = -INFINITY};
        t.count = (u->runs[r].end - u->runs[r].begin) * u->layer->n_inputs;
        for (size_t k = 0; k < u->n_tiles; k++) {
            const tile_scalars *s = &u->scalars[r * u->n_tiles + k];
            t.sum += s->sum;
            t.sum_sq += s->sum_sq;
            t.min = s->min < t.min ? s->min : t.min;
            t.max = s->max > t.max ? s->max : t.max;
        }
        if (!aq_timesteps_add(u->layer, &t)) return false;
    }
    return true;
}

static aq_status add_moments(update *u, int n_threads, aq_error *err) {
    aq_calib *c = u->calib;
    uint64_t n = u->layer->n_inputs, every = c->options.hessian_full ? aq_div_up(n, c->options.hessian_full) : 1;
    aq_status status = AQ_OK;
    for (size_t r = 0; status == AQ_OK && r < u->n_runs; r++) {
        const run *rows = &u->runs[r];
        aq_moment *m = aq_calib_moment(c, u->layer, rows->group);
        status = aq_moment_add(m, &c->pool, u->x + rows->begin * u->stride, rows->end - rows->begin, u->stride, every, n_threads, err);
    }
    for (uint32_t g = 0; status == AQ_OK && g < aq_calib_n_moments(c); g++) { /* a spilled one holds nothing between calls */
        aq_moment *m = &u->layer->moments[g];
        if (!m->spilled) continue;
        status = aq_moment_flush(m, &c->pool, n_threads, err);
        if (status == AQ_OK) aq_moment_trim(m, &c->pool);
    }
    return status;
}

/* `rows_per_timestep` rows belong to each entry of timesteps. */
static aq_status add_rows(aq_calib *c, aq_calib_layer *layer, const float *x, uint64_t n_rows, uint64_t stride, const int32_t *timesteps, int32_t timestep,
                          uint64_t rows_per_timestep, int n_threads, aq_error *err) {
    if (n_rows == 0) return AQ_OK;
    atomic_store(&c->is_changed, true);
    update u = {.calib = c, .layer = layer, .x = x, .stride = stride};
    aq_status status = find_runs(&u, timesteps, timestep, n_rows, rows_per_timestep, err);
    if (status == AQ_OK && !reserve(&u)) status = aq_fail_memory(err, layer->n_inputs * 28, "the statistics of a call");
    if (status == AQ_OK) {
        /* A thread is worth starting for about a million values (100 µs), one that stands ready for a quarter of that. */
        uint64_t most = (uint64_t)aq_cpu_threads(n_threads), worth = n_rows * layer->n_inputs >> (aq_threads_ready() ? 18 : 20);
        aq_parallel_for(u.n_tiles, worth < 2 ? 1 : (int)(worth < most ? worth : most), sum_tile, &u);
        status = check_values(&u, err);
    }
    if (status == AQ_OK && layer->moments) status = add_moments(&u, n_threads, err);
    if (status == AQ_OK && !add_timesteps(&u)) status = aq_fail_memory(err, sizeof *layer->timesteps, "the list of timesteps");
    for (uint32_t g = 0; u.sums && g < c->options.n_groups; g++) {
        if (status == AQ_OK && u.sums[g].count > 0) aq_sums_add(&layer->groups[g], &u.sums[g], layer->n_inputs);
        aq_sums_free(c, &u.sums[g], layer->n_inputs);
    }
    aq_free(u.runs);
    aq_free(u.sums);
    aq_free(u.scalars);
    return status;
}

static aq_status layer_to_update(aq_calib *c, size_t index, aq_calib_layer **out, aq_error *err) {
    if (index >= c->n_layers) return aq_fail(err, AQ_ERR_USAGE, "there is no layer %zu", index);
    *out = &c->layers[index];
    if (c->options.diagonal_only)
        return aq_fail_at(err, AQ_ERR_USAGE, NULL, (*out)->name, "the collection is an imported importance matrix: rows cannot be added");
    if ((*out)->source == index) return AQ_OK;
    char shown[256];
    const char *source = c->layers[(*out)->source].name;
    return aq_fail_at(err, AQ_ERR_USAGE, NULL, (*out)->name, "shares the statistics of \"%s\": that one is updated",
                      aq_escape(shown, sizeof shown, source, strlen(source)));
}

aq_status aq_calib_update(aq_calib *c, size_t index, const float *x, uint64_t n_rows, uint64_t row_stride, const int32_t *timesteps, int32_t timestep,
                          int n_threads, aq_error *err) {
    aq_error_clear(err);
    aq_calib_layer *layer;
    aq_status status = layer_to_update(c, index, &layer, err);
    if (status != AQ_OK) return status;
    if (n_rows > 1 && row_stride < layer->n_inputs)
        return aq_fail_at(err, AQ_ERR_USAGE, NULL, layer->name, "its rows lie %llu floats apart and have %llu", (unsigned long long)row_stride,
                          (unsigned long long)layer->n_inputs);
    return add_rows(c, layer, x, n_rows, row_stride, timesteps, timestep, 1, n_threads, err);
}

/* ---- convolutions ---- */

enum { UNFOLD_BYTES = 4 << 20 };

typedef struct {
    const aq_conv_shape *s;
    uint64_t out[3];       /* size of the output */
    uint64_t channels;     /* of one group */
    uint64_t n_per_sample; /* rows: output places x groups */
} unfolding;

static aq_status check_shape(unfolding *f, const aq_calib_layer *layer, aq_error *err) {
    const aq_conv_shape *s = f->s;
    uint64_t n = 0, kernel = 1;
    bool ok = s->groups > 0 && s->channels > 0 && s->channels % s->groups == 0;
    f->channels = ok ? s->channels / s->groups : 0;
    f->n_per_sample = s->groups;
    for (int d = 0; ok && d < 3; d++) {
        uint64_t padded = (uint64_t)s->size[d] + 2 * (uint64_t)s->padding[d], reach;
        ok = s->kernel[d] > 0 && s->stride[d] > 0 && s->dilation[d] > 0 && aq_mul(s->kernel[d] - UINT64_C(1), s->dilation[d], &reach) && reach < padded &&
             aq_mul(kernel, s->kernel[d], &kernel);
        f->out[d] = ok ? (padded - reach - 1) / s->stride[d] + 1 : 0;
        ok = ok && aq_mul(f->n_per_sample, f->out[d], &f->n_per_sample);
    }
    uint64_t count = s->batch;
    ok = ok && aq_mul(f->channels, kernel, &n) && aq_mul(count, s->channels, &count);
    for (int d = 0; ok && d < 3; d++) ok = aq_mul(count, s->size[d], &count) && count < UINT64_C(1) << 60;
    if (!ok) return aq_fail_at(err, AQ_ERR_USAGE, NULL, layer->name, "the shape of its convolution is impossible");
    if (n != layer->n_inputs)
        return aq_fail_at(err, AQ_ERR_USAGE, NULL, layer->name, "its convolution has %llu inputs, the layer %llu", (unsigned long long)n,
                          (unsigned long long)layer->n_inputs);
    return AQ_OK;
}

/* Row `index` of a sample: the inputs that one output place of one group of channels sees, zero where they lie in the padding. */
static void unfold(const unfolding *f, const float *sample, uint64_t index, float *row) {
    const aq_conv_shape *s = f->s;
    uint64_t group = index % s->groups, place = index / s->groups, plane = (uint64_t)s->size[0] * s->size[1] * s->size[2];
    uint64_t at[3] = {place / f->out[2] / f->out[1], place / f->out[2] % f->out[1], place % f->out[2]};
    const float *channel = sample + group * f->channels * plane;
    for (uint64_t c = 0; c < f->channels; c++, channel += plane)
        for (uint64_t i = 0; i < s->kernel[0]; i++)
            for (uint64_t j = 0; j < s->kernel[1]; j++)
                for (uint64_t k = 0; k < s->kernel[2]; k++) {
                    /* Below 0 wraps to a large number: outside as well. */
                    uint64_t z = at[0] * s->stride[0] + i * s->dilation[0] - s->padding[0], y = at[1] * s->stride[1] + j * s->dilation[1] - s->padding[1],
                             x = at[2] * s->stride[2] + k * s->dilation[2] - s->padding[2];
                    bool inside = z < s->size[0] && y < s->size[1] && x < s->size[2];
                    *row++ = inside ? channel[(z * s->size[1] + y) * s->size[2] + x] : 0.0f;
                }
}

aq_status aq_calib_update_conv(aq_calib *c, size_t index, const float *x, const aq_conv_shape *shape, const int32_t *timesteps, int32_t timestep, int n_threads,
                               aq_error *err) {
    aq_error_clear(err);
    aq_calib_layer *layer;
    aq_status status = layer_to_update(c, index, &layer, err);
    if (status != AQ_OK) return status;
    unfolding f = {.s = shape};
    status = check_shape(&f, layer, err);
    if (status != AQ_OK || shape->batch == 0) return status;
    uint64_t sample = (uint64_t)shape->channels * shape->size[0] * shape->size[1] * shape->size[2], n = layer->n_inputs;

    /* All is checked before a part of it is added. */
    uint64_t bad = aq_kernels_get()->find_nonfinite(x, (size_t)(sample * shape->batch));
    for (uint64_t i = 0; bad == sample * shape->batch && layer->moments && i < bad; i++)
        if (!(fabsf(x[i]) < AQ_CALIB_HUGE)) bad = i;
    if (bad < sample * shape->batch)
        return aq_fail_at(err, AQ_ERR_FORMAT, NULL, layer->name, "sample %llu, channel %llu of its input is %s", (unsigned long long)(bad / sample),
                          (unsigned long long)(bad % sample / (sample / shape->channels)),
                          isnan(x[bad])   ? "NaN"
                          : isinf(x[bad]) ? "infinite"
                                          : "beyond 1e16, too large for a second moment");
    for (uint32_t b = 0; timesteps && b < shape->batch; b++)
        if (timesteps[b] < -1 || (c->options.n_timesteps > 0 && timesteps[b] >= (int64_t)c->options.n_timesteps))
            return aq_fail_at(err, AQ_ERR_FORMAT, NULL, layer->name, "sample %u: timestep %d is outside the schedule of %u", b, (int)timesteps[b],
                              c->options.n_timesteps);

    uint64_t rows_at_once = UNFOLD_BYTES / (4 * n);
    if (rows_at_once == 0) rows_at_once = 1;
    if (rows_at_once > f.n_per_sample) rows_at_once = f.n_per_sample;
    float *rows = aq_alloc(rows_at_once * n * sizeof *rows);
    if (!rows) return aq_fail_memory(err, rows_at_once * n * sizeof *rows, "unfolded inputs");
    for (uint32_t b = 0; status == AQ_OK && b < shape->batch; b++)
        for (uint64_t i = 0; status == AQ_OK && i < f.n_per_sample; i += rows_at_once) {
            uint64_t some = f.n_per_sample - i < rows_at_once ? f.n_per_sample - i : rows_at_once;
            for (uint64_t r = 0; r < some; r++) unfold(&f, x + b * sample, i + r, rows + r * n);
            status = add_rows(c, layer, rows, some, n, NULL, timesteps ? timesteps[b] : timestep, some, n_threads, err);
        }
    aq_free(rows);
    return status;
}
