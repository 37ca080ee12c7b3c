"""What deciding costs with a million blocks in the index: nothing is moved, but block manager, policy and journal are real.

    recovery  opening the store and taking its blocks into the index, after a restart; the first time the process touches most of
              its memory for the first time, which on a virtual machine can take longer than all else
    memory    what the process holds for them, per block, after a start, and after all blocks were replaced several times
    lookup    a prefix of 2,000 blocks, all of them held
    store     64 new blocks, each of which evicts one from DRAM
    demotion  the same 64 to the SSD, each of which evicts one there: planned and acknowledged

Medians over the rounds, with the least and the greatest; memory once.

    python -m benchmarks.bench_decisions [--folder PATH] [--blocks 1000000] [--rounds 200] [--turnovers 4]
"""

import argparse
import ctypes
import gc
import json
import os
import shutil
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.bench_small_costs import resident_bytes
from kvoffload.config import Config
from kvoffload.layout import slot_bytes
from kvoffload.manager import BlockManager
from kvoffload.store import Store

PAYLOAD = 1  # bytes: the slots are never written
PREFIX, STORED = 2000, 64
DRAM_SLOTS = 20_000
RECOVERIES = 5
USED_AGAIN = 10  # rounds after which the blocks of one are used once more, while all are being replaced


@contextmanager
def opened(folder: Path, blocks: int) -> Iterator[Store]:
    gigabytes = blocks * (slot_bytes(PAYLOAD) + 600) / 1e9
    config = Config.parse({"nvme_path": str(folder), "ssd_kv_offload_gb": gigabytes})
    with Store.open(config, {"model": "benchmark"}, PAYLOAD, ranks=1) as store:
        yield store


def fill(folder: Path, blocks: int) -> None:
    """A store of so many blocks, without their bytes."""
    with opened(folder, blocks) as store:
        os.truncate(store.slot_files(0).paths[0], 4096 + store.slot_count * slot_bytes(PAYLOAD))
        for slot in range(min(blocks, store.slot_count)):
            store.put(os.urandom(32) + bytes(4), slot, store.next_generation(), 0)
            if slot % 8192 == 0:
                store.flush(60)
        store.flush(60)


