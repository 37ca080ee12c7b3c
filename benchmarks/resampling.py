"""How far a figure may go astray by chance: B. Efron, "Bootstrap Methods: Another Look at the Jackknife", Annals of Statistics,
1979."""

import random
from collections.abc import Callable

TIMES = 2000


def likely(figure: Callable[[random.Random], float]) -> tuple[float, float]:
    """Between what 95 of 100 repetitions of the measurement would find it. `figure`: draws its samples anew, with replacement."""
    rng = random.Random(0)
    found = sorted(figure(rng) for _ in range(TIMES))
    return found[TIMES // 40], found[-TIMES // 40]
