/* Matrix products as gemm.h defines them, for both element types: what runs on elements is in gemm_tile.h.
 *
 * Phases over columns of B (at most NC at once) and, inside, over blocks of k: B's block is packed into panels, then tasks multiply rows of A, packed in turn,
 * by it (Goto, van de Geijn, 2008, ACM TOMS 34(3)). One parallel loop runs all phases: a task waits for those before it that it needs, which are done or in
 * the hands of a running thread, because tasks are taken in rising order. Two buffers for B let a phase pack while the one before still multiplies.
 */
#include "kernels/gemm.h"

#include <stdatomic.h>

#include "base/cpu.h"
#include "base/mem.h"
#include "base/threads.h"
#include "kernels/kernels.h"

enum {
    B_BYTES = 4 << 20,   /* of a packed block of B, in the last cache */
    A_BYTES = 240 << 10, /* of packed rows of A, in the second cache of each core */
    ALIGNMENT = 64       /* a line of the cache, a register of AVX-512 */
};
/* Operations: some 100 µs where threads are started, which costs 20 to 50, and 10 where they stand ready. */
#define WORTH_A_START 8e6
#define WORTH_A_THREAD 1e6

typedef struct matrix {
    const char *data;
    uint64_t row_stride, col_stride;
} matrix;

typedef struct product {
    const aq_gemm_kernels *kernels;
    uint64_t m, n, k, ldc;
    matrix a, b;
    aq_gemm_fill_f32 *fill; /* takes the place of b, or NULL */
    void *context;
    char *c;
    bool subtract, upper, masked; /* masked: nothing below the diagonal changes */

    uint64_t nc, mc;                             /* columns of a phase; rows of a task */
    uint64_t k_blocks, packs, row_tasks, groups; /* per phase: packing tasks, multiplying tasks (rows x groups of columns) */
    uint64_t buffers, a_size, buffer_size;       /* for A (and a panel of B when packs is 0): one a thread */
    char *packed_b[2], *packed_a;
    atomic_bool *taken;                            /* [buffers] */
    atomic_uint_fast64_t packed[2], multiplied[2]; /* tasks done, of even and of odd phases */
    atomic_uint_fast64_t *phases;                  /* [row_tasks * groups] phases done of a part of C */
} product;

static uint64_t least(uint64_t a, uint64_t b) { return a < b ? a : b; }
static uint64_t ceil_div(uint64_t a, uint64_t b) { return (a + b - 1) / b; /* NOLINT(clang-analyzer-core.DivideZero): never 0 */ }
static uint64_t round_up(uint64_t a, uint64_t unit) { return ceil_div(a, unit) * unit; }

typedef struct phase {
    uint64_t index, j, width, l, depth; /* columns [j, j + width) of C, steps [l, l + depth) */
} phase;

static phase phase_at(const product *p, uint64_t index) {
    phase f = {index, index / p->k_blocks * p->nc, 0, index % p->k_blocks * AQ_GEMM_BLOCK, 0};
    f.width = least(p->nc, p->n - f.j);
    f.depth = least(AQ_GEMM_BLOCK, p->k - f.l);
    return f;
}

/* Panel number q of the phase's columns. */
static void pack_panel(const product *p, const phase *f, uint64_t q, char *out) {
    uint64_t j = q * p->kernels->cols, width = least(p->kernels->cols, f->width - j);
    if (p->fill) {
        p->fill(p->context, f->j + j, width, f->l, f->depth, (float *)(void *)out);
        return;
    }
    const char *in = p->b.data + ((f->j + j) * p->b.col_stride + f->l * p->b.row_stride) * p->kernels->element;
    p->kernels->pack_cols(out, in, p->b.col_stride, p->b.row_stride, width, f->depth);
}

static uint64_t panel_size(const product *p, uint64_t depth) { return p->kernels->cols * depth * p->kernels->element; }

static void pack_b(product *p, const phase *f, uint64_t part) {
    uint64_t panels = ceil_div(f->width, p->kernels->cols), size = panel_size(p, f->depth);
    char *out = p->packed_b[f->index & 1];
    aq_wait_for(&p->multiplied[f->index & 1], f->index / 2 * p->row_tasks * p->groups);
    for (uint64_t q = panels * part / p->packs; q < panels * (part + 1) / p->packs; q++) pack_panel(p, f, q, out + q * size);
    atomic_fetch_add_explicit(&p->packed[f->index & 1], 1, memory_order_release);
}

