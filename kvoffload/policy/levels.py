"""Blocks by how often and how lately they were used, so that the least wanted is found fast. Scheduler side, one thread."""

import heapq
import math

from kvoffload.types import BlockKey

# When the block was last used, its key, how often it was used (each use counts less the longer ago it is), and that as a
# level. The same tuple is in a heap and in the dict of what is there, and an entry counts while it is the one in the dict:
# one object for both is what keeps the memory down.
Entry = tuple[int, BlockKey, float, int]

STEPS = 2  # levels for each doubling of the uses
SLACK = 64


def level_of(uses: float) -> int:
    return int(STEPS * math.log2(uses) + 0.5)


class Levels:
    """One heap for each level, oldest use first. Ageing is the same for all, so within a level the oldest goes first whatever
    the half-life of uses is, and only the levels' oldest need be compared: another half-life costs nothing to change to.
    """

    def __init__(self, there: dict[BlockKey, Entry]):
        self._there = there
        self._heaps: dict[int, list[Entry]] = {}
        self._limits: dict[int, int] = {}

    def push(self, entry: Entry) -> None:
        level = entry[3]
        heap = self._heaps.get(level)
        if heap is None:
            heap = self._heaps[level] = []
            self._limits[level] = SLACK
        heapq.heappush(heap, entry)
        if len(heap) > self._limits[level]:
            there = self._there
            heap[:] = {entry[1]: entry for entry in heap if there.get(entry[1]) is entry}.values()
            heapq.heapify(heap)
            self._limits[level] = SLACK + 4 * len(heap)

    def fill(self, entries: list[Entry]) -> None:
        """All of level 0, oldest use first. REQUIRES: nothing was pushed before."""
        self._heaps[0] = entries
        self._limits[0] = SLACK + 4 * len(entries)

    def pop(self, half_life: float) -> Entry | None:
        """Takes out the least wanted entry that counts: an unused half-life weighs as much as half the uses."""
        there, best, least = self._there, None, math.inf
        for level, heap in self._heaps.items():
            while heap and there.get(heap[0][1]) is not heap[0]:
                heapq.heappop(heap)
            if heap:
                worth = level / STEPS + heap[0][0] / half_life
                if worth < least:
                    best, least = heap, worth
        return heapq.heappop(best) if best is not None else None
