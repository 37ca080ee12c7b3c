"""fio as the ceiling: io_uring, buffers on huge pages, the slots of the shared file, no checksum.

It has as many buffers as its depth, the best of three. So few buffers stay in the processor's cache, whose speed a drive of
a virtual machine has too; a second row is fio with as many buffers as the other rows have, which is then its depth.

fio does not touch its buffers before it reads into them, so the time of a read includes the first use of memory (at 16 MiB
and depth 32 that took 18 and 70 % of its rate in two runs). As a mixed job with 100 % reads it fills them at its start.
"""

import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from benchmarks.rows.base import HUGE_PAGE, PAGE, Place, RowError, Sample

DEPTHS = (8, 16, 32)
HUGE_PAGES_RESERVED = Path("/proc/sys/vm/nr_hugepages")
READ_PERCENT = {"write": 0, "read": 100}


def is_installed() -> bool:
    return shutil.which("fio") is not None


def _become_free(count: int) -> bool:
    """Waits until that many reserved huge pages are free: those of an ended process are for a while still held by io_uring,
    and a process that finds too few fails at its first access only (EFAULT)."""
    for _ in range(200):
        if int(re.search(r"HugePages_Free: *(\d+)", Path("/proc/meminfo").read_text())[1]) >= count:
            return True
        time.sleep(0.01)
    return False


@contextmanager
def reserved_huge_pages(count: int) -> Iterator[bool]:
    """Reserves this many more while it is open, if the system lets us; yields whether it did."""
    before = int(HUGE_PAGES_RESERVED.read_text())
    try:
        HUGE_PAGES_RESERVED.write_text(str(before + count))
    except OSError:
        yield False
        return
    try:
        yield _become_free(count)
    finally:
        now = int(HUGE_PAGES_RESERVED.read_text())
        HUGE_PAGES_RESERVED.write_text(str(max(0, now - count)))


class FioRow:
    def __init__(self, name: str, all_buffers: bool = False) -> None:
        self.name, self.all_buffers = name, all_buffers

    def prepare(self, place: Place) -> None:
        self.place, self.pages = place, set()
        self.depths, self.startup_cpu = {}, {}
        for direction in READ_PERCENT:
            self.depths[direction] = place.buffers
            if not self.all_buffers:
                trials = {depth: self._run(direction, depth)[0].gb_per_s for depth in DEPTHS}
                self.depths[direction] = place.depths[direction] = max(trials, key=trials.get)
            if place.medium == "tmpfs":
                one = [self._run(direction, self.depths[direction], place.slot_bytes)[1] for _ in range(3)]
                self.startup_cpu[direction] = sorted(one)[1]

    def _run(self, direction: str, depth: int, nbytes: int = 0) -> tuple[Sample, float]:
        """The sample by fio's own account, and the CPU time of the whole process."""
        needed = -(-depth * self.place.slot_bytes // HUGE_PAGE) + 2  # fio aligns its buffers twice
        with reserved_huge_pages(needed) as is_reserved:
            job, complaint, cpu_seconds = self._start(direction, depth, nbytes, is_reserved)
        if job is None and is_reserved and "Bad address" in complaint:  # somebody else took the pages, or gave ours back
            is_reserved = False
            job, complaint, cpu_seconds = self._start(direction, depth, nbytes, is_reserved)
        if job is None:
            raise RowError(f"{self.name}: fio failed: {complaint.strip()[:300]}")
        self.pages.add("reserved huge pages (mmaphuge)" if is_reserved else "transparent huge pages (malloc, advised)")
        return self._sample(job, direction), cpu_seconds

    def _start(self, direction: str, depth: int, nbytes: int, is_reserved: bool) -> tuple[dict | None, str, float]:
        """What fio says of its job, or None if it failed; its complaint; the CPU time of its process."""
        place = self.place
        environment = dict(os.environ) | ({} if is_reserved else {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"})
        memory = ["--iomem=mmaphuge"] if is_reserved else ["--iomem=malloc", "--iomem_align=2m"]
        command = [
            *("fio", "--name=ceiling", f"--filename={place.file}", f"--offset={PAGE}", "--ioengine=io_uring", *memory),
            *(f"--direct={int(place.medium == 'drive')}", f"--iodepth={depth}", f"--bs={place.slot_bytes}"),
            *(f"--size={place.slots * place.slot_bytes}", f"--io_size={nbytes or place.slots * place.slot_bytes}"),
            *("--rw=randrw", f"--rwmixread={READ_PERCENT[direction]}", "--randrepeat=0", "--scramble_buffers=0"),
            *("--allow_file_create=0", "--fallocate=none", "--invalidate=0"),
            *("--lat_percentiles=1", "--clat_percentiles=0", "--output-format=json"),
        ]
        pipe = subprocess.PIPE
        with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment, cwd=place.folder) as process:
            output, complaint = process.stdout.read(), process.stderr.read()
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        job = json.loads(output)["jobs"][0] if process.returncode == 0 else None
        return job, complaint, usage.ru_utime + usage.ru_stime

    @staticmethod
    def _sample(job: dict, direction: str) -> Sample:
        moved = job[direction]
        seconds = max(moved["runtime"], 1) / 1e3
        percentiles = moved["lat_ns"]["percentile"]
        p50, p99 = (percentiles[f"{percent}.000000"] / 1e6 for percent in (50, 99))
        cpu_seconds = (job["usr_cpu"] + job["sys_cpu"]) / 100 * seconds
        return Sample(moved["io_bytes"], seconds, cpu_seconds, p50, p99)

    def _pass(self, direction: str) -> Sample:
        sample, process_cpu = self._run(direction, self.depths[direction])
        if sample.nbytes != self.place.slots * self.place.slot_bytes:
            raise RowError(f"{self.name}: fio moved {sample.nbytes} bytes only")
        if self.place.medium == "drive":
            return sample
        # Buffered, io_uring hands the work to kernel workers that are threads of the process, but not of fio's account.
        cpu_seconds = max(0.0, process_cpu - self.startup_cpu[direction])
        return Sample(sample.nbytes, sample.seconds, cpu_seconds, sample.p50_ms, sample.p99_ms)

    def write(self, order: np.ndarray) -> Sample:
        return self._pass("write")

    def read(self, order: np.ndarray) -> Sample:
        return self._pass("read")

    def check(self, slots: Sequence[int]) -> int:
        return 0

    def notes(self) -> list[str]:
        depths = ", ".join(f"{direction} depth {depth}" for direction, depth in self.depths.items())
        chosen = depths if self.all_buffers else f"{depths}, the best of {DEPTHS} in one trial each"
        return [chosen, *sorted(self.pages), "slots in an order of its own"]

    def close(self) -> None:
        return
