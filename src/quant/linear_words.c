/* Products of activations with packed codes in integers (decision 006).
 *
 * Inputs become integers of 16 bits, every 256 of a row with a scale of their own: a power of two, so that what has few significant bits stays exact. They meet
 * the codes themselves, unpacked to 16 bits for as many outputs as a tile is wide; the sums of a group are exact in 32 bits, and only what follows, once a
 * group, is F32. A processor multiplies and adds twice as many such pairs at a time as floats.
 *
 * Tasks lay out the inputs of a chunk of rows (so many that they stay in the second-level cache), tile by tile and block by block, then tasks of panels of
 * outputs multiply all of them. Rows with NaN or infinity take the way of linear_panels.c afterwards.
 *
 * Inputs that are codes of 8 bits themselves (W8A8, W4A8) go the same way, X = q - 128, four in a word where the processor multiplies bytes. What their zero
 * point z differs from 128 times the sum of an output's weights is one more offset: that sum is the product with a row of ones, which lies behind the rows as a
 * tile of its own.
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
/* Rows that take as long as unpacking the codes does. */
#define UNPACKING 8
/* Operations: some 50 µs where threads are started, which costs 20 to 50, and 5 where they stand ready. */
#define WORTH_A_START 8e6
#define WORTH_A_THREAD 1e6

typedef struct product {
    const aq_linear_weight *weight;
    const aq_kernels *kernels;
    const aq_word_kernels *integers;
    const float *x;
    aq_coded_inputs coded; /* in place of x, where that is NULL */
    float *y;
    uint64_t rows; /* of the chunk */
    uint64_t tiles, blocks, groups, panels;
    uint64_t words, segments; /* of a block, at most */
    float *memory;            /* [tiles][blocks] of words, scales, sums */
    uint64_t block_size, tile_size;
    bool *dropped;                 /* rows with a value that is not finite */
    atomic_uint_fast64_t laid_out; /* tasks done */
} product;

static uint64_t words_of(const product *p, uint64_t inputs) {
    uint64_t codes = 32 / (uint64_t)p->weight->spec.bits; /* of a word of codes */
    return aq_div_up(inputs, codes) * (codes / p->integers->per);
}

static bool with_factors(const product *p) { return p->x && p->weight->spec.params == AQ_PARAMS_TWO_LEVEL; }

/* Inputs that share a scale once two-level codes are multiplied by the factors k of their sub-groups, which is not done where inputs are coded. */
static uint64_t scale_width(const product *p) {
    const aq_linear_weight *w = p->weight;
    if (!with_factors(p)) return aq_linear_pair_width(w);
    if (w->spec.bits == 2) return w->spec.group_size;
    return w->spec.group_size % AQ_FACTOR_SPAN == 0 ? AQ_FACTOR_SPAN : w->layout.pair_width;
}

/* Segments of `width` inputs each in a block. */
static aq_segments segments_of(const product *p, uint64_t width, uint64_t step, uint64_t depth) {
    uint64_t words = words_of(p, depth), per = p->integers->per;
    if (width >= p->weight->layout.cols) return (aq_segments){words, words, words};
    return (aq_segments){words, aq_least((width - step % width) / per, words), width / per};
}

static uint64_t count(const aq_segments *s) { return 1 + aq_div_up(s->words - s->first, s->width); }

/* ---- inputs ---- */

static float *memory_of(const product *p, uint64_t tile, uint64_t b) { return p->memory + tile * p->tile_size + b * p->block_size; }

