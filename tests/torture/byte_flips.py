"""Every byte class of a small store, flipped bit by bit, cut and grown: `python -m tests.torture.byte_flips`.

Whatever byte is not what kvoffload wrote, there is a miss or a clear refusal that changes nothing; never another
exception, never a block that was not stored, never wrong bytes. Exhaustive but for the bytes of payloads and padding;
`--cases 50` draws that many of each class.
"""

import errno
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from kvoffload.engine import Engine
from kvoffload.errors import StoreError
from kvoffload.layout import HEADER_BYTES, SUPERBLOCK_BYTES, slot_bytes, slot_offset
from kvoffload.store import Store
from kvoffload.store.journal import HEADER_BYTES as JOURNAL_HEADER_BYTES
from kvoffload.store.journal import RECORD_BYTES
from kvoffload.table import Entry
from kvoffload.types import EngineOptions
from tests.patience import PATIENCE_S
from tests.torture.children import Failed, in_child
from tests.torture.command import run
from tests.torture.deployment import GROUP_BYTES, PAYLOAD_BYTES, RANKS, Deployment, Rank, Shape
from tests.torture.examine import load, load_all
from tests.torture.haste import sync_nothing
from tests.torture.notes import Notes

REMEDY = "resume_kv_cache=false"
SUPERBLOCK_USED, SLOT_HEADER_USED = 64, 128
GROWN = (1, 7, 71, 72, 73, 512, 4096)
SENTENCE_MAX = 600
SAMPLED = 300  # bits of what is too long for all


class Damage(NamedTuple):
    """One thing done to one file."""

    file: Path
    kind: str  # "flip" bit `detail` of byte `at`; "cut" to `at` bytes; "grow" by `at` bytes of value `detail`
    at: int
    detail: int = 0

    def apply(self, data: bytes) -> bytes:
        if self.kind == "cut":
            return data[: self.at]
        if self.kind == "grow":
            return data + bytes([self.detail]) * self.at
        return data[: self.at] + bytes([data[self.at] ^ 1 << self.detail]) + data[self.at + 1 :]


def flips(file: Path, places: Iterable[int]) -> Iterator[Damage]:
    return (Damage(file, "flip", at, bit) for at in places for bit in range(8))


def cuts(file: Path, lengths: Iterable[int]) -> Iterator[Damage]:
    return (Damage(file, "cut", length) for length in lengths)


def growths(file: Path) -> Iterator[Damage]:
    return (Damage(file, "grow", length, value) for length in GROWN for value in (0, 0x20, 0xA5))


class Victim:
    """A store with blocks in it, that can be damaged and made whole again."""

    def __init__(self, folder: Path, rng: random.Random) -> None:
        self.rng = rng
        paths = (folder / "a", folder / "b")
        for path in paths:
            path.mkdir(parents=True)
        self.shape = Shape(paths, slots=10, dram_slots=10, dram_is_tier=True)
        in_child(self._fill)
        self.entries: list[Entry] = in_child(self._entries)
        self.whole = {file: file.read_bytes() for path in paths for file in path.rglob("*") if file.is_file()}

    def _fill(self) -> None:
        deployment = Deployment(self.shape, Notes(), self.rng, "auto", [])
        while len(deployment.store.table()) < 8:
            deployment.step()
        while deployment.jobs or any(deployment.manager.queues().values()):
            deployment.work()
        deployment.close()

    def _entries(self) -> list[Entry]:
        """Leaves a journal of one record for each."""
        with self.shape.open_store() as store:
            entries = list(store.table())
            assert not load_all(store, entries, "auto")
            store._writer._limit = 0  # so that the next change compacts it
            store.touch([(entries[-1].key, entries[-1].slot)])
            assert store.flush(PATIENCE_S)
            return list(store.table())

    def files(self, name: str) -> list[Path]:
        return [file for file in self.whole if file.name == name]

    def slot_files(self) -> list[Path]:
        return [file for file in self.whole if file.suffix == ".slots"]

    def suffer(self, damage: Damage) -> list[Entry] | None:
        """The entries that are left after the damage, right in their bytes or misses; None if the store is refused."""
        damage.file.write_bytes(damage.apply(self.whole[damage.file]))
        try:
            with self.shape.open_store() as store:
                found = list(store.table())
                strangers = [entry for entry in found if entry not in self.entries]
                if strangers:
                    raise Failed(f"{damage}: never stored: {strangers}")
                # Where no slot file was damaged, these blocks are the ones that were loaded at first.
                if damage.file.suffix == ".slots" or self.rng.random() < 0.05:
                    load_all(store, found, "auto")
        except StoreError as error:
            self._check_refusal(damage, str(error))
            found = None
        self._mend()
        return found

    def _check_refusal(self, damage: Damage, text: str) -> None:
        if str(damage.file.parent) not in text or REMEDY not in text or "\n" in text or len(text) > SENTENCE_MAX:
            raise Failed(f"{damage}: refused without file or remedy, or at length: {text}")
        for file, data in self.whole.items():
            expected = damage.apply(data) if file == damage.file else data
            if "lock" not in file.name and file.read_bytes() != expected:
                raise Failed(f"{damage}: refused, but {file} was changed")
        if self.rng.random() < 0.05:
            with self.shape.open_store(resume=False) as store:
                assert list(store.table()) == []

    def _mend(self) -> None:
        for file, data in self.whole.items():
            if file.read_bytes() != data:
                file.write_bytes(data)


