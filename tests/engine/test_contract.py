"""What csrc/kvo.h promises, on a working drive."""

import errno
import fcntl
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from kvoffload.engine import Engine, _core
from kvoffload.engine.reference import SUPERBLOCK, ReferenceEngine, pack_superblock, seal
from kvoffload.errors import StoreError
from kvoffload.layout import slot_bytes, slot_offset
from kvoffload.types import NO_SLOT, OP_DTYPE, OpFlag, Region, SlotFiles
from tests.engine.world import (
    BADMSG,
    C_ENGINES,
    CANCELED,
    DRAM_SLOTS,
    ENGINES,
    FINGERPRINT,
    PAYLOAD_BYTES,
    SSD_SLOTS,
    TIMEDOUT,
    KVCache,
    copy_in,
    copy_out,
    load,
    make_files,
    make_options,
    open_engine,
    read,
    run,
    run_one,
    write,
)
from tests.patience import PATIENCE_S

FILE_SYSTEM_BYTES = 4096  # ext4 counts the block that lists a file's extents as the file's
ROOT = Path(__file__).parents[2]
every_engine = pytest.mark.parametrize("name", ENGINES)
c_engine = pytest.mark.parametrize("name", C_ENGINES)


@every_engine
def test_every_operation_completes_exactly_once_however_many_are_submitted(tmp_path: Path, name: str) -> None:
    with open_engine(name, KVCache(), make_files(tmp_path), max_ops=8) as engine:
        for turn in range(20):
            ops = [copy_out(n, n, id=n) for n in range(DRAM_SLOTS)]
            assert set(run(engine, *ops).values()) == {0}
            assert set(run(engine, *(write(n, n, n + turn % 8, id=n) for n in range(DRAM_SLOTS))).values()) == {0}
        stats = engine.stats()
        assert stats["ops"] == (160, 0, 160, 0)
        assert stats["failed"] == (0, 0, 0, 0)
        assert stats["bytes"] == (160 * PAYLOAD_BYTES, 0, 160 * PAYLOAD_BYTES, 0)
        assert (stats["queued"], stats["in_flight"], stats["abandoned"]) == (0, 0, 0)


@every_engine
def test_operations_not_yet_polled_count_against_the_bound(name: str) -> None:
    with open_engine(name, KVCache(), max_ops=4) as engine:
        ops = np.concatenate([copy_out(n, n) for n in range(6)])
        assert engine.submit(ops) == 4
        assert engine.submit(ops[4:]) == 0
        done = 0
        while done < 4:
            assert engine.wait(PATIENCE_S)
            done += len(engine.poll(1))
        assert engine.submit(ops[4:]) == 2


@every_engine
def test_a_chain_is_accepted_whole_or_not_at_all(tmp_path: Path, name: str) -> None:
    with open_engine(name, KVCache(), make_files(tmp_path), max_ops=3) as engine:
        assert engine.submit(np.concatenate([load(1, 1, 1), load(2, 2, 2)])) == 2


@every_engine
def test_a_queued_operation_times_out(tmp_path: Path, name: str) -> None:
    with open_engine(name, KVCache(), make_files(tmp_path)) as engine:
        assert run_one(engine, copy_out(1, 0)) == 0
        assert run(engine, *(write(1, 0, n, id=n, timeout_us=1) for n in range(8))) == dict.fromkeys(range(8), TIMEDOUT)


@c_engine
def test_every_timeout_value_is_in_range(tmp_path: Path, name: str) -> None:
    with open_engine(name, KVCache(), make_files(tmp_path)) as engine:
        assert run_one(engine, copy_out(1, 0, timeout_us=2**64 - 1)) == 0
        assert run_one(engine, write(1, 0, 1, timeout_us=2**64 - 1)) == 0
        assert not engine.wait(0)


@every_engine
def test_a_link_cancels_what_follows_a_failure(tmp_path: Path, name: str) -> None:
    kv = KVCache()
    with open_engine(name, kv, make_files(tmp_path)) as engine:
        before = kv.everything()
        assert run(engine, load(1, 1, 2), load(2, 2, 3, dram=4)) == dict(
            zip((1, 1001, 2, 1002), (BADMSG, CANCELED) * 2, strict=True)
        )
        assert kv.everything() == before


