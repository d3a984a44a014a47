/* Quantizing and dequantizing a matrix (see quant.h).
 *
 * The matrix is cut into strips: a few thousand consecutive values of a row that hold whole groups and whole bytes of codes (axis 0: one group of
 * rows). A task is a fixed number of strips, whatever the number of threads, and sums its own part of the metrics; the parts are added in order.
 * Min-max reads a strip from memory once: ranges and pairs of 16 groups at a time, then codes, packed (and compared) while they stay in the first-level cache.
 * Where rows are one long row and nobody asks for metrics, the ranges of the next groups are taken while the present ones are coded: memory never waits.
 * The search first finds the parameters of all groups of a task, then codes the strips.
 */
#include "quant/quant_internal.h"

#include <math.h>
#include <stdatomic.h>
#include <string.h>

#include "base/error.h"
#include "base/mem.h"
#include "base/size.h"
#include "base/threads.h"
#include "quant/r2q.h"

enum {
    PIECE = 4096,
    TASK_VALUES = 65536,
    LONG_TASK_VALUES = 4 * TASK_VALUES, /* of rounding alone: a task's first groups are read before any is coded */
};

/* Scratch of one task. */
typedef struct scratch {
    uint8_t codes[PIECE];
    float values[PIECE];
    aq_pair pairs[PIECE];
} scratch;

typedef struct job {
    const aq_kernels *kernels;
    const aq_quant_spec *spec;
    const aq_quant_layout *layout;
    const float *w, *importance;
    uint8_t *codes, *params;
    uint64_t strip_groups, strips_per_row, strips, strips_per_task;
    bool single_row;                    /* of whole groups and whole bytes each, rounded to nearest, without metrics */
    aq_quant_metrics *parts;            /* one per task, or NULL */
    atomic_uint_fast64_t first_failure; /* flat index * 2, + 1 when a pair there needs F32 (else the value is not finite); the lowest wins */
    atomic_bool no_memory;
} job;

static void pack(const aq_kernels *k, int bits, const uint8_t *codes, size_t n, uint8_t *out) {
    if (bits == 2)
        k->pack2(codes, n, out);
    else if (bits == 4)
        k->pack4(codes, n, out);
    else
        memcpy(out, codes, n);
}

static void unpack(const aq_kernels *k, int bits, const uint8_t *packed, size_t n, uint8_t *out) {
    if (bits == 2)
        k->unpack2(packed, n, out);
    else if (bits == 4)
        k->unpack4(packed, n, out);
    else
        memcpy(out, packed, n);
}

static void add_sums(aq_quant_metrics *m, const aq_error_sums *sums, uint64_t n) {
    aq_quant_metrics part = {sums->dot, sums->w_sq, sums->v_sq, sums->err_sq, sums->err_max, n};
    aq_quant_metrics_add(m, &part);
}

/* Codes and packs n values that start on a byte boundary, as does every pair's run of `width` values. */
static void code_packed(job *j, const aq_pair *pair, const float *x, uint64_t n, uint64_t width, uint8_t *out) {
    const aq_kernels *k = j->kernels;
    uint64_t bits = (uint64_t)j->spec->bits, next, pair_end = width;
    for (uint64_t at = 0; at < n; at = next) {
        next = pair_end - at < PIECE ? pair_end : at + PIECE;
        next = next < n ? next : n;
        if (bits == 8)
            k->quantize(x + at, next - at, pair->s, pair->z, 255, out + at);
        else
            (bits == 4 ? k->quantize4 : k->quantize2)(x + at, next - at, pair->s, pair->z, out + at * bits / 8);
        if (next < pair_end) continue;
        pair++;
        pair_end += width;
    }
}

