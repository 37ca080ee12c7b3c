"""SIEVE: Zhang, Yang, Yue, Vigfusson, Rashmi, "SIEVE is Simpler than LRU", NSDI 2024."""

from collections import OrderedDict
from collections.abc import Container

from kvoffload.policy.holding import Holding
from kvoffload.types import BlockKey


class SIEVE(Holding):
    """A queue in the order of arrival, and a hand that goes from old to young: it spares a block that was used since it last
    came by, and evicts the first that was not. What is spared keeps its place.

    The queue is kept as two, behind the hand and before it, so that the hand needs no links of its own: what it passes goes
    to the end of the part behind. The number kept with a block says whether it was used.
    """

    def __init__(self, capacity: int):
        super().__init__()
        self._behind: OrderedDict[BlockKey, int] = OrderedDict()
        self._ahead: OrderedDict[BlockKey, int] = OrderedDict()

    def enter(self, key: BlockKey, used: int, depth: int) -> None:
        self._turn()
        self._ahead[key] = 0
        self._where[key] = self._ahead
        self._held.add(key)

    def use(self, key: BlockKey, now: int, again: bool) -> None:
        if key in self._where and not again:
            self._where[key][key] = 1

    def victim(self, *exempt: Container[BlockKey]) -> BlockKey | None:
        passed = 0
        while len(self) and passed < 2 * len(self._where):  # twice round the hand has cleared all marks
            self._turn()
            key = next(iter(self._ahead))
            if not self._ahead[key] and not self._spared(key, exempt):
                self.leave(key)
                return key
            if not self._spared(key, exempt):
                self._ahead[key] = 0
            self._behind[key] = self._ahead.pop(key)
            self._where[key] = self._behind
            passed += 1
        return None

    def _turn(self) -> None:
        """At the young end the hand begins at the old end again."""
        if not self._ahead:
            self._ahead, self._behind = self._behind, self._ahead
