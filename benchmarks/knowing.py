"""What a write budget could reach: admission that knows how often each block will be used again, and nothing else."""

from collections import Counter

from kvoffload.admission import Admission, AdmitAll
from kvoffload.cli.replay import Replay, Result
from kvoffload.cli.simulate import run
from kvoffload.cli.traces import Trace
from kvoffload.policy import DEFAULT, POLICIES
from kvoffload.types import BlockKey

NEAR = 0.97  # of the writes allowed, and the search for the threshold ends


class Knowing(Admission):
    """A block is written if it is worth the threshold. No prefix gets a hole, for a block is worth no more than those before it."""

    def __init__(self, worths: list[list[float]], threshold: float):
        super().__init__(AdmitAll(), None, 0)
        self.selective = True
        self._worths, self._threshold = worths, threshold

    def refusal(self, user: str, group: int, depth: int, uses: int, waiting: int) -> str:
        return "" if self._worths[int(user)][depth] >= self._threshold else "unwanted"


def worths_of(requests: list[list[BlockKey]]) -> list[list[float]]:
    """Of each block of each request, how many of the later ones use it; of the same number the one nearer to its head."""
    deepest = max(map(len, requests))
    later: Counter[BlockKey] = Counter()
    worths = []
    for request in reversed(requests):
        worths.append([later[key] - place / deepest for place, key in enumerate(request)])
        later.update(request)
    worths.reverse()
    return worths


def knowing(trace: Trace, dram: int, ssd: int, allowed: float) -> Result:
    """With about the lowest threshold that writes no more than `allowed`. What is not used again is never written."""
    worths = worths_of(trace.requests)
    thresholds = sorted({worth for row in worths for worth in row if worth > 0})
    low, high, best = 0, len(thresholds), Result()
    while low < high:
        middle = (low + high) // 2
        admission = Knowing(worths, thresholds[middle])
        result = run(trace, "knowing", Replay(dram, ssd, POLICIES[DEFAULT], admission=admission))
        if result.written > allowed:
            low = middle + 1
            continue
        high, best = middle, result
        if best.written >= NEAR * allowed:
            break
    return best
