"""What the length of an answer tells of whether the prompt will be used again. Scheduler side, one thread.

Who asks much about a text gets short answers, who has it summarised a long one, and does not come back: that, or its opposite,
or nothing of it, is so in some traffic, and is learned there.
"""

import math
from collections import OrderedDict

from kvoffload.policy.levels import ANSWERS, STEPS, plain_worths
from kvoffload.types import BlockKey

KEPT = 4096  # blocks of the sample of which it is waited whether they are used again
DOUBTS = 2048  # blocks that must be seen of a class to believe half of what they say: those of one prompt say the same
DOUBTS_MIN = 32  # of the sample, for so few may be as they are by chance
FADING = 0.995  # what a round's blocks are worth a round later
CLASSES = 4  # by uses: one, two, some, many; each of ANSWERS classes


def class_of(level: int) -> int:
    uses, answer = divmod(level, ANSWERS)
    return min(CLASSES - 1, uses // STEPS) * ANSWERS + answer


class Answers:
    """Of classes of blocks by uses and answer, how many were used again, of a sample of keys. `worths`: of levels, in doublings of
    the uses; a block that is half as likely to be used again as others used as often is worth one doubling less. Blocks
    used as often are compared with one another only, so where answers tell nothing, levels are worth their uses.
    """

    def __init__(self, every: int) -> None:
        """every: one block in so many is in the sample."""
        self._doubts = max(DOUBTS_MIN, DOUBTS / every)
        self.worths = plain_worths()
        self._ended: OrderedDict[BlockKey, int] = OrderedDict()  # their classes, the latest last
        self._seen, self._again = [0.0] * (CLASSES * ANSWERS), [0.0] * (CLASSES * ANSWERS)

    def use(self, key: BlockKey) -> None:
        """A request begins to use it."""
        found = self._ended.pop(key, None)
        if found is not None:
            self._again[found] += 1

    def end(self, key: BlockKey, level: int) -> None:
        """The request that used it ended. `level`: with the answer."""
        self._ended.pop(key, None)
        self._ended[key] = found = class_of(level)
        self._seen[found] += 1
        if len(self._ended) > KEPT:
            self._ended.popitem(last=False)

    def learn(self) -> None:
        """At the end of a round: what levels are worth from now on."""
        doublings: list[float] = []  # by class: how much likelier than is usual for the uses
        for first in range(0, CLASSES * ANSWERS, ANSWERS):
            seen, again = self._seen[first : first + ANSWERS], self._again[first : first + ANSWERS]
            usual = (sum(again) + 0.5) / (sum(seen) + 1)
            likely = ((back + self._doubts * usual) / (ended + self._doubts) for back, ended in zip(again, seen, strict=True))
            doublings += [math.log2(share / usual) for share in likely]
        for level, plain in enumerate(plain_worths()):
            self.worths[level] = plain + doublings[class_of(level)]
        self._seen = [FADING * seen for seen in self._seen]
        self._again = [FADING * again for again in self._again]
