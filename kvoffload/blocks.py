"""What the block manager keeps about a block and hands out for it. Scheduler side, one thread."""

from collections.abc import Callable, Container, Mapping
from enum import Enum
from typing import NamedTuple

from kvoffload.types import NO_SLOT, BlockKey

PAUSE_MIN_S, PAUSE_MAX_S = 1.0, 60.0


class State(Enum):
    ABSENT = "absent"
    MOVING_IN = "moving in"
    READY = "ready"


class Placement(NamedTuple):
    """Where a block is to be stored to or loaded from. NO_SLOT: not there; a load then passes through spare memory."""

    key: BlockKey
    generation: int
    dram_slot: int
    ssd_slot: int


class Stored(NamedTuple):
    """What became of blocks offered to `store`."""

    placements: list[Placement]  # of those that are to be copied
    dropped: int  # for which there was no slot


class Pause:
    """A time without traffic in one direction of the SSD after it failed: one second, then two, up to a minute."""

    def __init__(self, clock: Callable[[], float]):
        self._clock = clock
        self._until = 0.0
        self._length_s = 0.0

    def begin(self) -> float:
        """Returns its length in seconds; 0 if there is one already."""
        if self.active():
            return 0.0
        self._length_s = min(PAUSE_MAX_S, max(PAUSE_MIN_S, 2 * self._length_s))
        self._until = self._clock() + self._length_s
        return self._length_s

    def never_end(self) -> None:
        self._until = float("inf")

    def active(self) -> bool:
        return self._clock() < self._until

    def note_success(self) -> None:
        self._length_s = 0.0


class Block:
    __slots__ = (
        "key", "group", "generation", "dram", "dram_slot", "ssd", "ssd_slot",
        "dirty", "used", "loads", "demotion", "promoter", "gone",
    )  # fmt: skip

    def __init__(self, key: BlockKey, group: int, generation: int, used: int):
        self.key = key
        self.group = group
        self.generation = generation
        self.used = used  # when it was last used, on the manager's counter
        self.dram, self.dram_slot = State.ABSENT, NO_SLOT
        self.ssd, self.ssd_slot = State.ABSENT, NO_SLOT
        self.dirty = False  # ready in DRAM and still wanted on SSD
        self.loads = 0  # loads in flight that read it
        self.demotion: int | None = None  # id of the demotion in flight
        self.promoter: str | None = None  # owner of the load that fills its DRAM slot
        self.gone = False  # forgotten: not in the index, slots go free when the last operation ends


class Unsaved:
    """Those of some keys whose block is not on SSD, so that evicting its DRAM copy would lose it."""

    def __init__(self, keys: Container[BlockKey], blocks: Mapping[BlockKey, Block]):
        self._keys = keys
        self._blocks = blocks

    def __contains__(self, key: object) -> bool:
        return key in self._keys and self._blocks[key].ssd is not State.READY
