"""The block manager: the one index of which block lies in which slot. Scheduler side, one thread.

It decides and keeps books; it moves no data. Slot numbers it hands out mean the same on every rank. Per tier a block
is absent, moving in, or ready; what reads it (loads, a demotion) is counted, and a block in use is on no eviction list.

A block's life: `store` gives it a DRAM slot (moving in) -> `store_done` (ready, and dirty while the SSD lacks it; what
admission refuses is clean, and offered again when another request uses it) -> `plan` demotes it (SSD slot, moving in)
-> `ack` from every rank (ready on SSD, journalled; clean) -> eviction of the DRAM copy is bookkeeping. `lookup` promises a
block until `end_step`, `load` keeps it in use until `load_done`. A block that fails is forgotten; the request recomputes.
"""

import errno
import logging
import time
from collections import Counter
from collections.abc import Callable, Collection, Container, Iterable, Mapping, Sequence
from types import MappingProxyType

from kvoffload.admission import Admission, AdmitAll
from kvoffload.blocks import ABSENT, MOVING_IN, READY, Block, Demotions, Journal, Placement, Stored
from kvoffload.blocks import NoJournal as NoJournal  # for those above this layer
from kvoffload.books import verify
from kvoffload.breaker import BreakerState
from kvoffload.drives import Drive, Drives
from kvoffload.index import Index
from kvoffload.policy import DEFAULT, LRU, POLICIES, EvictionPolicy
from kvoffload.table import NO_BLOCKS, BlockTable
from kvoffload.types import LATE, NO_SLOT, NOT_OF_BLOCK, BlockKey, Demotion, Tier

logger = logging.getLogger(__name__)

DEMOTIONS_MAX = 512  # in flight at once: acknowledgements come a few steps later, and the drive must not wait for them
PASSED_MAX = 2000  # see Index.passed, in one step of the scheduler
DRAM, SSD = Tier  # see State
NOTHING: Mapping[BlockKey, int] = MappingProxyType({})


