/* Large blocks of fresh memory. Touching new memory for the first time costs more than what is written there (some 0.4 ms a MB in pages of 4 KiB, a quarter of
 * that in huge ones), so results of one call that together are large share one region of huge pages; the system may take back each as it is freed, and one
 * region is kept for the next call. */
#ifndef AQ_BASE_PAGES_H
#define AQ_BASE_PAGES_H

#include <stddef.h>
#include <stdint.h>

enum { AQ_PAGES_LEAST = 4 << 20 }; /* below this a region gains nothing */

typedef struct aq_pages aq_pages;

/* A region for pieces of `size` bytes in all, each counted with AQ_PIECE_EXTRA. NULL when it cannot be had: then take ordinary memory. */
enum { AQ_PIECE_EXTRA = 64 };
aq_pages *aq_pages_create(uint64_t size);
/* The next `size` bytes (aligned to 64), of any content; NULL when they do not fit. By one thread at a time. */
void *aq_pages_take(aq_pages *pages, uint64_t size);
/* Gives a piece back, from any thread. */
void aq_pages_drop(aq_pages *pages, void *piece, uint64_t size);
/* No more pieces will be taken. The region goes when its last piece has gone. */
void aq_pages_close(aq_pages *pages);
/* Lets go of the region that is kept, if any. */
void aq_pages_trim(void);
/* Asks for huge pages in ordinary memory that has not been touched yet: a matrix whose columns are walked along misses a translation at each step otherwise. */
void aq_pages_wish(void *memory, uint64_t size);

#endif
