"""What a CUDA device may still use when an operation or the engine has ended. Run as cuda_scenarios.py is."""

import errno
import fcntl
import random
import threading
import time
from pathlib import Path

import numpy as np

from kvoffload.types import OP_DTYPE, OpKind
from tests.engine.cuda_scenarios import World, main
from tests.engine.planner import Planner
from tests.engine.world import FOREVER_US, TIMEDOUT, KVCache, copy_in, copy_out, run, run_one, write
from tests.patience import wait_until

TIMEOUTS_US = ((5000, 15_000), (5000, 15_000), (FOREVER_US, 1))  # of a batch, and of every third operation in it


def arenas_kib() -> int:
    """What is mapped of arenas: only they are kept from forked children."""
    lines = [line.split() for line in Path("/proc/self/smaps").read_text().splitlines()]
    sizes = [int(words[1]) for words in lines if words[0] == "Size:"]
    flags = [words for words in lines if words[0] == "VmFlags:"]
    return sum(size for size, words in zip(sizes, flags, strict=True) if "dc" in words)


def memory_that_cannot_be_unpinned_stays_mapped(world: World) -> None:
    """Else what is mapped there next would be taken for the pages of before. Also if it is opening that fails."""
    before = arenas_kib()
    with world.open():
        one = arenas_kib() - before
        for unpinning in ("cuMemHostUnregister", "cuCtxPushCurrent_v2"):
            left = arenas_kib()
            with world.open() as engine:
                assert run_one(engine, copy_out(1, 0)) == 0
                world.device.fail(unpinning, forever=True)
            assert arenas_kib() - left == one
            world.device.fail(unpinning, 0)
        left = arenas_kib()
        world.device.fail("cuStreamCreate")
        world.device.fail("cuMemHostUnregister", forever=True)
        assert world.refusal().errno == errno.ENODEV
        assert arenas_kib() - left == one
        world.device.fail("cuMemHostUnregister", 0)
    assert one > 0
    assert arenas_kib() - left == 0, "what can be unpinned is given back"


def files_are_not_kept_for_a_device_that_hangs(world: World) -> None:
    """Who resizes a slot file locks it, and would wait for as long as the process lives."""
    with world.open() as engine:
        assert run_one(engine, copy_out(1, 0)) == run_one(engine, write(1, 0, 3)) == 0
        world.device.fake_hold = 1
        assert engine.submit(np.concatenate([copy_out(2, 1), copy_in(1, 0)])) == 2
        wait_until(lambda: engine.stats()["in_flight"] == 2)
    for path in world.files.paths:
        with open(path) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    world.device.fake_hold = 0
    time.sleep(0.05)
    assert world.device.fake_violations == 0, "what the device still used is still there"


def bytes_of(kv: KVCache, block: int) -> list[bytes]:
    return [array[block].tobytes() for group in kv.arrays for array in group]


def what_timed_out_on_a_device_that_stops_and_goes_writes_nowhere(world: World) -> None:
    """Loads that are good are right, and a KV block is as it was before the load that failed, however late the device is."""
    chance, planner, kv, over = random.Random(world.seed), Planner(world.seed), world.kv, threading.Event()
    world.device.fake_delay_us = 300

    def stop_and_go() -> None:
        while not over.is_set():
            for hold, longest_s in ((1, 0.03), (0, 0.02)):
                world.device.fake_hold = hold
                time.sleep(chance.uniform(0, longest_s))

    stored: dict[int, bytes] = {}
    untouched: dict[int, list[bytes]] = {}
    seen: list[int] = []
    thread = threading.Thread(target=stop_and_go, daemon=True)  # a failure ends the process
    thread.start()
    with world.open(spare_slots=3) as engine:
        for _ in range(80):
            batch = np.concatenate([np.zeros(0, OP_DTYPE), *planner.batch()])
            batch["timeout_us"], batch["timeout_us"][::3] = chance.choice(TIMEOUTS_US)
            for op in batch[batch["kind"] == OpKind.COPY_OUT]:
                stored[int(op["generation"])] = kv.block(int(op["kv_block"]), int(op["group"]))
            loads = batch[batch["kind"] == OpKind.COPY_IN]
            before = {int(op["kv_block"]): bytes_of(kv, int(op["kv_block"])) for op in loads}
            statuses = run(engine, batch)
            planner.note(statuses)
            seen += statuses.values()
            for op in loads:
                block = int(op["kv_block"])
                if statuses[int(op["id"])] == 0:
                    assert kv.block(block, int(op["group"])) == stored[int(op["generation"])]
                    untouched.pop(block, None)
                else:
                    untouched[block] = before[block]
            assert all(bytes_of(kv, block) == content for block, content in untouched.items())
        over.set()
        thread.join()
    assert seen.count(0) > 50
    assert seen.count(TIMEDOUT) > 5
    assert world.is_clean()


SCENARIOS = {
    scenario.__name__: scenario
    for scenario in (
        memory_that_cannot_be_unpinned_stays_mapped,
        files_are_not_kept_for_a_device_that_hangs,
        what_timed_out_on_a_device_that_stops_and_goes_writes_nowhere,
    )
}

if __name__ == "__main__":
    main(SCENARIOS)
