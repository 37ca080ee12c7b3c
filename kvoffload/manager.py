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
from typing import Protocol

from kvoffload.blocks import Block, Pause, Placement, State, Stored, Unsaved
from kvoffload.policy import LRU, EvictionPolicy
from kvoffload.slots import SlotPool
from kvoffload.types import MILDEST_FIRST, NO_SLOT, BlockKey, Demotion, Tier

logger = logging.getLogger(__name__)

DEMOTIONS_MAX = 512  # in flight at once: acknowledgements come a few steps later, and the drive must not wait for them
NOTHING: Mapping[BlockKey, int] = MappingProxyType({})


class Journal(Protocol):
    """What the manager tells the store; none of it blocks or raises."""

    def put(self, key: BlockKey, slot: int, generation: int, group: int) -> None: ...

    def delete(self, key: BlockKey) -> None: ...

    def touch(self, keys: Sequence[BlockKey]) -> None: ...

    def clear(self) -> None: ...

    def next_generation(self) -> int: ...


class Recovered(Protocol):
    """A block found on SSD at start."""

    key: BlockKey
    slot: int
    generation: int
    group: int


class BlockManager:
    def __init__(
        self,
        dram_slots: int,
        ssd_slots: int,
        ranks: int,
        journal: Journal,
        *,
        dram_is_tier: bool = True,
        recovered: Iterable[Recovered] = (),
        clock: Callable[[], float] = time.monotonic,
    ):
        """`dram_is_tier` False: DRAM slots only carry blocks to the SSD. `recovered`: oldest first."""
        self.ranks = ranks
        self.dram_is_tier = dram_is_tier
        self._journal = journal
        self._reads, self._writes = Pause(clock), Pause(clock)
        self._dram = SlotPool(dram_slots)
        self._ssd = SlotPool(ssd_slots)
        self._dram_lru: EvictionPolicy = LRU()
        self._ssd_lru: EvictionPolicy = LRU()
        self._blocks: dict[BlockKey, Block] = {}
        self._dirty: dict[BlockKey, Block] = {}  # to be demoted, in the order they were stored
        self._stores: dict[BlockKey, Block] = {}
        self._loads: dict[tuple[str, BlockKey], tuple[Block, Tier]] = {}  # by owner and key: where it is loaded from
        self._demotions: dict[int, Block] = {}
        self._acks: Counter[int] = Counter()
        self._failed_demotions: dict[int, int] = {}
        self._promised: set[BlockKey] = set()  # by lookups of this step
        self._next_demotion = 0
        self._now = 0
        self.counters: Counter[tuple[str, ...]] = Counter()
        self._recover(recovered)

    def _recover(self, recovered: Iterable[Recovered]) -> None:
        for entry in recovered:
            block = Block(entry.key, entry.group, entry.generation, self._tick())
            block.ssd, block.ssd_slot = State.READY, entry.slot
            self._blocks[entry.key] = block
            self._settle(block)
        self._ssd.claim({block.ssd_slot for block in self._blocks.values()})

    # -- questions ---------------------------------------------------------------------------------------------

    def lookup(self, key: BlockKey) -> Tier | None:
        """The nearest tier the block can be loaded from. The answer stays true until `end_step`."""
        tier = self.tier(key)
        if tier is not None:
            self._promised.add(key)
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
        if block.ssd is State.READY and not self._reads.active():
            tiers.append(Tier.SSD)
        return tiers

    def pending(self) -> bool:
        """Whether there is background work that needs further steps."""
        return bool(self._demotions) or bool(self._dirty) and not self._writes.active()

    def usage(self) -> dict[Tier, tuple[int, int]]:
        """Slots used and slots there are, by tier."""
        return {
            Tier.DRAM: (self._dram.count - self._dram.free(), self._dram.count),
            Tier.SSD: (self._ssd.count - self._ssd.free(), self._ssd.count),
        }

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
            self._loads[owner, key] = block, tier
            self._settle(block)
            if tier is Tier.DRAM:
                placements.append(Placement(key, block.generation, block.dram_slot, NO_SLOT))
                continue
            slot = NO_SLOT
            if may_move_in and block.dram is State.ABSENT:
                slot = self._take_dram_slot()
                may_move_in = slot != NO_SLOT  # asking again for every block would look through all that is promised
            if slot != NO_SLOT:
                block.dram, block.dram_slot, block.promoter = State.MOVING_IN, slot, owner
            placements.append(Placement(key, block.generation, slot, block.ssd_slot))
        return placements

    def load_done(self, keys: Collection[BlockKey], owner: str, failed: Mapping[BlockKey, int] = NOTHING) -> None:
        """The load of `keys` ended on every rank; those in `failed` did not arrive on some rank, for that errno.

        A block that was late is kept, since nothing says it is damaged; then nothing is read from the SSD for a while.
        So is one that was not tried (ECANCELED), or that the GPU did not take (EREMOTEIO).
        """
        for key in keys:
            block, tier = self._loads.pop((owner, key), (None, None))
            if block is None:
                continue
            block.loads -= 1
            arrived = key not in failed
            if block.promoter == owner:
                block.promoter = None
                block.dram = State.READY
                if not arrived:
                    self._drop_dram(block)
            if not arrived:
                self.counters["kvoffload_load_failures_total",] += 1
                if failed[key] == errno.ETIMEDOUT and tier is Tier.SSD:
                    self._reading_is_slow()
                elif failed[key] not in MILDEST_FIRST:
                    self._forget(block)
            elif tier is Tier.SSD:
                self._reads.note_success()
            self._settle(block)

    def _reading_is_slow(self) -> None:
        if pause_s := self._reads.begin():
            logger.warning("kvoffload: reading from the SSD took too long; no reads for %.0f s", pause_s)

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
        missing = [(key, group) for key, group in keys if key not in self._blocks]
        if not self.dram_is_tier and self._writes.active():
            missing = []  # bounce slots would only fill up
        for key, group in missing:
            slot = self._take_dram_slot(unsaved)
            if slot == NO_SLOT:
                break
            block = Block(key, group, self._journal.next_generation(), 0)
            block.dram, block.dram_slot = State.MOVING_IN, slot
            self._blocks[key] = self._stores[key] = block
            placements.append(Placement(key, block.generation, slot, NO_SLOT))
        for placement in reversed(placements):  # the head of a prefix is the last to leave
            self._blocks[placement.key].used = self._tick()
        dropped = sum(key not in self._blocks for key, _ in keys)
        self.counters["kvoffload_dropped_stores_total",] += dropped
        return Stored(placements, dropped)

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
            elif self._ssd.count and not block.gone:
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
        demotions: list[Demotion] = []
        if self._writes.active():
            return demotions
        while self._dirty and len(self._demotions) < DEMOTIONS_MAX:
            slot = self._take_ssd_slot()
            if slot == NO_SLOT:
                break
            key = next(iter(self._dirty))
            block = self._dirty.pop(key)
            block.dirty = False
            block.ssd, block.ssd_slot = State.MOVING_IN, slot
            block.demotion = self._next_demotion
            self._next_demotion += 1
            self._demotions[block.demotion] = block
            self._settle(block)
            demotions.append(Demotion(block.demotion, key, block.group, block.generation, block.dram_slot, slot))
        return demotions

    def ack(self, demotion: int, ranks: int, error: int = 0) -> None:
        """`ranks` more ranks finished the demotion; `error` is an errno if one of them failed."""
        if demotion not in self._demotions:
            return
        self._acks[demotion] += ranks
        if error:
            self._failed_demotions[demotion] = error
        if self._acks[demotion] < self.ranks:
            return
        del self._acks[demotion]
        block = self._demotions.pop(demotion)
        block.demotion = None
        error = self._failed_demotions.pop(demotion, 0)
        if error:
            self._demotion_failed(block, error)
        else:
            self._writes.note_success()
            block.ssd = State.READY
            self.counters["kvoffload_demotions_total",] += 1
            if not block.gone:
                self._journal.put(block.key, block.ssd_slot, block.generation, block.group)
        self._settle(block)

    def _demotion_failed(self, block: Block, error: int) -> None:
        self.counters["kvoffload_demotion_failures_total", errno.errorcode.get(error, str(error))] += 1
        self._ssd.give_back(block.ssd_slot, last=True)  # the drive may hang just there
        block.ssd, block.ssd_slot = State.ABSENT, NO_SLOT
        if error == errno.EBADMSG or not self.dram_is_tier:
            self._forget(block)
        elif not block.gone:
            block.dirty = True
            self._dirty[block.key] = block
        if error != errno.EBADMSG and (pause_s := self._writes.begin()):
            logger.warning("kvoffload: writing to the SSD failed (%s); no writes for %.0f s", error, pause_s)
            for dirty in list(self._dirty.values()):
                self._settle(dirty)  # what cannot be written may be evicted

    def disable_ssd(self) -> None:
        """The slot files cannot be used in this life: nothing more is read from them or written to them. The journal
        keeps what it knows for the next one."""
        self._reads.never_end()
        self._writes.never_end()
        for block in list(self._blocks.values()):
            if block.ssd is State.READY and block.dram is not State.READY:
                self._forget(block, journal=False)
            elif block.ssd is State.READY:
                self._drop_ssd(block)
            self._settle(block)

    # -- the end of a step, of a block, of everything ------------------------------------------------------------

    def end_step(self) -> None:
        """Lookups of this step whose blocks were not loaded lose their promise."""
        self._promised.clear()

    def reset(self) -> None:
        """Forgets every block, in DRAM and on SSD. REQUIRES: workers finish all loads and stores in flight before they
        start another."""
        blocks = [*self._blocks.values(), *(block for block, _ in self._loads.values()), *self._stores.values()]
        self._loads.clear()
        self._stores.clear()
        for block in blocks:
            block.loads = 0
            block.promoter = None
            if block.dram is State.MOVING_IN:
                block.dram = State.READY
            self._forget(block, journal=False)
            self._settle(block)
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
        self._ssd_lru.remove(block.key)
        if journal and block.ssd is State.READY:
            self._journal.delete(block.key)

    def _tick(self) -> int:
        self._now += 1
        return self._now

    # -- slots -------------------------------------------------------------------------------------------------

    def _settle(self, block: Block) -> None:
        """Puts the block on the eviction lists it belongs to and frees the slots it no longer needs."""
        idle = block.loads == 0 and block.demotion is None
        if block.gone:
            if idle:
                self._drop_dram(block)
                self._drop_ssd(block)
            return
        ready = block.dram is State.READY and idle
        if ready and not self.dram_is_tier and block.ssd is State.READY:
            self._drop_dram(block)  # the bounce slot did its duty
            ready = False
        if ready and (not block.dirty or self._writes.active()):
            self._dram_lru.add(block.key, block.used)
        else:
            self._dram_lru.remove(block.key)
        if block.ssd is State.READY and block.loads == 0:
            self._ssd_lru.add(block.key, block.used)
        else:
            self._ssd_lru.remove(block.key)

    def _drop_dram(self, block: Block) -> None:
        if block.dram is State.READY:
            self._dram.give_back(block.dram_slot)
            block.dram, block.dram_slot = State.ABSENT, NO_SLOT

    def _drop_ssd(self, block: Block) -> None:
        if block.ssd is State.READY:
            self._ssd.give_back(block.ssd_slot)
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

    def _take_ssd_slot(self) -> int:
        """A free SSD slot, evicting if need be; NO_SLOT if everything is in use or promised."""
        slot = self._ssd.take()
        if slot is not None:
            return slot
        key = self._ssd_lru.victim(self._promised)
        if key is None:
            return NO_SLOT
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
        """Verifies the books: every slot has one owner, counts add up, lists hold what they may. Raises AssertionError."""
        everyone = {id(b): b for b in self._blocks.values()}
        loading = [block for block, _ in self._loads.values()]
        for blocks in (self._stores.values(), loading, self._demotions.values()):
            everyone.update((id(block), block) for block in blocks)
        for tier, pool in (("dram", self._dram), ("ssd", self._ssd)):
            owned = Counter(getattr(b, tier + "_slot") for b in everyone.values() if getattr(b, tier) is not State.ABSENT)
            assert all(count == 1 for count in owned.values()), f"a {tier} slot has two owners"
            assert NO_SLOT not in owned, f"a block in {tier} without a slot"
            assert len(owned) + pool.free() == pool.count, f"{tier}: {len(owned)} owned, {pool.free()} free, of {pool.count}"
            assert not any(pool.is_free(slot) for slot in owned), f"an owned {tier} slot is free"
        in_use = Counter(id(block) for block in loading)
        for block in everyone.values():
            name = block.key.hex()
            assert block.gone == (self._blocks.get(block.key) is not block), name
            assert block.loads == in_use[id(block)], f"{name}: loads"
            assert (block.demotion is None) == (block.ssd is not State.MOVING_IN), f"{name}: demotion"
            assert block.dirty == (self._dirty.get(block.key) is block), f"{name}: dirty"
            assert not block.dirty or block.dram is State.READY, f"{name}: dirty without bytes"
            assert not block.gone or block.loads or block.demotion is not None or block in self._stores.values(), name
        for key in self._dram_lru_keys():
            block = self._blocks[key]
            assert block.dram is State.READY and not block.loads and block.demotion is None, f"{key.hex()}: evictable in use"
        assert all(self._blocks[key].ssd is State.READY and not self._blocks[key].loads for key in self._ssd_lru_keys())

    def _dram_lru_keys(self) -> list[BlockKey]:
        return [key for key in self._blocks if key in self._dram_lru]

    def _ssd_lru_keys(self) -> list[BlockKey]:
        return [key for key in self._blocks if key in self._ssd_lru]
