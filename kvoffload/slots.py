"""Free slots of one tier. Scheduler side, one thread."""

import heapq


class SlotPool:
    """Hands out slot numbers 0 .. count-1, the lowest free one first, so that slot files grow from the front."""

    def __init__(self, count: int):
        self.count = count
        self._untouched = 0  # slots from here on were never handed out
        self._returned: list[int] = []  # heap of slots given back

    def take(self) -> int | None:
        """A free slot, or None when all are taken."""
        if self._returned:
            return heapq.heappop(self._returned)
        if self._untouched == self.count:
            return None
        self._untouched += 1
        return self._untouched - 1

    def give_back(self, slot: int) -> None:
        heapq.heappush(self._returned, slot)

    def claim(self, slots: set[int]) -> None:
        """Marks slots as taken that a recovered store owns. REQUIRES: no slot was taken before."""
        self._untouched = max(slots, default=-1) + 1
        self._returned = [slot for slot in range(self._untouched) if slot not in slots]

    def free(self) -> int:
        return self.count - self._untouched + len(self._returned)

    def is_free(self, slot: int) -> bool:
        """For checks only: linear in the slots given back."""
        return slot >= self._untouched or slot in self._returned
