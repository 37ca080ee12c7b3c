"""What travels between scheduler and workers inside vLLM's own messages; all of it is pickled."""

from dataclasses import dataclass, field

import numpy as np
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorWorkerMetadata
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.common import (
    OffloadingConnectorMetadata,
    OffloadingWorkerMetadata,
)
from vllm.v1.kv_offload.base import LoadStoreSpec

from kvoffload.manager import Placement
from kvoffload.types import BlockKey, TransferPlan, TransferReport


@dataclass
class SlotSpec(LoadStoreSpec):
    """The slots of a job's blocks, in the order of vLLM's block ids."""

    transfer: int  # our name for the job; vLLM's job id is not told to the manager
    keys: list[BlockKey]
    generations: np.ndarray
    dram_slots: np.ndarray
    ssd_slots: np.ndarray
    patience_s: float | None = None  # of a load: see BlockList

    @classmethod
    def of(cls, transfer: int, placements: list[Placement], patience_s: float | None = None) -> "SlotSpec":
        return cls(
            transfer=transfer,
            keys=[place.key for place in placements],
            generations=np.array([place.generation for place in placements], np.uint64),
            dram_slots=np.array([place.dram_slot for place in placements], np.uint32),
            ssd_slots=np.array([place.ssd_slot for place in placements], np.uint32),
            patience_s=patience_s,
        )


@dataclass
class KVOffloadMetadata(OffloadingConnectorMetadata):
    """Scheduler to workers: vLLM's jobs, and our plan."""

    plan: TransferPlan = field(default_factory=TransferPlan)


@dataclass
class KVOffloadWorkerMetadata(OffloadingWorkerMetadata):
    """Workers to scheduler: vLLM's finished jobs, and our report."""

    report: TransferReport = field(default_factory=TransferReport)

    def aggregate(self, other: KVConnectorWorkerMetadata) -> "KVOffloadWorkerMetadata":
        assert isinstance(other, KVOffloadWorkerMetadata)
        jobs = super().aggregate(other)
        assert isinstance(jobs, OffloadingWorkerMetadata)
        self.report.add(other.report)
        return KVOffloadWorkerMetadata(jobs.completed_jobs, jobs.transfer_stats, self.report)
