"""A trace replayed through the real block manager. No data is moved: every store, demotion and load succeeds at once."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from kvoffload.admission import Admission, chosen
from kvoffload.config import Admissions
from kvoffload.manager import BlockManager, NoJournal
from kvoffload.policy import EvictionPolicy
from kvoffload.types import BlockKey, Tier

BOUNCE_SLOTS = 512  # where DRAM is no tier


@dataclass
class Result:
    """In blocks."""

    asked: int = 0
    hits: int = 0
    written: int = 0  # to SSD
    refused: int = 0  # times that a block was not written to SSD when it could have been
    evictions: dict[Tier, int] = field(default_factory=dict)
    useful: int = 0  # of those written, how many were read before they left

    @property
    def hit_rate(self) -> float:
        return self.hits / self.asked if self.asked else 0.0

    @property
    def useful_rate(self) -> float:
        return self.useful / self.written if self.written else 0.0


class Replay:
    def __init__(
        self,
        dram_slots: int,
        ssd_slots: int,
        policy: Callable[[int], EvictionPolicy],
        ssd_admission: Admissions = "all",
        ssd_blocks_per_day: float | None = None,
        admission: Admission | None = None,
    ):
        """`admission`: instead of what the two before it say."""
        self.result = Result()
        self._now = 0.0  # seconds of the trace
        slots = dram_slots + ssd_slots
        self._manager = BlockManager(
            dram_slots or BOUNCE_SLOTS, ssd_slots, 1, NoJournal(), block_bytes=0, dram_is_tier=dram_slots > 0, policy=policy,
            admission=admission or chosen(ssd_admission, ssd_blocks_per_day, 1, slots, lambda: self._now),
            clock=lambda: self._now,
        )  # fmt: skip
        self._unread: set[BlockKey] = set()  # written to SSD and not read since
        self._number = 0

    def request(self, keys: Sequence[BlockKey], second: float = 0.0, answer: int = 0) -> None:
        """`second`: of the trace, when it came. `answer`: tokens that it was answered with; 0: not known."""
        self._now = max(self._now, second)
        manager, result, owner = self._manager, self.result, str(self._number)
        self._number += 1
        found: list[BlockKey] = []
        for key in keys:
            tier = manager.lookup(key)
            if tier is None:
                break
            found.append(key)
            if tier is Tier.SSD and key in self._unread:
                self._unread.remove(key)
                result.useful += 1
        result.asked += len(keys)
        result.hits += len(found)
        manager.load(found, owner)
        manager.load_done(found, owner)
        manager.end_step()
        places = {key: place for place, key in enumerate(keys)}
        rest = list(keys)
        while rest:  # as many at a time as there is room for, as a prompt is computed in parts
            stored = manager.store([(key, 0) for key in rest], owner, places)
            placed = [placement.key for placement in stored.placements]
            manager.store_done(placed)
            self._demote()
            rest = rest[rest.index(placed[-1]) + 1 :] if placed and stored.dropped else []
        manager.touch(keys, owner, answer)
        manager.end_step()
        result.refused = sum(count for name, count in manager.counters.items() if name[0] == "kvoffload_refused_admissions_total")
        result.evictions = {tier: manager.counters["kvoffload_evictions_total", tier.value] for tier in Tier}

    def _demote(self) -> None:
        while demotions := self._manager.plan():
            for demotion in demotions:
                self._manager.ack(demotion.id, 1)
                self._unread.add(demotion.key)
            self.result.written += len(demotions)
