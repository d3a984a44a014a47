/* Matrix products against a BLAS library: the shared library that BLAS_LIBRARY names (OpenBLAS, MKL's libmkl_rt, the one inside numpy) is loaded at run time
 * and runs the same products in turn with ours. Its threads are its own affair: set OPENBLAS_NUM_THREADS or MKL_NUM_THREADS to what is compared (1, then 2).
 */
#include "bench.h"

#include <dlfcn.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "base/file.h"
#include "base/mem.h"
#include "kernels/gemm.h"

enum { ROW_MAJOR = 101, PLAIN = 111, TRANSPOSED = 112 };
/* Order, transposes, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc; with sizes of 32 or, in libraries whose names end in 64_, 64 bits. */
typedef void sgemm_32(int, int, int, int, int, int, float, const float *, int, const float *, int, float, float *, int);
typedef void sgemm_64(int, int, int, int64_t, int64_t, int64_t, float, const float *, int64_t, const float *, int64_t, float, float *, int64_t);
typedef void dgemm_32(int, int, int, int, int, int, double, const double *, int, const double *, int, double, double *, int);
typedef void dgemm_64(int, int, int, int64_t, int64_t, int64_t, double, const double *, int64_t, const double *, int64_t, double, double *, int64_t);

static struct {
    sgemm_32 *s32;
    sgemm_64 *s64;
    dgemm_32 *d32;
    dgemm_64 *d64;
} blas;

static void load_blas(void) {
    const char *path = getenv("BLAS_LIBRARY");
    void *library = path ? dlopen(path, RTLD_LAZY | RTLD_LOCAL) : NULL;
    if (!library) {
        printf("no BLAS to compare with: BLAS_LIBRARY names none%s%s\n", path ? ": " : "", path ? dlerror() : "");
        return;
    }
    *(void **)&blas.s64 = dlsym(library, "scipy_cblas_sgemm64_");
    *(void **)&blas.d64 = dlsym(library, "scipy_cblas_dgemm64_");
    *(void **)&blas.s32 = dlsym(library, "cblas_sgemm");
    *(void **)&blas.d32 = dlsym(library, "cblas_dgemm");
}

typedef struct shape {
    int m, n, k;
    bool doubles, transposed; /* B is stored as [n, k], as the weights of a layer are */
} shape;

static void ours(const shape *s, const void *a, const void *b, void *c, int threads) {
    uint64_t m = (uint64_t)s->m, n = (uint64_t)s->n, k = (uint64_t)s->k, step = s->transposed ? 1 : n, next = s->transposed ? k : 1;
    bool done;
    if (s->doubles)
        done = aq_gemm_f64(m, n, k, (aq_matrix_f64){a, k, 1}, (aq_matrix_f64){b, step, next}, c, n, false, AQ_GEMM_FULL, threads);
    else
        done = aq_gemm_f32(m, n, k, (aq_matrix_f32){a, k, 1}, (aq_matrix_f32){b, step, next}, c, n, false, AQ_GEMM_FULL, threads);
    if (!done) exit(1);
}

static bool theirs(const shape *s, const void *a, const void *b, void *c) {
    int m = s->m, n = s->n, k = s->k, t = s->transposed ? TRANSPOSED : PLAIN, ldb = s->transposed ? k : n;
    if (s->doubles && blas.d64)
        blas.d64(ROW_MAJOR, PLAIN, t, m, n, k, 1, a, k, b, ldb, 1, c, n);
    else if (s->doubles && blas.d32)
        blas.d32(ROW_MAJOR, PLAIN, t, m, n, k, 1, a, k, b, ldb, 1, c, n);
    else if (!s->doubles && blas.s64)
        blas.s64(ROW_MAJOR, PLAIN, t, m, n, k, 1, a, k, b, ldb, 1, c, n);
    else if (!s->doubles && blas.s32)
        blas.s32(ROW_MAJOR, PLAIN, t, m, n, k, 1, a, k, b, ldb, 1, c, n);
    else
        return false;
    return true;
}

/* Shortest of several rounds in turn; small products run often in each. */
static void measure(const shape *s, int threads) {
    size_t size = s->doubles ? 8 : 4, a_count = (size_t)s->m * (size_t)s->k, b_count = (size_t)s->k * (size_t)s->n, c_count = (size_t)s->m * (size_t)s->n;
    void *a = aq_calloc(a_count, size), *b = aq_calloc(b_count, size), *c = aq_calloc(c_count, size);
    if (!a || !b || !c) exit(1);
    for (size_t i = 0; i < a_count; i++) s->doubles ? (void)(((double *)a)[i] = (double)(i % 97)) : (void)(((float *)a)[i] = (float)(i % 97));
    for (size_t i = 0; i < b_count; i++) s->doubles ? (void)(((double *)b)[i] = (double)(i % 89)) : (void)(((float *)b)[i] = (float)(i % 89));
    double operations = 2.0 * s->m * s->n * s->k, best[2] = {INFINITY, INFINITY};
    int often = operations < 2e8 ? (int)(2e8 / operations) + 1 : 1;
    for (int round = 0; round < 7; round++)
        for (int who = 0; who < 2; who++) {
            double start = aq_now_s();
            bool ran = true;
            for (int i = 0; i < often; i++)
                if (who == 0)
                    ours(s, a, b, c, threads);
                else
                    ran = theirs(s, a, b, c);
            if (ran) best[who] = fmin(best[who], (aq_now_s() - start) / often);
        }
    printf("%s%s  %5d x %5d x %5d  %8.1f GFLOP/s", s->doubles ? "f64" : "f32", s->transposed ? " B^T" : "    ", s->m, s->n, s->k, operations / best[0] * 1e-9);
    if (isfinite(best[1])) printf("  %8.1f of the BLAS, ratio %.2f", operations / best[1] * 1e-9, best[1] / best[0]);
    printf("\n");
    aq_free(a);
    aq_free(b);
    aq_free(c);
}

int bench_gemm(int argc, char **argv) {
    static const shape shapes[] = {
        {1024, 1024, 1024, false, false}, {2048, 2048, 2048, false, false}, {4096, 4096, 4096, false, false}, {1024, 1024, 1024, false, true},
        {256, 1024, 1024, false, true},   {49, 1024, 1024, false, true},    {192, 192, 192, false, false},    {192, 768, 192, false, false},
        {768, 192, 192, false, false},    {768, 768, 192, false, false},    {64, 64, 64, false, false},       {1024, 1024, 1024, true, false},
        {2048, 2048, 2048, true, false},  {192, 192, 192, true, false},     {768, 768, 192, true, false},
    };
    int threads = argc > 1 ? atoi(argv[1]) : 1;
    printf("%d thread%s of ours\n", threads, threads == 1 ? "" : "s");
    load_blas();
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) measure(&shapes[i], threads);
    return 0;
}
