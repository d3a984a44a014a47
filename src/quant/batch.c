/* Batches of matrices (see batch.h).
 *
 * A piece is either a block of whole rows or, in rows longer than a piece, a run of columns that starts on a group and a byte.
 * Both are matrices of their own for aq_quantize: groups never cross a piece, so the cut cannot be seen in the result.
 */
#include <arrowquant/batch.h>

#include <math.h>
#include <stdatomic.h>
#include <string.h>
#include <time.h>

#include "base/error.h"
#include "base/mem.h"
#include "base/size.h"
#include "base/threads.h"
#include "kernels/kernels.h"

enum {
    PIECE_VALUES = 1 << 18, /* weights of a piece: 1 MiB, about 0.1 ms of work */
    PIECE_PAIRS = 2048,     /* parameters of a piece; they live on the stack until they are split */
};
#define TICK_SECONDS 0.05

/* How one matrix is cut. */
typedef struct cut {
    aq_quant_layout layout;
    uint64_t group; /* inputs per group, never 0 */
    uint64_t rows_per_piece;
    uint64_t cols_per_piece; /* cols, or less in long rows; then rows_per_piece is 1 */
    uint64_t pieces_per_row; /* 1, or more in long rows */
    uint64_t n_pieces;
} cut;

static aq_status cut_matrix(cut *c, const aq_quant_spec *spec, uint64_t rows, uint64_t cols, aq_error *err) {
    aq_status status = aq_quant_layout_init(&c->layout, spec, rows, cols, err);
    if (status != AQ_OK) return status;
    c->n_pieces = 0;
    if (rows == 0 || cols == 0) return AQ_OK;
    c->group = spec->group_size && spec->group_size < cols ? spec->group_size : cols;
    c->rows_per_piece = 1;
    c->cols_per_piece = cols;
    uint64_t groups = aq_div_up(cols, c->group);
    if (cols <= PIECE_VALUES && groups <= PIECE_PAIRS) {
        uint64_t by_values = PIECE_VALUES / cols, by_pairs = PIECE_PAIRS / groups;
        c->rows_per_piece = by_values < by_pairs ? by_values : by_pairs;
    } else if (groups > 1) {
        /* Steps are whole groups and whole bytes of codes (4 values fill a byte at 2 bits). */
        uint64_t groups_per_step = c->group % 4 == 0 ? 1 : 4, step = c->group * groups_per_step;
        uint64_t by_values = PIECE_VALUES / step, by_pairs = PIECE_PAIRS / groups_per_step;
        uint64_t n_steps = by_values < by_pairs ? by_values : by_pairs;
        c->cols_per_piece = (n_steps ? n_steps : 1) * step;
    }
    c->pieces_per_row = aq_div_up(cols, c->cols_per_piece);
    c->n_pieces = aq_div_up(rows, c->rows_per_piece) * c->pieces_per_row;
    return AQ_OK;
}

/* Where one piece lies in its matrix. */
typedef struct piece {
    uint64_t rows, cols;
    uint64_t first_value, first_byte, first_pair;
} piece;

static piece cut_piece(const cut *c, const aq_quant_spec *spec, uint64_t index) {
    const aq_quant_layout *l = &c->layout;
    uint64_t row = index / c->pieces_per_row * c->rows_per_piece, col = index % c->pieces_per_row * c->cols_per_piece;
    uint64_t rows_left = l->rows - row, cols_left = l->cols - col;
    return (piece){.rows = rows_left < c->rows_per_piece ? rows_left : c->rows_per_piece,
                   .cols = cols_left < c->cols_per_piece ? cols_left : c->cols_per_piece,
                   .first_value = row * l->cols + col,
                   .first_byte = row * l->row_bytes + col * (uint64_t)spec->bits / 8,
                   .first_pair = row * l->groups_per_row + col / c->group};
}

/* The layer that holds piece `index`, where first[i] is the first piece of layer i (rising) and first[n] the number of all. */
static size_t find_layer(const uint64_t *first, size_t n, uint64_t index) {
    size_t low = 0, high = n;
    while (high - low > 1) {
        size_t middle = low + (high - low) / 2;
        if (first[middle] <= index)
            low = middle;
        else
            high = middle;
    }
    return low;
}

static double seconds_now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

/* ---- the caller's tick ---- */

/* The calling thread is the only one that may call `tick`; it takes part in the loops and looks at its watch after each of its pieces. */
typedef struct watch {
    const aq_batch_options *options;
    double last;
    bool stopped;
} watch;
static _Thread_local watch *watch_of_this_thread;

