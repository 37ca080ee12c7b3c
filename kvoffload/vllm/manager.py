"""The scheduler half: vLLM's `OffloadingManager` on top of the block manager and the store."""

import errno
import logging
import math
import os
import time
from collections import Counter, defaultdict, deque
from collections.abc import Collection, Container, Iterable, Mapping
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics import OffloadingConnectorStats
from vllm.v1.kv_offload.base import (
    GPULoadStoreSpec,
    LookupResult,
    OffloadingManager,
    OffloadKey,
    OffloadPolicy,
    PrepareStoreOutput,
    ReqContext,
    RequestOffloadingContext,
    get_offload_group_idx,
)
from vllm.v1.kv_offload.config import OffloadingConfig
from vllm.v1.request import RequestStatus

from kvoffload import admission
from kvoffload.admission import Admission, AdmitAll, WrittenToday
from kvoffload.config import Config
from kvoffload.errors import ConfigError
from kvoffload.estimates import Kind
from kvoffload.layout import SLOTS_MIN, least_dram_bytes, slot_bytes
from kvoffload.manager import BlockManager, NoJournal
from kvoffload.memory import available_memory
from kvoffload.metrics import OBSERVATIONS_MAX, zeros
from kvoffload.store import DriveWear, Store
from kvoffload.table import NO_BLOCKS
from kvoffload.types import BlockKey, SlotFiles, Tier, TransferPlan, TransferReport, add_errors
from kvoffload.vllm import contract
from kvoffload.vllm.decisions import Decisions, Loads
from kvoffload.vllm.geometry import Geometry
from kvoffload.vllm.identity import LoraSalts, siblings
from kvoffload.vllm.notes import Notes
from kvoffload.vllm.probes import Probes
from kvoffload.vllm.transfer import SlotSpec

if TYPE_CHECKING:
    from vllm.distributed.kv_transfer.kv_connector.v1.offloading.common import TransferJob
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

logger = logging.getLogger(__name__)

ANSWERED = (RequestStatus.FINISHED_STOPPED, RequestStatus.FINISHED_LENGTH_CAPPED)  # who goes away earlier has no whole answer
EXPORT_S = 0.25  # between metrics, while requests are at work: gathering them at each step took more than all else in it


def check_dram(settings: Config, geometry: Geometry, slots: int) -> None:
    """ConfigError if the DRAM tier would be of no use, or is more than there is."""
    asked = f"dram_kv_offload_gb={settings.dram_kv_offload_gb:g}"
    if slots < SLOTS_MIN:
        least = least_dram_bytes(geometry.payload_bytes, geometry.ranks) * geometry.engines
        raise ConfigError(
            f"{asked} holds fewer than {SLOTS_MIN} blocks of this model: give it at least "
            f"{math.ceil(least / 1e6) / 1e3} GB, or 0 to turn the DRAM tier off"
        )
    there, whose = available_memory()
    if settings.dram_bytes > there:
        raise ConfigError(f"{asked} is more than the {there / 1e9:.1f} GB of memory {whose}: lower it")


def write_budget(settings: Config, geometry: Geometry) -> float | None:
    """Of one engine, bytes a day."""
    budget = settings.ssd_write_bytes_per_day
    return None if budget is None else budget / geometry.engines


