/* Products of rows (see products.h): a symmetric rank-k update, packed once for both sides (Goto, van de Geijn, 2008, ACM TOMS 34(3)). */
#include "calibration/products.h"

#include <string.h>

#include "base/mem.h"
#include "base/size.h"
#include "base/threads.h"
#include "kernels/gemm.h"
#include "kernels/kernels.h"

enum { SLAB = 32 };                        /* rows packed at a time, for both sides while they are near */
enum { LONG = 8192 };                      /* inputs from which on AQ_GEMM_BLOCK rows are packed at once, which bounds that to some 32 MB */
enum { MOST_GROUP = 192, MOST_COLS = 48 }; /* rows of a task; columns of the kernels' tiles */

typedef struct {
    const aq_gemm_kernels *kernels;
    const float *x;
    uint64_t n_rows, stride, n, n_spans;
    uint64_t strips, panels, group; /* tiles' rows and columns of the triangle; strips of a task */
    float *left, *right;            /* the packed sides: AQ_GEMM_BLOCK rows after the other, strip (panel) after strip */
    aq_triangle_row *row;
    const void *context;
    aq_watch *watch;
} products;

static uint64_t least(uint64_t a, uint64_t b) { return a < b ? a : b; }

/* Packs rows [begin, begin + count) of the block of `depth` rows that starts at `block`. */
static void pack_slab(const products *p, uint64_t block, uint64_t depth, uint64_t begin, uint64_t count) {
    uint64_t rows = p->kernels->rows, cols = p->kernels->cols, at = begin - block;
    const float *x = p->x + begin * p->stride;
    float *left = p->left + block * p->strips * rows, *right = p->right + block * p->panels * cols;
    for (uint64_t q = 0; q < p->panels; q++)
        p->kernels->pack_cols(right + (q * depth + at) * cols, x + q * cols, 1, p->stride, least(cols, p->n - q * cols), count);
    for (uint64_t s = 0; s < p->strips; s++)
        p->kernels->pack_rows(left + (s * depth + at) * rows, x + s * rows, 1, p->stride, least(rows, p->n - s * rows), count);
}

static bool pack_span(void *context, size_t span) {
    const products *p = context;
    uint64_t first = p->n_rows * span / p->n_spans, last = p->n_rows * (span + 1) / p->n_spans;
    for (uint64_t block = 0; block < last; block += AQ_GEMM_BLOCK) {
        uint64_t depth = least(AQ_GEMM_BLOCK, p->n_rows - block), end = least(block + depth, last);
        for (uint64_t begin = block > first ? block : first; begin < end; begin += SLAB) pack_slab(p, block, depth, begin, least(SLAB, end - begin));
    }
    return true;
}

/* Products for strips [first, end) and panel q, as far as they reach above the diagonal; c has `cols` columns. */
static void multiply_panel(const products *p, uint64_t first, uint64_t end, uint64_t q, float *c) {
    uint64_t rows = p->kernels->rows, cols = p->kernels->cols;
    memset(c, 0, (size_t)((end - first) * rows * cols * sizeof *c));
    for (uint64_t block = 0; block < p->n_rows; block += AQ_GEMM_BLOCK) {
        uint64_t depth = least(AQ_GEMM_BLOCK, p->n_rows - block);
        const float *left = p->left + block * p->strips * rows, *right = p->right + block * p->panels * cols;
        for (uint64_t s = first; s < end && s * rows < (q + 1) * cols; s++) {
            aq_gemm_edge edge = {.rows = least(rows, p->n - s * rows), .cols = cols, .diagonal = -(ptrdiff_t)rows};
            p->kernels->tile(depth, left + s * depth * rows, right + q * depth * cols, c + (s - first) * rows * cols, cols, &edge);
        }
    }
}

static bool multiply_group(void *context, size_t task) {
    const products *p = context;
    if (!aq_watch_goes_on(p->watch)) return false;
    uint64_t rows = p->kernels->rows, cols = p->kernels->cols, first = task * p->group, end = least(p->strips, first + p->group);
    float c[MOST_GROUP * MOST_COLS];
    for (uint64_t q = first * rows / cols; q < p->panels; q++) {
        uint64_t begin = q * cols, stop = least(p->n, begin + cols), last = least(stop, end * rows);
        for (uint64_t i = first * rows; i < last; i++) { /* the doubles come nearer meanwhile */
            const char *at = (const char *)(p->row(p->context, i) + begin);
            for (uint64_t b = 0; b < cols * sizeof(double); b += 64) __builtin_prefetch(at + b, 1, 2);
        }
        multiply_panel(p, first, end, q, c);
        for (uint64_t i = first * rows; i < last; i++) {
            double *to = p->row(p->context, i);
            const float *from = c + (i - first * rows) * cols;
            for (uint64_t j = begin > i ? begin : i; j < stop; j++) to[j] += (double)from[j - begin];
        }
    }
    return true;
}

bool aq_products_add(const float *x, uint64_t n_rows, uint64_t stride, uint64_t n, aq_triangle_row *row, const void *context, aq_room *room, aq_watch *watch,
                     int n_threads) {
    const aq_gemm_kernels *kernels = aq_kernels_get()->gemm_f32;
    products p = {.kernels = kernels, .stride = stride, .n = n, .n_spans = (uint64_t)n_threads, .row = row, .context = context, .watch = watch};
    p.strips = aq_div_up(n, kernels->rows);
    p.panels = aq_div_up(n, kernels->cols);
    p.group = (n <= 512 ? 48 : n <= 2048 ? 96 : MOST_GROUP) / kernels->rows;
    uint64_t most = n > LONG ? least(AQ_GEMM_BLOCK, n_rows) : n_rows, left = most * p.strips * kernels->rows, right = most * p.panels * kernels->cols;
    p.left = aq_room_take(room, (left + right) * sizeof *p.left); /* n and the rows of a block are bounded */
    if (!p.left) return false;
    p.right = p.left + left;
    bool ok = true;
    for (uint64_t done = 0; ok && done < n_rows; done += most) {
        p.x = x + done * stride;
        p.n_rows = least(most, n_rows - done);
        aq_parallel_for(p.n_spans, n_threads, pack_span, &p);
        ok = aq_parallel_for(aq_div_up(p.strips, p.group), n_threads, multiply_group, &p);
    }
    aq_room_give(room, p.left);
    return ok;
}
