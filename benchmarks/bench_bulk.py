"""Engine against a plain loop: 2 MiB slots to and from SSD, in random order.

The engine moves slots between DRAM and SSD (WRITE, READ), header and checksum included. The loop calls os.pwritev and
os.preadv on one preallocated O_DIRECT file, from one buffer on huge pages, without checksum. Both are repeated in turn
in one run, because a drive's speed drifts.

The loop reads into the same 2 MiB again and again, memory that stays in the processor's cache; the engine delivers each
slot to a place of its own. Where a drive's data is copied by a processor, as in a virtual machine, that favours the loop.

    python benchmarks/bench_bulk.py [--folder PATH] [--gib 1] [--repetitions 5] [--io-backend auto]
"""

import argparse
import json
import mmap
import os
import random
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from kvoffload.engine import Engine
from kvoffload.engine.reference import pack_superblock
from kvoffload.layout import HEADER_BYTES
from kvoffload.types import OP_DTYPE, EngineOptions, OpKind, Region, SlotFiles

SLOT_BYTES = 2 * 2**20
PAYLOAD_BYTES = SLOT_BYTES - HEADER_BYTES
DRAM_SLOTS = 64
FINGERPRINT = bytes(16)
KEY = np.frombuffer(b"bench_bulk".ljust(40, b"\0"), np.uint8)


class EngineSide:
    """Blocks 0 .. DRAM_SLOTS-1 lie in the DRAM slots; SSD slot s holds block s % DRAM_SLOTS."""

    def __init__(self, folder: Path, slots: int, io_backend: str, io_depth: int) -> None:
        path = folder / "engine.slots"
        path.write_bytes(pack_superblock(PAYLOAD_BYTES, FINGERPRINT, 0, 1, 0, 1))
        self.engine = Engine(EngineOptions(PAYLOAD_BYTES, DRAM_SLOTS, 4, 4096, io_depth, io_backend))
        self.kv = np.random.default_rng(0).integers(0, 256, (DRAM_SLOTS, PAYLOAD_BYTES), dtype=np.uint8)
        self.engine.bind([[Region(self.kv.ctypes.data, PAYLOAD_BYTES, PAYLOAD_BYTES)]])
        self.engine.attach(SlotFiles((str(path),), slots, FINGERPRINT))
        self.fill()

    def fill(self) -> None:
        self.run(OpKind.COPY_OUT, list(range(DRAM_SLOTS)))

    def run(self, kind: OpKind, slots: list[int]) -> None:
        ops = np.zeros(len(slots), OP_DTYPE)
        ops["id"] = ops["ssd_slot"] = slots
        ops["kind"], ops["key_len"], ops["key"] = kind, 10, KEY
        ops["kv_block"] = ops["dram_slot"] = ops["generation"] = ops["ssd_slot"] % DRAM_SLOTS
        place = {slot: place for place, slot in enumerate(slots)}
        is_done = np.zeros(len(ops) + 1, bool)  # and one that never is
        submitted = oldest = 0
        while oldest < len(ops):
            # A DRAM slot is the target of one READ at a time, so no more than DRAM_SLOTS from the oldest unfinished.
            room = oldest + DRAM_SLOTS if kind == OpKind.READ else len(ops)
            submitted += self.engine.submit(ops[submitted:room])
            self.engine.wait(60)
            for completion in self.engine.poll():
                if completion["status"] != 0:
                    raise OSError(-completion["status"], f"slot {completion['id']} failed")
                is_done[place[int(completion["id"])]] = True
            oldest += int(np.argmin(is_done[oldest:]))

    def write(self, slots: list[int]) -> None:
        self.run(OpKind.WRITE, slots)

    def read(self, slots: list[int]) -> None:
        self.run(OpKind.READ, slots)


