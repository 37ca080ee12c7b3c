"""Blocks that lie on SSD, nowhere else, and that nothing reads: nearly all of them. Scheduler side, one thread."""

from array import array
from collections.abc import Iterator

import numpy as np

from kvoffload.blocks import READY, Block
from kvoffload.table import BlockTable
from kvoffload.types import BlockKey


class Cold:
    """Rows by SSD slot: an object for each block would take three times the memory of all that is kept about it here."""

    def __init__(self, slot_count: int):
        self._slots: dict[BlockKey, int] = {}
        self.slot = self._slots.get  # of the key, None if it is not here
        self._generation = array("Q", bytes(8 * slot_count))
        self._group = array("H", bytes(2 * slot_count))
        self._used = array("Q", bytes(8 * slot_count))
        self._user = [""] * slot_count
        self._uses = array("I", bytes(4 * slot_count))
        self._depth = array("I", bytes(4 * slot_count))
        self._unread = bytearray(slot_count)

    def recover(self, table: BlockTable) -> None:
        """What was found at start, used at 1, 2, .. by the manager's counter. REQUIRES: nothing is here."""
        self._slots.update(zip(table.keys, table.slots.tolist(), strict=True))
        np.frombuffer(self._generation, np.uint64)[table.slots] = table.generations
        np.frombuffer(self._group, np.uint16)[table.slots] = table.groups
        np.frombuffer(self._used, np.uint64)[table.slots] = np.arange(1, len(table) + 1)
        np.frombuffer(self._uses, np.uint32)[table.slots] = 1

    def put(self, block: Block) -> None:
        slot = self._slots[block.key] = block.ssd_slot
        self._generation[slot], self._group[slot], self._depth[slot] = block.generation, block.group, block.depth
        self._used[slot], self._user[slot], self._uses[slot] = block.used, block.user, block.uses
        self._unread[slot] = block.unread

    def take(self, key: BlockKey) -> Block | None:
        """The block as an object, and no longer here."""
        slot = self._slots.pop(key, None)
        if slot is None:
            return None
        block = Block(key, self._group[slot], self._generation[slot], self._used[slot], self._depth[slot])
        block.ssd, block.ssd_slot = READY, slot
        block.user, block.uses, block.unread = self._user[slot], self._uses[slot], bool(self._unread[slot])
        return block

    def use(self, slot: int, now: int, owner: str) -> bool:
        """A request uses the block there; returns whether it is the one that used it last."""
        self._used[slot] = now
        again = self._user[slot] == owner
        if not again:
            self._user[slot] = owner
            self._uses[slot] += 1
        return again

    def drop(self, key: BlockKey) -> tuple[int, int]:
        """Its slot and uses; it is no longer here. REQUIRES: it is."""
        slot = self._slots.pop(key)
        return slot, self._uses[slot]

    def clear(self) -> None:
        self._slots.clear()

    def items(self) -> Iterator[tuple[BlockKey, int]]:
        """Keys and slots."""
        yield from self._slots.items()
