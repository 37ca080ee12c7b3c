"""What the rows of the drive benchmark have in common: where they work, what they write, what they report."""

import mmap
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from kvoffload.cli.passes import PAGE, Place, RowError, Sample, Stopwatch, content, pool, settle

__all__ = ["PAGE", "Place", "RowError", "Sample", "Stopwatch", "content", "pool", "settle"]  # shared with `kvoffload bench`

HUGE_PAGE = 2 * 2**20


def make_file(place: Place) -> None:
    """The shared file: a page for a superblock, then every slot, written once."""
    direct = os.O_DIRECT if place.medium == "drive" else 0
    fd = os.open(place.file, os.O_WRONLY | os.O_CREAT | direct, 0o600)
    buffer = HugeBuffers(1, place.slot_bytes).views[0]
    os.pwrite(fd, buffer[:PAGE], 0)
    for slot in range(place.slots):
        os.pwrite(fd, buffer, PAGE + slot * place.slot_bytes)
    os.close(fd)


class Row(Protocol):
    name: str

    def prepare(self, place: Place) -> None:
        """Makes what it needs at one place, where the shared file is; a row is prepared and closed once for each."""

    def write(self, order: np.ndarray) -> Sample:
        """Writes each of these slots once; the first call writes all of them."""

    def read(self, order: np.ndarray) -> Sample:
        """Reads each of these slots once. No other row has written since this one's last write."""

    def check(self, slots: Sequence[int]) -> int:
        """Reads slots into memory that was cleared and compares with what was written; returns how many it compared."""

    def notes(self) -> list[str]:
        """What a reader of this row's figures must know."""

    def close(self) -> None:
        """May be called at any time, and twice."""


class HugeBuffers:
    """Private memory on transparent huge pages: buffer i holds content i."""

    def __init__(self, count: int, nbytes: int) -> None:
        length = -(-count * nbytes // HUGE_PAGE) * HUGE_PAGE
        self._mapping = mmap.mmap(-1, length + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._mapping.madvise(mmap.MADV_HUGEPAGE)
        whole = np.frombuffer(self._mapping, np.uint8)
        start = -whole.ctypes.data % HUGE_PAGE
        self._address = whole.ctypes.data + start
        self.array = whole[start : start + count * nbytes].reshape(count, nbytes)
        for number in range(count):
            self.array[number] = content(number, nbytes)
        self.views = [memoryview(row) for row in self.array]

    def huge_bytes(self) -> int:
        """How much of the mapping the kernel put on huge pages."""
        inside = False
        for line in Path("/proc/self/smaps").read_text().splitlines():
            name, *values = line.split()
            if "-" in name:
                low, high = (int(end, 16) for end in name.split("-"))
                inside = low <= self._address < high
            elif inside and name == "AnonHugePages:":
                return min(int(values[0]) * 1024, self.array.nbytes)
        return 0