class LoopSide:
    def __init__(self, folder: Path, slots: int) -> None:
        self.fd = os.open(folder / "loop.slots", os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o600)
        os.posix_fallocate(self.fd, 0, slots * SLOT_BYTES)
        self.buffer = mmap.mmap(-1, 2 * SLOT_BYTES)
        self.buffer.madvise(mmap.MADV_HUGEPAGE)
        whole = memoryview(self.buffer)
        start = -np.frombuffer(self.buffer, np.uint8).ctypes.data % SLOT_BYTES
        self.slot = whole[start : start + SLOT_BYTES]
        self.slot[:] = np.random.default_rng(0).integers(0, 256, SLOT_BYTES, dtype=np.uint8).tobytes()

    def write(self, slots: list[int]) -> None:
        for slot in slots:
            if os.pwritev(self.fd, [self.slot], slot * SLOT_BYTES) != SLOT_BYTES:
                raise OSError("short write")

    def read(self, slots: list[int]) -> None:
        for slot in slots:
            if os.preadv(self.fd, [self.slot], slot * SLOT_BYTES) != SLOT_BYTES:
                raise OSError("short read")


def gb_per_s(work: Callable[[list[int]], None], slots: list[int]) -> float:
    start = time.perf_counter()
    work(slots)
    return len(slots) * SLOT_BYTES / (time.perf_counter() - start) / 1e9


def measure(arguments: argparse.Namespace, folder: Path) -> tuple[dict[str, list[float]], list[str]]:
    slots = int(arguments.gib * 2**30) // SLOT_BYTES // DRAM_SLOTS * DRAM_SLOTS
    engine_side = EngineSide(folder, slots, arguments.io_backend, arguments.io_depth)
    loop_side = LoopSide(folder, slots)
    rates: dict[str, list[float]] = {f"{way} {side}": [] for way in ("write", "read") for side in ("engine", "loop")}
    for turn in range(arguments.repetitions + 1):
        sides = [("engine", engine_side), ("loop", loop_side)]
        for way in ("write", "read"):
            for side, worker in sides if turn % 2 else sides[::-1]:
                rate = gb_per_s(getattr(worker, way), shuffled(slots, turn))
                if turn > 0:  # the first turn touches memory and extents for the first time
                    rates[f"{way} {side}"].append(rate)
    description = engine_side.engine.describe()
    engine_side.engine.close()
    os.close(loop_side.fd)
    return rates, description


def shuffled(slots: int, seed: int) -> list[int]:
    """A random order in which any DRAM_SLOTS slots in a row that begin a round use distinct DRAM slots."""
    shuffle = random.Random(seed)
    rounds = [list(range(start, start + DRAM_SLOTS)) for start in range(0, slots, DRAM_SLOTS)]
    columns = [shuffle.sample(column, len(column)) for column in zip(*rounds, strict=True)]
    order = list(range(DRAM_SLOTS))
    shuffle.shuffle(order)
    return [columns[column][row] for row in range(len(rounds)) for column in order]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("build/bench_bulk"))
    parser.add_argument("--gib", type=float, default=1.0)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--io-backend", default="auto")
    parser.add_argument("--io-depth", type=int, default=32)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    try:
        rates, description = measure(arguments, arguments.folder)
    finally:
        shutil.rmtree(arguments.folder)
    print("\n".join(description))
    print(f"{arguments.gib} GiB in slots of 2 MiB, {arguments.repetitions} repetitions; GB/s, median (least .. most)")
    result: dict[str, object] = {"rates_gb_s": rates, "description": description}
    for way in ("write", "read"):
        medians = {side: statistics.median(rates[f"{way} {side}"]) for side in ("engine", "loop")}
        cells = [
            f"{side} {medians[side]:.2f} ({min(rates[f'{way} {side}']):.2f} .. {max(rates[f'{way} {side}']):.2f})"
            for side in medians
        ]
        result[f"{way}_ratio"] = medians["engine"] / medians["loop"]
        print(f"{way:6}{'   '.join(cells)}   engine / loop {result[f'{way}_ratio']:.2f}")
    target = Path("build/bench_bulk.json")
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
