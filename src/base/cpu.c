/* CPU features (see cpu.h). */
#include "base/cpu.h"

#ifdef _OPENMP
#include <omp.h>
#endif

#if defined(__x86_64__)
bool aq_cpu_has_avx2(void) { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c"); }
bool aq_cpu_has_avx512(void) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           aq_cpu_has_avx2();
}
#else
bool aq_cpu_has_avx2(void) { return false; }
bool aq_cpu_has_avx512(void) { return false; }
#endif

#if defined(__aarch64__)
bool aq_cpu_has_neon(void) { return true; } /* part of the architecture's baseline */
#else
bool aq_cpu_has_neon(void) { return false; }
#endif

int aq_cpu_threads(int n) {
    if (n > 0) return n;
#ifdef _OPENMP
    return omp_get_max_threads();
#else
    return 1;
#endif
}
