/* Regions of huge pages (see pages.h): a mapping, aligned to what the kernel makes huge pages of, with a count of what still stands in it. The last region that
 * went is kept for the next, as allocators do, if it is not too large: on virtual machines the first touch of a page can cost ten times what is written there.
 * What is kept is marked as free (MADV_FREE), so the system takes it when it needs memory. */
#include "base/pages.h"

#include <stdatomic.h>
#include <stdbool.h>
#include <sys/mman.h>

#include "base/mem.h"
#include "base/size.h"

enum { HUGE = 2 << 20, PAGE = 4096, WHOLE_PAGES = 16 * PAGE, KEPT_MOST = 64 << 20 };
#ifdef MADV_FREE
enum { LENT = MADV_FREE };
#else
enum { LENT = MADV_DONTNEED };
#endif

struct aq_pages {
    char *mapping;
    uint64_t mapped;
    char *next, *end;
    atomic_size_t users; /* pieces, and whoever may take more */
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

aq_pages *aq_pages_create(uint64_t size) {
    uint64_t mapped;
    if (!aq_add(size, HUGE, &mapped) || mapped > SIZE_MAX / 2) return NULL;
    aq_pages *pages = take_kept(mapped);
    if (pages) {
        pages->next = align(pages->mapping, HUGE);
        pages->end = pages->next + size;
        atomic_store(&pages->users, 1);
        return pages;
    }
    pages = aq_alloc(sizeof *pages);
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
    if (pages->mapped <= KEPT_MOST) {
        madvise(pages->mapping, (size_t)pages->mapped, LENT);
        pages = atomic_exchange(&kept, pages);
    }
    unmap(pages);
    return true;
}

void aq_pages_drop(aq_pages *pages, void *piece, uint64_t size) {
    char *first = align(piece, PAGE), *end = (char *)piece + size;
    end -= (uintptr_t)end % PAGE;
    /* Before this piece's count goes, for the region goes with the last one. Alone, it need not be emptied first. */
    if (end > first && atomic_load(&pages->users) > 1) madvise(first, (size_t)(end - first), LENT);
    leave(pages);
}

void aq_pages_close(aq_pages *pages) {
    if (pages) leave(pages);
}
