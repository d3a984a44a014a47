/* Allocation with a fault injection hook (see mem.h). */
#include "base/mem.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "base/size.h"

static _Atomic int64_t g_allocations_left = -1;

static bool may_allocate(void) {
    int64_t left = atomic_load_explicit(&g_allocations_left, memory_order_relaxed);
    if (left < 0) return true;
    if (left == 0) return false;
    atomic_store_explicit(&g_allocations_left, left - 1, memory_order_relaxed);
    return true;
}

void aq_mem_fail_after(int64_t n) { atomic_store(&g_allocations_left, n); }

void *aq_alloc(uint64_t size) {
    if (size > SIZE_MAX || !may_allocate()) return NULL;
    return malloc(size ? (size_t)size : 1);
}

void *aq_calloc(uint64_t count, uint64_t size) {
    uint64_t total;
    if (!aq_mul(count, size, &total) || total > SIZE_MAX || !may_allocate()) return NULL;
    return calloc(total ? (size_t)total : 1, 1);
}

void *aq_realloc(void *p, uint64_t count, uint64_t size) {
    uint64_t total;
    if (!aq_mul(count, size, &total) || total > SIZE_MAX || !may_allocate()) return NULL;
    return realloc(p, total ? (size_t)total : 1);
}

char *aq_strdup(const char *text) {
    size_t n = strlen(text) + 1;
    char *copy = aq_alloc(n);
    if (copy) memcpy(copy, text, n);
    return copy;
}

void aq_free(void *p) { free(p); }
