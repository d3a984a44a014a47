/* Solving a layer (see solve.h): its rows in slabs, each searched or fed back, refined, packed and measured.
 *
 * A slab is up to some hundred rows, transposed (solve_internal.h). How rows are cut cannot be seen in the result: no row's numbers touch another's, and sums
 * over rows are added in the order of the rows.
 */
#include <math.h>
#include <stdatomic.h>
#include <string.h>

#include "base/cpu.h"
#include "base/error.h"
#include "base/mem.h"
#include "base/size.h"
#include "base/threads.h"
#include "quant/solve_internal.h"

enum { MOST_LANES = 512 };

typedef struct solve_job {
    const float *w;
    const aq_quant_spec *spec;
    const aq_quant_layout *layout;
    const aq_hessian *hessian;
    const aq_solve_options *options;
    uint64_t rows_per_slab;
    uint8_t *codes, *params;
    aq_quant_metrics *metrics; /* per row, or NULL */
    aq_output_error *output;   /* per row, or NULL */
    bool (*keep_going)(void *user);
    void *user;
    atomic_uint_fast64_t next_row; /* of the first slab that nobody has taken */
    atomic_bool no_memory, interrupted;
} solve_job;

static uint64_t least(uint64_t a, uint64_t b) { return a < b ? a : b; }

/* W transposed, zeros where an input is dead or a lane has no row. */
static void fill(aq_slab *s, const float *w) {
    enum { STEPS = 256 };
    static const float none[STEPS] = {0};
    float x[STEPS * AQ_LANES];
    for (uint64_t begin = 0; begin < s->n; begin += STEPS)
        for (uint64_t lane = 0; lane < s->lanes; lane += AQ_LANES) {
            const float *rows[AQ_LANES];
            uint64_t steps = least(STEPS, s->n - begin);
            for (uint64_t j = 0; j < AQ_LANES; j++) rows[j] = lane + j < s->rows ? w + (s->first + lane + j) * s->n + begin : none;
            s->kernels->transpose(rows, (size_t)steps, x);
            for (uint64_t i = 0; i < steps; i++) {
                float *out = s->w + (begin + i) * s->lanes + lane;
                if (s->hessian->importance[begin + i] > 0)
                    memcpy(out, x + i * AQ_LANES, AQ_LANES * sizeof *out);
                else
                    memset(out, 0, AQ_LANES * sizeof *out);
            }
        }
}

