"""vLLM's file-system tier: its own batch functions, thread pool and shared-memory region, driven as its manager does.

A block is a file, named and nested as vLLM's FileMapper does it. Every store pass stores under new names in the folders
of the pass before, as in a cache that is long in use; the first pass, which makes the folders, is not counted.
"""

import contextlib
import functools
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from benchmarks.rows.base import Place, RowError, Sample, Stopwatch, content, settle

JOB_BLOCKS = 8
THREADS = 16  # of each of the pool's two kinds, vLLM's default


@contextlib.contextmanager
def quiet_vllm() -> Iterator[None]:
    """vLLM reads its log level when it is imported; processes started later must not inherit ours."""
    before = os.environ.get("VLLM_LOGGING_LEVEL")
    os.environ["VLLM_LOGGING_LEVEL"] = before or "ERROR"
    try:
        yield
    finally:
        if before is None:
            del os.environ["VLLM_LOGGING_LEVEL"]


class VllmFsRow:
    def __init__(self, name: str) -> None:
        self.name = name
        self.pool = self.region = None
        self.view: memoryview | None = None

    def prepare(self, place: Place) -> None:
        # Imported here: it takes seconds, and who leaves this row out needs no vLLM.
        with quiet_vllm():
            from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion
            from vllm.v1.kv_offload.tiering.fs import io
            from vllm.v1.kv_offload.tiering.fs.thread_pool import DualQueueThreadPool

        self.place, self.io = place, io
        self.is_direct = io.probe_o_direct(str(place.folder))
        self.region = SharedOffloadRegion(f"benchmark_{os.getpid()}", place.buffers, None, place.slot_bytes, place.slot_bytes)
        self.view = self.region.create_kv_memoryview()
        self._fill()
        self.pool = DualQueueThreadPool(THREADS, THREADS)
        self.job = self.passes = 0
        self.paths: list[str] = [""] * place.slots
        self.in_file = np.zeros(place.slots, int)

    def _fill(self) -> None:
        for chunk, row in enumerate(np.asarray(self.view).view(np.uint8)):
            row[:] = content(chunk, self.place.slot_bytes)
        self.is_filled = True

    def _path(self, slot: int) -> str:
        folder = hashlib.sha256(slot.to_bytes(8)).hexdigest()[:5]
        name = folder + hashlib.sha256(b"%d %d" % (slot, self.passes)).hexdigest()[5:]
        return f"{self.place.folder}/vllm_r0/{name[:3]}/{name[3:5]}_g0/{name}.bin"

    def _pass(self, enqueue: Callable, function: Callable, order: np.ndarray) -> Sample:
        size, chunks = self.place.slot_bytes, self.place.buffers
        jobs = []
        for start in range(0, len(order), JOB_BLOCKS):
            slots = order[start : start + JOB_BLOCKS].tolist()
            offsets = [turn % chunks * size for turn in range(start, start + len(slots))]
            paths = [self.paths[slot] for slot in slots]
            jobs.append(functools.partial(function, paths, self.view, offsets, size, self.is_direct))
        with Stopwatch() as watch:
            for job, task in enumerate(jobs):
                enqueue(job, 1, [task])
            self.pool.wait_idle()
        finished = self.pool.get_finished()
        if len(finished) != len(jobs) or not all(success for _, success, _ in finished):
            raise RowError(f"{self.name}: not every job succeeded, see the log")
        return watch.sample(len(order) * size, np.array([seconds for *_, seconds in finished]) * 1e3)

    def write(self, order: np.ndarray) -> Sample:
        if not self.is_filled:
            self._fill()
        self.passes += 1
        for slot in order.tolist():
            if self.paths[slot]:
                os.unlink(self.paths[slot])
            self.paths[slot] = self._path(slot)
        settle(self.place.folder)
        sample = self._pass(self.pool.enqueue_store, self.io.batch_store_block, order)
        self.in_file[order] = np.arange(len(order)) % self.place.buffers
        return sample

    def read(self, order: np.ndarray) -> Sample:
        self.is_filled = False
        return self._pass(self.pool.enqueue_load, self.io.batch_load_block, order)

    def check(self, slots: Sequence[int]) -> int:
        self.is_filled = False
        first = np.asarray(self.view).view(np.uint8)[0]
        for slot in slots:
            first[:] = 0
            self.io.batch_load_block([self.paths[slot]], self.view, [0], self.place.slot_bytes, self.is_direct)
            if not np.array_equal(first, content(self.in_file[slot], self.place.slot_bytes)):
                raise RowError(f"{self.name}: the file of slot {slot} holds other bytes than were stored")
        return len(slots)

    def notes(self) -> list[str]:
        return [
            "O_DIRECT" if self.is_direct else "buffered",
            f"latency is of a job of {JOB_BLOCKS} blocks, from its start in a thread, not from when it was queued",
            "no checksum; a file a block, folders exist",
        ]

    def close(self) -> None:
        if self.pool is not None:
            self.pool.shutdown()
        self.view = None
        if self.region is not None:
            self.region.cleanup()
        self.pool = self.region = None
