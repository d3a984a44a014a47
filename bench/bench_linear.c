/* Layers that run on their codes, against the product with F32 weights (our own aq_gemm_f32) and against the memory: how fast the codes are read.
 *
 * `aq_bench linear [THREADS]`. N = K = 1024, and 64 layers in turn, so that weights come from where those of a model come from: not from the second-level
 * cache.
 */
#include "bench.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <arrowquant/time.h>

#include "base/file.h"
#include "base/mem.h"
#include "kernels/gemm.h"

enum { SIZE = 1024, LAYERS = 64, MOST_ROWS = 1024, REPEATS = 7, RUNS = 4 };

typedef struct stack {
    aq_linear_weight layers[LAYERS];
    const float *weights; /* [LAYERS][SIZE * SIZE] */
    const float *x;
    float *y;
    uint64_t rows;
    int threads;
} stack;

static void on_codes(const stack *s) {
    for (size_t i = 0; i < LAYERS; i++)
        if (aq_linear(&s->layers[i], s->x, s->rows, s->y, s->threads, NULL) != AQ_OK) exit(1);
}

/* Inputs coded with 8 bits, each row by its own range. */
static void on_integers(const stack *s) {
    for (size_t i = 0; i < LAYERS; i++)
        if (aq_linear_coded(&s->layers[i], s->x, s->rows, NULL, NULL, 0, s->y, s->threads, NULL) != AQ_OK) exit(1);
}

static void in_f32(const stack *s) {
    for (size_t i = 0; i < LAYERS; i++) {
        memset(s->y, 0, s->rows * SIZE * sizeof *s->y);
        aq_matrix_f32 x = {s->x, SIZE, 1}, w = {s->weights + i * SIZE * SIZE, 1, SIZE};
        if (!aq_gemm_f32(s->rows, SIZE, SIZE, x, w, s->y, SIZE, false, AQ_GEMM_FULL, s->threads)) exit(1);
    }
}

/* Reads all codes and parameters once. */
static void read_all(const stack *s) {
    for (size_t i = 0; i < LAYERS; i++) {
        uint64_t sums[8] = {0};
        for (size_t at = 0; at + 64 <= s->layers[i].layout.codes_bytes; at += 64) {
            uint64_t line[8];
            memcpy(line, s->layers[i].codes + at, sizeof line);
            for (size_t j = 0; j < 8; j++) sums[j] += line[j];
        }
        s->y[0] = (float)(sums[0] + sums[1] + sums[2] + sums[3] + sums[4] + sums[5] + sums[6] + sums[7]);
    }
}

static void make(stack *s, int bits, uint64_t group, aq_params_form form) {
    for (size_t i = 0; i < LAYERS; i++) {
        aq_linear_weight *w = &s->layers[i];
        *w = (aq_linear_weight){.spec = {.bits = bits, .group_size = group, .axis = 1, .params = form}};
        if (aq_quant_layout_init(&w->layout, &w->spec, SIZE, SIZE, NULL) != AQ_OK) exit(1);
        uint8_t *codes = aq_alloc(w->layout.codes_bytes);
        void *params = aq_alloc(w->layout.params_bytes);
        if (!codes || !params || aq_quantize(s->weights + i * SIZE * SIZE, &w->spec, &w->layout, NULL, 0, codes, params, NULL, NULL, NULL) != AQ_OK) exit(1);
        w->codes = codes;
        w->params = params;
    }
}

static void drop(stack *s) {
    for (size_t i = 0; i < LAYERS; i++) {
        aq_free((void *)(uintptr_t)s->layers[i].codes);
        aq_free((void *)(uintptr_t)s->layers[i].params);
    }
}

static void shortest(void (*const run[])(const stack *), size_t n, const stack *s, double seconds[]) {
    for (size_t i = 0; i < RUNS; i++) seconds[i] = INFINITY;
    for (int round = 0; round < REPEATS; round++)
        for (size_t i = 0; i < n; i++) {
            double start = aq_now_s();
            run[i](s);
            seconds[i] = fmin(seconds[i], (aq_now_s() - start) / LAYERS);
        }
}

int bench_linear(int argc, char **argv) {
    static const struct {
        int bits;
        uint64_t group;
        aq_params_form form;
    } kinds[] = {{4, 128, AQ_PARAMS_F16}, {4, 64, AQ_PARAMS_F16},        {8, 128, AQ_PARAMS_F16},
                 {2, 64, AQ_PARAMS_F16},  {4, 256, AQ_PARAMS_TWO_LEVEL}, {2, 256, AQ_PARAMS_TWO_LEVEL}};
    static const uint64_t rows[] = {1, 4, 8, 16, 49, 256, 1024};
    static void (*const runs[RUNS])(const stack *) = {on_codes, on_integers, in_f32, read_all};
    int threads = argc > 1 ? atoi(argv[1]) : 1;
    stack s = {.threads = threads};
    float *weights = aq_alloc((size_t)LAYERS * SIZE * SIZE * sizeof *weights), *x = aq_alloc(MOST_ROWS * SIZE * sizeof *x);
    s.y = aq_calloc(MOST_ROWS * SIZE, sizeof *s.y);
    if (!weights || !x || !s.y) return 1;
    uint32_t state = 1;
    for (size_t i = 0; i < (size_t)LAYERS * SIZE * SIZE; i++) weights[i] = (float)((state = state * 1664525u + 1013904223u) >> 8) * 0x1p-24f - 0.5f;
    for (size_t i = 0; i < MOST_ROWS * SIZE; i++) x[i] = (float)((state = state * 1664525u + 1013904223u) >> 8) * 0x1p-24f - 0.5f;
    s.weights = weights;
    s.x = x;
    printf("%d x %d, %d layers in turn, %d thread%s\n", SIZE, SIZE, LAYERS, threads, threads == 1 ? "" : "s");
    for (size_t kind = 0; kind < sizeof kinds / sizeof *kinds; kind++) {
        make(&s, kinds[kind].bits, kinds[kind].group, kinds[kind].form);
        double bytes = (double)s.layers[0].layout.codes_bytes;
        for (size_t r = 0; r < sizeof rows / sizeof *rows; r++) {
            double seconds[RUNS];
            s.rows = rows[r];
            shortest(runs, rows[r] > 64 && kind > 0 ? 2 : RUNS, &s, seconds);
            printf("INT%d g%-3d %-9s %4d rows  %9.1f us  %7.1f GFLOP/s", kinds[kind].bits, (int)kinds[kind].group, aq_params_form_name(kinds[kind].form),
                   (int)rows[r], seconds[0] * 1e6, 2e-9 * SIZE * SIZE * (double)rows[r] / seconds[0]);
            printf("  8-bit inputs %7.1f", 2e-9 * SIZE * SIZE * (double)rows[r] / seconds[1]);
            if (isfinite(seconds[2])) printf("  %5.2f, %5.2f x F32", seconds[2] / seconds[0], seconds[2] / seconds[1]);
            if (rows[r] == 1) printf("  codes at %5.2f GB/s, %.2f of reading them", bytes / seconds[0] * 1e-9, seconds[3] / seconds[0]);
            printf("\n");
        }
        drop(&s);
    }
    aq_free(weights);
    aq_free(x);
    aq_free(s.y);
    return 0;
}
