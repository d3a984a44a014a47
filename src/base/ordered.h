/* Ordered work: items are computed in parts by several threads and committed one by one, in order, by the calling thread.
 *
 * Parts are handed out in rising order, the earliest open item first. An item is open from `begin` to the end of `commit`; while open it holds `cost` units
 * of `budget`, so what is in flight stays bounded (one item is always let in). The calling thread commits what is ready, computes parts while nothing is,
 * and calls `tick` in between. When an item fails, earlier items are still finished and committed and no later one is opened: which failure is reported
 * does not depend on the number of threads. Threads live for one call (see threads.h, also for floating-point state). */
#ifndef AQ_BASE_ORDERED_H
#define AQ_BASE_ORDERED_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* At most this many items are open at once: item i and i + AQ_ORDERED_WINDOW never are, so state may live in a ring of that size. */
#define AQ_ORDERED_WINDOW 128

typedef enum aq_ordered_next { AQ_ORDERED_READY, AQ_ORDERED_AGAIN, AQ_ORDERED_FAIL } aq_ordered_next;
typedef enum aq_ordered_result { AQ_ORDERED_DONE, AQ_ORDERED_FAILED, AQ_ORDERED_CANCELLED } aq_ordered_result;

typedef struct aq_ordered {
    size_t n_items;
    int n_threads; /* the caller's included; 0: all */
    uint64_t budget;
    void *context;
    /* Units the item holds while open. May be NULL: 0. */
    uint64_t (*cost)(void *context, size_t item);
    /* Opens the item and says how many parts it has (0: it is ready at once). Called in order, never two at a time. May be NULL: one part each. */
    bool (*begin)(void *context, size_t item, size_t *n_parts);
    /* Computes one part. `thread` is 0 for the caller, else 1 … n_threads - 1. */
    bool (*part)(void *context, size_t item, size_t part, size_t thread);
    /* After the last part of an item, by the thread that finished it: ready to commit, once more with *n_parts parts, or failed. May be NULL: ready. */
    aq_ordered_next (*end)(void *context, size_t item, size_t *n_parts);
    /* Takes the result; by the calling thread, in order. */
    bool (*commit)(void *context, size_t item);
    /* By the calling thread, at least about every 50 ms except inside one part or commit; false cancels. May be NULL. */
    bool (*tick)(void *context);
} aq_ordered;

/* Runs all items. When it returns no thread runs any more; items that were begun and not committed are the context's to clean up.
 * A failing begin, part, end or commit keeps its own error in the context, together with the item it belongs to: *failed_item (may be NULL). */
aq_ordered_result aq_ordered_run(const aq_ordered *work, size_t *failed_item);

#endif
