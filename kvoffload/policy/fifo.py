"""First in, first out."""

from collections import OrderedDict
from collections.abc import Callable

from kvoffload.policy.holding import Holding
from kvoffload.types import BlockKey


class FIFO(Holding):
    """Uses change nothing: the order in which blocks came is the order in which they go."""

    def __init__(self, capacity: int):
        super().__init__()
        self._queue: OrderedDict[int, int] = OrderedDict()  # a dict finds its first key slowly once many before it left

    def enter(self, frame: int, key: BlockKey, used: int, answer: int) -> None:
        self._queue[frame] = 0
        self._where[frame] = self._queue
        self._held.add(frame)

    def use(self, frame: int, key: BlockKey, now: int, again: bool, answer: int) -> None:
        pass

    def victim(self, spared: Callable[[int], bool]) -> int | None:
        return self._first(self._queue, spared) if len(self) else None
