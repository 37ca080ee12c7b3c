"""What the block manager keeps about a block and hands out for it, and what it asks of the store. Scheduler side, one thread."""

from collections import Counter
from collections.abc import Iterable, Sequence
from enum import Enum
from typing import NamedTuple, Protocol

from kvoffload.types import NO_SLOT, BlockKey, Tier, add_write_error


class State(Enum):
    ABSENT = "absent"
    MOVING_IN = "moving in"
    READY = "ready"


ABSENT, MOVING_IN, READY = State  # by these names they cost hot paths a seventh of what they cost through the class


class Placement(NamedTuple):
    """Where a block is to be stored to or loaded from. NO_SLOT: not there; a load then passes through spare memory."""

    key: BlockKey
    generation: int
    dram_slot: int
    ssd_slot: int

    @property
    def source(self) -> Tier | None:
        """Where a load takes it from."""
        if self.ssd_slot != NO_SLOT:
            return Tier.SSD
        return Tier.DRAM if self.dram_slot != NO_SLOT else None


class Stored(NamedTuple):
    """What became of blocks offered to `store`."""

    placements: list[Placement]  # of those that are to be copied
    dropped: int  # for which there was no slot


class Block:
    __slots__ = (
        "key", "group", "generation", "dram", "dram_slot", "ssd", "ssd_slot",
        "dirty", "used", "user", "uses", "unread", "depth", "loads", "demotion", "late_before", "promoter", "late", "gone",
        "wanted_by", "answer",
    )  # fmt: skip

    def __init__(self, key: BlockKey, group: int, generation: int, used: int, depth: int = 0):
        self.key = key
        self.group = group
        self.generation = generation
        self.used = used  # when it was last used, on the manager's counter
        self.user = ""  # the request that used it last
        self.answer = 0  # tokens that it was answered with; 0 while that is not known
        self.uses = 1  # requests that are known to have used it; counted where admission asks
        self.unread = False  # written to the SSD and not read from there since
        self.depth = depth  # how far behind in that request; 0 also when it is not known
        self.dram, self.dram_slot = ABSENT, NO_SLOT
        self.ssd, self.ssd_slot = ABSENT, NO_SLOT
        self.dirty = False  # ready in DRAM and still wanted on SSD
        self.wanted_by = ""  # the request that it was, or was last, wanted there for
        self.loads = 0  # loads in flight that read it
        self.demotion: int | None = None  # id of the demotion in flight
        self.late_before = 0  # late loads of its drive when that began
        self.promoter: str | None = None  # owner of the load that fills its DRAM slot
        self.late = False  # a late demotion may still read its DRAM slot, which stays its own until the drive answers
        self.gone = False  # forgotten: not in the index, slots go free when the last operation ends


class Demotions:
    """Those in flight, by number, and what ranks have said of them so far."""

    def __init__(self, ranks: int):
        self._ranks = ranks
        self._blocks: dict[int, Block] = {}
        self._acks: Counter[int] = Counter()
        self._errors: dict[int, int] = {}
        self._next = 0

    def begin(self, block: Block) -> int:
        block.demotion, self._next = self._next, self._next + 1
        self._blocks[block.demotion] = block
        return block.demotion

    def ack(self, number: int, ranks: int, error: int) -> tuple[Block, int] | None:
        """The block and what became of its demotion, if these were the last ranks that were waited for."""
        if number not in self._blocks:
            return None
        self._acks[number] += ranks
        if error:
            add_write_error(self._errors, number, error)
        if self._acks[number] < self._ranks:
            return None
        del self._acks[number]
        block = self._blocks.pop(number)
        block.demotion = None
        return block, self._errors.pop(number, 0)

    def block(self, number: int) -> Block:
        return self._blocks[number]

    def blocks(self) -> Iterable[Block]:
        return self._blocks.values()

    def __len__(self) -> int:
        return len(self._blocks)


class Journal(Protocol):
    """What the manager tells the store; none of it blocks or raises."""

    def put(self, key: BlockKey, slot: int, generation: int, group: int) -> None: ...

    def delete(self, key: BlockKey, slot: int) -> None: ...

    def touch(self, blocks: Sequence[tuple[BlockKey, int]]) -> None: ...

    def clear(self) -> None: ...

    def next_generation(self) -> int: ...


class NoJournal:
    """Without an SSD tier nothing is remembered."""

    def __init__(self) -> None:
        self._generation = 0

    def put(self, key: BlockKey, slot: int, generation: int, group: int) -> None:
        return

    def delete(self, key: BlockKey, slot: int) -> None:
        return

    def touch(self, blocks: Sequence[tuple[BlockKey, int]]) -> None:
        return

    def clear(self) -> None:
        return

    def next_generation(self) -> int:
        self._generation += 1
        return self._generation
