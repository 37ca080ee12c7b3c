"""What is known of the blocks on SSD, by slot: nearly all of a cache, with no object each. Scheduler side, one thread."""

from array import array
from collections.abc import Iterator

import numpy as np

from kvoffload._rows import KeyMap
from kvoffload.blocks import READY, Block
from kvoffload.table import BlockTable
from kvoffload.types import KEY_BYTES_MAX, BlockKey


class SsdRows:
    """A row for each block that is ready on SSD. While there is an object for it, too, that has the truth, but for its slot."""

    def __init__(self, slot_count: int):
        self._slot_count = slot_count
        self._keys = KeyMap(slot_count, KEY_BYTES_MAX)
        self.slot = self._keys.get  # of the key, None if it is not here
        self.key = self._keys.key  # of the slot, b"" if none is there
        self._generation = array("Q", bytes(8 * slot_count))
        self._group = array("H", bytes(2 * slot_count))
        self._used = array("Q", bytes(8 * slot_count))
        self._user = [""] * slot_count
        self._uses = array("I", bytes(4 * slot_count))
        self._depth = array("I", bytes(4 * slot_count))
        self._unread = bytearray(slot_count)

    def recover(self, table: BlockTable) -> None:
        """What was found at start, used at 1, 2, .. by the manager's counter. REQUIRES: nothing is here."""
        self._keys.fill(table.keys, table.slots)
        np.frombuffer(self._generation, np.uint64)[table.slots] = table.generations
        np.frombuffer(self._group, np.uint16)[table.slots] = table.groups
        np.frombuffer(self._used, np.uint64)[table.slots] = np.arange(1, len(table) + 1)
        np.frombuffer(self._uses, np.uint32)[table.slots] = 1

    def add(self, block: Block) -> None:
        """The block is ready on SSD; `save` follows when its object goes."""
        self._keys.put(block.key, block.ssd_slot)

    def remove(self, key: BlockKey) -> int | None:
        """It is no longer here; returns its slot."""
        return self._keys.pop(key)

    def save(self, block: Block) -> None:
        """What its object knew, which goes now. REQUIRES: it is here."""
        slot = block.ssd_slot
        self._generation[slot], self._group[slot], self._depth[slot] = block.generation, block.group, block.depth
        self._used[slot], self._user[slot], self._uses[slot] = block.used, block.user, block.uses
        self._unread[slot] = block.unread

    def block(self, key: BlockKey, slot: int) -> Block:
        """A new object for it. REQUIRES: it is there, and has none."""
        block = Block(key, self._group[slot], self._generation[slot], self._used[slot], self._depth[slot])
        block.ssd, block.ssd_slot = READY, slot
        block.user, block.uses, block.unread = self._user[slot], self._uses[slot], bool(self._unread[slot])
        return block

    def use(self, slot: int, now: int, owner: str) -> bool:
        """A request uses the block there; returns whether it is the one that used it last. REQUIRES: it has no object."""
        self._used[slot] = now
        again = self._user[slot] == owner
        if not again:
            self._user[slot] = owner
            self._uses[slot] += 1
        return again

    def place(self, slot: int) -> tuple[str, int]:
        """The request that used the block there last, and how far behind it is in that. REQUIRES: see `use`."""
        return self._user[slot], self._depth[slot]

    def uses(self, slot: int) -> int:
        return self._uses[slot]

    def items(self) -> Iterator[tuple[BlockKey, int]]:
        """Keys and slots. For rare things: it looks at every slot."""
        return ((key, slot) for slot in range(self._slot_count) if (key := self.key(slot)))

    def __len__(self) -> int:
        return len(self._keys)
