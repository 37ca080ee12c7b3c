/* ring.h - the arithmetic of a bounded queue. The elements lie in an array of the owner's; a ring only says which
 * one is next. Not synchronised: the owner holds a lock. */
#ifndef KVO_RING_H
#define KVO_RING_H

#include <stdbool.h>
#include <stdint.h>

typedef struct {
    uint32_t capacity, first, count;
} kvo_ring;

/* The place of a new last element. REQUIRES: not full. */
static inline uint32_t kvo_ring_push(kvo_ring *ring) {
    uint32_t room = ring->capacity - ring->first; /* elements before the array's end */
    uint32_t at = ring->count < room ? ring->first + ring->count : ring->count - room;
    ring->count++;
    return at;
}

/* The place of the first element, which leaves the queue. REQUIRES: not empty. */
static inline uint32_t kvo_ring_pop(kvo_ring *ring) {
    uint32_t at = ring->first;
    ring->first = at + 1 == ring->capacity ? 0 : at + 1;
    ring->count--;
    return at;
}

#endif
