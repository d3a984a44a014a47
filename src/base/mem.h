/* Allocation. Every allocation of the library goes through these, so that tests can make the n-th one fail. */
#ifndef AQ_BASE_MEM_H
#define AQ_BASE_MEM_H

#include <stddef.h>
#include <stdint.h>

/* NULL when out of memory or when the size does not fit size_t. A size of 0 gives a valid pointer. Freed by aq_free. */
void *aq_alloc(uint64_t size);
void *aq_calloc(uint64_t count, uint64_t size);
/* count * size bytes, overflow-checked; the old block stays valid on failure. */
void *aq_realloc(void *p, uint64_t count, uint64_t size);
char *aq_strdup(const char *text);
void aq_free(void *p);

/* Tests only: lets `n` more allocations pass, then fails each one; negative: never fails. Not thread-safe by design. */
void aq_mem_fail_after(int64_t n);

#endif
