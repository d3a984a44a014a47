/* Regions of huge pages (see pages.h): a mapping, aligned to what the kernel makes huge pages of, with a count of what still stands in it and in each of its
 * huge pages. One that nothing stands in is marked as free (MADV_FREE), so the system takes it when it needs memory; always whole ones, for a part would split
 * it into small pages, which are slow to write to from then on. The last region that went is kept for the next, as allocators do, if it is not too large: on
 * virtual machines the first touch of a page can cost ten times what is written there. */
#include "base/pages.h"

#include <stdatomic.h>
#include <stdbool.h>
#include <sys/mman.h>

#include "base/mem.h"
#include "base/size.h"

enum { HUGE = 2 << 20, KEPT_MOST = 64 << 20 };
#ifdef MADV_FREE
enum { LENT = MADV_FREE };
#else
enum { LENT = MADV_DONTNEED };
#endif

struct aq_pages {
    char *mapping;
    uint64_t mapped;
    char *start, *next, *end;
    atomic_size_t users;   /* pieces, and whoever may take more */
    atomic_size_t units[]; /* the same of each huge page from `start` on */
};

static _Atomic(aq_pages *) kept;

static char *align(char *p, uintptr_t unit) { return p + (unit - (uintptr_t)p % unit) % unit; }

static void unmap(aq_pages *pages) {
    if (!pages) return;
    munmap(pages->mapping, (size_t)pages->mapped);
    aq_free(pages);
}

/* The kept region if it suits `mapped` bytes: large enough, and not so large that most of it would lie idle. */
static aq_pages *take_kept(uint64_t mapped) {
    aq_pages *pages = atomic_exchange(&kept, NULL);
    if (pages && pages->mapped >= mapped && pages->mapped / 4 <= mapped) return pages;
    unmap(pages);
    return NULL;
}

void aq_pages_trim(void) { unmap(atomic_exchange(&kept, NULL)); }

void aq_pages_wish(void *memory, uint64_t size) {
    char *first = align(memory, HUGE), *end = (char *)memory + size;
#ifdef MADV_HUGEPAGE
    if (size >= AQ_PAGES_LEAST) madvise(first, (size_t)(end - first), MADV_HUGEPAGE); /* without it pages are small */
#else
    (void)first, (void)end;
#endif
}

static aq_pages *opened(aq_pages *pages, uint64_t size) {
    pages->next = pages->start;
    pages->end = pages->start + size;
    atomic_store(&pages->users, 1);
    for (uint64_t i = 0; i < aq_div_up(size, HUGE); i++) atomic_store(&pages->units[i], 1);
    return pages;
}

aq_pages *aq_pages_create(uint64_t size) {
    uint64_t mapped;
    if (!aq_add(size, HUGE, &mapped) || mapped > SIZE_MAX / 2) return NULL;
    aq_pages *pages = take_kept(mapped);
    if (pages) return opened(pages, size);
    void *mapping = mmap(NULL, (size_t)mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapping == MAP_FAILED) return NULL;
    pages = aq_alloc(sizeof *pages + mapped / HUGE * sizeof *pages->units); /* enough for whatever a later call may take of it */
    if (!pages) {
        munmap(mapping, (size_t)mapped);
        return NULL;
    }
    *pages = (aq_pages){.mapping = mapping, .mapped = mapped, .start = align(mapping, HUGE)};
    aq_pages_wish(pages->start, size);
    return opened(pages, size);
}

/* The huge pages that hold something of [begin, end). */
static size_t first_unit(const aq_pages *pages, const char *begin) { return (size_t)(begin - pages->start) / HUGE; }
static size_t end_unit(const aq_pages *pages, const char *end) { return (size_t)aq_div_up((uint64_t)(end - pages->start), HUGE); }

/* One holder less of these. */
static void let_go(aq_pages *pages, const char *begin, const char *end) {
    for (size_t i = first_unit(pages, begin); begin < end && i < end_unit(pages, end); i++) {
        if (atomic_fetch_sub(&pages->units[i], 1) > 1) continue;
        char *unit = pages->start + i * HUGE;
        madvise(unit, (size_t)(pages->end - unit < HUGE ? pages->end - unit : HUGE), LENT);
    }
}

/* One holder less of all. */
static void leave(aq_pages *pages) {
    if (atomic_fetch_sub(&pages->users, 1) > 1) return;
    if (pages->mapped <= KEPT_MOST) pages = atomic_exchange(&kept, pages);
    unmap(pages);
}

void *aq_pages_take(aq_pages *pages, uint64_t size) {
    char *piece = align(pages->next, 64);
    if (piece > pages->end || size > (uint64_t)(pages->end - piece)) return NULL;
    pages->next = piece + size;
    atomic_fetch_add(&pages->users, 1);
    for (size_t i = first_unit(pages, piece); size > 0 && i < end_unit(pages, pages->next); i++) atomic_fetch_add(&pages->units[i], 1);
    return piece;
}

void aq_pages_drop(aq_pages *pages, void *piece, uint64_t size) {
    let_go(pages, piece, (char *)piece + size);
    leave(pages);
}

void aq_pages_close(aq_pages *pages) {
    if (!pages) return;
    let_go(pages, pages->start, pages->end);
    leave(pages);
}
