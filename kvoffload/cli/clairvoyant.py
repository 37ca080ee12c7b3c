"""The most that any policy could hit: what one would that knows the trace to come.

Belady, "A study of replacement algorithms for a virtual-storage computer", IBM Systems Journal, 1966.
"""

import heapq
from collections.abc import Hashable, Sequence


def clairvoyant_hits(requests: Sequence[Sequence[Hashable]], capacity: int) -> int:
    """Blocks found in a tier of so many blocks, in which after each request those stay that are used again soonest.

    This is a bound and is reached. Hits are the gaps between two uses of a block through which the block is kept; at most
    `capacity` gaps may overlap, and dropping the one that ends last leaves most of them. A hit counts only if all blocks
    before it hit too, but whoever uses a block uses those before it: they are used again no later, and where equal the
    deeper goes first, so that none is kept whose prefix is not. Not keeping a block at all is allowed. The bound holds for
    requests that come one after the other and for one tier; a drive that must take every block can do less.
    """
    following = _next_uses(requests)
    there: dict[Hashable, tuple[int, int]] = {}
    heap: list[tuple[int, int, int]] = []  # what goes first: farthest next use, deepest, and where to find its key
    hits = 0
    for request, uses in zip(requests, following, strict=True):
        hits += next((place for place, key in enumerate(request) if key not in there), len(request))
        for place, (key, use) in enumerate(zip(request, uses, strict=True)):
            there.pop(key, None)
            if use < len(requests):
                there[key] = (-use, -place)
                heapq.heappush(heap, (-use, -place, place))
        while len(there) > capacity:
            use, depth, place = heapq.heappop(heap)
            key = requests[-use][place]
            if there.get(key) == (use, depth):
                del there[key]
    return hits


def _next_uses(requests: Sequence[Sequence[Hashable]]) -> list[list[int]]:
    """Of each block of each request, the number of the next request that uses it; their count if there is none."""
    coming: dict[Hashable, int] = {}
    following = []
    for number in range(len(requests) - 1, -1, -1):
        following.append([coming.get(key, len(requests)) for key in requests[number]])
        coming.update(dict.fromkeys(requests[number], number))
    following.reverse()
    return following
