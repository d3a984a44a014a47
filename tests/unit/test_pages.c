/* Regions of huge pages: pieces do not overlap, are zero, go back one by one, and the region goes with the last. */
#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>

#include <cmocka.h>

#include "base/mem.h"
#include "base/pages.h"

static bool is_mapped(void *page) {
    unsigned char resident;
    return mincore((void *)((uintptr_t)page / 4096 * 4096), 4096, &resident) == 0;
}

static void pieces_are_zero_aligned_and_apart(void **state) {
    (void)state;
    static const uint64_t sizes[] = {100000, 1, 0, 70, 4096, 3 << 20, 5};
    enum { N = sizeof sizes / sizeof *sizes };
    uint64_t total = 0;
    for (size_t i = 0; i < N; i++) total += sizes[i] + AQ_PIECE_EXTRA;
    aq_pages *pages = aq_pages_create(total);
    assert_non_null(pages);
    unsigned char *pieces[N];
    for (size_t i = 0; i < N; i++) {
        pieces[i] = aq_pages_take(pages, sizes[i]);
        assert_non_null(pieces[i]);
        assert_int_equal((uintptr_t)pieces[i] % 64, 0);
        for (uint64_t at = 0; at < sizes[i]; at += 61) assert_int_equal(pieces[i][at], 0);
        memset(pieces[i], (int)i + 1, sizes[i]);
    }
    assert_null(aq_pages_take(pages, total));
    for (size_t i = 0; i < N; i++)
        for (uint64_t at = 0; at < sizes[i]; at++) assert_int_equal(pieces[i][at], i + 1);
    for (size_t i = 0; i < N; i++) aq_pages_drop(pages, pieces[i], sizes[i]);
    aq_pages_close(pages);
}

/* What is dropped is empty at once, and its neighbours keep their values; after the last nothing is mapped. */
static void a_piece_goes_back_alone(void **state) {
    (void)state;
    enum { SIZE = 1 << 20 };
    aq_pages *pages = aq_pages_create(3 * (SIZE + AQ_PIECE_EXTRA));
    unsigned char *a = aq_pages_take(pages, SIZE), *b = aq_pages_take(pages, SIZE), *c = aq_pages_take(pages, SIZE);
    memset(a, 1, SIZE), memset(b, 2, SIZE), memset(c, 3, SIZE);
    aq_pages_close(pages);
    aq_pages_drop(pages, b, SIZE);
    assert_true(is_mapped(b));
    assert_int_equal(b[SIZE / 2], 0);
    for (size_t i = 0; i < SIZE; i++) assert_true(a[i] == 1 && c[i] == 3);
    aq_pages_drop(pages, a, SIZE);
    assert_int_equal(c[SIZE - 1], 3);
    aq_pages_drop(pages, c, SIZE);
    assert_false(is_mapped(c + SIZE / 2));
}

static void what_cannot_be_had_is_null(void **state) {
    (void)state;
    assert_null(aq_pages_create(UINT64_MAX));
    assert_null(aq_pages_create((uint64_t)1 << 62));
    aq_mem_fail_after(0);
    aq_pages *none = aq_pages_create(1 << 20);
    aq_mem_fail_after(-1);
    assert_null(none);
    aq_pages_close(NULL);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(pieces_are_zero_aligned_and_apart),
        cmocka_unit_test(a_piece_goes_back_alone),
        cmocka_unit_test(what_cannot_be_had_is_null),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