/* Reads block `b` of the rows of a tile; a row that is not finite there counts as zeros. */
static void lay_out(product *p, uint64_t tile, uint64_t b) {
    const aq_word_kernels *k = p->integers;
    uint64_t inputs = p->weight->layout.cols, step = b * AQ_WORD_BLOCK, depth = aq_least(AQ_WORD_BLOCK, inputs - step);
    const float *rows[MOST_ROWS] = {NULL};
    for (uint64_t i = 0, r = tile * k->rows; i < k->rows && r < p->rows; i++, r++) {
        rows[i] = p->x + r * inputs + step;
        if (p->kernels->find_nonfinite(rows[i], depth) < depth) {
            rows[i] = NULL;
            p->dropped[r * p->blocks + b] = true;
        }
    }
    float *words = memory_of(p, tile, b), *scales = words + p->words * k->rows;
    aq_segments segments = segments_of(p, aq_linear_pair_width(p->weight), step, depth);
    k->pack_inputs(rows, depth, p->weight->spec.bits, &segments, words, scales, scales + k->rows);
}

/* All blocks of a tile of coded inputs, with 128 - z behind the sums. Tile `tiles` is the row of ones. */
static void lay_out_codes(product *p, uint64_t tile) {
    const aq_word_kernels *k = p->integers;
    const aq_coded_inputs *x = &p->coded;
    uint64_t inputs = p->weight->layout.cols, first = tile * k->rows, height = tile < p->tiles ? aq_least(k->rows, p->rows - first) : 1;
    float s[MOST_ROWS] = {1}, z[MOST_ROWS] = {128};
    uint8_t codes[MOST_ROWS * AQ_WORD_BLOCK];
    for (uint64_t i = 0; tile < p->tiles && i < height; i++) {
        uint64_t r = first + i;
        if (x->scales) {
            s[i] = x->scales[r * x->pair_stride];
            z[i] = x->zeros[r * x->pair_stride];
        } else {
            aq_activation_row_pair(p->kernels, x->x + r * inputs, inputs, &s[i], &z[i]);
        }
    }
    for (uint64_t b = 0; b < p->blocks; b++) {
        uint64_t step = b * AQ_WORD_BLOCK, depth = aq_least(AQ_WORD_BLOCK, inputs - step);
        aq_segments segments = segments_of(p, aq_linear_pair_width(p->weight), step, depth);
        float *words = memory_of(p, tile, b), *scales = words + p->words * k->rows, *sums = scales + k->rows, *rest = sums + count(&segments) * k->rows;
        const uint8_t *rows[MOST_ROWS] = {NULL};
        for (uint64_t i = 0; i < k->rows; i++) {
            scales[i] = i < height ? s[i] : 0;
            rest[i] = i < height ? 128 - z[i] : 0;
            if (i >= height) continue;
            uint8_t *own = codes + i * AQ_WORD_BLOCK;
            rows[i] = x->codes ? x->codes + (first + i) * inputs + step : own;
            if (tile == p->tiles)
                rows[i] = memset(own, 128 + 1, depth);
            else if (!x->codes)
                p->kernels->quantize_inputs(x->x + (first + i) * inputs + step, depth, s[i], z[i], own);
        }
        k->pack_codes(rows, depth, p->weight->spec.bits, &segments, words, sums);
    }
}

/* ---- outputs ---- */

