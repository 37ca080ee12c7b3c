"""How far each request is loaded, and what that takes: `Estimates` fed with what vLLM's scheduler does. Scheduler side."""

import errno
import logging
import time
from collections import Counter, defaultdict, deque
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

from vllm.v1.request import RequestStatus

from kvoffload.estimates import Decision, Estimates, Kind, Loading, Part, Why
from kvoffload.metrics import OBSERVATIONS_MAX
from kvoffload.types import LATE, Tier

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

logger = logging.getLogger(__name__)

WISH = "kvoffload"  # a request's own word on it, in kv_transfer_params
WISHES = (Kind.LOAD, Kind.RECOMPUTE)
SHOWN_TOKENS, SHOWN_BYTES = 1000, 100_000_000  # the rates of so much are shown


class Prefilling(NamedTuple):
    request: "Request"
    begun: float
    context: int  # tokens that were there
    tokens: int  # to be computed


@dataclass
class Loads:
    """What was decided about a request, and its load in flight. In vLLM's own context of it."""

    decision: Decision | None = None
    parts: list[Part] = field(default_factory=list)  # that it was about
    computed: int = 0  # tokens that were in GPU memory
    end: int = 0  # of what is loaded, of a whole block; 0: nothing was found
    counted: bool = False
    blocks: dict[Tier, int] = field(default_factory=dict)  # that are loaded, by tier
    is_warned: bool = False  # of a wish that is none
    loading: Loading | None = None
    waits_since: float | None = None  # for another request's load

    @property
    def patience_s(self) -> float | None:
        return self.decision.patience_s if self.decision else None


