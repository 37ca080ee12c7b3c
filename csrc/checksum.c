/* checksum.c - XXH3-64, compiled in: no xxHash library is needed at run time. */
#define XXH_INLINE_ALL
#include <xxhash.h>

#include "internal.h"

uint64_t kvo_checksum(const void *data, size_t bytes) { return XXH3_64bits(data, bytes); }
