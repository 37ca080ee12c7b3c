"""What demotions cost the loads beside them: latencies of 2 MiB loads, alone and while writes run at full appetite.

A load is what a hit on SSD is: READ linked to COPY_IN, through staging memory, its latency counted from submission to
the copy's completion. Demotions at full appetite: 128 WRITEs are always submitted. Three ways to come:
    steady     8 loads in flight at all times
    sporadic   one load every 10 ms, when the drive is full of writes
    burst      32 loads at once every 150 ms, a prompt's worth
Alone and beside take turns; medians over the repetitions of each one's percentiles.

    python -m benchmarks.bench_loads_first [--folder PATH] [--seconds 2] [--repetitions 5] [--io-backend auto]
"""

import argparse
import json
import shutil
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from kvoffload.engine import Engine
from kvoffload.engine.reference import pack_superblock
from kvoffload.layout import HEADER_BYTES
from kvoffload.types import NO_SLOT, OP_DTYPE, EngineOptions, OpFlag, OpKind, Region, SlotFiles

SLOT_BYTES = 2 * 2**20
PAYLOAD_BYTES = SLOT_BYTES - HEADER_BYTES
SSD_SLOTS, DRAM_SLOTS, SPARES, LOADS_MAX = 512, 128, 40, 32
FINGERPRINT = bytes(16)
WRITE_ID = 1 << 32  # and above; loads are numbered from 0
GOAL = 1.5


@dataclass(frozen=True)
class Pattern:
    """`loads` are submitted together, every `period_s`, or as soon as earlier ones end if that is 0."""

    name: str
    loads: int
    period_s: float


PATTERNS = (Pattern("steady", 8, 0.0), Pattern("sporadic", 1, 0.01), Pattern("burst", LOADS_MAX, 0.15))


@dataclass
class Outcome:
    seconds: float
    latencies_us: list[int] = field(default_factory=list)
    written: int = 0


