"""ARC: Megiddo, Modha, "ARC: A Self-Tuning, Low Overhead Replacement Cache", FAST 2003."""

from collections import OrderedDict
from collections.abc import Callable

from kvoffload.policy.holding import Holding
from kvoffload.types import BlockKey


class ARC(Holding):
    """Blocks used once and blocks used more often, each least recently used first, and the keys of what either lost. A block
    that comes back shows which of the two was too short; the share of the first moves by that.

    The paper evicts when it knows what comes in. Here the slot is taken first, so its one use of that knowledge is missing:
    when the first list is exactly at its share, a return to the second takes from the first. It then takes from the second.
    """

    def __init__(self, capacity: int):
        super().__init__()
        self._capacity = max(1, capacity)
        self._share = 0.0  # of the capacity, for blocks used once
        self._once: OrderedDict[int, int] = OrderedDict()
        self._often: OrderedDict[int, int] = OrderedDict()
        self._lost_once: OrderedDict[BlockKey, None] = OrderedDict()
        self._lost_often: OrderedDict[BlockKey, None] = OrderedDict()

    def enter(self, frame: int, key: BlockKey, used: int, answer: int) -> None:
        once, often = len(self._lost_once), len(self._lost_often)
        queue = self._often
        if key in self._lost_once:
            self._share = min(float(self._capacity), self._share + max(1.0, often / once))
            del self._lost_once[key]
        elif key in self._lost_often:
            self._share = max(0.0, self._share - max(1.0, once / often))
            del self._lost_often[key]
        else:
            queue = self._once
        queue[frame] = 0
        self._where[frame] = queue
        self._held.add(frame)

    def use(self, frame: int, key: BlockKey, now: int, again: bool, answer: int) -> None:
        queue = self._where[frame]
        target = queue if again else self._often
        del queue[frame]
        target[frame] = 0
        self._where[frame] = target

    def victim(self, spared: Callable[[int], bool]) -> int | None:
        if not len(self):
            return None
        queues = [self._once, self._often] if len(self._once) > self._share else [self._often, self._once]
        frame = self._first(queues[0], spared)
        return self._first(queues[1], spared) if frame is None else frame

    def evict(self, frame: int, key: BlockKey) -> None:
        lost = self._lost_once if self._where[frame] is self._once else self._lost_often
        self.leave(frame)
        lost[key] = None
        if len(self._once) + len(self._lost_once) > self._capacity and self._lost_once:
            self._lost_once.popitem(last=False)
        if len(self._where) + len(self._lost_once) + len(self._lost_often) > 2 * self._capacity and self._lost_often:
            self._lost_often.popitem(last=False)