@every_engine
def test_a_block_may_be_read_to_nowhere_to_see_whether_and_how_soon_it_is_there(tmp_path: Path, name: str) -> None:
    with open_engine(name, KVCache(), make_files(tmp_path), spare_slots=2) as engine:
        assert run(engine, copy_out(1, 0)) == {1: 0} == run(engine, write(1, 0, 1))
        before = engine.kv.everything()
        for _ in range(5):  # its memory comes back
            assert run_one(engine, read(1, NO_SLOT, 1)) == 0
            assert run_one(engine, read(1, NO_SLOT, 1, generation=2)) == BADMSG
            assert run_one(engine, read(2, NO_SLOT, 2)) == BADMSG
        assert run(engine, *(read(1, NO_SLOT, 1, id=n) for n in range(8))) == dict.fromkeys(range(8), 0)
        assert engine.kv.everything() == before and run_one(engine, copy_in(1, 0)) == 0


@every_engine
def test_more_staged_loads_than_spare_slots_all_succeed(tmp_path: Path, name: str) -> None:
    kv = KVCache()
    with open_engine(name, kv, make_files(tmp_path), spare_slots=1) as engine:
        for n in range(DRAM_SLOTS):
            assert run_one(engine, copy_out(n, n)) == 0
            assert run_one(engine, write(n, n, n)) == 0
        assert set(run(engine, *(load(n, n, n + 10) for n in range(DRAM_SLOTS))).values()) == {0}
        assert all(kv.block(n + 10) == kv.block(n) for n in range(DRAM_SLOTS))


@every_engine
def test_without_files_dram_works_and_ssd_says_no(name: str) -> None:
    kv = KVCache()
    with open_engine(name, kv) as engine:
        assert run_one(engine, copy_out(1, 0)) == 0
        assert run_one(engine, copy_in(1, 0, kv_block=2)) == 0
        assert kv.block(2) == kv.block(1)
        assert run_one(engine, write(1, 0, 3)) == -errno.ENXIO
        assert run(engine, load(1, 3, 4)) == {1: -errno.ENXIO, 1001: CANCELED}


@every_engine
def test_a_slot_holds_one_key_and_generation(name: str) -> None:
    with open_engine(name, KVCache()) as engine:
        assert run_one(engine, copy_in(1, 0)) == BADMSG, "nothing yet"
        assert run_one(engine, copy_out(1, 0)) == 0
        assert run_one(engine, copy_in(1, 0, generation=2)) == BADMSG
        assert run_one(engine, copy_in(2, 0)) == BADMSG
        assert run_one(engine, copy_in(1, 0, group=1)) == BADMSG
        assert run_one(engine, copy_out(2, 0)) == 0
        assert run_one(engine, copy_in(1, 0)) == BADMSG
        assert run_one(engine, copy_in(2, 0)) == 0


def linked(*ops: np.ndarray) -> np.ndarray:
    batch = np.concatenate(ops)
    batch["flags"][:-1] = OpFlag.LINK
    return batch


MALFORMED = {
    "kind": copy_out(1, 0, kind=4),
    "flag": copy_out(1, 0, flags=2),
    "group": copy_out(1, 0, group=2),
    "DRAM slot": copy_out(1, DRAM_SLOTS),
    "no DRAM slot": copy_out(1, NO_SLOT),
    "SSD slot": write(1, 0, SSD_SLOTS),
    "no SSD slot": read(1, 0, NO_SLOT),
    "empty key": copy_out(1, 0, key_len=0),
    "long key": copy_out(1, 0, key_len=41),
    "bytes after the key": copy_out(1, 0, key_len=4),
    "link from the last": read(1, 0, 0, flags=OpFlag.LINK),
    "link from a copy": linked(copy_out(1, 0), copy_in(1, 0)),
    "link to a write": linked(read(1, 0, 0), write(1, 0, 1)),
    "link to another slot": linked(read(1, 0, 0), copy_in(1, 1)),
    "chain of three": linked(read(1, 0, 0), copy_in(1, 0), copy_in(1, 0)),
}


@pytest.mark.parametrize("wrong", MALFORMED)
@every_engine
def test_a_malformed_operation_is_refused_with_its_whole_batch(tmp_path: Path, name: str, wrong: str) -> None:
    with open_engine(name, KVCache(), make_files(tmp_path)) as engine:
        with pytest.raises(ValueError, match="malformed"):
            engine.submit(np.concatenate([copy_out(3, 3), MALFORMED[wrong]]))
        assert engine.submit(np.zeros(0, OP_DTYPE)) == 0
        assert not engine.wait(0)


