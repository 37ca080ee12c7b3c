"""How often a block was used as a level, and the least wanted of blocks by level and age. Scheduler side, one thread.

Ageing is the same for all, so within a level the oldest use goes first whatever the half-life of uses is, and only the levels'
oldest need be compared: another half-life costs nothing to change to.
"""

import math
from collections.abc import Callable

from kvoffload._rows import AgeHeaps

STEPS = 2  # levels for each doubling of the uses
PASSED_MAX = 256  # spared frames in a row, before nothing is evicted: each slot that is asked for would pass over all of them again


def level_of(uses: float) -> int:
    return int(STEPS * math.log2(uses) + 0.5)


def least(ages: AgeHeaps, half_life: float) -> int | None:
    """The least wanted frame: an unused half-life weighs as much as half the uses."""
    return ages.least(1 / STEPS, half_life)


def least_unspared(
    ages: AgeHeaps, half_life: float, spared: Callable[[int], bool], place_of: Callable[[int], tuple[int, int]]
) -> int | None:
    """The least wanted frame that is not `spared`, or none if that is not among the first few. `place_of`: when a frame was used,
    and its level."""
    frame = least(ages, half_life)
    if frame is None or not spared(frame):
        return frame
    passed = []
    while frame is not None and len(passed) < PASSED_MAX and spared(frame):
        passed.append(frame)
        ages.drop(frame)
        frame = least(ages, half_life)
    for other in passed:
        ages.put(other, *place_of(other))
    return frame if len(passed) < PASSED_MAX else None
