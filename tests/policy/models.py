"""The policies over again, as slowly and plainly as their papers put them: lists, searched from end to end.

Each is told of the same calls and says which block it would evict.
"""

import math
from collections.abc import Callable, Sequence

SPARED = Callable[[bytes], bool]
Level = tuple[int, int]  # by uses, by answer


class FIFOModel:
    def __init__(self, capacity: int):
        self.capacity = capacity
        self.queue: list[bytes] = []  # the oldest first

    def recover(self, keys: Sequence[bytes], used: Sequence[int]) -> None:
        for key, now in zip(keys, used, strict=True):
            self.enter(key, now, 0)

    def enter(self, key: bytes, used: int, answer: int) -> None:
        self.queue.append(key)

    def use(self, key: bytes, now: int, again: bool, answer: int) -> None:
        pass

    def leave(self, key: bytes) -> None:
        self.queue.remove(key)

    def victim(self, spared: SPARED) -> bytes | None:
        return next((key for key in self.queue if not spared(key)), None)

    def evicted(self, key: bytes) -> None:
        self.leave(key)


class LRUModel(FIFOModel):
    """Times of use may come out of order: what enters may have been used long ago."""

    def __init__(self, capacity: int):
        super().__init__(capacity)
        self.used: dict[bytes, int] = {}

    def enter(self, key: bytes, used: int, answer: int) -> None:
        self.used[key] = used

    def use(self, key: bytes, now: int, again: bool, answer: int) -> None:
        self.used[key] = now

    def leave(self, key: bytes) -> None:
        del self.used[key]

    def victim(self, spared: SPARED) -> bytes | None:
        return min((key for key in self.used if not spared(key)), key=self.used.__getitem__, default=None)


class SIEVEModel(FIFOModel):
    """One list and an index into it, as in the paper's figure. Spared blocks are passed with their mark. REQUIRES of `victim`:
    there is one."""

    def __init__(self, capacity: int):
        super().__init__(capacity)
        self.marked: set[bytes] = set()
        self.hand = 0

    def use(self, key: bytes, now: int, again: bool, answer: int) -> None:
        if not again:
            self.marked.add(key)

    def leave(self, key: bytes) -> None:
        place = self.queue.index(key)
        del self.queue[place]
        self.marked.discard(key)
        if place < self.hand:
            self.hand -= 1

    def enter(self, key: bytes, used: int, answer: int) -> None:
        if self.hand >= len(self.queue):
            self.hand = 0
        super().enter(key, used, answer)

    def victim(self, spared: SPARED) -> bytes | None:
        while True:
            self.hand %= len(self.queue)
            key = self.queue[self.hand]
            if not spared(key) and key not in self.marked:
                return key
            if not spared(key):
                self.marked.remove(key)
            self.hand += 1