/* Codes, packs and compares n values that start on a byte boundary; each pair covers `width` of them. */
static void code_run(job *j, scratch *t, const float *x, uint64_t n, uint64_t width, uint8_t *out, aq_quant_metrics *m) {
    const aq_kernels *k = j->kernels;
    const aq_pair *pair = t->pairs;
    int q_max = aq_quant_q_max(j->spec), bits = j->spec->bits;
    if (!m && (width >= n || width * (uint64_t)bits % 8 == 0)) {
        code_packed(j, pair, x, n, width, out);
        return;
    }
    uint64_t pair_end = width;
    for (uint64_t begin = 0; begin < n; begin += PIECE) {
        uint64_t end = begin + PIECE < n ? begin + PIECE : n;
        for (uint64_t at = begin, next; at < end; at = next) {
            next = pair_end < end ? pair_end : end;
            k->quantize(x + at, next - at, pair->s, pair->z, q_max, t->codes + (at - begin));
            if (m) k->dequantize(t->codes + (at - begin), next - at, pair->s, pair->z, t->values + (at - begin));
            if (next < pair_end) break;
            pair++;
            pair_end += width;
        }
        pack(k, bits, t->codes, end - begin, out + begin * (uint64_t)bits / 8);
        if (!m) continue;
        aq_error_sums sums;
        k->error_sums(x + begin, t->values, end - begin, &sums);
        add_sums(m, &sums, end - begin);
    }
}

/* Tasks start in rising order and run to their first failure, so the lowest index is the same at any number of threads. */
static void note_failure(job *j, const float *where, bool needs_f32) {
    uint64_t failure = (uint64_t)(where - j->w) * 2 + needs_f32, seen = atomic_load(&j->first_failure);
    while (failure < seen && !atomic_compare_exchange_weak(&j->first_failure, &seen, failure)) {
    }
}

static bool all_finite(job *j, const float *x, uint64_t n) {
    uint64_t i = j->kernels->find_nonfinite(x, n);
    if (i < n) note_failure(j, x + i, false);
    return i == n;
}

/* Where strip `s` lies. */
typedef struct strip {
    uint64_t row, n_rows;           /* axis 1: one row */
    uint64_t group, n_groups;       /* in the row; axis 0: one */
    uint64_t begin, end;            /* inputs */
    uint64_t param_row, group_size; /* axis 0: row group, inputs */
} strip;

static strip strip_at(const job *j, uint64_t s) {
    const aq_quant_layout *l = j->layout;
    uint64_t size = j->spec->group_size;
    if (j->spec->axis == 0) {
        uint64_t height = size ? size : l->rows, row = s * height;
        return (strip){row, height < l->rows - row ? height : l->rows - row, 0, 1, 0, l->cols, s, l->cols};
    }
    size = size ? size : l->cols;
    uint64_t row = s / j->strips_per_row, group = s % j->strips_per_row * j->strip_groups, left = l->groups_per_row - group;
    uint64_t n_groups = j->strip_groups < left ? j->strip_groups : left, end = (group + n_groups) * size;
    return (strip){row, 1, group, n_groups, group * size, n_groups == left ? l->cols : end, row, size};
}

static aq_values group_values(const job *j, const strip *s, uint64_t group) {
    uint64_t begin = group * s->group_size, end = s->end - begin < s->group_size ? s->end : begin + s->group_size;
    return (aq_values){j->w + s->row * j->layout->cols + begin, j->importance ? j->importance + begin : NULL, end - begin, s->n_rows, j->layout->cols};
}

static void *group_slot(const job *j, const strip *s, uint64_t group) { return j->params + aq_params_offset(j->spec, j->layout, s->param_row, group); }

static bool strip_is_finite(job *j, const strip *s) {
    for (uint64_t r = s->row; r < s->row + s->n_rows; r++)
        if (!all_finite(j, j->w + r * j->layout->cols + s->begin, s->end - s->begin)) return false;
    return true;
}

