"""How many slots the cap and the drives allow, when everything below kvoffload/ counts."""

import logging
import os
from bisect import bisect_left
from collections.abc import Sequence, Set
from dataclasses import dataclass

from ..errors import StoreError
from ..layout import (
    JOURNAL_BYTES_PER_SLOT,
    NAMESPACE_BYTES,
    SLOTS_MIN,
    SUPERBLOCK_BYTES,
    free_floor,
    local_slots,
    slot_offset,
    ssd_slot_bytes,
    ssd_slots,
)
from . import digests
from .directory import Directory
from .namespace import LOCK, ROOT_LOCK, Manifest, holder, is_held, is_namespace

logger = logging.getLogger(__name__)

AUTOMATIC_SHARE = 0.8  # of what is free, so that the drive is never filled by a cache nobody sized


@dataclass(frozen=True)
class PathUse:
    """Physical bytes below one nvme_path and around it, now."""

    path: str
    device: int
    free: int  # on the file system, to this user, less its floor, once what is obsolete has been removed
    own: int  # held by this namespace
    others: int  # held by everything else below kvoffload/, or reserved by live engines
    siblings: int  # the part of `others` of engines of the same deployment
    pending: int  # the part of `others` that live engines have reserved and not yet allocated


def measure(root: Directory, own_namespace: str, siblings: Set[str], obsolete: Set[str]) -> PathUse:
    """Count what lies below `root`, as if the `obsolete` were gone. Call with the root lock held."""
    own = pending = others = kin = freed = 0
    for name in root.names():
        if name == ROOT_LOCK or name in digests.FILES:
            continue  # part of every namespace's NAMESPACE_BYTES, as the root directory itself is
        physical = root.tree_bytes(name)
        if name in obsolete:
            freed += physical
        elif name == own_namespace:
            own = physical
        else:
            promised = max(0, _reserved(root, name) - physical)
            others += physical + promised
            kin += physical + promised if name in siblings else 0
            pending += promised
    found = os.statvfs(root.fd)
    free = max(0, found.f_bavail * found.f_frsize + freed - free_floor(found.f_blocks * found.f_frsize))
    return PathUse(root.path, os.fstat(root.fd).st_dev, free, own, others, kin, pending)


def _reserved(root: Directory, name: str) -> int:
    """What a live engine has been promised for its namespace; 0 when none holds it. StoreError if that is unknown."""
    if not is_namespace(root, name):
        return 0
    with root.child(name) as directory:
        if not is_held(directory):
            return 0
        try:
            manifest = Manifest.read(directory)
        except StoreError:
            manifest = None  # its remedy is not ours to offer: that cache is another engine's
        if manifest is None:
            raise StoreError(
                f"{directory.path} is in use by {holder(directory, LOCK)}, and without a readable manifest.json nobody "
                "knows how much of the cap that engine holds: stop it, or name another nvme_path"
            )
        return manifest.reserved_bytes


@dataclass(frozen=True)
class Geometry:
    """What a block costs."""

    payload_bytes: int
    ranks: int
    paths: int

    @property
    def least(self) -> int:
        """The fewest blocks worth having: every path shall hold one."""
        return max(SLOTS_MIN, self.paths)

    def slots(self, budget: int) -> int:
        """Blocks that fit `budget` bytes over all paths and ranks."""
        return ssd_slots(budget, self.payload_bytes, self.ranks, self.paths)

    def path_bytes(self, path_index: int, slot_count: int) -> int:
        """Bytes on one path once every slot has been written."""
        local = local_slots(slot_count, path_index, self.paths)
        journal = slot_count * JOURNAL_BYTES_PER_SLOT if path_index == 0 else 0
        return NAMESPACE_BYTES + self.ranks * (SUPERBLOCK_BYTES + local * ssd_slot_bytes(self.payload_bytes)) + journal

    def still_needed(self, path_index: int, slot_count: int, own: int) -> int:
        """Bytes to be free for a namespace that holds `own` bytes of the path.

        Nothing once the slot files have their full length: what they may hold beyond their bytes is a bound for what the
        file system may charge while they grow, and most of it is never taken.
        """
        full = self.ranks * slot_offset(local_slots(slot_count, path_index, self.paths), self.payload_bytes)
        return max(0, self.path_bytes(path_index, slot_count) - own) if own < full else 0

    def total_bytes(self, slot_count: int) -> int:
        return sum(self.path_bytes(index, slot_count) for index in range(self.paths))


