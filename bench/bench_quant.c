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
    float *out; /* of dequantize */
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
    aq_dequantize(&r->spec, &r->layout, r->codes, r->params, 0, r->layout.rows, r->out);
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

/* One thing to time. */
typedef struct timed {
    void (*f)(void *);
    void *context;
    double seconds; /* shortest so far */
} timed;

/* Rounds of all in turn, so that a busy moment of the machine falls on none of them alone. */
static void time_all(timed *t, size_t n) {
    for (size_t i = 0; i < n; i++) t[i].seconds = INFINITY;
    for (int round = 0; round < REPEATS; round++)
        for (size_t i = 0; i < n; i++) {
            double start = aq_now_s();
            t[i].f(t[i].context);
            t[i].seconds = fmin(t[i].seconds, aq_now_s() - start);
        }
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
    enum { N = 4096, SPECS = 6 };
    size_t size = (size_t)N * N * sizeof(float);
    float *w = gaussian_matrix((size_t)N * N), *other = aq_calloc(size, 1);
    if (!w || !other) exit(1);
    double gb = (double)size * 1e-9;
    copy c = {other, w, size};
    ggml_run g = {.x = w, .y = other, .rows = N, .cols = N};
    const char *path = getenv("GGML_LIBRARY");
    void *library = path ? dlopen(path, RTLD_LAZY) : NULL;
    if (library) *(void **)&g.quantize_row = dlsym(library, "quantize_row_q4_1_ref");

    static const char *const labels[SPECS] = {"8 bits g128 f16", "8 bits g128 f32", "4 bits g128 f16", "4 bits g128 f32", "2 bits g128 f16", "2 bits g128 f32"};
    run plain[SPECS], measured[SPECS], two[SPECS], back[SPECS];
    timed t[4 * SPECS + 2];
    for (size_t i = 0; i < SPECS; i++) {
        prepare(&plain[i], w, (aq_quant_spec){.bits = 8 >> i / 2, .group_size = 128, .axis = 1, .params = i % 2 ? AQ_PARAMS_F32 : AQ_PARAMS_F16}, N, N);
        measured[i] = two[i] = back[i] = plain[i];
        measured[i].measured = true;
        two[i].threads = 2;
        back[i].out = other;
        t[4 * i] = (timed){quantize, &plain[i], 0};
        t[4 * i + 1] = (timed){quantize, &measured[i], 0};
        t[4 * i + 2] = (timed){quantize, &two[i], 0};
        t[4 * i + 3] = (timed){dequantize, &back[i], 0};
    }
    size_t n = 4 * SPECS;
    t[n++] = (timed){copy_all, &c, 0};
    if (g.quantize_row) t[n++] = (timed){ggml_quantize, &g, 0};
    time_all(t, n);

    double copy_s = t[4 * SPECS].seconds, ggml_s = t[4 * SPECS + 1].seconds;
    printf("4096 x 4096 F32, rtn, one thread\n%-18s %6.2f GB/s of input\n", "memcpy", gb / copy_s);
    if (g.quantize_row)
        printf("%-18s %6.2f GB/s\n", "ggml Q4_1", gb / ggml_s);
    else
        printf("ggml: skipped, GGML_LIBRARY names no library with quantize_row_q4_1_ref\n");
    for (size_t i = 0; i < SPECS; i++) {
        double one = t[4 * i].seconds;
        printf("%-18s %6.2f GB/s  %5.2f x memcpy", labels[i], gb / one, copy_s / one);
        if (g.quantize_row) printf("  %5.2f x ggml Q4_1", ggml_s / one);
        printf("  two threads %4.2f x  with metrics %5.2f GB/s  dequantize %5.2f GB/s\n", one / t[4 * i + 2].seconds, gb / t[4 * i + 1].seconds,
               gb / t[4 * i + 3].seconds);
        release(&plain[i]);
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
    enum { SPECS = sizeof specs / sizeof *specs };
    run runs[2 * SPECS];
    timed t[2 * SPECS];
    for (size_t i = 0; i < 2 * SPECS; i++) {
        aq_quant_spec spec = specs[i / 2];
        spec.axis = 1;
        spec.method = i % 2 ? AQ_METHOD_SEARCH : AQ_METHOD_RTN;
        prepare(&runs[i], w, spec, N, N);
        t[i] = (timed){quantize, &runs[i], 0};
    }
    time_all(t, 2 * SPECS);
    for (size_t i = 0; i < 2 * SPECS; i++) {
        runs[i].measured = true;
        quantize(&runs[i]);
        printf("%-32s %6.2f GB/s  %6.3f bits a weight  %6.2f dB\n", label(&runs[i].spec), gb / t[i].seconds, bits_per_weight(&runs[i]),
               aq_quant_metrics_sqnr_db(&runs[i].metrics));
        release(&runs[i]);
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
