/* Solvers: GPTQ of one square layer, factorization included, against one product of the same size with the same library and threads; what refine adds. */
#include "bench.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include <arrowquant/solve.h>

#include "base/file.h"
#include "base/mem.h"
#include "kernels/gemm.h"

/* Values in [-1, 1) from a fixed generator. */
static void fill(float *x, size_t n, float scale) {
    static uint64_t state = 1;
    for (size_t i = 0; i < n; i++) {
        state = state * 6364136223846793005u + 1442695040888963407u;
        x[i] = ((float)(state >> 40) * 0x1p-23f - 1) * scale;
    }
}

/* H = X^T X / rows + I / 10 of inputs that lean on their neighbours. */
static bool make_moment(float *h, uint64_t n, int threads) {
    uint64_t rows = 2 * n;
    float *x = aq_alloc(rows * n * sizeof *x);
    if (!x) return false;
    fill(x, rows * n, 1 / sqrtf((float)rows));
    for (uint64_t r = 0; r < rows; r++)
        for (uint64_t i = 1; i < n; i++) x[r * n + i] += 0.8f * x[r * n + i - 1];
    aq_matrix_f32 a = {x, 1, n}, b = {x, n, 1};
    bool ok = aq_gemm_f32(n, n, rows, a, b, h, n, false, AQ_GEMM_UPPER, threads);
    for (uint64_t i = 0; i < n; i++) h[i * n + i] += 0.1f;
    aq_free(x);
    return ok;
}

typedef struct layer {
    uint64_t n;
    float *w, *h, *product;
    int threads;
} layer;

static double time_product(const layer *l) {
    double best = INFINITY;
    for (int i = 0; i < 3; i++) {
        double start = aq_now_s();
        if (!aq_gemm_f32(l->n, l->n, l->n, (aq_matrix_f32){l->w, l->n, 1}, (aq_matrix_f32){l->h, l->n, 1}, l->product, l->n, false, AQ_GEMM_FULL, l->threads))
            exit(1);
        best = fmin(best, aq_now_s() - start);
    }
    return best;
}

static void time_solver(const layer *l, const char *name, aq_quant_spec spec, aq_solve_options options, double product) {
    aq_quant_layout layout;
    aq_error err;
    aq_hessian *hessian = NULL;
    double factor = INFINITY, solve = INFINITY;
    aq_output_error output = {0};
    if (aq_quant_layout_init(&layout, &spec, l->n, l->n, &err) != AQ_OK) exit(1);
    uint8_t *codes = aq_alloc(layout.codes_bytes), *params = aq_alloc(layout.params_bytes);
    for (int i = 0; codes && params && i < 2; i++) {
        double start = aq_now_s();
        if (aq_hessian_create(&hessian, l->h, l->n, &options, l->threads, &err) != AQ_OK) exit(1);
        factor = fmin(factor, aq_now_s() - start);
        start = aq_now_s();
        aq_status status = aq_solve(l->w, &spec, &layout, hessian, &options, l->threads, codes, params, NULL, i ? &output : NULL, NULL, NULL, NULL, &err);
        if (status != AQ_OK) exit(1);
        if (i == 0) solve = aq_now_s() - start; /* without measuring */
        aq_hessian_free(hessian);
    }
    printf("%-34s factor %7.3f s  solve %7.3f s  together %5.2f products  output %.2f dB\n", name, factor, solve, (factor + solve) / product,
           aq_output_sqnr_db(&output));
    fflush(stdout);
    aq_free(codes);
    aq_free(params);
}

int bench_solve(int argc, char **argv) {
    layer l = {.n = argc > 1 ? (uint64_t)atoll(argv[1]) : 4096, .threads = argc > 2 ? atoi(argv[2]) : 0};
    if (l.n == 0) return 2;
    l.w = aq_alloc(l.n * l.n * sizeof *l.w);
    l.h = aq_calloc(l.n * l.n, sizeof *l.h);
    l.product = aq_calloc(l.n * l.n, sizeof *l.product);
    if (!l.w || !l.h || !l.product) return 1;
    fill(l.w, l.n * l.n, 0.05f);
    if (!make_moment(l.h, l.n, l.threads)) return 1;
    double product = time_product(&l);
    printf("one product of %llu^3: %.3f s, %.0f GFLOP/s\n", (unsigned long long)l.n, product, 2 * pow((double)l.n, 3) / product * 1e-9);
    aq_solve_options gptq = {.damp = 0.01}, refined = {.damp = 0.01, .refine_sweeps = 3}, plain = {.damp = 0.01, .order = AQ_ORDER_INPUTS};
    aq_quant_spec four = {.bits = 4, .group_size = 64, .axis = 1, .method = AQ_METHOD_GPTQ}, two = four;
    two.bits = 2;
    two.params = AQ_PARAMS_TWO_LEVEL;
    two.group_size = 256;
    time_solver(&l, "gptq 4 bits g64, inputs' order", four, plain, product);
    time_solver(&l, "gptq 4 bits g64, balanced order", four, gptq, product);
    time_solver(&l, "  and 3 rounds of refine", four, refined, product);
    time_solver(&l, "gptq 2 bits two-level, balanced", two, gptq, product);
    time_solver(&l, "  and 3 rounds of refine", two, refined, product);
    aq_free(l.w);
    aq_free(l.h);
    aq_free(l.product);
    return 0;
}
