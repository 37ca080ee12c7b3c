"""What happens when drives stall, fail or answer in parts. Run by test_faults.py, one scenario a process, with
slow_io.c preloaded: `python -m tests.engine.fault_scenarios <scenario> <folder> <library>`."""

import ctypes
import errno
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from kvoffload.engine import Engine
from kvoffload.layout import slot_bytes, slot_offset
from kvoffload.types import OP_DTYPE, EngineOptions, OpKind, Region
from tests.engine.planner import Planner
from tests.engine.world import (
    BADMSG,
    CANCELED,
    PATIENCE_S,
    PAYLOAD_BYTES,
    SSD_SLOTS,
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
    write,
)

TIMEOUT_US = 300_000  # more than a busy machine delays the pump
FOREVER_US = 2**64 - 1


class Drive:
    """The preloaded library's variables: drive.hold_reads = 1 and the like."""

    def __init__(self, library: str) -> None:
        object.__setattr__(self, "library", ctypes.CDLL(library))

    def __setattr__(self, name: str, value: int) -> None:
        ctypes.c_int.in_dll(self.library, name).value = value

    def wait_until_held(self, count: int) -> None:
        wait_until(lambda: ctypes.c_int.in_dll(self.library, "held").value >= count)


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def descriptors(engine: Engine) -> list[int]:
    """Of the engine's slot files, in their order."""
    paths = [line.removeprefix("file ").split(": ")[0] for line in engine.describe() if line.startswith("file ")]
    found = {}
    for name in os.listdir("/proc/self/fd"):
        if os.path.islink(f"/proc/self/fd/{name}"):
            found[os.readlink(f"/proc/self/fd/{name}")] = int(name)
    return [found[path] for path in paths]


def stored(engine: Engine, block: int, dram: int, ssd: int) -> None:
    assert run_one(engine, copy_out(block, dram)) == 0
    assert run_one(engine, write(block, dram, ssd)) == 0


def late_read_cannot_touch_the_slot_given_to_another_block(engine: Engine, kv: KVCache, drive: Drive) -> None:
    stored(engine, 1, 0, 3)
    drive.hold_reads = 1
    assert run_one(engine, read(1, 5, 3, timeout_us=TIMEOUT_US)) == TIMEDOUT
    assert engine.stats()["abandoned"] == 1
    assert run_one(engine, copy_in(1, 5)) == BADMSG, "half a block is no block"
    assert run_one(engine, copy_out(2, 5)) == 0
    drive.hold_reads = 0
    wait_until(lambda: engine.stats()["abandoned"] == 0)
    assert run_one(engine, copy_in(2, 5, kv_block=7)) == 0
    assert kv.block(7) == kv.block(2)


def late_write_cannot_land_on_newer_content(engine: Engine, kv: KVCache, drive: Drive) -> None:
    stored(engine, 1, 0, 3)
    assert run_one(engine, copy_out(2, 1)) == 0
    drive.hold_writes = 1
    assert run_one(engine, write(1, 0, 3, generation=1, timeout_us=TIMEOUT_US)) == TIMEDOUT
    assert run_one(engine, write(2, 1, 3, timeout_us=TIMEOUT_US)) == TIMEDOUT, "waits for the late one"
    assert run_one(engine, read(1, 2, 3, timeout_us=TIMEOUT_US)) == TIMEDOUT, "waits for the late one"
    assert run_one(engine, copy_out(4, 0)) == 0, "the late write keeps its memory, the slot gets other"
    assert engine.submit(write(2, 1, 3)) == 1
    drive.hold_writes = 0
    wait_until(lambda: engine.wait(0.1))
    assert engine.poll()["status"].tolist() == [0]
    assert run_one(engine, load(2, 3, 9)) == 0
    assert kv.block(9) == kv.block(2)
    assert run_one(engine, copy_in(4, 0, kv_block=10)) == 0
    assert kv.block(10) == kv.block(4)


def staged_load_that_times_out_cancels_its_copy(engine: Engine, kv: KVCache, drive: Drive) -> None:
    stored(engine, 1, 0, 3)
    before = kv.everything()
    drive.hold_reads = 1
    assert run(engine, load(1, 3, 8, timeout_us=TIMEOUT_US)) == {1: TIMEDOUT, 1001: CANCELED}
    drive.hold_reads = 0
    wait_until(lambda: engine.stats()["abandoned"] == 0)
    assert kv.everything() == before


