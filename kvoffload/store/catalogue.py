"""What lies below an nvme_path, for people and tools. Nothing is changed by looking, and a running engine is not disturbed."""

import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from ..errors import StoreError
from ..layout import free_floor
from . import journal, namespace, slotfile
from .directory import Directory, explain, explained
from .journal import Journal
from .namespace import LOCK, MANIFEST, MANIFEST_BYTES_MAX, OWN_FILES, ROOT, Identity, Manifest
from .slotfile import Superblock

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
    trouble: str  # why it cannot be read, by engines neither; "" if nothing is wrong that can be seen without reading the slots
    refusal: str  # why an engine would refuse it as it is: its trouble, or that its files, each sound, do not belong together
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
    """None if `name` is no namespace, or none any more."""
    try:
        if not namespace.is_namespace(root, name):
            return None
        used_at = os.stat(name, dir_fd=root.fd, follow_symlinks=False).st_mtime
        path = os.path.join(root.path, name)
        try:
            with root.child(name) as directory:
                return _look_into(directory, root, nvme_path, name)
        except FileNotFoundError:
            raise
        except OSError as error:
            trouble = str(explain(path, error))
        except StoreError as error:
            trouble = str(error)
        # It must not keep anybody from looking at the others.
        return Cache(nvme_path, name, path, {}, None, None, trouble, trouble, None, 0, used_at, (), None)
    except FileNotFoundError:
        return None


def _look_into(directory: Directory, root: Directory, nvme_path: str, name: str) -> Cache:
    shown = _identity(directory)
    for _ in range(_LOOKS):
        manifest, unread = _patiently(directory, lambda: Manifest.read(directory))
        slots = manifest.slot_count if manifest else 0
        found, unreplayed = _patiently(directory, partial(journal.read, directory, bytes.fromhex(name), slots))
        _, refusal = _patiently(directory, partial(_refuse_mismatch, directory, name, shown, manifest, found))
        if not refusal:  # else what an engine opens just now may have been looked at before and after
            break
    files = directory.names()
    slot_files = tuple(file for file in files if file.endswith(".slots") and OWN_FILES.fullmatch(file))
    unopened = [_patiently(directory, partial(slotfile.read, directory, file))[1] for file in slot_files]
    holder, unheld = _patiently(directory, lambda: namespace.holder(directory, LOCK) if namespace.is_held(directory) else None)
    fields = shown.get("fields")
    trouble = unread or unreplayed or next(filter(None, unopened), "") or unheld
    return Cache(
        nvme_path=nvme_path,
        name=name,
        directory=directory.path,
        fields=fields if isinstance(fields, dict) else {},
        manifest=manifest,
        journal=found and found._replace(good=b""),  # its bytes are for who goes on with it
        trouble=trouble,
        refusal=trouble or refusal,
        holder=holder,
        disk_bytes=root.tree_bytes(name),
        used_at=last_use(directory),
        slot_files=slot_files,
        foreign=next((file for file in files if not OWN_FILES.fullmatch(file)), None),
    )


def _refuse_mismatch(
    directory: Directory, name: str, shown: Mapping[str, Any], manifest: Manifest | None, found: Journal | None
) -> None:
    """As an engine does that opens the namespace; of one whose manifest does not tell what to expect, nothing."""
    ranks, payload_bytes = shown.get("ranks"), shown.get("payload_bytes")
    identity = Identity.shown(shown)
    if manifest is None or identity.namespace != name or not isinstance(ranks, int) or not isinstance(payload_bytes, int):
        return
    index, count = manifest.path_index, len(manifest.paths)
    for rank in range(ranks):
        superblock = Superblock(rank, ranks, index, count, payload_bytes, identity.rank_fingerprint(rank, ranks))
        size = slotfile.check(directory, superblock)
        if found is not None:
            slotfile.refuse_short(directory, superblock, size, found.blocks.highest_slot(index, count))


def _patiently(directory: Directory, action: Callable[[], T]) -> tuple[T | None, str]:
    """What `action` gives, and what is wrong; looked at several times before anything is called wrong."""
    for left in reversed(range(_LOOKS)):
        try:
            return action(), ""
        except FileNotFoundError:
            raise
        except OSError as error:
            trouble = str(explain(directory.path, error))
        except StoreError as error:
            trouble = str(error)
        if left:
            time.sleep(_PAUSE_SECONDS)
    return None, trouble


def last_use(directory: Directory) -> float:
    """When the namespace was last opened (its lock and its journal are written then) or its index last changed."""
    times = [os.fstat(directory.fd).st_mtime]
    times += [changed_at for name in (LOCK, journal.NAME) if (changed_at := directory.changed_at(name)) is not None]
    return max(times)


def _identity(directory: Directory) -> dict[str, Any]:
    """What the manifest shows of it; what is not as we write it is as good as not there."""
    try:
        data = directory.read(MANIFEST, MANIFEST_BYTES_MAX) or b"{}"
        found = json.loads(data, parse_constant=_no_constant)["identity"]
    except (OSError, StoreError, ValueError, KeyError, TypeError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")
