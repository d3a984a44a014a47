/* Products of activations with packed codes (see linear.h): which way, and the way of few rows.
 *
 * Few rows: x is laid out as the words of codes are read (dot_codes in kernels.h), then tasks of outputs run over their codes. More rows: products of integers
 * (linear_words.c). Both read codes as words of 32 bits, so pairs have to begin on a word; where they do not (odd group sizes, R2Q), panels of the weight are
 * dequantized (linear_panels.c).
 */
#include <arrowquant/linear.h>

#include <stdatomic.h>
#include <string.h>

#include "base/cpu.h"
#include "base/error.h"
#include "base/mem.h"
#include "base/size.h"
#include "base/threads.h"
#include "quant/linear_internal.h"
#include "quant/quant_internal.h"

enum {
    TASK_WEIGHTS = 1 << 16, /* of a task of outputs, at least and at most: some 5 to 20 µs a row of x */
    MOST_WEIGHTS = 1 << 18,
    START_WEIGHTS = 2 << 20,  /* that make a thread worth its start */
    THREAD_WEIGHTS = 1 << 18, /* that make one worth sending that stands ready */
    PADDING = 16              /* floats that kernels may read behind the last line */
};

/* ---- parameters ---- */

/* Sub-groups [first, first + n) of an output of two-level parameters. Full records, the rule, are read where they lie, the others by way of copies. */
static void load_two_level(const aq_kernels *k, const aq_linear_weight *w, uint64_t row, uint64_t first, uint64_t n, float *s, float *o) {
    enum { MOST_BYTES = 20 };
    int bits = w->spec.bits;
    uint64_t subs = w->spec.group_size / w->layout.pair_width, most = bits == 4 ? 8 : 16, bytes = aq_two_level_record_bytes(bits, subs);
    const uint8_t *record = (const uint8_t *)w->params + aq_params_offset(&w->spec, &w->layout, row, first / subs);
    if (subs == most && first % subs == 0) {
        k->two_level(record, bits, n / subs, s, o);
        first += n / subs * subs;
        record += n / subs * bytes;
        s += n / subs * subs;
        o += n / subs * subs;
        n %= subs;
    }
    for (; n > 0; record += bytes) {
        uint8_t copy[MOST_BYTES] = {0};
        float all[2][AQ_TWO_LEVEL_MAX_SUB];
        uint64_t skipped = first % subs, held = aq_least(subs, w->layout.pairs_per_row - first + skipped), taken = aq_least(held - skipped, n);
        memcpy(copy, record, aq_two_level_record_bytes(bits, held));
        k->two_level(copy, bits, 1, all[0], all[1]);
        memcpy(s, all[0] + skipped, taken * sizeof *s);
        memcpy(o, all[1] + skipped, taken * sizeof *o);
        first += taken;
        n -= taken;
        s += taken;
        o += taken;
    }
}

/* Lines w = s q + o of pairs [first, first + n) of an output whose parameters are halves. */
void aq_linear_half_lines(const aq_kernels *k, const aq_linear_weight *w, uint64_t row, uint64_t first, uint64_t n, float *s, float *o) {
    if (w->spec.params == AQ_PARAMS_TWO_LEVEL)
        load_two_level(k, w, row, first, n, s, o);
    else
        k->half_lines((const uint8_t *)w->params + aq_params_offset(&w->spec, &w->layout, row, first), n, s, o);
}

void aq_linear_lines(const aq_kernels *k, const aq_linear_weight *w, uint64_t row, uint64_t n_rows, float *s, float *o) {
    uint64_t n = w->layout.pairs_per_row;
    bool full = w->spec.params == AQ_PARAMS_F16 || (w->spec.group_size == 256 && w->layout.cols % 256 == 0);
    if (aq_linear_half_pairs(w) && full) { /* the outputs' parameters lie one after the other */
        aq_linear_half_lines(k, w, row, 0, n_rows * n, s, o);
    } else if (aq_linear_half_pairs(w)) {
        for (uint64_t i = 0; i < n_rows; i++) aq_linear_half_lines(k, w, row + i, 0, n, s + i * n, o + i * n);
    } else {
        for (uint64_t i = 0; i < n_rows * n; i++) { /* groups of rows have one pair a row */
            aq_pair pair;
            aq_pairs_load(&w->spec, &w->layout, w->params, aq_linear_param_row(w, row + i / n), i % n, 1, &pair);
            s[i] = pair.s;
            o[i] = -(pair.z * pair.s);
        }
    }
}

