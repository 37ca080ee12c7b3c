/* checksum_avx2.c - the same function for processors that have AVX2, more than twice as fast there. xxHash chooses its
 * instructions when it is compiled, so it is compiled once more. */
#ifdef __x86_64__

#include <immintrin.h>

#include "internal.h"
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2"))), apply_to = function)
#else
#pragma GCC target("avx2")
#endif
#define XXH_VECTOR 2 /* XXH_AVX2 */
#define XXH_INLINE_ALL
#include <xxhash.h>

uint64_t kvo_checksum_avx2(const void *data, size_t bytes) { return XXH3_64bits(data, bytes); }

#ifdef __clang__
#pragma clang attribute pop
#endif

#else

typedef int kvo_no_avx2; /* a file of C must declare something */

#endif
