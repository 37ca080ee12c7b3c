"""kvoffload's engines: WRITE and READ between DRAM slots and a slot file, header and checksum as always.

Throughput: as much is outstanding as there are DRAM slots, so that the engine chooses what is in the drive (its io_depth).
Latency, from submission to completion: a pass of its own, untimed, with as little outstanding as fio has.
"""

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.rows.base import PAGE, Place, RowError, Sample, Stopwatch, content, pool
from kvoffload.engine import Engine
from kvoffload.engine.reference import pack_superblock
from kvoffload.layout import HEADER_BYTES
from kvoffload.types import OP_DTYPE, EngineOptions, OpFlag, OpKind, Region, SlotFiles

OPS_MAX = 4096
SPARE_SLOTS = 4
NAP_ABOVE = 512  # outstanding operations: milliseconds of work, so that the driver may look away for one
NAP_S = 0.001
WAIT_S = 60.0
LATENCY_BYTES = 256 * 2**20
FINGERPRINT = bytes(16)
KEY = np.frombuffer(b"benchmark".ljust(40, b"\0"), np.uint8)


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
            raise RowError(f"{self.name}: operation {worst['id']} failed with status {worst['status']}")
        return completions

    def _move(self, kind: OpKind, order: np.ndarray, outstanding_max: int) -> np.ndarray:
        """Each operation gets a DRAM slot of its own while it runs. Returns microseconds by operation."""
        ops, usec = self._ops(kind, order), np.zeros(len(order))
        slot_of = ops["dram_slot"]
        free, free_count = np.arange(self.place.buffers), self.place.buffers
        sent = done = 0
        while done < len(ops):
            room = min(outstanding_max - (sent - done), free_count, len(ops) - sent)
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
            elif not self.engine.wait(WAIT_S):
                raise RowError(f"{self.name}: nothing completed within {WAIT_S:.0f} s")
            completions = self._polled()
            ids = completions["id"]
            usec[ids] = completions["usec"]
            free[free_count : free_count + len(ids)] = slot_of[ids]
            free_count += len(ids)
            done += len(ids)
        return usec

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