/* ---- few rows ---- */

typedef struct dots {
    const aq_linear_weight *weight;
    const aq_kernels *kernels;
    float *y;
    uint64_t n_rows, outputs_per_task;
    uint64_t words, n_sums; /* of a row of codes, whole blocks; sums of a row of x */
    unsigned shift;         /* 2^shift words share a line */
    uint64_t copies;        /* how often each pair's line stands, to make that so; 0: one pair, everywhere */
    const float *x, *sums;  /* laid out for dot_codes */
    atomic_bool no_memory;
} dots;

/* x in the order in which dot_codes reads it, and the sums over each pair's inputs. */
static void lay_out(const aq_linear_weight *w, const float *x, uint64_t words, uint64_t n_sums, float *out, float *sums) {
    uint64_t per = 32 / (uint64_t)w->spec.bits, inputs = w->layout.cols, width = aq_linear_pair_width(w);
    uint64_t whole = inputs / width; /* NOLINT(clang-analyzer-core.DivideZero): a layer with inputs has pairs of some */
    float copy[AQ_LANES * 16];
    for (uint64_t block = 0; block < words / AQ_LANES; block++, out += per * AQ_LANES) {
        const float *in = x + block * AQ_LANES * per;
        uint64_t left = inputs - aq_least(block * AQ_LANES * per, inputs);
        if (left < AQ_LANES * per) { /* the last block, or one of words behind the last */
            memset(copy, 0, sizeof copy);
            in = left ? memcpy(copy, in, left * sizeof *copy) : copy;
        }
        for (uint64_t t = 0; t < per; t++)
            for (uint64_t j = 0; j < AQ_LANES; j++) out[t * AQ_LANES + j] = in[j * per + t];
    }
    memset(sums, 0, n_sums * sizeof *sums);
    for (uint64_t i = 0; i < width; i++) /* pairs side by side, so that none waits for its last sum */
        for (uint64_t p = 0; p < whole; p++) sums[p] += x[p * width + i];
    for (uint64_t i = whole * width; i < inputs; i++) sums[whole] += x[i];
}

/* Each of n lines `copies` times, up to `most` in all. */
static const float *repeat(float *out, const float *lines, uint64_t n, uint64_t copies, uint64_t most) {
    for (uint64_t i = 0, at = 0; i < n; i++)
        for (uint64_t c = 0; c < copies && at < most; c++) out[at++] = lines[i];
    return out;
}

static bool dot_task(void *context, size_t index) {
    dots *d = context;
    const aq_linear_weight *w = d->weight;
    uint64_t n = w->layout.pairs_per_row, spread = d->words >> d->shift, outputs = w->layout.rows;
    uint64_t begin = index * d->outputs_per_task, end = aq_least(begin + d->outputs_per_task, outputs);
    uint64_t lines = (end - begin) * n + PADDING, extra = spread + n + PADDING;
    float *s = aq_calloc(2 * lines + extra, sizeof *s), *o = s ? s + lines : NULL, *one_s = s ? o + lines : NULL;
    if (!s) {
        atomic_store(&d->no_memory, true);
        return false;
    }
    aq_linear_lines(d->kernels, w, begin, end - begin, s, o);
    uint64_t x_stride = d->words * (32 / (uint64_t)w->spec.bits), at_once = d->copies == 1 ? end - begin : 1;
    aq_code_rows codes = {.outputs = at_once, .bytes = w->layout.row_bytes, .bits = w->spec.bits, .shift = d->shift, .n_pairs = n, .lines = n};
    for (uint64_t row = begin; row < end; row += at_once) {
        codes.codes = aq_linear_codes_at(w, row, 0);
        codes.readable = (outputs - row) * w->layout.row_bytes;
        codes.s = s + (row - begin) * n;
        codes.o = o + (row - begin) * n;
        if (d->copies != 1) codes.s = repeat(one_s, codes.s, n, d->copies ? d->copies : spread, spread);
        for (uint64_t r = 0; r < d->n_rows; r += 4)
            d->kernels->dot_codes(&codes, d->x + r * x_stride, x_stride, d->sums + r * d->n_sums, d->n_sums, aq_least(4, d->n_rows - r),
                                  d->y + r * outputs + row, outputs);
    }
    for (uint64_t r = 0; w->bias && r < d->n_rows; r++)
        for (uint64_t row = begin; row < end; row++) d->y[r * outputs + row] += w->bias[row];
    aq_free(s);
    return true;
}

