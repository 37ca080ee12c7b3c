"""SIEVE: Zhang, Yang, Yue, Vigfusson, Rashmi, "SIEVE is Simpler than LRU", NSDI 2024."""

from collections import OrderedDict
from collections.abc import Callable

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
        self._behind: OrderedDict[int, int] = OrderedDict()
        self._ahead: OrderedDict[int, int] = OrderedDict()

    def enter(self, frame: int, key: BlockKey, used: int, answer: int) -> None:
        self._turn()
        self._ahead[frame] = 0
        self._where[frame] = self._ahead
        self._held.add(frame)

    def use(self, frame: int, key: BlockKey, now: int, again: bool, answer: int) -> None:
        if not again:
            self._where[frame][frame] = 1

    def victim(self, spared: Callable[[int], bool]) -> int | None:
        passed = 0
        while len(self) and passed < 2 * len(self._where):  # twice round the hand has cleared all marks
            self._turn()
            frame = next(iter(self._ahead))
            stays = frame in self._held or spared(frame)
            if not self._ahead[frame] and not stays:
                return frame
            if not stays:
                self._ahead[frame] = 0
            self._behind[frame] = self._ahead.pop(frame)
            self._where[frame] = self._behind
            passed += 1
        return None

    def _turn(self) -> None:
        """At the young end the hand begins at the old end again."""
        if not self._ahead:
            self._ahead, self._behind = self._behind, self._ahead
