/* The factor of a second moment, written once for both element types. factor.c defines, then includes this (twice):
 *   T, NAME(x)   element; x_f32 or x_f64
 *   LEAST_LEFT   of its diagonal that a pivot must keep
 */

/* One cache line more than a row, so that a column's elements fall into different sets of the caches. */
#define STRIDE(n) ((n) + 64 / sizeof(T))

typedef struct NAME(matrix) {
    T *a; /* upper triangle, rows STRIDE(n) apart */
    const float *h;
    aq_hessian *to;
    aq_factoring *f;
} NAME(matrix);

static void NAME(swap)(T *a, T *b) {
    T t = *a;
    *a = *b;
    *b = t;
}

/* The damped H in the order of visiting, from the last input to the first. */
static bool NAME(fill_band)(void *context, size_t band) {
    const NAME(matrix) *m = context;
    uint64_t n = m->to->n, top = band * SQUARE;
    double scale = 1 / m->to->unit; /* a power of two */
    for (uint64_t left = top; left < n; left += SQUARE)
        for (uint64_t i = top; i < least(top + SQUARE, n); i++)
            for (uint64_t j = left > i ? left : i; j < least(left + SQUARE, n); j++) {
                uint64_t from = input_at(m->to, i), other = input_at(m->to, j);
                double entry = (double)(from < other ? m->h[from * n + other] : m->h[other * n + from]) * scale;
                m->a[i * STRIDE(n) + j] = is_dead(m->to, from, other) ? 0 : (T)entry;
            }
    for (uint64_t i = top; i < least(top + SQUARE, n); i++) m->f->left[i] = diagonal_at(m->to, m->f, i);
    return true;
}

/* Swaps inputs p < q of the symmetric A, whose upper triangle is stored, and of the rows of the factor from `begin` to p. */
static void NAME(swap_inputs)(T *a, uint64_t n, uint64_t begin, uint64_t p, uint64_t q) {
    for (uint64_t i = begin; i < p; i++) NAME(swap)(&a[i * STRIDE(n) + p], &a[i * STRIDE(n) + q]);
    for (uint64_t k = p + 1; k < q; k++) NAME(swap)(&a[p * STRIDE(n) + k], &a[k * STRIDE(n) + q]);
    for (uint64_t k = q + 1; k < n; k++) NAME(swap)(&a[p * STRIDE(n) + k], &a[q * STRIDE(n) + k]);
}

/* The input with the smallest pivot among those that are left goes to place j, the first of them: pivots come out as equal as they can be, and their sum, which
 * is what the error is proportional to, small (sorted QR decomposition: Wübben et al., 2001, Electronics Letters 37(22)). `order` has the
 * inputs the other way round. */
static void NAME(balance)(NAME(matrix) * m, uint64_t begin, uint64_t j) {
    uint64_t n = m->to->n, p = j, *order = m->to->order;
    double *left = m->f->left;
    for (uint64_t i = j + 1; i < n; i++)
        if (left[i] < left[p]) p = i;
    m->f->swapped[j] = p;
    if (p == j) return;
    NAME(swap_inputs)(m->a, n, begin, j, p);
    double kept_left = left[p];
    left[p] = left[j];
    left[j] = kept_left;
    uint64_t kept = order[n - 1 - p];
    order[n - 1 - p] = order[n - 1 - j];
    order[n - 1 - j] = kept;
}

/* Row j of the factor from that of A: what rows [begin, j) take from it, divided by the root of its pivot. The pivot is the diagonal less the squares of what
 * stands above it, so that the factor's diagonal is right whatever its rows are. False when there is none. */
static bool NAME(factor_row)(NAME(matrix) * m, uint64_t begin, uint64_t j) {
    uint64_t n = m->to->n;
    T *row = m->a + j * STRIDE(n), f[FACTOR_BLOCK];
    double *left = m->f->left, pivot = left[j];
    if (!(pivot > LEAST_LEFT * diagonal_at(m->to, m->f, j) && isfinite(pivot))) return false;
    for (uint64_t k = begin; k < j; k++) f[k - begin] = m->a[k * STRIDE(n) + j];
    aq_kernels_get()->NAME(gemm)->subtract_rows(f, (size_t)(j - begin), m->a + begin * STRIDE(n) + j, (size_t)STRIDE(n), (size_t)(n - j), row + j);
    row[j] = (T)sqrt(pivot);
    for (uint64_t i = j + 1; i < n; i++) {
        row[i] /= row[j];
        left[i] -= (double)row[i] * (double)row[i];
    }
    return true;
}

