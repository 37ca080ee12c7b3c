"""What a deployment does, noted in memory that outlives it, and what its index must then be.

A note is made before the thing itself, so a kill between the two leaves one note too many and never one too few.
"""

import mmap
import struct
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import NamedTuple

from kvoffload.store import Store
from kvoffload.store.journal import Kind
from kvoffload.table import Entry
from kvoffload.types import KEY_BYTES_MAX, BlockKey
from tests.patience import PATIENCE_S

# Stages of a life.
OPENING, OPEN, RUNNING = 0, 1, 2

_NUMBER = struct.Struct("<Q")
_CHANGE = struct.Struct(f"<BB{KEY_BYTES_MAX}sIQH")  # kind, length of the key, key, slot, generation, group
_WRITE = struct.Struct("<IQ")  # slot, generation
_STAGE, _CHANGES, _FLUSHED, _WRITES, _GENERATION, _TEXT_BYTES = range(0, 48, 8)
_TEXT, _TEXT_MAX = 64, 8000
_CHANGES_AT, _CHANGES_MAX = 8192, 200_000
_WRITES_AT, _WRITES_MAX = _CHANGES_AT + _CHANGES_MAX * _CHANGE.size, 50_000


class Change(NamedTuple):
    """One change of the index, as it was told to the store."""

    kind: int
    key: BlockKey = b""
    slot: int = 0
    generation: int = 0
    group: int = 0


class Notes:
    """The notes of one life; anonymous shared memory, so that a forked child's remain when it is killed."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, _WRITES_AT + _WRITES_MAX * _WRITE.size)

    def _get(self, at: int) -> int:
        return int(_NUMBER.unpack_from(self._memory, at)[0])

    def _set(self, at: int, value: int) -> None:
        _NUMBER.pack_into(self._memory, at, value)

    @property
    def stage(self) -> int:
        return self._get(_STAGE)

    @stage.setter
    def stage(self, value: int) -> None:
        self._set(_STAGE, value)

    @property
    def pushed(self) -> int:
        """Changes told to the store, or about to be."""
        return self._get(_CHANGES)

    @property
    def flushed(self) -> int:
        """Of these, how many the store has said to be on disk."""
        return self._get(_FLUSHED)

    @flushed.setter
    def flushed(self, value: int) -> None:
        self._set(_FLUSHED, value)

    @property
    def generation(self) -> int:
        """The highest one given."""
        return self._get(_GENERATION)

    @generation.setter
    def generation(self, value: int) -> None:
        self._set(_GENERATION, value)

    @property
    def failure(self) -> str:
        return self._memory[_TEXT : _TEXT + self._get(_TEXT_BYTES)].decode()

    def tell(self, text: str) -> None:
        """Note what a life ended by."""
        encoded = text.encode()[-_TEXT_MAX:]
        self._memory[_TEXT : _TEXT + len(encoded)] = encoded
        self._set(_TEXT_BYTES, len(encoded))

    @property
    def is_full(self) -> bool:
        return self.pushed > _CHANGES_MAX - 1000 or self._get(_WRITES) > _WRITES_MAX - 1000

    def add_change(self, kind: Kind, key: BlockKey = b"", slot: int = 0, generation: int = 0, group: int = 0) -> None:
        count = self.pushed
        _CHANGE.pack_into(self._memory, _CHANGES_AT + count * _CHANGE.size, kind, len(key), key, slot, generation, group)
        self._set(_CHANGES, count + 1)

    def add_write(self, slot: int, generation: int) -> None:
        count = self._get(_WRITES)
        _WRITE.pack_into(self._memory, _WRITES_AT + count * _WRITE.size, slot, generation)
        self._set(_WRITES, count + 1)

    def changes(self) -> Iterator[Change]:
        for number in range(self.pushed):
            kind, length, key, *rest = _CHANGE.unpack_from(self._memory, _CHANGES_AT + number * _CHANGE.size)
            yield Change(kind, key[:length], *rest)

    def writes(self) -> Iterator[tuple[int, int]]:
        """Slots that were to be written, with the generation of what was to be written, in order."""
        for number in range(self._get(_WRITES)):
            yield _WRITE.unpack_from(self._memory, _WRITES_AT + number * _WRITE.size)

    def close(self) -> None:
        self._memory.close()


class NotedStore:
    """The journal the block manager talks to: the store, with a note made first."""

    def __init__(self, store: Store, notes: Notes) -> None:
        self._store = store
        self._notes = notes

    def put(self, key: BlockKey, slot: int, generation: int, group: int) -> None:
        self._notes.add_change(Kind.PUT, key, slot, generation, group)
        self._store.put(key, slot, generation, group)

    def delete(self, key: BlockKey, slot: int) -> None:
        self._notes.add_change(Kind.DELETE, key)
        self._store.delete(key, slot)

    def touch(self, blocks: Iterable[tuple[BlockKey, int]]) -> None:
        for key, slot in blocks:
            self._notes.add_change(Kind.TOUCH, key)
            self._store.touch([(key, slot)])

    def clear(self) -> None:
        self._notes.add_change(Kind.CLEAR)
        self._store.clear()

    def next_generation(self) -> int:
        self._notes.generation = generation = self._store.next_generation()
        return generation

    def flush(self) -> None:
        target = self._notes.pushed
        if self._store.flush(PATIENCE_S):
            self._notes.flushed = target


class Model:
    """The index, told a second time in the simplest way: a dict in the order of recency."""

    def __init__(self, entries: Iterable[Entry] = ()) -> None:
        self._entries = {entry.key: entry for entry in entries}

    def apply(self, change: Change) -> None:
        if change.kind == Kind.CLEAR:
            self._entries.clear()
            return
        before = self._entries.pop(change.key, None)
        if change.kind == Kind.TOUCH and before is not None:
            self._entries[change.key] = before
        if change.kind == Kind.PUT:
            self._entries = {key: entry for key, entry in self._entries.items() if entry.slot != change.slot}
            self._entries[change.key] = Entry(*change[1:])

    def entries(self) -> list[Entry]:
        return list(self._entries.values())


def state_after(base: Iterable[Entry], changes: Iterable[Change], count: int) -> list[Entry]:
    """The index after the first `count` changes."""
    model = Model(base)
    for change in islice(changes, count):
        model.apply(change)
    return model.entries()


def prefix_that_gives(found: list[Entry], base: Iterable[Entry], changes: Iterable[Change], least: int) -> int | None:
    """After how many of the changes, and no fewer than `least`, the index was `found`, recency included."""
    model = Model(base)
    if least == 0 and model.entries() == found:
        return 0
    for count, change in enumerate(changes, start=1):
        model.apply(change)
        if count >= least and model.entries() == found:
            return count
    return None