static watch *watch_begin(watch *w, const aq_batch_options *options) {
    watch *outer = watch_of_this_thread;
    *w = (watch){.options = options, .last = seconds_now()};
    watch_of_this_thread = w;
    return outer;
}

static void watch_end(watch *outer) { watch_of_this_thread = outer; }

/* False when the caller wants to stop. */
static bool watch_call(watch *w, size_t layer, size_t n_finished) {
    w->stopped = !w->options->tick(w->options->user, layer, n_finished);
    w->last = seconds_now();
    return !w->stopped;
}

static bool watch_look(watch *w, size_t n_finished) {
    if (watch_of_this_thread != w || w->options->tick == NULL) return true;
    return !w->stopped && (seconds_now() - w->last < TICK_SECONDS || watch_call(w, SIZE_MAX, n_finished));
}

/* ---- check ---- */

enum { CHECK_VALUES = 1 << 20 }; /* a layer larger than this is read by all threads */

static uint64_t first_nonfinite(const float *w, uint64_t n) {
    uint64_t at = aq_kernels_get()->find_nonfinite(w, (size_t)n);
    return at < n ? at : AQ_ALL_FINITE;
}

typedef struct check_work {
    aq_batch_layer *layers;
    watch watch;
    /* the large layer that is being read */
    const float *weights;
    uint64_t n;
    atomic_uint_least64_t first;
} check_work;

static bool check_small_layer(void *context, size_t index) {
    check_work *work = context;
    aq_batch_layer *layer = &work->layers[index];
    uint64_t n = layer->rows * layer->cols;
    if (n <= CHECK_VALUES) layer->first_nonfinite = first_nonfinite(layer->weights, n);
    return watch_look(&work->watch, 0);
}

static bool check_part(void *context, size_t index) {
    check_work *work = context;
    uint64_t begin = index * (uint64_t)CHECK_VALUES, n = work->n - begin < CHECK_VALUES ? work->n - begin : CHECK_VALUES;
    uint64_t found = first_nonfinite(work->weights + begin, n), first = atomic_load(&work->first);
    while (found != AQ_ALL_FINITE && begin + found < first && !atomic_compare_exchange_weak(&work->first, &first, begin + found)) {
    }
    return watch_look(&work->watch, 0);
}

aq_status aq_batch_check(aq_batch_layer *layers, size_t n_layers, const aq_batch_options *options, aq_error *err) {
    check_work work = {.layers = layers};
    watch *outer = watch_begin(&work.watch, options);
    bool done = aq_parallel_for(n_layers, options->n_threads, check_small_layer, &work);
    for (size_t i = 0; done && i < n_layers; i++) {
        work.n = layers[i].rows * layers[i].cols;
        if (work.n <= CHECK_VALUES) continue;
        work.weights = layers[i].weights;
        atomic_store(&work.first, AQ_ALL_FINITE);
        done = aq_parallel_for((size_t)aq_div_up(work.n, CHECK_VALUES), options->n_threads, check_part, &work);
        layers[i].first_nonfinite = atomic_load(&work.first);
    }
    watch_end(outer);
    return done ? AQ_OK : aq_fail(err, AQ_ERR_INTERRUPTED, "the batch was stopped");
}

/* ---- quantize ---- */

typedef struct layer_state {
    cut cut;
    atomic_uint_least64_t left; /* pieces not finished */
    atomic_bool failed;
} layer_state;

typedef struct quantize_work {
    aq_batch_layer *layers;
    layer_state *states;
    uint64_t *first; /* first piece of each layer */
    size_t n_layers;
    const aq_batch_options *options;
    /* Layers in the order in which they were finished; the calling thread tells them to `tick`. SIZE_MAX: not there yet. */
    atomic_size_t *finished;
    atomic_size_t n_finished;
    size_t n_told;
    watch watch;
} quantize_work;

/* Tells the calling thread's caller what is finished. */
static bool tell(quantize_work *work) {
    if (watch_of_this_thread != &work->watch || work->options->tick == NULL) return true;
    size_t layer;
    while (!work->watch.stopped && work->n_told < work->n_layers && (layer = atomic_load(&work->finished[work->n_told])) != SIZE_MAX)
        watch_call(&work->watch, layer, ++work->n_told);
    return watch_look(&work->watch, work->n_told);
}

static void finish_layer(quantize_work *work, size_t layer) { atomic_store(&work->finished[atomic_fetch_add(&work->n_finished, 1)], layer); }

