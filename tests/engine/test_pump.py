"""The pump between callers and drives: no wake-up is lost, nobody starves, and what is sealed ahead is right. Each search
prints its seed."""

import fcntl
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from kvoffload.engine import Engine
from kvoffload.types import EngineOptions, Region
from tests.engine.world import (
    C_ENGINES,
    FOREVER_US,
    TIMEDOUT,
    copy_out,
    load,
    make_files,
    read,
    run,
    run_one,
    write,
)
from tests.patience import PATIENCE_S

ROOT = Path(__file__).parents[2]
LARGE = 2**20 - 8192  # bytes that take a while to verify, and are not yet enough to end a turn of the pump
c_engine = pytest.mark.parametrize("name", C_ENGINES)


@pytest.fixture
def chance() -> random.Random:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    return random.Random(seed)


class Store:
    """An engine over a KV cache of blocks of any size."""

    def __init__(self, name: str, payload_bytes: int, blocks: int, **options: int) -> None:
        self.kv = np.random.default_rng(0).integers(0, 256, (blocks, payload_bytes), dtype=np.uint8)
        fields = {"dram_slots": 8, "spare_slots": 4, "max_ops": 256, "io_depth": 8}
        self.engine = Engine(EngineOptions(payload_bytes, **(fields | options), io_backend=name))
        self.engine.bind([[Region(self.kv.ctypes.data, payload_bytes, payload_bytes)]])

    def has_stored(self, blocks: int) -> None:
        """The first blocks lie in the DRAM and SSD slots of their numbers."""
        for n in range(blocks):
            assert run_one(self.engine, copy_out(n, n)) == run_one(self.engine, write(n, n, n)) == 0


def busy_wait(seconds: float) -> None:
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


def while_it_is_verified(store: Store, chance: random.Random, least: float = 0.5) -> Callable[[], None]:
    """Waits for about as long as reads of this drive take, or this part of it; a read of block 0 was just submitted."""
    seconds = []
    for _ in range(20):
        start = time.perf_counter()
        assert run_one(store.engine, read(0, 2, 0)) == 0
        seconds.append(time.perf_counter() - start)
    usual = statistics.median(seconds)
    return lambda: busy_wait(chance.uniform(least, 1.0) * usual)


@c_engine
def test_what_is_submitted_while_a_read_is_verified_is_not_forgotten(name, tmp_path, chance):
    store = Store(name, LARGE, 2)
    with store.engine as engine:
        engine.attach(make_files(tmp_path, 1, payload_bytes=LARGE))
        store.has_stored(2)
        wait = while_it_is_verified(store, chance)
        for _ in range(1500):
            assert engine.submit(read(0, 2, 0)) == 1
            wait()
            assert engine.submit(read(1, 3, 1)) == 1
            done = 0
            while done < 2:
                assert engine.wait(PATIENCE_S), engine.stats()
                done += len(engine.poll())


@c_engine
def test_a_close_while_a_read_is_verified_is_not_forgotten(name, tmp_path, chance):
    """In a process of its own, because a close that hangs can be ended by nothing else."""
    program = f"""
import random, sys
from tests.engine.test_pump import *
chance, folder = random.Random({chance.randrange(2**32)}), Path({str(tmp_path)!r})
files = make_files(folder, 1, payload_bytes=LARGE)
for turn in range(1000):
    store = Store({name!r}, LARGE, 1)
    store.engine.attach(files)
    if turn == 0:
        store.has_stored(1)
        wait = while_it_is_verified(store, chance)
    assert store.engine.submit(read(0, 2, 0)) == 1
    wait()
    store.engine.close()
"""
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, timeout=PATIENCE_S)


@c_engine
def test_a_file_that_grew_while_a_read_is_verified_gets_its_writes(name, tmp_path, chance):
    files = make_files(tmp_path, 2, payload_bytes=LARGE)
    empty = Path(files.paths[1]).stat().st_size
    for turn in range(1000):
        store = Store(name, LARGE, 1)
        os.truncate(files.paths[1], empty)
        with store.engine as engine:
            engine.attach(files)
            assert run_one(engine, copy_out(0, 0)) == 0
            if turn == 0:
                assert run_one(engine, write(0, 0, 0)) == 0
                wait = while_it_is_verified(store, chance, least=0.0)
            assert engine.submit(read(0, 2, 0, id=1)) == 1
            wait()
            assert engine.submit(write(0, 0, 1, id=2)) == 1
            done = 0
            while done < 2:
                assert engine.wait(PATIENCE_S), engine.stats()
                done += len(engine.poll())


