"""What lies between the store's opening and the engine's: somebody swaps directories and files for something else.

The engine refuses in a sentence, touches nothing outside, and goes on without an SSD."""

import os
import shutil
import stat
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kvoffload.engine import Engine
from kvoffload.engine.reference import ReferenceEngine
from kvoffload.errors import StoreError
from kvoffload.store import Store
from kvoffload.types import EngineOptions, Region, SlotFiles
from tests.engine.world import C_ENGINES, ENGINES, copy_out, load, run_one, write
from tests.store.helpers import OTHER_UID, PAYLOAD, as_other_user, open_store

every_engine = pytest.mark.parametrize("name", ENGINES)
AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
PLACES = ("nvme path", "kvoffload", "namespace", "slot file")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    (tmp_path / "nvme").mkdir()
    with open_store(tmp_path / "nvme", ranks=1) as opened:
        yield opened


def place_of(store: Store, what: str) -> Path:
    file = Path(store.slot_files(0).paths[0])
    return {"slot file": file, **dict(zip(PLACES, reversed(file.parents[:3]), strict=False))}[what]


def open_over(name: str) -> Engine | ReferenceEngine:
    kv = np.random.default_rng(0).integers(0, 256, (4, PAYLOAD), dtype=np.uint8)
    make = ReferenceEngine if name == "reference" else Engine
    engine = make(EngineOptions(PAYLOAD, 4, 2, max_ops=64, io_depth=8, io_backend="auto" if name == "reference" else name))
    engine.bind([[Region(kv.ctypes.data, PAYLOAD, PAYLOAD)]])
    engine.kv = kv  # the engine has its address only
    return engine


def snapshot(folder: Path) -> dict[Path, tuple]:
    """What is below and what it holds; a symlink as itself."""
    found = {each: each.lstat() for each in [folder, *folder.rglob("*")]}
    return {
        each: (status.st_ino, status.st_mode, status.st_size, status.st_mtime_ns, each.read_bytes() if each.is_file() else b"")
        for each, status in found.items()
    }


def assert_refused(name: str, store: Store, pattern: str) -> None:
    with open_over(name) as engine:
        with pytest.raises(StoreError, match=f"slot file {store.slot_files(0).paths[0]}: .*({pattern})"):
            engine.attach(store.slot_files(0))
        assert run_one(engine, copy_out(1, 0)) == 0, "DRAM still serves"


@every_engine
def test_the_stores_files_are_attached_whatever_symlinks_lead_to_the_users_path(name: str, tmp_path: Path) -> None:
    (tmp_path / "real" / "nvme").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with open_store(tmp_path / "link" / "nvme", ranks=1) as store, open_over(name) as engine:
        engine.attach(store.slot_files(0))
        assert run_one(engine, copy_out(1, 0)) == run_one(engine, write(1, 0, 3)) == run_one(engine, load(1, 3, 2)) == 0
        assert (engine.kv[2] == engine.kv[1]).all()


@pytest.mark.parametrize("what", PLACES)
@every_engine
def test_a_symlink_put_in_the_place_of_any_component_is_not_followed(name: str, what: str, store: Store, tmp_path: Path) -> None:
    place = place_of(store, what)
    (tmp_path / "outside").mkdir()
    shutil.move(place, tmp_path / "outside" / "target")  # the very files, under another path
    place.symlink_to(tmp_path / "outside" / "target")
    before = snapshot(tmp_path / "outside")
    assert_refused(name, store, "symbolic link|Not a directory|Too many levels of symbolic links")
    assert snapshot(tmp_path / "outside") == before


@every_engine
def test_a_hard_link_in_the_slot_files_place_is_refused_and_the_other_file_is_not_written(
    name: str, store: Store, tmp_path: Path
) -> None:
    file = place_of(store, "slot file")
    os.link(file, tmp_path / "precious")
    before = snapshot(tmp_path)
    assert_refused(name, store, "a second name")
    assert snapshot(tmp_path) == before


def test_a_second_name_made_while_the_engine_runs_takes_nothing_from_it(store: Store, tmp_path: Path) -> None:
    with open_over("auto") as engine:
        engine.attach(store.slot_files(0))
        os.link(place_of(store, "slot file"), tmp_path / "second")
        assert run_one(engine, copy_out(1, 0)) == run_one(engine, write(1, 0, 3)) == run_one(engine, load(1, 3, 2)) == 0


@pytest.mark.parametrize("kind", ["fifo", "device", "directory", "nothing"])
@every_engine
def test_what_is_no_file_is_refused_and_hangs_nobody(name: str, kind: str, store: Store) -> None:
    file = place_of(store, "slot file")
    file.unlink()
    if kind == "fifo":
        os.mkfifo(file)
    elif kind == "directory":
        file.mkdir()
    elif kind == "device":
        try:
            os.mknod(file, 0o600 | stat.S_IFCHR, os.makedev(1, 3))
        except PermissionError:
            pytest.skip("devices cannot be made here")
    assert_refused(name, store, "no regular file|Is a directory|No such file")


@AS_ROOT
@pytest.mark.parametrize("what", PLACES)
@every_engine
def test_what_another_user_owns_is_refused(name: str, what: str, store: Store) -> None:
    os.chown(place_of(store, what), OTHER_UID, OTHER_UID)
    assert_refused(name, store, "another user")


@AS_ROOT
@every_engine
def test_a_user_is_served_below_a_path_of_roots_but_not_from_roots_own_files(name: str, public_path: Path) -> None:
    """As on a mount point that root made and all may write to."""
    public_path.chmod(0o1777)

    def attach(own_directories: int) -> None:
        with open_store(public_path, ranks=1) as store, open_over(name) as engine:
            engine.attach(replace(store.slot_files(0), own_directories=own_directories))
            assert run_one(engine, copy_out(1, 0)) == run_one(engine, write(1, 0, 3)) == 0

    assert as_other_user(lambda: attach(2)) == ""
    assert "another user" in as_other_user(lambda: attach(3)), "as if the path were ours"


@pytest.mark.parametrize("name", C_ENGINES)
def test_files_are_left_blocking_and_served_as_before(name: str, store: Store) -> None:
    """The flag that keeps a fifo from stopping us would have io_uring refuse reads that take a while."""
    with open_over(name) as engine:
        engine.attach(store.slot_files(0))
        path = store.slot_files(0).paths[0]
        flags = [
            int(Path(f"/proc/self/fdinfo/{fd}").read_text().split("flags:")[1].split()[0], 8)
            for fd in os.listdir("/proc/self/fd")
            if os.path.exists(f"/proc/self/fd/{fd}") and os.readlink(f"/proc/self/fd/{fd}") == path
        ]
        assert len(flags) == 1 and not flags[0] & os.O_NONBLOCK


@pytest.mark.parametrize("folder", [b"caf\xe9", "ä".encode() * 120], ids=["not UTF-8", "cut within a character"])
@every_engine
def test_a_path_that_is_no_utf8_or_too_long_for_a_sentence_is_refused_as_any(name: str, folder: bytes, tmp_path: Path) -> None:
    directory = os.fsencode(tmp_path) + b"/" + folder
    os.mkdir(directory)
    files = SlotFiles((os.fsdecode(directory + b"/0.slots"),), 4, bytes(16))
    with open_over(name) as engine, pytest.raises(StoreError):
        engine.attach(files)
