/* Which instruction sets the CPU and operating system offer; read once. */
#ifndef AQ_BASE_CPU_H
#define AQ_BASE_CPU_H

#include <stdbool.h>

bool aq_cpu_has_avx2(void);   /* AVX2, F16C and FMA */
bool aq_cpu_has_avx512(void); /* AVX-512 F, BW, DQ, VL */
bool aq_cpu_has_avx512_vnni(void);
bool aq_cpu_has_neon(void); /* AArch64 Advanced SIMD */

/* Threads to use: n when positive, else what OpenMP would take. */
int aq_cpu_threads(int n);

#endif
