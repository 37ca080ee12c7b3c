"""A block manager by itself, for tests that say what workers do."""

from kvoffload.admission import Admission, AdmitAll, Budget
from kvoffload.manager import BlockManager
from kvoffload.policy import DEFAULT, POLICIES
from kvoffload.types import Tier
from tests.manager.world import BLOCK_BYTES, MemoryJournal


def prefix(name: str, length: int) -> list[bytes]:
    return [f"{name}{number}".encode() for number in range(length)]


class Books:
    """A block manager whose workers do everything at once and well, unless a test says otherwise.

    `budget`: of the SSD, in blocks per day; 0: none."""

    def __init__(self, dram: int, ssd: int, ranks: int = 1, tier: bool = True, drives: int = 1, policy=None, budget: int = 0,
                 eviction: str = DEFAULT):  # fmt: skip
        self.now = 0.0
        self.journal = MemoryJournal()
        names = [str(drive) for drive in range(drives)]
        spent = Budget(budget, 1, lambda: self.now) if budget else None
        self.admission = Admission(policy or AdmitAll(), spent, 4 * (dram + ssd))
        self.manager = BlockManager(
            dram, ssd, ranks, self.journal, block_bytes=BLOCK_BYTES, dram_is_tier=tier, drives=names,
            admission=self.admission, clock=lambda: self.now, policy=POLICIES[eviction],
        )  # fmt: skip

    def store(self, blocks: list[bytes], owner: str = "w") -> list[bytes]:
        placed = self.manager.store([(key, 0) for key in blocks], owner, places(blocks)).placements
        stored = [place.key for place in placed]
        self.manager.store_done(stored[::-1])  # in any order, for vLLM tells of a set
        self.manager.check()
        return stored

    def demote(self, error: int = 0) -> list[bytes]:
        demotions = self.manager.plan()
        for demotion in demotions:
            self.manager.ack(demotion.id, self.manager.ranks, error)
        self.manager.check()
        return [demotion.key for demotion in demotions]

    def tiers(self, blocks: list[bytes]) -> list[Tier | None]:
        return [self.manager.tier(key) for key in blocks]


def places(keys: list[bytes]) -> dict[bytes, int]:
    """The place of each key in its request."""
    return {key: place for place, key in enumerate(keys)}
