"""What the engine and the store cost beside moving bytes.

    calls     submit and poll, per operation, in batches of 256 operations that end at once (a block that is not there)
    idle      processor time of an open engine with nothing to do, over 10 s
    memory    what the process grew by when every slot of an arena was used, beyond the arena
    store     opening and closing a full store again: slot file preallocated, every slot in the index, engine attached

    python -m benchmarks.bench_small_costs [--folder PATH] [--store-gb 100] [--idle-seconds 10]
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import time
from pathlib import Path

import numpy as np

from kvoffload.config import Config
from kvoffload.engine import Engine
from kvoffload.store import Store
from kvoffload.types import OP_DTYPE, EngineOptions, OpKind, Region

MIB = 2**20
BATCH = 256


def open_engine(payload_bytes: int, dram_slots: int) -> tuple[Engine, np.ndarray]:
    engine = Engine(EngineOptions(payload_bytes, dram_slots, spare_slots=4))
    kv = np.ones((8, payload_bytes), np.uint8)
    engine.bind([[Region(kv.ctypes.data, payload_bytes, payload_bytes)]])
    return engine, kv


def batch_of(kind: OpKind, first: int, count: int) -> np.ndarray:
    ops = np.zeros(count, OP_DTYPE)
    ops["kind"], ops["key_len"], ops["dram_slot"] = kind, 1, np.arange(first, first + count)
    return ops


def calls(rounds: int = 2000) -> dict[str, float]:
    """Microseconds per operation: inside submit and poll, and from submit to the last completion."""
    engine, _kv = open_engine(4096, BATCH)
    ops = batch_of(OpKind.COPY_IN, 0, BATCH)
    inside, until_done = [], []
    for _ in range(rounds):
        start = time.perf_counter()
        assert engine.submit(ops) == BATCH
        spent, polled = time.perf_counter() - start, 0
        while polled < BATCH:
            engine.wait(1)
            at = time.perf_counter()
            polled += len(engine.poll(BATCH))
            spent += time.perf_counter() - at
        inside.append(spent / BATCH * 1e6)
        until_done.append((time.perf_counter() - start) / BATCH * 1e6)
    engine.close()
    return {"submit_and_poll_us": statistics.median(inside), "until_completed_us": statistics.median(until_done)}


def idle(seconds: float) -> dict[str, float]:
    engine, _kv = open_engine(MIB, 64)
    before = resource.getrusage(resource.RUSAGE_SELF)
    time.sleep(seconds)
    after = resource.getrusage(resource.RUSAGE_SELF)
    engine.close()
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"idle_cpu_ms": spent * 1000, "idle_seconds": seconds}


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def memory(slots: int = 512) -> dict[str, float]:
    before = resident_bytes()
    engine, kv = open_engine(2 * MIB, slots)
    before += kv.nbytes
    for first in range(0, slots, 8):
        ops = batch_of(OpKind.COPY_OUT, first, 8)
        ops["kv_block"] = np.arange(8)
        engine.submit(ops)
        done = 0
        while done < 8:
            engine.wait(10)
            done += len(engine.poll())
    grown, arena = resident_bytes() - before, engine.stats()["arena_bytes"]
    engine.close()
    return {"arena_mib": arena / MIB, "beyond_arena_mib": (grown - arena) / MIB}


def store(folder: Path, gigabytes: float, openings: int = 5) -> dict[str, float]:
    """Seconds to open and to close, medians; the first opening, which makes everything, apart."""
    payload = 2 * MIB
    config = Config.parse({"nvme_path": str(folder), "ssd_kv_offload_gb": gigabytes})
    timings: list[tuple[float, float]] = []
    for opening in range(openings + 1):
        start = time.perf_counter()
        opened = Store.open(config, {"model": "benchmark"}, payload, ranks=1)
        engine, _kv = open_engine(payload, 8)
        engine.attach(opened.slot_files(0))
        blocks = len(opened.table())
        opened_at = time.perf_counter()
        if opening == 0:  # fill it
            path = opened.slot_files(0).paths[0]
            with open(path, "r+b") as file:
                os.posix_fallocate(file.fileno(), 0, 4096 + opened.slot_count * (payload + 4096))
            for slot in range(opened.slot_count):
                opened.put(slot.to_bytes(36, "big"), slot, opened.next_generation(), 0)
                if slot % 8192 == 0:
                    opened.flush(60)
            opened.flush(60)
        closing = time.perf_counter()
        engine.close()
        opened.close()
        timings.append((opened_at - start, time.perf_counter() - closing))
    first, later = timings[0], timings[1:]
    return {
        "store_gb": gigabytes,
        "store_blocks": blocks,
        "first_open_s": first[0],
        "open_s": statistics.median(opened for opened, _ in later),
        "close_s": statistics.median(closed for _, closed in later),
    }


def verdicts(found: dict[str, float]) -> list[tuple[str, str, bool]]:
    open_close = found["open_s"] + found["close_s"]
    return [
        (
            "submit and poll, per operation in batches of 256",
            f"{found['submit_and_poll_us']:.2f} µs ({found['until_completed_us']:.2f} µs until completed)",
            found["submit_and_poll_us"] <= 1,
        ),
        (
            f"processor time of an idle engine in {found['idle_seconds']:.0f} s",
            f"{found['idle_cpu_ms']:.1f} ms",
            found["idle_cpu_ms"] < 10,
        ),
        (
            f"resident memory beyond an arena of {found['arena_mib']:.0f} MiB",
            f"{found['beyond_arena_mib']:.1f} MiB",
            found["beyond_arena_mib"] <= 64,
        ),
        (
            f"open and close a store of {found['store_gb']:.0f} GB, {found['store_blocks']} blocks",
            f"{open_close:.2f} s (first open {found['first_open_s']:.2f} s)",
            open_close <= 1,
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("build/bench_small_costs"))
    parser.add_argument("--store-gb", type=float, help="default: 100, or half of what is free")
    parser.add_argument("--idle-seconds", type=float, default=10.0)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(arguments.folder).free
    gigabytes = arguments.store_gb or min(100, free // 2 // 10**9)
    try:
        found = calls() | idle(arguments.idle_seconds) | memory() | store(arguments.folder, gigabytes)
    finally:
        shutil.rmtree(arguments.folder)
    print("| | | goal |\n|---|---:|---|")
    for what, figure, met in verdicts(found):
        print(f"| {what} | {figure} | {'met' if met else '**not met**'} |")
    target = Path("build/bench_small_costs.json")
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
