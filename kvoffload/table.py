"""Blocks on SSD as columns: what the store finds at start and hands to the block manager. A million of them have no object each."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from kvoffload.types import KEY_ROW, BlockKey, key_of_row, key_row

CHUNK_ROWS = 4096  # that are objects at a time when a table is gone through


class Entry(NamedTuple):
    """One block known to be on SSD."""

    key: BlockKey
    slot: int
    generation: int
    group: int


@dataclass(frozen=True, eq=False)
class BlockTable:
    """A row for each block, the least recently used first. Keys and slots are unique."""

    keys: NDArray[np.void]  # KEY_ROW
    slots: NDArray[np.uint32]
    generations: NDArray[np.uint64]
    groups: NDArray[np.uint16]

    @classmethod
    def of(cls, entries: Iterable[Entry]) -> Self:
        rows = list(entries)
        slots = np.array([row.slot for row in rows], np.uint32)
        generations = np.array([row.generation for row in rows], np.uint64)
        keys = np.frombuffer(b"".join(key_row(row.key) for row in rows), KEY_ROW)
        return cls(keys, slots, generations, np.array([row.group for row in rows], np.uint16))

    def below(self, slot_count: int) -> Self:
        """Those in the first so many slots."""
        return self.where(self.slots < slot_count)

    def where(self, is_kept: NDArray[np.bool_]) -> Self:
        kept = np.flatnonzero(is_kept)
        if len(kept) == len(self):
            return self
        return type(self)(self.keys[kept], self.slots[kept], self.generations[kept], self.groups[kept])

    def rows_on(self, path_index: int, path_count: int) -> NDArray[np.int64]:
        """Which rows have their slot on one of the paths that slots are striped over."""
        return np.flatnonzero(self.slots % path_count == path_index)

    def highest_slot(self, path_index: int, path_count: int) -> int | None:
        """The highest slot in use of those striped to one path."""
        here = self.slots[self.rows_on(path_index, path_count)]
        return int(here.max()) if len(here) else None

    def __len__(self) -> int:
        return len(self.keys)

    def __iter__(self) -> Iterator[Entry]:
        for begin in range(0, len(self), CHUNK_ROWS):
            rows = slice(begin, begin + CHUNK_ROWS)
            columns = self.slots[rows].tolist(), self.generations[rows].tolist(), self.groups[rows].tolist()
            yield from map(Entry, map(key_of_row, self.keys[rows].tolist()), *columns)


NO_BLOCKS = BlockTable.of([])
