/* Rows of inputs become statistics: sums per column and time group, scalars per timestep, and rows for H.
 *
 * The rows of a call are cut into pieces of one timestep, the same ones at any number of threads; each has sums of its own, which are added in the order of the
 * rows. A thread takes pieces that follow each other: what it reads was mostly written a moment ago by that very thread of the host's, which cuts its own loops
 * the same way. Only when all values of the call turn out finite are its sums added to the collection: those of a few pieces wait as they are, beyond that they
 * are gathered in sums of the call. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/cpu.h"
#include "base/mem.h"
#include "base/size.h"
#include "base/threads.h"
#include "calibration/internal.h"
#include "kernels/kernels.h"

/* A task's columns; rows that go by at a time, so that they are read once for all columns of a task; most rows of a piece, pieces whose sums are held. */
enum { TILE = 256, ROWS_AT_ONCE = 16, PIECE = 512, PIECES_AT_ONCE = 32, PIECES_BYTES = 8 << 20 };
enum { BYTES_PER_INPUT = 2 * sizeof(double) + 2 * sizeof(float) }; /* of a piece */

/* Rows [begin, end) have the same timestep. What they sum up to. */
typedef struct {
    uint64_t begin, end;
    int32_t timestep;
    uint32_t group;
    double sum, sum_sq;
    float min, max;
} run;

/* Rows [begin, end) of a run, and their scalars by tiles. */
typedef struct {
    uint64_t begin, end;
    run *of;
} piece;

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
    size_t n_runs, n_tiles, n_spans;
    aq_sums *sums; /* [n_groups]: of the call's pieces that no longer fit below; NULL: all do */
    piece pieces[PIECES_AT_ONCE];
    size_t n_pieces, most_pieces;
    double *sum, *sum_sq; /* [n_pieces][n_inputs]: of the pieces */
    float *min, *max;
    tile_scalars *scalars; /* [n_pieces][n_tiles] */
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
            u->runs[u->n_runs++] = (run){begin, end, t, aq_calib_group_of(u->calib, t), 0, 0, INFINITY, -INFINITY};
    }
    return AQ_OK;
}

/* ---- sums ---- */

static void sum_tile(const update *u, size_t at, size_t tile) {
    const aq_kernels *k = aq_kernels_get();
    const piece *p = &u->pieces[at];
    size_t begin = tile * TILE, n = u->layer->n_inputs - begin < TILE ? (size_t)(u->layer->n_inputs - begin) : TILE, place = at * u->layer->n_inputs + begin;
    double sum[TILE], sum_sq[TILE]; /* not in place: another thread's cache has those lines, and gives them up once only */
    float lo[TILE], hi[TILE];
    for (size_t j = 0; j < n; j++) sum[j] = sum_sq[j] = 0, lo[j] = INFINITY, hi[j] = -INFINITY;
    for (uint64_t i = p->begin; i < p->end; i += ROWS_AT_ONCE) {
        size_t some = p->end - i < ROWS_AT_ONCE ? (size_t)(p->end - i) : ROWS_AT_ONCE;
        k->column_stats(u->x + i * u->stride + begin, some, (size_t)u->stride, n, sum, sum_sq, lo, hi);
    }
    tile_scalars all = {0, 0, INFINITY, -INFINITY};
    for (size_t j = 0; j < n; j++) {
        lo[j] += 0.0f, hi[j] += 0.0f; /* a zero is +0, whatever came first */
        all.sum += sum[j];
        all.sum_sq += sum_sq[j];
        all.min = lo[j] < all.min ? lo[j] : all.min;
        all.max = hi[j] > all.max ? hi[j] : all.max;
    }
    memcpy(u->sum + place, sum, n * sizeof *sum);
    memcpy(u->sum_sq + place, sum_sq, n * sizeof *sum);
    memcpy(u->min + place, lo, n * sizeof *lo);
    memcpy(u->max + place, hi, n * sizeof *hi);
    u->scalars[at * u->n_tiles + tile] = all;
}

/* The tiles of all pieces, piece after piece, in as many spans as there are threads. */
static bool sum_span(void *context, size_t span) {
    const update *u = context;
    size_t n = u->n_pieces * u->n_tiles;
    for (size_t i = n * span / u->n_spans; i < n * (span + 1) / u->n_spans && aq_watch_goes_on(u->layer->watch); i++)
        sum_tile(u, i / u->n_tiles, i % u->n_tiles);
    return true;
}

