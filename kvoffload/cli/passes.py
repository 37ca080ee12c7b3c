"""Timed passes of the real engine over the slots of one file: WRITE and READ between DRAM slots and the file, header and
checksum as always. `kvoffload bench`, `kvoffload doctor` and the benchmarks measure with it.

Throughput: as much is outstanding as there are DRAM slots, so that the engine chooses what is in the drive (its io_depth).
Latency, from submission to completion: a pass of its own, untimed, with little outstanding.
"""

import ctypes
import functools
import math
import os
import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import numpy as np

from kvoffload.engine import Engine
from kvoffload.engine.reference import pack_superblock
from kvoffload.errors import UserError
from kvoffload.layout import HEADER_BYTES
from kvoffload.types import OP_DTYPE, EngineOptions, OpFlag, OpKind, Region, SlotFiles

PAGE = 4096
CONTENTS = 4096
OPS_MAX = 4096
SPARE_SLOTS = 4
NAP_ABOVE = 512  # outstanding operations: milliseconds of work, so that the driver may look away for one
NAP_S = 0.001
WAIT_S = 60.0
LATENCY_BYTES = 256 * 2**20
LATENCY_SHARE = 4  # of the time of a timed pass
FINGERPRINT = bytes(16)
KEY = np.frombuffer(b"benchmark".ljust(40, b"\0"), np.uint8)


class RowError(UserError):
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


