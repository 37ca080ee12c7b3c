"""What an engine must leave behind because the CUDA device may still use it. Run as cuda_scenarios.py is."""

import errno
import fcntl
import time
from pathlib import Path

import numpy as np

from tests.engine.cuda_scenarios import World, main, wait_until
from tests.engine.world import copy_in, copy_out, run_one, write


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


SCENARIOS = {
    scenario.__name__: scenario
    for scenario in (memory_that_cannot_be_unpinned_stays_mapped, files_are_not_kept_for_a_device_that_hangs)
}

if __name__ == "__main__":
    main(SCENARIOS)