/* What a task works with besides the layer and the inputs. */
typedef struct scratch {
    float *s, *o, *factors; /* of its outputs side by side: scales of each scale_width, offsets of each pair, words of the factors of two-level pairs */
    float *second;          /* scales of R2Q's lower plane */
    float *codes, *upper;   /* words of a block; of R2Q's upper plane */
    float *offsets;         /* of a block of coded inputs: those of its pairs, then the sums of its weights */
    float *sums;            /* of the rows so far, tile after tile: in y they would lie a page apart */
    float *line;            /* parameters, output after output */
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

/* R2Q's levels m +- a1 +- a2 are two planes of bits, w = 2 a1 b1 + 2 a2 b0 + m - a1 - a2. */
static void load_planes(const aq_linear_weight *w, uint64_t row, float *s, float *o, float *second) {
    const uint8_t *at = (const uint8_t *)w->params + aq_params_offset(&w->spec, &w->layout, row, 0);
    for (uint64_t i = 0; i < w->layout.pairs_per_row; i++, at += 6) {
        uint16_t halves[3];
        memcpy(halves, at, sizeof halves);
        float m = aq_f16_to_f32(halves[0]), a1 = aq_f16_to_f32(halves[1]), a2 = aq_f16_to_f32(halves[2]);
        s[i] = 2 * a1;
        second[i] = 2 * a2;
        o[i] = m - a1 - a2;
    }
}

static void split_codes(const product *p, const scratch *m) {
    uint32_t ones = p->integers->per == 2 ? 0x10001 : 0x1010101;
    for (uint64_t i = 0; i < p->words * p->integers->cols; i++) {
        uint32_t word = aq_f32_bits(m->codes[i]);
        m->upper[i] = aq_f32_from_bits(word >> 1 & ones);
        m->codes[i] = aq_f32_from_bits(word & ones);
    }
}

/* Parameters of outputs [column, column + width). */
static void load_lines(const product *p, uint64_t column, uint64_t width, const scratch *m) {
    const aq_linear_weight *w = p->weight;
    uint64_t n = w->layout.pairs_per_row, cols = p->integers->cols, per_scale = scale_width(p) / aq_linear_pair_width(w);
    float *s = m->line, *o = s + cols * n, *outer = o + cols * n;
    if (!m->second) aq_linear_lines(p->kernels, w, column, width, s, o);
    for (uint64_t i = 0; i < width; i++, s += n, o += n) {
        if (m->second) load_planes(w, column + i, s, o, outer);
        for (uint64_t k = 0; m->second && k < n; k++) m->second[k * cols + i] = outer[k];
        if (m->factors) split_scales(w, column + i, s, outer);
        for (uint64_t k = 0; k < n; k++) m->o[k * cols + i] = o[k];
        for (uint64_t k = 0; m->factors && k < n; k++) m->factors[k * cols + i] = s[k];
        for (uint64_t k = 0, from = 0; from < n; k++, from += per_scale) m->s[k * cols + i] = (m->factors ? outer : s)[from];
    }
}

static void point_at(const product *p, uint64_t tile, uint64_t b, aq_word_block *block) {
    block->x = memory_of(p, tile, b);
    block->x_scales = block->x + p->words * p->integers->rows;
    block->x_sums = block->x_scales + p->integers->rows;
}

/* The sums of the weights of a block become an offset more. */
static void add_offset(const product *p, uint64_t b, aq_word_block *parts, size_t n_parts, const scratch *m) {
    const aq_word_kernels *k = p->integers;
    aq_word_block *last = &parts[n_parts - 1];
    float *sums = m->offsets + last->n_offsets * k->cols;
    memcpy(m->offsets, last->o, last->n_offsets * k->cols * sizeof *sums);
    memset(sums, 0, k->cols * sizeof *sums);
    for (size_t i = 0; i < n_parts; i++) {
        point_at(p, p->tiles, b, &parts[i]);
        k->tile(&parts[i], sums, 0, 1, k->cols, sums, k->cols);
    }
    last->o = m->offsets;
    last->n_offsets++;
}

/* Block `b` of the codes of some outputs: so few bytes of each row that no processor fetches them ahead by itself. */
static void fetch(const product *p, uint64_t column, uint64_t b) {
    enum { LINE = 64 };
    const aq_linear_weight *w = p->weight;
    uint64_t step = b * AQ_WORD_BLOCK, end = aq_least(column + p->integers->cols, w->layout.rows);
    uint64_t bytes = aq_least(AQ_WORD_BLOCK, w->layout.cols - step) * (uint64_t)w->spec.bits / 8;
    for (uint64_t row = column; row < end; row++)
        for (uint64_t at = 0; at < bytes; at += LINE) __builtin_prefetch(aq_linear_codes_at(w, row, step) + at);
}

static void multiply(const product *p, uint64_t column, uint64_t width, uint64_t first_tile, uint64_t end_tile, const scratch *m) {
    const aq_linear_weight *w = p->weight;
    const aq_word_kernels *k = p->integers;
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
        if (b + 1 < p->blocks)
            fetch(p, column, b + 1);
        else
            fetch(p, column + width, 0);
        aq_segments pairs = segments_of(p, aq_linear_pair_width(w), step, depth);
        aq_word_block all = {.scales = segments_of(p, scale_width(p), step, depth),
                             .n_offsets = count(&pairs),
                             .w = m->codes,
                             .s = m->s + step / scale_width(p) * k->cols,
                             .o = m->o + pair * k->cols};
        aq_word_block parts[2] = {all, all}; /* R2Q: the upper plane, then the lower one with the offsets; else all at once */
        size_t n_parts = m->second ? 2 : 1;
        if (m->second) {
            split_codes(p, m);
            parts[0].w = m->upper;
            parts[0].n_offsets = 0;
            parts[1].s = m->second + pair * k->cols;
        }
        if (!p->x) add_offset(p, b, parts, n_parts, m);
        for (uint64_t t = first_tile; t < end_tile; t++) {
            float *sums = m->sums + (t - first_tile) * k->rows * k->cols;
            uint64_t height = aq_least(k->rows, p->rows - t * k->rows);
            for (size_t i = 0; i < n_parts; i++) {
                bool first = b == 0 && i == 0, last = b + 1 == p->blocks && i + 1 == n_parts;
                point_at(p, t, b, &parts[i]);
                if (last)
                    k->tile(&parts[i], first ? start : sums, first ? 0 : k->cols, height, width, p->y + t * k->rows * outputs + column, outputs);
                else
                    k->tile(&parts[i], first ? start : sums, first ? 0 : k->cols, height, k->cols, sums, k->cols);
            }
        }
    }
}

