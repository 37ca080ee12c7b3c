"""The worker half between vLLM's jobs and the engine: failed loads, and how either kind of vLLM is told of them."""

import errno
from types import SimpleNamespace

import numpy as np
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.common import (
    OffloadingConnectorMetadata,
    OffloadingWorkerMetadata,
)
from vllm.v1.kv_offload.base import GPULoadStoreSpec

from kvoffload.vllm import worker
from kvoffload.vllm.connector import ConnectorWorker, KVOffloadConnector
from kvoffload.vllm.transfer import SlotSpec
from kvoffload.vllm.worker import WorkerAdapter, stream_of


class FakeWorker:
    """Ends every job at once; those of `failing` transfers did not arrive."""

    def __init__(self, failing: set[int]):
        self._failing = failing
        self._finished: list[tuple[int, bool]] = []

    def load(self, job_id, blocks):
        self._finished.append((job_id, blocks.transfer not in self._failing))

    store = load

    def refuse(self, job_id, transfer, errors):
        assert set(errors.values()) == {errno.ECANCELED}
        self._finished.append((job_id, False))

    def poll(self):
        return

    def take_finished(self):
        finished, self._finished = self._finished, []
        return finished


def slots(transfer: int, count: int) -> SlotSpec:
    columns = [np.zeros(count, np.uint64), *(np.zeros(count, np.uint32) for _ in range(2))]
    return SlotSpec(transfer, [b"key"] * count, *columns)


def kv_blocks(*blocks: int) -> GPULoadStoreSpec:
    return GPULoadStoreSpec(list(blocks), group_sizes=[len(blocks)], block_indices=[0])


def connector_over(adapter: WorkerAdapter, loads: dict[int, str]) -> KVOffloadConnector:
    """Its worker half alone, with these loads in flight, as job and request."""
    half = ConnectorWorker.__new__(ConnectorWorker)
    half.worker, half._load_jobs, half._connector_worker_meta = adapter, loads, OffloadingWorkerMetadata()
    connector = KVOffloadConnector.__new__(KVOffloadConnector)
    connector.connector_worker, connector._connector_metadata = half, OffloadingConnectorMetadata({}, {}, set())
    return connector


def started() -> WorkerAdapter:
    adapter = WorkerAdapter(FakeWorker(failing={2, 3}), engine=SimpleNamespace())
    adapter.submit_load(10, slots(1, 2), kv_blocks(4, 5))
    adapter.submit_load(11, slots(2, 3), kv_blocks(7, 8, 9))
    adapter.submit_store(12, kv_blocks(1), slots(3, 1))
    adapter.submit_load(13, slots(4, 2), kv_blocks(20))  # a pairing nobody understands
    return adapter


LOADS = {10: "good", 11: "bad", 13: "odd"}


def test_failed_loads_are_reported_by_request_and_then_not_by_block():
    connector = connector_over(started(), dict(LOADS))
    results = connector.get_transfer_results(set())
    assert results.finished_recving == set(LOADS.values())
    assert results.failed_recving == {"bad", "odd"}
    assert connector.get_block_ids_with_load_errors() == set()


def test_a_vllm_that_does_not_ask_by_request_gets_all_blocks_of_failed_loads_once():
    connector = connector_over(started(), dict(LOADS))
    assert connector.get_finished(set()) == (set(), set(LOADS.values()))
    assert connector.get_block_ids_with_load_errors() == {7, 8, 9, 20}
    assert connector.get_block_ids_with_load_errors() == set()


def test_copies_are_ordered_after_the_stream_that_is_current_when_they_are_handed_over(monkeypatch):
    current = {3: 0}
    streams = SimpleNamespace(current_stream=lambda device: SimpleNamespace(cuda_stream=current[device]))
    monkeypatch.setattr(worker.torch, "cuda", streams)
    ask = stream_of(3)
    assert ask() == 0
    current[3] = 77
    assert ask() == 77
    assert stream_of(None)() == 0
