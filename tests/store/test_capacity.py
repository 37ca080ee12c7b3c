"""One cap for everything below kvoffload/, in physical bytes, whoever wrote it."""

import fcntl
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kvoffload.errors import StoreError
from kvoffload.layout import JOURNAL_BYTES_PER_SLOT, SLOTS_MIN, free_floor, slot_bytes, slot_offset, ssd_slots
from kvoffload.store import Store, capacity, namespace
from kvoffload.store.capacity import Geometry, PathUse, decide_slots, measure
from kvoffload.store.directory import Directory
from tests.store.helpers import MB, PAYLOAD, config, namespace_of, open_store, slot_file, used_bytes, write_blocks

HOLDER = """
import sys, time
from pathlib import Path
from tests.store.helpers import open_store
store = open_store(Path(sys.argv[1]), float(sys.argv[2]), model=sys.argv[3])
print(store.slot_count, store.stats().reserved_bytes, flush=True)
time.sleep(60)
"""


@contextmanager
def live_engine(path: Path, megabytes: float, model: str) -> Iterator[tuple[int, int]]:
    """Another process with an open store; gives its slot count and reserved bytes."""
    command = [sys.executable, "-c", HOLDER, str(path), str(megabytes), model]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        try:
            assert child.stdout is not None
            slots, reserved = child.stdout.readline().split()
            yield int(slots), int(reserved)
        finally:
            child.kill()
            child.wait()


@pytest.fixture
def space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> os.statvfs_result:
    """Of the drive, as it was when the test began: what others write or remove meanwhile is not noticed."""
    found = os.statvfs(tmp_path)
    monkeypatch.setattr(os, "statvfs", lambda path: found)
    return found


def figures(error: StoreError) -> list[int]:
    return [int(figure) for figure in re.findall(r"(?<![\w.])\d{4,}(?![\w.])", str(error))]


