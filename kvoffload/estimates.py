"""Load or recompute: what computing and loading take, learned from what they took, and which of them a prompt gets.
Scheduler side, one thread, no clock of its own.

All times are as a request sees them, from the moment it could begin to the moment its result is there, with the steps of the
model, the other requests and the queues that lie between. So the estimates need no knowledge of model or machine.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import combinations, pairwise
from typing import NamedTuple

import numpy as np

from kvoffload.types import Tier

FORGETTING = 0.9  # what an observation weighs after the next one: some ten count
SURPRISE, SURPRISED = 3.0, 0.1  # times off the mark, after which all that was seen before weighs this much of the new one
SIMPLER = 0.7  # what a more complicated formula may leave of the error of a simpler one, to be preferred to it
CONVINCED = 3  # loads from a tier: before, they are made anyway, for the first ones of a process are slow
REACH = 8  # times the most tokens that were seen computed: of more nothing is predicted
GIVEN_UP = 2.0  # times what a load had taken when it was given up, for want of knowing
PROBE_SHARE = 16  # one part in so many of a hit is loaded to see whether a slow tier has become faster
PROBE_GROWS = 4  # times a probe is larger than one that says too little
PROBE_S, PROBE_MAX_S = 10.0, 600.0  # between probes: at first, and at most
SLOW_S = 1.0  # a load that long is worth one recomputing, to learn what that takes
USUAL = 0.9  # of what loading usually saves from a tier: where it saves more the tier is probed
PROBE_LOSS = 0.05  # of what computing takes: so long a probe may last
PATIENCE, PATIENCE_MAX = 2.0, 64.0  # times what a load should take, then the drive is another than it was. What arrived is kept.
PATIENCE_GROWS, PATIENCE_FADES = 2.0, 0.998  # each time a load was given up and the next found the drive well; with each other load
PATIENCE_MIN_S = 0.25  # that a load is given which saves as much: less says more about a busy machine than about a drive
SHORTEST_S = 0.1  # that any load is given


class Cost:
    """Seconds as a sum of features times factors of at least 0, fitted by least squares to what was seen, older observations
    weighing less. The first feature is the size. An error weighs by the size, not by itself: so a few slow ones count as slow,
    and many small ones do not outweigh a large one. Features come in the order of preference: where a formula of fewer explains
    as much, it is taken. `scales`: of the features, so that numbers are near 1."""

    def __init__(self, *scales: float):
        self._scales = np.array(scales)
        self._square = np.zeros((len(scales), len(scales)))
        self._product = np.zeros(len(scales))
        self._total = 0.0
        self._slow = 0  # surprises in a row
        self.seen = 0
        self._factors: np.ndarray | None = None

    def observe(self, seconds: float, *features: float) -> None:
        expected = self.predict(*features)
        ratio = 1.0 if expected is None else seconds / max(expected, 1e-6)
        self._slow = self._slow + 1 if ratio > SURPRISE else 0
        self.seen += 1
        keep = FORGETTING
        if ratio < 1 / SURPRISE or self._slow > 1:  # one that is slow may be an accident, one that is fast is none
            keep = min(keep, SURPRISED * features[0] / self._scales[0] / self._square[0, 0])
        row = np.array(features) / self._scales
        self._square = keep * self._square + np.outer(row, row) / row[0]
        self._product = keep * self._product + seconds * row / row[0]
        self._total = keep * self._total + seconds * seconds / row[0]
        self._factors = None

    @property
    def is_new(self) -> bool:
        return self.seen < CONVINCED

    def predict(self, *features: float) -> float | None:
        """None if nothing was seen."""
        if self._total == 0:
            return None
        if self._factors is None:
            self._factors = self._fit()
        return float(self._factors @ (np.array(features) / self._scales))

    def _fit(self) -> np.ndarray:
        """The factors that leave the least error, of all choices of features; there are few. (A sum of squared errors is
        total - 2 f.product + f.square.f; with the best f of a choice, total - f.product.)"""
        best, least = np.zeros(len(self._scales)), np.inf
        for count in range(1, len(self._scales) + 1):
            for chosen in combinations(range(len(self._scales)), count):
                square = self._square[np.ix_(chosen, chosen)]
                if np.linalg.cond(square) > 1e10:
                    continue
                found = np.linalg.solve(square, self._product[list(chosen)])
                error = max(0.0, self._total - float(found @ self._product[list(chosen)]))
                if (found >= 0).all() and error < SIMPLER * least:
                    best, least = np.zeros(len(self._scales)), error
                    best[list(chosen)] = found
        return best


class Prefill:
    """Of `tokens` after `context`: some time a token, more the more it attends to, and some for the step itself.

    Learned by size, in classes of four times each: after every load of a whole prompt its last token is computed, and many of
    those, which say nothing of whole prompts, would push out what was seen of them."""

    def __init__(self) -> None:
        self._costs: dict[int, Cost] = {}
        self._reach = 0

    def observe(self, seconds: float, tokens: int, context: int) -> None:
        self._reach = max(self._reach, REACH * tokens)
        cost = self._costs.setdefault(self.size(tokens), Cost(1e3, 1e6, 1.0))
        cost.observe(seconds, tokens, tokens * (context + tokens / 2), 1.0)

    def seconds(self, tokens: int, context: int) -> float | None:
        """None if nothing was seen that would tell: how long a few tokens take says little about a whole prompt."""
        if tokens > self._reach:
            return None
        return self._predict(self._costs, tokens, context)

    def least(self, tokens: int, context: int) -> float:
        """The same as if no prefill of so few tokens had been seen. What larger ones took for each token is the least that it can
        take; 0 if there are none."""
        size = self.size(tokens)
        larger = {other: cost for other, cost in self._costs.items() if other > size}
        return self._predict(larger, tokens, context) or 0.0

    def _predict(self, costs: Mapping[int, Cost], tokens: int, context: int) -> float | None:
        size = self.size(tokens)
        nearest = min(costs, key=lambda other: (abs(other - size), -other), default=None)
        return None if nearest is None else costs[nearest].predict(tokens, tokens * (context + tokens / 2), 1.0)

    @staticmethod
    def size(tokens: int) -> int:
        """Its class."""
        return tokens.bit_length() // 2


class Part(NamedTuple):
    """A stretch of a prompt that one tier holds, of a token at least."""

    end: int  # tokens of the prompt, where it ends
    tier: Tier
    nbytes: int  # on one rank


class Kind(StrEnum):
    LOAD = "load"  # all there is
    PART = "part"
    RECOMPUTE = "recompute"


class Why(StrEnum):
    FASTER = "faster"  # as predicted
    LEARNING = "learning"  # nothing is known yet of loading or of computing
    PROBE = "probe"  # to see whether a tier is still as slow as it was
    ASKED = "asked"  # by the request


class Probe(NamedTuple):
    """A stretch of a prompt that is computed and lies on the SSD, to be read beside that to see what it takes."""

    begin: int
    end: int
    patience_s: float


class Decision(NamedTuple):
    end: int  # load the prompt up to here, in tokens
    kind: Kind
    why: Why
    load_s: float | None  # predicted for the load
    patience_s: float | None  # to give it up after; None: nothing is known
    probe: Probe | None = None  # besides; what became of it is told by `end_probe`, or None if nothing did


@dataclass
class Probing:
    """Of a tier that is too slow to be worth loading from, or of few tokens that take too long for loading all others to be
    worth it: without it nothing more would be learned of either, however wrong what is known of it has become.

    A small load is mostly latency, from which it does not follow what a large one takes. So if one that many times larger cannot
    take longer than computing, it follows at once, up to the whole."""

    since: float  # it began, or the pause did
    pause_s: float = PROBE_S
    next_at: float = field(init=False)
    share: int = PROBE_SHARE
    whole_bytes: int = 0  # what would be loaded where it is probed, were it not for a probe
    saved_s: float = 0.0  # what computing that takes
    tells: bool = True  # that is enough to say something of other loads, be it that a part of it was fast

    def __post_init__(self) -> None:
        self.next_at = self.since + self.pause_s

    def wait(self, now: float) -> None:
        self.since = now
        self.pause_s = min(2 * self.pause_s, PROBE_MAX_S)
        self.next_at = now + self.pause_s


class Loading(NamedTuple):
    """A load in flight."""

    begun: float
    nbytes: dict[Tier, int]
    queued: dict[Tier, int]  # with what was in flight before it
    predicted_s: float | None


class Estimates:
    def __init__(self, counters: Counter[tuple[str, ...]]) -> None:
        self.prefill = Prefill()
        self._load = {tier: Cost(1e6, 1.0) for tier in Tier}
        self._queued = dict.fromkeys(Tier, 0)
        self._usual_s = dict.fromkeys(Tier, 0.0)  # that loading what the tier has of a prompt saves, if it has something
        self._probing: dict[Tier | int, Probing] = {}  # by tier, or by size of a prefill
        self._patience = dict.fromkeys(Tier, PATIENCE)  # more for a tier that is slow now and then: to wait is better
        self._is_probing = False
        self._suspects: set[Tier] = set()  # of which the latest load was given up: all may be slow now, so one tries a little first
        self._counters = counters

    # -- deciding ----------------------------------------------------------------------------------------------

    def decide(self, now: float, computed: int, total: int, parts: Sequence[Part], again: bool = False) -> Decision:
        """How far to load a prompt of `total` tokens, of which `computed` need neither loading nor computing. `parts` follow
        one another from there on; each is as large as can be. `again`: it was asked for this prompt before.

        The time to the first token, when the load ends at n: load(bytes up to n) + prefill(total - n, after n). Saving grows
        with n at least linearly, and loading linearly within a part, so the best n is the end of a part, or `computed`.
        """
        whole = self.recompute_s(total, computed)
        ends = [computed, *(part.end for part in parts)]
        loads = self._loads_s(parts)
        if whole is None:
            return self._learn(now, computed, parts, loads[-1])
        rests, rest = [self.recompute_s(total, end) or 0.0 for end in ends], max(1, total - ends[-1])
        least_rests = [*rests[:-1], min(rests[-1], self.prefill.least(rest, ends[-1]) or np.inf)]  # see _doubts
        saved = [max(0.0, before - after) for before, after in pairwise(least_rests)]
        worth = self._worth_probing(whole, saved, parts, again)
        times = [load + rest for load, rest in zip(loads, rests, strict=True)]
        best = min(range(len(times)), key=lambda count: (times[count], -count))
        suspect = next((count for count, part in enumerate(parts[:best]) if part.tier in self._suspects), None)
        best, probe = best if suspect is None else suspect, None
        for part in parts[:best]:
            probing = self._probing.get(part.tier)
            if part.tier is not Tier.SSD or probing is not None and not probing.whole_bytes:  # see _judge_probes
                self._probing.pop(part.tier, None)
        if best < len(parts):
            part, at_once = parts[best], suspect is not None
            if self._doubts(rest, parts, loads[-1], times[best]):
                if self._may_probe(now, Prefill.size(rest)):
                    return Decision(ends[-1], Kind.LOAD, Why.PROBE, None, max(PATIENCE_MIN_S, PATIENCE * loads[-1]))
            elif (part.tier in worth or at_once and part.tier is Tier.SSD) and self._may_probe_tier(now, part.tier, at_once):
                end = self._note_probe(now, ends[best], part, saved[best], part.tier in worth)
                if part.tier is Tier.DRAM:  # which needs a request
                    patience_s = max(SHORTEST_S, PROBE_LOSS * whole) + 2 * loads[best]
                    return Decision(end, Kind.PART, Why.PROBE, None, patience_s)
                probe, self._is_probing = Probe(ends[best], end, max(SHORTEST_S, whole)), True
        else:
            self._probing.pop(Prefill.size(rest), None)
        kind = Kind.LOAD if best == len(parts) else Kind.PART if best else Kind.RECOMPUTE
        saved_s = whole - rests[best]
        if any(self._load[part.tier].is_new for part in parts[:best]):
            return Decision(ends[best], kind, Why.LEARNING, None, max(PATIENCE_MIN_S, saved_s), probe)
        patience = max((self._patience[part.tier] for part in parts[:best]), default=PATIENCE)
        patience_s = min(max(SHORTEST_S, saved_s), max(PATIENCE_MIN_S, patience * loads[best]))
        return Decision(ends[best], kind, Why.FASTER, loads[best], patience_s, probe)

    def _doubts(self, rest: int, parts: Sequence[Part], load_s: float, best_s: float) -> bool:
        """Only what was seen of computing the rest speaks against loading all parts, not that a tier is or may be slow: small
        probes that were fast do not say that it is not."""
        for tier in {part.tier for part in parts}:
            probing = self._probing.get(tier)
            if tier in self._suspects or probing is not None and probing.share > 1:
                return False
        return load_s + self.prefill.least(rest, parts[-1].end) < best_s

    def _may_probe_tier(self, now: float, tier: Tier, at_once: bool) -> bool:
        """`at_once`: what is known of the tier speaks for loading from it, but that its latest load was given up."""
        if not at_once:
            return not self._is_probing and self._may_probe(now, tier)
        probing = self._probing.get(tier)
        return tier is Tier.DRAM or not self._is_probing and (probing is None or now >= probing.next_at)

    def _worth_probing(self, whole_s: float, saved: Sequence[float], parts: Sequence[Part], again: bool) -> set[Tier]:
        """Tiers that have about as much of this prompt as they usually have: beside less a probe is much, and a small load says
        little of large ones."""
        found, by_tier = set(), Counter[Tier]()
        for of_part, part in zip(saved, parts, strict=True):
            by_tier[part.tier] += of_part
        for tier, of_parts in by_tier.items():
            saved_s = min(whole_s, of_parts)
            if not again:
                self._usual_s[tier] += (1 - FORGETTING) * (saved_s - self._usual_s[tier])
            if saved_s >= USUAL * self._usual_s[tier]:
                found.add(tier)
        return found

    def _note_probe(self, now: float, begin: int, part: Part, saved_s: float, tells: bool = True) -> int:
        """Where it ends. `saved_s`: by loading the part. `tells`: see Probing."""
        probing = self._probing.setdefault(part.tier, Probing(now))
        probing.whole_bytes, probing.saved_s, probing.tells = part.nbytes, saved_s, tells
        return begin + max(1, (part.end - begin) // probing.share)

    def _learn(self, now: float, computed: int, parts: Sequence[Part], load_s: float) -> Decision:
        """Loads, while nothing is known of computing. But if it is known that loading takes long, recomputing once tells
        whether that takes longer."""
        if load_s > SLOW_S and self._may_probe(now, parts[-1].tier):
            return Decision(computed, Kind.RECOMPUTE, Why.LEARNING, None, None)
        return Decision(parts[-1].end, Kind.LOAD, Why.LEARNING, None, None)

    def recompute_s(self, total: int, context: int) -> float | None:
        """Of a prompt of `total` tokens, of which `context` are there."""
        return self.prefill.seconds(max(1, total - context), context)

    def _loads_s(self, parts: Sequence[Part]) -> list[float]:
        """Of the first 0, 1, .. parts. Tiers are read one beside the other, so what counts is the slowest; what is queued there
        comes first. A tier of which nothing is known takes no time, so it is tried, without what is known to be slow behind it."""
        slowest, nbytes, found = dict.fromkeys(Tier, 0.0), dict.fromkeys(Tier, 0), [0.0]
        for part in parts:
            nbytes[part.tier] += part.nbytes
            if not self._load[part.tier].is_new:
                slowest[part.tier] = self._load[part.tier].predict(self._queued[part.tier] + nbytes[part.tier], 1.0) or 0.0
            found.append(max(slowest.values()))
        return found

    def _may_probe(self, now: float, what: Tier | int) -> bool:
        probing = self._probing.setdefault(what, Probing(now))
        if now < probing.next_at:
            return False
        probing.wait(now)
        return True

    # -- learning ----------------------------------------------------------------------------------------------

    def begin_load(self, now: float, nbytes: dict[Tier, int], predicted_s: float | None) -> Loading:
        for tier, more in nbytes.items():
            self._queued[tier] += more
        return Loading(now, nbytes, {tier: self._queued[tier] for tier in nbytes}, predicted_s)

    def end_load(
        self, now: float, loading: Loading, arrived: bool, late: bool, for_drive: bool = False, for_probe: bool = False
    ) -> Tier:
        """`late`: it was given up, so it would have taken longer than it did; `for_drive`: reads were what it waited for. One that
        failed otherwise teaches nothing. Answers the tier that it is taken to have waited for."""
        for tier, nbytes in loading.nbytes.items():
            self._queued[tier] -= nbytes
        seconds = now - loading.begun
        # Of several tiers it is the one that was expected to take longest; while nothing is known of it, the drive.
        slowest = max(loading.queued, key=lambda tier: self._expected_s(tier, loading.queued[tier]))
        if for_drive and Tier.SSD in loading.queued:
            slowest = Tier.SSD
        if not (arrived or late):
            return slowest
        self._compare("load", loading.predicted_s, seconds)
        probing, nbytes = self._probing.get(slowest), loading.queued[slowest]
        if for_probe and arrived and probing is not None and not probing.tells:
            probing.next_at = now  # it closed a breaker at most; the next one that tells something may follow at once
            return slowest
        if arrived:
            # What a probe took for each byte, taken for all that it was part of, is no more than computing that: then all is well.
            well = probing is None or seconds * probing.whole_bytes <= probing.saved_s * nbytes
            self._settle_patience(slowest, well)
            if not for_probe:
                self._judge_probes(now, loading, seconds, slowest)
        else:
            self._suspects.add(slowest)
            if probing is not None and not for_probe and loading.begun >= probing.since:
                probing.wait(now)
            # A probe is given up soon, which must not look like a load that took no longer: it stands for all it was part of.
            saved_s, whole_bytes = (probing.saved_s, probing.whole_bytes) if probing is not None else (0.0, 0)
            seconds, nbytes = GIVEN_UP * max(seconds, saved_s), max(nbytes, whole_bytes)
        self._settle_probe(now, probing, seconds)
        self._load[slowest].observe(seconds, nbytes, 1.0)
        return slowest

    def _judge_probes(self, now: float, loading: Loading, seconds: float, slowest: Tier) -> None:
        """By a request's load that arrived, for it waits for steps and copies, as a probe does not. If it was as fast as it was
        to be, probing ends. If not, the pause grows: an SSD of fast probes and slow loads would be loaded from after each."""
        probing = self._probing.get(Tier.SSD)
        if probing is None or not probing.whole_bytes or Tier.SSD not in loading.queued:
            return
        least_bytes = loading.queued[Tier.SSD] if slowest is Tier.SSD else probing.whole_bytes
        if seconds * probing.whole_bytes <= probing.saved_s * least_bytes:
            del self._probing[Tier.SSD]
        elif slowest is Tier.SSD:
            probing.wait(now)

    def begin_probe(self, now: float, nbytes: int) -> Loading:
        """What is queued before it is not counted: it is timed from when its reads reach the drive."""
        return self.begin_load(now, {Tier.SSD: nbytes}, None)._replace(queued={Tier.SSD: nbytes})

    def end_probe(self, loading: Loading | None, seconds: float, arrived: bool, late: bool) -> None:
        """None: it was not made."""
        self._is_probing = False
        if loading is not None:
            self.end_load(loading.begun + seconds, loading, arrived, late, for_drive=True, for_probe=True)

    def _settle_patience(self, tier: Tier, well: bool) -> None:
        if tier in self._suspects:
            self._suspects.remove(tier)
            if well:
                self._patience[tier] = min(PATIENCE_MAX, PATIENCE_GROWS * self._patience[tier])
        else:
            self._patience[tier] = max(PATIENCE, PATIENCE_FADES * self._patience[tier])

    def _settle_probe(self, now: float, probing: Probing | None, seconds: float) -> None:
        if probing is not None and PROBE_GROWS * seconds < probing.saved_s:
            if probing.share > 1:
                probing.next_at = now
            probing.share = max(1, probing.share // PROBE_GROWS)
        elif probing is not None:
            probing.share = PROBE_SHARE

    def _expected_s(self, tier: Tier, nbytes: int) -> float:
        if self._load[tier].is_new:
            return np.inf if tier is Tier.SSD else 0.0
        return self._load[tier].predict(nbytes, 1.0) or 0.0

    def forget_loads(self) -> None:
        """Those in flight will not be told of."""
        self._queued = dict.fromkeys(Tier, 0)
        self._is_probing = False

    def end_prefill(self, seconds: float, tokens: int, context: int) -> None:
        self._compare("prefill", self.prefill.seconds(tokens, context), seconds)
        self.prefill.observe(seconds, tokens, context)

    def _compare(self, what: str, predicted_s: float | None, seconds: float) -> None:
        if predicted_s is None:
            return
        self._counters["kvoffload_predicted_seconds_total", what] += predicted_s
        self._counters["kvoffload_actual_seconds_total", what] += seconds
        self._counters["kvoffload_prediction_error_seconds_total", what] += abs(seconds - predicted_s)

    def load_bytes_per_second(self, tier: Tier, nbytes: int) -> float | None:
        """Of a load of so many bytes on an idle tier, latency included."""
        seconds = self._load[tier].predict(nbytes, 1.0)
        return None if not seconds else nbytes / seconds
