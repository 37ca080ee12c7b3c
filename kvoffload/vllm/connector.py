"""The connector class vLLM loads: vLLM's `OffloadingConnector`, with what it lacks.

It adds failed loads that are recomputed instead of asserted, and our own traffic between scheduler and workers
(demotions and their acknowledgements) inside vLLM's messages.
"""

import logging
from copy import copy
from functools import partial
from typing import TYPE_CHECKING, Any

from kvoffload.vllm import contract  # before what only a vLLM of its window has

# isort: split
from vllm.distributed.kv_transfer.kv_connector.v1 import KVConnectorRole
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.config import build_offloading_config
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.worker import OffloadingConnectorWorker
from vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector import OffloadingConnector
from vllm.platforms import current_platform
from vllm.v1.kv_offload.factory import OffloadingSpecFactory

from kvoffload.errors import ConfigError
from kvoffload.store import Digests
from kvoffload.vllm.geometry import Geometry
from kvoffload.vllm.identity import content_digest, identity_fields
from kvoffload.vllm.manager import ManagerAdapter
from kvoffload.vllm.spec import SPEC_NAME, KVOffloadSpec, user_settings
from kvoffload.vllm.transfer import KVOffloadMetadata, KVOffloadWorkerMetadata
from kvoffload.vllm.worker import OffWorker, WorkerAdapter

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.forward_context import ForwardContext
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

logger = logging.getLogger(__name__)

# vLLM configures only its own loggers; ours speak through the same handlers.
logging.getLogger("kvoffload").handlers = logging.getLogger("vllm").handlers
logging.getLogger("kvoffload").propagate = False
logging.getLogger("kvoffload").setLevel(logging.getLogger("vllm").level)
OffloadingSpecFactory.register_spec(SPEC_NAME, "kvoffload.vllm.spec", KVOffloadSpec.__name__)


def adopt(config: "VllmConfig") -> None:
    """Sets what the user need not: our spec, and recomputation of what does not load. May run more than once."""
    transfer = config.kv_transfer_config
    assert transfer is not None
    transfer.kv_connector_extra_config["spec_name"] = SPEC_NAME
    transfer.kv_load_failure_policy = "recompute"


def refuse_unsupported(config: "VllmConfig", kv_cache_config: "KVCacheConfig") -> None:
    """ConfigError for deployments that would otherwise fail, or worse, later."""
    contract.refuse_unsupported(config, kv_cache_config)
    if config.parallel_config.pipeline_parallel_size > 1:
        # Stages may differ in layers, so in the size of a block, and the scheduler sees one stage only.
        raise ConfigError("kvoffload does not support pipeline parallelism: use tensor parallelism instead")
    if not (current_platform.is_cuda() or current_platform.is_cpu()):  # ROCm calls its device type "cuda"
        raise ConfigError(
            f"kvoffload cannot copy KV blocks on vLLM's {current_platform._enum.name} platform, only on CUDA and CPU: "
            "set disable_kv_cache=true"
        )


