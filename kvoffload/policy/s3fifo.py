"""S3-FIFO: Yang, Zhang, Qiu, Yue, Rashmi, "FIFO Queues are All You Need for Cache Eviction", SOSP 2023."""

from collections import OrderedDict
from collections.abc import Callable

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
        self._small: OrderedDict[int, int] = OrderedDict()  # each block with its uses
        self._main: OrderedDict[int, int] = OrderedDict()
        self._ghosts: OrderedDict[BlockKey, None] = OrderedDict()

    def enter(self, frame: int, key: BlockKey, used: int, answer: int) -> None:
        remembered = key in self._ghosts
        self._ghosts.pop(key, None)
        queue = self._main if remembered else self._small
        queue[frame] = 0
        self._where[frame] = queue
        self._held.add(frame)

    def use(self, frame: int, key: BlockKey, now: int, again: bool, answer: int) -> None:
        if not again:
            queue = self._where[frame]
            queue[frame] = min(queue[frame] + 1, USES_MAX)

    def victim(self, spared: Callable[[int], bool]) -> int | None:
        while len(self):
            small_first = len(self._small) >= self._small_size or not self._main
            frame = self._first(self._small, spared) if small_first else None
            if frame is None:
                frame = self._first(self._main, spared)
            if frame is None:
                frame = self._first(self._small, spared)
            if frame is None or self._goes(frame):
                return frame
        return None

    def _goes(self, frame: int) -> bool:
        """Whether the block is to leave, now that its turn has come; if not it has a new place."""
        queue = self._where[frame]
        uses = queue[frame]
        if queue is self._small and uses <= 1 or queue is self._main and uses == 0:
            return True
        del queue[frame]
        self._main[frame] = 0 if queue is self._small else uses - 1
        self._where[frame] = self._main
        return False

    def evict(self, frame: int, key: BlockKey) -> None:
        if self._where[frame] is self._small:
            self._ghosts[key] = None
            if len(self._ghosts) > self._ghost_size:
                self._ghosts.popitem(last=False)
        self.leave(frame)
