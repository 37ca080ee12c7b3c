"""How often a block was used and how long the answer was, as a level of `AgeHeaps`. Scheduler side, one thread.

Ageing is the same for all, so within a level the oldest use goes first whatever the half-life of uses is and whatever the levels
are worth, and only the levels' oldest need be compared: another half-life, or other worths, cost nothing to change to.
"""

import math
from array import array

STEPS = 2  # levels for each doubling of the uses
USES, ANSWERS = 16, 16  # levels by uses, each of so many by answers


def level_of(uses: float) -> int:
    """While the answer is not known."""
    return min(USES - 1, int(STEPS * math.log2(uses) + 0.5)) * ANSWERS


def answered(level: int, tokens: int) -> int:
    """The level, of a block whose request was answered with so many tokens: each doubling of them is another."""
    return level - level % ANSWERS + min(ANSWERS - 1, tokens.bit_length())


def plain_worths() -> "array[float]":
    """Of levels, in doublings of the uses, whatever the answers."""
    return array("d", [level // ANSWERS / STEPS for level in range(USES * ANSWERS)])
