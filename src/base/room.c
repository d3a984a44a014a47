/* Working memory that is kept between calls (see room.h): one block, owned by whoever exchanged the pointer to it last; its size stands before it. */
#include "base/room.h"

#include "base/mem.h"
#include "base/size.h"

enum { ALIGNMENT = 64, KEPT_MOST = 64 << 20 };

typedef struct {
    void *allocated;
    uint64_t bytes;
} head;

static head *head_of(void *memory) { return (head *)memory - 1; }

static void release(void *memory) {
    if (memory) aq_free(head_of(memory)->allocated);
}

void *aq_room_take(aq_room *room, uint64_t bytes) {
    char *memory = atomic_exchange(&room->kept, NULL);
    if (memory && head_of(memory)->bytes >= bytes) return memory;
    release(memory);
    uint64_t all;
    char *allocated = aq_add(bytes, sizeof(head) + ALIGNMENT, &all) ? aq_alloc(all) : NULL;
    if (!allocated) return NULL;
    memory = allocated + sizeof(head);
    memory += (ALIGNMENT - (uintptr_t)memory % ALIGNMENT) % ALIGNMENT;
    *head_of(memory) = (head){allocated, bytes};
    return memory;
}

void aq_room_give(aq_room *room, void *memory) {
    if (!memory) return;
    uint64_t bytes = head_of(memory)->bytes;
    void *other = bytes <= KEPT_MOST ? atomic_exchange(&room->kept, memory) : memory;
    if (other && other != memory && head_of(other)->bytes > bytes) other = atomic_exchange(&room->kept, other);
    release(other);
}

void aq_room_empty(aq_room *room) { release(atomic_exchange(&room->kept, NULL)); }