/* A = R^T R, upper triangles, row after row; every FACTOR_BLOCK rows their square is taken off the rest by one product. */
static aq_factored NAME(factor_rows)(NAME(matrix) * m) {
    uint64_t n = m->to->n, stride = STRIDE(n);
    for (uint64_t begin = 0, end; begin < n; begin = end) {
        end = least(begin + FACTOR_BLOCK, n);
        for (uint64_t j = begin; j < end; j++) {
            if (m->f->balanced) NAME(balance)(m, begin, j);
            if (!NAME(factor_row)(m, begin, j)) return AQ_NO_PIVOT;
        }
        const T *panel = m->a + begin * stride + end;
        T *rest = m->a + end * stride + end;
        NAME(aq_matrix) columns = {panel, 1, stride}, rows = {panel, stride, 1};
        if (end < n && !NAME(aq_gemm)(n - end, n - end, end - begin, columns, rows, rest, stride, true, AQ_GEMM_UPPER, m->f->n_threads))
            return AQ_FACTOR_NO_MEMORY;
    }
    return AQ_FACTORED;
}

/* Rows of the factor follow the inputs that changed places after they were finished; D and U's columns come out: C C^T = A with C upper triangular is R the
 * other way round, and U is C with its columns divided by its diagonal. */
static bool NAME(finish_band)(void *context, size_t band) {
    NAME(matrix) *m = context;
    uint64_t n = m->to->n;
    for (uint64_t i = band * SQUARE; i < least((band + 1) * SQUARE, n); i++) {
        T *row = m->a + i * STRIDE(n), diagonal = row[i];
        for (uint64_t j = (i / FACTOR_BLOCK + 1) * FACTOR_BLOCK; m->f->balanced && j < n; j++) NAME(swap)(&row[j], &row[m->f->swapped[j]]);
        for (uint64_t j = i + 1; j < n; j++) row[j] /= diagonal;
        m->to->pivots[n - 1 - i] = (float)((double)diagonal * (double)diagonal);
    }
    return true;
}

/* Element (i, j) changes places with (n - 1 - j, n - 1 - i): inputs from the first to the last again, in the same upper triangle. */
static bool NAME(reflect_band)(void *context, size_t band) {
    NAME(matrix) *m = context;
    uint64_t n = m->to->n, top = band * SQUARE;
    for (uint64_t left = top; left + top + 1 < n; left += SQUARE)
        for (uint64_t i = top; i < top + SQUARE; i++)
            for (uint64_t j = left > i ? left : i; j < left + SQUARE && i + j + 1 < n; j++)
                NAME(swap)(&m->a[i * STRIDE(n) + j], &m->a[(n - 1 - j) * STRIDE(n) + n - 1 - i]);
    return true;
}

/* H goes below U. */
static bool NAME(lower_band)(void *context, size_t band) {
    const NAME(matrix) *m = context;
    uint64_t n = m->to->n, top = band * SQUARE;
    double scale = 1 / m->to->unit;
    for (uint64_t left = 0; left <= top; left += SQUARE)
        for (uint64_t i = top; i < least(top + SQUARE, n); i++)
            for (uint64_t j = left; j < left + SQUARE && j <= i; j++)
                m->to->packed[i * n + j] = is_dead(m->to, i, j) ? 0 : (float)((double)m->h[j * n + i] * scale);
    return true;
}

/* The elements of U give way to floats in rows without gaps, in the same memory: a row ends before the next one of the matrix in work begins. `row` holds one.
 */
static void NAME(compress)(NAME(matrix) * m, T *row) {
    uint64_t n = m->to->n;
    float *packed = m->to->packed = (float *)(void *)m->a;
    for (uint64_t i = 0; i < n; i++) {
        memcpy(row, (const char *)m->a + i * STRIDE(n) * sizeof *row, n * sizeof *row);
        for (uint64_t j = i + 1; j < n; j++) packed[i * n + j] = (float)row[j];
    }
}

aq_factored NAME(aq_factor)(const float *h, aq_hessian *to, aq_factoring *f) {
    uint64_t n = to->n, bytes = n * STRIDE(n) * sizeof(T);
    NAME(matrix) m = {aq_alloc(bytes), h, to, f};
    if (!m.a) return AQ_FACTOR_NO_MEMORY;
    aq_pages_wish(m.a, bytes);
    by_bands(n, f->n_threads, NAME(fill_band), &m);
    aq_factored got = NAME(factor_rows)(&m);
    if (got != AQ_FACTORED) {
        aq_free(m.a);
        return got;
    }
    by_bands(n, f->n_threads, NAME(finish_band), &m);
    by_bands(n, f->n_threads, NAME(reflect_band), &m);
    NAME(compress)(&m, (T *)(void *)f->left);
    by_bands(n, f->n_threads, NAME(lower_band), &m);
    void *smaller = aq_realloc(m.a, n * n, sizeof(float));
    to->packed = smaller ? smaller : to->packed;
    return AQ_FACTORED;
}

#undef T
#undef NAME
#undef LEAST_LEFT
#undef STRIDE
