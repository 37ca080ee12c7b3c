/* arena.c - one mapping on huge pages. Direct I/O into huge pages pins one page where it would pin 512, which about
 * doubles what a drive delivers. */
#define _GNU_SOURCE
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>

#include "internal.h"

#define HUGE_PAGE (2ull << 20)

static void *map(uint64_t bytes, int flags) {
    void *at = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | flags, -1, 0);
    return at == MAP_FAILED ? NULL : at;
}

/* Reserved huge pages, every one of them touched: a container's limit may deny a page that mmap promised, and that
 * shows as SIGBUS when it is touched later, but as an error when it is asked for like this. */
static void *map_reserved(uint64_t bytes) {
    void *at = map(bytes, MAP_HUGETLB | (21 << MAP_HUGE_SHIFT));
    if (at == NULL || madvise(at, bytes, MADV_POPULATE_WRITE) == 0) return at;
    munmap(at, bytes);
    return NULL;
}

int kvo_arena_open(kvo_arena *arena, uint64_t bytes) {
    *arena = (kvo_arena){.bytes = kvo_round_up(bytes, HUGE_PAGE)};
    arena->mapped = arena->bytes;
    arena->mapping = map_reserved(arena->mapped);
    arena->hugetlb = arena->mapping != NULL;
    if (!arena->hugetlb) {
        arena->mapped = arena->bytes + HUGE_PAGE; /* room to align */
        arena->mapping = map(arena->mapped, MAP_NORESERVE);
        if (arena->mapping == NULL) return -errno;
    }
    arena->base = (uint8_t *)arena->mapping;
    arena->base += kvo_round_up((uintptr_t)arena->base, HUGE_PAGE) - (uintptr_t)arena->base;
    if (!arena->hugetlb && madvise(arena->base, arena->bytes, MADV_HUGEPAGE) != 0) arena->advice_error = errno;
    /* A child must not make these pages copy-on-write while a drive reads into them. */
    if (madvise(arena->mapping, arena->mapped, MADV_DONTFORK) != 0) {
        int error = errno;
        kvo_arena_close(arena);
        return -error;
    }
    return 0;
}

void kvo_arena_close(kvo_arena *arena) {
    if (arena->mapping != NULL) munmap(arena->mapping, arena->mapped);
    arena->mapping = NULL;
}

uint64_t kvo_arena_huge_bytes(const kvo_arena *arena) {
    if (arena->hugetlb) return arena->bytes;
    FILE *smaps = fopen("/proc/self/smaps", "re");
    if (smaps == NULL) return 0;
    uint64_t low = (uintptr_t)arena->base, high = low + arena->bytes, huge = 0;
    bool inside = false;
    char line[512];
    while (fgets(line, sizeof line, smaps) != NULL) {
        uint64_t from, to, kib;
        if (sscanf(line, "%" SCNx64 "-%" SCNx64 " ", &from, &to) == 2) inside = from < high && to > low;
        else if (inside && sscanf(line, "AnonHugePages: %" SCNu64, &kib) == 1) huge += kib << 10;
    }
    fclose(smaps);
    return huge < arena->bytes ? huge : arena->bytes;
}
