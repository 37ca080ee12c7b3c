"""Which block leaves a tier first. Scheduler side, one thread.

A policy holds only blocks that may be evicted right now; the block manager takes a block off the list while it is in
use, so an in-use block cannot be found by an eviction.
"""

import heapq
from collections.abc import Container
from typing import Protocol

from kvoffload.types import BlockKey


class EvictionPolicy(Protocol):
    def add(self, key: BlockKey, used: int) -> None:
        """The block became evictable; it was last used at time `used` (a counter, not seconds)."""

    def remove(self, key: BlockKey) -> None:
        """The block is in use or gone. Nothing happens if it was not on the list."""

    def victim(self, *exempt: Container[BlockKey]) -> BlockKey | None:
        """Takes the next block to evict off the list, leaving those in `exempt`; None if there is none."""

    def __contains__(self, key: BlockKey) -> bool: ...

    def __len__(self) -> int: ...


class LRU:
    """Least recently used first.

    A heap with lazy deletion rather than an ordered dict: a block that becomes evictable long after its last use
    (its demotion ended, its load failed) takes its place by that last use, not at the young end.
    """

    def __init__(self) -> None:
        self._used: dict[BlockKey, int] = {}
        self._heap: list[tuple[int, BlockKey]] = []

    def add(self, key: BlockKey, used: int) -> None:
        if self._used.get(key) == used:
            return
        self._used[key] = used
        heapq.heappush(self._heap, (used, key))
        if len(self._heap) > 64 + 4 * len(self._used):
            self._heap = [(used, key) for key, used in self._used.items()]
            heapq.heapify(self._heap)

    def remove(self, key: BlockKey) -> None:
        self._used.pop(key, None)

    def victim(self, *exempt: Container[BlockKey]) -> BlockKey | None:
        passed: list[tuple[int, BlockKey]] = []
        found = None
        while self._heap:
            used, key = heapq.heappop(self._heap)
            if self._used.get(key) != used:
                continue  # removed, or used again since this entry was pushed
            if any(key in keys for keys in exempt):
                passed.append((used, key))
                continue
            del self._used[key]
            found = key
            break
        for entry in passed:
            heapq.heappush(self._heap, entry)
        return found

    def __contains__(self, key: BlockKey) -> bool:
        return key in self._used

    def __len__(self) -> int:
        return len(self._used)
