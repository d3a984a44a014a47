/* Benchmarks: `aq_bench NAME` runs one, `aq_bench` lists them. */
#include <stdio.h>
#include <string.h>

#include <arrowquant/arrowquant.h>

#include "bench.h"

static const struct {
    const char *name, *what;
    int (*run)(int argc, char **argv);
} benches[] = {
    {"quant", "quantization of one matrix: speed against memcpy and ggml, error against bits", bench_quant},
    {"gemm", "[THREADS]: matrix products against the BLAS library that BLAS_LIBRARY names", bench_gemm},
    {"linear", "[THREADS]: products with packed codes against F32 and against the memory", bench_linear},
    {"solve", "[N [THREADS]]: GPTQ and refine of an N x N layer against one product of that size", bench_solve},
    {"model", "PATH [--bits N] [--method M]: seconds of conversion and quantization of a model's layers, from memory", bench_model},
};

int main(int argc, char **argv) {
    for (size_t i = 0; i < sizeof benches / sizeof *benches; i++)
        if (argc > 1 && strcmp(argv[1], benches[i].name) == 0) {
            printf("isa %s\n", aq_isa_name());
            return benches[i].run(argc - 1, argv + 1);
        }
    printf("usage: aq_bench NAME\n");
    for (size_t i = 0; i < sizeof benches / sizeof *benches; i++) printf("  %-8s %s\n", benches[i].name, benches[i].what);
    return argc > 1 ? 2 : 0;
}
