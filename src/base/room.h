/* Working memory that is kept between calls. A call that takes some MB and gives them back within a millisecond spends more time on the system's page faults
 * than on its work, the more so on several threads, which wait for each other in the kernel. */
#ifndef AQ_BASE_ROOM_H
#define AQ_BASE_ROOM_H

#include <stdatomic.h>
#include <stdint.h>

/* All zero: nothing is kept yet. */
typedef struct aq_room {
    _Atomic(void *) kept;
} aq_room;

/* Memory of at least `bytes`, aligned to 64, of any content: what is kept if it is large enough. NULL: no memory. From any thread, also from several at once:
 * only one of them gets what is kept. */
void *aq_room_take(aq_room *room, uint64_t bytes);
/* Gives it back (NULL: nothing). Of it and what is kept the larger stays, up to 64 MB. */
void aq_room_give(aq_room *room, void *memory);
/* Frees what is kept. */
void aq_room_empty(aq_room *room);

#endif