/* Min-max parameters of n <= 16 groups that lie `size` values apart from x on, whose ranges are known: side by side, and alone those that the kernels leave. */
static bool round_ranges(job *j, const float *x, uint64_t size, uint64_t n, const float lo[AQ_LANES], const float hi[AQ_LANES], uint8_t *slots,
                         aq_pair *pairs) {
    float scale[AQ_LANES] = {0}, zero[AQ_LANES] = {0};
    uint16_t halves[2 * AQ_LANES];
    bool f16 = j->spec->params == AQ_PARAMS_F16;
    if (!j->spec->symmetric && f16)
        j->kernels->rtn_f16(lo, hi, aq_quant_q_max(j->spec), halves, scale, zero);
    else if (!j->spec->symmetric)
        j->kernels->rtn_f32(lo, hi, aq_quant_q_max(j->spec), scale, zero);
    for (uint64_t i = 0; i < n; i++) {
        pairs[i] = (aq_pair){scale[i], zero[i]};
        if (f16 ? scale[i] >= AQ_MIN_HALF_SCALE && isfinite(scale[i]) && isfinite(zero[i]) : scale[i] > 0) {
            if (f16)
                memcpy(slots + 4 * i, halves + 2 * i, 4);
            else
                memcpy(slots + 8 * i, &pairs[i], 8);
        } else if (!aq_rtn_pair(j->spec, (aq_range){lo[i], hi[i]}, slots + i * aq_pair_bytes(j->spec), &pairs[i])) {
            note_failure(j, x + i * size, true);
            return false;
        }
    }
    return true;
}

/* The same from the values of n <= 16 groups of a strip, the `first` and those behind it. */
static bool round_groups(job *j, scratch *t, const strip *s, uint64_t first, uint64_t n) {
    const aq_kernels *k = j->kernels;
    float lo[AQ_LANES] = {0}, hi[AQ_LANES] = {0};
    const float *x = group_values(j, s, s->group + first).x;
    /* All but a last one that may be short, side by side. */
    uint64_t whole = s->n_rows > 1 ? 0 : n - (s->end < (s->group + first + n) * s->group_size);
    if (whole > 0 && !k->ranges(x, s->group_size, whole, lo, hi)) return strip_is_finite(j, s);
    for (uint64_t i = whole; i < n; i++) {
        aq_values values = group_values(j, s, s->group + first + i);
        aq_range range;
        if (!aq_values_range(k, &values, &range)) return strip_is_finite(j, s);
        lo[i] = range.lo;
        hi[i] = range.hi;
    }
    return round_ranges(j, x, s->group_size, n, lo, hi, group_slot(j, s, s->group + first), t->pairs + first);
}

static bool round_strip(job *j, scratch *t, const strip *s) {
    for (uint64_t g = 0; g < s->n_groups; g += AQ_LANES)
        if (!round_groups(j, t, s, g, s->n_groups - g < AQ_LANES ? s->n_groups - g : AQ_LANES)) return false;
    return true;
}

static bool round_strip_two_level(job *j, scratch *t, const strip *s) {
    uint64_t pairs_per_group = j->spec->group_size / j->layout->pair_width;
    if (!strip_is_finite(j, s)) return false;
    for (uint64_t g = 0; g < s->n_groups; g++) {
        aq_values values = group_values(j, s, s->group + g);
        if (aq_rtn_two_level(j->kernels, j->spec, &values, group_slot(j, s, s->group + g), t->pairs + g * pairs_per_group)) continue;
        note_failure(j, values.x, true);
        return false;
    }
    return true;
}

/* Groups that are searched together. */
typedef struct batch {
    aq_lanes *lanes;
    aq_values groups[AQ_LANES];
    void *slots[AQ_LANES];
    size_t n;
} batch;

/* Names the first value of the batch that is not finite. */
static bool note_nonfinite(job *j, const batch *b, size_t n) {
    for (size_t i = 0; i < n; i++)
        for (uint64_t r = 0; r < b->groups[i].n_rows; r++)
            if (!all_finite(j, b->groups[i].x + r * b->groups[i].stride, b->groups[i].n)) return false;
    return false;
}

static bool flush(job *j, batch *b) {
    size_t n = b->n, stored;
    if (n == 0) return true;
    b->n = 0;
    if (!aq_search_batch(b->lanes, j->kernels, j->spec, b->groups, n, b->slots, &stored)) return note_nonfinite(j, b, n);
    if (stored < n) note_failure(j, b->groups[stored].x, true);
    return stored == n;
}

/* Searched parameters of strips [begin, end): full groups together, as many as there are lanes; short and large ones alone. */
static bool search_strips(job *j, batch *b, uint64_t begin, uint64_t end) {
    uint64_t capacity = aq_search_capacity(j->spec);
    for (uint64_t i = begin; i < end; i++) {
        strip s = strip_at(j, i);
        for (uint64_t g = s.group; g < s.group + s.n_groups; g++) {
            aq_values values = group_values(j, &s, g);
            bool alone = values.n_rows > 1 || values.n > AQ_NARROW || values.n < s.group_size;
            if ((alone || b->n == capacity) && !flush(j, b)) return false;
            b->groups[b->n] = values;
            b->slots[b->n++] = group_slot(j, &s, g);
            if (alone && !flush(j, b)) return false;
        }
    }
    return flush(j, b);
}

