"""What is held: the part that policies made of queues have in common. Scheduler side, one thread."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, MutableMapping

import numpy as np
from numpy.typing import NDArray

from kvoffload.types import BlockKey


class Holding(ABC):
    """A queue policy leaves held blocks in their queues and passes over them: their places are what it knows of them."""

    def __init__(self) -> None:
        self._held: set[int] = set()  # frames
        self._where: dict[int, MutableMapping[int, int]] = {}  # the queue each frame's block is in

    @abstractmethod
    def enter(self, frame: int, key: BlockKey, used: int, answer: int) -> None: ...

    def recover(self, frames: NDArray[np.int64], used: NDArray[np.int64]) -> None:
        for frame, now in zip(frames.tolist(), used.tolist(), strict=True):
            self.enter(frame, b"", now, 0)
        self._held.clear()

    def hold(self, frame: int) -> None:
        if frame in self._where:
            self._held.add(frame)

    def release(self, frame: int) -> None:
        self._held.discard(frame)

    def leave(self, frame: int) -> None:
        queue = self._where.pop(frame, None)
        if queue is not None:
            del queue[frame]
            self._held.discard(frame)

    def evict(self, frame: int, key: BlockKey) -> None:
        self.leave(frame)

    def __contains__(self, frame: int) -> bool:
        return frame in self._where

    def evictable(self, frame: int) -> bool:
        return frame in self._where and frame not in self._held

    def __len__(self) -> int:
        return len(self._where) - len(self._held)

    def _first(self, queue: Iterable[int], spared: Callable[[int], bool]) -> int | None:
        return next((frame for frame in queue if frame not in self._held and not spared(frame)), None)
