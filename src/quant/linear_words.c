/* Products of activations with packed codes in integers (decision 006).
 *
 * Inputs become integers of 16 bits, every 256 of a row with a scale of their own: a power of two, so that what has few significant bits stays exact. They meet
 * the codes themselves, unpacked to 16 bits for as many outputs as a tile is wide; the sums of a group are exact in 32 bits, and only what follows, once a
 * group, is F32. A processor multiplies and adds twice as many such pairs at a time as floats.
 *
 * Tasks lay out the inputs of a chunk of rows (so many that they stay in the second-level cache), tile by tile and block by block, then tasks of panels of
 * outputs multiply all of them. Rows with NaN or infinity take the way of linear_panels.c afterwards.
 */
#include <math.h>
#include <string.h>

#include "base/cpu.h"
#include "base/error.h"
#include "base/half.h"
#include "base/mem.h"
#include "base/size.h"
#include "base/threads.h"
#include "quant/linear_internal.h"
#include "quant/quant_internal.h"

enum {
    MOST_ROWS = 16, /* of a tile, on any instruction set */
    MOST_COLS = 64,
    CHUNK_BYTES = 1 << 20 /* of the words of a chunk */
};
/* Operations: some 50 µs where threads are started, which costs 20 to 50, and 5 where they stand ready. */
#define WORTH_A_START 8e6
#define WORTH_A_THREAD 1e6

typedef struct product {
    const aq_linear_weight *weight;
    const aq_kernels *kernels;
    const float *x;
    float *y;
    uint64_t rows; /* of the chunk */
    uint64_t tiles, blocks, groups, panels;
    uint64_t words, segments; /* of a block, at most */
    float *memory;            /* [tiles][blocks] of words, scales, sums */
    uint64_t block_size, tile_size;
    bool *dropped;                 /* rows with a value that is not finite */
    atomic_uint_fast64_t laid_out; /* tasks done */
} product;

static uint64_t words_of(const aq_linear_weight *w, uint64_t inputs) {
    uint64_t half = 16 / (uint64_t)w->spec.bits;
    return aq_div_up(inputs, 2 * half) * half;
}

/* Inputs that share a scale once two-level codes are multiplied by the factors k of their sub-groups. */
static uint64_t scale_width(const aq_linear_weight *w) {
    if (w->spec.params != AQ_PARAMS_TWO_LEVEL) return aq_linear_pair_width(w);
    if (w->spec.bits == 2) return w->spec.group_size;
    return w->spec.group_size % AQ_FACTOR_SPAN == 0 ? AQ_FACTOR_SPAN : w->layout.pair_width;
}

/* Segments of `width` inputs each in a block. */
static aq_segments segments_of(const aq_linear_weight *w, uint64_t width, uint64_t step, uint64_t depth) {
    uint64_t words = words_of(w, depth);
    if (width >= w->layout.cols) return (aq_segments){words, words, words};
    return (aq_segments){words, aq_least((width - step % width) / 2, words), width / 2};
}

/* ---- inputs ---- */

/* Reads block `b` of the rows of a tile; a row that is not finite there counts as zeros. */
static void lay_out(product *p, uint64_t tile, uint64_t b) {
    const aq_word_kernels *k = p->kernels->words;
    uint64_t inputs = p->weight->layout.cols, step = b * AQ_WORD_BLOCK, depth = aq_least(AQ_WORD_BLOCK, inputs - step);
    const float *rows[MOST_ROWS] = {NULL};
    for (uint64_t i = 0, r = tile * k->rows; i < k->rows && r < p->rows; i++, r++) {
        rows[i] = p->x + r * inputs + step;
        if (p->kernels->find_nonfinite(rows[i], depth) < depth) {
            rows[i] = NULL;
            p->dropped[r * p->blocks + b] = true;
        }
    }
    float *words = p->memory + tile * p->tile_size + b * p->block_size, *scales = words + p->words * k->rows;
    aq_segments segments = segments_of(p->weight, aq_linear_pair_width(p->weight), step, depth);
    k->pack_inputs(rows, depth, p->weight->spec.bits, &segments, words, scales, scales + k->rows);
}

/* ---- outputs ---- */

/* What a task works with besides the layer and the inputs. */
typedef struct scratch {
    float *s, *o, *factors; /* of its outputs side by side: scales of each scale_width, offsets of each pair, words of the factors of two-level pairs */
    float *codes;           /* words of a block */
    float *sums;            /* of the rows so far, tile after tile: in y they would lie a page apart */
    float *line;            /* parameters of one output */
} scratch;

