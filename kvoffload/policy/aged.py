"""What is kept of blocks by frame: the part that policies by age have in common. Scheduler side, one thread."""

from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from kvoffload._rows import AgeHeaps
from kvoffload.policy.levels import plain_worths
from kvoffload.types import BlockKey

PASSED_MAX = 256  # spared frames in a row, before nothing is evicted: each slot that is asked for would pass over all of them again


class Aged(ABC):
    """A block that comes or is released long after its last use (its demotion ended, its load failed) takes its place by that
    last use, not at the young end: so heaps, and no queue.
    """

    def __init__(self, capacity: int):
        self._used = array("Q", bytes(8 * capacity))  # 0: the frame is empty
        self._level = bytearray(capacity)
        self._evictable = AgeHeaps(capacity)
        self._worths = plain_worths()

    @abstractmethod
    def enter(self, frame: int, key: BlockKey, used: int, answer: int) -> None: ...

    @abstractmethod
    def half_life(self) -> float:
        """In the manager's time."""

    def victim(self, spared: Callable[[int], bool]) -> int | None:
        evictable, half_life = self._evictable, self.half_life()
        passed: list[int] = []
        frame = evictable.least(self._worths, half_life)
        while frame is not None and len(passed) < PASSED_MAX and spared(frame):
            passed.append(frame)
            evictable.drop(frame)
            frame = evictable.least(self._worths, half_life)
        for other in passed:
            self.release(other)
        return frame if len(passed) < PASSED_MAX else None

    def recover(self, frames: NDArray[np.int64], used: NDArray[np.int64]) -> None:
        np.frombuffer(self._used, np.uint64)[frames] = used
        self._evictable.fill(frames, used)

    def hold(self, frame: int) -> None:
        self._evictable.drop(frame)

    def release(self, frame: int) -> None:
        self._evictable.put(frame, self._used[frame], self._level[frame])

    def leave(self, frame: int) -> None:
        self._used[frame] = 0
        self._evictable.drop(frame)

    def evict(self, frame: int, key: BlockKey) -> None:
        self.leave(frame)

    def __contains__(self, frame: int) -> bool:
        return self._used[frame] != 0

    def evictable(self, frame: int) -> bool:
        return frame in self._evictable

    def __len__(self) -> int:
        return len(self._evictable)
