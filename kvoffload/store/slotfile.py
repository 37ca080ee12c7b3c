"""A slot file's superblock: made when the file is created, compared when it is opened. docs/format.md is the manual.

The engine grows the file and fills its slots; the store only ever makes, checks and shortens it.
"""

import logging
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import xxhash
from numpy.typing import NDArray

from ..errors import StoreError
from ..layout import FORMAT_VERSION, SUPERBLOCK_BYTES, local_slots, slot_bytes, slot_offset
from .directory import Directory

logger = logging.getLogger(__name__)

MAGIC = b"KVOFILE1"
_FIELDS = struct.Struct("<8s6IQ16s")  # magic, version, rank, ranks, path index, path count, zero, payload, fingerprint
_CHECKSUM = struct.Struct("<Q")
REMEDY = "set resume_kv_cache=false once to start with an empty cache"


@dataclass(frozen=True)
class Superblock:
    """Which part of which namespace a slot file holds."""

    rank: int
    ranks: int
    path_index: int
    path_count: int
    payload_bytes: int
    fingerprint: bytes

    @property
    def file_name(self) -> str:
        return f"rank{self.rank}of{self.ranks}.slots"

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """Of bytes that `read` found sound."""
        _, _, rank, ranks, path_index, path_count, _, payload_bytes, fingerprint = _FIELDS.unpack_from(data)
        return cls(rank, ranks, path_index, path_count, payload_bytes, fingerprint)

    def encode(self) -> bytes:
        fields = _FIELDS.pack(
            MAGIC,
            FORMAT_VERSION,
            self.rank,
            self.ranks,
            self.path_index,
            self.path_count,
            0,
            self.payload_bytes,
            self.fingerprint,
        )
        return (fields + _CHECKSUM.pack(xxhash.xxh3_64_intdigest(fields))).ljust(SUPERBLOCK_BYTES, b"\0")

    def local_slots(self, slot_count: int) -> int:
        """How many of `slot_count` slots, striped over the paths, lie in this file."""
        return local_slots(slot_count, self.path_index, self.path_count)

    def file_bytes(self, slot_count: int) -> int:
        """The file's size once every slot has been written."""
        return slot_offset(self.local_slots(slot_count), self.payload_bytes)


def create(directory: Directory, superblock: Superblock) -> None:
    """Put an empty slot file in place of whatever has its name."""
    os.close(directory.replace(superblock.file_name, [superblock.encode()]))


def read(directory: Directory, file_name: str) -> tuple[bytes, int] | None:
    """A slot file's superblock, whosever it is, and the file's size in bytes; None if it is missing, StoreError if damaged."""
    try:
        fd = directory.open_file(file_name, os.O_RDONLY)
    except FileNotFoundError:
        return None
    with directory.located(file_name) as path, os.fdopen(fd, "rb") as file:
        found = file.read(SUPERBLOCK_BYTES)
        size = os.fstat(fd).st_size
    if len(found) < SUPERBLOCK_BYTES:
        raise StoreError(f"slot file {path} is truncated ({size} bytes, its superblock has {SUPERBLOCK_BYTES}): {REMEDY}")
    fields = _FIELDS.unpack_from(found)
    if fields[0] != MAGIC:
        raise StoreError(f"slot file {path} is damaged (not a kvoffload slot file): {REMEDY}")
    if fields[1] > FORMAT_VERSION:
        raise StoreError(
            f"slot file {path} has format {fields[1]}, newer than {FORMAT_VERSION}, the newest this kvoffload reads: "
            f"use the newer kvoffload, or {REMEDY}"
        )
    if _CHECKSUM.unpack_from(found, _FIELDS.size)[0] != xxhash.xxh3_64_intdigest(found[: _FIELDS.size]):
        raise StoreError(f"slot file {path} is damaged (its superblock fails its checksum): {REMEDY}")
    return found, size


