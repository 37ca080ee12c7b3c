"""A plain loop of os.pwritev and os.preadv on the shared file, one call at a time, from many buffers in turn."""

import os
import time
from collections.abc import Callable, Sequence

import numpy as np

from benchmarks.rows.base import PAGE, HugeBuffers, Place, RowError, Sample, Stopwatch, content


class LoopRow:
    def __init__(self, name: str) -> None:
        self.name = name
        self.fd = -1

    def prepare(self, place: Place) -> None:
        self.place = place
        direct = os.O_DIRECT if place.medium == "drive" else 0
        self.fd = os.open(place.file, os.O_RDWR | direct)
        self.buffers = HugeBuffers(place.buffers, place.slot_bytes)
        self.in_memory = np.arange(place.buffers)
        self.in_file = np.zeros(place.slots, int)

    def _pass(self, call: Callable[[int, list[memoryview], int], int], order: np.ndarray) -> Sample:
        views, size, now = self.buffers.views, self.place.slot_bytes, time.perf_counter
        latencies = []
        with Stopwatch() as watch:
            for turn, slot in enumerate(order.tolist()):
                start = now()
                if call(self.fd, [views[turn % len(views)]], PAGE + slot * size) != size:
                    raise RowError(f"{self.name}: slot {slot} was moved in part only")
                latencies.append(now() - start)
        return watch.sample(len(order) * size, np.array(latencies) * 1e3)

    def write(self, order: np.ndarray) -> Sample:
        sample = self._pass(os.pwritev, order)
        self.in_file[order] = self.in_memory[np.arange(len(order)) % self.place.buffers]
        return sample

    def read(self, order: np.ndarray) -> Sample:
        sample = self._pass(os.preadv, order)
        self.in_memory[np.arange(len(order)) % self.place.buffers] = self.in_file[order]
        return sample

    def check(self, slots: Sequence[int]) -> int:
        for slot in slots:
            self.buffers.array[0] = 0
            os.preadv(self.fd, [self.buffers.views[0]], PAGE + slot * self.place.slot_bytes)
            self.in_memory[0] = self.in_file[slot]
            if not np.array_equal(self.buffers.array[0], content(self.in_file[slot], self.place.slot_bytes)):
                raise RowError(f"{self.name}: slot {slot} holds other bytes than were written")
        return len(slots)

    def notes(self) -> list[str]:
        huge, all_bytes = self.buffers.huge_bytes() >> 20, self.buffers.array.nbytes >> 20
        return [f"{huge} of {all_bytes} MiB of buffers on huge pages", "no checksum"]

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