@pytest.mark.parametrize("make", (Engine, ReferenceEngine))
def test_nothing_is_accepted_before_bind(make: type) -> None:
    with make(make_options()) as engine, pytest.raises(ValueError, match="nothing bound"):
        engine.submit(copy_out(1, 0))


@every_engine
def test_bind_refuses_blocks_larger_than_a_slot_and_a_second_call(name: str) -> None:
    kv = KVCache()
    with open_engine(name, kv) as engine, pytest.raises(ValueError, match="already"):
        engine.bind(kv.groups)
    make = ReferenceEngine if name == "reference" else Engine
    with make(make_options()) as engine:
        with pytest.raises(ValueError, match="payload"):
            engine.bind([[Region(4096, 0, PAYLOAD_BYTES), Region(4096, 0, 1)]])
        with pytest.raises(ValueError, match="regions"):
            engine.bind([[]])


@pytest.mark.parametrize("first", ([0, 10**6, 2], [0, 2**32 - 1, 2], [0], [], [0, 1], [0, 0, 2], [1, 2]))
def test_bind_refuses_indexes_that_lead_beyond_the_regions(first: list[int]) -> None:
    core = _core.CoreEngine(PAYLOAD_BYTES, DRAM_SLOTS, 4, 64, 8, 2, -1)
    regions = np.array([[4096, 0, 8], [4096, 0, 8]], np.uint64)
    with pytest.raises(ValueError, match="no regions|begin with 0 and end with the number of regions"):
        core.bind(regions, np.array(first, np.uint32))
    core.close()