def test_a_full_store_stays_under_its_cap(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        for _ in range(3):
            write_blocks(store, range(store.slot_count))
        assert store.stats().reserved_bytes <= 20 * MB
        assert used_bytes(tmp_path / "kvoffload") <= 20 * MB


def test_several_namespaces_share_one_cap(tmp_path: Path) -> None:
    slots = []
    for model in "abc":
        with open_store(tmp_path, 20, model=model) as store:
            slots.append(store.slot_count)
            write_blocks(store, range(min(40, store.slot_count)))
            assert used_bytes(tmp_path / "kvoffload") + 4096 <= 20 * MB
    assert slots[0] > slots[1] > slots[2] >= SLOTS_MIN


def test_a_live_engine_counts_with_all_it_was_promised(tmp_path: Path) -> None:
    with live_engine(tmp_path, 12, "other") as (_, reserved):
        assert 11 * MB < reserved <= 12 * MB
        with open_store(tmp_path, 20) as store:
            assert store.stats().reserved_bytes + reserved <= 20 * MB
            assert store.slot_count >= SLOTS_MIN
    with open_store(tmp_path, 20) as store:  # it was killed, having written nothing
        assert store.slot_count > ssd_slots(19 * MB, PAYLOAD, 2, 1)


def test_two_engines_that_start_at_once_do_not_get_the_same_bytes(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDER, str(tmp_path), "20"]
    children = [subprocess.Popen([*command, model], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for model in "abcd"]
    reserved = []
    try:
        for child in children:
            assert child.stdout is not None and child.stderr is not None
            line = child.stdout.readline()
            if line:
                reserved.append(int(line.split()[1]))
            else:
                assert "StoreError: ssd_kv_offload_gb allows" in child.stderr.read()
    finally:
        for child in children:
            child.kill()
            child.communicate()
    assert reserved
    assert sum(reserved) <= 20 * MB


def test_no_room_left_by_other_namespaces_is_said_with_figures(tmp_path: Path) -> None:
    with open_store(tmp_path, 20, model="big") as store:
        write_blocks(store, range(store.slot_count))
        held = used_bytes(Path(store.directory))
    with pytest.raises(StoreError, match="clean_obsolete_kv_cache=true") as caught:
        open_store(tmp_path, 20)
    allowed, others, needed = figures(caught.value)
    assert allowed == 20 * MB
    assert held <= others <= held + 8192
    assert allowed - others < needed < 3 * MB
    with open_store(tmp_path, 20, clean_obsolete_kv_cache=True) as store:
        assert store.slot_count == ssd_slots(20 * MB, PAYLOAD, 2, 1)


def test_a_cap_of_fewer_than_the_useful_minimum_says_how_much_is_needed(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=f"{SLOTS_MIN} blocks needs") as caught:
        open_store(tmp_path, 1)
    needed = figures(caught.value)[-1]
    with pytest.raises(StoreError):
        open_store(tmp_path, (needed - 1) / MB)
    with open_store(tmp_path, needed / MB) as store:
        assert store.slot_count == SLOTS_MIN


def test_clean_removes_only_namespaces_that_nobody_holds(tmp_path: Path) -> None:
    for model in ("old", "older"):
        open_store(tmp_path, model=model).close()
    root = tmp_path / "kvoffload"
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "manifest.json").write_text("precious")
    (root / ("a" * 32)).symlink_to(outside)
    (root / "notes").mkdir()
    (root / "notes" / "lock").write_text("mine")
    (root / ("b" * 32)).write_text("a file")
    crowded = next(each for each in root.iterdir() if re.fullmatch("[0-9a-f]{32}", each.name) and each.is_dir())
    (crowded / "letter.txt").write_text("mine")
    with live_engine(tmp_path, 5, "live"), open_store(tmp_path, clean_obsolete_kv_cache=True) as store:
        left = {each.name for each in root.iterdir()}
        held = {each.name for each in root.iterdir() if (each / "rank0of2.slots").exists()} - {crowded.name}
        assert len(held) == 2 and Path(store.directory).name in held
        assert left == held | {".lock", "notes", "a" * 32, "b" * 32, crowded.name}
        assert (outside / "manifest.json").read_text() == "precious"
        assert (crowded / "letter.txt").exists() and (crowded / "rank0of2.slots").exists()


def test_a_start_that_is_refused_has_removed_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(namespace, "SLOT_FILE_LOCK_SECONDS", 0.1)
    with open_store(tmp_path) as store:
        write_blocks(store, range(store.slot_count))
        own = Path(store.directory)
    with open_store(tmp_path, 40, model="old") as store:
        old = Path(store.directory)
    before = {each: each.stat() for each in old.iterdir() if each.name != "lock"}
    with pytest.raises(StoreError, match="raise ssd_kv_offload_gb"):  # too small a cap
        open_store(tmp_path, 1, clean_obsolete_kv_cache=True)
    with open(own / "rank0of2.slots") as used, pytest.raises(StoreError, match="still in use"):  # a worker not yet dead
        fcntl.flock(used, fcntl.LOCK_SH)
        open_store(tmp_path, 10, clean_obsolete_kv_cache=True)
    (own / "index.journal").write_bytes(b"x" * 100)
    with pytest.raises(StoreError, match="damaged"):
        open_store(tmp_path, clean_obsolete_kv_cache=True)
    assert {each: each.stat() for each in old.iterdir() if each.name != "lock"} == before
    open_store(tmp_path, clean_obsolete_kv_cache=True, resume_kv_cache=False).close()
    assert not old.exists()


def test_a_later_path_that_is_locked_saves_what_is_obsolete_on_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(namespace, "ROOT_LOCK_SECONDS", 0.1)
    paths = [tmp_path / "a", tmp_path / "b"]
    for path in paths:
        path.mkdir()
        open_store(path, model="old").close()
    old = namespace_of(paths[0])
    with open(paths[1] / "kvoffload" / ".lock") as root, pytest.raises(StoreError, match="has been locked"):
        fcntl.flock(root, fcntl.LOCK_EX)
        open_store(paths, clean_obsolete_kv_cache=True)
    assert (old / "manifest.json").exists()


def test_what_is_obsolete_counts_as_free_and_what_cannot_be_removed_does_not(
    tmp_path: Path, space: os.statvfs_result, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with open_store(tmp_path, 10, model="old") as store:
        write_blocks(store, range(store.slot_count))
        held = used_bytes(Path(store.directory))

    def fail(*_: object) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as seam:
        seam.setattr(namespace, "remove", fail)
        with open_store(tmp_path, 20, clean_obsolete_kv_cache=True) as store:
            assert store.slot_count == ssd_slots(20 * MB - held, PAYLOAD, 2, 1)
    assert "was not removed" in caplog.text
    with Directory.open(str(tmp_path)) as parent, parent.child("kvoffload") as root:
        gone = namespace.obsolete(root, keep=set())
        assert len(gone) == 2
        now, later = measure(root, "", set(), set()), measure(root, "", set(), gone)
    assert (now.others > held, later.others) == (True, 0)
    assert later.free - now.free == now.others
    with open_store(tmp_path, 20, clean_obsolete_kv_cache=True) as store:
        assert store.slot_count == ssd_slots(20 * MB, PAYLOAD, 2, 1)


def test_without_clean_nothing_of_others_is_removed(tmp_path: Path) -> None:
    with open_store(tmp_path, model="old") as store:
        write_blocks(store, range(5))
        old = Path(store.directory)
        before = {each.name: each.read_bytes() for each in old.iterdir()}
    open_store(tmp_path).close()
    assert {each.name: each.read_bytes() for each in old.iterdir()} == before


def test_shrinking_the_cap_drops_the_blocks_beyond_and_gives_their_space_back(tmp_path: Path) -> None:
    with open_store(tmp_path, 20) as store:
        write_blocks(store, reversed(range(store.slot_count)))
    with open_store(tmp_path, 8) as store:
        assert [entry.slot for entry in store.table()] == list(reversed(range(store.slot_count)))
        assert store.slot_count == ssd_slots(8 * MB, PAYLOAD, 2, 1)
        assert used_bytes(tmp_path / "kvoffload") <= 8 * MB
    with open_store(tmp_path, 30) as store:
        assert store.slot_count == ssd_slots(30 * MB, PAYLOAD, 2, 1)
        assert len(store.table()) == ssd_slots(8 * MB, PAYLOAD, 2, 1)
        write_blocks(store, range(store.slot_count))
        assert used_bytes(tmp_path / "kvoffload") <= 30 * MB


def test_several_paths_share_the_cap_evenly_and_the_fullest_decides(tmp_path: Path) -> None:
    paths = [tmp_path / "a", tmp_path / "b"]
    for path in paths:
        path.mkdir()
    with open_store(paths[1], 6, model="other") as store:
        write_blocks(store, range(store.slot_count))
        held = used_bytes(Path(store.directory))
    with open_store(paths, 20) as store:
        assert store.slot_count == ssd_slots(20 * MB - 2 * held, PAYLOAD, 2, 2)
        write_blocks(store, range(store.slot_count))
        assert sum(used_bytes(path / "kvoffload") for path in paths) <= 20 * MB


def test_automatic_takes_most_of_what_is_free_and_settles(tmp_path: Path, space: os.statvfs_result) -> None:
    free = space.f_bavail * space.f_frsize - free_floor(space.f_blocks * space.f_frsize)
    with open_store(tmp_path, -1000) as store:
        assert 0.7 * free < store.stats().reserved_bytes < 0.85 * free
        write_blocks(store, range(20))
        slots = store.slot_count
    with open_store(tmp_path, -1000) as store:
        assert store.slot_count == pytest.approx(slots, rel=0.05)


def test_less_free_than_the_cap_is_said_with_both_figures(tmp_path: Path, space: os.statvfs_result) -> None:
    cap = 2 * space.f_blocks * space.f_frsize
    with pytest.raises(StoreError, match=r"bytes free .*, but ssd_kv_offload_gb \(\d+ bytes\) needs") as caught:
        open_store(tmp_path, cap / MB)
    free, allowed, needed = (int(figure) for figure in re.findall(r"(\d+)(?= bytes| more)", str(caught.value)))
    assert allowed == pytest.approx(cap, rel=1e-6)
    assert free == space.f_bavail * space.f_frsize - free_floor(space.f_blocks * space.f_frsize)
    assert needed == pytest.approx(cap, rel=0.01)


def use(path: str, device: int = 1, free: int = 100 * MB, own: int = 0, others: int = 0, pending: int = 0) -> PathUse:
    return PathUse(path, device, free, own, others, 0, pending)


GEOMETRY = Geometry(PAYLOAD, 2, 2)


def test_two_paths_on_one_drive_do_not_count_its_free_space_twice() -> None:
    with pytest.raises(StoreError, match="/a and /b has 100000000 bytes free"):
        decide_slots(150 * MB, [use("/a"), use("/b")], GEOMETRY)
    assert decide_slots(150 * MB, [use("/a", 1), use("/b", 2)], GEOMETRY)
    assert GEOMETRY.total_bytes(decide_slots(None, [use("/a"), use("/b")], GEOMETRY)) <= 80 * MB


def test_what_live_engines_have_not_allocated_yet_is_not_free() -> None:
    assert decide_slots(90 * MB, [use("/a", 1), use("/b", 2)], GEOMETRY)
    with pytest.raises(StoreError, match="/a has 40000000 bytes free"):
        decide_slots(90 * MB, [use("/a", 1, pending=60 * MB), use("/b", 2)], GEOMETRY)


def test_a_full_grown_cache_on_a_drive_that_others_filled_opens() -> None:
    slots = GEOMETRY.slots(150 * MB)
    full = [use(f"/{index}", free=0, own=GEOMETRY.path_bytes(index, slots)) for index in range(2)]
    assert decide_slots(150 * MB, full, GEOMETRY) == slots


def test_a_cache_that_grew_partly_opens_with_the_slots_that_fit_a_drive_others_filled(caplog: pytest.LogCaptureFixture) -> None:
    grown = GEOMETRY.slots(100 * MB)
    uses = [use(f"/{index}", free=10 * MB, own=GEOMETRY.path_bytes(index, grown)) for index in range(2)]
    slots = decide_slots(150 * MB, uses, GEOMETRY)
    assert "/0 and /1 has 10000000 bytes free beside what is kept for others" in caplog.text
    assert f"the cache has {slots} slots instead of {GEOMETRY.slots(150 * MB)}" in caplog.text
    more = sum(GEOMETRY.path_bytes(index, slots) - use.own for index, use in enumerate(uses))
    another = sum(GEOMETRY.path_bytes(index, slots + 1) - use.own for index, use in enumerate(uses))
    assert 0 < more <= 10 * MB < another


def test_a_cache_that_holds_next_to_nothing_is_refused_on_a_full_drive() -> None:
    with pytest.raises(StoreError, match="/0 and /1 has 0 bytes free beside what is kept for others"):
        decide_slots(150 * MB, [use(f"/{index}", free=0, own=20_000) for index in range(2)], GEOMETRY)


def test_a_full_grown_cache_opens_on_a_full_drive_although_it_never_took_all_that_was_reserved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_store(tmp_path) as store:
        slots = store.slot_count
        write_blocks(store, range(slots))
        assert used_bytes(tmp_path / "kvoffload") < store.stats().reserved_bytes
    monkeypatch.setattr(capacity, "free_floor", lambda file_system_bytes: file_system_bytes)  # as if all were others'
    with open_store(tmp_path) as store:
        assert (store.slot_count, store.stats().resumed) == (slots, slots)
    with open_store(tmp_path, 21) as store:  # it cannot grow to what a higher cap allows, and loses nothing of what it is
        assert (store.slot_count, store.stats().resumed) == (slots, slots)


def test_an_identity_of_megabytes_is_within_the_cap_and_its_cache_is_found_again(tmp_path: Path) -> None:
    """A quantised model's configuration may list every layer of every expert; such a manifest was called damaged."""
    fields = {"model": "m", "quantization": {"ignore": [f"model.layers.0.mlp.experts.{number}" for number in range(50_000)]}}
    for resumed in (0, 1):
        with Store.open(config(tmp_path), fields, PAYLOAD, 2) as store:
            assert (store.stats().resumed > 0) == resumed
            write_blocks(store, range(store.slot_count))
            assert used_bytes(tmp_path / "kvoffload") <= 20 * MB
    shown = json.loads((namespace_of(tmp_path) / "manifest.json").read_text())["identity"]["fields"]
    assert shown["model"] == "m" and shown["quantization"].keys() == {"bytes", "blake2b"}


def test_what_is_kept_for_others_is_two_percent_and_little_of_a_large_drive() -> None:
    assert free_floor(100 * MB) == 2 * MB
    assert free_floor(4 * 10**12) == 10 * 2**30


def test_what_is_kept_for_others_is_not_counted_as_free(tmp_path: Path, space: os.statvfs_result) -> None:
    with Directory.open(str(tmp_path)) as root:
        kept = free_floor(space.f_blocks * space.f_frsize)
        assert measure(root, "", set(), set()).free == space.f_bavail * space.f_frsize - kept


def test_what_the_namespace_already_has_need_not_be_free() -> None:
    assert decide_slots(150 * MB, [use("/a", own=60 * MB), use("/b", own=60 * MB)], GEOMETRY)


def test_the_emptier_drive_does_not_help_the_fuller_one() -> None:
    slots = decide_slots(None, [use("/a", 1, free=10 * MB), use("/b", 2, free=1000 * MB)], GEOMETRY)
    assert GEOMETRY.total_bytes(slots) <= 16 * MB


def test_automatic_on_a_full_drive_says_so() -> None:
    with pytest.raises(StoreError, match=r"ssd_kv_offload_gb=-1 takes 80% of what is free"):
        decide_slots(None, [use("/a", free=1000)], Geometry(PAYLOAD, 2, 1))


@pytest.mark.parametrize("paths", [1, 2, 3])
@pytest.mark.parametrize("ranks", [1, 2, 8])
def test_what_is_reserved_never_exceeds_the_budget(paths: int, ranks: int) -> None:
    for payload in (1, 4096, 100_000, 2 << 20):
        geometry = Geometry(payload, ranks, paths)
        for budget in (3 * MB, 50 * MB, 10**9 + 7):
            assert geometry.total_bytes(geometry.slots(budget)) <= budget or geometry.slots(budget) == 0


def test_every_path_holds_a_block() -> None:
    geometry = Geometry(4096, 1, 20)
    uses = [use(f"/{number}", number) for number in range(20)]
    needed = geometry.total_bytes(20)
    assert decide_slots(needed + 20, uses, geometry) == 20
    with pytest.raises(StoreError, match=f"cache of 20 blocks needs {needed}:"):
        decide_slots(needed - 20, uses, geometry)


def test_what_the_file_system_needs_for_a_file_in_many_pieces_is_reserved(tmp_path: Path) -> None:
    geometry, slots = Geometry(4096, 1, 1), 3000
    files = [os.open(tmp_path / name, os.O_RDWR | os.O_CREAT) for name in "ab"]
    order = [*range(1, slots, 2), *range(0, slots, 2)]
    for number in order:  # two files that grow by turns and not from the front: every slot is a piece
        for fd in files:
            os.posix_fallocate(fd, slot_offset(number, 4096), slot_bytes(4096))
    share = (geometry.path_bytes(0, slots) - geometry.path_bytes(0, 0)) - slots * JOURNAL_BYTES_PER_SLOT
    for fd in files:
        assert os.fstat(fd).st_blocks * 512 <= share + 4096
        os.close(fd)
    assert share >= slots * slot_bytes(4096) * 1.005


def test_a_live_engine_whose_reservation_is_unknown_is_not_started_beside(tmp_path: Path) -> None:
    with live_engine(tmp_path, 5, "other"):
        manifest = namespace_of(tmp_path) / "manifest.json"
        whole = manifest.read_bytes()
        for break_it in (lambda: manifest.write_text("{"), manifest.unlink):
            break_it()
            with pytest.raises(StoreError, match=f"{manifest.parent} is in use by process .* stop it"):
                open_store(tmp_path)
        manifest.write_bytes(whole)
        open_store(tmp_path).close()


def test_a_truncated_file_of_another_namespace_does_not_matter(tmp_path: Path) -> None:
    open_store(tmp_path, model="other").close()
    (namespace_of(tmp_path) / "manifest.json").write_text("{")
    os.truncate(slot_file(tmp_path), 3)
    open_store(tmp_path).close()


def test_what_other_caches_take_of_the_cap_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    geometry = Geometry(PAYLOAD, ranks=1, paths=1)
    slots = decide_slots(20 * MB, [use("/a", others=15 * MB)], geometry)
    (record,) = caplog.records
    assert f"has {slots} slots instead of {geometry.slots(20 * MB)}" in record.getMessage()
    assert "clean_obsolete_kv_cache" in record.getMessage()


def test_engines_of_one_deployment_divide_an_automatic_cap_evenly_full_or_empty(tmp_path: Path) -> None:
    geometry = Geometry(PAYLOAD, ranks=1, paths=1)
    drive, engines = 100 * MB, 3
    owns = [0] * engines
    for _ in range(3):  # lives
        reserved: list[int] = []
        for own in owns:
            pending = sum(promised - max(0, had) for promised, had in zip(reserved, owns, strict=False))
            kin = sum(reserved) + sum(owns[len(reserved) + 1 :])
            found = PathUse("/a", 1, drive - sum(owns), own, kin, kin, pending)
            reserved.append(geometry.total_bytes(decide_slots(None, [found], geometry, engines)))
        assert 0.78 * drive < sum(reserved) <= 0.8 * drive, "in every life as much"
        assert max(reserved) - min(reserved) <= 2 * slot_bytes(PAYLOAD)
        owns = reserved  # all is full


def test_engines_of_one_deployment_divide_the_cap_evenly(caplog: pytest.LogCaptureFixture) -> None:
    geometry = Geometry(PAYLOAD, ranks=1, paths=1)
    first = decide_slots(20 * MB, [use("/a")], geometry, sharers=2)
    second = decide_slots(20 * MB, [use("/a", others=geometry.total_bytes(first))], geometry, sharers=2)
    assert first == second and not caplog.records
    assert 19 * MB < 2 * geometry.total_bytes(first) <= 20 * MB
