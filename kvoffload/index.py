"""The index: which block lies in which slot of which tier, and which of them may leave. Scheduler side, one thread.

It knows blocks and slots; what is in flight, and why, is the block manager's affair.
"""

from collections import Counter
from collections.abc import Container, Sequence

from kvoffload.admission import Ghosts
from kvoffload.blocks import ABSENT, READY, Block, Journal
from kvoffload.cold import Cold
from kvoffload.drives import Drive, Drives
from kvoffload.garbage import uncollected
from kvoffload.policy import EvictionPolicy
from kvoffload.slots import SlotPool
from kvoffload.table import BlockTable
from kvoffload.types import NO_SLOT, BlockKey, Tier

DRAM_EVICTIONS, SSD_EVICTIONS = (("kvoffload_evictions_total", str(tier)) for tier in Tier)


class Index:
    def __init__(
        self,
        dram_slots: int,
        ssd_slots: int,
        dram_is_tier: bool,
        drives: Drives,
        journal: Journal,
        dram_policy: EvictionPolicy,
        counters: Counter[tuple[str, ...]],
        ghosts: Ghosts | None = None,
    ):
        self.dram_is_tier, self.drives, self._journal, self._counters = dram_is_tier, drives, journal, counters
        self._ghosts = ghosts  # what becomes of those forgotten; None: nobody asks
        self.blocks: dict[BlockKey, Block] = {}  # in DRAM or in use; the others are cold
        self.cold = Cold(ssd_slots)
        self.dirty: dict[BlockKey, Block] = {}  # to be demoted, in the order they were stored
        self.promised: set[BlockKey] = set()  # by lookups of this step: not evicted
        self.dram = SlotPool(range(dram_slots))
        self.dram_policy = dram_policy
        self._was_writing = drives.writing
        self._now = 0

    def recover(self, found: BlockTable) -> None:
        with uncollected():
            self.cold.recover(found)
            for drive in self.drives:
                rows = found.rows_on(drive.number, len(self.drives))
                keys = found.keys if len(rows) == len(found) else [found.keys[row] for row in rows.tolist()]
                drive.policy.recover(keys, (rows + 1).tolist())
                drive.pool.claim(found.slots[rows])
        self._now = len(found)

    def block(self, key: BlockKey) -> Block | None:
        """Taken out of the cold, if need be, for something is to be done with it; `settle` puts it back."""
        block = self.blocks.get(key)
        if block is None:
            block = self.cold.take(key)
            if block is not None:
                self.blocks[key] = block
        return block

    def ssd_slot(self, key: BlockKey) -> int | None:
        """Where it is ready on SSD."""
        block = self.blocks.get(key)
        if block is None:
            return self.cold.slot(key)
        return block.ssd_slot if block.ssd is READY else None

    def use(self, keys: Sequence[BlockKey], owner: str) -> list[tuple[BlockKey, int]]:
        """Notes that the request used those of `keys` there are just now, the last one first. Those ready on SSD are returned,
        with their slots."""
        on_ssd = []
        blocks, cold = self.blocks, self.cold
        for key in reversed(keys):
            block = blocks.get(key)
            if block is None:
                slot = cold.slot(key)
                if slot is not None:
                    now = self.tick()
                    self.drives.of(slot).policy.use(key, now, cold.use(slot, now, owner))
                    on_ssd.append((key, slot))
                continue
            now = block.used = self.tick()
            again = block.user == owner
            block.user = owner
            if block.dram is not ABSENT:
                self.dram_policy.use(key, now, again)
            if block.ssd is not ABSENT:
                self.drives.of(block.ssd_slot).policy.use(key, now, again)
                if block.ssd is READY:
                    on_ssd.append((key, block.ssd_slot))
        return on_ssd

    def settle_dirty(self) -> None:
        """While no drive takes them, blocks that wait to be written may be evicted."""
        if self._was_writing is not self.drives.writing:
            self._was_writing = self.drives.writing
            for block in list(self.dirty.values()):
                self.settle(block)

    def forget(self, block: Block, journal: bool = True) -> None:
        """Takes the block out of the index; `settle` frees its slots once nothing uses them."""
        if block.gone:
            return
        block.gone = True
        block.dirty = False
        if self._ghosts is not None:
            self._ghosts.leave(block.key, block.uses)
        del self.blocks[block.key]
        self.dirty.pop(block.key, None)
        self.dram_policy.leave(block.key)
        if block.ssd is not ABSENT:
            self.drives.of(block.ssd_slot).policy.leave(block.key)
        if block.ssd is READY and journal:
            self._journal.delete(block.key, block.ssd_slot)

    def forget_and_settle(self, block: Block, journal: bool = True) -> None:
        self.forget(block, journal)
        self.settle(block)

    def forget_cold(self) -> None:
        """All that is cold, of which the journal is not told."""
        for key, slot in self.cold.items():
            drive = self.drives.of(slot)
            drive.policy.leave(key)
            drive.pool.give_back(slot)
        self.cold.clear()

    def tick(self) -> int:
        self._now += 1
        return self._now

    def settle(self, block: Block) -> None:
        """Tells policies whether the block may be evicted, frees the slots it no longer needs, and lets go of the object if what
        is left lies on SSD."""
        idle = block.loads == 0 and block.demotion is None and not block.late
        if block.gone:
            if idle:
                self.drop_dram(block)
                self.drop_ssd(block)
            return
        ready = block.dram is READY and idle
        if ready and not self.dram_is_tier and block.ssd is READY:
            self.drop_dram(block)  # the bounce slot did its duty
            ready = False
        if ready and (not block.dirty or not self.drives.writing):
            self.dram_policy.release(block.key)
        else:
            self.dram_policy.hold(block.key)
        if block.ssd is READY:
            policy = self.drives.of(block.ssd_slot).policy
            if block.loads == 0:
                policy.release(block.key)
            else:
                policy.hold(block.key)
            if idle and block.dram is ABSENT:
                self._make_cold(block)

    def _make_cold(self, block: Block) -> None:
        del self.blocks[block.key]
        self.cold.put(block)

    def drop_dram(self, block: Block) -> None:
        if block.dram is READY:
            if not block.gone:  # else a younger block of the same key may be there
                self.dram_policy.leave(block.key)
            self.dram.give_back(block.dram_slot)
            block.dram, block.dram_slot = ABSENT, NO_SLOT

    def drop_ssd(self, block: Block) -> None:
        if block.ssd is READY:
            drive = self.drives.of(block.ssd_slot)
            if not block.gone:
                drive.policy.leave(block.key)
            drive.pool.give_back(block.ssd_slot)
            block.ssd, block.ssd_slot = ABSENT, NO_SLOT

    def take_dram_slot(self, *exempt: Container[BlockKey]) -> int:
        """A free DRAM slot, evicting if need be; NO_SLOT if everything is in use, promised or dirty."""
        slot = self.dram.take()
        if slot is not None:
            return slot
        key = self.dram_policy.victim(self.promised, *exempt)
        if key is None:
            return NO_SLOT
        block = self.blocks[key]
        slot = block.dram_slot
        block.dram, block.dram_slot = ABSENT, NO_SLOT
        self._counters[DRAM_EVICTIONS] += 1
        if block.ssd is ABSENT:
            self.forget(block)
        else:
            self._make_cold(block)
        return slot

    def take_ssd_slot(self, drives: Sequence[Drive]) -> int:
        """A free slot of the first of `drives` that has one, else one of theirs by eviction; NO_SLOT if everything there is in
        use or promised."""
        for drive in drives:
            slot = drive.take_slot()
            if slot is not None:
                return slot
        victims = (drive.policy.victim(self.promised) for drive in drives)
        key = next((key for key in victims if key is not None), None)
        if key is None:  # a full drive that has nothing of ours to give up may have room by now
            return next((slot for drive in drives if (slot := drive.pool.take()) is not None), NO_SLOT)
        self._counters[SSD_EVICTIONS] += 1
        block = self.blocks.get(key)
        if block is None:
            slot, uses = self.cold.drop(key)
            if self._ghosts is not None:
                self._ghosts.leave(key, uses)
        else:  # its DRAM copy stays, as one that is not written again: it lost its place on SSD to a younger block
            slot = block.ssd_slot
            block.ssd, block.ssd_slot = ABSENT, NO_SLOT
        self._journal.delete(key, slot)
        return slot
