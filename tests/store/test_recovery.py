"""What a kill, a torn tail or a flipped byte leaves: always a state that was once true. Seeds are printed."""

import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import xxhash

from kvoffload.errors import StoreError
from kvoffload.store import journal
from kvoffload.store.journal import HEADER_BYTES, RECORD_BYTES, Kind, Record
from kvoffload.table import Entry
from tests.store.helpers import key, namespace_of, open_store, slot_file, write_blocks

FINGERPRINT = b"f" * 16


@pytest.fixture(autouse=True)
def quick_syncs(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a killed process wrote is in the page cache, synced or not; on a busy disk the syncs are most of the time."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    monkeypatch.setattr(os, "fdatasync", lambda fd: None)


def random_records(generator: random.Random, count: int) -> list[Record]:
    records = []
    for number in range(count):
        kind = generator.choices(list(Kind), weights=[50, 15, 34, 1])[0]
        name = b"" if kind == Kind.CLEAR else generator.randbytes(1) * generator.randint(1, 40)
        if kind == Kind.PUT:
            records.append(Record(kind, name, generator.randrange(20), number, generator.randrange(4)))
        else:
            records.append(Record(kind, name))
    return records


def states(records: list[Record]) -> list[list[Entry]]:
    """The true state after 0, 1, 2, .. records, by a model that is nothing but a list."""
    blocks: list[Entry] = []
    history = [[]]
    for kind, name, slot, generation, group in records:
        if kind == Kind.PUT:
            blocks = [block for block in blocks if block.key != name and block.slot != slot]
            blocks = [*blocks, Entry(name, slot, generation, group)]
        elif kind == Kind.DELETE:
            blocks = [block for block in blocks if block.key != name]
        elif kind == Kind.TOUCH:
            blocks = sorted(blocks, key=lambda block: block.key == name)
        else:
            blocks = []
        history.append(blocks)
    return history


def encode(records: list[Record]) -> bytes:
    return b"".join(journal.encode_records(records, 1))


@pytest.fixture
def generator(request: pytest.FixtureRequest) -> random.Random:
    seed = int(os.environ.get("KVOFFLOAD_SEED", random.SystemRandom().randrange(1 << 32)))
    print(f"KVOFFLOAD_SEED={seed}")
    return random.Random(seed)


def test_replay_follows_every_record(generator: random.Random) -> None:
    for count in (0, 1, 50, 2000):
        records = random_records(generator, count)
        blocks, _, good, skipped = journal.replay(encode(records))
        assert list(blocks) == states(records)[-1]
        assert (good, skipped) == (count * RECORD_BYTES, 0)


def test_an_index_told_in_puts_is_the_same_index(generator: random.Random) -> None:
    blocks, *_ = journal.replay(encode(random_records(generator, 500)))
    again, *_ = journal.replay(encode(list(journal.puts(blocks))))
    assert list(again) == list(blocks)


def test_a_tail_cut_at_any_byte_gives_the_records_before_it(generator: random.Random) -> None:
    records = random_records(generator, 60)
    body, history = encode(records), states(records)
    for length in range(len(body) + 1):
        blocks, _, good, skipped = journal.replay(body[:length])
        assert (good, skipped) == (length // RECORD_BYTES * RECORD_BYTES, 0)
        assert list(blocks) == history[length // RECORD_BYTES]


def test_a_flip_of_any_byte_costs_that_record_alone(generator: random.Random) -> None:
    records = random_records(generator, 40)
    body = encode(records)
    for position in range(len(body)):
        damaged = bytearray(body)
        damaged[position] ^= generator.randrange(1, 256)
        blocks, _, good, skipped = journal.replay(bytes(damaged))
        bad = position // RECORD_BYTES
        assert (good, skipped) == ((39 * RECORD_BYTES, 0) if bad == 39 else (40 * RECORD_BYTES, 1))
        assert list(blocks) == states(records[:bad] + records[bad + 1 :])[-1]


@pytest.mark.parametrize("kind", [Kind.PUT, Kind.DELETE, Kind.TOUCH])
def test_a_record_without_a_key_is_bad(kind: Kind) -> None:
    """Operations of the engine have a key of 1 to 40 bytes."""
    good = Record(Kind.PUT, b"a", 3, 1)
    assert journal.replay(encode([Record(kind, b"", 4, 2), good]))[2:] == (2 * RECORD_BYTES, 1)
    assert [entry.key for entry in journal.replay(encode([Record(kind, b"", 4, 2), good])).blocks] == [b"a"]


def test_a_record_whose_key_is_not_followed_by_zeros_is_bad() -> None:
    """Its checksum may be right all the same, and the key would then be in the table twice."""
    good = encode([Record(Kind.PUT, b"abc", 3, 1)])
    forged = bytearray(encode([Record(Kind.PUT, b"abc", 3, 1), Record(Kind.PUT, b"abc", 4, 2)])[RECORD_BYTES:])
    forged[24 + 3] = 1
    forged[-8:] = xxhash.xxh3_64_intdigest(bytes(forged[:-8])).to_bytes(8, "little")
    blocks, _, used_bytes, skipped = journal.replay(good + bytes(forged))
    assert ([entry.slot for entry in blocks], used_bytes, skipped) == ([3], RECORD_BYTES, 0)


def test_a_tail_with_nothing_valid_in_it_ends_the_journal(generator: random.Random) -> None:
    records = random_records(generator, 20)
    history = states(records)
    for tail in (bytes(100 * RECORD_BYTES), generator.randbytes(100 * RECORD_BYTES), encode(records)):
        assert journal.replay(encode(records) + tail)[2:] == (20 * RECORD_BYTES, 0)
        assert list(journal.replay(encode(records) + tail).blocks) == history[-1]


def test_a_damaged_page_in_the_middle_costs_the_records_in_it(generator: random.Random) -> None:
    records = [Record(Kind.PUT, b"%d" % number, number, number) for number in range(1000)]
    body = bytearray(encode(records))
    body[4096:8192] = generator.randbytes(4096)
    blocks, _, good, skipped = journal.replay(bytes(body))
    first, last = 4096 // RECORD_BYTES, 8191 // RECORD_BYTES
    assert (good, skipped) == (len(body), last - first + 1)
    assert [entry.slot for entry in blocks] == [*range(first), *range(last + 1, 1000)]


def test_records_swapped_or_zeroed_are_skipped_and_shifted_ones_end_the_journal(generator: random.Random) -> None:
    records = random_records(generator, 30)
    pieces = [encode(records)[at : at + RECORD_BYTES] for at in range(0, 30 * RECORD_BYTES, RECORD_BYTES)]
    at = generator.randrange(28)  # with two more behind it
    swapped = [*pieces[:at], pieces[at + 1], pieces[at], *pieces[at + 2 :]]
    repeated = [*pieces[: at + 1], *pieces[at:]]
    zeroed = [*pieces[:at], bytes(RECORD_BYTES), *pieces[at + 1 :]]
    for found, left in (
        (swapped, records[:at] + records[at + 2 :]),
        (repeated, records[: at + 1]),
        (zeroed, records[:at] + records[at + 1 :]),
    ):
        assert list(journal.replay(b"".join(found)).blocks) == states(left)[-1]


@pytest.mark.parametrize("extra", [b"\0" * 4096, b"x" * 71, b"x" * 1000])
def test_a_store_opens_with_garbage_after_its_journal(tmp_path: Path, extra: bytes, caplog: pytest.LogCaptureFixture) -> None:
    with open_store(tmp_path) as store:
        write_blocks(store, range(5))
    with open(namespace_of(tmp_path) / "index.journal", "ab") as file:
        file.write(extra)
    with open_store(tmp_path) as store:
        assert [entry.slot for entry in store.table()] == list(range(5))
        assert f"ends in {len(extra)} bytes that are torn or damaged" in caplog.text
        write_blocks(store, [5])
    with open_store(tmp_path) as store:
        assert [entry.slot for entry in store.table()] == list(range(6))


def test_a_flipped_byte_anywhere_in_a_stores_journal_never_raises_anything_but_store_error(
    tmp_path: Path, generator: random.Random
) -> None:
    with open_store(tmp_path) as store:
        write_blocks(store, range(3))
        true = list(store.table())
    path = namespace_of(tmp_path) / "index.journal"
    whole = path.read_bytes()
    for position in [*range(HEADER_BYTES), *generator.sample(range(HEADER_BYTES, len(whole)), 20)]:
        damaged = bytearray(whole)
        damaged[position] ^= 0xFF
        path.write_bytes(bytes(damaged))
        if position < HEADER_BYTES:
            with pytest.raises(StoreError, match=r"journal .* resume_kv_cache=false"):
                open_store(tmp_path)
            assert path.read_bytes() == damaged  # nothing was destroyed
        else:
            with open_store(tmp_path) as store:
                bad = (position - HEADER_BYTES) // RECORD_BYTES
                assert list(store.table()) == true[:bad] + true[bad + 1 :]


PUTTER = """
import sys
from pathlib import Path
from kvoffload.table import Entry
from tests.store.helpers import open_store, write_blocks, key
store = open_store(Path(sys.argv[1]))
print("open", flush=True)
write_blocks(store, range(50))
print("acknowledged", flush=True)
number = 50
while True:
    for _ in range(50):
        store.put(key(number), number % 50, store.next_generation(), 0)
        number += 1
    store.touch([(key(number - 7), (number - 7) % 50)])
    print(store.next_generation(), flush=True)
"""


def test_kill_9_in_the_middle_of_puts_loses_only_the_newest(tmp_path: Path, generator: random.Random) -> None:
    highest = 0
    for _ in range(4):
        lines = []
        with subprocess.Popen([sys.executable, "-c", PUTTER, str(tmp_path)], stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None
            for _ in range(generator.randrange(10, 3000)):
                lines.append(child.stdout.readline().strip())
            child.kill()
            child.wait()
        assert lines[:2] == ["open", "acknowledged"]
        with open_store(tmp_path) as store:
            found = list(store.table())
            assert len({entry.slot for entry in found}) == len({entry.key for entry in found}) == len(found) == 50
            assert all(int(entry.key[:32]) % 50 == entry.slot for entry in found)
            numbers = sorted(int(entry.key[:32]) for entry in found)
            assert numbers == list(range(numbers[0], numbers[0] + 50))  # one moment of the child's life
            assert store.next_generation() > max([highest, *(int(line) for line in lines[2:] if line)])
            highest = store.next_generation()


class Killer:
    """Ends this process as kill -9 would, before the nth change of the disk."""

    STEPS = ("mkdir", "write", "rename", "unlink", "rmdir", "fsync", "ftruncate", "pwrite")

    def __init__(self, step: int) -> None:
        self.left = step
        for name in self.STEPS:
            setattr(os, name, self.counted(getattr(os, name)))

    def counted(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def step(*arguments: Any, **options: Any) -> Any:
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            self.left -= 1
            return real(*arguments, **options)

        return step


def dies_at(step: int, action: Callable[[], object]) -> bool:
    """Run `action` in a child that is killed at its nth step; False if it got to its end."""
    child = os.fork()
    if child == 0:
        Killer(step)
        action()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def test_a_kill_at_any_step_of_the_first_open_leaves_a_store_that_opens(tmp_path: Path) -> None:
    step, dying = 0, True
    while dying:
        path = tmp_path / f"step{step}"
        path.mkdir()
        dying = dies_at(step, lambda path=path: open_store(path))
        with open_store(path) as store:
            assert list(store.table()) == []
            write_blocks(store, range(3))
        for each in namespace_of(path).iterdir():
            assert not each.name.endswith(".tmp")
        with open_store(path) as store:
            assert len(store.table()) == 3
        step += 1
    assert step > 20


@pytest.mark.parametrize("change", ["shrink", "grow", "same"])
def test_a_kill_at_any_step_of_a_reopen_loses_no_block_that_has_room(tmp_path: Path, change: str) -> None:
    megabytes = {"shrink": 8.0, "grow": 30.0, "same": 20.0}[change]
    step, dying = 0, True
    while dying:
        path = tmp_path / f"step{step}"
        path.mkdir()
        with open_store(path) as store:
            write_blocks(store, range(store.slot_count))
            size = slot_file(path).stat().st_size
        dying = dies_at(step, lambda path=path: open_store(path, megabytes))
        with open_store(path, megabytes) as store:
            full = min(store.slot_count, (size - 4096) // (4096 + 64 * 1024))
            assert [entry.slot for entry in store.table()] == list(range(full))
        with open_store(path) as store:
            assert [entry.slot for entry in store.table()] == list(range(full))
        step += 1


def test_damage_to_the_journal_of_a_cache_that_shrank_never_brings_back_a_slot_that_is_gone(tmp_path: Path) -> None:
    """Its file is too short for that slot, and a start that finds it so refuses to go on."""
    with open_store(tmp_path) as store:
        write_blocks(store, [*range(50), 60])
        store.delete(key(60), 60)
    with open_store(tmp_path, 8.0) as store:
        assert 50 <= store.slot_count <= 60
    path = namespace_of(tmp_path) / journal.NAME
    sound = path.read_bytes()
    for start in range(HEADER_BYTES, len(sound), RECORD_BYTES):
        path.write_bytes(sound[:start] + bytes(RECORD_BYTES) + sound[start + RECORD_BYTES :])
        with open_store(tmp_path, 8.0) as store:
            assert len(store.table()) == 49


def test_damage_to_the_journal_never_brings_back_a_slot_of_a_file_that_was_made_anew(tmp_path: Path) -> None:
    paths = [tmp_path / "a", tmp_path / "b"]
    for path in paths:
        path.mkdir()
    with open_store(paths) as store:
        write_blocks(store, [0, 2, 4, 1])
        store.delete(key(1), 1)
    slot_file(paths[1]).unlink()
    with open_store(paths) as store:
        assert len(store.table()) == 3
    path = namespace_of(paths[0]) / journal.NAME
    sound = path.read_bytes()
    for start in range(HEADER_BYTES, len(sound), RECORD_BYTES):
        path.write_bytes(sound[:start] + bytes(RECORD_BYTES) + sound[start + RECORD_BYTES :])
        with open_store(paths) as store:
            assert len(store.table()) == 2


def test_a_kill_at_any_step_of_starting_empty_never_mixes_old_and_new(tmp_path: Path) -> None:
    step, dying = 0, True
    while dying:
        path = tmp_path / f"step{step}"
        path.mkdir()
        with open_store(path) as store:
            write_blocks(store, range(3))
        os.truncate(slot_file(path, rank=1), 100)
        dying = dies_at(step, lambda path=path: open_store(path, resume_kv_cache=False))
        try:
            with open_store(path) as store:
                assert list(store.table()) == []
        except StoreError as error:
            assert "resume_kv_cache=false" in str(error)  # still the damage there was before
            with open_store(path, resume_kv_cache=False) as store:
                assert list(store.table()) == []
        step += 1


def test_a_store_without_its_journal_is_empty(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with open_store(tmp_path) as store:
        write_blocks(store, range(3))
    (namespace_of(tmp_path) / "index.journal").unlink()
    with open_store(tmp_path) as store:
        assert list(store.table()) == []
        assert slot_file(tmp_path).stat().st_size == 4096
        assert "has no journal" in caplog.text
