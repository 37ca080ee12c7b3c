"""The worker half: vLLM's `OffloadingWorker` on top of kvoffload.worker and the engine."""

import errno
import logging
from collections.abc import Callable

import numpy as np
import torch
from vllm.v1.kv_offload.base import (
    CanonicalKVCaches,
    GPULoadStoreSpec,
    LoadStoreSpec,
    OffloadingWorker,
    TransferResult,
)
from vllm.v1.kv_offload.config import OffloadingConfig

from kvoffload.config import Config
from kvoffload.engine import Engine
from kvoffload.types import EngineOptions, TransferPlan, TransferReport
from kvoffload.vllm.geometry import Geometry, check_regions, device_of, regions
from kvoffload.vllm.transfer import SlotSpec
from kvoffload.worker import BlockList, Worker, no_stream

logger = logging.getLogger(__name__)


def open_worker(
    settings: Config, config: OffloadingConfig, geometry: Geometry, kv_caches: CanonicalKVCaches
) -> "WorkerAdapter":
    """Opens this rank's engine over the KV cache."""
    parallel = config.parallel
    plan = geometry.dram_plan(settings)
    device = device_of(kv_caches)
    engine = Engine(EngineOptions(geometry.payload_bytes, dram_slots=plan.slots, spare_slots=plan.spares, device=device))
    groups = regions(kv_caches)
    check_regions(groups, geometry.least_bytes)
    engine.bind(groups)
    for line in engine.describe():
        logger.info("kvoffload: rank %d: %s", parallel.rank, line)
    group_bytes = [sum(region.nbytes for region in group) for group in groups]
    return WorkerAdapter(Worker(engine, parallel.rank, group_bytes, stream_of(device)), engine)


def stream_of(device: int | None) -> Callable[[], int]:
    """Asks for the handle of the stream that the calling thread computes in at that moment."""
    if device is None:
        return no_stream
    return lambda: torch.cuda.current_stream(device).cuda_stream


def _block_list(slots: SlotSpec, blocks: GPULoadStoreSpec) -> BlockList:
    """Pairs slots with KV blocks: both are in group order, one block per key."""
    groups = np.repeat(np.arange(len(blocks.group_sizes), dtype=np.uint16), blocks.group_sizes)
    return BlockList(
        slots.transfer, slots.keys, slots.generations, slots.dram_slots, slots.ssd_slots, blocks.block_ids, groups,
        slots.patience_s,
    )  # fmt: skip


class WorkerAdapter(OffloadingWorker):
    """Jobs always end as a success for vLLM, which asserts it; failed loads leave by `take_failed_loads`."""

    def __init__(self, worker: Worker, engine: Engine):
        self._worker = worker
        self._engine = engine
        self._loads: dict[int, list[int]] = {}  # in flight: their KV blocks
        self._failed_loads: dict[int, list[int]] = {}

    def apply(self, plan: TransferPlan) -> None:
        if not plan:
            return
        self._worker.apply(plan)
        if plan.attach:
            for line in self._engine.describe():
                logger.info("kvoffload: %s", line)

    def submit_store(self, job_id: int, src_spec: GPULoadStoreSpec, dst_spec: LoadStoreSpec) -> bool:
        return self._submit(self._worker.store, job_id, dst_spec, src_spec)

    def submit_load(
        self, job_id: int, src_spec: LoadStoreSpec, dst_spec: GPULoadStoreSpec, expedited: bool = False
    ) -> bool:
        # Since 0.33, for loads that a running request waits for, so that it could not recompute: we never ask for these
        # (sync_load_budget_bytes is no setting of ours).
        assert not expedited
        self._loads[job_id] = dst_spec.block_ids.tolist()
        return self._submit(self._worker.load, job_id, src_spec, dst_spec)

    def _submit(
        self, start: Callable[[int, BlockList], None], job_id: int, slots: LoadStoreSpec, blocks: GPULoadStoreSpec
    ) -> bool:
        assert isinstance(slots, SlotSpec)
        if len(blocks.block_ids) == len(slots.keys):
            start(job_id, _block_list(slots, blocks))
        else:
            # Pairing them up some other way could serve a block's bytes for another's.
            logger.error("kvoffload: vLLM named %d blocks for %d keys; the job fails", len(blocks.block_ids), len(slots.keys))
            self._worker.refuse(job_id, slots.transfer, dict.fromkeys(slots.keys, errno.ECANCELED))
        return True

    def get_finished(self) -> list[TransferResult]:
        self._worker.poll()
        results = []
        for job_id, arrived in self._worker.take_finished():
            blocks = self._loads.pop(job_id, None)
            if blocks is not None and not arrived:
                self._failed_loads[job_id] = blocks
            results.append(TransferResult(job_id, success=True))
        return results

    def take_failed_loads(self) -> dict[int, list[int]]:
        """Loads reported by `get_finished` since the last call of which some block did not arrive, with all KV blocks."""
        failed, self._failed_loads = self._failed_loads, {}
        return failed

    def take_report(self) -> TransferReport:
        return self._worker.take_report()

    def wait(self, job_ids: set[int]) -> None:
        self._worker.wait(job_ids)

    def shutdown(self) -> None:
        self._worker.close()


class OffWorker(OffloadingWorker):
    """Stands where nothing is offloaded. The scheduler side sends it no jobs."""

    def apply(self, plan: TransferPlan) -> None:
        assert not plan

    def submit_store(self, job_id: int, src_spec: GPULoadStoreSpec, dst_spec: LoadStoreSpec) -> bool:
        raise AssertionError("a store while offloading is off")

    def submit_load(
        self, job_id: int, src_spec: LoadStoreSpec, dst_spec: GPULoadStoreSpec, expedited: bool = False
    ) -> bool:
        raise AssertionError("a load while offloading is off")

    def get_finished(self) -> list[TransferResult]:
        return []

    def take_failed_loads(self) -> dict[int, list[int]]:
        return {}

    def take_report(self) -> TransferReport:
        return TransferReport()

    def wait(self, job_ids: set[int]) -> None:
        return
