"""Blocks by how often and how lately they were used, so that the least wanted is found fast. Scheduler side, one thread."""

import heapq
import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

STEPS = 2  # levels for each doubling of the uses
STALE = 2  # times as many entries as count may be in a heap, and SLACK more, before it is swept
SLACK = 64


def level_of(uses: float) -> int:
    return int(STEPS * math.log2(uses) + 0.5)


class Levels:
    """One heap for each level, oldest use first. Ageing is the same for all, so within a level the oldest goes first whatever
    the half-life of uses is, and only the levels' oldest need be compared: another half-life costs nothing to change to.

    An entry is one number, when the frame was last used and below it the frame. It counts while it is what `_entries` has for
    the frame; others are passed over when they come up, or swept out when they are many.
    """

    def __init__(self, frames: int):
        self._bits = max(1, frames).bit_length()
        self._mask = (1 << self._bits) - 1
        self._entries = [0] * frames  # 0: the frame is not among those that may be popped
        self._heaps: dict[int, list[int]] = {}
        self._limits: dict[int, int] = {}
        self._count = 0

    def push(self, frame: int, used: int, level: int) -> None:
        """REQUIRES: `used` is above 0; of a frame that is there already, it is above what it was."""
        heap = self._heaps.get(level)
        if heap is None:
            heap = self._heaps[level] = []
            self._limits[level] = SLACK
        if not self._entries[frame]:
            self._count += 1
        entry = self._entries[frame] = used << self._bits | frame
        heapq.heappush(heap, entry)
        if len(heap) > self._limits[level]:
            entries, mask = self._entries, self._mask
            heap[:] = {entry for entry in heap if entries[entry & mask] == entry}
            heapq.heapify(heap)
            self._limits[level] = SLACK + STALE * len(heap)

    def fill(self, frames: NDArray[np.int64], used: NDArray[np.int64]) -> None:
        """All of level 0, in the order of `used`. REQUIRES: nothing was pushed before."""
        heap: list[int] = (used << self._bits | frames).tolist()
        entries = np.zeros(len(self._entries), object)
        entries[frames] = heap
        self._entries = entries.tolist()
        self._heaps[0], self._limits[0] = heap, SLACK + STALE * len(heap)
        self._count = len(heap)

    def drop(self, frame: int) -> None:
        """The frame's entry counts no more. Nothing if there is none."""
        if self._entries[frame]:
            self._entries[frame] = 0
            self._count -= 1

    def least(self, half_life: float, spared: Callable[[int], bool]) -> int | None:
        """The least wanted frame that is not `spared`; it stays. An unused half-life weighs as much as half the uses."""
        passed: list[tuple[list[int], int]] = []
        found = None
        while (heap := self._least_heap(half_life)) is not None:
            frame = heap[0] & self._mask
            if not spared(frame):
                found = frame
                break
            passed.append((heap, heapq.heappop(heap)))
        for heap, entry in passed:
            heapq.heappush(heap, entry)
        return found

    def _least_heap(self, half_life: float) -> list[int] | None:
        entries, mask, bits = self._entries, self._mask, self._bits
        best, least = None, math.inf
        for level, heap in self._heaps.items():
            while heap and entries[heap[0] & mask] != heap[0]:
                heapq.heappop(heap)
            if heap:
                worth = level / STEPS + (heap[0] >> bits) / half_life
                if worth < least:
                    best, least = heap, worth
        return best

    def __contains__(self, frame: int) -> bool:
        return self._entries[frame] != 0

    def __len__(self) -> int:
        return self._count
