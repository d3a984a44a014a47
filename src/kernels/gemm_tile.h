/* Matrix products: packing and the register tile, written once for every instruction set and element type. A file defines, then includes this (twice):
 *   T, V, V_FMA(a, b, c)  element, register of elements (the element itself in scalar.c), a b + c with one rounding
 *   ROWS, VECTORS         height of a tile (a multiple of 4) and its width in registers: ROWS * VECTORS sums stay in registers
 *   NAME(x)               x_f32 or x_f64
 * NAME(gemm) is the result. A panel holds ROWS (or COLS) rows of A (columns of B), step after step, so that the tile reads both without gaps; the product of
 * one step needs VECTORS loads of B, and one broadcast of A for every VECTORS multiply-adds (BLIS: Van Zee, van de Geijn, 2015, ACM TOMS 41(3)).
 */
#define COLS (VECTORS * sizeof(V) / sizeof(T))

/* out[l * size + i] = in[i * stride + l * step], 0 for i >= width. Lines of memory are read whole where one of the two distances is 1. */
static inline __attribute__((always_inline)) void NAME(pack)(size_t size, T *out, const T *in, uint64_t stride, uint64_t step, size_t width, size_t k) {
    typedef T square __attribute__((vector_size(4 * sizeof(T))));
    enum { LINE = 64 / sizeof(T) };
    if (width < size)
        memset(out, 0, k * size * sizeof *out);
    else if (stride == 1) {
        for (size_t l = 0; l < k; l++) memcpy(out + l * size, in + l * step, size * sizeof *out);
        return;
    }
    size_t done = 0, whole = step == 1 ? width / 4 * 4 : 0;
    for (; done + LINE <= k; done += LINE) /* 4 x 4 squares */
        for (size_t i = 0; i < whole; i += 4)
            for (size_t l = done; l < done + LINE; l += 4) {
                square r[4];
                for (size_t u = 0; u < 4; u++) memcpy(&r[u], in + (i + u) * stride + l, sizeof r[u]);
                square a = __builtin_shufflevector(r[0], r[1], 0, 4, 1, 5), b = __builtin_shufflevector(r[2], r[3], 0, 4, 1, 5);
                square c = __builtin_shufflevector(r[0], r[1], 2, 6, 3, 7), d = __builtin_shufflevector(r[2], r[3], 2, 6, 3, 7);
                square columns[4] = {__builtin_shufflevector(a, b, 0, 1, 4, 5), __builtin_shufflevector(a, b, 2, 3, 6, 7),
                                     __builtin_shufflevector(c, d, 0, 1, 4, 5), __builtin_shufflevector(c, d, 2, 3, 6, 7)};
                for (size_t u = 0; u < 4; u++) memcpy(out + (l + u) * size + i, &columns[u], sizeof columns[u]);
            }
    for (size_t l = 0; l < k; l++)
        for (size_t i = l < done ? whole : 0; i < width; i++) out[l * size + i] = in[i * stride + l * step];
}

static void NAME(pack_rows)(void *out, const void *in, uint64_t stride, uint64_t step, size_t width, size_t k) {
    NAME(pack)(ROWS, out, in, stride, step, width, k);
}
static void NAME(pack_cols)(void *out, const void *in, uint64_t stride, uint64_t step, size_t width, size_t k) {
    NAME(pack)(COLS, out, in, stride, step, width, k);
}

