"""Least recently used first."""

import heapq
from collections.abc import Container, Sequence

from kvoffload.types import BlockKey


class LRU:
    """A heap with lazy deletion rather than an ordered dict: a block that comes or is released long after its last use (its
    demotion ended, its load failed) takes its place by that last use, not at the young end.
    """

    def __init__(self, capacity: int):
        self._used: dict[BlockKey, int] = {}
        self._held: set[BlockKey] = set()
        self._heap: list[tuple[int, BlockKey]] = []

    def enter(self, key: BlockKey, used: int, depth: int) -> None:
        self._used[key] = used
        self._held.add(key)

    def recover(self, keys: Sequence[BlockKey], used: Sequence[int]) -> None:
        self._used = dict(zip(keys, used, strict=True))
        self._heap = list(zip(used, keys, strict=True))  # ascending, so a heap

    def use(self, key: BlockKey, now: int, again: bool) -> None:
        if key not in self._used:
            return
        self._used[key] = now
        if key not in self._held:
            self._push(key, now)

    def hold(self, key: BlockKey) -> None:
        if key in self._used:
            self._held.add(key)

    def release(self, key: BlockKey) -> None:
        if key in self._held:
            self._held.remove(key)
            self._push(key, self._used[key])

    def leave(self, key: BlockKey) -> None:
        self._used.pop(key, None)
        self._held.discard(key)

    def _push(self, key: BlockKey, used: int) -> None:
        heapq.heappush(self._heap, (used, key))
        if len(self._heap) > 64 + 4 * len(self._used):
            self._heap = [(used, key) for key, used in self._used.items() if key not in self._held]
            heapq.heapify(self._heap)

    def victim(self, *exempt: Container[BlockKey]) -> BlockKey | None:
        passed: list[tuple[int, BlockKey]] = []
        found = None
        while self._heap:
            used, key = heapq.heappop(self._heap)
            if self._used.get(key) != used or key in self._held:
                continue  # gone, or used again or held since this entry was pushed
            for keys in exempt:
                if key in keys:
                    passed.append((used, key))
                    break
            else:
                del self._used[key]
                found = key
                break
        for entry in passed:
            heapq.heappush(self._heap, entry)
        return found

    def __contains__(self, key: BlockKey) -> bool:
        return key in self._used

    def evictable(self, key: BlockKey) -> bool:
        return key in self._used and key not in self._held

    def __len__(self) -> int:
        return len(self._used) - len(self._held)