static void code_strip(job *j, scratch *t, const strip *s, aq_quant_metrics *m) {
    const aq_quant_layout *l = j->layout;
    for (uint64_t r = s->row; r < s->row + s->n_rows; r++)
        code_run(j, t, j->w + r * l->cols + s->begin, s->end - s->begin, l->pair_width, j->codes + r * l->row_bytes + s->begin * (uint64_t)j->spec->bits / 8,
                 m);
}

static bool run_strips(job *j, scratch *t, batch *b, uint64_t begin, uint64_t end, aq_quant_metrics *m) {
    if (b && !search_strips(j, b, begin, end)) return false;
    for (uint64_t i = begin; i < end; i++) {
        strip s = strip_at(j, i);
        if (b)
            aq_pairs_load(j->spec, j->layout, j->params, s.param_row, s.group, s.n_groups, t->pairs);
        else if (!(j->spec->params == AQ_PARAMS_TWO_LEVEL ? round_strip_two_level : round_strip)(j, t, &s))
            return false;
        code_strip(j, t, &s, m);
    }
    return true;
}

/* Strips [begin, end) of a single row. As many groups are rounded at once as stay in the first-level cache until they are coded. */
static bool run_row(job *j, uint64_t begin, uint64_t end) {
    uint64_t size = j->layout->pair_width, bits = (uint64_t)j->spec->bits, most = size * AQ_LANES <= PIECE ? AQ_LANES : size < PIECE ? PIECE / size : 1;
    uint64_t group = begin * j->strip_groups, n = 0, last = end * j->strip_groups < j->layout->n_groups ? end * j->strip_groups : j->layout->n_groups;
    float lo[AQ_LANES] = {0}, hi[AQ_LANES] = {0}, s[AQ_LANES], z[AQ_LANES];
    do {
        uint64_t next = group + n, n_next = last - next < most ? last - next : most;
        const float *x = j->w + group * size, *behind = j->w + next * size;
        aq_pair pairs[AQ_LANES];
        if (!j->kernels->quantize_groups(x, size, n, s, z, j->spec->bits, j->codes + group * size * bits / 8, behind, n_next, lo, hi))
            return all_finite(j, behind, n_next * size);
        if (!round_ranges(j, behind, size, n_next, lo, hi, j->params + next * aq_pair_bytes(j->spec), pairs)) return false;
        for (uint64_t i = 0; i < n_next; i++) {
            s[i] = pairs[i].s;
            z[i] = pairs[i].z;
        }
        group = next;
        n = n_next;
    } while (n > 0);
    return true;
}

static bool run_task(void *context, size_t index) {
    job *j = context;
    uint64_t begin = index * j->strips_per_task, end = j->strips_per_task < j->strips - begin ? begin + j->strips_per_task : j->strips;
    if (j->single_row) return run_row(j, begin, end);
    bool search = j->spec->method == AQ_METHOD_SEARCH, ok = false;
    scratch *t = aq_alloc(sizeof *t);
    batch b = {.lanes = search ? aq_alloc(sizeof *b.lanes) : NULL};
    if (!t || (search && !b.lanes)) {
        atomic_store(&j->no_memory, true);
    } else {
        aq_quant_metrics sum = {0};
        ok = run_strips(j, t, search ? &b : NULL, begin, end, j->parts ? &sum : NULL);
        if (j->parts) j->parts[index] = sum;
    }
    aq_free(b.lanes);
    aq_free(t);
    return ok;
}