def decide_slots(cap_bytes: int | None, uses: Sequence[PathUse], geometry: Geometry, sharers: int = 1) -> int:
    """How many slots there shall be; None as cap is automatic. StoreError, with figures, if that is impossible.

    sharers: engines of one deployment, each with a namespace of its own, among which the cap is divided evenly.
    A cache that holds blocks already is not refused for want of free space: it gets the slots that fit, with a warning.
    """
    if cap_bytes is None:
        emptiest = min(_free_share(use, uses) for use in uses)
        deployment = emptiest * len(uses) + sum(use.own + use.siblings for use in uses)  # were the others of it not there yet
        budget = int(AUTOMATIC_SHARE * deployment) // sharers
    else:
        # Blocks are striped evenly, so the path with the least room left decides for all.
        budget = min(cap_bytes // sharers, len(uses) * min(cap_bytes // len(uses) - use.others for use in uses))
    slot_count = geometry.slots(budget)
    if slot_count < geometry.least:
        raise StoreError(_too_small(cap_bytes, uses, geometry))
    if cap_bytes is not None and slot_count < (alone := geometry.slots(cap_bytes // sharers)):
        others = sum(use.others for use in uses)
        logger.warning(
            "other caches below nvme_path hold %d bytes of ssd_kv_offload_gb: this one has %d slots instead of %d. Those that "
            "nobody uses are removed by clean_obsolete_kv_cache=true or `kvoffload clean`", others, slot_count, alone,
        )  # fmt: skip
    short = _shortage(uses, geometry, slot_count)
    if short is None:
        return slot_count
    cap = "ssd_kv_offload_gb=-1" if cap_bytes is None else f"ssd_kv_offload_gb ({cap_bytes} bytes)"
    what = f"{short.paths} has {short.free} bytes free beside what is kept for others, but {cap} needs {short.needed} more there"
    if any(geometry.still_needed(index, geometry.least, use.own) for index, use in enumerate(uses)):
        raise StoreError(f"{what}: lower ssd_kv_offload_gb, free space, or name another nvme_path")
    counts = range(geometry.least, slot_count)
    fitting = counts[0] + bisect_left(counts, True, key=lambda count: _shortage(uses, geometry, count) is not None) - 1
    logger.warning("%s: the cache has %d slots instead of %d until it is opened with more free space", what, fitting, slot_count)
    return fitting


def _free_share(use: PathUse, uses: Sequence[PathUse]) -> int:
    """What is free for one path when several lie on the same drive."""
    sharing = [other for other in uses if other.device == use.device]
    return max(0, use.free - sum(other.pending for other in sharing)) // len(sharing)


def _too_small(cap_bytes: int | None, uses: Sequence[PathUse], geometry: Geometry) -> str:
    needed = geometry.total_bytes(geometry.least)
    if cap_bytes is None:
        free = sum(_free_share(use, uses) for use in uses)
        return (
            f"ssd_kv_offload_gb=-1 takes {AUTOMATIC_SHARE:.0%} of what is free, {free} bytes, but {geometry.least} blocks "
            f"need {needed} bytes: free space or name another nvme_path"
        )
    others = sum(use.others for use in uses)
    return (
        f"ssd_kv_offload_gb allows {cap_bytes} bytes, of which other namespaces hold {others}, but the smallest useful "
        f"cache of {geometry.least} blocks needs {needed}: raise ssd_kv_offload_gb or set clean_obsolete_kv_cache=true"
    )


@dataclass(frozen=True)
class Shortage:
    """Of one drive, in bytes."""

    paths: str
    free: int
    needed: int


def _shortage(uses: Sequence[PathUse], geometry: Geometry, slot_count: int) -> Shortage | None:
    """The first drive that has not enough free for the cache to grow to `slot_count` slots."""
    for device in dict.fromkeys(use.device for use in uses):
        sharing = [(index, use) for index, use in enumerate(uses) if use.device == device]
        needed = sum(geometry.still_needed(index, slot_count, use.own) for index, use in sharing)
        free = max(0, min(use.free for _, use in sharing) - sum(use.pending for _, use in sharing))
        if needed > free:
            return Shortage(" and ".join(use.path for _, use in sharing), free, needed)
    return None