@c_engine
@pytest.mark.parametrize("files", (1, 2))
def test_a_steady_flow_of_reads_lets_writes_through(name, files, tmp_path):
    """The queue of reads is never empty; the write must not have to wait for its end."""
    payload, readers = 2**20 - 4096, range(8, 40)
    store = Store(name, payload, 4, dram_slots=40)
    with store.engine as engine:
        engine.attach(make_files(tmp_path, files, payload_bytes=payload))
        store.has_stored(4)
        free, done = list(readers), {}
        assert engine.submit(np.concatenate([read(n % 4, n, n % 4) for n in free])) == len(free)
        assert engine.submit(write(0, 0, 9, id=777, timeout_us=FOREVER_US)) == 1
        reads = 0
        while 777 not in done and reads < 5000:
            engine.wait(0.1)
            done = {int(one["id"]): int(one["status"]) for one in engine.poll()}
            free = [n for n in done if n != 777]
            reads += len(free)
            if free:
                assert engine.submit(np.concatenate([read(n % 4, n, n % 4) for n in free])) == len(free)
        assert done.get(777) == 0, f"{done.get(777)} after {reads} reads"


@c_engine
def test_what_is_sealed_ahead_of_its_turn_is_right_and_locks_no_slot_when_its_time_runs_out(name, tmp_path, chance):
    payload, blocks, dram_slots = 600 * 1024 + 100, 32, 8
    store = Store(name, payload, blocks, io_depth=4)
    original, generation, timed_out = store.kv.copy(), 1, 0
    in_dram, on_ssd = {}, {}  # by slot: block and generation
    with store.engine as engine:
        engine.attach(make_files(tmp_path, 2, slots=40, payload_bytes=payload))
        for _ in range(60):
            generation += 1
            for slot in chance.sample(range(dram_slots), 3):
                in_dram[slot] = chance.randrange(16), generation
                assert run_one(engine, copy_out(in_dram[slot][0], slot, generation=generation)) == 0
            plan = {}
            for number, ssd_slot in enumerate(chance.sample(range(40), chance.randrange(1, 20))):
                plan[number] = chance.choice(list(in_dram)), ssd_slot, chance.choice((0, 1, 300, 1000, 3000, 6000))
            statuses = run(
                engine,
                *(
                    write(in_dram[dram][0], dram, ssd, generation=in_dram[dram][1], id=number, timeout_us=timeout_us)
                    for number, (dram, ssd, timeout_us) in plan.items()
                ),
            )
            for number, (dram, ssd, timeout_us) in plan.items():
                assert statuses[number] == 0 or (timeout_us and statuses[number] == TIMEDOUT)
                timed_out += statuses[number] == TIMEDOUT
                on_ssd[ssd] = in_dram[dram]
                if statuses[number] != 0:
                    del on_ssd[ssd]
            for ssd in chance.sample(sorted(on_ssd), min(4, len(on_ssd))):
                (block, generation_then), to = on_ssd[ssd], 16 + chance.randrange(16)
                assert set(run(engine, load(block, ssd, to, generation=generation_then)).values()) == {0}
                assert (store.kv[to] == original[block]).all()
            for dram, (block, generation_then) in in_dram.items():
                on_ssd[dram] = block, generation_then
                assert run_one(engine, write(block, dram, dram, generation=generation_then)) == 0, "no slot is stuck"
    assert timed_out > 0


@c_engine
def test_a_forked_child_that_lives_on_holds_no_lock_on_files_the_engine_closed(name, tmp_path):
    store = Store(name, 4096, 1)
    files = make_files(tmp_path, 1, payload_bytes=4096)
    store.engine.attach(files)
    child = os.fork()
    if child == 0:
        time.sleep(30)
        os._exit(0)
    try:
        store.engine.close()
        with open(files.paths[0], "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)