static aq_status quantize_piece(const quantize_work *work, size_t layer, uint64_t index, aq_error *err) {
    const aq_quant_spec *spec = &work->options->spec;
    const aq_batch_layer *l = &work->layers[layer];
    piece p = cut_piece(&work->states[layer].cut, spec, index);
    float pairs[2 * PIECE_PAIRS];
    aq_quant_layout layout;
    aq_status status = aq_quant_layout_init(&layout, spec, p.rows, p.cols, err);
    if (status != AQ_OK) return status;
    status = aq_quantize(l->weights + p.first_value, spec, &layout, NULL, 1, l->codes + p.first_byte, pairs, NULL, NULL, err);
    if (status == AQ_OK) aq_quant_pairs(spec, &layout, pairs, l->scales + p.first_pair, l->zero_points + p.first_pair);
    return status;
}

static bool quantize_task(void *context, size_t index) {
    quantize_work *work = context;
    size_t layer = find_layer(work->first, work->n_layers, index);
    layer_state *s = &work->states[layer];
    if (quantize_piece(work, layer, index - work->first[layer], NULL) != AQ_OK) atomic_store(&s->failed, true);
    if (atomic_fetch_sub(&s->left, 1) == 1) finish_layer(work, layer);
    return tell(work);
}

/* Runs the pieces of a failed layer once more, in order: its status and text are those of the first bad piece, at any thread count. */
static void find_failure(quantize_work *work, size_t layer, aq_error *err) {
    uint64_t n_pieces = work->states[layer].cut.n_pieces;
    aq_status status = AQ_OK;
    for (uint64_t i = 0; status == AQ_OK && i < n_pieces; i++) status = quantize_piece(work, layer, i, err);
    if (status == AQ_OK) status = aq_fail(err, AQ_ERR_MEMORY, "not enough memory"); /* it was there the second time */
    work->layers[layer].status = status;
}

static aq_status batch_run(quantize_work *work, aq_error *err) {
    for (size_t i = 0; i < work->n_layers; i++)
        if (work->states[i].cut.n_pieces == 0) finish_layer(work, i);
    watch *outer = watch_begin(&work->watch, work->options);
    bool done = aq_parallel_for((size_t)work->first[work->n_layers], work->options->n_threads, quantize_task, work);
    done = done && tell(work); /* those that other threads finished last */
    watch_end(outer);
    if (!done) return aq_fail(err, AQ_ERR_INTERRUPTED, "the batch was stopped");
    aq_status status = AQ_OK;
    for (size_t i = 0; i < work->n_layers; i++) {
        if (!atomic_load(&work->states[i].failed)) continue;
        find_failure(work, i, status == AQ_OK ? err : NULL);
        if (status == AQ_OK) status = work->layers[i].status;
    }
    return status;
}

aq_status aq_batch_quantize(aq_batch_layer *layers, size_t n_layers, const aq_batch_options *options, aq_error *err) {
    if (options->spec.axis != 1 || options->spec.params != AQ_PARAMS_F32)
        return aq_fail(err, AQ_ERR_USAGE, "a batch is quantized along axis 1 with F32 parameters");
    quantize_work work = {.layers = layers, .n_layers = n_layers, .options = options};
    work.states = aq_calloc(n_layers, sizeof *work.states);
    work.first = aq_calloc((uint64_t)n_layers + 1, sizeof *work.first);
    work.finished = aq_calloc(n_layers, sizeof *work.finished);
    bool allocated = work.states && work.first && work.finished;
    aq_status status = allocated ? AQ_OK : aq_fail_memory(err, n_layers * sizeof *work.states, "the batch");
    for (size_t i = 0; allocated && status == AQ_OK && i < n_layers; i++) {
        status = cut_matrix(&work.states[i].cut, &options->spec, layers[i].rows, layers[i].cols, err);
        if (status != AQ_OK) break;
        layers[i].status = AQ_OK;
        atomic_init(&work.states[i].left, work.states[i].cut.n_pieces);
        atomic_init(&work.finished[i], SIZE_MAX);
        if (!aq_add(work.first[i], work.states[i].cut.n_pieces, &work.first[i + 1]) || work.first[i + 1] > SIZE_MAX)
            status = aq_fail(err, AQ_ERR_FORMAT, "the batch holds too many weights");
    }
    if (allocated && status == AQ_OK) status = batch_run(&work, err);
    aq_free(work.states);
    aq_free(work.first);
    aq_free((void *)work.finished);
    return status;
}