class ManagerAdapter(OffloadingManager):
    """`open` completes it; vLLM constructs it before the KV-cache configuration can be given to it."""

    def __init__(self, settings: Config, config: OffloadingConfig):
        self._settings = settings
        self._tokens_per_block = config.groups[0].tokens_per_block  # of all groups, where it is asked for
        self._group_numbers = {group: number for number, group in enumerate(contract.group_ids(config))}
        self._store: Store | None = None
        self._attach: tuple[SlotFiles, ...] = ()
        self._transfers = count(1)
        self._loading: dict[BlockKey, Loads] = {}  # by block in flight
        self._storing: dict[BlockKey, int] = {}  # by block in flight: its transfer
        self._failed: dict[int, dict[BlockKey, int]] = {}  # by transfer in flight: its failed blocks' errno
        self._sources: dict[int, tuple[list[BlockKey], list[int]]] = {}  # by store in flight: its keys and KV blocks
        self._first_transfer = 1  # older ones ended with a reset
        self._salts: dict[str, bytes | None] = {}  # of requests announced but not yet seen by vLLM's scheduler half
        self._lora_salts = LoraSalts()
        self._contexts: dict[str, ReqContext] = {}  # of requests that have not ended
        self.begun_loads: set[str] = set()  # the requests that loads of this step are for
        self._life = b""
        self._reported: dict[tuple[str, ...], float] = {}
        self._export_at = 0.0
        # Of transfers since they were exported last, by direction; the latest, for vLLM may never ask (--disable-log-stats).
        self._latencies: defaultdict[str, deque[float]] = defaultdict(partial(deque, maxlen=OBSERVATIONS_MAX))
        self._core = BlockManager(0, 0, 1, NoJournal(), block_bytes=0)
        self._decisions = Decisions(self._core.counters, 0)
        self._probes = Probes(self._core, self._decisions, 0, self._group_number)
        self._block_bytes = 0
        self._today = WrittenToday(time.time())
        self._admission = Admission(AdmitAll(), None, 0)
        self._wear: DriveWear | None = None

    def open(self, geometry: Geometry, identity: dict[str, Any], weights_stay: bool = True) -> None:
        """Opens the store and sizes the tiers; ConfigError or StoreError say what the user must change.

        weights_stay: False if vLLM may be given others while it runs, of which it does not tell us.
        """
        if not weights_stay:
            logger.warning(
                "kvoffload: vLLM can be given other weights while it runs (weight_transfer_config), so nothing is kept for the "
                "next start; call /reset_prefix_cache?reset_external=true after each change, or old ones' blocks are served"
            )
            self._life = os.urandom(16)
        settings, ranks = self._settings, geometry.ranks
        dram = geometry.dram_plan(settings)
        if dram.is_tier:
            check_dram(settings, geometry, dram.slots)
        journal: Store | NoJournal = NoJournal()
        if settings.ssd_bytes != 0:
            others = siblings(identity, geometry.engines)
            journal = self._store = Store.open(settings, identity, geometry.payload_bytes, ranks, others)
            self._wear = DriveWear(settings.nvme_path)
            self._attach = tuple(self._store.slot_files(rank) for rank in range(ranks))
        if dram.slots < 2 * geometry.blocks_per_step:
            logger.warning(
                "kvoffload: %d DRAM slots are fewer than two steps of the model can fill (%d); of long prompts only the "
                "beginning will be stored: raise dram_kv_offload_gb or lower max_num_batched_tokens",
                dram.slots,
                2 * geometry.blocks_per_step,
            )
        recovered = self._store.table() if self._store else NO_BLOCKS
        ssd_slots = self._store.slot_count if self._store else 0
        slot = slot_bytes(geometry.payload_bytes)
        self._block_bytes = ranks * slot
        folders = [os.path.dirname(path) for path in self._attach[0].paths] if self._attach else ["none"]
        budget, slots = write_budget(settings, geometry), dram.slots + ssd_slots
        idle_s = self._store.idle_s if self._store else None
        self._admission = admission.chosen(settings.ssd_admission, budget, self._block_bytes, slots, time.monotonic, idle_s)
        self._core = BlockManager(
            dram.slots, ssd_slots, ranks, journal,
            block_bytes=self._block_bytes, dram_is_tier=dram.is_tier, recovered=recovered, admission=self._admission,
            drives=[f"{i} ({folder})" for i, folder in enumerate(folders)],
        )  # fmt: skip
        self._decisions = Decisions(self._core.counters, slot)
        self._probes = Probes(self._core, self._decisions, ranks, self._group_number)
        logger.info(
            "kvoffload: %d DRAM slots, %d SSD slots of %d bytes per rank; %d blocks resumed from %s",
            dram.slots if dram.is_tier else 0,
            ssd_slots,
            slot,
            len(recovered),
            self._store.directory if self._store else "nowhere",
        )

    # -- keys and requests -------------------------------------------------------------------------------------------

    def announce(self, request: "Request") -> None:
        """Called by the connector before `on_new_request`, which is not told about LoRA."""
        self._decisions.begin_request(request)
        if request.lora_request is not None and self._settings.enabled:
            self._salts[request.request_id] = self._lora_salts.of(request.lora_request)

    def on_new_request(self, req_context: ReqContext) -> RequestOffloadingContext:
        contract.set_state(req_context, Notes(self._salts.pop(req_context.req_id, b""), self._life))
        self._contexts[req_context.req_id] = req_context
        # By default vLLM offers for storing what follows a loaded prefix. We take the whole request, so that blocks that
        # were dropped, evicted or damaged meanwhile are stored again; those that are held cost a look into a dict.
        return RequestOffloadingContext(policy=OffloadPolicy.REQUEST_LEVEL)

    def _notes(self, req_context: ReqContext) -> Notes:
        notes = contract.get_state(req_context, Notes)
        assert notes is not None, "vLLM announces every request"
        if notes.life != self._life:
            notes = Notes(notes.salt, self._life, written=notes.written, answered=notes.answered)
            contract.set_state(req_context, notes)
        return notes

    # -- vLLM's questions and orders -----------------------------------------------------------------------------

    def lookup(self, key: OffloadKey, req_context: ReqContext) -> LookupResult:
        notes = self._notes(req_context)
        if not notes.sources or notes.limit is not None and contract.key_positions(req_context)[key] > notes.limit:
            return LookupResult.MISS
        own_key = notes.own_key(key)
        if self._loadable_from(own_key, req_context, notes) is not None:
            self._core.lookup(own_key)
            return LookupResult.HIT
        self._core.counters["kvoffload_missed_lookups_total",] += 1
        return LookupResult.MISS

    def _loadable_from(self, own_key: BlockKey, req_context: ReqContext, notes: Notes) -> Tier | None:
        nearest = self._core.tier(own_key)
        if nearest is None or nearest in notes.sources and contract.may_load_from(nearest, req_context):
            return nearest
        allowed = self._allowed(req_context, notes)
        return next((tier for tier in self._core.tiers(own_key) if tier in allowed), None)

    def _allowed(self, req_context: ReqContext, notes: Notes) -> list[Tier]:
        return [tier for tier in notes.sources if contract.may_load_from(tier, req_context)]

    def lift_limit(self, request: "Request", computed: int) -> None:
        """The request is about to be looked up; so much of it is in GPU memory."""
        notes = self._notes(self._contexts[request.request_id])
        notes.limit, notes.loads.computed, notes.loads.end = None, computed, 0

    def limit_load(self, request: "Request", computed: int, matched: int) -> bool:
        """Decides how much is loaded of the `matched` tokens that lookups found after `computed`. True: less than that, and
        lookups say so now. (Blocks of sliding windows that will not be loaded count as if they were.)"""
        if not self._settings.enabled:
            return False
        context = self._contexts[request.request_id]
        notes = self._notes(context)
        notes.loads.waits_since = None
        if not matched:
            return False
        if not contract.TELLS_POSITIONS:  # all of it is loaded
            notes.loads.end = computed + matched
            return False
        found = []
        for key, position in contract.key_positions(context).items():
            if computed < position <= computed + matched:
                own_key = notes.own_key(key)
                tier = self._loadable_from(own_key, context, notes)
                if tier is not None:
                    found.append((position, tier, own_key))
        if not found:
            return False
        found.sort(key=lambda block: block[0])
        decision = self._decisions.decide(request, notes.loads, computed, [block[:2] for block in found])
        if decision.probe is not None:
            self._probes.begin(next(self._transfers), decision.probe, found)
            notes.loads.decision = decision._replace(probe=None)
        if decision.kind is Kind.LOAD:  # also what follows the last whole block: of a model with windows, all but one token
            return False
        ends = (computed, *(position for position, _, _ in found))  # of whole blocks
        end = next(position for position in ends if position >= decision.end)
        notes.loads.end = end
        notes.limit = end if end < computed + matched else None
        return notes.limit is not None

    def forgo_load(self, request: "Request", computed: int) -> bool:
        """Whether to compute a request is sooner than to wait for the loads in flight that bring blocks of it after `computed`.
        True: lookups find nothing of it now."""
        if not contract.TELLS_POSITIONS or not self._settings.enabled:
            return False
        context = self._contexts[request.request_id]
        notes = self._notes(context)
        keys = (notes.own_key(key) for key, position in contract.key_positions(context).items() if position > computed)
        others = {id(loads): loads for key in keys if (loads := self._loading.get(key)) is not None}
        if self._decisions.outlast(request, notes.loads, computed, others.values()):
            notes.limit = computed
        return notes.limit is not None

    def note_scheduled(self, request: "Request") -> None:
        """The request has its KV blocks: what was decided is done."""
        self._decisions.count(request, self._notes(self._contexts[request.request_id]).loads)

    def note_step(self, step: "SchedulerOutput") -> None:
        """The step's lookups and loads are done, its stores begin: vLLM 0.33 says so itself only after them."""
        self._core.end_step()
        self._decisions.begin_step(step)

    def note_end(self, request: "Request") -> None:
        context = self._contexts.get(request.request_id)
        if context is not None:
            notes = self._notes(context)
            notes.answered = request.num_output_tokens if request.status in ANSWERED else 0
            notes.written = max(request.num_prompt_tokens, request.num_tokens - 1)
        self._decisions.end_request(request)

    def get_load_source(self, key: OffloadKey, req_context: ReqContext) -> Any:
        notes = self._notes(req_context)
        return contract.HIT_SOURCES[self._loadable_from(notes.own_key(key), req_context, notes)]

    def prepare_load(self, keys: Collection[OffloadKey], req_context: ReqContext) -> SlotSpec:
        notes = self._notes(req_context)
        own_keys = notes.own_keys(keys)
        own = notes.own_positions(req_context)
        placements = self._core.load(own_keys, req_context.req_id, self._allowed(req_context, notes), own)
        tiers = Counter(place.source for place in placements if place.source is not None)
        for tier, blocks in tiers.items():
            self._core.counters["kvoffload_hit_blocks_total", tier.value] += blocks
        notes.transfer = next(self._transfers)
        self.begun_loads.add(req_context.req_id)
        self._decisions.begin_load(notes.loads, tiers)
        self._loading.update(dict.fromkeys(own_keys, notes.loads))
        return SlotSpec.of(notes.transfer, placements, notes.loads.patience_s)

    def complete_load(self, keys: Collection[OffloadKey], req_context: ReqContext) -> None:
        notes = self._notes(req_context)
        failed = self._failed.pop(notes.transfer, {})
        if not contract.TELLS_POSITIONS:  # nobody decides against a slow drive, so it is left alone like one that is silent
            failed = {key: errno.ETIMEDOUT if error == errno.ETIME else error for key, error in failed.items()}
        own_keys = notes.own_keys(keys)
        for key in own_keys:
            self._loading.pop(key, None)
        self._core.load_done(own_keys, req_context.req_id, failed)
        self._decisions.end_load(notes.loads, failed.values())
        if failed:
            errors = set(failed.values())
            notes.note_failed_load(errors)
            logger.warning(
                "kvoffload: request %s: %d of %d blocks did not load (%s); it recomputes what it cannot load otherwise",
                req_context.req_id, len(failed), len(keys), ", ".join(sorted(errno.errorcode.get(e, str(e)) for e in errors)),
            )  # fmt: skip

    def prepare_store(self, keys: Collection[OffloadKey], req_context: ReqContext) -> PrepareStoreOutput | None:
        notes = self._notes(req_context)
        if not self._settings.enabled or notes.has_hole:
            return PrepareStoreOutput([], SlotSpec.of(0, []), [])
        contract.note_keys(req_context, keys)
        positions = contract.key_positions(req_context)
        own_keys = {notes.own_key(key): key for key in keys if self._is_written(positions.get(key, 0), notes)}
        in_order = sorted(own_keys, key=lambda own: positions.get(own_keys[own], 0))
        groups = [(key, self._group_number(key)) for key in in_order]
        stored = self._core.store(groups, req_context.req_id, notes.own_positions(req_context))
        notes.has_hole = stored.dropped > 0
        by_key = {placement.key: placement for placement in stored.placements}
        placements = [by_key[key] for key in own_keys if key in by_key]  # in vLLM's order: that of its block ids
        transfer = next(self._transfers)
        self._storing.update((placement.key, transfer) for placement in placements)
        self._core.counters["kvoffload_stored_blocks_total",] += len(placements)
        return PrepareStoreOutput([own_keys[place.key] for place in placements], SlotSpec.of(transfer, placements), [])

    def _group_number(self, key: BlockKey) -> int:
        """A key's KV-cache group as workers number them; salted keys keep vLLM's number of it."""
        return self._group_numbers[get_offload_group_idx(OffloadKey(key))]

    def _is_written(self, position: int, notes: Notes) -> bool:
        """The last token of an answer is drawn and never computed with. Older versions of vLLM (0.27.1 for one) store a block that
        ends with it all the same, and who went on from there would attend to what the memory held before."""
        return contract.block_end(position, self._tokens_per_block) <= notes.written

    def complete_store(self, keys: Collection[OffloadKey], req_context: ReqContext, success: bool = True) -> None:
        own_keys = self._notes(req_context).own_keys(keys)
        transfers = {self._storing.pop(key) for key in own_keys if key in self._storing}
        failed = {key for transfer in transfers for key in self._failed.pop(transfer, {})}
        for transfer in transfers:
            self._sources.pop(transfer, None)
        self._core.store_done(own_keys, failed if success else own_keys)

    def touch(self, keys: Collection[OffloadKey], req_context: ReqContext) -> None:
        contract.note_keys(req_context, keys)

    def on_request_finished(self, req_context: ReqContext) -> None:
        # Not in `touch`: vLLM calls it too often, from the first key to the last, and since 0.31 nowhere.
        notes = self._notes(req_context)
        own = notes.own_positions(req_context)
        self._core.touch(sorted(own, key=own.__getitem__), req_context.req_id, notes.answered)
        self._contexts.pop(req_context.req_id, None)

    def has_pending_work(self) -> bool:
        return self._core.pending() or bool(self._attach)

    def reset_cache(self) -> None:
        """vLLM calls this when what it cached is void, after new weights for one. What is computed from now on may
        belong to other weights than the namespace says, so it gets keys that no other process will ask for."""
        self._first_transfer = next(self._transfers)
        self._failed.clear()
        self._sources.clear()
        self._storing.clear()
        self._loading.clear()
        self._probes.clear()
        self._life = os.urandom(16)
        self._core.reset()
        self._decisions.forget_loads()
        for name, context in self._contexts.items():
            # vLLM offers it from its beginning again: what was computed before, and of windows what others have overwritten.
            self._notes(context).has_hole |= self._decisions.is_begun(name)

    def shutdown(self) -> None:
        if self._store is not None:
            self._store.close()

    def fail_overwritten(
        self, overwritten: Container[int], stores: Mapping[int, "TransferJob"], flushed: Container[int]
    ) -> None:
        """Fails what is stored from KV blocks that this step overwrites before the workers are asked to be done with them.

        `stores`: those handed out in this step, by vLLM's job ids. They read what this step computes, which comes after
        the overwriting, unless they are `flushed`: those read what was there before, like all of earlier steps.
        """
        for transfer in self._sources:
            self._fail_sources(transfer, overwritten)
        for job_id, job in stores.items():
            slots, blocks = job.dst_spec, job.src_spec
            assert isinstance(slots, SlotSpec) and isinstance(blocks, GPULoadStoreSpec)
            self._sources[slots.transfer] = slots.keys, blocks.block_ids.tolist()
            if job_id in flushed:
                self._fail_sources(slots.transfer, overwritten)

    def _fail_sources(self, transfer: int, overwritten: Container[int]) -> None:
        keys, blocks = self._sources[transfer]
        failed = {key: errno.ECANCELED for key, block in zip(keys, blocks, strict=False) if block in overwritten}
        if failed:
            add_errors(self._failed.setdefault(transfer, {}), failed)

    # -- our own traffic with the workers --------------------------------------------------------------------------

    def take_plan(self) -> TransferPlan:
        """What workers are to do beside vLLM's jobs of this step."""
        self.begun_loads.clear()
        attach, self._attach = self._attach, ()
        return TransferPlan(attach=attach, demotions=tuple(self._core.plan()), probes=self._probes.take_plan())

    def take_in(self, report: TransferReport) -> None:
        """What workers did. REQUIRES: called before vLLM's scheduler half learns of the jobs that ended with it."""
        for transfer, errors in report.failed.items():
            if transfer >= self._first_transfer:
                add_errors(self._failed.setdefault(transfer, {}), errors)
        self._probes.take_in(report.probes, self._failed)
        for demotion, ranks in report.demoted.items():
            self._core.ack(demotion, ranks, report.failed_demotions.get(demotion, 0))
        if report.attach_error:
            logger.error("kvoffload: the SSD tier is off: %s", report.attach_error)
            self._core.disable_ssd()
        self._core.counters.update(report.counters)
        for direction, seconds in report.latencies.items():
            self._latencies[direction].extend(seconds)

    def get_stats(self) -> OffloadingConnectorStats | None:
        """What changed since the last of them. The step in which the last request ends has all, for none may follow it. (Nor may
        one while vLLM is paused with requests: then the latest is told when it goes on.)"""
        now = time.monotonic()
        if not self._settings.enabled or self._decisions.has_requests and now < self._export_at:
            return None
        self._export_at = now + EXPORT_S
        stats = OffloadingConnectorStats()
        if not self._reported:
            for name, *labels in zeros():
                stats.increase_counter(name, 0, tuple(labels))
        for metric, value in self._core.counters.items():
            increase = value - self._reported.get(metric, 0)
            if increase:
                stats.increase_counter(metric[0], increase, metric[1:])
                self._reported[metric] = value
        for metric, value in self._gauges():
            if self._reported.get(metric) != value:
                stats.set_gauge(metric[0], value, metric[1:])
                self._reported[metric] = value
        for name, found in (
            ("kvoffload_transfer_latency_seconds", self._latencies),
            ("kvoffload_load_seconds", self._decisions.load_seconds),
        ):
            for label, seconds in found.items():
                for second in seconds:
                    stats.observe_histogram(name, second, (str(label),))
            found.clear()
        return None if stats.is_empty() else stats

    def _gauges(self) -> Iterable[tuple[tuple[str, ...], float]]:
        for tier, (used, capacity) in self._core.usage().items():
            if tier is Tier.SSD or self._core.dram_is_tier:  # bounce slots are no tier
                yield ("kvoffload_used_bytes", tier.value), used * self._block_bytes
                yield ("kvoffload_capacity_bytes", tier.value), capacity * self._block_bytes
        for queue, blocks in self._core.queues().items():
            yield ("kvoffload_queued_blocks", queue), blocks
        yield from self._decisions.gauges()
        if self._store is None:
            return
        for labels, state in self._core.drive_states():
            yield ("kvoffload_drive_state", *labels), state.value
        written = self._core.counters["kvoffload_demotions_total",]
        yield ("kvoffload_ssd_written_today_bytes",), self._today.of(written * self._block_bytes, time.time())
        if written:
            yield ("kvoffload_useful_write_ratio",), self._core.counters["kvoffload_read_back_blocks_total",] / written
        if self._admission.budget is not None:  # in whole blocks, or it would be exported anew at every step
            left = self._admission.budget.left() // self._block_bytes * self._block_bytes
            yield ("kvoffload_write_budget_left_bytes",), left
        for drive, used in self._wear.percentages().items() if self._wear is not None else ():
            yield ("kvoffload_drive_percentage_used_ratio", str(drive)), used / 100
