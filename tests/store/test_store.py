"""A store's life: blocks come, go, and are found again."""

import json
import os
import stat
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

import kvoffload.store
from kvoffload.errors import StoreError
from kvoffload.layout import JOURNAL_BYTES_PER_SLOT, ssd_slots
from kvoffload.store import Identity, Store, journal, namespace
from kvoffload.store.directory import Directory
from kvoffload.store.opening import CLOSE_SECONDS
from kvoffload.store.writer import QUEUE_RECORDS, JournalWriter
from tests.patience import PATIENCE_S
from tests.store.helpers import MB, PAYLOAD, key, namespace_of, open_store, slot_file, write_blocks


def test_a_new_store_is_empty_private_and_sized_by_the_cap(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        assert list(store.table()) == []
        assert store.slot_count == ssd_slots(20 * MB, PAYLOAD, 2, 1)
        found = Path(store.directory)
        assert sorted(each.name for each in found.iterdir()) == [
            "index.journal",
            "lock",
            "manifest.json",
            "rank0of2.slots",
            "rank1of2.slots",
        ]
        for each in [found, found.parent]:
            assert stat.S_IMODE(each.stat().st_mode) == 0o700
        for each in found.iterdir():
            assert stat.S_IMODE(each.stat().st_mode) == 0o600
        manifest = json.loads((found / "manifest.json").read_text())
        assert manifest["identity"]["fields"] == {"model": "m"}
        assert manifest["slot_count"] == store.slot_count


def test_slot_files_say_what_the_engine_needs(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        files = [store.slot_files(rank) for rank in range(2)]
        assert [file.slot_count for file in files] == [store.slot_count] * 2
        assert files[0].fingerprint != files[1].fingerprint
        assert len(files[0].fingerprint) == 16
        assert [os.path.basename(file.paths[0]) for file in files] == ["rank0of2.slots", "rank1of2.slots"]


def test_blocks_are_found_again_least_recently_used_first(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        write_blocks(store, range(6))
        store.touch([(key(1), 1), (key(99), 2), (key(0), 0)])
        store.delete(key(3), 3)
        store.put(b"x", 4, store.next_generation(), 7)
        before = [(2, 2), (5, 5), (1, 1), (0, 0)]
    with open_store(tmp_path) as store:
        found = list(store.table())
        assert [(entry.key, entry.slot) for entry in found] == [(key(k), s) for k, s in before] + [(b"x", 4)]
        assert found[-1].group == 7
        assert store.stats().resumed == 5


def test_a_slot_belongs_to_the_last_block_put_into_it(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        write_blocks(store, [0])
        store.put(b"other", 0, store.next_generation(), 0)
        assert store.flush(PATIENCE_S)
        assert [entry.key for entry in store.table()] == [b"other"]
        store.delete(key(0), 0)  # of a block already gone: must not free the slot of its successor
    with open_store(tmp_path) as store:
        assert [entry.key for entry in store.table()] == [b"other"]


def test_a_key_put_elsewhere_while_its_delete_was_lost_is_in_the_later_slot_only(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        write_blocks(store, [0, 1, 2, 4])
        store.put(key(1), 4, store.next_generation(), 0)
        store._writer._limit = 0  # so that the next change compacts the journal
        store.touch([(key(0), 0)])
    with open_store(tmp_path) as store:
        assert [(entry.key, entry.slot) for entry in store.table()] == [(key(2), 2), (key(1), 4), (key(0), 0)]


def test_a_start_goes_on_with_the_journal_it_finds_unless_it_grew_long(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        write_blocks(store, range(5))
        store.touch([(key(2), 2)])
    path = namespace_of(tmp_path) / "index.journal"
    found = path.read_bytes()
    with open_store(tmp_path) as store:
        kept = path.read_bytes()
        assert kept[journal.HEADER_BYTES :] == found[journal.HEADER_BYTES :] and kept != found
        store.touch([(key(number), number) for number in range(5)])
    with open_store(tmp_path) as store:
        assert path.stat().st_size == journal.HEADER_BYTES + 5 * journal.RECORD_BYTES
        assert [entry.slot for entry in store.table()] == list(range(5))


def test_a_start_tells_how_long_ago_the_index_was_written_last(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        assert store.idle_s is None
        write_blocks(store, [0])
    path = namespace_of(tmp_path) / "index.journal"
    for ago in (1000.0, -1000.0):
        at = time.time() - ago
        os.utime(path, (at, at))
        with open_store(tmp_path, resume_kv_cache=ago > 0) as store:
            assert store.idle_s is not None and 0 <= store.idle_s - ago < PATIENCE_S
    with open_store(tmp_path) as store:  # a start writes it, too
        assert store.idle_s is not None and 0 <= store.idle_s < PATIENCE_S
    at = time.time() - 1000.0
    os.utime(path, (at, at))
    with open_store(tmp_path, model="another") as store:  # which wears the same drive
        assert store.idle_s is not None and 0 <= store.idle_s - 1000.0 < PATIENCE_S


def test_clear_forgets_everything(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        write_blocks(store, range(5))
        store.clear()
        store.put(key(9), 2, store.next_generation(), 0)
    with open_store(tmp_path) as store:
        assert [entry.key for entry in store.table()] == [key(9)]


def test_no_resume_starts_empty_and_keeps_the_files(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        write_blocks(store, range(5))
        size, inode = slot_file(tmp_path).stat().st_size, slot_file(tmp_path).stat().st_ino
    with open_store(tmp_path, resume_kv_cache=False) as store:
        assert list(store.table()) == []
        assert (slot_file(tmp_path).stat().st_size, slot_file(tmp_path).stat().st_ino) == (size, inode)
    with open_store(tmp_path) as store:
        assert list(store.table()) == []


@pytest.mark.parametrize("settings", [{}, {"resume_kv_cache": False}])
def test_generations_never_come_twice_even_if_the_journal_lost_them(tmp_path: Path, settings: dict[str, bool]) -> None:
    given: list[int] = []
    for _ in range(3):
        with open_store(tmp_path, **settings) as store:
            given += [store.next_generation() for _ in range(100)]  # none of them put
    assert len(set(given)) == 300
    assert given == sorted(given)


def test_another_identity_rank_count_or_size_is_another_namespace(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        write_blocks(store, range(3))
    for other in (
        lambda: open_store(tmp_path, model="n"),
        lambda: open_store(tmp_path, ranks=1),
    ):
        with other() as store:
            assert list(store.table()) == []
    with open_store(tmp_path) as store:
        assert len(store.table()) == 3


def test_identity_does_not_depend_on_the_order_of_fields() -> None:
    one = Identity.of({"a": 1, "b": [2, None]}, 4096, 1)
    assert one == Identity.of({"b": [2, None], "a": 1}, 4096, 1)
    assert one.namespace != Identity.of({"a": 1, "b": [2, None]}, 8192, 1).namespace
    assert len({one.rank_fingerprint(0, 1), one.rank_fingerprint(0, 2), one.rank_fingerprint(1, 2)}) == 3
    with pytest.raises(TypeError):
        Identity.of({"a": b"bytes"}, 4096, 1)


def test_slots_are_striped_over_paths(tmp_path: Path) -> None:
    paths = [tmp_path / "a", tmp_path / "b"]
    for path in paths:
        path.mkdir()
    with open_store(paths) as store:
        assert store.slot_count == ssd_slots(20 * MB, PAYLOAD, 2, 2)
        write_blocks(store, range(9))
        assert [Path(each).parents[2].name for each in store.slot_files(1).paths] == ["a", "b"]
        assert (namespace_of(paths[0]) / "index.journal").exists()
        assert not (namespace_of(paths[1]) / "index.journal").exists()
    with open_store(paths) as store:
        assert len(store.table()) == 9


def test_a_second_engine_in_another_process_is_told_who_holds_the_namespace(tmp_path: Path) -> None:
    program = (
        "import sys, time\nfrom pathlib import Path\nfrom tests.store.helpers import open_store\n"
        "store = open_store(Path(sys.argv[1]))\nprint('open', flush=True)\ntime.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True) as child:
        try:
            assert child.stdout is not None and child.stdout.readline() == "open\n"
            with pytest.raises(StoreError, match=f"in use by process {child.pid}"):
                open_store(tmp_path)
            with open_store(tmp_path, megabytes=60, model="n"):
                pass  # another namespace is free
        finally:
            child.kill()
            child.wait()
    open_store(tmp_path).close()


def test_the_lock_is_free_after_close_and_after_a_failed_open(tmp_path: Path) -> None:
    open_store(tmp_path).close()
    with pytest.raises(StoreError):
        open_store(tmp_path, megabytes=0.5)
    store = open_store(tmp_path)
    with pytest.raises(StoreError, match="in use"):
        open_store(tmp_path)
    store.close()
    store.close()


def test_an_engine_that_is_about_to_be_gone_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(namespace, "NAMESPACE_LOCK_SECONDS", PATIENCE_S)
    dying = open_store(tmp_path)
    death = threading.Timer(0.3, dying.close)
    death.start()
    open_store(tmp_path).close()
    death.join()


def test_a_root_that_stays_locked_is_refused_with_its_holder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(namespace, "ROOT_LOCK_SECONDS", 0.2)
    open_store(tmp_path).close()
    with Directory.open(str(tmp_path)) as parent, parent.child("kvoffload") as root:
        lock = namespace.hold_root(root)
        with pytest.raises(StoreError, match=f"locked for 0 s by process {os.getpid()}"):
            open_store(tmp_path)
        lock.release()


def test_a_failed_first_open_leaves_no_namespace(tmp_path: Path) -> None:
    with pytest.raises(StoreError):
        open_store(tmp_path, megabytes=0.5)
    assert [each.name for each in (tmp_path / "kvoffload").iterdir()] == [".lock"]


def test_the_journal_is_compacted_before_it_outgrows_its_share(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        write_blocks(store, range(10))
        bound = journal.size_limit(store.slot_count)
        for _ in range(500):
            store.touch([(key(number), number) for number in range(10)])
            assert store.flush(PATIENCE_S)
            assert store.stats().journal_bytes <= bound
        assert store.stats().compactions > 1
        assert bound + store.slot_count * journal.RECORD_BYTES <= (
            256 * 1024 - 64 * 1024 + store.slot_count * JOURNAL_BYTES_PER_SLOT
        )
    with open_store(tmp_path) as store:
        assert len(store.table()) == 10


def test_records_the_format_cannot_hold_are_dropped_and_counted(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        store.put(b"k" * 41, 0, 1, 0)
        store.put(b"k", store.slot_count, 1, 0)
        store.put(b"k", 0, 1 << 64, 0)
        store.put(b"k", 0, 1, 1 << 16)
        write_blocks(store, [1])
        store.put(b"k" * 40, 1, (1 << 64) - 1, (1 << 16) - 1)
        assert store.flush(PATIENCE_S)
        assert store.stats().dropped == 4
    with open_store(tmp_path) as store:
        assert [tuple(entry) for entry in store.table()] == [(b"k" * 40, 1, (1 << 64) - 1, (1 << 16) - 1)]


class Disk:
    """Stands before a directory's `replace` and before syncs; fails or hangs when told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.broken = self.gave_up = False
        self.running = threading.Event()
        self.running.set()
        real = os.write
        monkeypatch.setattr("kvoffload.store.directory.os.write", lambda fd, data: self.write(real, fd, data))

    def write(self, real: Callable[[int, memoryview], int], fd: int, data: memoryview) -> int:
        self.gave_up |= not self.running.wait(PATIENCE_S)
        if self.broken:
            real(fd, data[: len(data) // 2])
            raise OSError(28, "No space left on device")
        return real(fd, data)


def test_a_full_disk_loses_records_but_not_the_thread_and_is_repaired(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = open_store(tmp_path)
    write_blocks(store, range(5))
    disk = Disk(monkeypatch)
    disk.broken = True
    for slot in range(5, 10):
        write_blocks(store, [slot])
    assert store.stats().dropped >= 5
    assert caplog.text.count("cannot be written") == 1
    disk.broken = False
    store.close()  # tries once more, from its mirror of the index
    with open_store(tmp_path) as store:
        assert [entry.slot for entry in store.table()] == list(range(10))


def test_a_start_on_a_full_disk_is_refused_with_the_remedy_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_store(tmp_path) as store:
        write_blocks(store, range(5))
    with monkeypatch.context() as during, pytest.raises(StoreError, match="No space left on device.*: free some space there"):
        Disk(during).broken = True
        open_store(tmp_path)
    with open_store(tmp_path) as store:
        assert len(store.table()) == 5


def test_a_journal_torn_by_a_full_disk_gives_what_was_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(tmp_path)
    write_blocks(store, range(5))
    with monkeypatch.context() as during:
        Disk(during).broken = True
        write_blocks(store, range(5, 10))
        store.close()
    with open_store(tmp_path) as store:
        slots = [entry.slot for entry in store.table()]
        assert slots == list(range(len(slots)))
        assert 5 <= len(slots) < 10


def test_a_hanging_disk_never_blocks_the_caller_and_close_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(kvoffload.store, "CLOSE_SECONDS", CLOSE_SECONDS)
    store = open_store(tmp_path)
    write_blocks(store, [1])
    disk = Disk(monkeypatch)
    disk.running.clear()
    for _ in range(2 * QUEUE_RECORDS):
        store.put(key(1), 1, 2, 0)
    assert store.stats().dropped > 0
    assert caplog.text.count("too slow") == 1
    assert not store.flush(0.1)
    store.close()
    assert not disk.gave_up, "none of this has waited for the disk, which still hangs"
    with pytest.raises(StoreError, match="in use"):
        open_store(tmp_path)  # its thread may still write
    disk.running.set()
    store._writer._thread.join(PATIENCE_S)


def test_a_change_costs_the_scheduler_a_few_calls_on_average(tmp_path: Path) -> None:
    """Six, and some more where the journal's thread must be woken: microseconds on any machine."""
    events: Counter[str] = Counter()
    with open_store(tmp_path) as store:
        keys = [key(number) for number in range(100)]
        sys.setprofile(lambda _frame, event, _argument: events.update((event,)))
        for number in range(10_000):
            store.put(keys[number % 100], number % 100, number, 0)
        sys.setprofile(None)
        assert 10_000 < events["call"] + events["c_call"] < 30 * 10_000
        assert store.flush(PATIENCE_S)


def test_compaction_at_run_time_keeps_order_and_content(tmp_path: Path) -> None:
    directory = Directory(str(tmp_path), os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY))
    writer = JournalWriter(directory, 8, 1, b"f" * 16)
    for number in range(5000):
        writer.push([journal.Record(journal.Kind.PUT, key(number), number % 8, number, 0)])
    writer.push([journal.Record(journal.Kind.TOUCH, key(4994), 2), journal.Record(journal.Kind.DELETE, key(4996), 4)])
    assert writer.flush(PATIENCE_S)
    assert writer.compactions > 1
    assert writer.close(PATIENCE_S)
    found = journal.load(directory, b"f" * 16, 8)
    assert found is not None and [entry.slot for entry in found.blocks] == [0, 1, 3, 5, 6, 7, 2]
    assert [entry.key for entry in found.blocks] == [key(4992 + entry.slot) for entry in found.blocks]
    directory.close()


def test_a_store_without_an_ssd_tier_is_a_mistake_of_the_caller(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no SSD tier"):
        open_store(tmp_path, megabytes=0)


def test_the_package_needs_neither_vllm_nor_torch() -> None:
    program = "import sys, kvoffload.store; assert not {'vllm', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_store_is_open_until_closed(tmp_path: Path) -> None:
    store: Store = open_store(tmp_path)
    threads = [thread for thread in threading.enumerate() if thread.name == "kvoffload-journal"]
    assert len(threads) == 1
    store.close()
    assert not threads[0].is_alive()