/* Strips of axis 1: as many groups as fit a piece, a multiple that ends on a byte. */
static void plan_strips(job *j) {
    const aq_quant_layout *l = j->layout;
    uint64_t strip_values;
    if (j->spec->axis == 1) {
        uint64_t size = j->spec->group_size ? j->spec->group_size : l->cols;
        uint64_t groups = PIECE / size, align = 8 / (uint64_t)j->spec->bits;
        if (size % align) groups = groups < align ? align : groups / align * align;
        j->strip_groups = groups ? groups : 1;
        if (j->strip_groups > l->groups_per_row) j->strip_groups = l->groups_per_row;
        j->strips_per_row = aq_div_up(l->groups_per_row, j->strip_groups);
        j->strips = l->rows * j->strips_per_row;
        strip_values = j->strip_groups * size;
    } else {
        j->strips = l->n_groups;
        strip_values = l->cols * (j->spec->group_size && j->spec->group_size < l->rows ? j->spec->group_size : l->rows);
    }
    uint64_t values = j->single_row ? LONG_TASK_VALUES : TASK_VALUES;
    j->strips_per_task = strip_values < values ? values / strip_values : 1;
}

static aq_status report(const job *j, bool *needs_f32, aq_error *err) {
    if (j->no_memory) return aq_fail_memory(err, sizeof(scratch) + sizeof(aq_lanes), "quantization scratch");
    unsigned long long index = j->first_failure / 2;
    if (j->first_failure % 2 == 0) return aq_fail(err, AQ_ERR_FORMAT, "the value at flat index %llu is not finite", index);
    if (needs_f32) *needs_f32 = true;
    aq_fail(err, AQ_ERR_QUALITY, "the scale or offset of the group at flat index %llu does not fit half precision", index);
    aq_hint(err, "use f32 parameters for this tensor");
    return AQ_ERR_QUALITY;
}

/* The weights times a power of two that brings the largest near 1, so that F32 sums of them stay in range. */
static aq_status scale_importance(const float *importance, uint64_t n, float **out, aq_error *err) {
    float largest = 0;
    int exponent;
    for (uint64_t i = 0; i < n; i++) {
        if (!(importance[i] >= 0 && isfinite(importance[i])))
            return aq_fail(err, AQ_ERR_USAGE, "the importance of input %llu must be a finite number of at least 0", (unsigned long long)i);
        largest = importance[i] > largest ? importance[i] : largest;
    }
    if (!(*out = aq_alloc(n * sizeof **out))) return aq_fail_memory(err, n * sizeof **out, "importance weights");
    frexpf(largest, &exponent);
    for (uint64_t i = 0; i < n; i++) (*out)[i] = ldexpf(importance[i], -exponent);
    return AQ_OK;
}

static aq_status run_job(job *j, int n_threads, aq_quant_metrics *metrics, bool *needs_f32, aq_error *err) {
    uint64_t n_tasks = aq_div_up(j->strips, j->strips_per_task);
    if (metrics && !(j->parts = aq_calloc(n_tasks, sizeof *j->parts))) return aq_fail_memory(err, n_tasks * sizeof *j->parts, "quality sums");
    bool ok = aq_parallel_for(n_tasks, n_threads, run_task, j);
    if (ok && metrics)
        for (uint64_t i = 0; i < n_tasks; i++) aq_quant_metrics_add(metrics, &j->parts[i]);
    aq_free(j->parts);
    return ok ? AQ_OK : report(j, needs_f32, err);
}

/* Rows of whole groups and whole bytes, one after the other, are one long row: its strips hold many groups however short the rows are. Only without metrics,
 * whose order of summation begins anew in each row. */
static bool is_one_row(const aq_quant_spec *spec, const aq_quant_layout *l, const aq_quant_metrics *metrics) {
    uint64_t size = spec->group_size ? spec->group_size : l->cols;
    return !metrics && spec->method == AQ_METHOD_RTN && spec->axis == 1 && spec->params != AQ_PARAMS_TWO_LEVEL && l->cols % size == 0 &&
           l->cols * (uint64_t)spec->bits % 8 == 0;
}

