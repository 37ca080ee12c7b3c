"""Removing namespaces on somebody's wish: what an engine or one of its workers uses stays, whatever was asked."""

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from ..errors import StoreError
from . import catalogue, digests, journal, namespace
from .directory import TEMPORARY_SUFFIX, Directory, explained, write_all
from .namespace import LOCK, MANIFEST, OWN_FILES, Lock, Manifest

WIPE_CHUNK_BYTES = 4 << 20
_KEPT = {LOCK, MANIFEST}  # while zeros are written


@dataclass
class _Part:
    """A namespace on one nvme_path, held."""

    root: Directory
    directory: Directory


def remove(
    nvme_paths: Sequence[str],
    chosen: Mapping[str, float],
    wipe: bool = False,
    wiped: Callable[[int], None] = lambda nbytes: None,
) -> dict[str, str]:
    """Remove namespaces below all of the paths; for each, why it stayed, or "" if it is gone.

    chosen: names, and when they were last used as far as the caller knows: one that was used since stays. wipe: write zeros
    over what the files hold, and call `wiped` with the bytes done, before they go. No engine can open a namespace meanwhile:
    the lock under which namespaces come and go is held, and while zeros are written, which may take minutes, the namespace's
    own. By then it is empty, whatever ends us, and what has not been overwritten is found by whoever wipes it again. Its manifest
    goes last, for it says to who else starts how much of the cap this holds.
    """
    with contextlib.ExitStack() as held:
        roots = []
        for path in nvme_paths:
            with explained(path):
                roots.append(held.enter_context(catalogue.open_root(path)))
        outcome: dict[str, str] = {}
        parts: dict[str, list[_Part]] = {}
        with _roots_held(roots):
            for name, used_at in chosen.items():
                outcome[name] = _tried(lambda name=name, used_at=used_at: parts.update({name: _hold(roots, name, used_at, held)}))
            for name in parts:
                step = _forget if wipe else _unlink
                outcome[name] = _tried(lambda name=name, step=step: step(parts[name], wiped))
        if not wipe:
            return outcome
        for name in [name for name in parts if not outcome[name]]:
            outcome[name] = _tried(lambda name=name: _overwrite(parts[name], wiped))
        with _roots_held(roots):
            for name in [name for name in parts if not outcome[name]]:
                outcome[name] = _tried(lambda name=name: _unlink_wiped(parts[name], wiped))
        return outcome


def remove_digests(nvme_path: str) -> None:
    """Forget the digests of model files below a path that has no namespace left."""
    with explained(nvme_path), catalogue.open_root(nvme_path) as root, _roots_held([root]):
        if not any(namespace.is_namespace(root, name) for name in root.names()):
            for name in digests.FILES:
                root.remove(name)


def other_parts(nvme_paths: Sequence[str], name: str, manifest: Manifest) -> list[str]:
    """Paths beside the given ones that hold a part of the namespace: of a part alone, an engine would refuse what is left."""
    found = []
    for index, path in enumerate(manifest.paths):
        # Where this part lay when it was opened last may be a copy of it now.
        if index != manifest.path_index and path not in nvme_paths:
            with contextlib.suppress(OSError, StoreError), catalogue.open_root(path, only_look=True) as root:
                if namespace.is_namespace(root, name):
                    found.append(path)
    return found


