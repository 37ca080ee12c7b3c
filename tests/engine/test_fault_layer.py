"""The faults that faulty.py makes are the faults it says, on both backends and in other processes."""

import errno
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kvoffload.engine import Engine
from kvoffload.layout import slot_bytes, slot_offset
from tests.engine.faulty import FaultPlan, FaultyKind, environment
from tests.engine.world import (
    BADMSG,
    C_ENGINES,
    FOREVER_US,
    PAYLOAD_BYTES,
    TIMEDOUT,
    KVCache,
    copy_in,
    copy_out,
    load,
    make_files,
    open_engine,
    read,
    run,
    run_one,
    stored,
    write,
)
from tests.patience import PATIENCE_S, wait_until

ROOT = Path(__file__).parents[2]
SLOT_BYTES = slot_bytes(PAYLOAD_BYTES)
SECTOR = 512
SLOTS = 6
HOUR_US = 3600 * 10**6


class Faulty:
    """An engine on one slot file, of which the first slots hold block 1."""

    def __init__(self, engine: Engine, kv: KVCache, faults: FaultPlan, path: Path) -> None:
        self.engine, self.kv, self.faults, self.path = engine, kv, faults, path
        for slot in range(SLOTS):
            stored(engine, 1, 0, slot)
        self.run(copy_out(2, 2, generation=2))

    def slot(self, number: int) -> bytes:
        with self.path.open("rb") as file:
            file.seek(slot_offset(number, PAYLOAD_BYTES))
            return file.read(SLOT_BYTES)

    def run(self, op, status: int = 0) -> None:
        assert run_one(self.engine, op) == status

    def when_its_time_is_over(self, kind: FaultyKind, op) -> list[int]:
        """What completes when the deadline of an operation passes that waits."""
        op["timeout_us"] = HOUR_US
        assert self.engine.submit(op) == 1
        wait_until(lambda: kind.waiting == 1)
        self.faults.deadlines_pass()
        return self.engine.poll()["status"].tolist()


@pytest.fixture(params=C_ENGINES)
def faulty(request: pytest.FixtureRequest, faults: FaultPlan, tmp_path: Path):
    kv, files = KVCache(), make_files(tmp_path / "store", count=1)
    with open_engine(request.param, kv, files) as engine:
        yield Faulty(engine, kv, faults, Path(files.paths[0]))
        faults.heal()


def test_nothing_goes_wrong_until_a_test_says_so(faulty):
    faulty.run(load(1, 3, 8))
    assert faulty.faults.read.requests == 1
    assert faulty.faults.write.requests == SLOTS
    assert not any(kind.injected(fault) for kind in faulty.faults.kinds for fault in ("error", "flip", "stall"))


def test_an_error_is_the_errno_that_was_asked_for_and_happens_as_often(faulty):
    faulty.faults.write.error = errno.ENOSPC
    faulty.faults.write.script("error", 2)
    faulty.faults.read.script("error")
    before = faulty.slot(3)
    faulty.run(write(2, 2, 3, generation=2), -errno.ENOSPC)
    faulty.run(write(2, 2, 3, generation=2), -errno.ENOSPC)
    assert faulty.slot(3) == before
    faulty.run(write(2, 2, 3, generation=2))
    faulty.run(read(1, 1, 4), -errno.EIO)
    faulty.run(read(1, 1, 4))
    assert faulty.faults.write.injected("error") == 2
    assert faulty.faults.read.injected("error") == 1


@pytest.mark.parametrize("fault", ("again", "short"))
def test_what_is_retried_below_the_seam_succeeds(faulty, fault):
    faulty.faults.read.script(fault, 5)
    faulty.faults.write.script(fault, 5)
    for slot in range(5):
        faulty.run(write(2, 2, slot, generation=2))
        faulty.run(load(2, slot, 8 + slot, generation=2))
        assert faulty.kv.block(8 + slot) == faulty.kv.block(2)
    assert faulty.faults.read.injected(fault) == faulty.faults.write.injected(fault) == 5