/* How lines are spread over words: as they are where 1, 2, 4, 8 or 16 words share a pair, else repeated. */
static void plan_lines(dots *d) {
    uint64_t words = d->weight->layout.pair_width * (uint64_t)d->weight->spec.bits / 32;
    d->shift = 4;
    d->copies = 0;
    if (d->weight->layout.pairs_per_row == 1) return;
    d->copies = words / AQ_LANES;
    if (words % AQ_LANES == 0) return;
    d->copies = 1;
    for (d->shift = 0; words >> d->shift > 1 && (words >> d->shift) % 2 == 0;) d->shift++;
    if (words >> d->shift == 1) return;
    d->copies = words;
    d->shift = 0;
}

static aq_status multiply_codes(const aq_linear_weight *w, const float *x, uint64_t n_rows, float *y, int n_threads, aq_error *err) {
    dots d = {.weight = w, .kernels = aq_kernels_get(), .y = y, .n_rows = n_rows};
    uint64_t per = 32 / (uint64_t)w->spec.bits, inputs = w->layout.cols;
    d.words = aq_div_up(w->layout.row_bytes, 4 * AQ_LANES) * AQ_LANES;
    plan_lines(&d);
    d.n_sums = aq_div_up(w->layout.pairs_per_row, AQ_LANES) * AQ_LANES;
    uint64_t size = n_rows * (d.words * per + d.n_sums) * sizeof(float);
    float *memory = aq_alloc(size), *sums = memory ? memory + n_rows * d.words * per : NULL;
    if (!memory) return aq_fail_memory(err, size, "the inputs of a layer");
    aq_fp_state fp = aq_fp_enter();
    for (uint64_t r = 0; r < n_rows; r++) lay_out(w, x + r * inputs, d.words, d.n_sums, memory + r * d.words * per, sums + r * d.n_sums);
    aq_fp_leave(fp);
    d.x = memory;
    d.sums = sums;
    uint64_t threads = (uint64_t)aq_cpu_threads(n_threads), worth = aq_threads_ready() ? THREAD_WEIGHTS : START_WEIGHTS, weights = w->layout.rows * inputs;
    uint64_t work = weights / worth * aq_div_up(n_rows, 4);
    threads = aq_least(threads, work ? work : 1);
    /* Two tasks a thread where that is not too much for one: a thread then often meets the codes that its cache has from the call before. */
    uint64_t of_task = aq_least(weights / (2 * threads), MOST_WEIGHTS);
    if (of_task < TASK_WEIGHTS) of_task = TASK_WEIGHTS;
    d.outputs_per_task = aq_div_up(of_task, inputs * AQ_LANES) * AQ_LANES; /* whole turns of the kernels */
    bool ok = aq_parallel_for((size_t)aq_div_up(w->layout.rows, d.outputs_per_task), (int)threads, dot_task, &d);
    aq_free(memory);
    return ok ? AQ_OK : aq_fail_memory(err, 0, "the parameters of a layer's outputs");
}

aq_status aq_linear(const aq_linear_weight *weight, const float *x, uint64_t n_rows, float *y, int n_threads, aq_error *err) {
    if (n_rows == 0 || weight->layout.rows == 0) return AQ_OK;
    if (weight->layout.cols == 0 || weight->spec.params == AQ_PARAMS_R2Q || !aq_linear_words_fit(weight))
        return aq_linear_panels(weight, x, n_rows, y, n_threads, err);
    if (n_rows <= AQ_LINEAR_FEW) return multiply_codes(weight, x, n_rows, y, n_threads, err);
    return aq_linear_words(weight, x, n_rows, y, n_threads, err);
}