@contextlib.contextmanager
def _roots_held(roots: Sequence[Directory]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for root in sorted(roots, key=lambda root: root.path):  # in one order for all, as engines do
            with explained(root.path):
                stack.callback(namespace.hold_root(root).release)
        yield


def _hold(roots: Sequence[Directory], name: str, used_at: float, held: contextlib.ExitStack) -> list[_Part]:
    """The namespace on each path, locked until `held` ends, the journal's first; StoreError if it must stay."""
    with contextlib.ExitStack() as own:
        parts = []
        for root in roots:
            with contextlib.suppress(FileNotFoundError):
                if namespace.is_namespace(root, name):
                    parts.append(_Part(root, own.enter_context(root.child(name))))
        last_use = max((catalogue.last_use(part.directory) for part in parts), default=0.0)
        for part in parts:
            own.callback(_lock(part.directory).release)
        if last_use > used_at:
            raise StoreError("it was used just now: ask again")
        held.push(own.pop_all())
        return sorted(parts, key=lambda part: journal.NAME not in part.directory.names())


def _lock(directory: Directory) -> Lock:
    for file in directory.names():
        if not OWN_FILES.fullmatch(file):
            raise StoreError(f"it holds {file}, which is not kvoffload's: look at it and remove it by hand")
    lock = Lock.try_hold(directory, LOCK)
    if lock is None:
        raise StoreError(f"it is in use by {namespace.holder(directory, LOCK)}: stop that engine first")
    for file in directory.names():
        # Workers may outlive the scheduler that held the lock.
        if file.endswith(".slots") and not namespace.is_free(directory, file):
            lock.release()
            raise StoreError("it is in use by a worker of an engine that ended: stop that worker or wait for its end")
    return lock


def _tried(action: Callable[[], object]) -> str:
    """Why `action` failed; "" if it did not."""
    try:
        action()
    except (OSError, StoreError) as error:
        return str(error)
    return ""


def _unlink(parts: Sequence[_Part], _wiped: Callable[[int], None]) -> None:
    for part in parts:
        namespace.remove(part.root, part.directory)


def _forget(parts: Sequence[_Part], wiped: Callable[[int], None]) -> None:
    """Make the namespace empty, for good, before anything in it is overwritten: its files get names that no engine opens and every
    removal finds. The journals are the first."""
    for part in parts:
        for name in sorted(set(part.directory.names()) - _KEPT, key=lambda name: (name != journal.NAME, name)):
            if name.endswith(TEMPORARY_SUFFIX):
                continue
            if name + TEMPORARY_SUFFIX in part.directory.names():  # of a start that was killed; it goes with the rename
                _zero_file(part, name + TEMPORARY_SUFFIX, wiped)
            part.directory.rename(name, name + TEMPORARY_SUFFIX)
            if name == journal.NAME:
                part.directory.sync()
        part.directory.sync()


def _overwrite(parts: Sequence[_Part], wiped: Callable[[int], None]) -> None:
    for part in parts:
        for name in part.directory.names():
            if name not in _KEPT:
                _zero_file(part, name, wiped)


def _zero_file(part: _Part, name: str, wiped: Callable[[int], None]) -> None:
    fd = part.directory.open_file(name)
    with part.directory.located(name):
        try:
            _zero(fd, wiped)
        finally:
            os.close(fd)


def _unlink_wiped(parts: Sequence[_Part], wiped: Callable[[int], None]) -> None:
    for part in parts:
        with contextlib.ExitStack() as held:
            fd = None
            if MANIFEST in part.directory.names():  # a start that was killed may have left none
                fd = part.directory.open_file(MANIFEST)
                held.callback(os.close, fd)
            namespace.remove(part.root, part.directory)
            if fd is not None:
                _zero(fd, wiped)


def _zero(fd: int, wiped: Callable[[int], None]) -> None:
    """Write zeros over what the file holds (not over its holes, which would only take space), to the medium."""
    at, end = 0, os.fstat(fd).st_size
    zeros = bytes(min(WIPE_CHUNK_BYTES, end))
    while at < end:
        try:
            at = os.lseek(fd, at, os.SEEK_DATA)
        except OSError:  # nothing but a hole is left
            break
        hole = os.lseek(fd, at, os.SEEK_HOLE)
        os.lseek(fd, at, os.SEEK_SET)
        while at < hole:
            step = min(len(zeros), hole - at)
            write_all(fd, zeros[:step])
            at += step
            wiped(step)
    os.fdatasync(fd)
