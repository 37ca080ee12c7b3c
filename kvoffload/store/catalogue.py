"""What lies below an nvme_path, for people and tools. Nothing is changed by looking, and a running engine is not disturbed."""

import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from ..errors import StoreError
from ..layout import free_floor
from . import journal, namespace, slotfile
from .directory import Directory, explained
from .journal import Journal
from .namespace import LOCK, MANIFEST, MANIFEST_BYTES_MAX, OWN_FILES, ROOT, Manifest

_LOOKS, _PAUSE_SECONDS = 4, 0.1  # an engine may be making or replacing files just now
T = TypeVar("T")


@dataclass(frozen=True)
class Cache:
    """A namespace as it lies below one nvme_path, at one moment."""

    nvme_path: str
    name: str
    directory: str
    fields: Mapping[str, Any]  # the identity's, as the manifest shows them; none where it cannot be read
    manifest: Manifest | None
    journal: Journal | None  # lies below the first of several nvme paths
    trouble: str  # why an engine would refuse it; "" if nothing is wrong that can be seen without reading the slots
    holder: str | None  # who uses it
    disk_bytes: int
    used_at: float  # seconds since 1970: when it was last opened or changed
    slot_files: tuple[str, ...]
    foreign: str | None  # a name in it that is not kvoffload's

    @property
    def fingerprint(self) -> bytes:
        return bytes.fromhex(self.name)

    @property
    def model(self) -> str:
        return str(self.fields.get("model", ""))


@dataclass(frozen=True)
class Path:
    """An nvme_path, at one moment."""

    path: str
    caches: list[Cache] = field(default_factory=list)
    total_bytes: int = 0  # of the file system
    free_bytes: int = 0
    kept_free_bytes: int = 0  # of these, what slot files leave free for others


def look(nvme_path: str) -> Path:
    """StoreError if the path holds no store or cannot be read."""
    with explained(nvme_path), open_root(nvme_path, only_look=True) as root:
        caches = [cache for name in root.names() if (cache := look_at(root, nvme_path, name)) is not None]
        found = os.statvfs(root.fd)
        total, free = found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize
        return Path(nvme_path, caches, total, free, free_floor(total))


def open_root(nvme_path: str, only_look: bool = False) -> Directory:
    """Our directory below an nvme_path; StoreError if there is none."""
    with Directory.open(nvme_path, only_look) as parent:
        try:
            return parent.child(ROOT)
        except FileNotFoundError:
            raise StoreError(
                f"{nvme_path} holds no store of kvoffload: name a directory that an engine has been given as nvme_path"
            ) from None


def look_at(root: Directory, nvme_path: str, name: str) -> Cache | None:
    """None if `name` is no namespace, or none any more. StoreError or OSError if it cannot be looked into at all."""
    try:
        if not namespace.is_namespace(root, name):
            return None
        with root.child(name) as directory:
            return _look_into(directory, root, nvme_path, name)
    except FileNotFoundError:
        return None


def _look_into(directory: Directory, root: Directory, nvme_path: str, name: str) -> Cache:
    manifest, unread = _patiently(lambda: Manifest.read(directory))
    slots = manifest.slot_count if manifest else 0
    found, unreplayed = _patiently(lambda: journal.read(directory, bytes.fromhex(name), slots))
    files = directory.names()
    slot_files = tuple(file for file in files if file.endswith(".slots") and OWN_FILES.fullmatch(file))
    unopened = [trouble for file in slot_files if (trouble := _patiently(lambda file=file: slotfile.read(directory, file))[1])]
    return Cache(
        nvme_path=nvme_path,
        name=name,
        directory=directory.path,
        fields=_fields(directory),
        manifest=manifest,
        journal=found and found._replace(good=b""),  # its bytes are for who goes on with it
        trouble=unread or unreplayed or next(iter(unopened), ""),
        holder=namespace.holder(directory, LOCK) if namespace.is_held(directory) else None,
        disk_bytes=root.tree_bytes(name),
        used_at=last_use(directory),
        slot_files=slot_files,
        foreign=next((file for file in files if not OWN_FILES.fullmatch(file)), None),
    )


def _patiently(action: Callable[[], T]) -> tuple[T | None, str]:
    """What `action` gives, and what is wrong; looked at several times before anything is called wrong."""
    for left in reversed(range(_LOOKS)):
        try:
            return action(), ""
        except StoreError as error:
            trouble = str(error)
        if left:
            time.sleep(_PAUSE_SECONDS)
    return None, trouble


def last_use(directory: Directory) -> float:
    """When the namespace was last opened (its lock and its journal are written then) or its index last changed."""
    times = [os.fstat(directory.fd).st_mtime]
    for name in (LOCK, journal.NAME):
        try:
            times.append(os.stat(name, dir_fd=directory.fd, follow_symlinks=False).st_mtime)
        except FileNotFoundError:
            continue
    return max(times)


def _fields(directory: Directory) -> dict[str, Any]:
    """For people only, so what is not as we write it is as good as not there."""
    try:
        found = json.loads(directory.read(MANIFEST, MANIFEST_BYTES_MAX) or b"{}")["identity"]["fields"]
    except (StoreError, ValueError, KeyError, TypeError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
