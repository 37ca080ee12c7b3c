"""The vocabulary that scheduler side, worker side and engine share.

A block is one KV block of one KV-cache group, over all layers of one rank. The scheduler process keeps the only
index; it tells workers which slots to use, in arrays of operations, and workers answer with completions.
The two numpy dtypes below mirror `kvo_op` and `kvo_completion` of csrc/kvo.h byte for byte.
"""

import errno
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from typing import NamedTuple

import numpy as np

BlockKey = bytes
"""vLLM's offload key: the block's hash followed by the KV-cache group index (4 bytes, big endian)."""

KEY_BYTES_MAX = 40
KEY_ROW = np.dtype(f"V{1 + KEY_BYTES_MAX}")  # a key in a column: its length, the key, zeros
NO_SLOT = 0xFFFFFFFF


def key_row(key: BlockKey) -> bytes:
    """The bytes of a KEY_ROW. REQUIRES: at most KEY_BYTES_MAX bytes."""
    return bytes((len(key),)) + key.ljust(KEY_BYTES_MAX, b"\0")


def key_of_row(row: bytes) -> BlockKey:
    return row[1 : 1 + row[0]]


class Tier(StrEnum):
    DRAM = "dram"
    SSD = "ssd"


class OpKind(IntEnum):
    COPY_OUT = 0  # KV block -> DRAM slot
    COPY_IN = 1  # DRAM slot -> KV block
    WRITE = 2  # DRAM slot -> SSD slot
    READ = 3  # SSD slot -> DRAM slot


class OpFlag(IntEnum):
    LINK = 1  # the next operation of the batch starts only if this one succeeded


OP_DTYPE = np.dtype(
    [
        ("id", "<u8"),
        ("generation", "<u8"),
        ("timeout_us", "<u8"),
        ("kv_block", "<u4"),
        ("dram_slot", "<u4"),
        ("ssd_slot", "<u4"),
        ("group", "<u2"),
        ("kind", "u1"),
        ("flags", "u1"),
        ("key_len", "u1"),
        ("reserved", "u1", (7,)),
        ("key", "u1", (KEY_BYTES_MAX,)),
    ]
)
COMPLETION_DTYPE = np.dtype([("id", "<u8"), ("status", "<i4"), ("usec", "<u4")])


@dataclass(frozen=True)
class Region:
    """Where one layer's bytes of block `b` lie in the KV cache: [base + b * stride, + nbytes)."""

    base: int
    stride: int
    nbytes: int


@dataclass(frozen=True)
class SlotFiles:
    """One rank's slot files. Slot `s` is slot `s // len(paths)` of file `s % len(paths)`."""

    paths: tuple[str, ...]
    slot_count: int  # over all files
    fingerprint: bytes  # 16 bytes; the namespace's digest, found in every superblock and slot header
    own_directories: int = 0  # before each file's name: made by kvoffload, so neither symlinks nor another user's


@dataclass(frozen=True)
class EngineOptions:
    """What one rank's engine allocates when opened; nothing is allocated later."""

    payload_bytes: int  # the largest block of any group on this rank
    dram_slots: int  # slots 0 .. dram_slots-1, addressed by the scheduler
    spare_slots: int  # staging memory the engine uses by itself
    max_ops: int = 4096  # operations accepted and not yet polled
    io_depth: int = 256  # reads and writes in the drives at once; small slots need that many
    io_backend: str = "auto"  # "auto", "io_uring" or "threads"
    device: int | None = None  # CUDA device whose memory holds the KV cache; None: host memory


class Demotion(NamedTuple):
    """One block to be written from its DRAM slot to its SSD slot, by every rank."""

    id: int
    key: BlockKey
    group: int
    generation: int
    dram_slot: int
    ssd_slot: int


@dataclass(frozen=True)
class ProbeRead:
    """Blocks to be read from their SSD slots by every rank for nothing but the time it takes."""

    transfer: int  # the scheduler side's name for it
    keys: tuple[BlockKey, ...]
    groups: tuple[int, ...]
    generations: tuple[int, ...]
    ssd_slots: tuple[int, ...]
    patience_s: float


@dataclass(frozen=True)
class TransferPlan:
    """What the scheduler side asks of every worker in one step, beside vLLM's own load and store jobs."""

    attach: tuple[SlotFiles, ...] = ()  # by rank; given once, before the first operation on an SSD slot
    demotions: tuple[Demotion, ...] = ()
    probes: tuple[ProbeRead, ...] = ()

    def __bool__(self) -> bool:
        return any(vars(self).values())


LATE = (errno.ETIME, errno.ETIMEDOUT)
"""Of a load: its memory is still in use. ETIMEDOUT, the drive should have answered; ETIME, it is slow."""
# Say nothing against the block; with what each weighs where ranks differ, all others weighing DAMAGE.
NOT_OF_BLOCK, DAMAGE = {errno.ECANCELED: 0, errno.EREMOTEIO: 1, errno.ETIME: 3, errno.ETIMEDOUT: 4}, 2


def add_errors(to: dict[BlockKey, int], errors: dict[BlockKey, int]) -> None:
    """Adds what another rank says. Of two errnos for a block lateness stays, for memory that is in use must not be given away
    whatever others say; then damage, then a GPU's failure, then not having been tried."""
    for key, error in errors.items():
        to[key] = max(error, to.get(key, error), key=lambda each: NOT_OF_BLOCK.get(each, DAMAGE))


def add_write_error(to: dict[int, int], demotion: int, error: int) -> None:
    """Adds what another rank says of a demotion. Lateness stays: that write's memory is in use, whatever others say."""
    if to.get(demotion) != errno.ETIMEDOUT:
        to[demotion] = error


@dataclass
class TransferReport:
    """What workers tell the scheduler side in one step; reports of several ranks add up."""

    demoted: dict[int, int] = field(default_factory=dict)  # demotion id -> ranks that finished it, well or not
    failed_demotions: dict[int, int] = field(default_factory=dict)  # demotion id -> errno
    failed: dict[int, dict[BlockKey, int]] = field(default_factory=dict)  # transfer id -> its failed blocks -> errno
    probes: dict[int, tuple[int, float]] = field(default_factory=dict)  # its transfer -> ranks that ended it, seconds
    attach_error: str = ""  # why a rank could not open its slot files
    counters: dict[tuple[str, ...], float] = field(default_factory=dict)  # (name, label values...) -> increase
    latencies: dict[str, list[float]] = field(default_factory=dict)  # direction -> seconds of transfers, some of many

    def __bool__(self) -> bool:
        return any(vars(self).values())

    def add(self, other: "TransferReport") -> None:
        for number, ranks in other.demoted.items():
            self.demoted[number] = self.demoted.get(number, 0) + ranks
        for number, error in other.failed_demotions.items():
            add_write_error(self.failed_demotions, number, error)
        for number, errors in other.failed.items():
            add_errors(self.failed.setdefault(number, {}), errors)
        for number, (ranks, seconds) in other.probes.items():
            before, longest = self.probes.get(number, (0, 0.0))
            self.probes[number] = before + ranks, max(longest, seconds)
        self.attach_error = self.attach_error or other.attach_error
        for name, increase in other.counters.items():
            self.counters[name] = self.counters.get(name, 0) + increase
        for direction, seconds in other.latencies.items():
            self.latencies.setdefault(direction, []).extend(seconds)