/* Tasks that lay out inputs. */
static uint64_t packs_of(const product *p) { return p->x ? p->tiles * p->blocks : p->tiles + 1; }

static bool run_task(void *context, size_t index) {
    product *p = context;
    const aq_word_kernels *k = p->integers;
    uint64_t packs = packs_of(p);
    if (index < packs) {
        if (p->x)
            lay_out(p, index / p->blocks, index % p->blocks);
        else
            lay_out_codes(p, index);
        atomic_fetch_add_explicit(&p->laid_out, 1, memory_order_release);
        return true;
    }
    uint64_t panel = (index - packs) / p->groups, group = (index - packs) % p->groups, column = panel * k->cols;
    uint64_t width = aq_least(k->cols, p->weight->layout.rows - column), n = p->weight->layout.pairs_per_row;
    uint64_t first = p->tiles * group / p->groups, end = p->tiles * (group + 1) / p->groups, sums = (end - first) * k->rows * k->cols;
    bool factors = with_factors(p), planes = p->weight->spec.params == AQ_PARAMS_R2Q;
    uint64_t words = p->words * k->cols, offsets = p->segments * k->cols, lines = n * k->cols;
    float *memory = aq_calloc((planes ? 2 : 1) * words + offsets + sums + (factors || planes ? 5 : 4) * lines + n, sizeof *memory);
    if (!memory) return false;
    scratch m = {.codes = memory, .sums = memory + words, .s = memory + words + sums};
    m.o = m.s + lines;
    m.offsets = m.o + lines;
    m.line = m.offsets + offsets;
    if (factors) m.factors = m.line + 2 * lines + n;
    if (planes) {
        m.second = m.line + 2 * lines + n;
        m.upper = m.second + lines;
    }
    load_lines(p, column, width, &m);
    aq_wait_for(&p->laid_out, packs);
    multiply(p, column, width, first, end, &m);
    aq_free(memory);
    return true;
}

/* ---- the product ---- */

