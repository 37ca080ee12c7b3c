"""Digests of large files, remembered below an nvme_path, so that a start reads only the files that changed.

Weights are told apart by their content, since retrained ones have the same names, sizes and headers. Reading hundreds of
GB at every start would cost minutes, so a digest is kept under what tells that a file has not changed: where it is, its
inode, its size and both of its times to the nanosecond. The time of its last change of any kind (ctime) cannot be set by a
program, so neither `cp -p` nor `touch -d` hides new content.
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


def _stamp(path: Path, found: os.stat_result) -> str:
    """What is different after the file changed."""
    parts = (path, found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
    return hashlib.blake2b("\0".join(map(str, parts)).encode(errors="surrogateescape"), digest_size=16).hexdigest()


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
        """The digest of the file's content; `compute` is asked for it if the file may have changed since it was last."""
        found = os.stat(path)
        stamp = _stamp(path, found)
        if stamp in self._known:
            return self._known[stamp]
        is_settled = time.time() - max(found.st_mtime, found.st_ctime) > SETTLE_SECONDS
        digest = compute(path)
        if is_settled:  # should it change while it is read, this stamp never comes again
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
