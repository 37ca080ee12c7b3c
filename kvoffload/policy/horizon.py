"""How often and how lately, with the weight between the two learned, and what answers tell. Scheduler side, one thread.

The continuum between LRU and LFU is LRFU's: Lee, Choi, Kim, Noh, Min, Cho, Kim, "LRFU: A Spectrum of Policies that Subsumes
the Least Recently Used and Least Frequently Used Policies", IEEE Transactions on Computers, 2001. That policies compete in
simulated caches for the real one is Qureshi, Jaleel, Patt, Steely, Emer, "Adaptive Insertion Policies for High Performance
Caching", ISCA 2007 (set dueling); that a sample of keys is enough for it, with a cache smaller by as much, is Waldspurger,
Park, Garthwaite, Ahmad, "Efficient MRC Construction with SHARDS", FAST 2015.
"""

import zlib
from array import array

import numpy as np
from numpy.typing import NDArray

from kvoffload._rows import AgeHeaps
from kvoffload.policy.aged import Aged
from kvoffload.policy.answers import Answers
from kvoffload.policy.history import History
from kvoffload.policy.levels import ANSWERS, answered, level_of
from kvoffload.types import BlockKey

HALF_LIVES = (0.25, 1.0, 4.0, 16.0, 64.0)  # that compete, in turnovers: the time in which as many blocks are used as the tier holds
MEMORY = 64.0  # turnovers after which a use counts half
REMEMBERED = 3  # times as many blocks that left as the tier holds
SAMPLE = 512  # blocks that a simulated tier holds, at least
ROUNDS = 4  # in a turnover
FADING = 0.9  # what a round's hits are worth a round later
CLEARLY = 1.01  # better, before another half-life is taken


class Shadow:
    """A simulated tier that holds a sample of keys under one half-life."""

    def __init__(self, capacity: int, half_life: float, worths: "array[float]"):
        self.half_life = half_life
        self._worths = worths
        self.score = 0.0
        self._keys = [b""] * capacity  # by frame
        self._frames: dict[BlockKey, int] = {}
        self._ages = AgeHeaps(capacity)

    def use(self, key: BlockKey, used: int, level: int, turnover: float) -> None:
        frame = self._frames.get(key)
        if frame is not None:
            self.score += 1
        else:
            frame = len(self._frames)
            if frame == len(self._keys):
                oldest = self._ages.least(self._worths, self.half_life * turnover)
                assert oldest is not None
                frame = oldest
                del self._frames[self._keys[frame]]
            self._keys[frame], self._frames[key] = key, frame
        self._ages.put(frame, used, level)

    def end(self, key: BlockKey, now: int, level: int) -> None:
        frame = self._frames.get(key)
        if frame is not None:
            self._ages.put(frame, now, level)


class Horizon(Aged):
    """The block leaves whose uses, each counting half after a half-life without another, come to least. A short half-life is
    LRU, a long one LFU; which is right depends on traffic and on the tier's size, so simulated tiers that each hold a sample of
    the keys under one half-life are run beside, and the real one takes that of the one with most hits of late. At a start they
    are empty: that costs nothing until one of them has turned over, for till then all would agree.

    Uses count more or less by how long the answer was, see `Answers`.
    """

    def __init__(self, capacity: int):
        super().__init__(capacity)
        self._uses = array("f", [1.0]) * capacity
        self._history = History(REMEMBERED * capacity)
        self._every = max(1, capacity // SAMPLE)  # one key in so many is in the sample
        self._answers = Answers(self._every)
        self._worths = self._answers.worths
        held = max(1, capacity // self._every)
        self._shadows = [Shadow(held, half_life, self._worths) for half_life in HALF_LIVES]
        self._chosen = self._shadows[1]
        self._capacity = max(1, capacity)
        self._round = max(SAMPLE // ROUNDS, capacity // ROUNDS)  # uses in one
        self._uses_of_round, self._began = 0, 0
        self._turnover = float(self._capacity)  # in the manager's time, which runs for other tiers and drives, too

    def recover(self, frames: NDArray[np.int64], used: NDArray[np.int64]) -> None:
        super().recover(frames, used)
        if len(frames):
            self._began = int(used[-1])
            self._turnover = max(1.0, float(used[-1] - used[0] + 1) * self._capacity / len(frames))

    def enter(self, frame: int, key: BlockKey, used: int, answer: int) -> None:
        self._count(frame, key, used, self._history.take(key))
        self._end(frame, key, used, answer)

    def use(self, frame: int, key: BlockKey, now: int, again: bool, answer: int) -> None:
        if again:
            self._used[frame] = now
            self._end(frame, key, now, answer)
        else:  # also a request that ends after another began to use the block: that says nothing of coming back
            self._count(frame, key, now, (self._used[frame], self._uses[frame]), begins=not answer)
        if frame in self._evictable:
            self._evictable.put(frame, now, self._level[frame])

    def _count(self, frame: int, key: BlockKey, now: int, known: tuple[int, float] | None, begins: bool = True) -> None:
        uses, level = 1.0, 0
        if known is not None:
            used, before = known
            uses += before * 2.0 ** ((used - now) / (MEMORY * self._turnover))
            level = level_of(uses)
        self._used[frame], self._uses[frame], self._level[frame] = now, uses, level
        if self._is_sampled(key):
            if begins:
                self._answers.use(key)
            for shadow in self._shadows:
                shadow.use(key, now, level, self._turnover)
        self._uses_of_round += 1
        if self._uses_of_round >= self._round:
            self._end_round(now)

    def _end(self, frame: int, key: BlockKey, now: int, answer: int) -> None:
        """The request that used it has ended, if there is an answer; each is told of once."""
        if answer == 0 or self._level[frame] % ANSWERS:
            return
        self._level[frame] = level = answered(self._level[frame], answer)
        if self._is_sampled(key):
            self._answers.end(key, level)
            for shadow in self._shadows:
                shadow.end(key, now, level)

    def _is_sampled(self, key: BlockKey) -> bool:
        return self._every == 1 or zlib.crc32(key) // 7 % self._every == 0

    def _end_round(self, now: int) -> None:
        if now > self._began:
            self._turnover = max(1.0, (now - self._began) * self._capacity / self._uses_of_round)
        self._uses_of_round, self._began = 0, now
        best = max(self._shadows, key=lambda shadow: shadow.score)
        if best.score > self._chosen.score * CLEARLY:
            self._chosen = best
        for shadow in self._shadows:
            shadow.score *= FADING
        self._answers.learn()

    def half_life(self) -> float:
        return self._chosen.half_life * self._turnover

    def evict(self, frame: int, key: BlockKey) -> None:
        self._history.put(key, self._used[frame], self._uses[frame])
        super().evict(frame, key)
