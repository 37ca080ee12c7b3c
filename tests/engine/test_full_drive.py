"""A drive that other programs fill meanwhile, for real: a small file system on a loop device. Needs root.

Whatever the cap allows, slot files leave others a little room; what is stored stays, and growth resumes when there is."""

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from kvoffload.engine import Engine
from kvoffload.layout import free_floor, slot_bytes
from kvoffload.types import EngineOptions, Region
from tests.engine.fake_cuda import compile_shared
from tests.engine.loop_device import small_file_system
from tests.engine.world import C_ENGINES, copy_out, load, make_files, run_one, write
from tests.patience import PATIENCE_S

ROOT = Path(__file__).parents[2]
PAYLOAD = 2**18
SLOTS = 400  # more than the drive holds
ENOSPC = -errno.ENOSPC


@pytest.fixture
def drive(tmp_path: Path) -> Iterator[Path]:
    with small_file_system(tmp_path) as folder:
        yield folder


class Space:
    """How much of a drive is free, and another program that takes it."""

    def __init__(self, drive: Path) -> None:
        self._drive = drive
        self._other = drive / "somebody else's"

    def free(self) -> int:
        found = os.statvfs(self._drive)
        return found.f_bavail * found.f_frsize

    def floor(self) -> int:
        found = os.statvfs(self._drive)
        return free_floor(found.f_blocks * found.f_frsize)

    def fill_to(self, free: int) -> None:
        with self._other.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, self.free() - free)

    def give_back(self) -> None:
        self._other.unlink()


def open_on(name: str, drive: Path, files: int = 1) -> Engine:
    kv = np.random.default_rng(0).integers(0, 256, (4, PAYLOAD), dtype=np.uint8)
    engine = Engine(EngineOptions(PAYLOAD, 4, 2, max_ops=64, io_depth=8, io_backend=name))
    engine.bind([[Region(kv.ctypes.data, PAYLOAD, PAYLOAD)]])
    engine.kv = kv  # the engine has its address only
    engine.attach(make_files(drive / "store", files, SLOTS, PAYLOAD))
    assert run_one(engine, copy_out(1, 0)) == 0
    return engine


@pytest.mark.parametrize("name", C_ENGINES)
def test_a_drive_that_others_filled_grows_no_file_and_serves_what_it_has_until_there_is_room_again(name: str, drive: Path) -> None:
    space = Space(drive)
    with open_on(name, drive) as engine:
        assert run_one(engine, write(1, 0, 0)) == 0
        for left in (space.floor() + slot_bytes(PAYLOAD) // 2, space.floor() // 2):
            space.fill_to(left)
            before = space.free()
            assert run_one(engine, write(1, 0, 1)) == ENOSPC
            assert space.free() == before
            assert run_one(engine, load(1, 0, 2)) == 0 and (engine.kv[2] == engine.kv[1]).all()
            assert run_one(engine, write(1, 0, 0)) == 0, "what has room already is written"
            space.give_back()
            engine.kv[2] = 0
        assert run_one(engine, write(1, 0, 1)) == 0
        assert run_one(engine, load(1, 1, 2)) == 0 and (engine.kv[2] == engine.kv[1]).all()


@pytest.mark.parametrize("name", C_ENGINES)
def test_growth_ends_at_the_floor_and_not_before(name: str, drive: Path) -> None:
    space = Space(drive)
    with open_on(name, drive) as engine:
        statuses = [run_one(engine, write(1, 0, slot)) for slot in range(SLOTS)]
        written = statuses.index(ENOSPC)
        assert 0 < written < SLOTS and set(statuses[written:]) == {ENOSPC}
        assert space.floor() <= space.free() < space.floor() + 2 * slot_bytes(PAYLOAD)


# Between a file's look at the free space and its growth, so that the others look before it grew.
SLOW_GROWTH = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <sys/types.h>
#include <unistd.h>
int fallocate(int fd, int mode, off_t at, off_t bytes) {
    usleep(20000);
    return ((int (*)(int, int, off_t, off_t))dlsym(RTLD_NEXT, "fallocate"))(fd, mode, at, bytes);
}
"""


def grow_at_once(drive: Path, files: int = 4, rounds: int = 5) -> None:
    space = Space(drive)
    engines = [open_on("threads", drive / str(rank), files) for rank in range(2)]
    for turn in range(rounds):
        space.fill_to(space.floor() + slot_bytes(PAYLOAD) * 3 // 2)
        for engine in engines:
            ops = np.concatenate([write(1, 0, turn * files + file, id=file) for file in range(files)])
            assert engine.submit(ops) == files
        ended: list[int] = []
        while len(ended) < len(engines) * files:
            for engine in engines:
                engine.wait(0.01)
                ended += engine.poll()["status"].tolist()
        assert set(ended) <= {0, ENOSPC}
        assert space.free() >= space.floor()
        space.give_back()
    for engine in engines:
        engine.close()


def test_ranks_and_files_that_grow_at_once_leave_the_floor(drive: Path, tmp_path: Path) -> None:
    """Each of them finds room for one, so some must give back what they took."""
    (tmp_path / "slow.c").write_text(SLOW_GROWTH)
    library = compile_shared(tmp_path / "slow.so", "-O1", str(tmp_path / "slow.c"), "-ldl")
    program = "import sys\nfrom pathlib import Path\nfrom tests.engine.test_full_drive import *\ngrow_at_once(Path(sys.argv[1]))"
    preload = " ".join(filter(None, (os.environ.get("LD_PRELOAD", ""), str(library))))
    command = [sys.executable, "-c", program, str(drive)]
    environment = os.environ | {"LD_PRELOAD": preload}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr
