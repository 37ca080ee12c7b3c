"""How far each request is loaded, and what that takes: `Estimates` fed with what vLLM's scheduler does. Scheduler side."""

import errno
import logging
import time
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

from kvoffload.estimates import Decision, Estimates, Kind, Loading, Part, Why
from kvoffload.types import LATE, Tier

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

logger = logging.getLogger(__name__)

WISH = "kvoffload"  # a request's own word on it, in kv_transfer_params
WISHES = (Kind.LOAD, Kind.RECOMPUTE)
SHOWN_TOKENS, SHOWN_BYTES = 1000, 100_000_000  # the rates of so much are shown


class Prefilling(NamedTuple):
    begun: float
    context: int  # tokens that were there
    tokens: int  # to be computed


@dataclass
class Loads:
    """What was decided about a request, and its load in flight. In vLLM's own context of it."""

    decision: Decision | None = None
    counted: bool = False
    loading: Loading | None = None

    @property
    def patience_s(self) -> float | None:
        return self.decision.patience_s if self.decision else None


class Decisions:
    def __init__(self, counters: Counter[tuple[str, ...]], block_bytes: int):
        """block_bytes: of a block on one rank."""
        self._counters, self._block_bytes = counters, block_bytes
        self._estimates = Estimates(counters)
        self._prefilling: dict[str, Prefilling] = {}

    # -- deciding ----------------------------------------------------------------------------------------------

    def decide(self, request: "Request", computed: int, blocks: Iterable[tuple[int, Tier]]) -> Decision:
        """How far to load the request. `blocks`: those that could be, by the tokens of the prompt up to their end, and by
        where they are, in order."""
        parts = []
        for tier, stretch in groupby(blocks, key=lambda block: block[1]):
            ends = [end for end, _ in stretch]
            parts.append(Part(ends[-1], tier, len(ends) * self._block_bytes))
        wish = _wish(request.kv_transfer_params)
        if wish is Kind.RECOMPUTE:
            return Decision(computed, wish, Why.ASKED, None, None)
        if wish is Kind.LOAD:
            return Decision(parts[-1].end, wish, Why.ASKED, None, None)
        return self._estimates.decide(time.monotonic(), computed, request.num_tokens, parts)

    def count(self, loads: Loads) -> None:
        """Once for a request, when it is given its KV blocks: until then vLLM may ask, and we decide, again and again."""
        if loads.decision is not None and not loads.counted:
            loads.counted = True
            self._counters["kvoffload_load_decisions_total", loads.decision.kind.value, loads.decision.why.value] += 1

    # -- learning ----------------------------------------------------------------------------------------------

    def begin_load(self, loads: Loads, tiers: Mapping[Tier, int]) -> None:
        """`tiers`: how many blocks come from each."""
        if not tiers:
            return
        nbytes = {tier: blocks * self._block_bytes for tier, blocks in tiers.items()}
        predicted_s = loads.decision.load_s if loads.decision else None
        loads.loading = self._estimates.begin_load(time.monotonic(), nbytes, predicted_s)

    def end_load(self, loads: Loads, errors: Collection[int]) -> None:
        if loads.loading is None:
            return
        late = any(error in LATE or error == errno.ECANCELED for error in errors)
        self._estimates.end_load(time.monotonic(), loads.loading, not errors, late)
        loads.loading = None

    def forget_loads(self) -> None:
        """Loads in flight will not be reported."""
        self._estimates.forget_loads()

    def begin_step(self, step: "SchedulerOutput") -> None:
        now = time.monotonic()
        cached = step.scheduled_cached_reqs
        for request in (*cached.resumed_req_ids, *(step.preempted_req_ids or ())):
            self._prefilling.pop(request, None)  # computes again what it had computed
        if self._prefilling:
            for request, outputs in zip(cached.req_ids, cached.num_output_tokens, strict=True):
                if outputs:
                    self._end_prefill(request, now)
        for new in step.scheduled_new_reqs:
            tokens = len(new.prompt_token_ids or ()) - new.num_computed_tokens
            if tokens > 0:
                self._prefilling[new.req_id] = Prefilling(now, new.num_computed_tokens, tokens)

    def end_request(self, request: "Request") -> None:
        if request.num_output_tokens:
            self._end_prefill(request.request_id, time.monotonic())
        self._prefilling.pop(request.request_id, None)

    def _end_prefill(self, request: str, now: float) -> None:
        """Its first token is there."""
        prefilling = self._prefilling.pop(request, None)
        if prefilling is not None:
            self._estimates.end_prefill(now - prefilling.begun, prefilling.tokens, prefilling.context)

    def gauges(self) -> Iterable[tuple[tuple[str, ...], float]]:
        seconds = self._estimates.prefill.seconds(SHOWN_TOKENS, 0)
        if seconds:
            yield ("kvoffload_prefill_tokens_per_second",), SHOWN_TOKENS / seconds
        for tier in Tier:
            rate = self._estimates.load_bytes_per_second(tier, SHOWN_BYTES)
            if rate is not None:
                yield ("kvoffload_load_bytes_per_second", tier.value), rate


def _wish(params: dict[str, Any] | None) -> Kind | None:
    wish = (params or {}).get(WISH)
    if wish is None or wish in WISHES:
        return None if wish is None else Kind(wish)
    logger.warning("kvoffload: kv_transfer_params has %r: %r, which is neither 'load' nor 'recompute': passed over", WISH, wish)
    return None
