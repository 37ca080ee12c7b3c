"""Least recently used first."""

from collections.abc import Callable

from kvoffload.policy.aged import Aged
from kvoffload.types import BlockKey


class LRU(Aged):
    def enter(self, frame: int, key: BlockKey, used: int, depth: int) -> None:
        self._used[frame] = used

    def use(self, frame: int, key: BlockKey, now: int, again: bool) -> None:
        self._used[frame] = now
        if frame in self._levels:
            self._levels.push(frame, now, 0)

    def victim(self, spared: Callable[[int], bool]) -> int | None:
        return self._levels.least(1.0, spared)  # all are of one level, so that any half-life gives the same order
