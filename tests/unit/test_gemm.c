/* Matrix products: every instruction set, thread count, shape and layout gives the bits of the plain loop that gemm.h describes. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "base/mem.h"
#include "kernels/gemm.h"
#include "kernels/kernels.h"

static uint64_t random_state = 3;
static uint32_t random_bits(void) {
    random_state = random_state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(random_state >> 32);
}

/* Of wide range, so that every order of summation gives other bits; zeros of both signs and denormals among them. */
static double value(void) {
    uint32_t kind = random_bits() % 32;
    if (kind == 0) return random_bits() & 1 ? 0.0 : -0.0;
    if (kind == 1) return 1e-42;
    return ((double)random_bits() - 2147483648.0) * 0x1p-31 * (kind & 1 ? 1.0 : 1000.0);
}

enum { MOST = 1 << 19 };
static float a32[MOST], b32[MOST], c32[MOST], start32[MOST], expected32[MOST];
static double a64[MOST], b64[MOST], c64[MOST], start64[MOST], expected64[MOST];

typedef struct shape {
    uint64_t m, n, k, ldc;
    bool a_transposed, b_transposed, subtract, upper;
} shape;

#define DEFINE_CHECK(bits, type, multiply_add)                                                                                                                 \
    static void reference##bits(const shape *s, aq_matrix_f##bits a, aq_matrix_f##bits b) {                                                                    \
        for (uint64_t first = 0; first < s->k; first += AQ_GEMM_BLOCK)                                                                                         \
            for (uint64_t i = 0; i < s->m; i++)                                                                                                                \
                for (uint64_t j = s->upper ? i : 0; j < s->n; j++) {                                                                                           \
                    type sum = 0;                                                                                                                              \
                    for (uint64_t l = first; l < s->k && l < first + AQ_GEMM_BLOCK; l++)                                                                       \
                        sum = multiply_add(a.data[i * a.row_stride + l * a.col_stride], b.data[l * b.row_stride + j * b.col_stride], sum);                     \
                    expected##bits[i * s->ldc + j] += s->subtract ? -sum : sum;                                                                                \
                }                                                                                                                                              \
    }                                                                                                                                                          \
    static void check##bits(const shape *s) {                                                                                                                  \
        static const char *const isas[] = {"scalar", "avx2", "avx512", "neon"};                                                                                \
        aq_matrix_f##bits a = {a##bits, s->a_transposed ? 1 : s->k + 3, s->a_transposed ? s->m + 1 : 1};                                                       \
        aq_matrix_f##bits b = {b##bits, s->b_transposed ? 1 : s->n + 5, s->b_transposed ? s->k + 2 : 1};                                                       \
        size_t size = s->m * s->ldc * sizeof(type);                                                                                                            \
        memcpy(expected##bits, start##bits, size);                                                                                                             \
        reference##bits(s, a, b);                                                                                                                              \
        for (size_t isa = 0; isa < 4; isa++)                                                                                                                   \
            for (int threads = 1; threads <= 4; threads += 3) {                                                                                                \
                if (!aq_kernels_find(isas[isa]) || (isa == 0 && threads > 1 && s->k > 300)) continue;                                                          \
                assert_int_equal(aq_kernels_select(isas[isa], NULL), AQ_OK);                                                                                   \
                memcpy(c##bits, start##bits, size);                                                                                                            \
                assert_true(aq_gemm_f##bits(s->m, s->n, s->k, a, b, c##bits, s->ldc, s->subtract, s->upper ? AQ_GEMM_UPPER : AQ_GEMM_FULL, threads));          \
                assert_memory_equal(c##bits, expected##bits, size);                                                                                            \
            }                                                                                                                                                  \
        aq_kernels_select(NULL, NULL);                                                                                                                         \
    }
DEFINE_CHECK(32, float, fmaf)
DEFINE_CHECK(64, double, fma)

static void check(shape s) {
    s.ldc += s.n;
    check32(&s);
    check64(&s);
}

static void fill(void) {
    for (size_t i = 0; i < MOST; i++) {
        a32[i] = (float)(a64[i] = value());
        b32[i] = (float)(b64[i] = value());
        start32[i] = (float)(start64[i] = value());
    }
}

static void small_products_of_every_shape_agree(void **state) {
    (void)state;
    fill();
    for (int trial = 0; trial < 400; trial++) {
        shape s = {.m = random_bits() % 40, .n = random_bits() % 70, .k = random_bits() % 40, .ldc = random_bits() % 3};
        s.a_transposed = trial & 1;
        s.b_transposed = trial & 2;
        s.subtract = trial & 4;
        s.upper = trial % 5 == 0;
        if (s.upper) s.n = s.m;
        check(s);
    }
}

/* Several blocks of k, several tasks of rows and groups of columns, on threads. */
static void large_products_agree(void **state) {
    (void)state;
    fill();
    static const shape shapes[] = {
        {.m = 250, .n = 190, .k = 600},
        {.m = 13, .n = 700, .k = 513, .a_transposed = true},
        {.m = 600, .n = 9, .k = 700, .b_transposed = true},
        {.m = 260, .n = 260, .k = 257, .upper = true, .a_transposed = true},
        {.m = 200, .n = 200, .k = 1030, .upper = true, .subtract = true},
    };
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) check(shapes[i]);
}

/* More columns than one phase packs. */
static void columns_in_several_phases_agree(void **state) {
    (void)state;
    fill();
    check((shape){.m = 3, .n = 5000, .k = 100, .b_transposed = true});
    check((shape){.m = 5, .n = 66000, .k = 5});
}

static void a_product_of_nothing_changes_nothing(void **state) {
    (void)state;
    float c[4] = {1, 2, 3, -0.0f}, before[4];
    memcpy(before, c, sizeof c);
    aq_matrix_f32 none = {NULL, 0, 0};
    assert_true(aq_gemm_f32(2, 2, 0, none, none, c, 2, false, AQ_GEMM_FULL, 0));
    assert_true(aq_gemm_f32(0, 2, 5, none, none, c, 2, false, AQ_GEMM_FULL, 0));
    assert_true(aq_gemm_f32(2, 0, 5, none, none, c, 2, false, AQ_GEMM_FULL, 0));
    assert_memory_equal(c, before, sizeof c);
}

static void without_memory_the_result_is_untouched(void **state) {
    (void)state;
    fill();
    memcpy(c32, start32, sizeof c32);
    aq_mem_fail_after(0);
    bool done = aq_gemm_f32(30, 30, 30, (aq_matrix_f32){a32, 30, 1}, (aq_matrix_f32){b32, 30, 1}, c32, 30, false, AQ_GEMM_FULL, 2);
    aq_mem_fail_after(-1);
    assert_false(done);
    assert_memory_equal(c32, start32, sizeof c32);
}

/* What is not a number stays in its rows and columns. */
static void infinities_do_not_leak(void **state) {
    (void)state;
    enum { N = 37 };
    for (size_t i = 0; i < N * N; i++) a32[i] = b32[i] = 1, c32[i] = 0;
    a32[36 * N + 5] = INFINITY;
    b32[7 * N + 36] = NAN;
    assert_true(aq_gemm_f32(N, N, N, (aq_matrix_f32){a32, N, 1}, (aq_matrix_f32){b32, N, 1}, c32, N, false, AQ_GEMM_FULL, 1));
    for (size_t i = 0; i < N; i++)
        for (size_t j = 0; j < N; j++)
            if (j == 36)
                assert_true(isnan(c32[i * N + j]));
            else
                assert_true(c32[i * N + j] == (i == 36 ? INFINITY : (float)N));
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(small_products_of_every_shape_agree),    cmocka_unit_test(large_products_agree),
        cmocka_unit_test(columns_in_several_phases_agree),        cmocka_unit_test(a_product_of_nothing_changes_nothing),
        cmocka_unit_test(without_memory_the_result_is_untouched), cmocka_unit_test(infinities_do_not_leak),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
