"""First in, first out."""

from collections import OrderedDict
from collections.abc import Container

from kvoffload.policy.holding import Holding
from kvoffload.types import BlockKey


class FIFO(Holding):
    """Uses change nothing: the order in which blocks came is the order in which they go."""

    def __init__(self, capacity: int):
        super().__init__()
        self._queue: OrderedDict[BlockKey, int] = OrderedDict()  # a dict finds its first key slowly once many before it left

    def enter(self, key: BlockKey, used: int, depth: int) -> None:
        self._queue[key] = 0
        self._where[key] = self._queue
        self._held.add(key)

    def use(self, key: BlockKey, now: int, again: bool) -> None:
        pass

    def victim(self, *exempt: Container[BlockKey]) -> BlockKey | None:
        key = self._first(self._queue, exempt) if len(self) else None
        if key is not None:
            self.leave(key)
        return key