class Rounds:
    """Seconds of each round, by what was done."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {"lookup": [], "store": [], "plan": [], "ack": []}

    def time(self, name: str, begun: float) -> None:
        self.seconds[name].append(time.perf_counter() - begun)

    def run(self, manager: BlockManager, held: list[bytes], number: int) -> None:
        new = [os.urandom(32) + bytes(4) for _ in range(STORED)]
        pairs, own = [(key, 0) for key in new], {key: place for place, key in enumerate(new)}
        first = number * PREFIX % (len(held) - PREFIX)
        prefix = held[first : first + PREFIX]
        begun = time.perf_counter()
        hits = sum(manager.lookup(key) is not None for key in prefix)
        self.time("lookup", begun)
        manager.end_step()
        begun = time.perf_counter()
        placed = manager.store(pairs, f"request-{number}", own).placements
        self.time("store", begun)
        manager.store_done(new)
        begun = time.perf_counter()
        demotions = manager.plan()
        self.time("plan", begun)
        begun = time.perf_counter()
        for demotion in demotions:
            manager.ack(demotion.id, 1)
        self.time("ack", begun)
        assert (hits, len(placed), len(demotions)) == (PREFIX, STORED, STORED)


@contextmanager
def recovered(folder: Path, blocks: int, seconds: list[tuple[float, float]]) -> Iterator[tuple[Store, BlockManager]]:
    """After a restart; and what opening the store and taking the index over took."""
    begun = time.perf_counter()
    with opened(folder, blocks) as store:
        opened_at = time.perf_counter()
        table = store.table()
        manager = BlockManager(DRAM_SLOTS, store.slot_count, 1, store, block_bytes=slot_bytes(PAYLOAD), recovered=table)
        seconds.append((opened_at - begun, time.perf_counter() - opened_at))
        del table
        yield store, manager


def held_bytes() -> int:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # malloc keeps what it was given back, for the next that asks
    return resident_bytes()


def replace_all(store: Store, manager: BlockManager, turnovers: int) -> None:
    """Every block by others, so often; each is used a second time before it goes."""
    rounds: list[list[bytes]] = []
    for number in range(turnovers * store.slot_count // STORED):
        new = [os.urandom(32) + bytes(4) for _ in range(STORED)]
        manager.store([(key, 0) for key in new], f"request-{number}", {key: place for place, key in enumerate(new)})
        manager.store_done(new)
        for demotion in manager.plan():
            manager.ack(demotion.id, 1)
        rounds.append(new)
        if len(rounds) > USED_AGAIN:
            manager.touch(rounds.pop(0), f"again-{number}")
        manager.end_step()
    store.flush(60)


def measure(folder: Path, blocks: int, rounds: int, turnovers: int) -> dict[str, object]:
    fill(folder, blocks)
    seconds: list[tuple[float, float]] = []
    before = held_bytes()
    with recovered(folder, blocks, seconds):
        grown, held = resident_bytes() - before, held_bytes() - before
    for _ in range(RECOVERIES - 2):
        with recovered(folder, blocks, seconds):
            pass
    with recovered(folder, blocks, seconds) as (store, manager):
        keys = [entry.key for entry in store.table()][blocks // 2 :]  # the older half is evicted meanwhile
        filled = Rounds()  # DRAM and what is left of the SSD, so that what follows evicts
        for number in range((DRAM_SLOTS + store.slot_count - len(keys) * 2) // STORED + 1):
            filled.run(manager, keys, number)
        measured = Rounds()
        for number in range(rounds):
            measured.run(manager, keys, number)
        del keys
        replace_all(store, manager, turnovers)
        steady = held_bytes() - before
    return {
        "blocks": blocks,
        "turnovers": turnovers,
        "open_s": [open_s for open_s, _ in seconds],
        "index_s": [index_s for _, index_s in seconds],
        "bytes_per_block": held / blocks,
        "grown_per_block": grown / blocks,
        "steady_per_block": steady / blocks,
        **{f"{name}_ms": [second * 1e3 for second in times] for name, times in measured.seconds.items()},
    }


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ms ({min(values):.2f}..{max(values):.2f})"


def verdicts(found: dict) -> list[tuple[str, str, str]]:
    """What, the figure, and whether its goal is met."""

    def met(figure: float, goal: float) -> str:
        return "met" if figure <= goal else f"**not met** ({goal:g})"

    demotion = [plan + ack for plan, ack in zip(found["plan_ms"], found["ack_ms"], strict=True)]
    recovery = [open_s + index_s for open_s, index_s in zip(found["open_s"], found["index_s"], strict=True)]
    took = f"{statistics.median(recovery):.2f} s ({min(recovery):.2f}..{max(recovery):.2f}; the first time {recovery[0]:.2f})"
    memory = f"{found['bytes_per_block']:.0f} bytes ({found['grown_per_block']:.0f} with what malloc keeps of freed ones)"
    steady = f"{found['steady_per_block']:.0f} bytes"
    return [
        (f"recovery of {found['blocks']} blocks", took, met(statistics.median(recovery), 1)),
        ("memory per block, after a start", memory, met(found["bytes_per_block"], 400)),
        (f"memory per block, {found['turnovers']} times replaced", steady, met(found["steady_per_block"], 400)),
        (f"lookup of {PREFIX} blocks", spread(found["lookup_ms"]), met(statistics.median(found["lookup_ms"]), 1)),
        (f"store of {STORED} blocks with evictions", spread(found["store_ms"]), met(statistics.median(found["store_ms"]), 0.3)),
        (f"demotion of {STORED} blocks with evictions", spread(demotion), "no goal"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("build/bench_decisions"))
    parser.add_argument("--blocks", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--turnovers", type=int, default=4)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    try:
        found = measure(arguments.folder, arguments.blocks, arguments.rounds, arguments.turnovers)
    finally:
        shutil.rmtree(arguments.folder)
    print("| | | goal |\n|---|---:|---|")
    for row in verdicts(found):
        print("| " + " | ".join(row) + " |")
    Path("build/bench_decisions.json").write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
