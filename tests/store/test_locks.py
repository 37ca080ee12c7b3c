"""Who holds what: locks against other engines, their children, and workers that outlive them."""

import fcntl
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvoffload.errors import StoreError
from kvoffload.store import namespace
from kvoffload.store.directory import Directory
from kvoffload.store.namespace import Lock
from tests.patience import PATIENCE_S
from tests.store.helpers import namespace_of, open_store, slot_file, write_blocks


class Child:
    """A forked child that lives until told to end."""

    def __enter__(self) -> "Child":
        hold, self._let_go = os.pipe()
        ready, tell = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self._let_go)
            os.write(tell, b".")
            os.read(hold, 1)
            os._exit(0)
        os.read(ready, 1)
        for fd in (hold, ready, tell):
            os.close(fd)
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._let_go)
        os.waitpid(self.pid, 0)


def test_a_forked_child_does_not_keep_the_namespace(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    with Child():
        store.close()
        open_store(tmp_path).close()


def test_a_forked_child_does_not_let_go_of_the_parents_lock(tmp_path: Path) -> None:
    with open_store(tmp_path), Child(), pytest.raises(StoreError, match=f"in use by process {os.getpid()}:"):
        open_store(tmp_path)


def test_a_child_that_closes_the_inherited_store_closes_no_other_file(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        child = os.fork()
        if child == 0:
            taken = [os.dup(0) for _ in range(8)]  # the numbers of the closed locks are among them
            for lock in store._opened.locks:
                lock.release()
            os._exit(sum(os.fstat(fd) is None for fd in taken))
        assert os.waitpid(child, 0)[1] == 0


@pytest.fixture
def held_by_another(tmp_path: Path) -> Iterator[Path]:
    """A namespace whose lock somebody holds without our bookkeeping, as a child forked by other means would."""
    open_store(tmp_path).close()
    lock = namespace_of(tmp_path) / "lock"
    with open(lock) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield lock


def test_a_lock_whose_writer_is_gone_is_said_to_be_held_by_its_child(tmp_path: Path, held_by_another: Path) -> None:
    with Child() as child:
        held_by_another.write_text(f"{child.pid}\n")
        with pytest.raises(StoreError, match=f"in use by process {child.pid}:"):
            open_store(tmp_path)
    with pytest.raises(StoreError, match=f"in use by a child of process {child.pid}, which is gone"):
        open_store(tmp_path)


@pytest.mark.parametrize("text", ["", "x", "-1", "0", "9" * 30])
def test_a_lock_file_that_tells_no_pid_is_no_matter(tmp_path: Path, held_by_another: Path, text: str) -> None:
    held_by_another.write_text(text)
    with pytest.raises(StoreError, match="in use by"):
        open_store(tmp_path)


def open_descriptors() -> list[str]:
    return sorted(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("call", ["ftruncate", "pwrite"])
def test_a_lock_that_cannot_be_written_is_closed_and_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with Directory.open(str(tmp_path)) as directory:
        before = open_descriptors()
        with monkeypatch.context() as seam, pytest.raises(OSError, match="No space left") as caught:
            seam.setattr(f"kvoffload.store.namespace.os.{call}", fail)
            Lock.try_hold(directory, "lock")
        assert open_descriptors() == before
        assert caught.value.filename == str(tmp_path / "lock")
        lock = Lock.try_hold(directory, "lock")
        assert lock is not None
        lock.release()


def test_a_slot_file_is_not_shortened_or_replaced_while_a_worker_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(namespace, "SLOT_FILE_LOCK_SECONDS", 0.2)
    with open_store(tmp_path) as store:
        write_blocks(store, range(store.slot_count))
    file = slot_file(tmp_path, rank=1)
    size = file.stat().st_size
    with open(file) as worker:
        fcntl.flock(worker, fcntl.LOCK_SH)
        open_store(tmp_path).close()  # of the same size: the slots prove what they hold
        with pytest.raises(StoreError, match=f"slot file {file} is still in use by a worker"):
            open_store(tmp_path, megabytes=8)
        (namespace_of(tmp_path) / "index.journal").rename(tmp_path / "journal")
        with pytest.raises(StoreError, match=f"slot file {file} is still in use by a worker"):
            open_store(tmp_path)
        (tmp_path / "journal").rename(namespace_of(tmp_path) / "index.journal")
    assert file.stat().st_size == size
    with open_store(tmp_path, megabytes=8) as store:
        assert len(store.table()) == store.slot_count
    assert file.stat().st_size < size


def test_a_worker_that_is_about_to_end_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(namespace, "SLOT_FILE_LOCK_SECONDS", PATIENCE_S)
    with open_store(tmp_path) as store:
        write_blocks(store, range(store.slot_count))
    fd = os.open(slot_file(tmp_path), os.O_RDWR)
    fcntl.flock(fd, fcntl.LOCK_SH)
    death = threading.Timer(0.3, os.close, [fd])
    death.start()
    open_store(tmp_path, megabytes=8).close()
    death.join()


def test_somebody_who_only_asks_is_not_taken_for_an_engine(tmp_path: Path) -> None:
    """Who looks at a cache asks by a shared lock, for a moment, without the lock of the path."""
    open_store(tmp_path, model="looked at").close()
    name = namespace_of(tmp_path).name
    with Directory.open(str(tmp_path / "kvoffload" / name)) as directory, open(Path(directory.path) / "lock") as looking:
        fcntl.flock(looking, fcntl.LOCK_SH)
        assert not namespace.is_held(directory)
        fcntl.flock(looking, fcntl.LOCK_EX)
        assert namespace.is_held(directory)
