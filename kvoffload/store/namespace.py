"""Which cache a deployment may read, who holds it, and its manifest in clear text."""

import fcntl
import hashlib
import json
import logging
import os
import re
import stat
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Self

from ..errors import StoreError
from ..layout import FORMAT_VERSION
from .directory import Directory
from .slotfile import REMEDY

logger = logging.getLogger(__name__)

ROOT = "kvoffload"  # the only name ever made directly below an nvme_path
ROOT_LOCK = ".lock"
LOCK = "lock"
MANIFEST = "manifest.json"
_MANIFEST_BYTES_MAX = 1 << 20
_NAMESPACE_PATTERN = re.compile(r"[0-9a-f]{32}")
ROOT_LOCK_SECONDS = 60.0
NAMESPACE_LOCK_SECONDS = 5.0
_POLL_SECONDS = 0.05


@dataclass(frozen=True)
class Identity:
    """Everything that must be equal for two engines to share bytes."""

    text: str  # canonical JSON
    digest: bytes

    @classmethod
    def of(cls, fields: Mapping[str, object], payload_bytes: int, ranks: int) -> Self:
        """TypeError or ValueError if a field can not be written as JSON."""
        text = json.dumps(
            {
                "fields": dict(fields),
                "format_version": FORMAT_VERSION,
                "payload_bytes": payload_bytes,
                "ranks": ranks,
            },
            sort_keys=True,
            separators=(",", ":"),
            allow_nan=False,
        )
        return cls(text, hashlib.blake2b(text.encode(), digest_size=32).digest())

    @property
    def namespace(self) -> str:
        """The directory's name."""
        return self.digest.hex()[:32]

    @property
    def fingerprint(self) -> bytes:
        """What the journal carries; 16 bytes."""
        return self.digest[:16]

    def rank_fingerprint(self, rank: int, ranks: int) -> bytes:
        """What a rank's superblocks and slots carry; 16 bytes."""
        return hashlib.blake2b(self.digest + f"/{rank}/{ranks}".encode(), digest_size=16).digest()


class Lock:
    """A held flock; released by `release`, or by the kernel when the process ends."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    @classmethod
    def try_hold(cls, directory: Directory, name: str) -> Self | None:
        """Hold the lock file `name` and write our pid into it; None if another holds it."""
        fd = directory.open_file(name, os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            return None
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        return cls(fd)

    def release(self) -> None:
        os.close(self._fd)


def holder(directory: Directory, name: str) -> str:
    """The pid written in a lock file, for messages."""
    text = (directory.read(name, 32) or b"").decode("ascii", "replace").strip()
    return f"process {text}" if text else "another process"


def hold_root(root: Directory) -> Lock:
    """Hold the lock under which capacity is decided and namespaces come and go; waits for others, not forever."""
    lock = _wait_for(root, ROOT_LOCK, ROOT_LOCK_SECONDS)
    if lock is None:
        raise StoreError(
            f"{root.path} has been locked for {ROOT_LOCK_SECONDS:.0f} s by {holder(root, ROOT_LOCK)}, "
            "which is opening or cleaning a store there: stop it or wait for it"
        )
    return lock


def hold_namespace(directory: Directory) -> Lock:
    """Hold a namespace; waits a little, because an engine that was just killed may take seconds to be gone."""
    lock = _wait_for(directory, LOCK, NAMESPACE_LOCK_SECONDS)
    if lock is None:
        raise StoreError(
            f"{directory.path} is in use by {holder(directory, LOCK)}: stop that engine, or give this one another nvme_path"
        )
    return lock


def _wait_for(directory: Directory, name: str, seconds: float) -> Lock | None:
    deadline = time.monotonic() + seconds
    while (lock := Lock.try_hold(directory, name)) is None and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
    return lock


def is_namespace(root: Directory, name: str) -> bool:
    """Whether `name` has the pattern of a namespace and is a real directory below the root."""
    if not _NAMESPACE_PATTERN.fullmatch(name):
        return False
    return stat.S_ISDIR(os.stat(name, dir_fd=root.fd, follow_symlinks=False).st_mode)


def is_held(directory: Directory) -> bool:
    """Whether a live engine holds this namespace. Call with the root lock held, so that none can arrive meanwhile."""
    try:
        fd = directory.open_file(LOCK, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


_OWN_FILES = re.compile(r"(manifest\.json|lock|index\.journal|rank\d+of\d+\.slots)(\.tmp)?")


def clean(root: Directory, keep: str) -> None:
    """Remove every namespace but `keep` that no engine holds. Call with the root lock held."""
    for name in root.names():
        if name == keep or not is_namespace(root, name):
            continue
        try:
            with root.child(name) as directory:
                if is_held(directory):
                    continue
                remove(root, directory)
        except (OSError, StoreError) as error:
            # One that can not be removed keeps counting against the cap; that is no reason not to serve.
            logger.warning("obsolete namespace %s was not removed: %s", os.path.join(root.path, name), error)
        else:
            logger.info("removed obsolete namespace %s", os.path.join(root.path, name))


def remove(root: Directory, directory: Directory) -> None:
    """Remove a namespace's files and its directory; OSError, with the directory left, if it holds anything else."""
    # The journal comes first: a namespace without one is empty, whatever else is left of it.
    for file in sorted(directory.names(), key=lambda file: not file.startswith("index.journal")):
        if _OWN_FILES.fullmatch(file):
            directory.remove(file)
    os.rmdir(os.path.basename(directory.path), dir_fd=root.fd)


@dataclass(frozen=True)
class Manifest:
    """What manifest.json says besides the identity."""

    path_index: int
    paths: tuple[str, ...]
    slot_count: int
    reserved_bytes: int  # on this path, once every slot has been written
    created: str

    @classmethod
    def read(cls, directory: Directory) -> Self | None:
        """None if there is no manifest; StoreError if there is one that can not be understood."""
        data = directory.read(MANIFEST, _MANIFEST_BYTES_MAX)
        if data is None:
            return None
        path = os.path.join(directory.path, MANIFEST)
        try:
            found: dict[str, Any] = json.loads(data)
            version = int(found["format_version"])
            if version > FORMAT_VERSION:
                raise StoreError(
                    f"{path} has format {version}, newer than {FORMAT_VERSION}, the newest this kvoffload reads: "
                    f"use the newer kvoffload, or {REMEDY}"
                )
            return cls(
                path_index=int(found["path_index"]),
                paths=tuple(str(each) for each in found["paths"]),
                slot_count=int(found["slot_count"]),
                reserved_bytes=int(found["reserved_bytes"]),
                created=str(found["created"]),
            )
        except StoreError:
            raise
        except (ValueError, KeyError, TypeError) as error:
            raise StoreError(f"{path} is damaged ({error!r}): {REMEDY}") from None

    def write(self, directory: Directory, identity: Identity) -> None:
        text = json.dumps(
            {
                "format": "kvoffload",
                "format_version": FORMAT_VERSION,
                "namespace": identity.namespace,
                "identity": json.loads(identity.text),
                "path_index": self.path_index,
                "paths": self.paths,
                "slot_count": self.slot_count,
                "reserved_bytes": self.reserved_bytes,
                "created": self.created,
            },
            indent=2,
        )
        os.close(directory.replace(MANIFEST, [text.encode() + b"\n"]))


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