/* s = S k, exactly: becomes k, as a word; S comes out in place of s. */
static void split_scales(const aq_linear_weight *w, uint64_t row, float *s, float *outer) {
    uint64_t n = w->layout.pairs_per_row, subs = w->spec.group_size / w->layout.pair_width;
    for (uint64_t first = 0; first < n; first += subs) {
        uint16_t half;
        memcpy(&half, (const uint8_t *)w->params + aq_params_offset(&w->spec, &w->layout, row, first / subs), sizeof half);
        float scale = aq_f16_to_f32(half), inverse = 1 / scale;
        for (uint64_t i = first; i < aq_least(n, first + subs); i++) {
            uint32_t k = (uint32_t)(s[i] * inverse + 0.5f);
            s[i] = aq_f32_from_bits(k << 16 | k);
            outer[i] = scale;
        }
    }
}

/* Parameters of outputs [column, column + width). */
static void load_lines(const product *p, uint64_t column, uint64_t width, const scratch *m) {
    const aq_linear_weight *w = p->weight;
    uint64_t n = w->layout.pairs_per_row, cols = p->kernels->words->cols, per_scale = scale_width(w) / aq_linear_pair_width(w);
    float *s = m->line, *o = s + n, *outer = o + n;
    for (uint64_t i = 0; i < width; i++) {
        aq_linear_lines(p->kernels, w, column + i, 1, s, o);
        if (m->factors) split_scales(w, column + i, s, outer);
        for (uint64_t k = 0; k < n; k++) m->o[k * cols + i] = o[k];
        for (uint64_t k = 0; m->factors && k < n; k++) m->factors[k * cols + i] = s[k];
        for (uint64_t k = 0, from = 0; from < n; k++, from += per_scale) m->s[k * cols + i] = (m->factors ? outer : s)[from];
    }
}

static void multiply(const product *p, uint64_t column, uint64_t width, uint64_t first_tile, uint64_t end_tile, const scratch *m) {
    const aq_linear_weight *w = p->weight;
    const aq_word_kernels *k = p->kernels->words;
    uint64_t inputs = w->layout.cols, outputs = w->layout.rows;
    float start[MOST_COLS] = {0};
    if (w->bias) memcpy(start, w->bias + column, width * sizeof *start);
    for (uint64_t b = 0; b < p->blocks; b++) {
        uint64_t step = b * AQ_WORD_BLOCK, depth = aq_least(AQ_WORD_BLOCK, inputs - step), pair = step / aq_linear_pair_width(w);
        aq_code_panel panel = {.codes = aq_linear_codes_at(w, column, step),
                               .row_bytes = w->layout.row_bytes,
                               .bytes = w->layout.row_bytes - step * (uint64_t)w->spec.bits / 8,
                               .width = width,
                               .depth = depth,
                               .bits = w->spec.bits,
                               .factors = m->factors ? m->factors + pair * k->cols : NULL,
                               .factor_words = w->layout.pair_width * (uint64_t)w->spec.bits / 32};
        k->unpack_codes(&panel, m->codes);
        aq_word_block block = {.scales = segments_of(w, scale_width(w), step, depth),
                               .offsets = segments_of(w, aq_linear_pair_width(w), step, depth),
                               .w = m->codes,
                               .s = m->s + step / scale_width(w) * k->cols,
                               .o = m->o + pair * k->cols};
        for (uint64_t t = first_tile; t < end_tile; t++) {
            float *sums = m->sums + (t - first_tile) * k->rows * k->cols;
            block.x = p->memory + t * p->tile_size + b * p->block_size;
            block.x_scales = block.x + p->words * k->rows;
            block.x_sums = block.x_scales + k->rows;
            if (b + 1 < p->blocks)
                k->tile(&block, b ? sums : start, b ? k->cols : 0, k->rows, k->cols, sums, k->cols);
            else
                k->tile(&block, b ? sums : start, b ? k->cols : 0, aq_least(k->rows, p->rows - t * k->rows), width, p->y + t * k->rows * outputs + column,
                        outputs);
        }
    }
}

static bool run_task(void *context, size_t index) {
    product *p = context;
    const aq_word_kernels *k = p->kernels->words;
    uint64_t packs = p->tiles * p->blocks;
    if (index < packs) {
        lay_out(p, index / p->blocks, index % p->blocks);
        atomic_fetch_add_explicit(&p->laid_out, 1, memory_order_release);
        return true;
    }
    uint64_t panel = (index - packs) / p->groups, group = (index - packs) % p->groups, column = panel * k->cols;
    uint64_t width = aq_least(k->cols, p->weight->layout.rows - column), n = p->weight->layout.pairs_per_row;
    uint64_t first = p->tiles * group / p->groups, end = p->tiles * (group + 1) / p->groups, sums = (end - first) * k->rows * k->cols;
    bool two_level = p->weight->spec.params == AQ_PARAMS_TWO_LEVEL;
    float *memory = aq_calloc(p->words * k->cols + sums + (two_level ? 3 : 2) * n * k->cols + 3 * n, sizeof *memory);
    if (!memory) return false;
    scratch m = {.codes = memory, .sums = memory + p->words * k->cols};
    m.s = m.sums + sums;
    m.o = m.s + n * k->cols;
    m.line = m.o + n * k->cols;
    if (two_level) {
        m.factors = m.line;
        m.line += n * k->cols;
    }
    load_lines(p, column, width, &m);
    aq_wait_for(&p->laid_out, packs);
    multiply(p, column, width, first, end, &m);
    aq_free(memory);
    return true;
}

