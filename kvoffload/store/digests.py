"""Digests of large files, remembered below an nvme_path, so that a start reads only the files that changed.

Weights are told apart by their content, since retrained ones have the same names, sizes and headers. Reading hundreds of
GB at every start would cost minutes, so a digest is kept under what tells that a file has not changed: where it is, its
inode, its size and both of its times to the nanosecond. The time of its last change of any kind (ctime) cannot be set by a
program, so neither `cp -p` nor `touch -d` hides new content. Where that time tells less (see `_tells_changes`), the file is
read at every start.
"""

import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self

from ..errors import StoreError
from .directory import TEMPORARY_SUFFIX, Directory
from .namespace import ROOT, hold_root

logger = logging.getLogger(__name__)

NAME = "digests.json"
FILES = (NAME, NAME + TEMPORARY_SUFFIX)
ENTRIES_MAX = 512  # of about 100 bytes, so that the file is a part of every namespace's NAMESPACE_BYTES
_BYTES_MAX = 128 * ENTRIES_MAX
_HEX = re.compile("[0-9a-f]{32,64}")
SETTLE_SECONDS = 10.0  # a file changed this recently may change again without its times telling, for clocks are coarse
IN_MEMORY = ("tmpfs", "ramfs")  # there a write through a memory mapping may change no time, and reading costs little


def _stamp(path: Path, found: os.stat_result) -> str:
    """What is different after the file changed."""
    parts = (path, found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
    return hashlib.blake2b("\0".join(map(str, parts)).encode(errors="surrogateescape"), digest_size=16).hexdigest()


def _tells_changes(fd: int, found: os.stat_result) -> bool:
    """Whether the file's next change, or another file in its place, will have another stamp."""
    if time.time() - max(found.st_mtime, found.st_ctime) <= SETTLE_SECONDS:
        return False
    # Of whole seconds are the times of coarse clocks, and those in images (squashfs, erofs, ISO 9660): these are what the
    # image's maker said, often the same in every build, and so are the inodes' numbers and the device it is mounted from.
    if found.st_ctime_ns % 10**9 == 0 or file_system(found.st_dev) in IN_MEMORY:
        return False
    try:
        os.fsync(fd)  # a memory mapping's write changes the times only where the page was clean, so all of them shall be
    except OSError:
        return False
    return True


def file_system(device: int) -> str:
    """The kind of file system mounted from the device; "" if the kernel does not list it (a btrfs subvolume)."""
    number = f"{os.major(device)}:{os.minor(device)}"
    for line in Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines():
        mount, _, system = line.partition(" - ")
        if mount.split(" ")[2] == number:
            return system.split(" ")[0]
    return ""


class Digests:
    """What is known of files' content. Without a path, or when what lies there cannot be used, nothing is remembered."""

    def __init__(self, nvme_path: str | None, known: dict[str, str]) -> None:
        """Not to be called directly: see `load`."""
        self._path = nvme_path
        self._known = known
        self._new: dict[str, str] = {}

    @classmethod
    def load(cls, nvme_path: str | None) -> Self:
        """Never raises for what is on disk: what cannot be read is as good as forgotten."""
        try:
            return cls(nvme_path, _read(nvme_path) if nvme_path else {})
        except (OSError, StoreError) as error:
            logger.warning("the digests of the weights cannot be used, so they are computed anew: %s", error)
            return cls(None, {})

    def of(self, path: Path, compute: Callable[[Path], str]) -> str:
        """The digest of the file's content; `compute` is asked for it, by a path of its own, unless it is known and unchanged."""
        # One file from here on: its name may lead to another at any moment, and to this one again later. And a network file
        # system asks its server whether the file changed when it is opened, not for every stat.
        with path.open("rb") as file:
            found = os.fstat(file.fileno())
            stamp = _stamp(path, found)
            if stamp in self._known:
                return self._known[stamp]
            tells_changes = _tells_changes(file.fileno(), found)
            digest = compute(Path(f"/proc/self/fd/{file.fileno()}"))
        if tells_changes:  # should it change while it is read, this stamp never comes again
            self._known[stamp] = self._new[stamp] = digest
        return digest

    def save(self) -> None:
        """Remember what was computed. Call when the store is open. Failing costs time at the next start, no more."""
        if not self._new or self._path is None:
            return
        try:
            with Directory.open(self._path) as parent, parent.child(ROOT) as root:
                lock = hold_root(root)
                try:
                    merged = _parse(root.read(NAME, _BYTES_MAX)) | self._new  # others may have saved since we read
                    newest = dict(list(merged.items())[-ENTRIES_MAX:])
                    os.close(root.replace(NAME, [json.dumps(newest, indent=0).encode()]))
                finally:
                    lock.release()
        except (OSError, StoreError) as error:
            logger.warning("the digests of the weights could not be saved, so they are computed again at the next start: %s", error)


def _read(nvme_path: str) -> dict[str, str]:
    with Directory.open(nvme_path) as parent:
        try:
            root = parent.child(ROOT)
        except FileNotFoundError:
            return {}
        with root:
            return _parse(root.read(NAME, _BYTES_MAX))


def _parse(data: bytes | None) -> dict[str, str]:
    """The entries that are as we write them; of anything else nothing."""
    try:
        found = json.loads(data or b"{}")
    except (ValueError, RecursionError):
        return {}
    if not isinstance(found, dict):
        return {}
    return {key: value for key, value in found.items() if _HEX.fullmatch(key) and isinstance(value, str) and _HEX.fullmatch(value)}
