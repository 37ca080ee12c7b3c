"""How often a block was used as a level, and the least wanted of blocks by level and age. Scheduler side, one thread.

Ageing is the same for all, so within a level the oldest use goes first whatever the half-life of uses is, and only the levels'
oldest need be compared: another half-life costs nothing to change to.
"""

import math

from kvoffload._rows import AgeHeaps

STEPS = 2  # levels for each doubling of the uses


def level_of(uses: float) -> int:
    return int(STEPS * math.log2(uses) + 0.5)


def least(ages: AgeHeaps, half_life: float) -> int | None:
    """The least wanted frame: an unused half-life weighs as much as half the uses."""
    return ages.least(1 / STEPS, half_life)