/* ---- the product ---- */

static bool run_chunk(product *p, int n_threads) {
    double operations = 2.0 * (double)p->rows * (double)p->weight->layout.rows * (double)p->weight->layout.cols;
    double worth = operations / (aq_threads_ready() ? WORTH_A_THREAD : WORTH_A_START);
    uint64_t threads = (uint64_t)aq_cpu_threads(n_threads);
    if (worth < (double)threads) threads = worth < 2 ? 1 : (uint64_t)worth;
    p->tiles = aq_div_up(p->rows, p->kernels->words->rows);
    p->groups = threads > 1 && p->panels < 4 * threads ? aq_least(p->tiles, aq_div_up(4 * threads, p->panels)) : 1;
    atomic_init(&p->laid_out, 0);
    return aq_parallel_for(p->tiles * p->blocks + p->panels * p->groups, (int)threads, run_task, p);
}

/* Rows of the chunk that were not finite, those next to each other at once. */
static aq_status redo_dropped(const product *p, int n_threads, aq_error *err) {
    uint64_t inputs = p->weight->layout.cols, outputs = p->weight->layout.rows;
    for (uint64_t row = 0, end; row < p->rows; row = end + 1) {
        for (end = row; end < p->rows && memchr(p->dropped + end * p->blocks, 1, p->blocks); end++) continue;
        if (end == row) continue;
        aq_status status = aq_linear_panels(p->weight, p->x + row * inputs, end - row, p->y + row * outputs, n_threads, err);
        if (status != AQ_OK) return status;
    }
    return AQ_OK;
}

/* Stored as F32, scales and offsets may be so large or small that their products with integers leave F32's range; halves cannot. */
static bool moderate(const aq_linear_weight *w) {
    if (w->spec.params != AQ_PARAMS_F32) return true;
    const char *at = w->params;
    for (uint64_t i = 0; i < w->layout.n_pairs; i++, at += 8) {
        float pair[2];
        memcpy(pair, at, sizeof pair);
        if (!(pair[0] > 0x1p-60f && pair[0] < 0x1p60f && fabsf(pair[1] * pair[0]) < 0x1p60f)) return false;
    }
    return true;
}

aq_status aq_linear_words(const aq_linear_weight *weight, const float *x, uint64_t n_rows, float *y, int n_threads, aq_error *err) {
    if (!moderate(weight)) return aq_linear_panels(weight, x, n_rows, y, n_threads, err);
    product p = {.weight = weight, .kernels = aq_kernels_get()};
    const aq_word_kernels *k = p.kernels->words;
    uint64_t inputs = weight->layout.cols, outputs = weight->layout.rows, unit = 64 / sizeof(float);
    p.blocks = aq_div_up(inputs, AQ_WORD_BLOCK);
    p.panels = aq_div_up(outputs, k->cols);
    p.words = words_of(weight, aq_least(AQ_WORD_BLOCK, inputs));
    p.segments = aq_least(weight->layout.pairs_per_row, AQ_WORD_BLOCK / aq_linear_pair_width(weight) + 2);
    p.block_size = aq_div_up((p.words + 1 + p.segments) * k->rows, unit) * unit;
    p.tile_size = p.blocks * p.block_size;
    uint64_t most = CHUNK_BYTES / (p.tile_size * sizeof(float)), rows = (most ? most : 1) * k->rows;
    rows = aq_least(rows, n_rows);
    uint64_t bytes = aq_div_up(rows, k->rows) * p.tile_size * sizeof(float);
    char *memory = aq_alloc(bytes + rows * p.blocks + 64);
    if (!memory) return aq_fail_memory(err, bytes, "the inputs of a layer");
    p.memory = (void *)(memory + (64 - (uintptr_t)memory % 64));
    p.dropped = (void *)((char *)p.memory + bytes);
    aq_status status = AQ_OK;
    for (uint64_t row = 0; status == AQ_OK && row < n_rows; row += rows) {
        p.x = x + row * inputs;
        p.y = y + row * outputs;
        p.rows = aq_least(rows, n_rows - row);
        memset(p.dropped, false, p.rows * p.blocks);
        status = run_chunk(&p, n_threads) ? redo_dropped(&p, n_threads, err) : aq_fail_memory(err, 0, "panels of a layer's weights");
    }
    aq_free(memory);
    return status;
}
