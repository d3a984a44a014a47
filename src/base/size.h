/* Checked arithmetic on sizes that come from files. Each returns false on overflow and then leaves *out alone. */
#ifndef AQ_BASE_SIZE_H
#define AQ_BASE_SIZE_H

#include <stdbool.h>
#include <stdint.h>

static inline bool aq_add(uint64_t a, uint64_t b, uint64_t *out) {
    if (a > UINT64_MAX - b) return false;
    *out = a + b;
    return true;
}

static inline bool aq_mul(uint64_t a, uint64_t b, uint64_t *out) {
    if (b != 0 && a > UINT64_MAX / b) return false;
    *out = a * b;
    return true;
}

/* Rounds x up to a multiple of n, a power of two. Checked before the addition: (x + n - 1) & ~(n - 1) alone wraps to 0 near the maximum. */
static inline bool aq_align(uint64_t x, uint64_t n, uint64_t *out) {
    uint64_t sum;
    if (!aq_add(x, n - 1, &sum)) return false;
    *out = sum & ~(n - 1);
    return true;
}

/* b > 0. */
static inline uint64_t aq_div_up(uint64_t a, uint64_t b) { return a / b + (a % b != 0); /* NOLINT(clang-analyzer-core.DivideZero): the caller's promise */ }

#endif