static bool run_chunk(product *p, int n_threads) {
    double operations = 2.0 * (double)(p->rows + UNPACKING) * (double)p->weight->layout.rows * (double)p->weight->layout.cols;
    double worth = operations / (aq_threads_ready() ? WORTH_A_THREAD : WORTH_A_START);
    uint64_t threads = (uint64_t)aq_cpu_threads(n_threads);
    if (worth < (double)threads) threads = worth < 2 ? 1 : (uint64_t)worth;
    p->tiles = aq_div_up(p->rows, p->integers->rows);
    p->groups = threads > 1 && p->panels < 4 * threads ? aq_least(p->tiles, aq_div_up(4 * threads, p->panels)) : 1;
    atomic_init(&p->laid_out, 0);
    return aq_parallel_for(packs_of(p) + p->panels * p->groups, (int)threads, run_task, p);
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

static aq_coded_inputs from_row(const aq_coded_inputs *x, uint64_t row, uint64_t inputs) {
    aq_coded_inputs from = *x;
    if (x->codes) from.codes += row * inputs;
    if (x->x) from.x += row * inputs;
    if (x->scales) {
        from.scales += row * x->pair_stride;
        from.zeros += row * x->pair_stride;
    }
    return from;
}

/* Of x, or of what is coded. */
static aq_status multiply_rows(const aq_linear_weight *weight, const float *x, const aq_coded_inputs *coded, uint64_t n_rows, float *y, int n_threads,
                               aq_error *err) {
    product p = {.weight = weight, .kernels = aq_kernels_get()};
    p.integers = coded ? p.kernels->bytes : p.kernels->words;
    p.x = x;
    const aq_word_kernels *k = p.integers;
    uint64_t inputs = weight->layout.cols, outputs = weight->layout.rows, unit = 64 / sizeof(float);
    p.blocks = aq_div_up(inputs, AQ_WORD_BLOCK);
    p.panels = aq_div_up(outputs, k->cols);
    p.words = words_of(&p, aq_least(AQ_WORD_BLOCK, inputs));
    p.segments = aq_least(weight->layout.pairs_per_row, AQ_WORD_BLOCK / aq_linear_pair_width(weight) + 2) + (coded ? 1 : 0);
    p.block_size = aq_div_up((p.words + 1 + p.segments) * k->rows, unit) * unit;
    p.tile_size = p.blocks * p.block_size;
    uint64_t most = CHUNK_BYTES / (p.tile_size * sizeof(float)), rows = (most ? most : 1) * k->rows;
    rows = aq_least(rows, n_rows);
    uint64_t bytes = (aq_div_up(rows, k->rows) + (coded ? 1 : 0)) * p.tile_size * sizeof(float);
    char *memory = aq_alloc(bytes + rows * p.blocks + 64);
    if (!memory) return aq_fail_memory(err, bytes, "the inputs of a layer");
    p.memory = (void *)(memory + (64 - (uintptr_t)memory % 64));
    p.dropped = (void *)((char *)p.memory + bytes);
    aq_status status = AQ_OK;
    for (uint64_t row = 0; status == AQ_OK && row < n_rows; row += rows) {
        if (coded)
            p.coded = from_row(coded, row, inputs);
        else
            p.x = x + row * inputs;
        p.y = y + row * outputs;
        p.rows = aq_least(rows, n_rows - row);
        memset(p.dropped, false, p.rows * p.blocks);
        status = run_chunk(&p, n_threads) ? redo_dropped(&p, n_threads, err) : aq_fail_memory(err, 0, "panels of a layer's weights");
    }
    aq_free(memory);
    return status;
}

aq_status aq_linear_words(const aq_linear_weight *weight, const float *x, uint64_t n_rows, float *y, int n_threads, aq_error *err) {
    if (!moderate(weight)) return aq_linear_panels(weight, x, n_rows, y, n_threads, err);
    return multiply_rows(weight, x, NULL, n_rows, y, n_threads, err);
}

bool aq_linear_codes_fit(const aq_linear_weight *weight) { return weight->layout.cols > 0 && aq_linear_words_fit(weight) && moderate(weight); }

aq_status aq_linear_codes(const aq_linear_weight *weight, const aq_coded_inputs *x, uint64_t n_rows, float *y, int n_threads, aq_error *err) {
    if (n_rows == 0 || weight->layout.rows == 0) return AQ_OK;
    return multiply_rows(weight, NULL, x, n_rows, y, n_threads, err);
}