/* ---- dequantize ---- */

typedef struct dequantize_work {
    const aq_quant_spec *spec;
    cut cut;
    const uint8_t *codes;
    const float *scales, *zero_points;
    float *out;
} dequantize_work;

static bool dequantize_task(void *context, size_t index) {
    const dequantize_work *work = context;
    piece p = cut_piece(&work->cut, work->spec, index);
    aq_quant_layout layout;
    if (aq_quant_layout_init(&layout, work->spec, p.rows, p.cols, NULL) != AQ_OK) return false;
    float pairs[2 * PIECE_PAIRS];
    for (uint64_t i = 0; i < layout.n_groups; i++) {
        pairs[2 * i] = work->scales[p.first_pair + i];
        pairs[2 * i + 1] = work->zero_points[p.first_pair + i];
    }
    aq_dequantize(work->spec, &layout, work->codes + p.first_byte, pairs, 0, p.rows, work->out + p.first_value);
    return true;
}

aq_status aq_batch_dequantize(const aq_quant_spec *spec, uint64_t rows, uint64_t cols, const uint8_t *codes, const float *scales, const float *zero_points,
                              int n_threads, float *out, aq_error *err) {
    if (spec->axis != 1 || spec->params != AQ_PARAMS_F32) return aq_fail(err, AQ_ERR_USAGE, "a batch is dequantized along axis 1 with F32 parameters");
    dequantize_work work = {.spec = spec, .codes = codes, .scales = scales, .zero_points = zero_points, .out = out};
    aq_status status = cut_matrix(&work.cut, spec, rows, cols, err);
    if (status != AQ_OK) return status;
    for (uint64_t i = 0; i < work.cut.layout.n_groups; i++) {
        if (!isfinite(scales[i]) || scales[i] <= 0)
            return aq_fail(err, AQ_ERR_FORMAT, "group %llu: the scale is not a finite number above 0", (unsigned long long)i);
        if (!isfinite(zero_points[i])) return aq_fail(err, AQ_ERR_FORMAT, "group %llu: the zero point is not finite", (unsigned long long)i);
    }
    if (!aq_parallel_for((size_t)work.cut.n_pieces, n_threads, dequantize_task, &work)) return aq_fail(err, AQ_ERR_INTERNAL, "a piece has no layout");
    return AQ_OK;
}

/* ---- given parameters ---- */

typedef struct parts_work {
    const float *weights, *scales, *zero_points;
    uint64_t n;
    size_t n_parts;
    uint8_t *codes;
} parts_work;

/* g*n/G without overflow: n is split into quotient and remainder. */
static uint64_t part_begin(uint64_t n, size_t n_parts, size_t g) { return n / n_parts * g + n % n_parts * g / n_parts; }

static void code_run(const float *w, uint64_t n, float scale, float zero, uint8_t *codes) {
    const float magic = 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer, half to even, without a call */
    for (uint64_t i = 0; i < n; i++) {
        float q = w[i] / scale + zero;
        q = q > 0 ? q : 0;
        q = q < 255 ? q : 255;
        q += magic;
        codes[i] = (uint8_t)(int)(q - magic);
    }
}

static bool parts_task(void *context, size_t index) {
    const parts_work *work = context;
    uint64_t begin = index * (uint64_t)PIECE_VALUES, end = work->n - begin < PIECE_VALUES ? work->n : begin + PIECE_VALUES;
    size_t g = 0;
    for (size_t high = work->n_parts; high - g > 1;) { /* the last part that begins at or before the piece */
        size_t middle = g + (high - g) / 2;
        if (part_begin(work->n, work->n_parts, middle) <= begin)
            g = middle;
        else
            high = middle;
    }
    for (uint64_t i = begin; i < end; g++) {
        uint64_t part_end = g + 1 < work->n_parts ? part_begin(work->n, work->n_parts, g + 1) : work->n;
        uint64_t run_end = part_end < end ? part_end : end;
        code_run(work->weights + i, run_end - i, work->scales[g], work->zero_points[g], work->codes + i);
        i = run_end;
    }
    return true;
}

void aq_quantize_parts(const float *weights, uint64_t n, const float *scales, const float *zero_points, size_t n_parts, int n_threads, uint8_t *codes) {
    parts_work work = {weights, scales, zero_points, n, n_parts, codes};
    aq_parallel_for((size_t)aq_div_up(n, PIECE_VALUES), n_threads, parts_task, &work);
}
