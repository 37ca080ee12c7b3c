"""The worker side: turns jobs of blocks into the engine's operations, and completions into results. One thread.

It holds no hashes beyond the operations in flight, no index and no policy. A job is a set of blocks that vLLM waits
for together; a demotion is the scheduler side's own and is reported by rank.
"""

import errno
import logging
import math
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from itertools import count, repeat
from typing import Protocol

import numpy as np

from kvoffload.errors import StoreError
from kvoffload.types import (
    KEY_BYTES_MAX,
    NO_SLOT,
    OP_DTYPE,
    BlockKey,
    Demotion,
    OpFlag,
    OpKind,
    SlotFiles,
    TransferPlan,
    TransferReport,
)

logger = logging.getLogger(__name__)

LOAD_TIMEOUT_S, LOAD_BYTES_PER_S = 5.0, 100e6  # a load may take the first, and its bytes over the second
# In the engine at once, which takes 4096, of loads that read a drive and of others: so each finds room beside any number of the
# other, and stores beside both.
READ_OPS_MAX, COPY_OPS_MAX = 2048, 1024
STORE_TIMEOUT_S = 10.0  # vLLM may wait for it before it reuses a block
DEMOTION_TIMEOUT_S = 60.0
BATCH_MAX = 1024  # completions taken in one call
LATENCIES_MAX = 64  # of a direction that are told at once: of a load of thousands of blocks each as it came would be work for all
LOAD_KINDS = (OpKind.READ, OpKind.COPY_IN)
DRIVE_KINDS = (OpKind.READ, OpKind.WRITE)
KINDS = tuple(OpKind)  # by number


class Engine(Protocol):
    """What kvoffload.engine offers; see there."""

    def attach(self, files: SlotFiles) -> None: ...

    def submit(self, ops: np.ndarray, stream: int = 0) -> int: ...

    def poll(self, max_completions: int = BATCH_MAX) -> np.ndarray: ...

    def wait(self, timeout_s: float) -> bool: ...

    def close(self) -> None: ...


@dataclass
class Job:
    """Blocks that are loaded or stored together. `left` counts operations without a completion."""

    id: int  # the caller's
    transfer: int  # the scheduler side's
    left: int
    reads: bool = False  # a load of which not all blocks are in DRAM
    is_urgent: bool = False  # its deadline is the request's, who would recompute from then on; not what a drive is given
    is_probe: bool = False
    longest_s: float = 0.0  # that an operation took
    begun: float = field(default_factory=time.monotonic)
    failed: dict[BlockKey, int] = field(default_factory=dict)  # errno


@dataclass(slots=True)
class Pending:
    """What an operation in flight belongs to: a job, or a demotion."""

    kind: OpKind
    key: BlockKey
    nbytes: int
    drive: int  # of a READ or WRITE: the number of its slot's path
    job: Job | None = None
    demotion: int = 0


@dataclass(eq=False)
class Batch:
    """Operations that the engine had no room for yet."""

    ops: np.ndarray
    deadline: float


def block_ops(kind: OpKind, keys: list[BlockKey], fields: dict[str, object]) -> np.ndarray:
    """Operations of one kind, one per key; `fields` are columns or constants of OP_DTYPE."""
    ops = np.zeros(len(keys), OP_DTYPE)
    ops["key_len"] = [len(key) for key in keys]
    padded = b"".join(key.ljust(KEY_BYTES_MAX, b"\0") for key in keys)
    ops["key"] = np.frombuffer(padded, np.uint8).reshape(len(keys), KEY_BYTES_MAX)
    ops["kind"] = kind
    ops["dram_slot"] = ops["ssd_slot"] = NO_SLOT
    for name, value in fields.items():
        ops[name] = value
    return ops


@dataclass(frozen=True)
class BlockList:
    """The blocks of a job in order: what they are (columns of equal length) and where they lie in the KV cache."""

    transfer: int  # the scheduler side's name for the job, under which failures are reported
    keys: list[BlockKey]
    generations: np.ndarray
    dram_slots: np.ndarray
    ssd_slots: np.ndarray
    kv_blocks: np.ndarray
    groups: np.ndarray
    patience_s: float | None = None  # of a load: when its request would rather recompute

    def columns(self) -> dict[str, object]:
        return {
            "generation": self.generations,
            "dram_slot": self.dram_slots,
            "ssd_slot": self.ssd_slots,
            "kv_block": self.kv_blocks,
            "group": self.groups,
        }


