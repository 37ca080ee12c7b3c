/* checksum.c - XXH3-64, compiled in: no xxHash library is needed at run time. */
#include "internal.h"

#define XXH_INLINE_ALL
#include <xxhash.h>

uint64_t kvo_checksum(const void *data, size_t bytes) {
#ifdef __x86_64__
    if (__builtin_cpu_supports("avx2")) return kvo_checksum_avx2(data, bytes);
#endif
    return XXH3_64bits(data, bytes);
}
