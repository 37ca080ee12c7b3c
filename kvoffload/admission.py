"""Which blocks are worth writing to the SSD: all, those used twice, and no more of them than a daily budget allows.

Scheduler side, one thread; pure, the clock is passed in. The manager offers a block when it is stored and again whenever
another request uses it while it has no SSD copy. What is refused stays in DRAM like any block that is on SSD already, free
to be evicted.
"""

from collections import OrderedDict
from collections.abc import Callable
from typing import Protocol

from kvoffload.config import Admissions
from kvoffload.types import BlockKey

DAY_S = 86_400.0
BURST_S = 3_600.0  # of the budget that may be saved up
BURST_BLOCKS_MIN = 16  # so that a budget of a few blocks a day still writes some
FIRST_USE_FLOOR = 0.5  # share that is kept for blocks that were used before
GHOSTS_PER_SLOT = 4  # blocks that left, remembered by the number of requests that used them, for each slot of a tier
GHOSTS_MAX = 1 << 18  # of about 150 bytes
HOLES_MAX = 4096  # requests


class AdmissionPolicy(Protocol):
    selective: bool  # whether it ever says no

    def wants(self, uses: int) -> bool:
        """Whether a block that `uses` requests have used, as far as is known, is worth a write at all."""


class AdmitAll:
    selective = False

    def wants(self, uses: int) -> bool:
        return True


class SecondTouch:
    """A block that one request used is not written until another does: scans and one-time prompts never are."""

    selective = True

    def wants(self, uses: int) -> bool:
        return uses >= 2


class Budget:
    """A token bucket, in bytes of all ranks. The first starts half full. What a life before this one left is not known, so the next
    starts with what was saved up since that wrote, half at most: else one restarted every minute would write without end.

    Floors are shares of what could be in it by now had nothing been written, so that short lives write what comes first, too.
    """

    def __init__(self, bytes_per_day: float, block_bytes: int, clock: Callable[[], float], idle_s: float | None = None):
        """idle_s: since an engine before this one may have written; None: there was none."""
        self.block_bytes = block_bytes
        self.rate = bytes_per_day / DAY_S
        self.burst = max(self.rate * BURST_S, float(BURST_BLOCKS_MIN * block_bytes))
        self._clock = clock
        self._level, self._unspent = self.burst / 2, self.burst
        if idle_s is not None:
            self._level = self._unspent = min(self._level, self.rate * max(0.0, idle_s))
        self._at = clock()

    def left(self) -> float:
        """Bytes that may be written now. Below 0 never; a clock that goes backwards adds nothing."""
        now = self._clock()
        given = self.rate * max(0.0, now - self._at)
        self._level = min(self.burst, self._level + given)
        self._unspent = min(self.burst, self._unspent + given)
        self._at = now
        return self._level

    def allows(self, waiting: int, floor: float = 0.0) -> bool:
        """Whether one block more than the `waiting` ones may be written, leaving a share of `floor`."""
        return self.left() - (waiting + 1) * self.block_bytes >= floor * self._unspent

    def take(self) -> None:
        """A block is written. REQUIRES: `allows` with all that is to be written before it."""
        self._level -= self.block_bytes


class Ghosts:
    """How many requests used blocks that are in no tier any more. A bounded table of fingerprints; the oldest go."""

    def __init__(self, capacity: int):
        self._capacity = min(capacity, GHOSTS_MAX)
        self._uses: OrderedDict[int, int] = OrderedDict()

    def leave(self, key: BlockKey, uses: int) -> None:
        fingerprint = hash(key)
        self._uses[fingerprint] = uses
        self._uses.move_to_end(fingerprint)
        if len(self._uses) > self._capacity:
            self._uses.popitem(last=False)

    def come(self, key: BlockKey) -> int:
        """Uses known of a block that is stored now."""
        return self._uses.pop(hash(key), 0)

    def clear(self) -> None:
        self._uses.clear()

    def __len__(self) -> int:
        return len(self._uses)


class Admission:
    """A policy, a budget, and whole prefixes: of a request's blocks of one group, none is written behind one that was refused.

    Under scarcity the level of the bucket is the price: a block used by one request takes from its upper half only, one used
    before takes all. So much used blocks find room at any time, and while there is plenty nothing is refused.
    """

    def __init__(self, policy: AdmissionPolicy, budget: Budget | None, ghosts: int):
        self._policy = policy
        self.budget = budget
        self.selective = policy.selective or budget is not None
        self.ghosts = Ghosts(ghosts) if self.selective else None
        self._holes: OrderedDict[str, dict[int, int]] = OrderedDict()  # by request and group: the first place refused

    def refusal(self, user: str, group: int, depth: int, uses: int, waiting: int) -> str:
        """Why the block is not to be written now, "" if it is. REQUIRES: a request's blocks are offered in prefix order.

        `user`, `depth`: the request that uses it, and its place there. `waiting`: blocks admitted and not yet written.
        """
        if self.is_behind_hole(user, group, depth):
            return "behind"
        if not self._policy.wants(uses):
            reason = "first_use"
        elif self.budget is not None and not self.budget.allows(waiting, FIRST_USE_FLOOR if uses < 2 else 0.0):
            reason = "budget"
        else:
            return ""
        self.note_hole(user, group, depth)
        return reason

    def is_behind_hole(self, user: str, group: int, depth: int) -> bool:
        """Whether a block that comes before it in its request was not written."""
        holes = self._holes.get(user)
        return holes is not None and depth > holes.get(group, depth)

    def note_hole(self, user: str, group: int, depth: int) -> None:
        """The block is not written."""
        holes = self._holes.setdefault(user, {})
        holes[group] = min(depth, holes.get(group, depth))
        if len(self._holes) > HOLES_MAX:
            self._holes.popitem(last=False)

    def affords(self, waiting: int) -> bool:
        """Whether a block that was admitted before may be written once more."""
        return self.budget is None or self.budget.allows(waiting)

    def written(self) -> None:
        """A block is handed to a drive, be it that the drive fails it: that wears, too."""
        if self.budget is not None:
            self.budget.take()

    def reset(self) -> None:
        self._holes.clear()
        if self.ghosts is not None:
            self.ghosts.clear()


def chosen(
    kind: Admissions,
    bytes_per_day: float | None,
    block_bytes: int,
    slots: int,
    clock: Callable[[], float],
    idle_s: float | None = None,
) -> Admission:
    """What a user's settings say. `block_bytes`: of a slot on all ranks. `slots`: of all tiers. `clock`: in seconds. `idle_s`: see
    Budget."""
    budget = None if bytes_per_day is None else Budget(bytes_per_day, block_bytes, clock, idle_s)
    policy = AdmitAll() if kind == "all" else SecondTouch()
    return Admission(policy, budget, GHOSTS_PER_SLOT * slots)


class WrittenToday:
    """Bytes written since 00:00 UTC, from a total that only grows."""

    def __init__(self, wall: float):
        self._day, self._before, self._seen = wall // DAY_S, 0.0, 0.0

    def of(self, total: float, wall: float) -> float:
        """REQUIRES: asked more often than once a day, else what was written before midnight counts as today's."""
        day = wall // DAY_S
        if day > self._day:  # a clock set back must not begin the day anew
            self._day, self._before = day, self._seen
        self._seen = total
        return total - self._before
