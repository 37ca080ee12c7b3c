"""The block manager: the one index of which block lies in which slot. Scheduler side, one thread.

It decides and keeps books; it moves no data. Slot numbers it hands out mean the same on every rank. Per tier a block
is absent, moving in, or ready; what reads it (loads, a demotion) is counted, and a block in use is on no eviction list.

A block's life: `store` gives it a DRAM slot (moving in) -> `store_done` (ready, and dirty while the SSD lacks it)
-> `plan` demotes it (SSD slot, moving in) -> `ack` from every rank (ready on SSD, journalled; clean) -> eviction of
the DRAM copy is bookkeeping. `lookup` promises a block until `end_step`, `load` keeps it in use until
`load_done`. A block that fails is forgotten; the request recomputes.
"""

import errno
import logging
import time
from collections import Counter
from collections.abc import Callable, Collection, Container, Iterable, Mapping, Sequence
from types import MappingProxyType

from kvoffload.blocks import Block, Demotions, Journal, Placement, Recovered, State, Stored, Unsaved
from kvoffload.books import verify
from kvoffload.breaker import BreakerState
from kvoffload.drives import Drive, Drives
from kvoffload.policy import LRU, EvictionPolicy
from kvoffload.slots import SlotPool
from kvoffload.types import MILDEST_FIRST, NO_SLOT, BlockKey, Demotion, Tier

logger = logging.getLogger(__name__)

DEMOTIONS_MAX = 512  # in flight at once: acknowledgements come a few steps later, and the drive must not wait for them
NOTHING: Mapping[BlockKey, int] = MappingProxyType({})


