/* Working memory between calls: what is given back comes again, the larger of two stays, nobody gets what another has. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

#include "base/mem.h"
#include "base/room.h"
#include "base/threads.h"

static void what_is_given_back_comes_again(void **state) {
    (void)state;
    aq_room room = {0};
    char *first = aq_room_take(&room, 1000);
    assert_non_null(first);
    assert_int_equal((uintptr_t)first % 64, 0);
    memset(first, 1, 1000);
    aq_room_give(&room, first);
    assert_ptr_equal(aq_room_take(&room, 10), first); /* large enough */
    char *small = aq_room_take(&room, 10);            /* the other one is taken */
    assert_ptr_not_equal(small, first);
    aq_room_give(&room, first);
    aq_room_give(&room, small); /* goes: the larger stays */
    assert_ptr_equal(aq_room_take(&room, 1000), first);
    aq_room_give(&room, first);
    char *large = aq_room_take(&room, 5000);
    memset(large, 2, 5000);
    aq_room_give(&room, large);
    assert_ptr_equal(aq_room_take(&room, 1000), large);
    aq_room_give(&room, large);
    aq_room_give(&room, NULL);
    aq_room_empty(&room);
    aq_room_empty(&room);
}

static void FA07_without_memory_there_is_no_room_and_nothing_is_lost(void **state) {
    (void)state;
    aq_room room = {0};
    assert_null(aq_room_take(&room, UINT64_MAX));
    char *kept = aq_room_take(&room, 100);
    aq_room_give(&room, kept);
    aq_mem_fail_after(0);
    assert_ptr_equal(aq_room_take(&room, 100), kept);
    aq_room_give(&room, kept);
    assert_null(aq_room_take(&room, 101));
    aq_mem_fail_after(-1);
    aq_room_empty(&room);
}

static bool write_and_read(void *context, size_t i) {
    size_t bytes = 64 + i % 7 * 1000;
    unsigned char *memory = aq_room_take(context, bytes);
    if (!memory) return false;
    memset(memory, (int)(i % 251), bytes);
    bool same = true;
    for (size_t k = 0; k < bytes; k++) same = same && memory[k] == i % 251;
    aq_room_give(context, memory);
    return same;
}

static void threads_do_not_share_it(void **state) {
    (void)state;
    aq_room room = {0};
    assert_true(aq_parallel_for(5000, 4, write_and_read, &room));
    aq_room_empty(&room);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(what_is_given_back_comes_again),
        cmocka_unit_test(FA07_without_memory_there_is_no_room_and_nothing_is_lost),
        cmocka_unit_test(threads_do_not_share_it),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