aq_status aq_quantize(const float *w, const aq_quant_spec *spec, const aq_quant_layout *layout, const float *importance, int n_threads, uint8_t *codes,
                      void *params, aq_quant_metrics *metrics, bool *needs_f32, aq_error *err) {
    job j = {.kernels = aq_quant_kernels(spec), .spec = spec, .layout = layout, .w = w, .codes = codes, .params = params};
    atomic_init(&j.first_failure, UINT64_MAX);
    if (needs_f32) *needs_f32 = false;
    if (metrics) *metrics = (aq_quant_metrics){0};
    bool r2q = spec->params == AQ_PARAMS_R2Q;
    if (!r2q && spec->method != AQ_METHOD_RTN && spec->method != AQ_METHOD_SEARCH)
        return aq_fail(err, AQ_ERR_USAGE, "method '%s' needs the second moment of the inputs (aq_solve)", aq_method_name(spec->method));
    if (layout->rows == 0 || layout->cols == 0 || layout->groups_per_row == 0) return AQ_OK; /* nothing to do; the last follows from the second */

    aq_quant_spec one_spec = *spec;
    aq_quant_layout one_row = *layout;
    if (!r2q && is_one_row(spec, layout, metrics)) {
        one_spec.group_size = layout->pair_width;
        one_row = (aq_quant_layout){.rows = 1, .cols = layout->rows * layout->cols, .row_bytes = layout->codes_bytes, .codes_bytes = layout->codes_bytes};
        one_row.groups_per_row = one_row.pairs_per_row = one_row.n_groups = one_row.n_pairs = layout->n_groups;
        one_row.pair_width = layout->pair_width;
        one_row.params_bytes = layout->params_bytes;
        j.spec = &one_spec;
        j.layout = &one_row;
        j.single_row = one_row.pair_width * (uint64_t)spec->bits % 8 == 0;
    }

    aq_fp_state fp = aq_fp_enter();
    float *weights = NULL;
    aq_status status = AQ_OK;
    if (importance && (r2q || spec->method == AQ_METHOD_SEARCH)) status = scale_importance(importance, layout->cols, &weights, err);
    if (status == AQ_OK && r2q) {
        status = aq_r2q_quantize(w, spec, layout, weights, n_threads, codes, params, metrics, needs_f32, err);
    } else if (status == AQ_OK) {
        j.importance = weights;
        plan_strips(&j);
        status = run_job(&j, n_threads, metrics, needs_f32, err);
    }
    aq_free(weights);
    aq_fp_leave(fp);
    return status;
}

void aq_dequantize(const aq_quant_spec *spec, const aq_quant_layout *layout, const uint8_t *codes, const void *params, uint64_t row_begin, uint64_t n_rows,
                   float *out) {
    const aq_kernels *k = aq_quant_kernels(spec);
    uint64_t bits = (uint64_t)spec->bits, cols = layout->cols, rows_per_group = spec->group_size ? spec->group_size : layout->rows;
    if (cols == 0) return;
    if (spec->params == AQ_PARAMS_R2Q) {
        aq_r2q_dequantize(spec, layout, codes, params, row_begin, n_rows, out);
        return;
    }
    aq_fp_state fp = aq_fp_enter();
    for (uint64_t r = row_begin; r < row_begin + n_rows; r++, out += cols) {
        uint64_t group_size = spec->axis == 1 && spec->group_size ? spec->group_size : cols, group = UINT64_MAX, held = 0;
        uint64_t param_row = spec->axis == 1 ? r : r / rows_per_group, pairs_per_group = (group_size + layout->pair_width - 1) / layout->pair_width;
        aq_pair pairs[AQ_TWO_LEVEL_MAX_SUB];
        uint8_t piece[PIECE];
        uint64_t pair = 0, pair_end = layout->pair_width;
        for (uint64_t begin = 0; begin < cols; begin += PIECE) {
            uint64_t end = begin + PIECE < cols ? begin + PIECE : cols;
            unpack(k, spec->bits, codes + r * layout->row_bytes + begin * bits / 8, end - begin, piece);
            for (uint64_t at = begin, next; at < end; at = next) {
                if (pair == held || group == UINT64_MAX) { /* the next group's pairs */
                    aq_pairs_load(spec, layout, params, param_row, ++group, 1, pairs);
                    pair = 0, held = pairs_per_group;
                }
                next = pair_end < end ? pair_end : end;
                k->dequantize(piece + (at - begin), next - at, pairs[pair].s, pairs[pair].z, out + at);
                if (next < pair_end) break;
                pair++;
                pair_end += layout->pair_width;
            }
        }
    }
    aq_fp_leave(fp);
}