def pair_ends_by_the_earlier_timeout(engine: Engine, _kv: KVCache, drive: Drive) -> None:
    stored(engine, 1, 0, 3)
    drive.hold_reads = 1
    pair = load(1, 3, 8, timeout_us=FOREVER_US)
    pair["timeout_us"][1] = TIMEOUT_US
    assert run(engine, pair) == {1: TIMEDOUT, 1001: CANCELED}
    drive.hold_reads = 0


def without_a_spare_loads_wait_and_then_time_out(engine: Engine, _kv: KVCache, drive: Drive) -> None:
    stored(engine, 1, 0, 2)
    stored(engine, 1, 0, 3)
    drive.hold_reads = 1
    spares = engine.options.spare_slots
    loads = [load(1, 2 + n % 2, 8 + n, id=n, timeout_us=TIMEOUT_US) for n in range(spares)]
    assert set(run(engine, *loads).values()) == {TIMEDOUT, CANCELED}
    assert run(engine, load(1, 3, 8, timeout_us=TIMEOUT_US)) == {1: TIMEDOUT, 1001: CANCELED}
    assert engine.stats()["abandoned"] == spares, "the last one never started"
    drive.hold_reads = 0
    wait_until(lambda: engine.stats()["abandoned"] == 0)
    assert run_one(engine, load(1, 3, 8)) == 0


def stalled_drive_never_holds_more_than_io_depth(engine: Engine, kv: KVCache, drive: Drive) -> None:
    for number in range(8):
        stored(engine, number, number, number)
    drive.hold_reads = drive.hold_writes = 1
    depth = engine.options.io_depth
    for turn in range(3):
        ops = [read(n, n, n, id=100 * turn + n, timeout_us=TIMEOUT_US) for n in range(8)]
        assert set(run(engine, *ops).values()) == {TIMEDOUT}
        assert engine.stats()["abandoned"] <= depth
    assert run_one(engine, copy_out(20, 0)) == 0, "DRAM still serves"
    assert run_one(engine, copy_in(20, 0, kv_block=21)) == 0
    assert kv.block(21) == kv.block(20)
    drive.hold_reads = drive.hold_writes = 0
    wait_until(lambda: engine.stats()["abandoned"] == 0)
    assert run_one(engine, read(5, 5, 5)) == 0


def failed_transfers_report_their_errno(engine: Engine, kv: KVCache, drive: Drive) -> None:
    stored(engine, 1, 0, 3)
    drive.fail_reads = drive.fail_writes = errno.EIO
    assert run(engine, load(1, 3, 8)) == {1: -errno.EIO, 1001: CANCELED}
    assert run_one(engine, read(1, 5, 3)) == -errno.EIO
    assert run_one(engine, copy_in(1, 5)) == BADMSG
    assert run_one(engine, write(1, 0, 3)) == -errno.EIO
    drive.fail_reads = drive.fail_writes = 0
    assert run_one(engine, load(1, 3, 8)) == 0
    assert kv.block(8) == kv.block(1)


def full_disk_fails_the_write_and_nothing_else(engine: Engine, _kv: KVCache, drive: Drive) -> None:
    assert run_one(engine, copy_out(1, 0)) == 0
    drive.fail_allocations = errno.ENOSPC
    assert set(run(engine, *(write(1, 0, n, id=n) for n in range(8))).values()) == {-errno.ENOSPC}
    drive.fail_allocations = 0
    assert run_one(engine, write(1, 0, 3)) == 0
    assert run_one(engine, read(1, 1, 3)) == 0


def file_system_without_fallocate_is_written_to_all_the_same(engine: Engine, _kv: KVCache, drive: Drive) -> None:
    drive.fail_allocations = errno.EOPNOTSUPP
    stored(engine, 1, 0, 3)
    assert run_one(engine, read(1, 1, 3)) == 0
    assert run_one(engine, read(1, 1, 19)) == BADMSG


