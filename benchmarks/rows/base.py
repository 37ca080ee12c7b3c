"""What the rows of the drive benchmark have in common: where they work, what they write, what they report."""

import ctypes
import functools
import mmap
import os
import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, Self

import numpy as np

PAGE = 4096
HUGE_PAGE = 2 * 2**20
CONTENTS = 4096


class RowError(Exception):
    """A row cannot be measured, or delivered other bytes than were stored; one sentence."""


@dataclass(frozen=True)
class Place:
    """Where slots of one size are measured."""

    folder: Path
    medium: str  # "drive", or "tmpfs", where nothing asks for O_DIRECT by itself
    slot_bytes: int
    slots: int
    memory_bytes: int  # of buffers, for each row
    depths: dict[str, int] = field(default_factory=lambda: {"write": 16, "read": 16})
    """What is outstanding at once where latency is measured; fio chooses it."""

    @property
    def file(self) -> Path:
        """One for all rows that keep slots in one file: where a file lies on a drive decides up to a fifth of its rate."""
        return self.folder / "shared.slots"

    @property
    def buffers(self) -> int:
        return max(2, min(self.slots, self.memory_bytes // self.slot_bytes))


@dataclass(frozen=True)
class Sample:
    """One pass over the slots in one direction."""

    nbytes: int  # of whole slots
    seconds: float
    cpu_seconds: float
    p50_ms: float
    p99_ms: float

    @property
    def gb_per_s(self) -> float:
        return self.nbytes / self.seconds / 1e9

    @property
    def cpu_s_per_gib(self) -> float:
        return self.cpu_seconds / (self.nbytes / 2**30)


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


class Stopwatch:
    """Wall clock and CPU time (user and system, of all threads of this process, the kernel's io_uring workers too)."""

    def __enter__(self) -> Self:
        self._cpu, self._wall = self._cpu_now(), time.perf_counter()
        return self

    def __exit__(self, *_exception: object) -> None:
        self.seconds = time.perf_counter() - self._wall
        self.cpu_seconds = self._cpu_now() - self._cpu

    @staticmethod
    def _cpu_now() -> float:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        return usage.ru_utime + usage.ru_stime

    def sample(self, nbytes: int, latencies_ms: np.ndarray) -> Sample:
        p50, p99 = np.percentile(latencies_ms, (50, 99))
        return Sample(nbytes, self.seconds, self.cpu_seconds, float(p50), float(p99))


def settle(folder: Path) -> None:
    """Waits until metadata and dirty pages of one row are written, so that they are not written at another's cost."""
    fd = os.open(folder, os.O_RDONLY)
    ctypes.CDLL(None).syncfs(fd)
    os.close(fd)


@functools.cache
def pool(largest: int) -> np.ndarray:
    """Random bytes in which content c, of at most `largest` bytes, begins at page c."""
    return np.random.default_rng(0).integers(0, 256, CONTENTS * PAGE + largest, dtype=np.uint8)


def content(number: int, nbytes: int) -> np.ndarray:
    start = number % CONTENTS * PAGE
    return pool(16 * 2**20)[start : start + nbytes]


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