/* Sums of the pieces, and their scalars into those of their runs. */
static void sum_pieces(update *u, int n_threads) {
    u->n_spans = (size_t)aq_cpu_threads(n_threads);
    aq_parallel_for(u->n_spans, n_threads, sum_span, u);
    for (size_t at = 0; at < u->n_pieces; at++)
        for (size_t k = 0; k < u->n_tiles; k++) {
            const tile_scalars *s = &u->scalars[at * u->n_tiles + k];
            run *to = u->pieces[at].of;
            to->sum += s->sum;
            to->sum_sq += s->sum_sq;
            to->min = s->min < to->min ? s->min : to->min;
            to->max = s->max > to->max ? s->max : to->max;
        }
}

/* Their sums, in their order, into those of the groups. */
static void add_pieces(update *u, aq_sums *groups) {
    uint64_t n = u->layer->n_inputs;
    for (size_t at = 0; at < u->n_pieces; at++) {
        const piece *p = &u->pieces[at];
        const aq_sums from = {.count = p->end - p->begin, .sum = u->sum + at * n, .sum_sq = u->sum_sq + at * n, .min = u->min + at * n, .max = u->max + at * n};
        aq_sums_add(&groups[p->of->group], &from, n);
    }
    u->n_pieces = 0;
}

/* Room for sums of the call, in the groups that it meets. */
static bool reserve_sums(update *u) {
    u->sums = aq_calloc(u->calib->options.n_groups, sizeof *u->sums);
    for (size_t r = 0; u->sums && r < u->n_runs; r++)
        if (!aq_sums_reserve(u->calib, &u->sums[u->runs[r].group], u->layer->n_inputs)) return false;
    return u->sums != NULL;
}

/* False: no memory. */
static bool sum_rows(update *u, int n_threads) {
    for (size_t r = 0; r < u->n_runs; r++) {
        run *all = &u->runs[r];
        uint64_t n = all->end - all->begin, n_pieces = aq_div_up(n, PIECE);
        for (uint64_t i = 0; i < n_pieces; i++) {
            if (u->n_pieces == u->most_pieces) {
                if (!u->sums && !reserve_sums(u)) return false;
                sum_pieces(u, n_threads);
                add_pieces(u, u->sums);
            }
            u->pieces[u->n_pieces++] = (piece){all->begin + n * i / n_pieces, all->begin + n * (i + 1) / n_pieces, all};
        }
    }
    sum_pieces(u, n_threads);
    return true;
}

/* Room for the sums of as many pieces as are held, and of the groups that are met. */
static bool reserve(update *u) {
    uint64_t n = u->layer->n_inputs, most = PIECES_BYTES / (BYTES_PER_INPUT * n), n_pieces = 0;
    most = most < 1 ? 1 : most < PIECES_AT_ONCE ? most : PIECES_AT_ONCE;
    for (size_t r = 0; r < u->n_runs && n_pieces < most; r++) n_pieces += aq_div_up(u->runs[r].end - u->runs[r].begin, PIECE);
    if (n_pieces > most) n_pieces = most;
    u->most_pieces = (size_t)n_pieces;
    u->n_tiles = (size_t)aq_div_up(n, TILE);
    u->scalars = aq_alloc(n_pieces * (u->n_tiles * sizeof *u->scalars + n * BYTES_PER_INPUT)); /* n has a limit */
    if (!u->scalars) return false;
    u->sum = (void *)(u->scalars + n_pieces * u->n_tiles);
    u->sum_sq = u->sum + n_pieces * n;
    u->min = (void *)(u->sum_sq + n_pieces * n);
    u->max = u->min + n_pieces * n;
    for (size_t r = 0; r < u->n_runs; r++)
        if (!aq_sums_reserve(u->calib, &u->layer->groups[u->runs[r].group], n)) return false;
    return true;
}