@pytest.mark.parametrize("fault", ("torn", "torn_error"))
def test_of_a_torn_write_a_number_of_sectors_lands(faulty, fault):
    faulty.run(write(2, 2, SLOTS, generation=2))
    new, landed = faulty.slot(SLOTS), set()
    for slot in range(SLOTS):
        old = faulty.slot(slot)
        new = new[:12] + slot.to_bytes(4, "little") + new[16:]  # the header names the slot, its checksum covers that
        faulty.faults.write.script(fault)
        faulty.run(write(2, 2, slot, generation=2), 0 if fault == "torn" else -errno.EIO)
        found = faulty.slot(slot)
        sectors = [found[at : at + SECTOR] != old[at : at + SECTOR] for at in range(0, SLOT_BYTES, SECTOR)]
        end = SECTOR * max((number + 1 for number, is_new in enumerate(sectors) if is_new), default=0)
        assert found[end:] == old[end:]
        assert found[128:end] == new[128:end]
        landed.add(end)
        faulty.run(read(2, 1, slot, generation=2), BADMSG)
    assert len(landed) > 1


def test_a_flip_is_one_bit_on_the_medium_or_on_the_way(faulty):
    faulty.faults.write.script("flip", SLOTS)
    for slot in range(SLOTS):
        faulty.run(write(1, 0, slot))
    good = [faulty.slot(slot) for slot in range(SLOTS)]
    for slot in range(SLOTS):
        faulty.run(write(1, 0, slot))
        pairs = zip(good[slot], faulty.slot(slot), strict=True)
        assert sum((one ^ other).bit_count() for one, other in pairs) == 1
    faulty.faults.read.script("flip", 20)
    statuses = [run_one(faulty.engine, read(1, 1, 3)) for _ in range(20)]
    assert set(statuses) == {0, BADMSG}, "a slot's padding counts for nothing"
    faulty.run(read(1, 1, 3))


def test_a_lost_write_is_acknowledged_and_leaves_the_old_bytes(faulty):
    before = faulty.slot(3)
    faulty.faults.write.script("lost")
    faulty.run(write(2, 2, 3, generation=2))
    assert faulty.slot(3) == before
    faulty.run(read(2, 1, 3, generation=2), BADMSG)
    faulty.run(read(1, 1, 3))


def test_a_misdirected_transfer_meets_another_slot(faulty):
    before = [faulty.slot(slot) for slot in range(SLOTS)]
    faulty.faults.read.script("misdirect", SLOTS)
    for slot in range(SLOTS):
        faulty.run(read(1, 1, slot), BADMSG)
    faulty.faults.write.script("misdirect")
    faulty.run(write(2, 2, 3, generation=2))
    assert faulty.slot(3) == before[3]
    with faulty.path.open("rb") as file:
        assert faulty.kv.block(2) in file.read()


def test_a_stalled_transfer_takes_effect_when_it_is_released(faulty):
    for kind, op in ((faulty.faults.read, read(1, 1, 3)), (faulty.faults.write, write(2, 2, 3, generation=2))):
        kind.script("stall")
        op["timeout_us"] = FOREVER_US
        before = faulty.slot(3)
        assert faulty.engine.submit(op) == 1
        wait_until(lambda kind=kind: kind.waiting == 1)
        assert not faulty.engine.wait(0.02)
        assert faulty.slot(3) == before
        faulty.faults.release()
        wait_until(lambda: faulty.engine.wait(1))
        assert faulty.engine.poll()["status"].tolist() == [0]
        assert kind.waiting == 0
    assert faulty.slot(3) != before


def test_a_stall_can_end_by_itself(faulty):
    faulty.faults.read.stall_us = 20_000
    faulty.faults.read.script("stall")
    faulty.run(read(1, 1, 3))
    assert faulty.engine.stats()["usec"][3] >= 20_000


