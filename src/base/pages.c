/* Regions of huge pages (see pages.h): a mapping, aligned to what the kernel makes huge pages of, with a count of what still stands in it. */
#include "base/pages.h"

#include <stdatomic.h>
#include <stdbool.h>
#include <sys/mman.h>

#include "base/mem.h"
#include "base/size.h"

enum { HUGE = 2 << 20, PAGE = 4096, WHOLE_PAGES = 16 * PAGE };

struct aq_pages {
    char *mapping;
    uint64_t mapped;
    char *next, *end;
    atomic_size_t users; /* pieces, and whoever may take more */
};

static char *align(char *p, uintptr_t unit) { return p + (unit - (uintptr_t)p % unit) % unit; }

aq_pages *aq_pages_create(uint64_t size) {
    uint64_t mapped;
    if (!aq_add(size, HUGE, &mapped) || mapped > SIZE_MAX / 2) return NULL;
    aq_pages *pages = aq_alloc(sizeof *pages);
    if (!pages) return NULL;
    void *mapping = mmap(NULL, (size_t)mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapping == MAP_FAILED) {
        aq_free(pages);
        return NULL;
    }
    *pages = (aq_pages){.mapping = mapping, .mapped = mapped, .next = align(mapping, HUGE)};
    pages->end = pages->next + size;
    atomic_init(&pages->users, 1);
#ifdef MADV_HUGEPAGE
    madvise(pages->next, (size_t)size, MADV_HUGEPAGE); /* a wish: without it pages are small */
#endif
    return pages;
}

void *aq_pages_take(aq_pages *pages, uint64_t size) {
    char *piece = align(pages->next, size < WHOLE_PAGES ? 64 : PAGE);
    if (piece > pages->end || size > (uint64_t)(pages->end - piece)) return NULL;
    pages->next = piece + size;
    atomic_fetch_add(&pages->users, 1);
    return piece;
}

static bool leave(aq_pages *pages) {
    if (atomic_fetch_sub(&pages->users, 1) > 1) return false;
    munmap(pages->mapping, (size_t)pages->mapped);
    aq_free(pages);
    return true;
}

void aq_pages_drop(aq_pages *pages, void *piece, uint64_t size) {
    char *first = align(piece, PAGE), *end = (char *)piece + size;
    end -= (uintptr_t)end % PAGE;
    /* Before this piece's count goes, for the region goes with the last one. Alone, it need not be emptied first. */
    if (end > first && atomic_load(&pages->users) > 1) madvise(first, (size_t)(end - first), MADV_DONTNEED);
    leave(pages);
}

void aq_pages_close(aq_pages *pages) {
    if (pages) leave(pages);
}
