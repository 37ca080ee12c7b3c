"""The scheduler half: vLLM's `OffloadingManager` on top of the block manager and the store."""

import logging
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics import OffloadingConnectorStats
from vllm.v1.kv_offload.base import (
    Locality,
    LookupResult,
    Medium,
    OffloadingManager,
    OffloadKey,
    PrepareStoreOutput,
    ReqContext,
    RequestOffloadingContext,
    ScheduleEndContext,
    get_offload_group_idx,
)
from vllm.v1.kv_offload.config import OffloadingConfig
from vllm.v1.metrics.cache_hit_source import CacheHitSource

from kvoffload.config import Config
from kvoffload.errors import ConfigError
from kvoffload.layout import SLOTS_MIN, dram_plan, slot_bytes
from kvoffload.manager import BlockManager
from kvoffload.store import Store
from kvoffload.types import BlockKey, Tier, TransferPlan, TransferReport
from kvoffload.vllm.identity import LoraSalts, salted
from kvoffload.vllm.transfer import SlotSpec

if TYPE_CHECKING:
    from vllm.v1.request import Request

logger = logging.getLogger(__name__)

MEDIUM = {Tier.DRAM: Medium.CPU, Tier.SSD: Medium.STORAGE}
SOURCE = {Tier.DRAM: CacheHitSource.HOST, Tier.SSD: CacheHitSource.DISK}


@dataclass(frozen=True)
class Salt:
    """Kept in vLLM's per-request context, since completions may come after the request has ended."""

    value: bytes


class NoJournal:
    """Without an SSD tier nothing is remembered."""

    def __init__(self) -> None:
        self._generation = 0

    def put(self, key: BlockKey, slot: int, generation: int, group: int) -> None:
        return

    def delete(self, key: BlockKey) -> None:
        return

    def touch(self, keys: Iterable[BlockKey]) -> None:
        return

    def clear(self) -> None:
        return

    def next_generation(self) -> int:
        self._generation += 1
        return self._generation


