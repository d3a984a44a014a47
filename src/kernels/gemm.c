/* Matrix products as gemm.h defines them. */
#include "kernels/gemm.h"

#include <math.h>

#define DEFINE_GEMM(name, type, matrix, multiply_add)                                                                                                          \
    bool name(uint64_t m, uint64_t n, uint64_t k, matrix a, matrix b, type *c, uint64_t ldc, bool subtract, aq_gemm_part part, int n_threads) {                \
        (void)n_threads;                                                                                                                                       \
        for (uint64_t begin = 0; begin < k; begin += AQ_GEMM_BLOCK) {                                                                                          \
            uint64_t end = k - begin < AQ_GEMM_BLOCK ? k : begin + AQ_GEMM_BLOCK;                                                                              \
            for (uint64_t i = 0; i < m; i++)                                                                                                                   \
                for (uint64_t j = part == AQ_GEMM_UPPER ? i : 0; j < n; j++) {                                                                                 \
                    type sum = 0;                                                                                                                              \
                    for (uint64_t l = begin; l < end; l++)                                                                                                     \
                        sum = multiply_add(a.data[i * a.row_stride + l * a.col_stride], b.data[l * b.row_stride + j * b.col_stride], sum);                     \
                    c[i * ldc + j] += subtract ? -sum : sum;                                                                                                   \
                }                                                                                                                                              \
        }                                                                                                                                                      \
        return true;                                                                                                                                           \
    }

DEFINE_GEMM(aq_gemm_f32, float, aq_matrix_f32, fmaf)
DEFINE_GEMM(aq_gemm_f64, double, aq_matrix_f64, fma)