class BlockManager:
    def __init__(
        self,
        dram_slots: int,
        ssd_slots: int,
        ranks: int,
        journal: Journal,
        *,
        block_bytes: int,
        dram_is_tier: bool = True,
        drives: Sequence[str] = ("0",),
        recovered: BlockTable = NO_BLOCKS,
        policy: Callable[[int], EvictionPolicy] = POLICIES[DEFAULT],
        admission: Admission | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        """`block_bytes`: of a slot, on all ranks. `dram_is_tier` False: DRAM slots only carry blocks to the SSD. `drives`: those
        that SSD slots are striped over, as they are called in the log. `recovered`: what is on SSD. `policy`: makes one for so
        many blocks, for the SSD tier, or for DRAM where there is none. `admission`: None writes every block to the SSD."""
        self.ranks = ranks
        self.dram_is_tier = dram_is_tier
        self._journal = journal
        self.counters: Counter[tuple[str, ...]] = Counter()
        self._drives = Drives(drives, ssd_slots, block_bytes, min(DEMOTIONS_MAX, dram_slots), clock, policy, self.counters)
        self._ssd_slots = ssd_slots
        self._admission = admission or Admission(AdmitAll(), None, 0)
        self._selective = self._admission.selective and ssd_slots > 0
        ghosts, of_dram = self._admission.ghosts, LRU if ssd_slots else policy  # what leaves DRAM is on SSD: the cheapest will do
        self._index = Index(dram_slots, ssd_slots, dram_is_tier, self._drives, journal, of_dram(dram_slots), self.counters, ghosts)
        self._blocks, self._ssd_slot = self._index.blocks, self._index.on_ssd.slot
        self._stores: dict[BlockKey, Block] = {}
        # By owner and key, with the drive (None: from DRAM) and how many loads from it had been late when this one began.
        self._loads: dict[tuple[str, BlockKey], tuple[Block, Drive | None, int]] = {}
        self._demotions = Demotions(ranks)
        self._index.recover(recovered)

    # -- questions ---------------------------------------------------------------------------------------------

    def lookup(self, key: BlockKey) -> Tier | None:
        """The nearest tier the block can be loaded from. The answer stays true until `end_step`."""
        block = self._blocks.get(key)
        if block is None and self._drives.all_well:  # nearly all of a long prefix; asked here, for each call costs as much again
            slot = self._ssd_slot(key)
            if slot is None:
                return None
            self._index.promised_ssd.add(slot)
            return SSD
        tier = self.tier(key)
        if tier is not None:
            slot = self._index.ssd_slot(key)
            if slot is not None:
                self._index.promised_ssd.add(slot)
                if tier is SSD and not self._drives.all_well:
                    self._drives.of(slot).promise(key)
            if block is not None and block.dram is READY:
                self._index.promised_dram.add(block.dram_slot)
        return tier

    def tier(self, key: BlockKey) -> Tier | None:
        block = self._blocks.get(key)
        if block is None:
            slot = self._ssd_slot(key)
        elif block.dram is READY and self.dram_is_tier:
            return DRAM
        else:
            slot = block.ssd_slot if block.ssd is READY else None
        return SSD if slot is not None and (self._drives.all_well or self._drives.of(slot).may_read(key)) else None

    def tiers(self, key: BlockKey) -> list[Tier]:
        """Every tier the block can be loaded from, the nearest first."""
        nearest = self.tier(key)
        slot = self._index.ssd_slot(key) if nearest is DRAM else None
        if slot is not None and self._drives.of(slot).may_read(key):
            return [DRAM, SSD]
        return [] if nearest is None else [nearest]

    def pending(self) -> bool:
        """Whether there is background work that needs further steps now. An idle engine steps a thousand times a second,
        so neither for a drive that hangs or is slow nor through long pauses: the next request's steps go on with it."""
        return self._drives.answering() or bool(self._index.dirty) and self._drives.writes_soon()

    def usage(self) -> dict[Tier, tuple[int, int]]:
        """Slots used and slots there are, by tier."""
        return {
            DRAM: (self._index.dram.count - self._index.dram.free(), self._index.dram.count),
            SSD: (self._ssd_slots - sum(drive.pool.free() for drive in self._drives), self._ssd_slots),
        }

    def queues(self) -> dict[str, int]:
        """Blocks in flight, and those that wait to be written to the SSD."""
        return {
            "load": len(self._loads),
            "store": len(self._stores),
            "demotion": len(self._demotions),
            "demotion_waiting": len(self._index.dirty),
        }

    def drive_states(self) -> Iterable[tuple[tuple[str, str], BreakerState]]:
        """By drive and direction."""
        return self._drives.states()

    # -- loads -------------------------------------------------------------------------------------------------

    def load(
        self, keys: Sequence[BlockKey], owner: str, allowed: Collection[Tier] = tuple(Tier), own: Mapping[BlockKey, int] = NOTHING
    ) -> list[Placement]:
        """Places to load `keys` from, in order, in the nearest of the allowed tiers; they stay in use until `load_done`. `own`: see
        `store`; what comes before `keys` is used, too, though it is in GPU memory.

        A block that is not held gets a placement without slots, which workers answer with a failure: vLLM asks only
        for what a lookup promised in the same step, but its recomputing is better than our raising.
        REQUIRES: `owner` has no other load of the same key in flight.
        """
        self._use(sorted(own, key=own.__getitem__) or keys, owner)  # first: what moves in must not push out what is loaded with it
        placements = []
        may_move_in = self.dram_is_tier
        for key in keys:
            tier = self.tier(key)
            if tier not in allowed:
                tier = next((tier for tier in self.tiers(key) if tier in allowed), None)
            block = self._index.block(key) if tier is not None else None
            if block is None:
                placements.append(Placement(key, 0, NO_SLOT, NO_SLOT))
                continue
            drive = self._begin_load(block, tier, owner)
            if drive is None:
                placements.append(Placement(key, block.generation, block.dram_slot, NO_SLOT))
                continue
            slot = NO_SLOT
            if may_move_in and block.dram is ABSENT and drive.reads.closed:  # a trial must not keep a DRAM slot
                slot = self._index.take_dram_slot()
                may_move_in = slot != NO_SLOT  # asking again for every block would look through all that is promised
            if slot != NO_SLOT:
                block.dram, block.dram_slot, block.promoter = MOVING_IN, slot, owner
                self._index.enter_dram(block)
            placements.append(Placement(key, block.generation, slot, block.ssd_slot))
        return placements

    def read_for_time(self, keys: Sequence[BlockKey], owner: str) -> list[Placement]:
        """Places to read blocks from the SSD only to see how long it takes, of those that are there; in use until `load_done`.

        It is no use of them: who asked for them computes them. REQUIRES: see `load`.
        """
        placements = []
        for key in keys:
            block = self._index.block(key) if SSD in self.tiers(key) else None
            if block is not None:
                self._begin_load(block, SSD, owner)
                placements.append(Placement(key, block.generation, NO_SLOT, block.ssd_slot))
        return placements

    def _begin_load(self, block: Block, tier: Tier | None, owner: str) -> Drive | None:
        """From now on the block is in use. The drive that it is read from, if it is."""
        block.loads += 1
        drive = self._drives.of(block.ssd_slot) if tier is SSD else None
        self._loads[owner, block.key] = block, drive, drive.late_loads if drive is not None else 0
        self._index.settle(block)
        if drive is not None:
            self._drives.begin_load(drive)
        return drive

    def load_done(self, keys: Iterable[BlockKey], owner: str, failed: Mapping[BlockKey, int] = NOTHING, used: bool = True) -> None:
        """The load of `keys` ended on every rank; those in `failed` did not arrive on some rank, for that errno. `used`: or only
        read for time.

        What a failure says about the drive, and whether the block is kept, is for `Drives.end_load`. In DRAM a block that
        was late, that was not tried (ECANCELED) or that the GPU did not take (EREMOTEIO) is kept.
        """
        for key in keys:
            block, drive, late_before = self._loads.pop((owner, key), (None, None, 0))
            if block is None:
                continue
            error = failed.get(key, 0)
            block.loads -= 1
            spoiled = error != 0 and error not in NOT_OF_BLOCK
            if drive is not None:
                answered, spoiled = self._drives.end_load(drive, error)
                if answered and drive.late_slots:
                    self._take_back_slots(drive, late_before)
            if block.promoter == owner:
                self._end_promotion(block, drive, error)
            if error and used:
                self.counters["kvoffload_load_failures_total",] += 1
            elif used and drive is not None and block.unread:
                block.unread = False
                self.counters["kvoffload_read_back_blocks_total",] += 1
            if spoiled:
                self._index.forget(block)
            self._index.settle(block)
        self._index.settle_dirty()

    def _end_promotion(self, block: Block, drive: Drive | None, error: int) -> None:
        block.promoter = None
        block.dram = READY
        if error in LATE and drive is not None:
            self._set_aside(block, drive)
        elif error:
            self._index.drop_dram(block)

    def _set_aside(self, block: Block, drive: Drive) -> None:
        """A late load may still fill the block's DRAM slot."""
        drive.set_aside(block.dram_slot)
        self._index.dram_policy.leave(block.dram_slot)
        block.dram, block.dram_slot = ABSENT, NO_SLOT

    # -- stores ------------------------------------------------------------------------------------------------

    def store(self, keys: Sequence[tuple[BlockKey, int]], owner: str, own: Mapping[BlockKey, int] = NOTHING) -> Stored:
        """DRAM slots for those of `keys` (key, group; prefix order) that are not held yet; the rest is dropped when no
        slot is free. Each placed block is moving in until `store_done`.

        `own`: all blocks of the request, `owner`, by their place in it. They are not evicted unless they are on SSD: a prefix
        must not lose its head to its tail.
        """
        self._use([key for key, _ in keys], owner)
        blocks: list[Block] = []
        missing = {key: group for key, group in keys if not self._holds(key)}
        useless = not self.dram_is_tier and not self._drives.take_stores()  # bounce slots would only fill up
        for key, group in missing.items() if not useless else ():
            slot = self._index.take_dram_slot(own)
            if slot == NO_SLOT:
                break
            former = None if self._drives.all_well else self._index.block(key)  # see _holds
            if former is not None:
                self._index.forget_and_settle(former)
            block = Block(key, group, self._journal.next_generation(), 0, own.get(key, 0))
            block.dram, block.dram_slot, block.user = MOVING_IN, slot, owner
            if self._admission.ghosts is not None:
                block.uses += self._admission.ghosts.come(key)
            self._blocks[key] = self._stores[key] = block
            blocks.append(block)
        for block in reversed(blocks):  # the head of a prefix is the last to leave
            block.used = self._index.tick()
            self._index.enter_dram(block)
        dropped = len(missing) - len(blocks)
        self.counters["kvoffload_dropped_stores_total",] += dropped
        return Stored([Placement(block.key, block.generation, block.dram_slot, NO_SLOT) for block in blocks], dropped)

    def _holds(self, key: BlockKey) -> bool:
        """Whether storing the block would add nothing. It does if its only copy is on a drive that is left alone."""
        block = self._blocks.get(key)
        slot = self._ssd_slot(key) if block is None else block.ssd_slot
        if slot is None or self._drives.all_well:
            return slot is not None
        if block is not None and block.dram is not ABSENT:
            return self.dram_is_tier or not block.late
        return self._drives.of(slot).reads.state is not BreakerState.OPEN

    def store_done(self, keys: Collection[BlockKey], failed: Container[BlockKey] = ()) -> None:
        """The store of `keys` ended on every rank. Keys that were not placed by `store` are passed over."""
        stored = [block for key in keys if (block := self._stores.pop(key, None)) is not None]
        stored.sort(key=lambda block: block.depth)  # a prefix is written from its head, and vLLM tells of a set
        for block in stored:
            block.dram = READY
            if block.key in failed:
                self.counters["kvoffload_store_failures_total",] += 1
                self._index.forget(block)
            elif self._ssd_slots and not block.gone:
                self._offer(block)
            self._index.settle(block)

    def touch(self, keys: Sequence[BlockKey], owner: str, answer: int = 0) -> None:
        """The request used the blocks, all that it has in prefix order, just now, and was answered with so many tokens. Eviction
        takes the tail of a prefix before its head."""
        on_ssd = self._use(keys, owner, answer)
        if on_ssd:
            self._journal.touch(on_ssd)

    def _use(self, keys: Sequence[BlockKey], owner: str, answer: int = 0) -> list[tuple[BlockKey, int]]:
        """`Index.use`. Blocks that the SSD lacks are offered to it again if another request used them before: those that were left
        off, and all if admission selects."""
        blocks, left_off = self._blocks, self._index.left_off
        if not (self._selective or left_off):
            return self._index.use(keys, owner, answer)
        may_come = keys if self._selective else [key for key in keys if key in left_off]
        again = [block for key in may_come if (block := blocks.get(key)) is not None and block.user != owner]
        used = self._index.use(keys, owner, answer)
        for block in again:
            left_off.discard(block.key)
            block.uses += 1
            if block.dram is READY and block.ssd is ABSENT and not block.dirty and not block.late:
                self._offer(block)
                self._index.settle(block)
        return used

    def _offer(self, block: Block) -> None:
        """To the SSD, which takes it or not. A bounce slot is not kept for a block that it does not take."""
        waiting = len(self._index.dirty)
        refusal = self._admission.refusal(block.user, block.group, block.depth, block.uses, waiting) if self._selective else ""
        if not refusal:
            self._index.want_on_ssd(block, block.user)
            return
        self.counters["kvoffload_refused_admissions_total", refusal] += 1
        if not self.dram_is_tier:
            self._index.forget(block)

    # -- demotion ----------------------------------------------------------------------------------------------

    def plan(self) -> list[Demotion]:
        """Demotions to start now, so that DRAM slots are clean before they are needed."""
        demotions = [] if self._drives.all_well else self._plan_trials()
        self._index.passed = 0
        while self._index.dirty and self._index.passed < PASSED_MAX:
            block = next(iter(self._index.dirty.values()))
            slot = None
            if not self._admission.is_behind_hole(block.wanted_by, block.group, block.depth):
                slot = self._index.take_ssd_slot(self._drives.to_write(), block)
                if slot == NO_SLOT:
                    break
            del self._index.dirty[block.key]
            block.dirty = False
            if slot is None:
                self._leave_off(block)
            else:
                demotions.append(self._demote(block, slot))
        for demotion in reversed(demotions):  # as policies are promised, and some go by it: a head is the last to leave
            block = self._demotions.block(demotion.id)
            if not block.gone:
                policy, frame = self._drives.frame(block.ssd_slot)
                policy.enter(frame, block.key, block.used, block.answer)
        return demotions

    def _leave_off(self, block: Block) -> None:
        """Of a prompt that is longer than the tier, say: without its head it could not be loaded, and others wait behind it."""
        self.counters["kvoffload_refused_admissions_total", "own_head"] += 1
        self._index.leave_off(block)
        self._admission.note_hole(block.wanted_by, block.group, block.depth)
        if not self.dram_is_tier:
            self._index.forget(block)
        self._index.settle(block)

    def _plan_trials(self) -> list[Demotion]:
        demotions = []
        for drive in self._drives.to_write():
            if not self._admission.affords(len(self._index.dirty)) or (block := drive.next_trial()) is None:
                continue
            slot = self._index.take_ssd_slot([drive], block)
            if slot is not None and slot != NO_SLOT:
                demotions.append(self._demote(block, slot))
        return demotions

    def _demote(self, block: Block, slot: int) -> Demotion:
        self._admission.written()
        block.ssd, block.ssd_slot = MOVING_IN, slot
        number = self._demotions.begin(block)
        drive = self._drives.of(slot)
        self._drives.begin_demotion(drive)
        block.late_before = drive.late_loads
        self._index.settle(block)
        return Demotion(number, block.key, block.group, block.generation, block.dram_slot, slot)

    def ack(self, demotion: int, ranks: int, error: int = 0) -> None:
        """`ranks` more ranks finished the demotion; `error` is an errno if one of them failed."""
        ended = self._demotions.ack(demotion, ranks, error)
        if ended is None:
            return
        block, error = ended
        drive = self._drives.of(block.ssd_slot)
        if self._drives.end_demotion(drive, error) and drive.owes:
            self._take_back_blocks(drive, block.late_before)
        if error:
            self._demotion_failed(block, drive, error)
        else:
            block.ssd = READY
            if block.late:  # still, as something else opened the drive meanwhile
                drive.late_blocks.remove(block)
                block.late = False
            block.unread = True
            self.counters["kvoffload_demotions_total",] += 1
            if not block.gone:
                self._index.on_ssd.add(block)
                self._journal.put(block.key, block.ssd_slot, block.generation, block.group)
        self._index.settle(block)
        self._index.settle_dirty()

    def _demotion_failed(self, block: Block, drive: Drive, error: int) -> None:
        self.counters["kvoffload_demotion_failures_total", errno.errorcode.get(error, str(error))] += 1
        self._index.leave_ssd(block.ssd_slot)
        drive.pool.give_back(block.ssd_slot, last=True)  # the drive may hang just there
        block.ssd, block.ssd_slot = ABSENT, NO_SLOT
        if error == errno.EBADMSG:
            if block.late:  # the engine has a spare piece of memory for its slot
                drive.late_blocks.remove(block)
                block.late = False
            self._index.forget(block)
        elif error == errno.ETIMEDOUT and not block.late:
            block.late = True
            drive.late_blocks.append(block)
        elif not block.late:
            self._want_on_ssd(block)

    def _want_on_ssd(self, block: Block) -> None:
        """Once more, if the budget has it: its demotion failed. A bounce slot is not worth keeping for a drive that is left
        alone."""
        affordable = self._admission.affords(len(self._index.dirty))
        if not self.dram_is_tier and not (affordable and self._drives.take_stores()):
            self._index.forget(block)
        elif affordable and not block.gone:
            self._index.want_on_ssd(block, block.wanted_by)

    def _take_back_blocks(self, drive: Drive, late_before: int) -> None:
        """The drive answered a write: it has let go of the DRAM slots of late ones, and of late loads."""
        self._take_back_slots(drive, late_before)
        blocks, drive.late_blocks = drive.late_blocks, []
        for block in blocks:
            block.late = False
            if block.ssd is ABSENT:
                self._want_on_ssd(block)
            self._index.settle(block)

    def _take_back_slots(self, drive: Drive, late_before: int) -> None:
        """The same of a read, which says nothing of late writes: a frozen file system is still read."""
        for slot in drive.take_back(late_before):
            self._index.dram.give_back(slot)

    def disable_ssd(self) -> None:
        """The slot files cannot be used in this life: nothing more is read from them or written to them. The journal
        keeps what it knows for the next one."""
        self._drives.never_use()
        self._index.forget_cold()
        for block in list(self._blocks.values()):
            if block.ssd is READY and block.dram is not READY:
                self._index.forget(block, journal=False)
            elif block.ssd is READY:
                self._index.drop_ssd(block)
            self._index.settle(block)
        self._index.settle_dirty()

    # -- the end of a step, of a block, of everything ------------------------------------------------------------

    def end_step(self) -> None:
        """Lookups of this step whose blocks were not loaded lose their promise."""
        self._index.end_promises()
        self._drives.forget_trials()

    def reset(self) -> None:
        """Forgets every block, in DRAM and on SSD. REQUIRES: workers finish all loads and stores in flight before they
        start another."""
        blocks = [*self._blocks.values(), *(block for block, *_ in self._loads.values()), *self._stores.values()]
        for block, drive, _ in self._loads.values():
            if drive is not None:
                drive.loads -= 1
                if block.promoter is not None and block.dram is MOVING_IN:
                    self._set_aside(block, drive)  # that may be late already on one rank, of which nobody will tell now
        self._loads.clear()
        self._stores.clear()
        for block in blocks:
            block.loads = 0
            block.promoter = None
            if block.dram is MOVING_IN:
                block.dram = READY
            self._index.forget_and_settle(block, journal=False)
        self._index.forget_cold()
        self._index.end_promises()
        self._index.left_off.clear()
        self._admission.reset()
        self._journal.clear()

    def check(self) -> None:
        """Verifies the books. Raises AssertionError."""
        loads, demotions = self._loads.values(), self._demotions.blocks()
        verify(self._index, self._stores, loads, demotions)