/* A square of bytes: four rounds that shuffle its upper half with its lower half, as one does with cards, exchange rows and columns. */
static void transpose_square(const uint8_t *in, uint64_t in_stride, uint8_t *out, uint64_t out_stride) {
    typedef uint8_t line __attribute__((vector_size(AQ_LANES)));
    line a[AQ_LANES], b[AQ_LANES];
    for (size_t i = 0; i < AQ_LANES; i++) memcpy(&a[i], in + i * in_stride, sizeof a[i]);
    for (size_t round = 0; round < 4; round++) {
        for (size_t i = 0; i < AQ_LANES / 2; i++) {
            b[2 * i] = __builtin_shufflevector(a[i], a[i + AQ_LANES / 2], 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
            b[2 * i + 1] = __builtin_shufflevector(a[i], a[i + AQ_LANES / 2], 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
        }
        memcpy(a, b, sizeof a);
    }
    for (size_t i = 0; i < AQ_LANES; i++) memcpy(out + i * out_stride, &a[i], sizeof a[i]);
}

/* Codes of 16 rows from `lane` on, row after row. */
static void transpose_codes(const aq_slab *s, uint64_t lane, uint8_t *rows) {
    const uint8_t *codes = s->q + lane;
    uint64_t i = 0;
    for (; i + AQ_LANES <= s->n; i += AQ_LANES) transpose_square(codes + i * s->lanes, s->lanes, rows + i, s->n);
    for (; i < s->n; i++)
        for (uint64_t j = 0; j < AQ_LANES; j++) rows[j * s->n + i] = codes[i * s->lanes + j];
}

static void pack_row(const aq_slab *s, const uint8_t *unpacked, uint8_t *out) {
    if (s->spec->bits == 2)
        s->kernels->pack2(unpacked, s->n, out);
    else if (s->spec->bits == 4)
        s->kernels->pack4(unpacked, s->n, out);
    else
        memcpy(out, unpacked, s->n);
}

/* Codes in their place, and what they are worth. */
static bool deliver(aq_slab *s, solve_job *j) {
    uint8_t *unpacked = aq_alloc(s->n * AQ_LANES);
    float *v = aq_alloc(s->n * sizeof *v);
    bool ok = unpacked && v;
    for (uint64_t r = 0; ok && r < s->rows; r++) {
        uint64_t row = s->first + r;
        if (r % AQ_LANES == 0) transpose_codes(s, r, unpacked);
        pack_row(s, unpacked + r % AQ_LANES * s->n, j->codes + row * j->layout->row_bytes);
        if (!j->metrics) continue;
        aq_dequantize(s->spec, s->layout, j->codes, j->params, row, 1, v);
        aq_quant_metrics_compute(j->w + row * s->n, v, s->n, &j->metrics[row]);
    }
    aq_free(unpacked);
    aq_free(v);
    return ok;
}

static bool measure(aq_slab *s, solve_job *j) {
    double *sums = aq_calloc(2 * s->lanes, sizeof *sums);
    bool ok = sums && aq_hessian_square(s->hessian, s->e, s->lanes, s->t, sums) && aq_hessian_square(s->hessian, s->w, s->lanes, s->t, sums + s->lanes);
    for (uint64_t r = 0; ok && r < s->rows; r++)
        j->output[s->first + r] = (aq_output_error){(sums[r] > 0 ? sums[r] : 0) * s->hessian->unit, sums[s->lanes + r] * s->hessian->unit};
    aq_free(sums);
    return ok;
}

static bool run_slab(aq_slab *s, solve_job *j) {
    fill(s, j->w);
    bool solved = j->options->no_feedback ? aq_slab_search(s) : aq_slab_gptq(s);
    if (solved && j->options->refine_sweeps > 0) solved = aq_slab_refine(s, j->options->refine_sweeps);
    if (!solved) return false;
    if (deliver(s, j) && (!j->output || measure(s, j))) return true;
    s->no_memory = true;
    return false;
}

static void free_slab(aq_slab *s) {
    aq_free(s->w);
    aq_free(s->e);
    aq_free(s->t);
    aq_free(s->q);
    aq_free(s->levels);
    aq_free(s->rows_of_group);
    aq_free(s->search);
}

/* Memory for any slab of the layer. */
static bool make_slab(aq_slab *s, const solve_job *j) {
    uint64_t n = j->layout->cols, group = j->spec->group_size && j->spec->group_size < n ? j->spec->group_size : n;
    uint64_t lanes = aq_div_up(j->rows_per_slab, AQ_LANES) * AQ_LANES, block = group > AQ_SOLVE_BLOCK ? group : AQ_SOLVE_BLOCK;
    *s = (aq_slab){.spec = j->spec,
                   .layout = j->layout,
                   .hessian = j->hessian,
                   .options = j->options,
                   .kernels = aq_quant_kernels(j->spec),
                   .n = n,
                   .params = j->params,
                   .keep_going = j->keep_going,
                   .user = j->user};
    s->w = aq_calloc(n * lanes, sizeof *s->w);
    s->e = aq_calloc(n * lanes, sizeof *s->e);
    s->t = aq_calloc(block * lanes, sizeof *s->t);
    s->q = aq_calloc(n, lanes);
    s->levels = aq_calloc(j->layout->pairs_per_row * (lanes / AQ_LANES), sizeof *s->levels);
    s->rows_of_group = aq_calloc(group * AQ_LANES, sizeof *s->rows_of_group);
    s->search = aq_alloc(sizeof *s->search);
    s->no_memory = !s->w || !s->e || !s->t || !s->q || !s->levels || !s->rows_of_group || !s->search;
    return !s->no_memory;
}

/* One thread's part: slab after slab in the same memory, as long as there are any. */
static bool solve_slabs(void *context, size_t index) {
    (void)index;
    solve_job *j = context;
    aq_slab s;
    bool ok = make_slab(&s, j);
    for (uint64_t first; ok && (first = atomic_fetch_add(&j->next_row, j->rows_per_slab)) < j->layout->rows;) {
        s.first = first;
        s.rows = least(j->rows_per_slab, j->layout->rows - first);
        s.lanes = aq_div_up(s.rows, AQ_LANES) * AQ_LANES;
        ok = run_slab(&s, j);
    }
    if (!ok) atomic_store(&j->next_row, j->layout->rows);
    if (s.no_memory) atomic_store(&j->no_memory, true);
    if (s.interrupted) atomic_store(&j->interrupted, true);
    free_slab(&s);
    return ok;
}

static aq_status check(const float *w, const aq_quant_spec *spec, const aq_quant_layout *layout, const aq_hessian *hessian, const aq_solve_options *options,
                       aq_error *err) {
    if (spec->axis != 1) return aq_fail(err, AQ_ERR_USAGE, "codes are chosen against the output's error along axis 1 only, not axis %d", spec->axis);
    if (layout->cols != hessian->n)
        return aq_fail(err, AQ_ERR_USAGE, "the weights have %llu inputs, the second moment %llu", (unsigned long long)layout->cols,
                       (unsigned long long)hessian->n);
    if (options->refine_sweeps < 0) return aq_fail(err, AQ_ERR_USAGE, "Invalid refine_sweeps: %d. Must be at least 0", options->refine_sweeps);
    uint64_t n = layout->rows * layout->cols, bad = aq_kernels_get()->find_nonfinite(w, (size_t)n);
    return bad < n ? aq_fail(err, AQ_ERR_FORMAT, "the value at flat index %llu is not finite", (unsigned long long)bad) : AQ_OK;
}

static aq_status report(const solve_job *j, bool *needs_f32, aq_error *err) {
    if (atomic_load(&j->no_memory)) return aq_fail_memory(err, j->layout->cols * MOST_LANES * 16, "solving a slab of rows");
    if (atomic_load(&j->interrupted)) return aq_fail(err, AQ_ERR_INTERRUPTED, "solving was stopped");
    if (needs_f32) *needs_f32 = true;
    aq_fail(err, AQ_ERR_QUALITY, "the scale or offset of a group does not fit half precision");
    aq_hint(err, "use f32 parameters for this tensor");
    return AQ_ERR_QUALITY;
}

aq_status aq_solve(const float *w, const aq_quant_spec *spec, const aq_quant_layout *layout, const aq_hessian *hessian, const aq_solve_options *options,
                   int n_threads, uint8_t *codes, void *params, aq_quant_metrics *metrics, aq_output_error *output, bool *needs_f32,
                   bool (*keep_going)(void *user), void *user, aq_error *err) {
    aq_solve_options defaults;
    aq_solve_options_init(&defaults);
    if (!options) options = &defaults;
    if (needs_f32) *needs_f32 = false;
    if (metrics) *metrics = (aq_quant_metrics){0};
    if (output) *output = (aq_output_error){0};
    if (layout->rows == 0 || layout->cols == 0) return AQ_OK;
    aq_status status = check(w, spec, layout, hessian, options, err);
    if (status != AQ_OK) return status;

    aq_fp_state fp = aq_fp_enter();
    solve_job j = {.w = w,
                   .spec = spec,
                   .layout = layout,
                   .hessian = hessian,
                   .options = options,
                   .codes = codes,
                   .params = params,
                   .keep_going = keep_going,
                   .user = user};
    /* Every thread gets as many slabs as the others; large ones make products cheaper, small ones need less memory. */
    uint64_t threads = (uint64_t)aq_cpu_threads(n_threads), rounds = aq_div_up(layout->rows, threads * MOST_LANES);
    j.rows_per_slab = aq_div_up(aq_div_up(layout->rows, threads * rounds), AQ_LANES) * AQ_LANES;
    j.metrics = metrics ? aq_calloc(layout->rows, sizeof *metrics) : NULL;
    j.output = output ? aq_calloc(layout->rows, sizeof *output) : NULL;
    if ((metrics && !j.metrics) || (output && !j.output))
        status = aq_fail_memory(err, layout->rows * sizeof *metrics, "quality sums");
    else if (!aq_parallel_for((size_t)least(threads, aq_div_up(layout->rows, j.rows_per_slab)), n_threads, solve_slabs, &j))
        status = report(&j, needs_f32, err);
    for (uint64_t r = 0; status == AQ_OK && r < layout->rows; r++) {
        if (metrics) aq_quant_metrics_add(metrics, &j.metrics[r]);
        if (output) output->err += j.output[r].err, output->ref += j.output[r].ref;
    }
    aq_free(j.metrics);
    aq_free(j.output);
    aq_fp_leave(fp);
    return status;
}