def no_stream() -> int:
    return 0


class Worker:
    """One rank's transfers. `group_bytes[g]`: bytes of a block of group g on this rank.

    `current_stream` gives the handle of the stream after whose present work copies may begin. It is asked again at every
    hand-over to the engine: operations that found no room at first start after later work then, which is right too.
    """

    def __init__(self, engine: Engine, rank: int, group_bytes: list[int], current_stream: Callable[[], int] = no_stream):
        self._engine = engine
        self._rank = rank
        self._group_bytes = group_bytes
        self._current_stream = current_stream
        self._next_op = 0
        self._load_ops = {True: 0, False: 0}  # in the engine, of jobs that read a drive and of others
        self._drives = 1
        self._heard: dict[int, float] = {}  # by drive: when it last ended a read or write, well or not
        self._copying: dict[int, float] = {}  # copies of blocks that were read, since when, the oldest first
        self._pending: dict[int, Pending] = {}
        self._jobs: dict[int, Job] = {}
        self._waiting_copies: deque[Batch] = deque()  # loads from DRAM alone, which need not wait for a drive
        self._waiting_reads: deque[Batch] = deque()  # other loads
        self._waiting_others: deque[Batch] = deque()
        self._finished: list[tuple[int, bool]] = []
        self._report = TransferReport()
        self._counters: Counter[tuple[str, ...]] = Counter()

    # -- what to do --------------------------------------------------------------------------------------------

    def load(self, job_id: int, blocks: BlockList) -> None:
        """Starts loading the blocks: from DRAM where `ssd_slots` is NO_SLOT, else from SSD, by way of the DRAM slot or,
        where that is NO_SLOT, of the engine's spare memory. A block in neither fails."""
        nowhere = (blocks.dram_slots == NO_SLOT) & (blocks.ssd_slots == NO_SLOT)
        if nowhere.any():
            errors = np.where(nowhere, errno.ENOENT, errno.ECANCELED).tolist()
            self.refuse(job_id, blocks.transfer, dict(zip(blocks.keys, errors, strict=True)))
            return
        copies = block_ops(OpKind.COPY_IN, blocks.keys, blocks.columns())
        reads = copies.copy()
        reads["kind"], reads["flags"] = OpKind.READ, OpFlag.LINK
        ops = np.stack([reads, copies], axis=1).reshape(-1)  # each READ right before its COPY_IN
        needed = np.ones(len(ops), bool)
        needed[::2] = blocks.ssd_slots != NO_SLOT
        keys = [blocks.keys[place // 2] for place in np.flatnonzero(needed).tolist()]
        timeout_s = self._load_timeout_s(blocks.groups)
        is_urgent = blocks.patience_s is not None and blocks.patience_s < timeout_s
        if is_urgent:
            timeout_s = blocks.patience_s
        reads = bool(needed[::2].any())
        waiting = self._waiting_reads if reads else self._waiting_copies
        self._start(Job(job_id, blocks.transfer, 0, reads, is_urgent), ops[needed], keys, timeout_s, waiting)

    def _load_timeout_s(self, groups: Iterable[int]) -> float:
        return LOAD_TIMEOUT_S + sum(self._group_bytes[group] for group in groups) / LOAD_BYTES_PER_S

    def store(self, job_id: int, blocks: BlockList) -> None:
        """Starts copying the blocks to their DRAM slots."""
        ops = block_ops(OpKind.COPY_OUT, blocks.keys, blocks.columns())
        self._start(Job(job_id, blocks.transfer, 0), ops, blocks.keys, STORE_TIMEOUT_S, self._waiting_others)

    def refuse(self, job_id: int, transfer: int, errors: dict[BlockKey, int]) -> None:
        """Ends a job that cannot be carried out: its blocks failed, each with its errno."""
        self._finish(Job(job_id, transfer, 0, failed=errors))

    def apply(self, plan: TransferPlan) -> None:
        """Carries out the scheduler side's own part of a step."""
        if plan.attach:
            self._drives = len(plan.attach[self._rank].paths)
            try:
                self._engine.attach(plan.attach[self._rank])
            except StoreError as error:
                logger.error("kvoffload: rank %d cannot use its slot files: %s", self._rank, error)
                self._report.attach_error = f"rank {self._rank}: {error}"
        if plan.demotions:
            self._demote(plan.demotions)
        for probe in plan.probes:
            columns = {"group": probe.groups, "generation": probe.generations, "ssd_slot": probe.ssd_slots}
            ops = block_ops(OpKind.READ, list(probe.keys), columns)
            timeout_s = self._load_timeout_s(probe.groups)
            is_urgent = probe.patience_s < timeout_s
            # A name that none of vLLM's jobs has: those count from 0.
            job = Job(-probe.transfer, probe.transfer, 0, reads=True, is_urgent=is_urgent, is_probe=True)
            self._start(job, ops, list(probe.keys), min(probe.patience_s, timeout_s), self._waiting_reads)

    def _demote(self, demotions: tuple[Demotion, ...]) -> None:
        keys = [demotion.key for demotion in demotions]
        columns = {name: [getattr(d, name) for d in demotions] for name in ("group", "generation", "dram_slot", "ssd_slot")}
        ops = block_ops(OpKind.WRITE, keys, columns)
        self._note(ops, keys, ((None, demotion.id) for demotion in demotions))
        self._waiting_others.append(Batch(ops, time.monotonic() + DEMOTION_TIMEOUT_S))
        self._push()

    def _start(self, job: Job, ops: np.ndarray, keys: list[BlockKey], timeout_s: float, waiting: deque[Batch]) -> None:
        job.left = len(ops)
        if not len(ops):
            self._finish(job)
            return
        self._jobs[job.id] = job
        self._note(ops, keys, repeat((job, 0)))
        waiting.append(Batch(ops, time.monotonic() + timeout_s))
        self._push()

    def _note(self, ops: np.ndarray, keys: list[BlockKey], owners: Iterable[tuple[Job | None, int]]) -> None:
        """Numbers the operations, and remembers of each what it belongs to: its job, or the number of its demotion."""
        first = self._next_op
        self._next_op += len(ops)
        ops["id"] = np.arange(first, self._next_op)
        kinds, groups, drives = ops["kind"].tolist(), ops["group"].tolist(), (ops["ssd_slot"] % self._drives).tolist()
        columns = zip(count(first), kinds, keys, groups, drives, owners, strict=False)  # two of them have no end
        for number, kind, key, group, drive, (job, demotion) in columns:
            self._pending[number] = Pending(KINDS[kind], key, self._group_bytes[group], drive, job, demotion)

    # -- what became of it -------------------------------------------------------------------------------------

    def poll(self) -> None:
        """Takes in what the engine has completed and gives it what it has room for. Never blocks."""
        while self._pending:
            done = self._engine.poll(BATCH_MAX)
            for number, status, usec in done.tolist():
                pending = self._pending[number]
                if pending.kind in LOAD_KINDS and pending.job is not None:
                    self._load_ops[pending.job.reads] -= 1
                self._complete(number, -status, usec / 1e6)
            if len(done) < BATCH_MAX:
                break
        self._push()

    def take_finished(self) -> list[tuple[int, bool]]:
        """Jobs that ended since the last call, and whether all their blocks arrived."""
        finished, self._finished = self._finished, []
        return finished

    def take_report(self) -> TransferReport:
        """What the scheduler side must know since the last call."""
        report, self._report = self._report, TransferReport()
        report.counters, self._counters = dict(self._counters), Counter()
        for direction, seconds in report.latencies.items():
            report.latencies[direction] = seconds[:: math.ceil(len(seconds) / LATENCIES_MAX)]
        return report

    def wait(self, job_ids: Collection[int]) -> None:
        """Sleeps until these jobs ended. They do by their deadline, or when a copy into the KV cache that has begun is done."""
        self.poll()
        while any(job_id in self._jobs for job_id in job_ids):
            self._engine.wait(0.1)
            self.poll()

    def close(self) -> None:
        self._engine.close()

    def _push(self) -> None:
        """Gives the engine what waits, loads first."""
        self._push_from(self._waiting_copies, COPY_OPS_MAX, reads=False)
        self._push_from(self._waiting_reads, READ_OPS_MAX, reads=True)
        self._push_from(self._waiting_others)

    def _push_from(self, batches: deque[Batch], most: int | None = None, reads: bool = False) -> None:
        """`most`: loads of this kind in the engine, if these are loads."""
        if not batches:
            return
        now = time.monotonic()
        for batch in [batch for batch in batches if batch.deadline <= now]:
            self._give_up(batches, batch, errno.ECANCELED)  # never tried, which says nothing about the drive
        while batches:
            batch = batches[0]
            offered = batch.ops if most is None else batch.ops[: max(0, most - self._load_ops[reads])]
            if len(offered) and offered["flags"][-1] == OpFlag.LINK:
                offered = offered[:-1]  # whole pairs
            if not len(offered):
                return
            offered["timeout_us"] = max(1, int((batch.deadline - now) * 1e6))
            try:
                accepted = self._engine.submit(offered, self._current_stream())
            except ValueError as error:  # our mistake, or vLLM's: a failed batch, offered once, rather than a dead engine
                logger.error("kvoffload: rank %d: the engine refuses %d operations: %s", self._rank, len(batch.ops), error)
                self._give_up(batches, batch, errno.EINVAL)
                continue
            if most is not None:
                self._load_ops[reads] += accepted
            batch.ops = batch.ops[accepted:]
            if not len(batch.ops):
                batches.popleft()
            elif accepted < len(offered):
                return

    def _give_up(self, batches: deque[Batch], batch: Batch, error: int) -> None:
        """What is left of the batch fails."""
        batches.remove(batch)
        for number in batch.ops["id"].tolist():
            self._complete(number, error, 0.0)

    def _complete(self, number: int, error: int, seconds: float) -> None:
        pending = self._pending.pop(number)
        direction = pending.kind.name.lower()
        if pending.kind in DRIVE_KINDS and error not in (errno.ETIMEDOUT, errno.ECANCELED):
            self._heard[pending.drive] = time.monotonic()
        if error:
            if error != errno.ECANCELED:
                reason = errno.errorcode.get(error, str(error))
                self._counters["kvoffload_transfer_failures_total", direction, reason] += 1
        else:
            self._counters["kvoffload_transfer_bytes_total", direction] += pending.nbytes
            self._counters["kvoffload_transfer_seconds_total", direction] += seconds
            self._report.latencies.setdefault(direction, []).append(seconds)
        job = pending.job
        if pending.kind is OpKind.READ and not error and not (job is not None and job.is_probe):
            self._copying[number + 1] = time.monotonic()  # see _says_little
        elif pending.kind is OpKind.COPY_IN:
            self._copying.pop(number, None)
        if error == errno.ETIMEDOUT:
            deadline = "request" if job is not None and job.is_urgent else "operation"
            self._counters["kvoffload_deadlines_missed_total", direction, deadline] += 1
        if job is None:
            self._report.demoted[pending.demotion] = 1
            if error:
                self._report.failed_demotions[pending.demotion] = error
            return
        job.left -= 1
        job.longest_s = max(job.longest_s, seconds)
        if error == errno.ETIMEDOUT and pending.kind is OpKind.COPY_IN:
            error = errno.EREMOTEIO  # its turn did not come in time: that is the GPU's doing, for the drive had answered
        elif error == errno.ETIMEDOUT and self._says_little(pending.drive, job):
            # The drive is slow, or much was asked of it; one that ended nothing meanwhile may be stalled: that is told apart here.
            error = errno.ETIME
        if error:
            job.failed.setdefault(pending.key, error)  # of a linked pair the first tells why
        if not job.left:
            del self._jobs[job.id]
            self._finish(job)

    def _says_little(self, drive: int, job: Job) -> bool:
        """Whether the drive may be sound although a load that began then was late. It ended something since; or it was not asked,
        for blocks that were read before wait for the GPU and hold the memory that is read into."""
        oldest = next(iter(self._copying.values()), float("inf"))
        silent_from = max(job.begun, time.monotonic() - LOAD_TIMEOUT_S)
        return self._heard.get(drive, 0.0) > silent_from or oldest <= job.begun

    def _finish(self, job: Job) -> None:
        if job.failed:
            self._report.failed[job.transfer] = job.failed
        if job.is_probe:  # not when that is seen: an idle engine sees nothing
            seconds = time.monotonic() - job.begun if job.failed else job.longest_s
            self._report.probes[job.transfer] = 1, seconds
            return
        self._finished.append((job.id, not job.failed))
