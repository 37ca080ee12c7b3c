"""Sizes and offsets: of a slot, of a slot file, and how many slots a cap in bytes holds. docs/format.md is the manual."""

import math
from dataclasses import dataclass

FORMAT_VERSION = 1
ALIGNMENT = 4096  # of every offset and length given to an O_DIRECT file
HEADER_BYTES = 4096  # before a slot's payload
SUPERBLOCK_BYTES = 4096  # before a slot file's first slot
JOURNAL_BYTES_PER_SLOT = 512  # the journal is compacted before it outgrows this
NAMESPACE_BYTES = 256 * 1024  # directories, manifest, lock and the smallest journal
SLOTS_MIN = 8  # a tier of fewer blocks than this is of no use

SPARE_BYTES = 256 * 2**20
SPARE_SLOTS_MIN, SPARE_SLOTS_MAX = 4, 64


def slot_bytes(payload_bytes: int) -> int:
    """Bytes of one slot, header included, in DRAM and on SSD alike."""
    return math.ceil((HEADER_BYTES + payload_bytes) / ALIGNMENT) * ALIGNMENT


def slot_offset(index: int, payload_bytes: int) -> int:
    """Where the file's slot number `index` begins."""
    return SUPERBLOCK_BYTES + index * slot_bytes(payload_bytes)


def spare_slots(payload_bytes: int) -> int:
    """Staging slots per rank: enough to keep a drive's queue full, bounded in bytes."""
    return max(SPARE_SLOTS_MIN, min(SPARE_SLOTS_MAX, SPARE_BYTES // slot_bytes(payload_bytes)))


def ssd_slots(cap_bytes: int, payload_bytes: int, ranks: int, paths: int) -> int:
    """How many blocks fit on SSD when `cap_bytes` covers slot files of all ranks, journal and directories."""
    fixed = NAMESPACE_BYTES * paths + SUPERBLOCK_BYTES * paths * ranks
    return max(0, (cap_bytes - fixed) // (ranks * slot_bytes(payload_bytes) + JOURNAL_BYTES_PER_SLOT))


@dataclass(frozen=True)
class DramPlan:
    """How one rank's arena is divided, and whether the scheduler may keep blocks in it."""

    slots: int
    spares: int
    is_tier: bool  # False: slots only carry blocks to the SSD and are freed once they are there


def dram_plan(cap_bytes: int, payload_bytes: int, ranks: int) -> DramPlan:
    """Divide the DRAM cap (all ranks together) into slots; a cap of 0 gives a bounce pool outside any cap."""
    spares = spare_slots(payload_bytes)
    if cap_bytes == 0:
        return DramPlan(slots=spares, spares=spares, is_tier=False)
    total = cap_bytes // (ranks * slot_bytes(payload_bytes))
    spares = min(spares, max(SPARE_SLOTS_MIN, total // 8))
    return DramPlan(slots=max(0, total - spares), spares=spares, is_tier=True)