class ByteClass(NamedTuple):
    """Damages of one kind of bytes, and what may be left after one: a list of entries, or None for a refusal."""

    name: str
    damages: list[Damage]
    allowed: Callable[[Damage], list[list[Entry] | None]]


def byte_classes(victim: Victim) -> Iterator[ByteClass]:
    entries, rng = victim.entries, victim.rng
    (journal,) = victim.files("index.journal")
    manifests, locks = victim.files("manifest.json"), victim.files("lock") + victim.files(".lock")
    superblocks = [
        damage
        for file in victim.slot_files()
        for damage in (
            *flips(file, range(SUPERBLOCK_USED)),
            *flips(file, rng.sample(range(SUPERBLOCK_USED, SUPERBLOCK_BYTES), 16)),
            *cuts(file, (0, 1, 63, 64, 511, 512, SUPERBLOCK_BYTES - 1)),
        )
    ]
    yield ByteClass("superblock", superblocks, lambda damage: [None])
    header = [*flips(journal, range(JOURNAL_HEADER_BYTES)), *cuts(journal, range(JOURNAL_HEADER_BYTES))]
    yield ByteClass("journal header", header, lambda damage: [None])

    def without_one(damage: Damage) -> list[list[Entry] | None]:
        bad = (damage.at - JOURNAL_HEADER_BYTES) // RECORD_BYTES
        return [entries[:bad] + entries[bad + 1 :]]

    length = len(victim.whole[journal])
    yield ByteClass("journal record", [*flips(journal, range(JOURNAL_HEADER_BYTES, length))], without_one)
    yield ByteClass(
        "journal cut",
        [*cuts(journal, range(JOURNAL_HEADER_BYTES, length))],
        lambda damage: [entries[: (damage.at - JOURNAL_HEADER_BYTES) // RECORD_BYTES]],
    )
    yield ByteClass("journal grown", [*growths(journal)], lambda damage: [entries])
    whole = [
        damage
        for file in manifests
        for size in [len(victim.whole[file])]
        for damage in (*flips(file, range(size)), *cuts(file, range(size)), *growths(file))
    ]
    # It has no checksum, since people may read and tools may write it: what still makes sense is taken.
    yield ByteClass("manifest", whole, lambda damage: [None, entries])
    touched = [
        damage
        for file in locks
        for size in [len(victim.whole[file])]
        for damage in (*flips(file, range(size)), *cuts(file, range(size)), *growths(file))
    ]
    yield ByteClass("lock", touched, lambda damage: [entries])
    yield ByteClass("slot file's length", [*slot_file_lengths(victim)], lambda damage: [None, entries])


def slot_file_lengths(victim: Victim) -> Iterator[Damage]:
    slot = slot_bytes(PAYLOAD_BYTES)
    for file in victim.slot_files():
        size = len(victim.whole[file])
        edges = {at + offset for at in range(SUPERBLOCK_BYTES, size + 1, slot) for offset in (-512, -1, 0, 1, 4096)}
        yield from cuts(file, sorted(edge for edge in edges if 0 <= edge < size))
        yield from (Damage(file, "grow", length) for length in GROWN)


def torture_files(victim: Victim, cases: int) -> Counter[str]:
    """Classes that the store reads when it opens."""
    sync_nothing()
    counts: Counter[str] = Counter()
    for name, damages, allowed in byte_classes(victim):
        drawn = victim.rng.sample(damages, cases) if 0 < cases < len(damages) else damages
        for damage in drawn:
            left = victim.suffer(damage)
            if left not in allowed(damage):
                raise Failed(f"{name}: {damage} left {left}, allowed is {allowed(damage)}")
            counts[f"{name}: " + ("refused" if left is None else "opened")] += 1
    return counts


def torture_superblocks_of_engines(victim: Victim, cases: int) -> Counter[str]:
    """The engine compares for itself: it must not trust that the store did just before."""
    sync_nothing()
    counts: Counter[str] = Counter()
    damages = [damage for file in victim.slot_files() for damage in flips(file, range(SUPERBLOCK_USED))]
    with victim.shape.open_store() as store:
        for damage in victim.rng.sample(damages, cases) if 0 < cases < len(damages) else damages:
            files = next(files for rank in range(RANKS) if str(damage.file) in (files := store.slot_files(rank)).paths)
            damage.file.write_bytes(damage.apply(victim.whole[damage.file]))
            with Engine(EngineOptions(PAYLOAD_BYTES, dram_slots=1, spare_slots=1)) as engine:
                try:
                    engine.attach(files)
                except StoreError as error:
                    if str(damage.file) not in str(error):
                        raise Failed(f"{damage}: refused without its name: {error}") from None
                else:
                    raise Failed(f"{damage}: the engine uses the file")
            damage.file.write_bytes(victim.whole[damage.file])
            counts["superblock: refused by the engine"] += 1
    return counts


def torture_slots(victim: Victim, cases: int) -> Counter[str]:
    """Slot headers and payloads, which only the engine reads."""
    counts: Counter[str] = Counter()
    with victim.shape.open_store() as store:
        for number in range(RANKS):
            rank = Rank(store, number, ("auto", "threads")[number % 2], dram_slots=2)
            for entry in store.table():
                counts += torture_slot(victim, store, rank, entry, cases)
            rank.worker.close()
    return counts


def torture_slot(victim: Victim, store: Store, rank: Rank, entry: Entry, cases: int) -> Counter[str]:
    rng, counts = victim.rng, Counter[str]()
    paths = store.slot_files(rank.rank).paths
    file, start = Path(paths[entry.slot % len(paths)]), slot_offset(entry.slot // len(paths), PAYLOAD_BYTES)
    end = HEADER_BYTES + GROUP_BYTES[entry.group]
    classes = {
        "slot header": [*flips(file, range(SLOT_HEADER_USED))],
        "payload": [*flips(file, (HEADER_BYTES, end - 1)), *rng.sample([*flips(file, range(HEADER_BYTES, end))], SAMPLED)],
        "padding": rng.sample([*flips(file, (*range(SLOT_HEADER_USED, HEADER_BYTES), *range(end, slot_bytes(PAYLOAD_BYTES))))], 40),
    }
    with open(file, "r+b", buffering=0) as opened:
        for name, damages in classes.items():
            wanted = max(1, cases // 8)  # of each of some 16 slots
            for damage in rng.sample(damages, wanted) if 0 < cases and wanted < len(damages) else damages:
                at = start + damage.at
                right = victim.whole[file][at]
                opened.seek(at)
                opened.write(bytes([right ^ 1 << damage.detail]))
                errors = load(rank, [entry])
                opened.seek(at)
                opened.write(bytes([right]))
                is_miss = errors == {entry.key: errno.EBADMSG} and not any(each.any() for each in rank.kv)
                is_hit = not errors and rank.holds(0, entry.key, entry.generation, entry.group)
                if not (is_hit if name == "padding" else is_miss):
                    raise Failed(f"{name} of {entry}: {damage} gave {errors}")
                counts[f"{name}: " + ("no matter" if name == "padding" else "a miss")] += 1
    return counts


def torture(cases: int, seed: int, folder: Path) -> Counter[str]:
    """cases: of each class; 0 is all."""
    victim = Victim(folder / "victim", random.Random(seed))
    counts: Counter[str] = Counter()
    for part in (torture_files, torture_superblocks_of_engines, torture_slots):
        counts += in_child(lambda part=part: part(victim, cases))
    return counts


if __name__ == "__main__":
    sys.exit(run("byte flips", "cases", torture, default=0))
