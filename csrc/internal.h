/* internal.h - the parts below the engine: monotonic time, checksums, the arena and slot files. */
#ifndef KVO_INTERNAL_H
#define KVO_INTERNAL_H

#include <stdbool.h>
#include <time.h>

#include "kvo.h"

/* For xxHash, which must be included after this: bytes it fetches ahead. What is summed here was not touched by this processor
 * before, or long ago; with xxHash's own 384 a sum took 4 to 13 % more processor time. */
#define XXH_PREFETCH_DIST 2048

#define KVO_FILES_MAX 64u
#define KVO_EXTENT_BYTES (64ull << 20)
#define KVO_EXTENT_SLOTS 8u

static inline uint64_t kvo_now_us(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000u + (uint64_t)now.tv_nsec / 1000u;
}

static inline uint64_t kvo_round_up(uint64_t bytes, uint64_t unit) { return (bytes + unit - 1) / unit * unit; }

/* time + delay, or the end of time */
static inline uint64_t kvo_later(uint64_t time, uint64_t delay) {
    return delay > UINT64_MAX - time ? UINT64_MAX : time + delay;
}

uint64_t kvo_checksum(const void *data, size_t bytes);
uint64_t kvo_checksum_avx2(const void *data, size_t bytes);

/* ---- arena.c: the memory of all physical slots ---- */

typedef struct {
    uint8_t *base;  /* aligned to 2 MiB */
    uint64_t bytes; /* a multiple of 2 MiB */
    void *mapping;  /* what mmap returned, and how much of it */
    uint64_t mapped;
    bool hugetlb;
    int advice_error; /* errno of MADV_HUGEPAGE, 0 if it was taken */
} kvo_arena;

int kvo_arena_open(kvo_arena *arena, uint64_t bytes);
void kvo_arena_close(kvo_arena *arena);
/* Bytes that lie on huge pages now. Reads /proc/self/smaps: milliseconds. */
uint64_t kvo_arena_huge_bytes(const kvo_arena *arena);

/* ---- slotfile.c: what lies on the medium ---- */

/* What a slot holds. */
typedef struct {
    uint64_t generation;
    uint64_t bytes;
    uint8_t key_len;
    uint8_t key[KVO_KEY_BYTES];
} kvo_block;

typedef struct {
    int fd;
    bool direct;
    int direct_error; /* errno with which O_DIRECT was refused */
    char *path;
    uint64_t slot_bytes;
    uint32_t slots;     /* it may hold */
    uint32_t allocated; /* it has room for now */
} kvo_file;

static inline uint64_t kvo_file_offset(const kvo_file *file, uint32_t index) {
    return KVO_SUPERBLOCK_BYTES + index * file->slot_bytes;
}

/* What a superblock must say for a file to be opened, and how many directories before its name are our own. */
typedef struct {
    uint64_t payload_bytes;
    uint32_t path_index, path_count;
    const uint8_t *fingerprint;
    uint32_t own_directories;
} kvo_expected;

/* Opens and checks a slot file; `slots` is how many it may hold. 0 or -errno with a sentence in err. */
int kvo_file_open(kvo_file *file, const char *path, const kvo_expected *expected, uint32_t slots,
                  char err[KVO_ERR_BYTES]);
void kvo_file_close(kvo_file *file);
/* Makes room for `wanted` slots, or for `needed` if the medium has no more, or for none. 0 with what was reached, or
 * -errno. Blocks. The caller sets file->allocated when it takes the outcome in. */
int kvo_file_grow(const kvo_file *file, uint32_t needed, uint32_t wanted, uint32_t *reached);

/* Completes a slot in memory, payload in place, for being written as SSD slot `ssd_slot`. */
void kvo_slot_seal(uint8_t *slot, const kvo_block *block, uint32_t ssd_slot, const uint8_t *fingerprint);

/* Whether a slot read from SSD slot `ssd_slot` is exactly this block. */
bool kvo_slot_verify(const uint8_t *slot, const kvo_block *block, uint32_t ssd_slot, const uint8_t *fingerprint);

#endif