/* Rows [row, row + height) times panels [first, end) of the phase. */
static void multiply_rows(product *p, const phase *f, char *packed, uint64_t row, uint64_t height, uint64_t first, uint64_t end) {
    const aq_gemm_kernels *kernels = p->kernels;
    uint64_t rows = kernels->rows, cols = kernels->cols, size = kernels->element;
    for (uint64_t i = 0; i < height; i += rows)
        kernels->pack_rows(packed + i * f->depth * size, p->a.data + ((row + i) * p->a.row_stride + f->l * p->a.col_stride) * size, p->a.row_stride,
                           p->a.col_stride, least(rows, height - i), f->depth);
    for (uint64_t q = first; q < end; q++) {
        uint64_t column = f->j + q * cols;
        char *panel = p->packs ? p->packed_b[f->index & 1] + q * panel_size(p, f->depth) : packed + p->a_size;
        if (!p->packs) pack_panel(p, f, q, panel);
        aq_gemm_edge edge = {.cols = least(cols, f->width - q * cols), .diagonal = -(ptrdiff_t)rows, .subtract = p->subtract};
        for (uint64_t i = 0; i < height; i += rows) {
            if (p->upper) {
                if (column + edge.cols <= row + i) break;
                if (p->masked) edge.diagonal = (ptrdiff_t)(row + i) - (ptrdiff_t)column;
            }
            edge.rows = least(rows, height - i);
            kernels->tile(f->depth, packed + i * f->depth * size, panel, p->c + ((row + i) * p->ldc + column) * size, p->ldc, &edge);
        }
    }
}

static void multiply(product *p, const phase *f, uint64_t task) {
    uint64_t row = task / p->groups * p->mc, group = task % p->groups, parity = f->index & 1;
    uint64_t height = least(p->mc, p->m - row), panels = ceil_div(f->width, p->kernels->cols);
    uint64_t first = panels * group / p->groups, end = panels * (group + 1) / p->groups;
    if (p->upper && row > f->j) first = first > (row - f->j) / p->kernels->cols ? first : (row - f->j) / p->kernels->cols;
    aq_wait_for(&p->packed[parity], (f->index / 2 + 1) * p->packs);
    aq_wait_for(&p->phases[task], f->index);
    if (first < end) {
        uint64_t buffer = 0;
        while (atomic_exchange_explicit(&p->taken[buffer], true, memory_order_acquire)) buffer = (buffer + 1) % p->buffers;
        multiply_rows(p, f, p->packed_a + buffer * p->buffer_size, row, height, first, end);
        atomic_store_explicit(&p->taken[buffer], false, memory_order_release);
    }
    atomic_store_explicit(&p->phases[task], f->index + 1, memory_order_release);
    atomic_fetch_add_explicit(&p->multiplied[parity], 1, memory_order_release);
}

static bool run_task(void *context, size_t index) {
    product *p = context;
    uint64_t per_phase = p->packs + p->row_tasks * p->groups, task = index % per_phase;
    phase f = phase_at(p, index / per_phase);
    if (task < p->packs)
        pack_b(p, &f, task);
    else
        multiply(p, &f, task - p->packs);
    return true;
}

/* How the product is cut: for `threads` threads some four tasks each, of rows first. When the rows of A fit the cache all at once, each panel of B serves one
 * task only, which packs it when it comes to it: there it is in the first-level cache. */
static void cut(product *p, uint64_t threads) {
    uint64_t rows = p->kernels->rows, cols = p->kernels->cols, depth = least(AQ_GEMM_BLOCK, p->k), size = p->kernels->element;
    uint64_t most = A_BYTES / (AQ_GEMM_BLOCK * size * rows) * rows, wanted = threads > 1 ? 4 * threads : 1;
    bool one = p->m <= 2 * most && p->n >= 8 * cols * threads;
    p->nc = one ? round_up(p->n, cols) : least(round_up(p->n, cols), B_BYTES / (depth * size * cols) * cols);
    p->mc = one ? round_up(p->m, rows) : least(most, round_up(ceil_div(p->m, wanted), rows));
    p->row_tasks = ceil_div(p->m, p->mc);
    p->groups = one ? 2 * threads : 1;
    if (!one && p->row_tasks < wanted) p->groups = least(ceil_div(wanted, p->row_tasks), ceil_div(p->nc, 4 * cols));
    p->packs = one ? 0 : threads > 1 ? least(2 * threads, ceil_div(p->nc, cols)) : 1;
    p->k_blocks = ceil_div(p->k, AQ_GEMM_BLOCK);
    p->buffers = threads;
    p->a_size = round_up(p->mc * depth * size, ALIGNMENT);
    p->buffer_size = p->a_size + (one ? round_up(panel_size(p, depth), ALIGNMENT) : 0);
}

