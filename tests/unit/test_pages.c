/* Regions of huge pages: pieces do not overlap, go back one by one, and the region goes with the last or is kept for the next. */
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

static void pieces_are_aligned_and_apart(void **state) {
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
        memset(pieces[i], (int)i + 1, sizes[i]);
    }
    assert_null(aq_pages_take(pages, total));
    for (size_t i = 0; i < N; i++)
        for (uint64_t at = 0; at < sizes[i]; at++) assert_int_equal(pieces[i][at], i + 1);
    for (size_t i = 0; i < N; i++) aq_pages_drop(pages, pieces[i], sizes[i]);
    aq_pages_close(pages);
}

/* Neighbours of what is dropped keep their values; what is too large to keep is unmapped after its last piece. */
static void a_piece_goes_back_alone(void **state) {
    (void)state;
    enum { SIZE = 32 << 20 };
    aq_pages *pages = aq_pages_create(3 * ((uint64_t)SIZE + AQ_PIECE_EXTRA));
    unsigned char *a = aq_pages_take(pages, SIZE), *b = aq_pages_take(pages, SIZE), *c = aq_pages_take(pages, SIZE);
    memset(a, 1, 4096), memset(b, 2, 4096), memset(c, 3, SIZE);
    aq_pages_close(pages);
    aq_pages_drop(pages, b, SIZE);
    assert_true(is_mapped(b));
    assert_true(a[4095] == 1 && c[0] == 3);
    aq_pages_drop(pages, a, SIZE);
    assert_int_equal(c[SIZE - 1], 3);
    aq_pages_drop(pages, c, SIZE);
    assert_false(is_mapped(c + SIZE / 2));
}

static void *only_piece(uint64_t size) {
    aq_pages *pages = aq_pages_create(size + AQ_PIECE_EXTRA);
    void *piece = aq_pages_take(pages, size);
    assert_non_null(piece);
    memset(piece, 7, size);
    aq_pages_close(pages);
    aq_pages_drop(pages, piece, size);
    return piece;
}

/* The next region of about the size stands where the last one stood; another size lets it go, and so does trim. */
static void a_region_is_kept_for_the_next(void **state) {
    (void)state;
    aq_pages_trim();
    void *first = only_piece(16 << 20);
    assert_true(is_mapped(first));
    assert_ptr_equal(only_piece(16 << 20), first);
    assert_ptr_equal(only_piece(8 << 20), first);
    void *larger = only_piece(40 << 20);
    assert_true(is_mapped(larger));
    only_piece(1 << 20); /* a region of 42 MiB would be idle for the most part */
    assert_false(is_mapped((char *)larger + (30 << 20)));
    void *small = only_piece(1 << 20);
    assert_true(is_mapped(small));
    aq_pages_trim();
    assert_false(is_mapped(small));
}

static void what_cannot_be_had_is_null(void **state) {
    (void)state;
    assert_null(aq_pages_create(UINT64_MAX));
    assert_null(aq_pages_create((uint64_t)1 << 62));
    aq_pages_trim();
    aq_mem_fail_after(0);
    aq_pages *none = aq_pages_create(1 << 20);
    aq_mem_fail_after(-1);
    assert_null(none);
    aq_pages_close(NULL);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(pieces_are_aligned_and_apart),
        cmocka_unit_test(a_piece_goes_back_alone),
        cmocka_unit_test(a_region_is_kept_for_the_next),
        cmocka_unit_test(what_cannot_be_had_is_null),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