class Traffic:
    """An engine with all SSD slots written; the upper half of them is written again, the lower half loaded."""

    def __init__(self, folder: Path, io_backend: str) -> None:
        path = folder / "engine.slots"
        path.write_bytes(pack_superblock(PAYLOAD_BYTES, FINGERPRINT, 0, 1, 0, 1))
        self.engine = Engine(EngineOptions(PAYLOAD_BYTES, DRAM_SLOTS, SPARES, io_backend=io_backend))
        self.random = np.random.default_rng(0)
        self.kv = self.random.integers(0, 256, (DRAM_SLOTS, PAYLOAD_BYTES), dtype=np.uint8)
        self.engine.bind([[Region(self.kv.ctypes.data, PAYLOAD_BYTES, PAYLOAD_BYTES)]])
        self.engine.attach(SlotFiles((str(path),), SSD_SLOTS, FINGERPRINT))
        self.finish(self.ops(OpKind.COPY_OUT, np.arange(DRAM_SLOTS)))
        self.finish(self.ops(OpKind.WRITE, np.arange(SSD_SLOTS)))

    def ops(self, kind: OpKind, ssd_slots: np.ndarray) -> np.ndarray:
        """SSD slot s always holds the block of DRAM slot s % DRAM_SLOTS."""
        ops = np.zeros(len(ssd_slots), OP_DTYPE)
        ops["kind"], ops["key_len"], ops["ssd_slot"] = kind, 1, ssd_slots
        ops["kv_block"] = ops["dram_slot"] = ops["generation"] = ssd_slots % DRAM_SLOTS
        return ops

    def finish(self, ops: np.ndarray) -> None:
        taken = done = 0
        while done < len(ops):
            taken += self.engine.submit(ops[taken:])
            self.engine.wait(60)
            completions = self.engine.poll()
            assert not completions["status"].any()
            done += len(completions)

    def load(self, first_id: int, count: int) -> None:
        ssd_slots = self.random.choice(SSD_SLOTS // 2, count, replace=False)
        pairs = self.ops(OpKind.READ, np.repeat(ssd_slots, 2))
        pairs["dram_slot"] = NO_SLOT
        pairs["flags"][::2], pairs["kind"][1::2] = OpFlag.LINK, OpKind.COPY_IN
        pairs["id"] = np.arange(2 * first_id, 2 * (first_id + count))
        assert self.engine.submit(pairs) == 2 * count

    def write(self, count: int) -> None:
        ops = self.ops(OpKind.WRITE, self.free_writes[:count])
        ops["id"] = WRITE_ID + self.free_writes[:count]
        self.free_writes = self.free_writes[count:]
        assert self.engine.submit(ops) == count

    def run(self, pattern: Pattern, seconds: float, writes: int) -> Outcome:
        """Traffic for a while; every load's latency is counted, also of those that end after it."""
        self.free_writes = SSD_SLOTS // 2 + self.random.permutation(SSD_SLOTS // 2)
        outcome = Outcome(seconds)
        start = now = next_loads = time.monotonic()
        loads = loading = writing = 0
        while now < start + seconds or loading or writing:
            running = now < start + seconds
            if running and writing < writes:
                self.write(writes - writing)
                writing = writes
            due = pattern.loads - loading if not pattern.period_s else pattern.loads * (now >= next_loads)
            if running and 0 < due <= LOADS_MAX - loading:
                self.load(loads, due)
                loads, loading = loads + due, loading + due
                next_loads += pattern.period_s
            self.engine.wait(0.0005 if pattern.period_s else 0.1)
            completions = self.engine.poll()
            assert not completions["status"].any()
            now = time.monotonic()
            is_write = completions["id"] >= WRITE_ID
            slots = completions["id"][is_write] - WRITE_ID
            self.free_writes = np.concatenate([self.free_writes, slots.astype(np.int64)])
            writing -= len(slots)
            outcome.written += len(slots) if running else 0
            copied = completions["usec"][~is_write & (completions["id"] % 2 == 1)]
            loading -= len(copied)
            outcome.latencies_us += copied.tolist()
        return outcome


def row(pattern: Pattern, alone: list[Outcome], beside: list[Outcome]) -> dict[str, object]:
    cells: dict[str, object] = {"pattern": pattern.name}
    for name, outcomes in (("alone", alone), ("beside", beside)):
        for percentile in (50, 99):
            values = [float(np.percentile(outcome.latencies_us, percentile)) / 1000 for outcome in outcomes]
            cells[f"{name}_p{percentile}_ms"] = statistics.median(values)
            cells[f"{name}_p{percentile}_ms_spread"] = (min(values), max(values))
    cells["p99_ratio"] = cells["beside_p99_ms"] / cells["alone_p99_ms"]
    cells["demoted_gb_s"] = statistics.median(o.written * SLOT_BYTES / o.seconds / 1e9 for o in beside)
    return cells


def markdown(rows: list[dict[str, object]]) -> str:
    lines = [
        "| loads | alone p50, p99 ms | beside demotions p50, p99 ms | p99 ratio | demoted GB/s |",
        "|---|---:|---:|---:|---:|",
    ]
    for cells in rows:
        times = [
            f"{cells[f'{name}_p50_ms']:.1f}, {cells[f'{name}_p99_ms']:.1f} "
            f"({cells[f'{name}_p99_ms_spread'][0]:.1f} .. {cells[f'{name}_p99_ms_spread'][1]:.1f})"
            for name in ("alone", "beside")
        ]
        ratio = f"{cells['p99_ratio']:.2f}"
        ratio = ratio if cells["p99_ratio"] <= GOAL else f"**{ratio}**"
        lines.append(f"| {cells['pattern']} | {times[0]} | {times[1]} | {ratio} | {cells['demoted_gb_s']:.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("build/bench_loads_first"))
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--io-backend", default="auto")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    try:
        traffic = Traffic(arguments.folder, arguments.io_backend)
        rows = []
        for pattern in PATTERNS:
            outcomes: tuple[list[Outcome], list[Outcome]] = ([], [])
            for _ in range(arguments.repetitions):
                for list_of, writes in zip(outcomes, (0, 128), strict=True):
                    list_of.append(traffic.run(pattern, arguments.seconds, writes))
            rows.append(row(pattern, *outcomes))
        traffic.engine.close()
    finally:
        shutil.rmtree(arguments.folder)
    print(markdown(rows))
    met = all(cells["p99_ratio"] <= GOAL for cells in rows)
    print(f"goal: p99 beside demotions at most {GOAL} times that alone: {'met' if met else 'not met everywhere'}")
    target = Path("build/bench_loads_first.json")
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