class ManagerAdapter(OffloadingManager):
    """`open` completes it; vLLM constructs it before the KV-cache configuration can be given to it."""

    def __init__(self, settings: Config, config: OffloadingConfig):
        self._settings = settings
        self._config = config
        self._group_numbers = {group.group_id: number for number, group in enumerate(config.groups)}
        self._store: Store | None = None
        self._attach: tuple = ()
        self._failed: set[BlockKey] = set()
        self._no_loads: set[str] = set()  # requests whose load failed: they recompute
        self._salts: dict[str, bytes] = {}  # of requests announced but not yet seen by vLLM's scheduler half
        self._lora_salts = LoraSalts()
        self._reported: dict[tuple[str, ...], float] = {}
        self._core = BlockManager(0, 0, 1, NoJournal())
        self._block_bytes = 0

    def open(self, payload_bytes: int, identity: dict[str, Any]) -> None:
        """Opens the store and sizes the tiers; ConfigError or StoreError say what the user must change."""
        settings, parallel = self._settings, self._config.parallel
        ranks = parallel.world_size
        dram = dram_plan(settings.dram_bytes // parallel.data_parallel_size, payload_bytes, ranks)
        if dram.is_tier and dram.slots < SLOTS_MIN:
            least = (SLOTS_MIN + dram.spares) * ranks * slot_bytes(payload_bytes) * parallel.data_parallel_size
            raise ConfigError(
                f"dram_kv_offload_gb={settings.dram_kv_offload_gb:g} holds fewer than {SLOTS_MIN} blocks of this model: "
                f"give it at least {least / 1e9:.3g} GB, or 0 to turn the DRAM tier off"
            )
        journal: Store | NoJournal = NoJournal()
        if settings.ssd_bytes != 0:
            sharers = parallel.data_parallel_size
            journal = self._store = Store.open(settings, identity, payload_bytes, ranks, sharers)
            self._attach = tuple(self._store.slot_files(rank) for rank in range(ranks))
        entries = self._store.entries() if self._store else []
        self._block_bytes = ranks * slot_bytes(payload_bytes)
        self._core = BlockManager(
            dram.slots,
            self._store.slot_count if self._store else 0,
            ranks,
            journal,
            dram_is_tier=dram.is_tier,
            recovered=entries,
        )
        logger.info(
            "kvoffload: %d DRAM slots, %d SSD slots of %d bytes per rank; %d blocks resumed from %s",
            dram.slots if dram.is_tier else 0,
            self._store.slot_count if self._store else 0,
            slot_bytes(payload_bytes),
            len(entries),
            self._store.directory if self._store else "nowhere",
        )

    # -- keys --------------------------------------------------------------------------------------------------

    def announce(self, request: "Request") -> None:
        """Called by the connector before `on_new_request`, which is not told about LoRA."""
        if request.lora_request is not None:
            self._salts[request.request_id] = self._lora_salts.of(request.lora_request.lora_path)

    def on_new_request(self, req_context: ReqContext) -> RequestOffloadingContext:
        req_context.set_state(Salt(self._salts.pop(req_context.req_id, b"")))
        return RequestOffloadingContext()

    def _key(self, key: OffloadKey, req_context: ReqContext) -> BlockKey:
        salt = req_context.get_state(Salt)
        return salted(key, salt.value if salt else b"")

    def _keys(self, keys: Iterable[OffloadKey], req_context: ReqContext) -> list[BlockKey]:
        return [self._key(key, req_context) for key in keys]

    # -- vLLM's questions and orders -----------------------------------------------------------------------------

    def lookup(self, key: OffloadKey, req_context: ReqContext) -> LookupResult:
        if req_context.req_id in self._no_loads:
            return LookupResult.MISS
        tier = self._core.lookup(self._key(key, req_context))
        if tier is None:
            self._core.counters["kvoffload_missed_blocks_total",] += 1
            return LookupResult.MISS
        if not req_context.load_tier_filter.allows(MEDIUM[tier], Locality.LOCAL):
            return LookupResult.MISS
        return LookupResult.HIT

    def get_load_source(self, key: OffloadKey, req_context: ReqContext) -> CacheHitSource:
        tier = self._core.tier(self._key(key, req_context))
        return SOURCE[tier] if tier else CacheHitSource.EXTERNAL_UNSPECIFIED

    def prepare_load(self, keys: Collection[OffloadKey], req_context: ReqContext) -> SlotSpec:
        own_keys = self._keys(keys, req_context)
        for key in own_keys:
            self._core.counters["kvoffload_hit_blocks_total", str(self._core.tier(key))] += 1
        return SlotSpec.of(self._core.load(own_keys, req_context.req_id))

    def complete_load(self, keys: Collection[OffloadKey], req_context: ReqContext) -> None:
        own_keys = self._keys(keys, req_context)
        failed = self._failed.intersection(own_keys)
        self._failed -= failed
        self._core.load_done(own_keys, req_context.req_id, failed)
        if failed:
            logger.warning("kvoffload: request %s: %d of %d blocks did not load; it recomputes",
                           req_context.req_id, len(failed), len(own_keys))  # fmt: skip
            self._no_loads.add(req_context.req_id)

    def prepare_store(self, keys: Collection[OffloadKey], req_context: ReqContext) -> PrepareStoreOutput | None:
        if not self._settings.enabled:
            return PrepareStoreOutput([], SlotSpec.of([]), [])
        own_keys = {self._key(key, req_context): key for key in keys}
        placements = self._core.store(
            [(own, self._group_numbers[get_offload_group_idx(key)]) for own, key in own_keys.items()]
        )
        self._core.counters["kvoffload_stored_blocks_total",] += len(placements)
        return PrepareStoreOutput([own_keys[place.key] for place in placements], SlotSpec.of(placements), [])

    def complete_store(self, keys: Collection[OffloadKey], req_context: ReqContext, success: bool = True) -> None:
        own_keys = self._keys(keys, req_context)
        failed = self._failed.intersection(own_keys) if success else set(own_keys)
        self._failed -= failed
        self._core.store_done(own_keys, failed)

    def on_request_finished(self, req_context: ReqContext) -> None:
        self._no_loads.discard(req_context.req_id)
        # vLLM 0.32 calls `touch` nowhere; the positions it notes are the request's keys, head first.
        self._core.touch(self._keys(req_context._offload_key_positions, req_context))

    def on_schedule_end(self, context: ScheduleEndContext) -> None:
        self._core.end_step()

    def has_pending_work(self) -> bool:
        return self._core.pending() or bool(self._attach)

    def reset_cache(self) -> None:
        self._failed.clear()
        self._core.reset()

    def shutdown(self) -> None:
        if self._store is not None:
            self._store.close()

    # -- our own traffic with the workers --------------------------------------------------------------------------

    def take_plan(self) -> TransferPlan:
        """What workers are to do beside vLLM's jobs of this step."""
        attach, self._attach = self._attach, ()
        return TransferPlan(attach=attach, demotions=tuple(self._core.plan()))

    def take_in(self, report: TransferReport) -> None:
        """What workers did. REQUIRES: called before vLLM's scheduler half learns of the jobs that ended with it."""
        self._failed |= report.failed_keys
        for demotion, ranks in report.demoted.items():
            self._core.ack(demotion, ranks, report.failed_demotions.get(demotion, 0))
        if report.attach_error:
            logger.error("kvoffload: the SSD tier is off: %s", report.attach_error)
            self._core.disable_ssd()
        self._core.counters.update(report.counters)

    def get_stats(self) -> OffloadingConnectorStats | None:
        if not self._settings.enabled:
            return None
        stats = OffloadingConnectorStats()
        for (name, *labels), value in self._core.counters.items():
            increase = value - self._reported.get((name, *labels), 0)
            if increase:
                stats.increase_counter(name, increase, tuple(labels))
                self._reported[name, *labels] = value
        for tier, (used, capacity) in self._core.usage().items():
            if tier is Tier.DRAM and not self._core.dram_is_tier:
                continue  # bounce slots are no tier
            gauges = {"kvoffload_used_bytes": used, "kvoffload_capacity_bytes": capacity}
            for name, slots in gauges.items():
                value = slots * self._block_bytes
                if self._reported.get((name, tier)) != value:
                    stats.set_gauge(name, value, (tier.value,))
                    self._reported[name, tier] = value
        return None if stats.is_empty() else stats
