/* Quantization of one matrix: speed against memcpy of the same input and against ggml's Q4_1 quantizer, scaling over threads, error against bits.
 *
 * ggml is loaded at run time from the shared library that GGML_LIBRARY names; without it that line says so.
 */
#include "bench.h"

#include <dlfcn.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <arrowquant/quant.h>

#include "base/mem.h"

#include "base/file.h"

enum { REPEATS = 9 };

static uint64_t random_state = 7;
static double uniform(void) {
    random_state = random_state * 6364136223846793005u + 1442695040888963407u;
    return ((double)(random_state >> 11) + 0.5) * 0x1p-53;
}

static float *gaussian_matrix(size_t n) {
    float *w = aq_alloc(n * sizeof *w);
    for (size_t i = 0; w && i + 1 < n; i += 2) { /* Box-Muller */
        double r = sqrt(-2 * log(uniform())), phi = 6.283185307179586 * uniform();
        w[i] = (float)(r * cos(phi));
        w[i + 1] = (float)(r * sin(phi));
    }
    return w;
}

/* One matrix, one spec, and buffers that were written once before anything is timed. */
typedef struct run {
    const float *w;
    aq_quant_spec spec;
    aq_quant_layout layout;
    uint8_t *codes, *params;
    int threads;
    bool measured; /* with metrics */
    aq_quant_metrics metrics;
} run;

static void quantize(void *context) {
    run *r = context;
    aq_error err;
    if (aq_quantize(r->w, &r->spec, &r->layout, NULL, r->threads, r->codes, r->params, r->measured ? &r->metrics : NULL, NULL, &err) != AQ_OK) {
        printf("%s\n", err.message);
        exit(1);
    }
}

static void dequantize(void *context) {
    run *r = context;
    aq_dequantize(&r->spec, &r->layout, r->codes, r->params, 0, r->layout.rows, (float *)(void *)(uintptr_t)r->w);
}

typedef struct copy {
    void *to;
    const void *from;
    size_t size;
} copy;
static void copy_all(void *context) {
    copy *c = context;
    memcpy(c->to, c->from, c->size);
}

typedef struct ggml_run {
    void (*quantize_row)(const float *x, void *y, int64_t n);
    const float *x;
    void *y;
    int64_t rows, cols;
} ggml_run;
static void ggml_quantize(void *context) {
    ggml_run *g = context;
    for (int64_t r = 0; r < g->rows; r++) g->quantize_row(g->x + r * g->cols, (char *)g->y + r * (g->cols / 32 * 20), g->cols);
}

/* Seconds, the shortest of several. */
static double time_of(void (*f)(void *), void *context) {
    double best = INFINITY;
    for (int i = 0; i < REPEATS; i++) {
        double start = aq_now_s();
        f(context);
        best = fmin(best, aq_now_s() - start);
    }
    return best;
}

static void prepare(run *r, const float *w, aq_quant_spec spec, uint64_t rows, uint64_t cols) {
    aq_error err;
    *r = (run){.w = w, .spec = spec, .threads = 1};
    if (aq_quant_layout_init(&r->layout, &spec, rows, cols, &err) != AQ_OK) {
        printf("%s\n", err.message);
        exit(1);
    }
    r->codes = aq_calloc(r->layout.codes_bytes, 1);
    r->params = aq_calloc(r->layout.params_bytes, 1);
    if (!r->codes || !r->params) exit(1);
}

static void release(run *r) {
    aq_free(r->codes);
    aq_free(r->params);
}

static double bits_per_weight(const run *r) {
    return 8.0 * (double)(r->layout.codes_bytes + r->layout.params_bytes) / (double)(r->layout.rows * r->layout.cols);
}

static const char *label(const aq_quant_spec *s) {
    static char text[64];
    snprintf(text, sizeof text, "%s %d bits g%llu %s", aq_method_name(s->method), s->bits, (unsigned long long)s->group_size, aq_params_form_name(s->params));
    return text;
}