@pytest.mark.parametrize("change", ({"payload_bytes": 0}, {"spare_slots": 0}, {"max_ops": 0}, {"io_depth": 0}))
def test_options_out_of_range_are_refused_by_name(change: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        Engine(make_options(**change))
    with pytest.raises(ValueError, match="io_backend"):
        Engine(make_options("floppy"))


def damaged_superblock() -> bytes:
    return bytes([0x80 ^ byte if at == 60 else byte for at, byte in enumerate(superblock())])


def superblock(payload_bytes: int = PAYLOAD_BYTES, fingerprint: bytes = FINGERPRINT, index: int = 0) -> bytes:
    return pack_superblock(payload_bytes, fingerprint, index, count=1, rank=0, ranks=1)


def newer_superblock() -> bytes:
    packed = bytearray(superblock()[: SUPERBLOCK.size])
    packed[8] = 2
    return seal(bytes(packed)).ljust(4096, b"\0")


REFUSED = {
    "no superblock": bytes(4096),
    "superblock": b"",
    "damaged superblock": damaged_superblock(),
    "version": newer_superblock(),
    "fingerprint": superblock(fingerprint=bytes(16)),
    "payload bytes": superblock(payload_bytes=PAYLOAD_BYTES + 1),
    "file 1 of 1|path index": superblock(index=1),
}


@pytest.mark.parametrize("found", REFUSED)
@every_engine
def test_attach_refuses_a_file_that_is_not_ours_in_a_sentence(tmp_path: Path, name: str, found: str) -> None:
    path = tmp_path / "x.slots"
    path.write_bytes(REFUSED[found])
    kv = KVCache()
    with open_engine(name, kv) as engine:
        with pytest.raises(StoreError, match=f"{path}: found .*({found}).*, expected"):
            engine.attach(SlotFiles((str(path),), SSD_SLOTS, FINGERPRINT))
        assert path.read_bytes() == REFUSED[found]
        assert run_one(engine, copy_out(1, 0)) == 0, "DRAM still serves"
        engine.attach(make_files(tmp_path / "right"))
        assert run_one(engine, write(1, 0, 3)) == 0


@every_engine
def test_attach_refuses_what_is_no_file(tmp_path: Path, name: str) -> None:
    files = make_files(tmp_path, count=1)
    (tmp_path / "link").symlink_to(files.paths[0])
    with open_engine(name, KVCache()) as engine:
        for path in (tmp_path / "link", tmp_path / "missing", tmp_path):
            with pytest.raises(StoreError, match=str(path)):
                engine.attach(SlotFiles((str(path),), SSD_SLOTS, FINGERPRINT))


@every_engine
def test_attach_refuses_a_file_that_is_being_resized(tmp_path: Path, name: str) -> None:
    files = make_files(tmp_path)
    with open_engine(name, KVCache()) as engine:
        with open(files.paths[1], "rb") as resizing:
            fcntl.flock(resizing, fcntl.LOCK_EX)
            with pytest.raises(StoreError, match=f"{files.paths[1]}: .*being resized by another engine"):
                engine.attach(files)
        engine.attach(files)
        assert run_one(engine, copy_out(1, 0)) == 0
        assert run_one(engine, write(1, 0, 3)) == 0


@every_engine
def test_a_file_cannot_be_locked_for_resizing_while_an_engine_has_it_open(tmp_path: Path, name: str) -> None:
    files = make_files(tmp_path)
    with open(files.paths[0], "rb") as resizing:
        with open_engine(name, KVCache(), files), open_engine(name, KVCache(), files):
            with pytest.raises(BlockingIOError):
                fcntl.flock(resizing, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.flock(resizing, fcntl.LOCK_EX | fcntl.LOCK_NB)


@c_engine
def test_files_never_grow_beyond_their_slots(tmp_path: Path, name: str) -> None:
    files = make_files(tmp_path, count=2, slots=9)
    with open_engine(name, KVCache(), files) as engine:
        assert run_one(engine, copy_out(1, 0)) == 0
        for slot in (8, 0, 7, 3):
            assert run_one(engine, write(1, 0, slot)) == 0
        for path, slots in zip(files.paths, (5, 4), strict=True):
            found = os.stat(path)
            assert found.st_size == slot_offset(slots, PAYLOAD_BYTES)
            assert found.st_blocks * 512 <= found.st_size + FILE_SYSTEM_BYTES


@c_engine
def test_files_grow_by_extents_as_slots_are_first_written(tmp_path: Path, name: str) -> None:
    payload_bytes = 16 * 2**20
    files = make_files(tmp_path, count=1, slots=40, payload_bytes=payload_bytes)
    kv = np.zeros((1, payload_bytes), np.uint8)
    with Engine(make_options(name, payload_bytes=payload_bytes, dram_slots=1, spare_slots=1)) as engine:
        engine.bind([[Region(kv.ctypes.data, payload_bytes, payload_bytes)]])
        engine.attach(files)
        assert run_one(engine, copy_out(0, 0)) == 0
        assert os.stat(files.paths[0]).st_size == slot_offset(0, payload_bytes)
        for slot, slots in ((0, 8), (7, 8), (8, 16)):
            assert run_one(engine, write(0, 0, slot)) == 0
            assert os.stat(files.paths[0]).st_size == slot_offset(slots, payload_bytes)


@c_engine
def test_describe_names_what_was_found(tmp_path: Path, name: str) -> None:
    files = make_files(tmp_path)
    with open_engine(name, KVCache(), files) as engine:
        text = engine.describe()
        assert text[0].startswith(f"io: {name} (")
        assert sum(line.startswith("file ") and "O_DIRECT" in line for line in text) == len(files.paths)
    with open_engine("auto", KVCache()) as engine:
        assert engine.describe()[0].startswith(("io: io_uring (", "io: threads (io_uring", "io: threads (built without"))


IN_A_SANDBOX = """
import ctypes, platform, struct, sys
from pathlib import Path
from tests.engine.world import *

class Filter(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("code", ctypes.c_void_p)]

# a seccomp filter: system call 425, io_uring_setup, fails with EPERM; every other one is allowed
code = b"".join(struct.pack("<HBBI", *step) for step in (
    (0x20, 0, 0, 0), (0x15, 0, 1, 425), (0x06, 0, 0, 0x00050000 | errno.EPERM), (0x06, 0, 0, 0x7FFF0000)))
memory = ctypes.create_string_buffer(code, len(code))
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0  # PR_SET_NO_NEW_PRIVS
assert libc.prctl(22, 2, ctypes.byref(Filter(4, ctypes.addressof(memory))), 0, 0) == 0  # PR_SET_SECCOMP
kv = KVCache()
with open_engine("auto", kv, make_files(Path(sys.argv[1]))) as engine:
    print(engine.describe()[0])
    assert run_one(engine, copy_out(1, 0)) == run_one(engine, write(1, 0, 3)) == run_one(engine, load(1, 3, 2)) == 0
    assert kv.block(2) == kv.block(1)
try:
    open_engine("io_uring", kv)
except OSError as error:
    print(error.strerror)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="seccomp is Linux's")
def test_a_sandbox_without_io_uring_is_served_by_threads_and_told_so(tmp_path: Path) -> None:
    with open_engine("auto", KVCache()) as engine:
        if not engine.describe()[0].startswith("io: io_uring"):
            pytest.skip("no io_uring to deny here")
    command = [sys.executable, "-c", IN_A_SANDBOX, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr
    assert "io: threads (io_uring refused: Operation not permitted)" in done.stdout
    assert "io_uring cannot be used (io_uring refused: Operation not permitted)" in done.stdout


def test_a_forked_child_cannot_use_the_engine_and_does_not_end_it() -> None:
    with open_engine("auto", KVCache()) as engine:
        child = os.fork()
        if child == 0:
            try:
                engine.wait(0)
            except RuntimeError:
                engine.close()
                os._exit(0)
            os._exit(1)
        assert os.waitpid(child, 0)[1] == 0
        assert run_one(engine, copy_out(1, 0)) == 0


@pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="needs a file system in memory")
@c_engine
def test_a_file_system_in_memory_is_served_and_its_direct_io_told(name: str) -> None:
    folder = Path(f"/dev/shm/kvoffload-test-{os.getpid()}")
    kv, files = KVCache(), make_files(folder)
    try:
        with open_engine(name, kv, files) as engine:
            assert run_one(engine, copy_out(1, 0)) == 0
            assert run_one(engine, write(1, 0, 3)) == 0
            assert run_one(engine, load(1, 3, 2)) == 0
            assert kv.block(2) == kv.block(1)
            assert any("O_DIRECT" in line for line in engine.describe())
    finally:
        for path in files.paths:
            os.unlink(path)
        folder.rmdir()


@every_engine
def test_close_ends_with_operations_under_way(tmp_path: Path, name: str) -> None:
    for turn in range(5):
        engine = open_engine(name, KVCache(), make_files(tmp_path / str(turn)))
        engine.submit(np.concatenate([copy_out(n, n) for n in range(DRAM_SLOTS)]))
        engine.wait(PATIENCE_S)
        engine.submit(np.concatenate([write(n, n, n) for n in range(DRAM_SLOTS)] + [load(9, 9, 9)]))
        engine.close()
        engine.close()


@c_engine
def test_a_closed_engine_refuses_calls(name: str) -> None:
    engine = open_engine(name, KVCache())
    engine.close()
    with pytest.raises(ValueError, match="closed"):
        engine.submit(copy_out(1, 0))
    with pytest.raises(ValueError, match="closed"):
        engine.wait(0)


@pytest.fixture
def no_switches() -> Iterator[None]:
    """A thread keeps the interpreter until it waits for something."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(1000)
    yield
    sys.setswitchinterval(usual)


def test_close_is_refused_while_another_thread_waits(no_switches: None) -> None:
    with open_engine("auto", KVCache()) as engine:
        started = threading.Event()

        def wait() -> None:
            started.set()  # who waits for it goes on when this thread waits in the engine
            engine.wait(PATIENCE_S)

        waiter = threading.Thread(target=wait)
        waiter.start()
        started.wait()
        with pytest.raises(RuntimeError, match="another thread"):
            engine.close()
        engine.submit(copy_out(1, 0))
        waiter.join()


@c_engine
def test_many_threads_may_submit_and_poll(tmp_path: Path, name: str) -> None:
    seen: list[int] = []
    lock = threading.Lock()
    with open_engine(name, KVCache(), make_files(tmp_path)) as engine:

        def submit(thread: int) -> None:
            for turn in range(100):
                made = copy_out(thread, thread, id=thread * 1000 + turn)
                while engine.submit(made) == 0:
                    engine.wait(0.01)
                engine.wait(1)
                with lock:
                    seen.extend(engine.poll()["id"].tolist())

        threads = [threading.Thread(target=submit, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        while len(seen) < 4 * 100:
            assert engine.wait(PATIENCE_S)
            seen.extend(engine.poll()["id"].tolist())
        assert not engine.wait(0.5), "nothing completes twice"
    assert sorted(seen) == sorted(thread * 1000 + turn for thread in range(4) for turn in range(100))


def test_slots_on_ssd_are_as_large_as_the_layout_says(tmp_path: Path) -> None:
    assert slot_offset(1, PAYLOAD_BYTES) - slot_offset(0, PAYLOAD_BYTES) == slot_bytes(PAYLOAD_BYTES)
    files = make_files(tmp_path, count=1, slots=1)
    with open_engine("auto", KVCache(), files) as engine:
        assert run_one(engine, copy_out(1, 0)) == 0
        assert run_one(engine, write(1, 0, 0)) == 0
    assert os.stat(files.paths[0]).st_size == slot_offset(1, PAYLOAD_BYTES)
