"""What is kept of blocks by frame: the part that policies by age have in common. Scheduler side, one thread."""

from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from kvoffload.policy.levels import Levels
from kvoffload.types import BlockKey


class Aged(ABC):
    """A block that comes or is released long after its last use (its demotion ended, its load failed) takes its place by that
    last use, not at the young end: so heaps, and no queue.
    """

    def __init__(self, capacity: int):
        self._used = array("Q", bytes(8 * capacity))  # 0: the frame is empty
        self._level = bytearray(capacity)
        self._levels = Levels(capacity)  # those that are evictable

    @abstractmethod
    def enter(self, frame: int, key: BlockKey, used: int, depth: int) -> None: ...

    @abstractmethod
    def victim(self, spared: Callable[[int], bool]) -> int | None: ...

    def recover(self, frames: NDArray[np.int64], used: NDArray[np.int64]) -> None:
        np.frombuffer(self._used, np.uint64)[frames] = used
        self._levels.fill(frames, used)

    def hold(self, frame: int) -> None:
        self._levels.drop(frame)

    def release(self, frame: int) -> None:
        if frame not in self._levels:
            self._levels.push(frame, self._used[frame], self._level[frame])

    def leave(self, frame: int) -> None:
        self._used[frame] = 0
        self._levels.drop(frame)

    def evict(self, frame: int, key: BlockKey) -> None:
        self._used[frame] = 0
        self._levels.drop(frame)

    def __contains__(self, frame: int) -> bool:
        return self._used[frame] != 0

    def evictable(self, frame: int) -> bool:
        return frame in self._levels

    def __len__(self) -> int:
        return len(self._levels)
