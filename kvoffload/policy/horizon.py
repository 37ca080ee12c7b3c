"""How often and how lately, with the weight between the two learned. Scheduler side, one thread.

The continuum between LRU and LFU is LRFU's: Lee, Choi, Kim, Noh, Min, Cho, Kim, "LRFU: A Spectrum of Policies that Subsumes
the Least Recently Used and Least Frequently Used Policies", IEEE Transactions on Computers, 2001. That policies compete in
simulated caches for the real one is Qureshi, Jaleel, Patt, Steely, Emer, "Adaptive Insertion Policies for High Performance
Caching", ISCA 2007 (set dueling); that a sample of keys is enough for it, with a cache smaller by as much, is Waldspurger,
Park, Garthwaite, Ahmad, "Efficient MRC Construction with SHARDS", FAST 2015.
"""

import zlib
from collections.abc import Container, Sequence
from itertools import compress, repeat

from kvoffload.policy.history import History
from kvoffload.policy.levels import Entry, Levels, level_of
from kvoffload.types import BlockKey

HALF_LIVES = (0.25, 1.0, 4.0, 16.0, 64.0)  # that compete, in turnovers: the time in which as many blocks are used as the tier holds
MEMORY = 64.0  # turnovers after which a use counts half
REMEMBERED = 2  # times as many blocks that left as the tier holds, at least
SAMPLE = 512  # blocks that a simulated tier holds, at least
ROUNDS = 4  # in a turnover
FADING = 0.9  # what a round's hits are worth a round later
CLEARLY = 1.01  # better, before another half-life is taken


class Shadow:
    """A simulated tier that holds a sample of keys under one half-life."""

    def __init__(self, capacity: int, half_life: float):
        self.half_life = half_life
        self.score = 0.0
        self._capacity = capacity
        self._there: dict[BlockKey, Entry] = {}
        self._levels = Levels(self._there)

    def use(self, entry: Entry, turnover: float) -> None:
        key = entry[1]
        if key in self._there:
            self.score += 1
        elif len(self._there) >= self._capacity:
            least = self._levels.pop(self.half_life * turnover)
            if least is not None:
                del self._there[least[1]]
        self._there[key] = entry
        self._levels.push(entry)


class Horizon:
    """The block leaves whose uses, each counting half after a half-life without another, come to least. A short half-life is
    LRU, a long one LFU; which is right depends on traffic and on the tier's size, so simulated tiers that each hold a sample of
    the keys under one half-life are run beside, and the real one takes that of the one with most hits of late.
    """

    def __init__(self, capacity: int):
        self._there: dict[BlockKey, Entry] = {}
        self._held: set[BlockKey] = set()
        self._levels = Levels(self._there)
        self._history: History[Entry] = History(REMEMBERED * capacity)
        self._every = max(1, capacity // SAMPLE)  # one key in so many is in the sample
        self._shadows = [Shadow(max(1, capacity // self._every), half_life) for half_life in HALF_LIVES]
        self._chosen = self._shadows[1]
        self._capacity = max(1, capacity)
        self._round = max(SAMPLE // ROUNDS, capacity // ROUNDS)  # uses in one
        self._uses, self._began = 0, 0  # of this round
        self._turnover = float(self._capacity)  # in the manager's time, which runs for other tiers and drives, too

    def enter(self, key: BlockKey, used: int, depth: int) -> None:
        left = self._history.take(key)
        self._held.add(key)
        self._count(key, used, left)

    def recover(self, keys: Sequence[BlockKey], used: Sequence[int]) -> None:
        entries: list[Entry] = list(zip(used, keys, repeat(1.0), repeat(0)))
        self._there.update(zip(keys, entries, strict=True))
        for entry in entries if self._every == 1 else compress(entries, map(self._is_sampled, keys)):
            for shadow in self._shadows:
                shadow.use(entry, self._turnover)
        self._levels.fill(entries)
        if entries:
            self._began = used[-1]
            self._turnover = max(1.0, (used[-1] - used[0] + 1) * self._capacity / len(entries))

    def use(self, key: BlockKey, now: int, again: bool) -> None:
        entry = self._there.get(key)
        if entry is None:
            return
        if again:
            self._there[key] = entry = (now, key, entry[2], entry[3])
        else:
            entry = self._count(key, now, entry)
        if key not in self._held:
            self._levels.push(entry)

    def _count(self, key: BlockKey, now: int, known: Entry | None) -> Entry:
        if known is None:
            entry = (now, key, 1.0, 0)
        else:
            uses = 1.0 + known[2] * 2.0 ** ((known[0] - now) / (MEMORY * self._turnover))
            entry = (now, key, uses, level_of(uses))
        self._there[key] = entry
        if self._every == 1 or self._is_sampled(key):
            for shadow in self._shadows:
                shadow.use(entry, self._turnover)
        self._uses += 1
        if self._uses >= self._round:
            self._end_round(now)
        return entry

    def _is_sampled(self, key: BlockKey) -> bool:
        return zlib.crc32(key) // 7 % self._every == 0

    def _end_round(self, now: int) -> None:
        if now > self._began:
            self._turnover = max(1.0, (now - self._began) * self._capacity / self._uses)
        self._uses, self._began = 0, now
        best = max(self._shadows, key=lambda shadow: shadow.score)
        if best.score > self._chosen.score * CLEARLY:
            self._chosen = best
        for shadow in self._shadows:
            shadow.score *= FADING

    def hold(self, key: BlockKey) -> None:
        if key in self._there:
            self._held.add(key)

    def release(self, key: BlockKey) -> None:
        if key in self._held:
            self._held.remove(key)
            self._levels.push(self._there[key])

    def leave(self, key: BlockKey) -> None:
        self._there.pop(key, None)
        self._held.discard(key)

    def victim(self, *exempt: Container[BlockKey]) -> BlockKey | None:
        passed: list[Entry] = []
        found = None
        half_life = self._chosen.half_life * self._turnover
        while len(self) > len(passed) and (entry := self._levels.pop(half_life)) is not None:
            if entry[1] in self._held:
                continue  # it is pushed again when it is released
            for keys in exempt:
                if entry[1] in keys:
                    passed.append(entry)
                    break
            else:
                found = entry[1]
                self._history.put(found, entry)
                del self._there[found]
                break
        for entry in passed:
            self._levels.push(entry)
        return found

    def __contains__(self, key: BlockKey) -> bool:
        return key in self._there

    def evictable(self, key: BlockKey) -> bool:
        return key in self._there and key not in self._held

    def __len__(self) -> int:
        return len(self._there) - len(self._held)