class Decisions:
    def __init__(self, counters: Counter[tuple[str, ...]], block_bytes: int):
        """block_bytes: of a block on one rank."""
        self._counters, self._block_bytes = counters, block_bytes
        self._estimates = Estimates(counters)
        self._requests: dict[str, Request] = {}  # those that have not ended
        self._prefilling: dict[str, Prefilling] = {}
        # The latest since they were exported last, by the slowest tier.
        self.load_seconds: defaultdict[Tier, deque[float]] = defaultdict(partial(deque, maxlen=OBSERVATIONS_MAX))

    # -- deciding ----------------------------------------------------------------------------------------------

    def decide(self, request: "Request", loads: Loads, computed: int, blocks: Iterable[tuple[int, Tier]]) -> Decision:
        """How far to load the request. `blocks`: those that could be, by the tokens of the prompt up to their end, and by
        where they are, in order.

        A request that waits is decided about again at each step, as what it would queue behind changes. Except that one that
        is to probe stays at it, and one that recomputes to learn what that takes: they are few, and it would not be chosen twice.
        """
        loads.parts = parts = self._parts(blocks)
        decision = self._wished(request, loads, computed, parts)
        if decision is None:
            before = None if loads.counted else loads.decision
            if before is not None and self._stays(before, computed, parts[-1].end):
                decision = before
            else:
                now, again = time.monotonic(), before is not None
                decision = self._estimates.decide(now, computed, request.num_tokens, parts, again)
        loads.decision, loads.end = decision, decision.end
        return decision

    def outlast(self, request: "Request", loads: Loads, computed: int, others: Iterable[Loads]) -> bool:
        """Whether these loads of others take longer than to compute the request, as predicted or as it has waited by now."""
        now = time.monotonic()
        if loads.waits_since is None:
            loads.waits_since = now
        wish = (request.kv_transfer_params or {}).get(WISH)
        compute_s = 0.0 if wish == Kind.RECOMPUTE else self._estimates.recompute_s(request.num_tokens, computed)
        if compute_s is None or wish == Kind.LOAD:
            return False
        ends = [other.loading.begun + (other.loading.predicted_s or 0.0) for other in others if other.loading is not None]
        if max(max(ends, default=now) - now, now - loads.waits_since) < compute_s:
            return False
        why = Why.FASTER if wish is None else Why.ASKED
        loads.decision, loads.parts, loads.end = Decision(computed, Kind.RECOMPUTE, why, None, None), [], computed
        return True

    @staticmethod
    def _stays(before: Decision, computed: int, end: int) -> bool:
        if before.why is Why.PROBE:
            return computed < before.end <= end
        return before.why is Why.LEARNING and before.end == computed

    def _parts(self, blocks: Iterable[tuple[int, Tier]]) -> list[Part]:
        """Each ends after the one before: of blocks of several groups that end at one token, the tier is the slower one's."""
        ends: dict[int, list[Tier]] = {}
        for end, tier in blocks:
            ends.setdefault(end, []).append(tier)
        slowest = ((end, Tier.SSD if Tier.SSD in tiers else Tier.DRAM, len(tiers)) for end, tiers in ends.items())
        parts = []
        for tier, stretch in groupby(slowest, key=lambda place: place[1]):
            places = list(stretch)
            parts.append(Part(places[-1][0], tier, self._block_bytes * sum(count for _, _, count in places)))
        return parts

    def _wished(self, request: "Request", loads: Loads, computed: int, parts: list[Part]) -> Decision | None:
        wish = (request.kv_transfer_params or {}).get(WISH)
        if wish in WISHES:
            end = parts[-1].end if wish == Kind.LOAD else computed
            return Decision(end, Kind(wish), Why.ASKED, None, None)
        if wish is not None and not loads.is_warned:
            loads.is_warned = True
            logger.warning(
                "kvoffload: request %s: kv_transfer_params has %r: %r, which is neither 'load' nor 'recompute': passed over",
                request.request_id, WISH, wish,
            )  # fmt: skip
        return None

    def count(self, request: "Request", loads: Loads) -> None:
        """Once for a request, when it is given its KV blocks: until then vLLM may ask, and we decide, again and again."""
        if loads.counted:
            return
        loads.counted = True
        reached = loads.computed
        if loads.decision is not None:
            self._counters["kvoffload_load_decisions_total", loads.decision.kind.value, loads.decision.why.value] += 1
            for part in loads.parts:
                end = max(reached, min(part.end, loads.end))
                self._counters["kvoffload_hit_tokens_total", part.tier.value] += end - reached
                reached = end
        elif loads.end > reached and loads.blocks:  # nothing is decided with a vLLM that does not tell the blocks' positions
            share = (loads.end - reached) / sum(loads.blocks.values())
            for tier, blocks in loads.blocks.items():
                self._counters["kvoffload_hit_tokens_total", tier.value] += round(blocks * share)
            reached = loads.end
        self._counters["kvoffload_missed_tokens_total",] += max(0, request.num_prompt_tokens - reached)

    # -- learning ----------------------------------------------------------------------------------------------

    def begin_load(self, loads: Loads, tiers: Mapping[Tier, int]) -> None:
        """`tiers`: how many blocks come from each."""
        if not tiers:
            return
        loads.blocks = dict(tiers)
        nbytes = {tier: blocks * self._block_bytes for tier, blocks in tiers.items()}
        predicted_s = loads.decision.load_s if loads.decision else None
        loads.loading = self._estimates.begin_load(time.monotonic(), nbytes, predicted_s)

    def end_load(self, loads: Loads, errors: Collection[int]) -> None:
        if loads.loading is None:
            return
        now = time.monotonic()
        out_of_patience = loads.patience_s is not None and now - loads.loading.begun >= loads.patience_s  # be it for the GPU
        for_drive = any(error in LATE for error in errors)  # copies that were late have another error
        late = out_of_patience or for_drive or set(errors) == {errno.ECANCELED}
        slowest = self._estimates.end_load(now, loads.loading, not errors, late, for_drive)
        self.load_seconds[slowest].append(now - loads.loading.begun)
        loads.loading = None

    def begin_probe(self, blocks: int) -> Loading:
        self._counters["kvoffload_load_decisions_total", "read", Why.PROBE.value] += 1
        return self._estimates.begin_probe(time.monotonic(), blocks * self._block_bytes)

    def end_probe(self, loading: Loading | None, seconds: float, errors: Collection[int]) -> None:
        late = any(error in LATE for error in errors)  # if none was tried that teaches nothing: no request has waited
        self._estimates.end_probe(loading, seconds, not errors, late)

    def forget_loads(self) -> None:
        """Loads in flight will not be reported."""
        self._estimates.forget_loads()

    def begin_request(self, request: "Request") -> None:
        self._requests[request.request_id] = request

    def begin_step(self, step: "SchedulerOutput") -> None:
        """A request's first token is there when the request says so. What the step says counts tokens that asynchronous
        scheduling only expects, so a prompt would count as computed as soon as that was begun."""
        now = time.monotonic()
        for name in (*step.scheduled_cached_reqs.resumed_req_ids, *(step.preempted_req_ids or ())):
            self._prefilling.pop(name, None)  # computes again what it had computed
        for name in [name for name, prefilling in self._prefilling.items() if prefilling.request.num_output_tokens]:
            self._end_prefill(name, now)
        for new in step.scheduled_new_reqs:
            tokens = len(new.prompt_token_ids or ()) - new.num_computed_tokens
            request = self._requests.get(new.req_id)
            # vLLM's second model runner is told of a preempted request as of a new one when it goes on.
            if tokens > 0 and request is not None and not request.num_output_tokens:
                self._prefilling[new.req_id] = Prefilling(request, now, new.num_computed_tokens, tokens)

    def end_request(self, request: "Request") -> None:
        """An embedding has no tokens: what has one only ends."""
        if request.num_output_tokens or request.pooling_params is not None and request.status == RequestStatus.FINISHED_STOPPED:
            self._end_prefill(request.request_id, time.monotonic())
        self._prefilling.pop(request.request_id, None)
        self._requests.pop(request.request_id, None)

    def _end_prefill(self, name: str, now: float) -> None:
        prefilling = self._prefilling.pop(name, None)
        if prefilling is not None:
            self._estimates.end_prefill(now - prefilling.begun, prefilling.tokens, prefilling.context)

    def is_begun(self, name: str) -> bool:
        """Whether the request has KV: computed, loaded, or about to be. A preempted one has none."""
        request = self._requests.get(name)
        return request is not None and request.num_computed_tokens > 0

    @property
    def has_requests(self) -> bool:
        """Whether one has not ended."""
        return bool(self._requests)

    def gauges(self) -> Iterable[tuple[tuple[str, ...], float]]:
        seconds = self._estimates.prefill.seconds(SHOWN_TOKENS, 0)
        if seconds:
            yield ("kvoffload_prefill_tokens_per_second",), SHOWN_TOKENS / seconds
        for tier in Tier:
            rate = self._estimates.load_bytes_per_second(tier, SHOWN_BYTES)
            if rate is not None:
                yield ("kvoffload_load_bytes_per_second", tier.value), rate
