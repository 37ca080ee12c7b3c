"""Which cache a deployment may read, who holds it, and its manifest in clear text."""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import re
import stat
import time
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, ClassVar, Self

from ..errors import StoreError
from ..layout import FORMAT_VERSION
from ..types import NO_SLOT
from .directory import Directory
from .slotfile import REMEDY

logger = logging.getLogger(__name__)

ROOT = "kvoffload"  # the only name ever made directly below an nvme_path
OWN_DIRECTORIES = 2  # between an nvme_path and a namespace's files: that one, and the namespace
ROOT_LOCK = ".lock"
LOCK = "lock"
MANIFEST = "manifest.json"
MANIFEST_BYTES_MAX = 1 << 20
_FIELD_BYTES_MAX = 8192  # of the identity in a manifest, which is a part of every namespace's NAMESPACE_BYTES
_REASON_MAX = 120
_BYTES_MAX = 1 << 63  # no file system holds more
_NAMESPACE_PATTERN = re.compile(r"[0-9a-f]{32}")
ROOT_LOCK_SECONDS = 60.0
NAMESPACE_LOCK_SECONDS = 5.0
SLOT_FILE_LOCK_SECONDS = 5.0
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
        return cls._of_text(text)

    @classmethod
    def shown(cls, shown: Mapping[str, Any]) -> Self:
        """The one that a manifest shows, if it shows all of it; else another."""
        return cls._of_text(json.dumps(shown, sort_keys=True, separators=(",", ":")))

    @classmethod
    def _of_text(cls, text: str) -> Self:
        return cls(text, hashlib.blake2b(text.encode(), digest_size=32).digest())

    def for_people(self) -> dict[str, Any]:
        """What a manifest shows. Lists of a model's unquantised layers can be megabytes: a digest tells such fields apart."""
        shown: dict[str, Any] = json.loads(self.text)
        for name, value in shown["fields"].items():
            text = json.dumps(value).encode()
            if len(text) > _FIELD_BYTES_MAX:
                shown["fields"][name] = {"bytes": len(text), "blake2b": hashlib.blake2b(text, digest_size=16).hexdigest()}
        return shown

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
    """A held flock; released by `release`, or by the kernel when the process ends.

    A flock belongs to everybody who has the descriptor, forked children too, and they may outlive us. So a child closes
    it at once; it must not unlock, for that would release ours as well.
    """

    _held: ClassVar[set["Lock"]] = set()

    def __init__(self, fd: int) -> None:
        """Not to be called directly: see `try_descriptor` and `try_hold`."""
        self._fd: int | None = fd
        self._held.add(self)

    @classmethod
    def try_descriptor(cls, fd: int, operation: int = fcntl.LOCK_EX) -> Self | None:
        """Lock the open file `fd`, which is the lock's from now on; None, and `fd` closed, if another holds it."""
        lock = cls(fd)  # first: a child forked from now on must close it
        try:
            fcntl.flock(fd, operation | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.release()
            return None
        except OSError:
            lock.release()
            raise
        return lock

    @classmethod
    def try_hold(cls, directory: Directory, name: str) -> Self | None:
        """Hold the lock file `name` and write our pid into it; None if another holds it."""
        fd = directory.open_file(name, os.O_RDWR | os.O_CREAT)
        with directory.located(name):
            lock = cls.try_descriptor(fd)
            if lock is None:
                return None
            try:
                os.ftruncate(fd, 0)
                os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
            except OSError:
                lock.release()
                raise
            return lock

    def release(self) -> None:
        """Let go; in a forked child, where it is gone already, nothing."""
        if self._fd is not None:
            self._held.discard(self)
            os.close(self._fd)
            self._fd = None

    @classmethod
    def _leave_to_parent(cls) -> None:
        for lock in tuple(cls._held):
            lock.release()


os.register_at_fork(after_in_child=Lock._leave_to_parent)


def holder(directory: Directory, name: str) -> str:
    """Who holds a lock, by the pid written in its file, for messages."""
    text = (directory.read(name, 32) or b"").decode("ascii", "replace").strip()
    if not text.isdecimal():
        return "another process"
    try:
        os.kill(int(text), 0)
    except (ProcessLookupError, OverflowError):
        return f"a child of process {text}, which is gone"
    except PermissionError:
        pass  # it lives, as another user
    return f"process {text}"


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
    """Whether a live engine holds this namespace. Call with the root lock held, so that none can arrive meanwhile.

    Asked for by a shared lock, so that those who ask at the same time do not take each other for an engine: tools that only
    look do so without the root lock.
    """
    return not is_free(directory, LOCK, fcntl.LOCK_SH, os.O_RDONLY)


def is_free(directory: Directory, name: str, operation: int = fcntl.LOCK_EX, flags: int = os.O_RDWR) -> bool:
    """Whether nobody has a lock on the file `name` now that `operation` would wait for; so too when there is none."""
    try:
        fd = directory.open_file(name, flags)
    except FileNotFoundError:
        return True
    with directory.located(name):
        lock = Lock.try_descriptor(fd, operation)
    if lock is not None:
        lock.release()
    return lock is not None


def has_workers(directory: Directory) -> bool:
    """Whether a worker has a slot file attached. Without an engine that holds the namespace none comes any more."""
    for name in directory.names():
        # What is no regular file no worker attaches.
        with contextlib.suppress(StoreError):
            if name.endswith(".slots") and not is_free(directory, name):
                return True
    return False


def wait_unused(directory: Directory, name: str, deadline: float) -> None:
    """Wait until no worker has the slot file `name` attached; StoreError if one still has at `deadline`.

    The namespace's lock does not tell: it is the scheduler's, and workers may take longer to die. Call with it held.
    """
    while True:
        try:
            if is_free(directory, name):
                return
        except StoreError:
            return  # something else has the name, and no worker attaches that
        if time.monotonic() >= deadline:
            raise StoreError(
                f"slot file {os.path.join(directory.path, name)} is still in use by a worker of an engine that ended: "
                "stop that worker or wait for its end"
            )
        time.sleep(_POLL_SECONDS)


OWN_FILES = re.compile(r"(manifest\.json|lock|index\.journal|rank\d+of\d+\.slots)(\.tmp)?")


def obsolete(root: Directory, keep: Set[str]) -> frozenset[str]:
    """The namespaces but those of `keep` that no engine holds, nor a worker that outlived its engine, and that `clean` can
    remove. Call with the root lock held."""
    found = set()
    for name in root.names():
        if name in keep or not is_namespace(root, name):
            continue
        try:
            with root.child(name) as directory:
                foreign = [file for file in directory.names() if not OWN_FILES.fullmatch(file)]
                if foreign:
                    logger.warning("obsolete namespace %s stays: %s in it is not kvoffload's", directory.path, foreign[0])
                elif is_held(directory):
                    continue
                elif has_workers(directory):
                    logger.warning("obsolete namespace %s stays: a worker of an engine that ended still uses it", directory.path)
                else:
                    found.add(name)
        except (OSError, StoreError) as error:
            logger.warning("obsolete namespace %s stays: %s", os.path.join(root.path, name), error)
    return frozenset(found)


def clean(root: Directory, names: Iterable[str]) -> bool:
    """Remove the namespaces `names`; False if one is left. Call with the root lock held since `obsolete` named them."""
    is_clean = True
    for name in sorted(names):
        path = os.path.join(root.path, name)
        try:
            with root.child(name) as directory:
                remove(root, directory)
        except (OSError, StoreError) as error:
            logger.warning("obsolete namespace %s was not removed: %s", path, error)
            is_clean = False
        else:
            logger.info("removed obsolete namespace %s", path)
    return is_clean


def remove(root: Directory, directory: Directory) -> None:
    """Remove a namespace's files and its directory; OSError, with the directory left, if it holds anything else."""
    # The journal comes first, for good: a namespace without one is empty, whatever else is left of it.
    files = [file for file in directory.names() if OWN_FILES.fullmatch(file)]
    journals = [file for file in files if file.startswith("index.journal")]
    for file in journals:
        directory.remove(file)
    if journals:
        directory.sync()
    for file in files:
        directory.remove(file)
    os.rmdir(os.path.basename(directory.path), dir_fd=root.fd)


def _number(found: Mapping[str, Any], name: str, end: int) -> int:
    """The manifest's number `name`; ValueError unless it is in 0 .. end-1, for a longer one cannot even be told about."""
    number = int(found[name])
    if not 0 <= number < end:
        raise ValueError(f"{name} is out of range")
    return number


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
        data = directory.read(MANIFEST, MANIFEST_BYTES_MAX)
        if data is None:
            return None
        path = os.path.join(directory.path, MANIFEST)
        try:
            found: dict[str, Any] = json.loads(data)
            version = _number(found, "format_version", _BYTES_MAX)
            if version > FORMAT_VERSION:
                raise StoreError(
                    f"{path} has format {version}, newer than {FORMAT_VERSION}, the newest this kvoffload reads: "
                    f"use the newer kvoffload, or {REMEDY}"
                )
            if found["format"] != "kvoffload" or version != FORMAT_VERSION:
                raise ValueError("format")
            return cls(
                path_index=_number(found, "path_index", NO_SLOT),
                paths=tuple(str(each) for each in found["paths"]),
                slot_count=_number(found, "slot_count", NO_SLOT),
                reserved_bytes=_number(found, "reserved_bytes", _BYTES_MAX),
                created=str(found["created"]),
            )
        except StoreError:
            raise
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            # The last two: a number of Infinity, and brackets nested by the thousand.
            # What is found there may be long, and some errors repeat it.
            reason = f"{type(error).__name__}: {error}"[:_REASON_MAX]
            raise StoreError(f"{path} is damaged ({reason}): {REMEDY}") from None

    def write(self, directory: Directory, identity: Identity) -> None:
        text = json.dumps(
            {
                "format": "kvoffload",
                "format_version": FORMAT_VERSION,
                "namespace": identity.namespace,
                "identity": identity.for_people(),
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
