"""S3-FIFO: Yang, Zhang, Qiu, Yue, Rashmi, "FIFO Queues are All You Need for Cache Eviction", SOSP 2023."""

from collections import OrderedDict
from collections.abc import Container

from kvoffload.policy.holding import Holding
from kvoffload.types import BlockKey

USES_MAX = 3  # counted of a block
SMALL_SHARE = 10  # the small queue has a tenth


class S3FIFO(Holding):
    """Three queues in the order of arrival. Blocks begin in a small one. Used more than once there, they move to the main one,
    where each use since the last passing buys another round; else they leave, and their keys are remembered for a while: what
    comes back in that time goes to the main queue at once.
    """

    def __init__(self, capacity: int):
        super().__init__()
        self._small_size = max(1, capacity // SMALL_SHARE)
        self._ghost_size = max(1, capacity - self._small_size)
        self._small: OrderedDict[BlockKey, int] = OrderedDict()  # each block with its uses
        self._main: OrderedDict[BlockKey, int] = OrderedDict()
        self._ghosts: OrderedDict[BlockKey, None] = OrderedDict()

    def enter(self, key: BlockKey, used: int, depth: int) -> None:
        remembered = key in self._ghosts
        self._ghosts.pop(key, None)
        queue = self._main if remembered else self._small
        queue[key] = 0
        self._where[key] = queue
        self._held.add(key)

    def use(self, key: BlockKey, now: int, again: bool) -> None:
        queue = self._where.get(key)
        if queue is not None and not again:
            queue[key] = min(queue[key] + 1, USES_MAX)

    def victim(self, *exempt: Container[BlockKey]) -> BlockKey | None:
        small_first = len(self._small) >= self._small_size
        while len(self):
            key = self._first(self._small, exempt) if small_first or not self._main else None
            if key is None:
                key = self._first(self._main, exempt)
            if key is None:
                key = self._first(self._small, exempt)
            if key is None:
                return None
            if self._goes(key):
                return key
            small_first = len(self._small) >= self._small_size
        return None

    def _goes(self, key: BlockKey) -> bool:
        """Whether the block leaves, now that its turn has come; if not it has a new place."""
        queue = self._where[key]
        uses = queue[key]
        self.leave(key)
        if queue is self._small and uses > 1:
            uses = 0
        elif queue is self._small:
            self._ghosts[key] = None
            if len(self._ghosts) > self._ghost_size:
                self._ghosts.popitem(last=False)
            return True
        elif uses == 0:
            return True
        else:
            uses -= 1
        self._main[key] = uses
        self._where[key] = self._main
        return False