class KVOffloadConnector(OffloadingConnector):
    def __init__(self, vllm_config: "VllmConfig", role: KVConnectorRole, kv_cache_config: "KVCacheConfig"):
        adopt(vllm_config)
        settings = user_settings(vllm_config.kv_transfer_config.kv_connector_extra_config)
        if settings.enabled:
            refuse_unsupported(vllm_config, kv_cache_config)
        if settings.disable_gpu_reuse and settings.enabled:
            # vLLM's scheduler makes its KV-cache manager after the connector: no prefix hits in GPU memory then.
            vllm_config.cache_config.enable_prefix_caching = False
        super().__init__(vllm_config, role, kv_cache_config)
        # vLLM's second model runner zeroes a step's new blocks, and copies into them, before it calls handle_preemptions.
        self._overwrites_first = vllm_config.use_v2_model_runner
        geometry = Geometry.of(vllm_config, build_offloading_config(vllm_config, kv_cache_config), kv_cache_config)
        weights_stay = vllm_config.weight_transfer_config is None
        if self.connector_scheduler is not None:
            if settings.enabled and settings.ssd_bytes != 0:
                digests = Digests.load(settings.nvme_path[0])
                identity = identity_fields(vllm_config, kv_cache_config, partial(digests.of, compute=content_digest))
                self._manager.open(geometry, identity, weights_stay)
                digests.save()
            elif settings.enabled:
                self._manager.open(geometry, {}, weights_stay)  # nothing outlives this process, so nothing need be told apart
        elif self.connector_worker is not None:
            spec = self.connector_worker.spec
            assert isinstance(spec, KVOffloadSpec)
            spec.geometry = geometry
            self.connector_worker = ConnectorWorker(spec, *contract.worker_arguments(vllm_config, kv_cache_config))

    @property
    def _manager(self) -> ManagerAdapter:
        assert self.connector_scheduler is not None
        manager = self.connector_scheduler.manager
        assert isinstance(manager, ManagerAdapter)
        return manager

    @property
    def _worker(self) -> "ConnectorWorker":
        assert isinstance(self.connector_worker, ConnectorWorker)
        return self.connector_worker

    # -- scheduler side ------------------------------------------------------------------------------------------

    def on_new_request(self, request: "Request") -> None:
        self._manager.announce(request)
        super().on_new_request(request)

    def get_num_new_matched_tokens(self, request: "Request", num_computed_tokens: int) -> tuple[int | None, bool]:
        self._manager.lift_limit(request, num_computed_tokens)
        found = super().get_num_new_matched_tokens(request, num_computed_tokens)
        if found[0] is None:  # it is to wait for a load of another request that brings blocks of it, too
            is_less = self._manager.forgo_load(request, num_computed_tokens)
        else:
            is_less = self._manager.limit_load(request, num_computed_tokens, found[0])
        if is_less:
            return super().get_num_new_matched_tokens(request, num_computed_tokens)
        return found

    def update_state_after_alloc(self, request: "Request", blocks: "KVCacheBlocks", num_external_tokens: int) -> None:
        super().update_state_after_alloc(request, blocks, num_external_tokens)
        self._manager.note_scheduled(request)

    def request_finished(self, request: "Request", block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        self._manager.note_end(request)
        return super().request_finished(request, block_ids)

    def request_finished_all_groups(
        self, request: "Request", block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        self._manager.note_end(request)
        return super().request_finished_all_groups(request, block_ids)

    def build_connector_meta(self, scheduler_output: "SchedulerOutput") -> KVConnectorMetadata:
        self._manager.note_step(scheduler_output)
        # vLLM may preempt all requests and let them load in one step (a reset), but believes that a preempted one has stores only.
        told = copy(scheduler_output)
        told.preempted_req_ids = (scheduler_output.preempted_req_ids or set()) - self._manager.begun_loads
        meta = super().build_connector_meta(told)
        if self._overwrites_first:
            overwritten = set(scheduler_output.new_block_ids_to_zero or ())
            overwritten |= {copy.dst_block_id for copy in scheduler_output.kv_cache_block_copies or ()}
            self._manager.fail_overwritten(overwritten, meta.store_jobs, meta.jobs_to_flush or ())
        return KVOffloadMetadata(**vars(meta), plan=self._manager.take_plan())

    def update_connector_output(self, connector_output: "KVConnectorOutput") -> None:
        meta = connector_output.kv_connector_worker_meta
        if isinstance(meta, KVOffloadWorkerMetadata):
            self._manager.take_in(meta.report)
        super().update_connector_output(connector_output)

    @classmethod
    def build_prom_metrics(cls, vllm_config: "VllmConfig", *args: Any, **kwargs: Any) -> Any:
        adopt(vllm_config)  # runs in the API server, where no connector is made
        return super().build_prom_metrics(vllm_config, *args, **kwargs)

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: "VllmConfig") -> str | None:
        return contract.preferred_layout() or super().get_required_kvcache_layout(vllm_config)

    # -- worker side ---------------------------------------------------------------------------------------------

    def start_load_kv(self, forward_context: "ForwardContext", **kwargs: Any) -> None:
        assert isinstance(self._connector_metadata, KVOffloadMetadata)
        self._worker.adapter.apply(self._connector_metadata.plan)
        super().start_load_kv(forward_context, **kwargs)

    # vLLM asks for failed loads once in a step: by request here, or, if it is too old to know this call, by block below.
    def get_transfer_results(self, finished_req_ids: set[str]) -> "contract.TransferResults":
        requests = dict(self._worker._load_jobs)  # get_finished forgets them
        sent, received = self.get_finished(finished_req_ids)
        failed = {requests[job] for job in self._worker.adapter.take_failed_loads() if job in requests}
        return contract.TransferResults(sent, received, failed)

    def get_block_ids_with_load_errors(self) -> set[int]:
        return {block for blocks in self._worker.adapter.take_failed_loads().values() for block in blocks}

    def build_connector_worker_meta(self) -> KVOffloadWorkerMetadata | None:
        return self._worker.build_connector_worker_meta() if self.connector_worker is not None else None


class ConnectorWorker(OffloadingConnectorWorker):
    """vLLM's worker half, with our report in its message."""

    @property
    def adapter(self) -> WorkerAdapter | OffWorker:
        assert isinstance(self.worker, WorkerAdapter | OffWorker)
        return self.worker

    def build_connector_worker_meta(self) -> KVOffloadWorkerMetadata | None:
        jobs = super().build_connector_worker_meta()
        report = self.adapter.take_report()
        if jobs is None:
            return KVOffloadWorkerMetadata(report=report) if report else None
        return KVOffloadWorkerMetadata(jobs.completed_jobs, jobs.transfer_stats, report)