static void bench_rtn(void) {
    enum { N = 4096 };
    size_t size = (size_t)N * N * sizeof(float);
    float *w = gaussian_matrix((size_t)N * N), *other = aq_calloc(size, 1);
    if (!w || !other) exit(1);
    copy c = {other, w, size};
    double copy_s = time_of(copy_all, &c), gb = (double)size * 1e-9;
    printf("4096 x 4096 F32\n%-32s %7.2f GB/s of input\n", "memcpy", gb / copy_s);

    double ggml_s = 0;
    const char *path = getenv("GGML_LIBRARY");
    void *library = path ? dlopen(path, RTLD_LAZY) : NULL;
    ggml_run g = {.x = w, .y = other, .rows = N, .cols = N};
    if (library) *(void **)&g.quantize_row = dlsym(library, "quantize_row_q4_1_ref");
    if (g.quantize_row) {
        ggml_s = time_of(ggml_quantize, &g);
        printf("%-32s %7.2f GB/s\n", "ggml Q4_1", gb / ggml_s);
    } else {
        printf("ggml: skipped, GGML_LIBRARY names no library with quantize_row_q4_1_ref\n");
    }

    for (int bits = 8; bits >= 2; bits /= 2)
        for (int form = 0; form < 2; form++) {
            run r;
            prepare(&r, w, (aq_quant_spec){.bits = bits, .group_size = 128, .axis = 1, .params = form ? AQ_PARAMS_F32 : AQ_PARAMS_F16}, N, N);
            double one = time_of(quantize, &r);
            r.measured = true;
            double measured = time_of(quantize, &r);
            r.threads = 2;
            double two = time_of(quantize, &r);
            printf("%-32s %7.2f GB/s  %.2f x memcpy", label(&r.spec), gb / one, copy_s / one);
            if (ggml_s > 0) printf("  %.1f x ggml Q4_1", ggml_s / one);
            printf("  with metrics %.2f GB/s, two threads %.2f x", gb / measured, measured / two);
            r.w = other;
            printf("  dequantize %.2f GB/s\n", gb / time_of(dequantize, &r));
            release(&r);
        }
    aq_free(w);
    aq_free(other);
}

static void bench_search(void) {
    static const aq_quant_spec specs[] = {
        {.bits = 2, .group_size = 256, .params = AQ_PARAMS_TWO_LEVEL}, {.bits = 4, .group_size = 256, .params = AQ_PARAMS_TWO_LEVEL},
        {.bits = 2, .group_size = 64, .params = AQ_PARAMS_F16},        {.bits = 4, .group_size = 64, .params = AQ_PARAMS_F16},
        {.bits = 4, .group_size = 128, .params = AQ_PARAMS_F16},       {.bits = 8, .group_size = 64, .params = AQ_PARAMS_F16},
        {.bits = 8, .group_size = 128, .params = AQ_PARAMS_F16},       {.bits = 4, .group_size = 0, .params = AQ_PARAMS_F16},
    };
    enum { N = 1024 };
    float *w = gaussian_matrix((size_t)N * N);
    if (!w) exit(1);
    double gb = (double)N * N * 4e-9;
    printf("1024 x 1024 F32, Gaussian, one thread\n");
    for (size_t i = 0; i < sizeof specs / sizeof *specs; i++)
        for (int method = 0; method < 2; method++) {
            run r;
            aq_quant_spec spec = specs[i];
            spec.axis = 1;
            spec.method = method ? AQ_METHOD_SEARCH : AQ_METHOD_RTN;
            prepare(&r, w, spec, N, N);
            double seconds = time_of(quantize, &r);
            r.measured = true;
            quantize(&r);
            printf("%-32s %7.2f GB/s  %6.3f bits a weight  %6.2f dB\n", label(&r.spec), gb / seconds, bits_per_weight(&r),
                   aq_quant_metrics_sqnr_db(&r.metrics));
            release(&r);
        }
    aq_free(w);
}

int bench_quant(int argc, char **argv) {
    (void)argc;
    (void)argv;
    bench_rtn();
    bench_search();
    return 0;
}