class EngineRow:
    """The C engine. `contents` are kept for DRAM and SSD slots as a manager would keep keys: generation = content."""

    is_fast = True

    def __init__(self, name: str, io_backend: str) -> None:
        self.name, self.io_backend = name, io_backend
        self.engine = None

    def open(self, options: EngineOptions):
        return Engine(options)

    def prepare(self, place: Place) -> None:
        self.place = place
        self.payload = place.slot_bytes - HEADER_BYTES
        path = self.make_file()
        options = EngineOptions(self.payload, place.buffers, SPARE_SLOTS, OPS_MAX, io_backend=self.io_backend)
        self.engine = self.open(options)
        self.scratch = np.zeros(self.payload, np.uint8)
        source = Region(pool(16 * 2**20).ctypes.data, PAGE, self.payload)
        self.engine.bind([[source], [Region(self.scratch.ctypes.data, self.payload, self.payload)]])
        self.engine.attach(SlotFiles((str(path),), place.slots, FINGERPRINT))
        self.in_dram = np.arange(place.buffers)
        self.on_ssd = np.zeros(place.slots, int)
        ops = self._ops(OpKind.COPY_OUT, self.in_dram)
        ops["dram_slot"] = ops["kv_block"] = ops["generation"] = self.in_dram
        self._run(ops)

    def make_file(self) -> Path:
        with self.place.file.open("r+b") as file:
            file.write(pack_superblock(self.payload, FINGERPRINT, 0, 1, 0, 1))
        return self.place.file

    @staticmethod
    def _ops(kind: OpKind, order: np.ndarray) -> np.ndarray:
        ops = np.zeros(len(order), OP_DTYPE)
        ops["id"], ops["kind"], ops["key_len"], ops["key"] = np.arange(len(order)), kind, 9, KEY
        if kind in (OpKind.WRITE, OpKind.READ):
            ops["ssd_slot"] = order
        return ops

    def _run(self, ops: np.ndarray) -> None:
        """Operations with nothing in common."""
        if self.engine.submit(ops) != len(ops):
            raise RowError(f"{self.name}: the engine had no room for {len(ops)} operations")
        done = 0
        while done < len(ops):
            self.engine.wait(WAIT_S)
            done += len(self._polled())

    def _polled(self) -> np.ndarray:
        completions = self.engine.poll(OPS_MAX)
        if completions["status"].any():
            worst = completions[completions["status"] != 0][0]
            raise RowError(f"{self.name}: operation {worst['id']} failed ({os.strerror(-worst['status'])}): check the drive")
        return completions

    def _move(self, kind: OpKind, order: np.ndarray, outstanding_max: int, until: float = math.inf) -> np.ndarray:
        """Each operation gets a DRAM slot of its own while it runs. Returns microseconds by operation.

        until: of the clock, when no more are started; some are in any case.
        """
        ops, usec = self._ops(kind, order), np.zeros(len(order))
        last = len(ops)
        slot_of = ops["dram_slot"]
        free, free_count = np.arange(self.place.buffers), self.place.buffers
        sent = done = 0
        while done < last:
            if sent and time.perf_counter() >= until:
                last = sent
            room = min(outstanding_max - (sent - done), free_count, last - sent)
            if room > 0:
                batch = ops[sent : sent + room]
                batch["dram_slot"] = free[free_count - room : free_count]
                self._note_contents(kind, batch)
                if self.engine.submit(batch) != room:
                    raise RowError(f"{self.name}: the engine had no room for {room} operations")
                free_count -= room
                sent += room
            if sent - done > NAP_ABOVE:
                time.sleep(NAP_S)
            elif done < last and not self.engine.wait(WAIT_S):
                raise RowError(f"{self.name}: nothing completed within {WAIT_S:.0f} s")
            completions = self._polled()
            ids = completions["id"]
            usec[ids] = completions["usec"]
            free[free_count : free_count + len(ids)] = slot_of[ids]
            free_count += len(ids)
            done += len(ids)
        return usec[:last]

    def _note_contents(self, kind: OpKind, batch: np.ndarray) -> None:
        if kind == OpKind.WRITE:
            self.on_ssd[batch["ssd_slot"]] = batch["generation"] = self.in_dram[batch["dram_slot"]]
        else:
            self.in_dram[batch["dram_slot"]] = batch["generation"] = self.on_ssd[batch["ssd_slot"]]

    def _pass(self, kind: OpKind, direction: str, order: np.ndarray) -> Sample:
        few = self.place.depths[direction]
        most = OPS_MAX if self.is_fast else few
        with Stopwatch() as watch:
            latencies = self._move(kind, order, most)
        if most > few:
            some = max(2 * few, LATENCY_BYTES // self.place.slot_bytes)
            latencies = self._move(kind, order[:some], few)
        return watch.sample(len(order) * self.place.slot_bytes, latencies / 1e3)

    def write(self, order: np.ndarray) -> Sample:
        return self._pass(OpKind.WRITE, "write", order)

    def read(self, order: np.ndarray) -> Sample:
        return self._pass(OpKind.READ, "read", order)

    def repeat(self, kind: OpKind, order: np.ndarray, seconds: float) -> Sample:
        """Passes over the slots for so long, and then some operations with little outstanding, for their latency."""
        moved = 0
        with Stopwatch() as watch:
            end = time.perf_counter() + seconds
            while not moved or time.perf_counter() < end:
                moved += len(self._move(kind, order, OPS_MAX, end))
        few = self.place.depths["write" if kind == OpKind.WRITE else "read"]
        latencies = self._move(kind, order, few, time.perf_counter() + seconds / LATENCY_SHARE)
        return watch.sample(moved * self.place.slot_bytes, latencies / 1e3)

    def check(self, slots: Sequence[int]) -> int:
        for slot in slots:
            self.scratch[:] = 0
            ops = self._ops(OpKind.READ, np.array([slot, slot]))
            ops["kind"][1], ops["flags"][0], ops["group"] = OpKind.COPY_IN, OpFlag.LINK, 1
            ops["generation"] = self.in_dram[0] = self.on_ssd[slot]
            self._run(ops)
            if not np.array_equal(self.scratch, content(self.on_ssd[slot], self.payload)):
                raise RowError(f"{self.name}: SSD slot {slot} holds other bytes than were written")
        return len(slots)

    def notes(self) -> list[str]:
        return self.engine.describe()

    def close(self) -> None:
        if self.engine is not None:
            self.engine.close()