class S3FIFOModel(FIFOModel):
    def __init__(self, capacity: int):
        self.small: list[bytes] = []
        self.main: list[bytes] = []
        self.ghosts: list[bytes] = []
        self.uses: dict[bytes, int] = {}
        self.small_size = max(1, capacity // 10)
        self.ghost_size = max(1, capacity - self.small_size)

    def enter(self, key: bytes, used: int, answer: int) -> None:
        self.uses[key] = 0
        if key in self.ghosts:
            self.ghosts.remove(key)
            self.main.append(key)
        else:
            self.small.append(key)

    def use(self, key: bytes, now: int, again: bool, answer: int) -> None:
        if not again:
            self.uses[key] = min(3, self.uses[key] + 1)

    def leave(self, key: bytes) -> None:
        (self.small if key in self.small else self.main).remove(key)
        del self.uses[key]

    def victim(self, spared: SPARED) -> bytes | None:
        while True:
            small = [key for key in self.small if not spared(key)]
            main = [key for key in self.main if not spared(key)]
            if not small and not main:
                return None
            from_small = len(self.small) >= self.small_size or not self.main
            if small and (from_small or not main):
                if self.uses[small[0]] <= 1:
                    return small[0]
                self.small.remove(small[0])
                self.main.append(small[0])
                self.uses[small[0]] = 0
            else:
                if self.uses[main[0]] == 0:
                    return main[0]
                self.main.remove(main[0])
                self.main.append(main[0])
                self.uses[main[0]] -= 1

    def evicted(self, key: bytes) -> None:
        if key in self.small:
            self.ghosts.append(key)
            self.ghosts = self.ghosts[-self.ghost_size :]
        self.leave(key)


class ARCModel(FIFOModel):
    """T1, T2, B1, B2 and p of the paper; REPLACE without the key that comes in."""

    def __init__(self, capacity: int):
        self.c = max(1, capacity)
        self.p = 0.0
        self.t1: list[bytes] = []
        self.t2: list[bytes] = []
        self.b1: list[bytes] = []
        self.b2: list[bytes] = []

    def enter(self, key: bytes, used: int, answer: int) -> None:
        if key in self.b1:
            self.p = min(self.c, self.p + max(1, len(self.b2) / len(self.b1)))
            self.b1.remove(key)
            self.t2.append(key)
        elif key in self.b2:
            self.p = max(0, self.p - max(1, len(self.b1) / len(self.b2)))
            self.b2.remove(key)
            self.t2.append(key)
        else:
            self.t1.append(key)

    def use(self, key: bytes, now: int, again: bool, answer: int) -> None:
        queue = self.t1 if key in self.t1 else self.t2
        queue.remove(key)
        (queue if again else self.t2).append(key)

    def leave(self, key: bytes) -> None:
        (self.t1 if key in self.t1 else self.t2).remove(key)

    def victim(self, spared: SPARED) -> bytes | None:
        order = self.t1 + self.t2 if len(self.t1) > self.p else self.t2 + self.t1
        return next((key for key in order if not spared(key)), None)

    def evicted(self, key: bytes) -> None:
        (self.b1 if key in self.t1 else self.b2).append(key)
        self.leave(key)
        if len(self.t1) + len(self.b1) > self.c and self.b1:
            del self.b1[0]
        if len(self.t1) + len(self.t2) + len(self.b1) + len(self.b2) > 2 * self.c and self.b2:
            del self.b2[0]


class HorizonModel(FIFOModel):
    """What the class's text says, with the numbers that it gives: no samples, for so small a tier holds fewer than those."""

    half_lives = (0.25, 1.0, 4.0, 16.0, 64.0)
    memory = 64.0
    remembered = 3
    round = 128
    doubts, fading, kept = 2048.0, 0.995, 4096

    def __init__(self, capacity: int):
        super().__init__(capacity)
        self.there: dict[bytes, tuple[int, float, Level]] = {}  # when used last, uses, level
        self.left: list[tuple[bytes, int, float] | None] = []  # the latest last; None: it came back
        self.shadows: list[dict[bytes, tuple[int, Level]]] = [{} for _ in self.half_lives]
        self.scores = [0.0 for _ in self.half_lives]
        self.chosen = 1
        self.turnover, self.began, self.uses = float(capacity), 0, 0
        self.ended: dict[bytes, Level] = {}  # classes by uses and answer
        self.seen: dict[Level, float] = {}
        self.again: dict[Level, float] = {}
        self.bonus: dict[Level, float] = {}

    def recover(self, keys: Sequence[bytes], used: Sequence[int]) -> None:
        self.there = {key: (now, 1.0, (0, 0)) for key, now in zip(keys, used, strict=True)}
        if keys:
            self.began = used[-1]
            self.turnover = max(1.0, (used[-1] - used[0] + 1) * self.capacity / len(keys))

    def enter(self, key: bytes, used: int, answer: int) -> None:
        known = next((each for each in self.left if each is not None and each[0] == key), None)
        self.left = [None if each is known else each for each in self.left]
        self.count(key, used, known and known[1:])
        self.end(key, used, answer)

    def use(self, key: bytes, now: int, again: bool, answer: int) -> None:
        used, uses, level = self.there[key]
        if again:
            self.there[key] = now, uses, level
        else:
            self.count(key, now, (used, uses), begins=not answer)
        if again:
            self.end(key, now, answer)

    def end(self, key: bytes, now: int, answer: int) -> None:
        used, uses, (level, before) = self.there[key]
        if not answer or before:
            return
        found = level, min(15, math.floor(math.log2(answer)) + 1)
        self.there[key] = used, uses, found
        self.ended.pop(key, None)
        self.ended[key] = kind = min(3, level // 2), found[1]
        if len(self.ended) > self.kept:
            del self.ended[next(iter(self.ended))]
        self.seen[kind] = self.seen.get(kind, 0.0) + 1
        for shadow in self.shadows:
            if key in shadow:
                shadow[key] = now, found

    def learn(self) -> None:
        for uses in range(4):
            kinds = [(uses, answer) for answer in range(16)]
            usual = (sum(self.again.get(kind, 0.0) for kind in kinds) + 0.5) / (sum(self.seen.get(kind, 0.0) for kind in kinds) + 1)
            for kind in kinds:
                likely = (self.again.get(kind, 0.0) + self.doubts * usual) / (self.seen.get(kind, 0.0) + self.doubts)
                self.bonus[kind] = math.log2(likely / usual)
        self.seen = {kind: self.fading * count for kind, count in self.seen.items()}
        self.again = {kind: self.fading * count for kind, count in self.again.items()}

    def worth(self, level: Level) -> float:
        return level[0] / 2 + self.bonus.get((min(3, level[0] // 2), level[1]), 0.0)

    def count(self, key: bytes, now: int, known: tuple[int, float] | None, begins: bool = True) -> None:
        uses, level = 1.0, (0, 0)
        if known is not None:
            uses += known[1] / 2 ** ((now - known[0]) / (self.memory * self.turnover))
            level = min(15, math.floor(2 * math.log2(uses) + 0.5)), 0
        if begins and key in self.ended:
            kind = self.ended.pop(key)
            self.again[kind] = self.again.get(kind, 0.0) + 1
        self.there[key] = now, uses, level
        for number, shadow in enumerate(self.shadows):
            if key in shadow:
                self.scores[number] += 1
            elif len(shadow) == self.capacity:
                del shadow[self.least(shadow, self.half_lives[number])]
            shadow[key] = now, level
        self.uses += 1
        if self.uses == self.round:
            self.end_round(now)

    def end_round(self, now: int) -> None:
        if now > self.began:
            self.turnover = max(1.0, (now - self.began) * self.capacity / self.uses)
        self.began, self.uses = now, 0
        best = self.scores.index(max(self.scores))
        if self.scores[best] > 1.01 * self.scores[self.chosen]:
            self.chosen = best
        self.scores = [0.9 * score for score in self.scores]
        self.learn()

    def least(self, blocks: dict[bytes, tuple[int, Level]], half_life: float) -> bytes:
        """Of those that weigh the same the one of the lowest level."""

        def weight(key: bytes) -> tuple[float, Level]:
            now, level = blocks[key]
            return self.worth(level) + now / (half_life * self.turnover), level

        return min(blocks, key=weight)

    def leave(self, key: bytes) -> None:
        del self.there[key]

    def victim(self, spared: SPARED) -> bytes | None:
        may_go = {key: (used, level) for key, (used, _, level) in self.there.items() if not spared(key)}
        return self.least(may_go, self.half_lives[self.chosen]) if may_go else None

    def evicted(self, key: bytes) -> None:
        used, uses, _ = self.there.pop(key)
        self.left = [None if each is not None and each[0] == key else each for each in self.left]
        self.left = [*self.left, (key, used, uses)][-self.remembered * self.capacity :]
