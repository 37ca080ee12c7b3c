"""The index: which block lies in which slot of which tier, and which of them may leave. Scheduler side, one thread.

It knows blocks and slots; what is in flight, and why, is the block manager's affair.
"""

from collections import Counter, OrderedDict
from collections.abc import Container, Sequence

import numpy as np

from kvoffload.admission import Ghosts
from kvoffload.blocks import ABSENT, READY, Block, Journal
from kvoffload.drives import Drive, Drives
from kvoffload.garbage import uncollected
from kvoffload.policy import EvictionPolicy
from kvoffload.slots import SlotPool
from kvoffload.ssd_rows import SsdRows
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
        self.blocks: dict[BlockKey, Block] = {}  # in DRAM or in use; the others are cold: on SSD only, and have no object
        self.on_ssd = SsdRows(ssd_slots)
        # To be demoted, in the order they were stored. (A dict finds its first key slowly once many before it left.)
        self.dirty: OrderedDict[BlockKey, Block] = OrderedDict()
        self.promised_dram: set[int] = set()  # slots promised by lookups of this step: their blocks are not evicted
        self.promised_ssd: set[int] = set()
        self.left_off: set[BlockKey] = set()  # not written to the SSD though wanted there; some may be gone
        # Blocks looked at for eviction in vain, as one behind them in their request asked, and blocks left off. Set back by plans.
        self.passed = 0
        self.dram = SlotPool(range(dram_slots))
        self._in_dram: list[Block | None] = [None] * dram_slots  # by slot; stale where the policy has none
        self.dram_policy = dram_policy
        self._was_writing = drives.writing
        self._now = 0

    def recover(self, found: BlockTable) -> None:
        with uncollected():
            self.on_ssd.recover(found)
            for drive in self.drives:
                rows = found.rows_on(drive.number, len(self.drives))
                slots = found.slots[rows]
                drive.policy.recover(slots.astype(np.int64) // len(self.drives), rows + 1)
                drive.pool.claim(slots)
        self._now = len(found)

    def block(self, key: BlockKey) -> Block | None:
        """Taken out of the cold, if need be, for something is to be done with it; `settle` puts it back."""
        block = self.blocks.get(key)
        if block is None:
            slot = self.on_ssd.slot(key)
            if slot is not None:
                block = self.blocks[key] = self.on_ssd.block(key, slot)
        return block

    def ssd_slot(self, key: BlockKey) -> int | None:
        """Where it is ready on SSD."""
        block = self.blocks.get(key)
        if block is None:
            return self.on_ssd.slot(key)
        return block.ssd_slot if block.ssd is READY else None

    def use(self, keys: Sequence[BlockKey], owner: str, answer: int) -> list[tuple[BlockKey, int]]:
        """Notes that the request used those of `keys` there are just now, the last one first. `answer`: as policies are told.
        Those ready on SSD are returned, with their slots."""
        found = []
        blocks, on_ssd = self.blocks, self.on_ssd
        for key in reversed(keys):
            block = blocks.get(key)
            if block is None:
                slot = on_ssd.slot(key)
                if slot is not None:
                    now = self.tick()
                    policy, frame = self.drives.frame(slot)
                    policy.use(frame, key, now, on_ssd.use(slot, now, owner), answer)
                    found.append((key, slot))
                continue
            now = block.used = self.tick()
            again = block.user == owner
            block.user, block.answer = owner, answer
            if block.dram is not ABSENT:
                self.dram_policy.use(block.dram_slot, key, now, again, answer)
            if block.ssd is not ABSENT:
                policy, frame = self.drives.frame(block.ssd_slot)
                policy.use(frame, key, now, again, answer)
                if block.ssd is READY:
                    found.append((key, block.ssd_slot))
        return found

    def want_on_ssd(self, block: Block, wanted_by: str) -> None:
        """It is to be written there, for that request."""
        block.dirty, block.wanted_by = True, wanted_by
        self.dirty[block.key] = block

    def leave_off(self, block: Block) -> None:
        """It is not written to the SSD until the next request that uses it offers it again."""
        if len(self.left_off) >= 2 * self.dram.count:  # half of them at least have left DRAM
            self.left_off &= self.blocks.keys()
        self.left_off.add(block.key)
        self.passed += 1

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
        if block.dram is not ABSENT:
            self.dram_policy.leave(block.dram_slot)
        if block.ssd is not ABSENT:
            self.leave_ssd(block.ssd_slot)
        if block.ssd is READY:
            self.on_ssd.remove(block.key)
            if journal:
                self._journal.delete(block.key, block.ssd_slot)

    def leave_ssd(self, slot: int) -> None:
        """The drive's policy forgets what is in the slot, if it knows of it."""
        policy, frame = self.drives.frame(slot)
        policy.leave(frame)

    def forget_and_settle(self, block: Block, journal: bool = True) -> None:
        self.forget(block, journal)
        self.settle(block)

    def forget_cold(self) -> None:
        """All that is cold, of which the journal is not told."""
        for key, slot in self.on_ssd.items():
            if key not in self.blocks:
                self.leave_ssd(slot)
                self.drives.of(slot).pool.give_back(slot)
                self.on_ssd.remove(key)

    def end_promises(self) -> None:
        self.promised_dram.clear()
        self.promised_ssd.clear()

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
            self.dram_policy.release(block.dram_slot)
        elif block.dram is not ABSENT:
            self.dram_policy.hold(block.dram_slot)
        if block.ssd is READY:
            policy, frame = self.drives.frame(block.ssd_slot)
            if block.loads == 0:
                policy.release(frame)
            else:
                policy.hold(frame)
            if idle and block.dram is ABSENT:
                self._make_cold(block)

    def _make_cold(self, block: Block) -> None:
        del self.blocks[block.key]
        self.on_ssd.save(block)

    def enter_dram(self, block: Block) -> None:
        """The block came into its DRAM slot, and is held."""
        self._in_dram[block.dram_slot] = block
        self.dram_policy.enter(block.dram_slot, block.key, block.used, block.answer)

    def drop_dram(self, block: Block) -> None:
        if block.dram is READY:
            self.dram_policy.leave(block.dram_slot)
            self.dram.give_back(block.dram_slot)
            block.dram, block.dram_slot = ABSENT, NO_SLOT

    def drop_ssd(self, block: Block) -> None:
        if block.ssd is READY:
            self.leave_ssd(block.ssd_slot)
            if not block.gone:  # else a younger block of the same key may be there
                self.on_ssd.remove(block.key)
            self.drives.of(block.ssd_slot).pool.give_back(block.ssd_slot)
            block.ssd, block.ssd_slot = ABSENT, NO_SLOT

    def take_dram_slot(self, own: Container[BlockKey] = ()) -> int:
        """A free DRAM slot, evicting if need be; NO_SLOT if everything is in use, promised or dirty, or one of `own` that is not
        on SSD, so that it would be lost."""
        slot = self.dram.take()
        if slot is not None:
            return slot
        in_dram, promised = self._in_dram, self.promised_dram

        def spared(frame: int) -> bool:
            block = in_dram[frame]
            assert block is not None
            return frame in promised or block.key in own and block.ssd is not READY

        slot = self.dram_policy.victim(spared)
        if slot is None:
            return NO_SLOT
        block = in_dram[slot]
        assert block is not None
        self.dram_policy.evict(slot, block.key)
        block.dram, block.dram_slot = ABSENT, NO_SLOT
        self._counters[DRAM_EVICTIONS] += 1
        if block.ssd is ABSENT:
            self.forget(block)
        else:
            self._make_cold(block)
        return slot

    def take_ssd_slot(self, drives: Sequence[Drive], block: Block) -> int | None:
        """A free slot for the block of the first of `drives` that has one, else one of theirs by eviction; NO_SLOT if everything
        there is in use or promised, None if nothing but what comes before it in its own request could go: a prefix must not
        lose its head to its tail."""
        promised = self.promised_ssd.__contains__

        def spared(slot: int) -> bool:
            if promised(slot):
                return True
            is_before = self._is_before(slot, block)
            self.passed += is_before
            return is_before

        for drive in drives:
            slot = drive.take_slot()
            if slot is not None:
                return slot
        for drive in drives:
            slot = drive.victim(spared)
            if slot is not None:
                self._evict_from_ssd(slot)
                return slot
        if any(drive.victim(promised) is not None for drive in drives):
            return None
        # A full drive that has nothing of ours to give up may have room by now.
        return next((slot for drive in drives if (slot := drive.pool.take()) is not None), NO_SLOT)

    def _is_before(self, slot: int, block: Block) -> bool:
        other = self.blocks.get(self.on_ssd.key(slot))
        user, depth = (other.user, other.depth) if other is not None else self.on_ssd.place(slot)
        return user == block.user and depth < block.depth

    def _evict_from_ssd(self, slot: int) -> None:
        key = self.on_ssd.key(slot)
        policy, frame = self.drives.frame(slot)
        policy.evict(frame, key)
        self._counters[SSD_EVICTIONS] += 1
        block = self.blocks.get(key)
        if block is not None:  # its DRAM copy stays, as one that is not written again: it lost its place on SSD to a younger block
            block.ssd, block.ssd_slot = ABSENT, NO_SLOT
        elif self._ghosts is not None:
            self._ghosts.leave(key, self.on_ssd.uses(slot))
        self.on_ssd.remove(key)
        self._journal.delete(key, slot)