def check(directory: Directory, superblock: Superblock) -> int | None:
    """The size in bytes of a slot file that is as it should be, None if it is missing, else StoreError."""
    there = read(directory, superblock.file_name)
    if there is None:
        return None
    found, size = there
    if found != superblock.encode():
        fields = _FIELDS.unpack_from(found)
        path = os.path.join(directory.path, superblock.file_name)
        raise StoreError(
            f"slot file {path} has another geometry (rank {fields[2]} of {fields[3]}, path {fields[4]} of {fields[5]}, "
            f"{fields[7]} payload bytes; expected rank {superblock.rank} of {superblock.ranks}, "
            f"path {superblock.path_index} of {superblock.path_count}, {superblock.payload_bytes}): {REMEDY}"
        )
    return size


def refuse_short(directory: Directory, superblock: Superblock, size: int | None, highest: int | None) -> None:
    """StoreError if a file of `size` bytes (None: there is none) cannot hold the highest slot that the journal knows in it."""
    if highest is None:
        return
    needed = superblock.file_bytes(highest + 1)
    if size is None or size < needed:
        state = "missing (" if size is None else f"truncated ({size} bytes, "
        raise StoreError(
            f"slot file {os.path.join(directory.path, superblock.file_name)} is {state}"
            f"the journal knows of blocks up to byte {needed}): {REMEDY}"
        )


def is_longer(directory: Directory, superblock: Superblock, slot_count: int) -> bool:
    """Whether the slot file, which exists, has room for slots beyond `slot_count`."""
    with directory.located(superblock.file_name):
        found = os.stat(superblock.file_name, dir_fd=directory.fd, follow_symlinks=False)
    return found.st_size > superblock.file_bytes(slot_count)


def shorten(directory: Directory, superblock: Superblock, slot_count: int) -> None:
    """Give back the space of slots beyond `slot_count`."""
    if is_longer(directory, superblock, slot_count):
        fd = directory.open_file(superblock.file_name)
        with directory.located(superblock.file_name), os.fdopen(fd, "r+b"):
            os.ftruncate(fd, superblock.file_bytes(slot_count))


class Growth:
    """Makes the slot files' lengths durable, so that what of the journal is on disk never knows more blocks than they hold.

    The engine writes slots and never syncs. After a power loss a slot's content may be gone, which its header tells;
    a file that lost its end would look truncated by somebody's hand.
    """

    def __init__(self, paths: Sequence[tuple[Directory, Sequence[Superblock]]]) -> None:
        self._paths = paths
        self._synced = {(directory.path, superblock.file_name): 0 for directory, files in paths for superblock in files}
        self._failing: set[int] = set()  # paths, of which the log has told

    def sync(self) -> None:
        """Sync the files that grew; OSError or StoreError if one is gone or its drive fails."""
        for directory, files in self._paths:
            self._sync_path(directory, files)

    def reached(self, slots: NDArray[np.uint32]) -> NDArray[np.bool_]:
        """Which of the slots lie where their files reach, whatever happens. Syncs those of the files that grew.

        Of a path whose drive fails it is what was synced before, so one drive's failure is none of the others.
        """
        on = slots % len(self._paths)
        reach = np.zeros(len(self._paths), np.int64)
        for index in np.unique(on):
            directory, files = self._paths[index]
            try:
                self._sync_path(directory, files)
                self._failing.discard(index)
            except (OSError, StoreError) as error:
                if index not in self._failing:
                    logger.warning("slot files cannot be synced (%s): blocks stored in them may be forgotten at restart", error)
                self._failing.add(index)
            reach[index] = min(self._slots(directory, superblock) for superblock in files)
        return slots // len(self._paths) < reach[on]

    def _sync_path(self, directory: Directory, files: Sequence[Superblock]) -> None:
        for name in (superblock.file_name for superblock in files):
            with directory.located(name):
                size = os.stat(name, dir_fd=directory.fd, follow_symlinks=False).st_size
                if size != self._synced[directory.path, name]:
                    fd = directory.open_file(name, os.O_RDONLY)
                    try:
                        os.fsync(fd)
                    finally:
                        os.close(fd)
                    self._synced[directory.path, name] = size

    def _slots(self, directory: Directory, superblock: Superblock) -> int:
        """How many whole slots the file had when it was synced."""
        return (self._synced[directory.path, superblock.file_name] - SUPERBLOCK_BYTES) // slot_bytes(superblock.payload_bytes)