/* The tile with its first `height` rows only, a constant wherever this is inlined. */
static inline __attribute__((always_inline)) void NAME(tile_of)(size_t height, size_t k, const T *a, const T *b, T *c, uint64_t ldc, const aq_gemm_edge *e) {
    V sum[ROWS][VECTORS];
    for (size_t i = 0; i < height; i++)
        for (size_t v = 0; v < VECTORS; v++) sum[i][v] = (V){0};
    for (size_t l = 0, row = 0; l < k; row++) { /* meanwhile C comes near, row after row: all at once would stand in the way of A and B */
        size_t end = row < e->rows ? l + (k - l) / (2 * height) : k;
        for (size_t v = 0; row < e->rows && v < VECTORS; v++) __builtin_prefetch(c + row * ldc + (v + 1) * (COLS / VECTORS) - 1, 1);
        for (; l < end; l++) {
            V right[VECTORS];
            for (size_t v = 0; v < VECTORS; v++) memcpy(&right[v], b + l * COLS + v * (COLS / VECTORS), sizeof(V));
            for (size_t i = 0; i < height; i++) {
                V left = a[l * ROWS + i] - (V){0};
                for (size_t v = 0; v < VECTORS; v++) sum[i][v] = V_FMA(left, right[v], sum[i][v]);
            }
        }
    }
    if (e->rows == height && e->cols == COLS && e->diagonal + (ptrdiff_t)height <= 1) {
        for (size_t i = 0; i < height; i++)
            for (size_t v = 0; v < VECTORS; v++) {
                T *at = c + i * ldc + v * (COLS / VECTORS);
                V old;
                memcpy(&old, at, sizeof old);
                old = e->subtract ? old - sum[i][v] : old + sum[i][v];
                memcpy(at, &old, sizeof old);
            }
        return;
    }
    T out[ROWS * COLS];
    for (size_t i = 0; i < height; i++) memcpy(out + i * COLS, sum[i], sizeof sum[i]);
    for (size_t i = 0; i < e->rows; i++)
        for (size_t j = e->diagonal + (ptrdiff_t)i > 0 ? (size_t)e->diagonal + i : 0; j < e->cols; j++)
            c[i * ldc + j] = e->subtract ? c[i * ldc + j] - out[i * COLS + j] : c[i * ldc + j] + out[i * COLS + j];
}

static void NAME(tile)(size_t k, const void *a, const void *b, void *c, uint64_t ldc, const aq_gemm_edge *e) {
    if (e->rows > 8 && ROWS > 8)
        NAME(tile_of)(ROWS, k, a, b, c, ldc, e);
    else if (e->rows > 4 && ROWS > 4)
        NAME(tile_of)(ROWS < 8 ? ROWS : 8, k, a, b, c, ldc, e);
    else
        NAME(tile_of)(4, k, a, b, c, ldc, e);
}

/* Some registers of y stay while the rows pass by. */
static inline __attribute__((always_inline)) void NAME(subtract_from)(const T *f, size_t count, const T *x, size_t stride, size_t registers, T *y) {
    V sum[8];
    for (size_t r = 0; r < registers; r++) memcpy(&sum[r], y + r * (COLS / VECTORS), sizeof(V));
    for (size_t l = 0; l < count; l++)
        for (size_t r = 0; r < registers; r++) {
            V row, factor = -(f[l] - (V){0});
            memcpy(&row, x + l * stride + r * (COLS / VECTORS), sizeof row);
            sum[r] = V_FMA(factor, row, sum[r]);
        }
    for (size_t r = 0; r < registers; r++) memcpy(y + r * (COLS / VECTORS), &sum[r], sizeof(V));
}

static void NAME(subtract_rows)(const void *factors, size_t count, const void *rows, size_t stride, size_t n, void *sums) {
    const T *f = factors, *x = rows;
    T *y = sums;
    size_t i = 0, width = COLS / VECTORS;
    for (; i + 8 * width <= n; i += 8 * width) NAME(subtract_from)(f, count, x + i, stride, 8, y + i);
    for (; i + width <= n; i += width) NAME(subtract_from)(f, count, x + i, stride, 1, y + i);
    if (i == n) return;
    T last[COLS] = {0}; /* the rest, which may not be read beyond its end */
    memcpy(last, y + i, (n - i) * sizeof *last);
    for (size_t l = 0; l < count; l++) {
        T row[COLS] = {0};
        memcpy(row, x + l * stride + i, (n - i) * sizeof *row);
        NAME(subtract_from)(f + l, 1, row, 0, 1, last);
    }
    memcpy(y + i, last, (n - i) * sizeof *last);
}

static const aq_gemm_kernels NAME(gemm) = {sizeof(T), ROWS, COLS, NAME(pack_rows), NAME(pack_cols), NAME(tile), NAME(subtract_rows)};

#undef COLS
#undef T
#undef V
#undef V_FMA
#undef ROWS
#undef VECTORS
#undef NAME