/* Every value was finite, and small enough for H. Names the first that is not. */
static aq_status check_values(const update *u, aq_error *err) {
    uint64_t n = u->layer->n_inputs;
    bool ok = true;
    if (!aq_watch_goes_on(u->layer->watch)) return aq_watch_fail(u->layer->name, err); /* not all was summed */
    for (size_t r = 0; r < u->n_runs; r++) {
        const run *s = &u->runs[r];
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
static bool add_timesteps(const update *u) {
    for (size_t r = 0; r < u->n_runs; r++) {
        const run *of = &u->runs[r];
        aq_timestep_stats t = {.timestep = of->timestep, .min = of->min, .max = of->max, .sum = of->sum, .sum_sq = of->sum_sq};
        t.count = (of->end - of->begin) * u->layer->n_inputs;
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
        /* A thread is worth starting for about a million values (some 100 µs), one that stands ready for a sixteenth of that. */
        uint64_t most = (uint64_t)aq_cpu_threads(n_threads), worth = n_rows * layer->n_inputs >> (aq_threads_ready() ? 16 : 20);
        bool done = sum_rows(&u, worth < 2 ? 1 : (int)(worth < most ? worth : most));
        status = done ? check_values(&u, err) : aq_fail_memory(err, layer->n_inputs * 28, "the statistics of a call");
    }
    if (status == AQ_OK && layer->moments) status = add_moments(&u, n_threads, err);
    if (status == AQ_OK && !add_timesteps(&u)) status = aq_fail_memory(err, sizeof *layer->timesteps, "the list of timesteps");
    for (uint32_t g = 0; u.sums && g < c->options.n_groups; g++) {
        if (status == AQ_OK && u.sums[g].count > 0) aq_sums_add(&layer->groups[g], &u.sums[g], layer->n_inputs);
        aq_sums_free(c, &u.sums[g], layer->n_inputs);
    }
    if (status == AQ_OK) add_pieces(&u, layer->groups);
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
    aq_calib_layer *layer = NULL;
    aq_status status = layer_to_update(c, index, &layer, err);
    if (status != AQ_OK) return status;
    if (n_rows > 1 && row_stride < layer->n_inputs)
        return aq_fail_at(err, AQ_ERR_USAGE, NULL, layer->name, "its rows lie %llu floats apart and have %llu", (unsigned long long)row_stride,
                          (unsigned long long)layer->n_inputs);
    aq_stage stage;
    aq_calib_layer *to = aq_stage_begin(&stage, c, layer, n_rows, err);
    if (!to) return AQ_ERR_MEMORY;
    status = add_rows(c, to, x, n_rows, row_stride, timesteps, timestep, 1, n_threads, err);
    return aq_stage_end(&stage, status, n_threads, err);
}

/* ---- convolutions ---- */

enum { UNFOLD_BYTES = 4 << 20 };

typedef struct {
    const aq_conv_shape *s;
    uint64_t out[3];       /* size of the output */
    uint64_t channels;     /* of one group */
    uint64_t n_per_sample; /* rows: output places x groups */
    uint64_t n_rows;       /* of the batch */
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
    ok = ok && aq_mul(f->n_per_sample, s->batch, &f->n_rows) && aq_mul(f->channels, kernel, &n) && aq_mul(count, s->channels, &count);
    for (int d = 0; ok && d < 3; d++) ok = aq_mul(count, s->size[d], &count) && count < UINT64_C(1) << 60;
    if (!ok) return aq_fail_at(err, AQ_ERR_USAGE, NULL, layer->name, "the shape of its convolution is impossible");
    if (n != layer->n_inputs)
        return aq_fail_at(err, AQ_ERR_USAGE, NULL, layer->name, "its convolution has %llu inputs, the layer %llu", (unsigned long long)n,
                          (unsigned long long)layer->n_inputs);
    return AQ_OK;
}

/* Row `index` of a batch: the inputs that one output place of one group of channels of one sample sees, zero where they lie in the padding. */
static void unfold(const unfolding *f, const float *batch, uint64_t index, float *row) {
    const aq_conv_shape *s = f->s;
    uint64_t sample = index / f->n_per_sample, group = index % s->groups, place = index % f->n_per_sample / s->groups;
    uint64_t plane = (uint64_t)s->size[0] * s->size[1] * s->size[2], at[3] = {place / f->out[2] / f->out[1], place / f->out[2] % f->out[1], place % f->out[2]};
    const float *channel = batch + (sample * s->channels + group * f->channels) * plane;
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
    aq_calib_layer *layer = NULL;
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
    if (rows_at_once > f.n_rows) rows_at_once = f.n_rows;
    float *rows = aq_alloc(rows_at_once * n * sizeof *rows);
    if (!rows) return aq_fail_memory(err, rows_at_once * n * sizeof *rows, "unfolded inputs");
    aq_stage stage;
    layer = aq_stage_begin(&stage, c, layer, f.n_rows, err);
    if (!layer) status = AQ_ERR_MEMORY;
    for (uint64_t begin = 0, end; status == AQ_OK && begin < f.n_rows; begin = end) {
        uint64_t first = begin / f.n_per_sample, last = timesteps ? first : shape->batch - 1; /* samples that follow at the same timestep go along */
        while (timesteps && last + 1 < shape->batch && timesteps[last + 1] == timesteps[first]) last++;
        end = (last + 1) * f.n_per_sample;
        if (end > begin + rows_at_once) end = begin + rows_at_once;
        for (uint64_t i = begin; i < end; i++) unfold(&f, x, i, rows + (i - begin) * n);
        status = add_rows(c, layer, rows, end - begin, n, NULL, timesteps ? timesteps[first] : timestep, end - begin, n_threads, err);
    }
    aq_free(rows);
    return layer ? aq_stage_end(&stage, status, n_threads, err) : status;
}
