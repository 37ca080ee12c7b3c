"""Free slots of one tier or drive. Scheduler side, one thread."""

import heapq
from collections import deque

import numpy as np
from numpy.typing import NDArray


class SlotPool:
    """Hands out the slot numbers of a range, the lowest free one first, so that slot files grow from the front.

    Slots given back as the last to be tried again come after all others, the longest waiting first.
    """

    def __init__(self, slots: range):
        self._slots = slots
        self.count = len(slots)
        self._untouched = 0  # places in the range from here on were never handed out
        self._returned: list[int] = []  # heap of slots given back
        self._last: deque[int] = deque()

    def take(self, used_before: bool = False) -> int | None:
        """A free slot, or None when all are taken; with `used_before` only one that was handed out and given back."""
        if self._returned:
            return heapq.heappop(self._returned)
        if used_before:
            return None
        if self._untouched < self.count:
            self._untouched += 1
            return self._slots[self._untouched - 1]
        return self._last.popleft() if self._last else None

    def give_back(self, slot: int, last: bool = False) -> None:
        if last:
            self._last.append(slot)
        else:
            heapq.heappush(self._returned, slot)

    def claim(self, owned: NDArray[np.uint32]) -> None:
        """Marks slots of its range as taken, which a recovered store owns. REQUIRES: no slot was taken before."""
        places = (owned.astype(np.int64) - self._slots.start) // self._slots.step
        self._untouched = int(places.max(initial=-1)) + 1
        is_free = np.ones(self._untouched, bool)
        is_free[places] = False
        self._returned = [self._slots[place] for place in np.flatnonzero(is_free).tolist()]  # ascending, so a heap

    def free(self) -> int:
        return self.count - self._untouched + len(self._returned) + len(self._last)

    def is_free(self, slot: int) -> bool:
        """For checks only: linear in the slots given back."""
        return self._slots.index(slot) >= self._untouched or slot in self._returned or slot in self._last