static bool run(product *p, int n_threads) {
    if (p->m == 0 || p->n == 0 || p->k == 0) return true;
    double operations = 2.0 * (double)p->m * (double)p->n * (double)p->k, worth = operations / (aq_threads_ready() ? WORTH_A_THREAD : WORTH_A_START);
    uint64_t threads = (uint64_t)aq_cpu_threads(n_threads);
    if (worth < (double)threads) threads = worth < 2 ? 1 : (uint64_t)worth;
    cut(p, threads);

    uint64_t n_phases = ceil_div(p->n, p->nc) * p->k_blocks, parts = p->row_tasks * p->groups;
    uint64_t b_size = round_up(p->nc * least(AQ_GEMM_BLOCK, p->k) * p->kernels->element, ALIGNMENT);
    uint64_t b_count = !p->packs ? 0 : threads > 1 && n_phases > 1 ? 2 : 1;
    char *memory = aq_alloc(b_size * b_count + p->buffer_size * p->buffers + parts * sizeof *p->phases + p->buffers * sizeof *p->taken + ALIGNMENT);
    if (!memory) return false;
    char *at = memory + (ALIGNMENT - (uintptr_t)memory % ALIGNMENT);
    p->packed_b[0] = at;
    p->packed_b[1] = b_count == 2 ? at + b_size : at;
    p->packed_a = at + b_size * b_count;
    p->phases = (void *)(p->packed_a + p->buffer_size * p->buffers);
    p->taken = (void *)(p->phases + parts);
    for (uint64_t i = 0; i < parts; i++) atomic_init(&p->phases[i], 0);
    for (uint64_t i = 0; i < p->buffers; i++) atomic_init(&p->taken[i], false);
    aq_parallel_for(n_phases * (p->packs + parts), (int)threads, run_task, p);
    aq_free(memory);
    return true;
}

/* A product of either type, as p.kernels say. */
static bool run_plain(product p, matrix a, matrix b, bool subtract, aq_gemm_part part, int n_threads) {
    p.a = a;
    p.b = b;
    p.subtract = subtract;
    p.upper = part != AQ_GEMM_FULL;
    p.masked = part == AQ_GEMM_UPPER;
    return run(&p, n_threads);
}

bool aq_gemm_f32(uint64_t m, uint64_t n, uint64_t k, aq_matrix_f32 a, aq_matrix_f32 b, float *c, uint64_t ldc, bool subtract, aq_gemm_part part,
                 int n_threads) {
    matrix left = {(const char *)a.data, a.row_stride, a.col_stride}, right = {(const char *)b.data, b.row_stride, b.col_stride};
    product p = {.kernels = aq_kernels_get()->gemm_f32, .m = m, .n = n, .k = k, .ldc = ldc, .c = (char *)c};
    return run_plain(p, left, right, subtract, part, n_threads);
}

bool aq_gemm_f64(uint64_t m, uint64_t n, uint64_t k, aq_matrix_f64 a, aq_matrix_f64 b, double *c, uint64_t ldc, bool subtract, aq_gemm_part part,
                 int n_threads) {
    matrix left = {(const char *)a.data, a.row_stride, a.col_stride}, right = {(const char *)b.data, b.row_stride, b.col_stride};
    product p = {.kernels = aq_kernels_get()->gemm_f64, .m = m, .n = n, .k = k, .ldc = ldc, .c = (char *)c};
    return run_plain(p, left, right, subtract, part, n_threads);
}

bool aq_gemm_filled_f32(uint64_t m, uint64_t n, uint64_t k, aq_matrix_f32 a, aq_gemm_fill_f32 *fill, void *context, float *c, uint64_t ldc, int n_threads) {
    product p = {.kernels = aq_kernels_get()->gemm_f32, .m = m, .n = n, .k = k, .ldc = ldc, .c = (char *)c, .fill = fill, .context = context};
    p.a = (matrix){(const char *)a.data, a.row_stride, a.col_stride};
    return run(&p, n_threads);
}
