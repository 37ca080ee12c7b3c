"""Sizes and offsets: of a slot, of a slot file, and how many slots a cap in bytes holds. docs/format.md is the manual."""

import math
from dataclasses import dataclass

FORMAT_VERSION = 1
ALIGNMENT = 4096  # of every offset and length given to an O_DIRECT file
HEADER_BYTES = 4096  # before a slot's payload
SUPERBLOCK_BYTES = 4096  # before a slot file's first slot
JOURNAL_BYTES_PER_SLOT = 512  # the journal is compacted before it outgrows this
NAMESPACE_BYTES = 256 * 1024  # directories, manifest, lock and the smallest journal
METADATA_SHARE, METADATA_BYTES_MIN = 200, 64  # of a slot: one part of so many, and no less, for the file system
FLOOR_SHARE, FLOOR_BYTES_MAX = 50, 10 * 2**30  # of a file system: one part of so many, and no more, stays free for others
SLOTS_MIN = 8  # a tier of fewer blocks than this is of no use
SLOTS_MAX = 1 << 28  # whose index takes 100 GB of memory

ARENA_PAGE = 2 * 2**20  # arenas are mapped in huge pages
BOUNCE_STEPS, BOUNCE_BYTES = 6, 2 * 2**30  # per rank, when there is no DRAM tier
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


def local_slots(slot_count: int, path_index: int, path_count: int) -> int:
    """How many of `slot_count` slots, striped over the paths, lie on one of them."""
    return (slot_count - path_index + path_count - 1) // path_count


def ssd_slot_bytes(payload_bytes: int) -> int:
    """What one slot of a slot file costs on SSD, the file system's record of where it lies included.

    That record counts as the file's. ext4 has 12 bytes for every extent, in blocks that may be three quarters empty when
    slots are not first written in their order, and where free space is in pieces every slot is an extent or more.
    """
    size = slot_bytes(payload_bytes)
    return size + max(METADATA_BYTES_MIN, math.ceil(size / METADATA_SHARE))


def free_floor(file_system_bytes: int) -> int:
    """What slot files leave free on their file system when they grow, whatever the cap. Mirrored by csrc/slotfile.c."""
    return min(file_system_bytes // FLOOR_SHARE, FLOOR_BYTES_MAX)


def ssd_slots(cap_bytes: int, payload_bytes: int, ranks: int, paths: int) -> int:
    """How many blocks fit on SSD when `cap_bytes` covers slot files of all ranks, journal and directories."""
    fixed = NAMESPACE_BYTES * paths + SUPERBLOCK_BYTES * paths * ranks
    fitting = (cap_bytes - fixed) // (ranks * ssd_slot_bytes(payload_bytes) + JOURNAL_BYTES_PER_SLOT)
    return max(0, min(SLOTS_MAX, fitting))


@dataclass(frozen=True)
class DramPlan:
    """How one rank's arena is divided, and whether the scheduler may keep blocks in it."""

    slots: int
    spares: int
    is_tier: bool  # False: slots only carry blocks to the SSD and are freed once they are there


def dram_plan(cap_bytes: int, payload_bytes: int, ranks: int, blocks_per_step: int) -> DramPlan:
    """Divide the DRAM cap (all ranks together) into slots; a cap of 0 gives a bounce pool outside any cap.

    blocks_per_step: the most blocks one step of the model can complete. The bounce pool holds those of several steps,
    since that long passes between a block's store and the acknowledgement that it is on SSD.
    """
    slot = slot_bytes(payload_bytes)
    spares = spare_slots(payload_bytes)
    if cap_bytes == 0:
        wanted = min(BOUNCE_STEPS * blocks_per_step, BOUNCE_BYTES // slot)
        return DramPlan(slots=max(spares, wanted), spares=spares, is_tier=False)
    total = cap_bytes // ranks // ARENA_PAGE * ARENA_PAGE // slot
    spares = min(spares, max(SPARE_SLOTS_MIN, total // 8))
    return DramPlan(slots=max(0, total - spares), spares=spares, is_tier=True)


def least_dram_bytes(payload_bytes: int, ranks: int) -> int:
    """The smallest DRAM cap that `dram_plan` makes a tier of SLOTS_MIN blocks of."""
    needed = (SLOTS_MIN + SPARE_SLOTS_MIN) * slot_bytes(payload_bytes)
    return ranks * math.ceil(needed / ARENA_PAGE) * ARENA_PAGE
