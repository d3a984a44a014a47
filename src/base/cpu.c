/* CPU features (see cpu.h). */
#include "base/cpu.h"

#include <sched.h>

#if defined(__x86_64__)
#include <cpuid.h>

static bool has_f16c(void) { /* clang 14 has no word for it in __builtin_cpu_supports */
    unsigned a, b, c, d;
    return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
bool aq_cpu_has_avx2(void) { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c(); }
bool aq_cpu_has_avx512(void) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl") && aq_cpu_has_avx2();
}
bool aq_cpu_has_avx512_vnni(void) { return __builtin_cpu_supports("avx512vnni") && aq_cpu_has_avx512(); }
#else
bool aq_cpu_has_avx2(void) { return false; }
bool aq_cpu_has_avx512(void) { return false; }
bool aq_cpu_has_avx512_vnni(void) { return false; }
#endif

#if defined(__aarch64__)
bool aq_cpu_has_neon(void) { return true; } /* part of the architecture's baseline */
#else
bool aq_cpu_has_neon(void) { return false; }
#endif

int aq_cpu_threads(int n) {
    if (n > 0) return n;
    cpu_set_t set; /* the CPUs this process may run on, which a container can limit */
    int allowed = sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : 1;
    return allowed > 0 ? allowed : 1;
}