@pytest.mark.parametrize("name", C_ENGINES)
def test_growth_fails_and_stalls(name, faults, tmp_path):
    with open_engine(name, KVCache(), make_files(tmp_path / "store", count=1)) as engine:
        assert run_one(engine, copy_out(1, 0)) == 0
        faults.grow.error = errno.ENOSPC
        faults.grow.script("error")
        assert run_one(engine, write(1, 0, 3)) == -errno.ENOSPC
        faults.grow.script("stall")
        assert engine.submit(write(1, 0, 3)) == 1
        wait_until(lambda: faults.grow.waiting == 1)
        assert not engine.wait(0.02)
        faults.release()
        wait_until(lambda: engine.wait(1))
        assert engine.poll()["status"].tolist() == [0]
        assert run_one(engine, read(1, 1, 3)) == 0


def test_copies_fail_stall_and_wait_in_a_queue(faulty):
    faults, engine = faulty.faults, faulty.engine
    faults.copy_out.script("error")
    faulty.run(copy_out(4, 4), -errno.EREMOTEIO)
    faulty.run(copy_in(4, 4), BADMSG)
    faults.copy_in.script("error")
    faulty.run(copy_in(1, 0, kv_block=9), -errno.EREMOTEIO)
    assert faulty.kv.block(9) != faulty.kv.block(1)
    for fault in ("queued", "stall"):
        faults.copy_out.script(fault)
        assert faulty.when_its_time_is_over(faults.copy_out, copy_out(4, 4)) == [TIMEDOUT]
    assert engine.stats()["abandoned"] == 1, "the one that was withdrawn is not"
    faults.release()
    wait_until(lambda: engine.stats()["abandoned"] == 0)
    faults.copy_in.script("queued")
    assert faulty.when_its_time_is_over(faults.copy_in, copy_in(1, 0, kv_block=9)) == [TIMEDOUT]
    faults.copy_in.script("stall")
    assert faulty.when_its_time_is_over(faults.copy_in, copy_in(1, 0, kv_block=9)) == [], "what has begun is waited for"
    faults.release()
    wait_until(lambda: engine.wait(1))
    assert engine.poll()["status"].tolist() == [0]
    assert faulty.kv.block(9) == faulty.kv.block(1)


@pytest.mark.parametrize("name", C_ENGINES)
def test_faults_of_one_file_leave_the_others_alone(name, faults, tmp_path):
    files = make_files(tmp_path / "store", count=2)
    faults.only(files.paths[1])
    faults.grow.set(error=1)
    with open_engine(name, KVCache(), files) as engine:
        assert run_one(engine, copy_out(1, 0)) == 0
        assert run_one(engine, write(1, 0, 1)) == -errno.EIO
        assert run_one(engine, write(1, 0, 0)) == 0
        faults.grow.set()
        assert run_one(engine, write(1, 0, 1)) == 0
        faults.read.set(error=1)
        assert run_one(engine, read(1, 1, 1)) == -errno.EIO
        assert run_one(engine, read(1, 1, 0)) == 0


PROGRAM = """
import multiprocessing, sys
from pathlib import Path
from tests.engine.world import *

def child(folder):
    with open_engine("threads", KVCache(), make_files(Path(folder))) as engine:
        stored(engine, 1, 0, 0)
        assert run_one(engine, read(1, 1, 0)) == -errno.EIO

if __name__ == "__main__":
    context = multiprocessing.get_context(sys.argv[1])
    process = context.Process(target=child, args=(sys.argv[2],))
    process.start()
    process.join()
    sys.exit(process.exitcode)
"""


@pytest.mark.parametrize("start", ("fork", "spawn"))
def test_children_of_a_process_have_the_faults_too(start, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    with FaultPlan(tmp_path / "faults") as plan:
        plan.read.set(error=1)
        env = os.environ | environment(plan)
        env["PYTHONPATH"] += os.pathsep + str(ROOT)
        command = [sys.executable, str(program), start, str(tmp_path / "store")]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=PATIENCE_S)
        assert done.returncode == 0, done.stderr
        assert plan.read.injected("error") == 1


def test_a_throttled_drive_serves_one_request_after_the_other(faulty):
    faulty.faults.read.throttle(0.02)
    begun = time.monotonic()
    statuses = run(faulty.engine, *(read(1, slot, slot, id=slot) for slot in range(1, 5)))
    assert set(statuses.values()) == {0}
    assert time.monotonic() - begun >= 4 * 0.02
