/* Which kernels run: the best that the CPU has, unless ARROWQUANT_ISA or the program asks for another. Chosen once. */
#include "kernels/kernels.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "base/cpu.h"
#include "base/error.h"

static const char *const isa_names[] = {"avx512", "avx2", "neon", "scalar"}; /* best first */

static bool known(const char *isa) {
    for (size_t i = 0; i < sizeof isa_names / sizeof *isa_names; i++)
        if (strcmp(isa, isa_names[i]) == 0) return true;
    return false;
}

const aq_kernels *aq_kernels_find(const char *isa) {
    if (strcmp(isa, "scalar") == 0) return &aq_kernels_scalar;
#if defined(__x86_64__)
    if (strcmp(isa, "avx512") == 0 && aq_cpu_has_avx512()) return aq_cpu_has_avx512_vnni() ? &aq_kernels_avx512_vnni : &aq_kernels_avx512;
    if (strcmp(isa, "avx512-bw") == 0 && aq_cpu_has_avx512()) return &aq_kernels_avx512;
    if (strcmp(isa, "avx2") == 0 && aq_cpu_has_avx2()) return &aq_kernels_avx2;
#elif defined(__aarch64__)
    if (strcmp(isa, "neon") == 0 && aq_cpu_has_neon()) return &aq_kernels_neon;
#endif
    return NULL;
}

static const aq_kernels *best(void) {
    for (size_t i = 0; i < sizeof isa_names / sizeof *isa_names; i++) {
        const aq_kernels *k = aq_kernels_find(isa_names[i]);
        if (k) return k;
    }
    return &aq_kernels_scalar;
}

static _Atomic(const aq_kernels *) selected;

const aq_kernels *aq_kernels_get(void) {
    const aq_kernels *k = atomic_load(&selected);
    if (k) return k;
    const char *isa = getenv("ARROWQUANT_ISA");
    k = isa ? aq_kernels_find(isa) : NULL;
    if (!k) k = best();
    atomic_store(&selected, k); /* threads that race store the same value */
    return k;
}

aq_status aq_kernels_select(const char *isa, aq_error *err) {
    const char *origin = "";
    if (!isa || !*isa) {
        isa = getenv("ARROWQUANT_ISA");
        origin = "ARROWQUANT_ISA: ";
    }
    const aq_kernels *k = isa && *isa ? aq_kernels_find(isa) : best();
    if (!k && isa) {
        char shown[64];
        aq_escape(shown, sizeof shown, isa, strlen(isa));
        if (known(isa))
            aq_fail(err, AQ_ERR_USAGE, "%sthis CPU has no '%s' instructions", origin, shown);
        else
            aq_fail(err, AQ_ERR_USAGE, "%sunknown instruction set '%s'; expected scalar, avx2, avx512 or neon", origin, shown);
        aq_hint(err, "leave it unset to use the best that this CPU has: %s", best()->name);
        return AQ_ERR_USAGE;
    }
    atomic_store(&selected, k);
    return AQ_OK;
}

const char *aq_isa_name(void) { return aq_kernels_get()->name; }