def file_system_without_fallocate_holds_whole_slots(engine: Engine, _kv: KVCache, drive: Drive) -> None:
    drive.fail_allocations = errno.EOPNOTSUPP
    assert run_one(engine, copy_out(1, 0, group=1)) == 0
    assert run_one(engine, write(1, 0, SSD_SLOTS - 1, group=1)) == 0, "a small block: it does not fill its slot"
    path = Path(os.readlink(f"/proc/self/fd/{descriptors(engine)[1]}"))
    assert path.stat().st_size == slot_offset(SSD_SLOTS // 2, PAYLOAD_BYTES)


def nearly_full_disk_takes_the_slot_that_still_fits(engine: Engine, _kv: KVCache, drive: Drive) -> None:
    drive.largest_allocation = slot_bytes(PAYLOAD_BYTES)
    stored(engine, 1, 0, 0)
    assert run_one(engine, write(1, 0, 6)) == -errno.ENOSPC, "three slots more"
    assert run(engine, write(1, 0, 6, id=1), write(1, 0, 2, id=2)) == {1: -errno.ENOSPC, 2: 0}
    for slot in (0, 2):
        assert run_one(engine, read(1, 1, slot)) == 0


def growth_that_costs_more_than_the_file_may_use_is_given_back(engine: Engine, _kv: KVCache, drive: Drive) -> None:
    assert run_one(engine, copy_out(1, 0)) == 0
    before = [os.stat(fd).st_size for fd in descriptors(engine)]
    drive.extra_blocks = slot_offset(SSD_SLOTS // 2, PAYLOAD_BYTES) // 512
    assert run(engine, write(1, 0, 0, id=1), write(1, 0, 1, id=2)) == {1: -errno.ENOSPC, 2: -errno.ENOSPC}
    assert [os.stat(fd).st_size for fd in descriptors(engine)] == before
    drive.extra_blocks = 0
    assert run_one(engine, write(1, 0, 3)) == 0


def one_stalled_drive_leaves_places_for_the_others(engine: Engine, kv: KVCache, drive: Drive) -> None:
    for number in range(8):
        stored(engine, number, number, number)
    drive.only_fd = descriptors(engine)[0]
    drive.hold_reads = drive.hold_writes = 1
    for _ in range(3):
        stuck = [load(0, 0, 8 + n, id=n, timeout_us=TIMEOUT_US) for n in range(8)]
        stuck += [write(n, n, 8 + n, id=100 + n, timeout_us=TIMEOUT_US) for n in (2, 4, 6)]
        assert set(run(engine, *stuck).values()) == {TIMEDOUT, CANCELED}
    assert run(engine, *(write(n, n, 8 + n, timeout_us=FOREVER_US) for n in (1, 3, 5))) == dict.fromkeys((1, 3, 5), 0)
    late = [load(0, 0, 8, id=n, timeout_us=FOREVER_US) for n in range(10, 20)]
    assert engine.submit(np.concatenate(late)) == 20
    assert engine.submit(load(1, 1, 9)) == 2, "behind many that wait for the stalled drive"
    wait_until(lambda: engine.stats()["ops"][OpKind.COPY_IN] == 1)
    assert kv.block(9) == kv.block(1)
    drive.hold_reads = drive.hold_writes = 0
    wait_until(lambda: engine.stats()["ops"][OpKind.COPY_IN] == 11)


def without_direct_io_files_are_buffered_and_told_so(_engine: Engine, kv: KVCache, drive: Drive) -> None:
    drive.refuse_direct = 1
    with tempfile.TemporaryDirectory() as folder, open_engine("auto", kv, make_files(Path(folder))) as engine:
        told = [line for line in engine.describe() if line.startswith("file ")]
        assert all(line.endswith("buffered by threads, O_DIRECT refused (Invalid argument)") for line in told)
        stored(engine, 1, 0, 3)
        assert run_one(engine, load(1, 3, 8)) == 0
        assert kv.block(8) == kv.block(1)


def writes_wait_for_the_file_to_grow_and_reads_do_not(engine: Engine, _kv: KVCache, drive: Drive) -> None:
    assert run_one(engine, copy_out(1, 0)) == 0
    drive.hold_allocations = 1
    assert engine.submit(write(1, 0, 3)) == 1
    drive.wait_until_held(1)
    assert run_one(engine, read(1, 1, 3)) == BADMSG
    assert run_one(engine, write(1, 0, 5, timeout_us=TIMEOUT_US)) == TIMEDOUT
    drive.hold_allocations = 0
    wait_until(lambda: engine.wait(0.1))
    assert engine.poll()["status"].tolist() == [0]


def short_transfers_are_continued(engine: Engine, kv: KVCache, drive: Drive) -> None:
    drive.short_transfers = 4096
    stored(engine, 1, 0, 3)
    assert run_one(engine, load(1, 3, 8)) == 0
    assert kv.block(8) == kv.block(1)


def few_writes_are_in_the_drive_beside_a_read(_engine: Engine, kv: KVCache, drive: Drive) -> None:
    with tempfile.TemporaryDirectory() as folder, open_engine("threads", kv, make_files(Path(folder), 1)) as engine:
        see_few_writes_beside_a_read(engine, drive)


def see_few_writes_beside_a_read(engine: Engine, drive: Drive) -> None:
    for number in range(8):
        stored(engine, number, number, number)
    drive.hold_reads = drive.hold_writes = 1
    assert engine.submit(np.concatenate([read(0, 0, 0, id=100), *(write(n, n, n + 8) for n in range(1, 8))])) == 8
    wait_until(lambda: (engine.stats()["in_flight"], engine.stats()["queued"]) == (1 + 2, 5))
    drive.wait_until_held(3)
    drive.hold_reads = 0
    wait_until(lambda: engine.wait(0.1))
    wait_until(lambda: (engine.stats()["in_flight"], engine.stats()["queued"]) == (engine.options.io_depth // 2, 3))
    drive.hold_writes = 0
    wait_until(lambda: engine.stats()["ops"][2] == 15)


def large_writes_in_the_drive_are_bounded_in_bytes(_engine: Engine, _kv: KVCache, drive: Drive) -> None:
    """So that a load that comes finds a short queue in the drive, where no priority of ours counts."""
    payload = 4 * 2**20
    memory = np.zeros((1, payload), np.uint8)
    options = EngineOptions(payload, dram_slots=8, spare_slots=1, io_backend="threads")
    with tempfile.TemporaryDirectory() as folder, Engine(options) as engine:
        engine.bind([[Region(memory.ctypes.data, payload, payload)]])
        engine.attach(make_files(Path(folder), 1, payload_bytes=payload))
        for number in range(8):
            stored(engine, 0, number, number)
        drive.hold_writes = 1
        assert engine.submit(np.concatenate([write(0, n, n + 8) for n in range(8)])) == 8
        wait_until(lambda: (engine.stats()["in_flight"], engine.stats()["queued"]) == (2, 6))
        drive.hold_writes = 0
        wait_until(lambda: engine.stats()["ops"][OpKind.WRITE] == 16)


def random_stalls_never_deliver_wrong_bytes(engine: Engine, kv: KVCache, drive: Drive) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}", file=sys.stderr)
    planner, chance = Planner(seed), random.Random(seed)
    written: dict[int, bytes] = {}  # generation -> the bytes that were stored under it
    delivered = timed_out = 0
    for _ in range(300):
        drive.hold_reads, drive.hold_writes = chance.random() < 0.2, chance.random() < 0.2
        batch = np.concatenate([np.zeros(0, OP_DTYPE), *planner.batch()])
        batch["timeout_us"] = chance.choice((5_000, 20_000))
        for op in batch[batch["kind"] == OpKind.COPY_OUT]:
            written[int(op["generation"])] = kv.block(int(op["kv_block"]), int(op["group"]))
        if chance.random() < 0.3:
            drive.hold_reads = drive.hold_writes = 0
        statuses = run(engine, batch)
        for op in batch[batch["kind"] == OpKind.COPY_IN]:
            if statuses[int(op["id"])] == 0:
                assert kv.block(int(op["kv_block"]), int(op["group"])) == written[int(op["generation"])]
                delivered += 1
        timed_out += TIMEDOUT in statuses.values()
        planner.note(statuses)
    drive.hold_reads = drive.hold_writes = 0
    wait_until(lambda: engine.stats()["abandoned"] == 0)
    assert delivered > 0
    assert timed_out > 0


def close_ends_while_a_drive_stalls(engine: Engine, _kv: KVCache, drive: Drive) -> None:
    stored(engine, 1, 0, 3)
    drive.hold_reads = 1
    assert engine.submit(read(1, 5, 3)) == 1
    drive.wait_until_held(1)
    engine.close()


SCENARIOS = {name: member for name, member in list(globals().items()) if getattr(member, "__module__", "") == __name__}
for helper in ("Drive", "wait_until", "stored", "descriptors", "see_few_writes_beside_a_read"):
    del SCENARIOS[helper]

if __name__ == "__main__":
    scenario, folder, library = sys.argv[1:]
    kv = KVCache()
    with open_engine("threads", kv, make_files(Path(folder))) as engine:
        SCENARIOS[scenario](engine, kv, Drive(library))