class BlockManager:
    def __init__(
        self,
        dram_slots: int,
        ssd_slots: int,
        ranks: int,
        journal: Journal,
        *,
        dram_is_tier: bool = True,
        drives: Sequence[str] = ("0",),
        recovered: Iterable[Recovered] = (),
        clock: Callable[[], float] = time.monotonic,
    ):
        """`dram_is_tier` False: DRAM slots only carry blocks to the SSD. `drives`: those that SSD slots are striped over, as
        they are called in the log. `recovered`: oldest first."""
        self.ranks = ranks
        self.dram_is_tier = dram_is_tier
        self._journal = journal
        self.counters: Counter[tuple[str, ...]] = Counter()
        self._drives = Drives(drives, ssd_slots, min(DEMOTIONS_MAX, dram_slots), clock, self.counters)
        self._ssd_slots = ssd_slots
        self._dram = SlotPool(range(dram_slots))
        self._dram_lru: EvictionPolicy = LRU()
        self._was_writing = self._drives.writing
        self._blocks: dict[BlockKey, Block] = {}
        self._dirty: dict[BlockKey, Block] = {}  # to be demoted, in the order they were stored
        self._stores: dict[BlockKey, Block] = {}
        self._loads: dict[tuple[str, BlockKey], tuple[Block, Drive | None]] = {}  # by owner and key; None: from DRAM
        self._demotions = Demotions(ranks)
        self._promised: set[BlockKey] = set()  # by lookups of this step
        self._now = 0
        self._recover(recovered)

    def _recover(self, recovered: Iterable[Recovered]) -> None:
        for entry in recovered:
            block = Block(entry.key, entry.group, entry.generation, self._tick())
            block.ssd, block.ssd_slot = State.READY, entry.slot
            self._blocks[entry.key] = block
            self._settle(block)
        owned = {block.ssd_slot for block in self._blocks.values()}
        for drive in self._drives:
            drive.pool.claim(owned)

    # -- questions ---------------------------------------------------------------------------------------------

    def lookup(self, key: BlockKey) -> Tier | None:
        """The nearest tier the block can be loaded from. The answer stays true until `end_step`."""
        tier = self.tier(key)
        if tier is not None:
            self._promised.add(key)
            if tier is Tier.SSD and not self._drives.all_well:
                self._drives.of(self._blocks[key].ssd_slot).promise(key)
        return tier

    def tier(self, key: BlockKey) -> Tier | None:
        return next(iter(self.tiers(key)), None)

    def tiers(self, key: BlockKey) -> list[Tier]:
        """Every tier the block can be loaded from, the nearest first."""
        block = self._blocks.get(key)
        if block is None:
            return []
        tiers = []
        if block.dram is State.READY and self.dram_is_tier:
            tiers.append(Tier.DRAM)
        if block.ssd is State.READY and (self._drives.all_well or self._drives.of(block.ssd_slot).may_read(key)):
            tiers.append(Tier.SSD)
        return tiers

    def pending(self) -> bool:
        """Whether there is background work that needs further steps now. An idle engine steps a thousand times a second,
        so neither for a drive that hangs nor through long pauses: the next request's steps go on with it."""
        return self._drives.answering() or bool(self._dirty) and self._drives.writes_soon()

    def usage(self) -> dict[Tier, tuple[int, int]]:
        """Slots used and slots there are, by tier."""
        return {
            Tier.DRAM: (self._dram.count - self._dram.free(), self._dram.count),
            Tier.SSD: (self._ssd_slots - sum(drive.pool.free() for drive in self._drives), self._ssd_slots),
        }

    def drive_states(self) -> Iterable[tuple[tuple[str, str], BreakerState]]:
        """By drive and direction."""
        return self._drives.states()

    # -- loads -------------------------------------------------------------------------------------------------

    def load(self, keys: Sequence[BlockKey], owner: str) -> list[Placement]:
        """Places to load `keys` from, in order; they stay in use until `load_done`.

        A block that is not held gets a placement without slots, which workers answer with a failure: vLLM asks only
        for what a lookup promised in the same step, but its recomputing is better than our raising.
        REQUIRES: `owner` has no other load of the same key in flight.
        """
        self._use(keys)  # before slots are taken: what moves in must not push out what is loaded beside it
        placements = []
        may_move_in = self.dram_is_tier
        for key in keys:
            tier = self.tier(key)
            if tier is None:
                placements.append(Placement(key, 0, NO_SLOT, NO_SLOT))
                continue
            block = self._blocks[key]
            block.loads += 1
            drive = self._drives.of(block.ssd_slot) if tier is Tier.SSD else None
            self._loads[owner, key] = block, drive
            self._settle(block)
            if drive is None:
                placements.append(Placement(key, block.generation, block.dram_slot, NO_SLOT))
                continue
            self._drives.begin_load(drive)
            slot = NO_SLOT
            if may_move_in and block.dram is State.ABSENT and drive.reads.closed:  # a trial must not keep a DRAM slot
                slot = self._take_dram_slot()
                may_move_in = slot != NO_SLOT  # asking again for every block would look through all that is promised
            if slot != NO_SLOT:
                block.dram, block.dram_slot, block.promoter = State.MOVING_IN, slot, owner
            placements.append(Placement(key, block.generation, slot, block.ssd_slot))
        return placements

    def load_done(self, keys: Collection[BlockKey], owner: str, failed: Mapping[BlockKey, int] = NOTHING) -> None:
        """The load of `keys` ended on every rank; those in `failed` did not arrive on some rank, for that errno.

        What a failure says about the drive, and whether the block is kept, is for `Drives.end_load`. In DRAM a block that
        was late, that was not tried (ECANCELED) or that the GPU did not take (EREMOTEIO) is kept.
        """
        for key in keys:
            block, drive = self._loads.pop((owner, key), (None, None))
            if block is None:
                continue
            error = failed.get(key, 0)
            block.loads -= 1
            spoiled = error != 0 and error not in MILDEST_FIRST
            if drive is not None:
                answered, spoiled = self._drives.end_load(drive, error)
                if answered and drive.late_slots:
                    self._take_back_slots(drive)
            if block.promoter == owner:
                self._end_promotion(block, drive, error)
            if error:
                self.counters["kvoffload_load_failures_total",] += 1
            if spoiled:
                self._forget(block)
            self._settle(block)
        self._settle_dirty()

    def _end_promotion(self, block: Block, drive: Drive | None, error: int) -> None:
        block.promoter = None
        block.dram = State.READY
        if error == errno.ETIMEDOUT and drive is not None:
            drive.late_slots.append(block.dram_slot)
            block.dram, block.dram_slot = State.ABSENT, NO_SLOT
        elif error:
            self._drop_dram(block)

    # -- stores ------------------------------------------------------------------------------------------------

    def store(self, keys: Sequence[tuple[BlockKey, int]], own: Container[BlockKey] = ()) -> Stored:
        """DRAM slots for those of `keys` (key, group; prefix order) that are not held yet; the rest is dropped when no
        slot is free. Each placed block is moving in until `store_done`.

        Blocks in `own`, those of the same request, are not evicted unless they are on SSD: a prefix must not lose its
        head to its tail.
        """
        unsaved = Unsaved(own, self._blocks)
        self._use([key for key, _ in keys])
        placements: list[Placement] = []
        missing = [(key, group) for key, group in keys if not self._holds(key)]
        useless = not self.dram_is_tier and not self._drives.take_stores()  # bounce slots would only fill up
        for key, group in missing if not useless else ():
            slot = self._take_dram_slot(unsaved)
            if slot == NO_SLOT:
                break
            if key in self._blocks:
                self._forget_and_settle(self._blocks[key])
            block = Block(key, group, self._journal.next_generation(), 0)
            block.dram, block.dram_slot = State.MOVING_IN, slot
            self._blocks[key] = self._stores[key] = block
            placements.append(Placement(key, block.generation, slot, NO_SLOT))
        for placement in reversed(placements):  # the head of a prefix is the last to leave
            self._blocks[placement.key].used = self._tick()
        dropped = sum(not self._holds(key) for key, _ in keys)
        self.counters["kvoffload_dropped_stores_total",] += dropped
        return Stored(placements, dropped)

    def _holds(self, key: BlockKey) -> bool:
        """Whether storing the block would add nothing. It does if its only copy is on a drive that is left alone."""
        block = self._blocks.get(key)
        if block is None or self._drives.all_well:
            return block is not None
        if block.dram is not State.ABSENT:
            return self.dram_is_tier or not block.late
        return self._drives.of(block.ssd_slot).reads.state is not BreakerState.OPEN

    def store_done(self, keys: Collection[BlockKey], failed: Container[BlockKey] = ()) -> None:
        """The store of `keys` ended on every rank. Keys that were not placed by `store` are passed over."""
        for key in keys:
            block = self._stores.pop(key, None)
            if block is None:
                continue
            block.dram = State.READY
            if key in failed:
                self.counters["kvoffload_store_failures_total",] += 1
                self._forget(block)
            elif self._ssd_slots and not block.gone:
                block.dirty = True
                self._dirty[key] = block
            self._settle(block)

    def touch(self, keys: Sequence[BlockKey]) -> None:
        """The blocks (prefix order) were used just now. Eviction takes the tail of a prefix before its head."""
        on_ssd = [block.key for block in self._use(keys) if block.ssd is State.READY]
        if on_ssd:
            self._journal.touch(on_ssd)

    def _use(self, keys: Sequence[BlockKey]) -> list[Block]:
        """Notes that those of `keys` there are were used just now, the last one first."""
        blocks = [self._blocks[key] for key in reversed(keys) if key in self._blocks]
        for block in blocks:
            block.used = self._tick()
            self._settle(block)
        return blocks

    # -- demotion ----------------------------------------------------------------------------------------------

    def plan(self) -> list[Demotion]:
        """Demotions to start now, so that DRAM slots are clean before they are needed."""
        demotions = [] if self._drives.all_well else self._plan_trials()
        while self._dirty:
            slot = self._take_ssd_slot(self._drives.to_write())
            if slot == NO_SLOT:
                break
            block = self._dirty.pop(next(iter(self._dirty)))
            block.dirty = False
            demotions.append(self._demote(block, slot))
        return demotions

    def _plan_trials(self) -> list[Demotion]:
        """What a drive did not answer is also its next trial, so that one that hangs for good keeps no further DRAM slots."""
        demotions = []
        for drive in self._drives.to_write():
            block = drive.late_blocks[0] if drive.late_blocks else None
            slot = self._take_ssd_slot([drive]) if block is not None else NO_SLOT
            if block is not None and slot != NO_SLOT:
                demotions.append(self._demote(block, slot))
        return demotions

    def _demote(self, block: Block, slot: int) -> Demotion:
        block.ssd, block.ssd_slot = State.MOVING_IN, slot
        number = self._demotions.begin(block)
        self._drives.begin_demotion(self._drives.of(slot))
        self._settle(block)
        return Demotion(number, block.key, block.group, block.generation, block.dram_slot, slot)

    def ack(self, demotion: int, ranks: int, error: int = 0) -> None:
        """`ranks` more ranks finished the demotion; `error` is an errno if one of them failed."""
        ended = self._demotions.ack(demotion, ranks, error)
        if ended is None:
            return
        block, error = ended
        drive = self._drives.of(block.ssd_slot)
        if self._drives.end_demotion(drive, error) and drive.owes:
            self._take_back_blocks(drive)
        if error:
            self._demotion_failed(block, drive, error)
        else:
            block.ssd = State.READY
            if block.late:  # still, as something else opened the drive meanwhile
                drive.late_blocks.remove(block)
                block.late = False
            self.counters["kvoffload_demotions_total",] += 1
            if not block.gone:
                self._journal.put(block.key, block.ssd_slot, block.generation, block.group)
        self._settle(block)
        self._settle_dirty()

    def _demotion_failed(self, block: Block, drive: Drive, error: int) -> None:
        self.counters["kvoffload_demotion_failures_total", errno.errorcode.get(error, str(error))] += 1
        drive.pool.give_back(block.ssd_slot, last=True)  # the drive may hang just there
        block.ssd, block.ssd_slot = State.ABSENT, NO_SLOT
        if error == errno.EBADMSG:
            if block.late:  # the engine has a spare piece of memory for its slot
                drive.late_blocks.remove(block)
                block.late = False
            self._forget(block)
        elif error == errno.ETIMEDOUT and not block.late:
            block.late = True
            drive.late_blocks.append(block)
        elif not block.late:
            self._want_on_ssd(block)

    def _want_on_ssd(self, block: Block) -> None:
        """Once more: its demotion failed. A bounce slot is not worth keeping for a drive that is left alone."""
        if not self.dram_is_tier and not self._drives.take_stores():
            self._forget(block)
        elif not block.gone:
            block.dirty = True
            self._dirty[block.key] = block

    def _take_back_blocks(self, drive: Drive) -> None:
        """The drive answered a write: it has let go of the DRAM slots of late ones, and of late loads."""
        self._take_back_slots(drive)
        blocks, drive.late_blocks = drive.late_blocks, []
        for block in blocks:
            block.late = False
            if block.ssd is State.ABSENT:
                self._want_on_ssd(block)
            self._settle(block)

    def _take_back_slots(self, drive: Drive) -> None:
        """The same of a read, which says nothing of late writes: a frozen file system is still read."""
        slots, drive.late_slots = drive.late_slots, []
        for slot in slots:
            self._dram.give_back(slot)

    def _settle_dirty(self) -> None:
        """While no drive takes them, blocks that wait to be written may be evicted."""
        if self._was_writing is not self._drives.writing:
            self._was_writing = self._drives.writing
            for block in list(self._dirty.values()):
                self._settle(block)

    def disable_ssd(self) -> None:
        """The slot files cannot be used in this life: nothing more is read from them or written to them. The journal
        keeps what it knows for the next one."""
        self._drives.never_use()
        for block in list(self._blocks.values()):
            if block.ssd is State.READY and block.dram is not State.READY:
                self._forget(block, journal=False)
            elif block.ssd is State.READY:
                self._drop_ssd(block)
            self._settle(block)
        self._settle_dirty()

    # -- the end of a step, of a block, of everything ------------------------------------------------------------

    def end_step(self) -> None:
        """Lookups of this step whose blocks were not loaded lose their promise."""
        self._promised.clear()
        self._drives.forget_trials()

    def reset(self) -> None:
        """Forgets every block, in DRAM and on SSD. REQUIRES: workers finish all loads and stores in flight before they
        start another."""
        blocks = [*self._blocks.values(), *(block for block, _ in self._loads.values()), *self._stores.values()]
        for _, drive in self._loads.values():
            if drive is not None:
                drive.loads -= 1
        self._loads.clear()
        self._stores.clear()
        for block in blocks:
            block.loads = 0
            block.promoter = None
            if block.dram is State.MOVING_IN:
                block.dram = State.READY
            self._forget_and_settle(block, journal=False)
        self._promised.clear()
        self._journal.clear()

    def _forget(self, block: Block, journal: bool = True) -> None:
        """Takes the block out of the index; `_settle` frees its slots once nothing uses them."""
        if block.gone:
            return
        block.gone = True
        block.dirty = False
        del self._blocks[block.key]
        self._dirty.pop(block.key, None)
        self._dram_lru.remove(block.key)
        if block.ssd is State.READY:
            self._drives.of(block.ssd_slot).evictable.remove(block.key)
            if journal:
                self._journal.delete(block.key)

    def _forget_and_settle(self, block: Block, journal: bool = True) -> None:
        self._forget(block, journal)
        self._settle(block)

    def _tick(self) -> int:
        self._now += 1
        return self._now

    # -- slots -------------------------------------------------------------------------------------------------

    def _settle(self, block: Block) -> None:
        """Puts the block on the eviction lists it belongs to and frees the slots it no longer needs."""
        idle = block.loads == 0 and block.demotion is None and not block.late
        if block.gone:
            if idle:
                self._drop_dram(block)
                self._drop_ssd(block)
            return
        ready = block.dram is State.READY and idle
        if ready and not self.dram_is_tier and block.ssd is State.READY:
            self._drop_dram(block)  # the bounce slot did its duty
            ready = False
        if ready and (not block.dirty or not self._drives.writing):
            self._dram_lru.add(block.key, block.used)
        else:
            self._dram_lru.remove(block.key)
        if block.ssd is State.READY:
            evictable = self._drives.of(block.ssd_slot).evictable
            if block.loads == 0:
                evictable.add(block.key, block.used)
            else:
                evictable.remove(block.key)

    def _drop_dram(self, block: Block) -> None:
        if block.dram is State.READY:
            self._dram.give_back(block.dram_slot)
            block.dram, block.dram_slot = State.ABSENT, NO_SLOT

    def _drop_ssd(self, block: Block) -> None:
        if block.ssd is State.READY:
            drive = self._drives.of(block.ssd_slot)
            if not block.gone:  # else it is on no list, but a younger block of the same key may be
                drive.evictable.remove(block.key)
            drive.pool.give_back(block.ssd_slot)
            block.ssd, block.ssd_slot = State.ABSENT, NO_SLOT

    def _take_dram_slot(self, *exempt: Container[BlockKey]) -> int:
        """A free DRAM slot, evicting if need be; NO_SLOT if everything is in use, promised or dirty."""
        slot = self._dram.take()
        if slot is not None:
            return slot
        key = self._dram_lru.victim(self._promised, *exempt)
        if key is None:
            return NO_SLOT
        block = self._blocks[key]
        slot = block.dram_slot
        block.dram, block.dram_slot = State.ABSENT, NO_SLOT
        self.counters["kvoffload_evictions_total", Tier.DRAM.value] += 1
        if block.ssd is State.ABSENT:
            self._forget(block)
        return slot

    def _take_ssd_slot(self, drives: Sequence[Drive]) -> int:
        """A free slot of the first of `drives` that has one, else one of theirs by eviction; NO_SLOT if everything there is in
        use or promised."""
        for drive in drives:
            slot = drive.take_slot()
            if slot is not None:
                return slot
        victims = (drive.evictable.victim(self._promised) for drive in drives)
        key = next((key for key in victims if key is not None), None)
        if key is None:  # a full drive that has nothing of ours to give up may have room by now
            return next((slot for drive in drives if (slot := drive.pool.take()) is not None), NO_SLOT)
        block = self._blocks[key]
        slot = block.ssd_slot
        block.ssd, block.ssd_slot = State.ABSENT, NO_SLOT
        self._journal.delete(key)
        self.counters["kvoffload_evictions_total", Tier.SSD.value] += 1
        # A DRAM copy stays, as one that is not written again: it lost its place on SSD to a younger block.
        if block.dram is State.ABSENT:
            self._forget(block)
        return slot

    def check(self) -> None:
        """Verifies the books. Raises AssertionError."""
        loads, demotions = self._loads.values(), self._demotions.blocks()
        verify(self._blocks, self._dirty, self._stores, loads, demotions, self._dram, self._dram_lru, self._drives)
