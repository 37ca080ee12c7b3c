"""What happens on a file system that is full or lacks something. Run by test_file_systems.py, one scenario a process, with
file_system.c preloaded: `python -m tests.engine.file_system_scenarios <scenario> <folder> <library>`."""

import ctypes
import errno
import os
import sys
import tempfile
from pathlib import Path

from kvoffload.engine import Engine
from kvoffload.layout import slot_bytes, slot_offset
from tests.engine.world import (
    BADMSG,
    PAYLOAD_BYTES,
    SSD_SLOTS,
    KVCache,
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


class Disk:
    """The preloaded library's variables: disk.extra_blocks = 1 and the like."""

    def __init__(self, library: str) -> None:
        object.__setattr__(self, "library", ctypes.CDLL(library))

    def __setattr__(self, name: str, value: int) -> None:
        ctypes.c_int.in_dll(self.library, name).value = value


def descriptors(engine: Engine) -> list[int]:
    """Of the engine's slot files, in their order."""
    paths = [line.removeprefix("file ").split(": ")[0] for line in engine.describe() if line.startswith("file ")]
    found = {}
    for name in os.listdir("/proc/self/fd"):
        if os.path.islink(f"/proc/self/fd/{name}"):
            found[os.readlink(f"/proc/self/fd/{name}")] = int(name)
    return [found[path] for path in paths]


def full_disk_fails_the_write_and_nothing_else(engine: Engine, _kv: KVCache, disk: Disk) -> None:
    assert run_one(engine, copy_out(1, 0)) == 0
    disk.fail_allocations = errno.ENOSPC
    assert set(run(engine, *(write(1, 0, n, id=n) for n in range(8))).values()) == {-errno.ENOSPC}
    disk.fail_allocations = 0
    assert run_one(engine, write(1, 0, 3)) == 0
    assert run_one(engine, read(1, 1, 3)) == 0


def file_system_without_fallocate_is_written_to_all_the_same(engine: Engine, _kv: KVCache, disk: Disk) -> None:
    disk.fail_allocations = errno.EOPNOTSUPP
    stored(engine, 1, 0, 3)
    assert run_one(engine, read(1, 1, 3)) == 0
    assert run_one(engine, read(1, 1, 19)) == BADMSG


def file_system_without_fallocate_holds_whole_slots(engine: Engine, _kv: KVCache, disk: Disk) -> None:
    disk.fail_allocations = errno.EOPNOTSUPP
    assert run_one(engine, copy_out(1, 0, group=1)) == 0
    assert run_one(engine, write(1, 0, SSD_SLOTS - 1, group=1)) == 0, "a small block: it does not fill its slot"
    path = Path(os.readlink(f"/proc/self/fd/{descriptors(engine)[1]}"))
    assert path.stat().st_size == slot_offset(SSD_SLOTS // 2, PAYLOAD_BYTES)


def nearly_full_disk_takes_the_slot_that_still_fits(engine: Engine, _kv: KVCache, disk: Disk) -> None:
    disk.largest_allocation = slot_bytes(PAYLOAD_BYTES)
    stored(engine, 1, 0, 0)
    assert run_one(engine, write(1, 0, 6)) == -errno.ENOSPC, "three slots more"
    assert run(engine, write(1, 0, 6, id=1), write(1, 0, 2, id=2)) == {1: -errno.ENOSPC, 2: 0}
    for slot in (0, 2):
        assert run_one(engine, read(1, 1, slot)) == 0


def growth_that_costs_more_than_the_file_may_use_is_given_back(engine: Engine, _kv: KVCache, disk: Disk) -> None:
    assert run_one(engine, copy_out(1, 0)) == 0
    before = [os.stat(fd).st_size for fd in descriptors(engine)]
    disk.extra_blocks = slot_offset(SSD_SLOTS // 2, PAYLOAD_BYTES) // 512
    assert run(engine, write(1, 0, 0, id=1), write(1, 0, 1, id=2)) == {1: -errno.ENOSPC, 2: -errno.ENOSPC}
    assert [os.stat(fd).st_size for fd in descriptors(engine)] == before
    disk.extra_blocks = 0
    assert run_one(engine, write(1, 0, 3)) == 0


def without_direct_io_files_are_buffered_and_told_so(_engine: Engine, kv: KVCache, disk: Disk) -> None:
    disk.refuse_direct = 1
    with tempfile.TemporaryDirectory() as folder, open_engine("auto", kv, make_files(Path(folder))) as engine:
        told = [line for line in engine.describe() if line.startswith("file ")]
        assert all(line.endswith("buffered by threads, O_DIRECT refused (Invalid argument)") for line in told)
        stored(engine, 1, 0, 3)
        assert run_one(engine, load(1, 3, 8)) == 0
        assert kv.block(8) == kv.block(1)


SCENARIOS = {name: member for name, member in list(globals().items()) if getattr(member, "__module__", "") == __name__}
for helper in ("Disk", "descriptors"):
    del SCENARIOS[helper]

if __name__ == "__main__":
    scenario, folder, library = sys.argv[1:]
    kv = KVCache()
    with open_engine("threads", kv, make_files(Path(folder))) as engine:
        SCENARIOS[scenario](engine, kv, Disk(library))
