"""What the engine makes of drives and copies that stall, fail or answer late: deadlines hold, and what was given up cannot
touch memory that was given to another."""

import errno
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from kvoffload.engine import Engine
from kvoffload.types import EngineOptions, OpKind, Region
from tests.engine.faulty import FaultPlan
from tests.engine.world import (
    BADMSG,
    C_ENGINES,
    CANCELED,
    FOREVER_US,
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
from tests.patience import wait_until

HOUR_US = 3600 * 10**6  # of operations whose deadline passes when a test says so
SHORT_US = 100_000


@dataclass
class World:
    engine: Engine
    kv: KVCache
    faults: FaultPlan
    paths: tuple[str, ...]

    def wait_until_none_is_abandoned(self) -> None:
        wait_until(lambda: self.engine.stats()["abandoned"] == 0)

    def times_out(self, begun: int, *ops: np.ndarray) -> dict[int, int]:
        """Statuses by id, where the deadline passes when so many of the operations have begun and stall."""
        stalled = sum(kind.waiting for kind in self.faults.kinds)
        batch = np.concatenate(ops)
        batch["timeout_us"] = HOUR_US
        assert self.engine.submit(batch) == len(batch)
        wait_until(lambda: sum(kind.waiting for kind in self.faults.kinds) == stalled + begun)
        self.faults.deadlines_pass()
        return {int(done["id"]): int(done["status"]) for done in self.engine.poll()}

    def gives_up(self, op: np.ndarray) -> None:
        """The operation begins, stalls and times out."""
        assert self.times_out(1, op) == {int(op["id"][0]): TIMEDOUT}

    def completes(self) -> list[int]:
        wait_until(lambda: self.engine.wait(0.1))
        return self.engine.poll()["status"].tolist()


@pytest.fixture(params=C_ENGINES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def world(name: str, faults: FaultPlan, tmp_path: Path) -> Iterator[World]:
    kv, files = KVCache(), make_files(tmp_path / "store")
    with open_engine(name, kv, files) as engine:
        yield World(engine, kv, faults, files.paths)
        faults.heal()


# ---- what was given up ----


def test_late_read_cannot_touch_the_slot_given_to_another_block(world):
    engine, kv = world.engine, world.kv
    stored(engine, 1, 0, 3)
    world.faults.read.set(stall=1)
    world.gives_up(read(1, 5, 3))
    assert engine.stats()["abandoned"] == 1
    assert run_one(engine, copy_in(1, 5)) == BADMSG, "half a block is no block"
    assert run_one(engine, copy_out(2, 5)) == 0
    world.faults.heal()
    world.wait_until_none_is_abandoned()
    assert run_one(engine, copy_in(2, 5, kv_block=7)) == 0
    assert kv.block(7) == kv.block(2)


def test_memory_of_late_reads_is_given_to_nobody(world):
    """All there is but one piece is filled by others while late reads have the rest."""
    engine, kv = world.engine, world.kv
    for number in range(8):
        stored(engine, number, number, number)
    assert run_one(engine, copy_out(23, 7)) == run_one(engine, write(23, 7, 9)) == 0
    world.faults.read.set(stall=1)
    spares = engine.options.spare_slots
    for n in range(1, spares):
        world.gives_up(read(23, 7, 9, id=n))
    assert engine.stats()["abandoned"] == spares - 1
    for number in range(8):
        assert run_one(engine, copy_out(8 + number, number)) == 0
    world.faults.heal()
    world.wait_until_none_is_abandoned()
    for number in range(8):
        assert run_one(engine, copy_in(8 + number, number, kv_block=20)) == 0
        assert kv.block(20) == kv.block(8 + number)


def test_late_write_cannot_land_on_newer_content(world):
    engine, kv = world.engine, world.kv
    stored(engine, 1, 0, 3)
    assert run_one(engine, copy_out(2, 1)) == 0
    world.faults.write.set(stall=1)
    world.gives_up(write(1, 0, 3, generation=1))
    assert run_one(engine, write(2, 1, 3, timeout_us=SHORT_US)) == TIMEDOUT, "waits for the late one"
    assert run_one(engine, read(1, 2, 3, timeout_us=SHORT_US)) == TIMEDOUT, "waits for the late one"
    assert run_one(engine, copy_out(4, 0)) == 0, "the late write keeps its memory, the slot gets other"
    assert engine.submit(write(2, 1, 3)) == 1
    world.faults.heal()
    assert world.completes() == [0]
    assert run_one(engine, load(2, 3, 9)) == 0
    assert kv.block(9) == kv.block(2)
    assert run_one(engine, copy_in(4, 0, kv_block=10)) == 0
    assert kv.block(10) == kv.block(4)


def test_late_copy_out_cannot_touch_the_slot_given_to_another_block(world):
    engine, kv = world.engine, world.kv
    world.faults.copy_out.script("stall")
    world.gives_up(copy_out(1, 5))
    assert engine.stats()["abandoned"] == 1
    assert run_one(engine, copy_in(1, 5)) == BADMSG
    assert run_one(engine, copy_out(2, 5)) == 0
    world.faults.heal()
    world.wait_until_none_is_abandoned()
    assert run_one(engine, copy_in(1, 5)) == BADMSG, "late is as good as never"
    assert run_one(engine, copy_in(2, 5, kv_block=7)) == 0
    assert kv.block(7) == kv.block(2)


def test_staged_load_that_times_out_cancels_its_copy(world):
    stored(world.engine, 1, 0, 3)
    before = world.kv.everything()
    world.faults.read.set(stall=1)
    assert world.times_out(1, load(1, 3, 8)) == {1: TIMEDOUT, 1001: CANCELED}
    assert world.engine.stats()["abandoned"] == 1
    world.faults.heal()
    world.wait_until_none_is_abandoned()
    assert world.kv.everything() == before


def test_pair_ends_by_the_earlier_timeout(world):
    stored(world.engine, 1, 0, 3)
    world.faults.read.set(stall=1)
    pair = load(1, 3, 8, timeout_us=FOREVER_US)
    pair["timeout_us"][1] = SHORT_US
    assert run(world.engine, pair) == {1: TIMEDOUT, 1001: CANCELED}


def test_a_load_ends_at_its_deadline_and_not_when_the_drive_answers(world):
    stored(world.engine, 1, 0, 3)
    world.faults.read.set(stall=1)
    start = time.monotonic()
    assert run(world.engine, load(1, 3, 8, timeout_us=SHORT_US)) == {1: TIMEDOUT, 1001: CANCELED}
    assert time.monotonic() - start >= SHORT_US / 1e6
    assert world.times_out(1, load(1, 3, 9)) == {1: TIMEDOUT, 1001: CANCELED}
    assert world.faults.read.waiting == world.engine.stats()["abandoned"] > 0, "the drive has not answered yet"


def test_a_copy_in_that_has_begun_is_waited_for(world):
    assert run_one(world.engine, copy_out(1, 0)) == 0
    world.faults.copy_in.script("stall")
    assert world.times_out(1, copy_in(1, 0, kv_block=8)) == {}
    world.faults.release()
    assert world.completes() == [0]
    assert world.kv.block(8) == world.kv.block(1)


# ---- places ----


def test_without_a_spare_loads_wait_and_then_time_out(world):
    engine = world.engine
    stored(engine, 1, 0, 2)
    stored(engine, 1, 0, 3)
    world.faults.read.set(stall=1)
    spares = engine.options.spare_slots
    statuses = world.times_out(spares, *(load(1, 2 + n % 2, 8 + n, id=n) for n in range(spares)))
    assert len(statuses) == 2 * spares and set(statuses.values()) == {TIMEDOUT, CANCELED}
    assert run(engine, load(1, 3, 8, timeout_us=SHORT_US)) == {1: TIMEDOUT, 1001: CANCELED}
    assert engine.stats()["abandoned"] == spares, "the last one never started"
    world.faults.heal()
    world.wait_until_none_is_abandoned()
    assert run_one(engine, load(1, 3, 8)) == 0


def test_stalled_drive_never_holds_more_than_io_depth(world):
    engine, kv = world.engine, world.kv
    for number in range(8):
        stored(engine, number, number, number)
    world.faults.read.set(stall=1)
    world.faults.write.set(stall=1)
    for turn in range(3):
        ops = [read(n, n, n, id=100 * turn + n, timeout_us=SHORT_US) for n in range(8)]
        assert set(run(engine, *ops).values()) == {TIMEDOUT}
        assert engine.stats()["abandoned"] <= engine.options.io_depth
    assert run_one(engine, copy_out(20, 0)) == 0, "DRAM still serves"
    assert run_one(engine, copy_in(20, 0, kv_block=21)) == 0
    assert kv.block(21) == kv.block(20)
    world.faults.heal()
    world.wait_until_none_is_abandoned()
    assert run_one(engine, read(5, 5, 5)) == 0


def test_reads_to_their_own_dram_slots_that_hang_take_no_spare_memory_from_others_of_the_drive(world):
    """A drive that was left alone is tried with a read to spare memory. Behind some that never return it was never started, so
    the drive, which answered again, was never taken back."""
    engine = world.engine
    for number in range(3):
        stored(engine, number, number, 2 * number)
    world.faults.read.script("stall", 2)
    hanging = [read(n, n, 2 * n, id=100 + n, timeout_us=SHORT_US) for n in range(2)]
    assert set(run(engine, *hanging).values()) == {TIMEDOUT}
    assert engine.options.spare_slots // len(world.paths) == 2 and engine.stats()["abandoned"] == 2
    assert run_one(engine, load(2, 4, 9)) == 0
    world.faults.heal()
    world.wait_until_none_is_abandoned()


def test_one_stalled_drive_leaves_places_for_the_others(world):
    engine, kv = world.engine, world.kv
    for number in range(8):
        stored(engine, number, number, number)
    world.faults.only(world.paths[0])
    world.faults.read.set(stall=1)
    world.faults.write.set(stall=1)
    for _ in range(3):
        stuck = [load(0, 0, 8 + n, id=n, timeout_us=SHORT_US) for n in range(8)]
        stuck += [write(n, n, 8 + n, id=100 + n, timeout_us=SHORT_US) for n in (2, 4, 6)]
        assert set(run(engine, *stuck).values()) == {TIMEDOUT, CANCELED}
    assert run(engine, *(write(n, n, 8 + n, timeout_us=FOREVER_US) for n in (1, 3, 5))) == dict.fromkeys((1, 3, 5), 0)
    late = [load(0, 0, 8, id=n, timeout_us=FOREVER_US) for n in range(10, 20)]
    assert engine.submit(np.concatenate(late)) == 20
    assert engine.submit(load(1, 1, 9)) == 2, "behind many that wait for the stalled drive"
    wait_until(lambda: engine.stats()["ops"][OpKind.COPY_IN] == 1)
    assert kv.block(9) == kv.block(1)
    world.faults.heal()
    wait_until(lambda: engine.stats()["ops"][OpKind.COPY_IN] == 11)


def test_few_writes_are_in_the_drive_beside_a_read(name, faults, tmp_path):
    with open_engine(name, KVCache(), make_files(tmp_path / "store", 1)) as engine:
        for number in range(8):
            stored(engine, number, number, number)
        faults.read.set(stall=1)
        faults.write.set(stall=1)
        assert engine.submit(np.concatenate([read(0, 0, 0, id=100), *(write(n, n, n + 8) for n in range(1, 8))])) == 8
        wait_until(lambda: (engine.stats()["in_flight"], engine.stats()["queued"]) == (1 + 2, 5))
        wait_until(lambda: (faults.read.waiting, faults.write.waiting) == (1, 2))
        faults.read.set()
        faults.release()  # the two writes go, too, and the others come in their place
        assert engine.wait(10)
        wait_until(lambda: (engine.stats()["in_flight"], engine.stats()["queued"]) == (engine.options.io_depth // 2, 1))
        faults.heal()
        wait_until(lambda: engine.stats()["ops"][OpKind.WRITE] == 15)


def test_large_writes_in_the_drive_are_bounded_in_bytes(name, faults, tmp_path):
    """So that a load that comes finds a short queue in the drive, where no priority of ours counts."""
    payload = 4 * 2**20
    memory = np.zeros((1, payload), np.uint8)
    with Engine(EngineOptions(payload, dram_slots=8, spare_slots=1, io_backend=name)) as engine:
        engine.bind([[Region(memory.ctypes.data, payload, payload)]])
        engine.attach(make_files(tmp_path / "store", 1, payload_bytes=payload))
        for number in range(8):
            stored(engine, 0, number, number)
        faults.write.set(stall=1)
        assert engine.submit(np.concatenate([write(0, n, n + 8) for n in range(8)])) == 8
        wait_until(lambda: (engine.stats()["in_flight"], engine.stats()["queued"]) == (2, 6))
        faults.heal()
        wait_until(lambda: engine.stats()["ops"][OpKind.WRITE] == 16)


# ---- failures ----


def test_failed_transfers_report_their_errno(world):
    engine, kv = world.engine, world.kv
    stored(engine, 1, 0, 3)
    world.faults.read.set(error=1)
    world.faults.write.set(error=1)
    assert run(engine, load(1, 3, 8)) == {1: -errno.EIO, 1001: CANCELED}
    assert run_one(engine, read(1, 5, 3)) == -errno.EIO
    assert run_one(engine, copy_in(1, 5)) == BADMSG
    assert run_one(engine, write(1, 0, 3)) == -errno.EIO
    world.faults.heal()
    assert run_one(engine, load(1, 3, 8)) == 0
    assert kv.block(8) == kv.block(1)


def test_writes_wait_for_the_file_to_grow_and_reads_do_not(world):
    assert run_one(world.engine, copy_out(1, 0)) == 0
    world.faults.grow.set(stall=1)
    assert world.engine.submit(write(1, 0, 3)) == 1
    wait_until(lambda: world.faults.grow.waiting == 1)
    assert run_one(world.engine, read(1, 1, 3)) == BADMSG
    assert run_one(world.engine, write(1, 0, 5, timeout_us=SHORT_US)) == TIMEDOUT
    world.faults.heal()
    assert world.completes() == [0]


@pytest.mark.parametrize("kind", ("read", "grow", "copy_in"))
def test_close_ends_while_something_stalls(name, kind, faults, tmp_path):
    with open_engine(name, KVCache(), make_files(tmp_path / "store", 1)) as engine:
        stalls = getattr(faults, kind)
        if kind != "grow":
            stored(engine, 1, 0, 3)
        assert run_one(engine, copy_out(1, 0)) == 0
        stalls.set(stall=1)
        assert engine.submit({"read": read(1, 5, 3), "grow": write(1, 0, 3), "copy_in": copy_in(1, 0)}[kind]) == 1
        wait_until(lambda: stalls.waiting == 1)
        engine.close()
