"""The journal's thread: what is durable when, and what it survives."""

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvoffload.errors import StoreError
from kvoffload.store import journal, writer
from kvoffload.store.directory import Directory
from kvoffload.store.journal import Kind, Record
from kvoffload.store.writer import JournalWriter
from tests.patience import PATIENCE_S
from tests.store.helpers import key, namespace_of, open_store, slot_file, write_blocks

FINGERPRINT = b"f" * 16
PUT = Record(Kind.PUT, b"k", 0, 1, 0)


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Directory]:
    with Directory.open(str(tmp_path)) as opened:
        yield opened


def watch(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of files as they are synced, and of those that a synced file then replaces."""
    events: list[str] = []
    real_sync, real_rename = os.fsync, os.rename

    def sync(fd: int) -> None:
        events.append("sync " + os.path.basename(os.readlink(f"/proc/self/fd/{fd}")))
        real_sync(fd)

    def rename(old: str, new: str, **options: Any) -> None:
        events.append(f"rename {new}")
        real_rename(old, new, **options)

    monkeypatch.setattr("kvoffload.store.directory.os.fsync", sync)
    monkeypatch.setattr("kvoffload.store.directory.os.rename", rename)
    return events


def test_slot_files_are_synced_before_a_compacted_journal_replaces_the_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_store(tmp_path) as store:
        write_blocks(store, range(3))
    with monkeypatch.context() as seam:
        events = watch(seam)
        with open_store(tmp_path) as store:  # writes its journal at once
            before = events[: events.index("rename index.journal")]
            assert {"sync rank0of2.slots", "sync rank1of2.slots"} <= set(before)
            events.clear()
            store._writer._limit = 0  # and now again, with slot files that grew
            write_blocks(store, range(3, 6))
            before = events[: events.index("rename index.journal")]
            assert {"sync rank0of2.slots", "sync rank1of2.slots"} <= set(before)


def test_slot_files_are_synced_before_a_record_is_appended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A journal whose pages the kernel wrote back early, before a power loss, knew blocks beyond the end of the slot files,
    and the store was refused as truncated."""
    with open_store(tmp_path) as store:
        events: list[str] = []
        real = writer.write_all
        monkeypatch.setattr(writer, "write_all", lambda fd, data: (events.append("append"), real(fd, data)))
        monkeypatch.setattr(os, "fsync", lambda fd: events.append("sync " + os.path.basename(os.readlink(f"/proc/self/fd/{fd}"))))
        write_blocks(store, range(3))
    before = events[: events.index("append")]
    assert {"sync rank0of2.slots", "sync rank1of2.slots"} <= set(before)


def test_of_a_drive_that_fails_new_blocks_are_left_out_and_the_journal_goes_on_for_the_others(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    paths = [tmp_path / "a", tmp_path / "b"]
    for path in paths:
        path.mkdir()

    def known() -> set[int]:
        body = (namespace_of(paths[0]) / journal.NAME).read_bytes()[journal.HEADER_BYTES :]
        return set(journal.replay(body).blocks.slots.tolist())

    with open_store(paths, ranks=1) as store:
        write_blocks(store, range(4), ranks=1)
        file = slot_file(paths[1], 0, 1)
        write_blocks(store, [4, 6, 5], ranks=1)  # the last is on the second path, and grows its file
        assert known() == set(range(7))
        file.rename(tmp_path / "gone")
        store.put(key(7), 7, store.next_generation(), 0)
        write_blocks(store, [8, 10], ranks=1)
        assert known() == {0, 1, 2, 3, 4, 5, 6, 8, 10}
        assert caplog.text.count("cannot be synced") == 1
        (tmp_path / "gone").rename(file)
        write_blocks(store, [9], ranks=1)
        store._writer._limit = 0  # compacts
        write_blocks(store, [11], ranks=1)
        assert known() == set(range(12))
    with open_store(paths, ranks=1) as store:
        assert len(store.table()) == 12


def test_a_start_is_refused_while_a_drive_cannot_be_synced_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [tmp_path / "a", tmp_path / "b"]
    for path in paths:
        path.mkdir()
    with open_store(paths, ranks=1) as store:
        write_blocks(store, range(8), ranks=1)
    open_store(paths, 5, model="old", ranks=1).close()
    real = os.fsync

    def fails(fd: int) -> None:
        if str(paths[1]) in os.readlink(f"/proc/self/fd/{fd}"):
            raise OSError(5, "Input/output error")
        real(fd)

    with monkeypatch.context() as seam, pytest.raises(StoreError, match="Input/output error"):
        seam.setattr(os, "fsync", fails)
        open_store(paths, 15, ranks=1, clean_obsolete_kv_cache=True)
    assert len(list((paths[0] / "kvoffload").glob("*/"))) == 2
    with open_store(paths, 15, ranks=1) as store:
        assert len(store.table()) == 8


def test_what_was_left_out_is_written_when_its_drive_is_well_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "_RETRY_SECONDS", 0.0)
    with open_store(tmp_path, ranks=1) as store:
        write_blocks(store, range(2), ranks=1)
        file = slot_file(tmp_path, 0, 1)
        file.rename(tmp_path / "gone")
        store.put(key(2), 2, store.next_generation(), 0)
        assert store.flush(PATIENCE_S)
        (tmp_path / "gone").rename(file)
        write_blocks(store, [3], ranks=1)
        assert store.stats().compactions == 2
    with open_store(tmp_path, ranks=1) as store:
        assert len(store.table()) == 4


def test_clear_rewrites_the_journal_so_that_no_damage_can_hide_it(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        write_blocks(store, range(5))
        store.clear()
        store.put(key(9), 2, store.next_generation(), 0)
        assert store.flush(PATIENCE_S)
        records = (namespace_of(tmp_path) / "index.journal").read_bytes()[journal.HEADER_BYTES :]
        assert len(records) == journal.RECORD_BYTES
        assert store.stats().compactions == 2  # of an empty store at its start, and of CLEAR


@pytest.mark.parametrize("failure", [OSError(5, "Input/output error"), StoreError("x is not a regular file"), MemoryError()])
@pytest.mark.parametrize("where", ["sync", "append", "compact"])
def test_the_thread_survives_every_failure_and_catches_up(
    directory: Directory, monkeypatch: pytest.MonkeyPatch, failure: Exception, where: str
) -> None:
    broken = threading.Event()

    def failing(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            if broken.is_set():
                raise failure
            return real(*arguments)

        return call

    monkeypatch.setattr(writer, "_RETRY_SECONDS", 0.0)
    if where == "sync":
        monkeypatch.setattr(os, "fdatasync", failing(os.fdatasync))
    if where == "append":
        monkeypatch.setattr(writer, "write_all", failing(writer.write_all))
    if where == "compact":
        monkeypatch.setattr(directory, "replace", failing(directory.replace))
    under_test = JournalWriter(directory, 8, 1, FINGERPRINT)
    broken.set()
    for record in (Record(Kind.CLEAR), PUT, Record(Kind.TOUCH, b"k", PUT.slot)):
        under_test.push([record])
        assert under_test.flush(PATIENCE_S)
    broken.clear()
    assert under_test.flush(PATIENCE_S)
    assert under_test.close(PATIENCE_S)
    found = journal.load(directory, FINGERPRINT, 8)
    assert found is not None and [entry.key for entry in found.blocks] == [b"k"]


def test_a_key_that_is_no_bytes_is_dropped_and_counted(directory: Directory) -> None:
    under_test = JournalWriter(directory, 8, 1, FINGERPRINT)
    under_test.push([PUT._replace(key="text"), PUT])
    assert under_test.flush(PATIENCE_S)
    assert under_test.dropped == 1
    assert under_test.close(PATIENCE_S)
