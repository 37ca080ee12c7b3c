"""Opening a namespace: inspect everything, decide, and only then change anything on disk."""

import contextlib
import logging
import os
import time
from collections.abc import Sequence, Set
from dataclasses import dataclass, replace

from ..config import Config
from ..errors import StoreError
from ..layout import SUPERBLOCK_BYTES
from ..table import NO_BLOCKS, BlockTable
from . import capacity, journal, namespace, slotfile
from .directory import TEMPORARY_SUFFIX, Directory, explained
from .namespace import Identity, Lock, Manifest
from .slotfile import REMEDY, Growth, Superblock
from .writer import JournalWriter

logger = logging.getLogger(__name__)

CLOSE_SECONDS = 2.0  # to drain the journal's queue


@dataclass(frozen=True)
class Place:
    """The namespace on one nvme_path."""

    directory: Directory
    superblocks: tuple[Superblock, ...]  # by rank


@dataclass(frozen=True)
class Opened:
    """A namespace that is whole, held, and has its journal's thread running."""

    places: tuple[Place, ...]
    locks: tuple[Lock, ...]
    slot_count: int
    reserved_bytes: int
    resumed: int  # blocks
    epoch: int
    idle_s: float | None  # since any engine wrote a journal below the paths; None: none ever did
    writer: JournalWriter


@dataclass(frozen=True)
class _Found:
    """What a namespace holds."""

    blocks: BlockTable
    good: bytes  # of its journal: records that say where these are, and no more than that; empty if there are none such
    epoch: int  # of its last life; 0 if that is not known
    slot_count: int  # likewise
    absent: frozenset[tuple[int, int]]  # (path index, rank) of slot files to be made anew
    created: str  # when the namespace was


def open_namespace(config: Config, identity: Identity, payload_bytes: int, ranks: int, siblings: Set[str]) -> Opened:
    """Hold, check and prepare the namespace; StoreError if that is impossible, and then nothing has been lost."""
    with contextlib.ExitStack() as meanwhile, contextlib.ExitStack() as on_failure:
        roots = _open_roots(config.nvme_path, meanwhile)
        # In one order for every engine, so that two that list the same paths differently can not deadlock.
        for root in sorted(roots, key=lambda root: root.path):
            with explained(root.path):
                meanwhile.callback(namespace.hold_root(root).release)
        directories, locks = [], []
        for root in roots:
            with explained(root.path):
                directory, lock = _hold(root, identity.namespace, on_failure)
                directories.append(directory)
                locks.append(lock)
        places = _places(directories, identity, payload_bytes, ranks)
        written_at = _written_at(roots)
        with explained(places[0].directory.path):
            found = _inspect_or_discard(places, identity, config.resume_kv_cache)
            geometry = capacity.Geometry(payload_bytes, ranks, len(roots))
            obsolete = _obsolete(config, roots, {identity.namespace} | siblings)
            try:
                slot_count = _decide_slots(config, roots, identity, geometry, siblings, obsolete)
            except StoreError:
                if not siblings:
                    raise
                # Where the cap was lowered the other engines' caches may be more than all of it.
                obsolete = _obsolete(config, roots, {identity.namespace})
                slot_count = _decide_slots(config, roots, identity, geometry, siblings, obsolete)
            _wait_for_workers(places, found, slot_count)
            _sync(places, found.absent)
            # Only now: an engine that refuses to start must not have removed anything.
            if not _clean(roots, obsolete):
                # What is left counts against the cap after all; that alone is no reason not to serve.
                slot_count = _decide_slots(config, roots, identity, geometry, siblings, [frozenset()] * len(roots))
                _wait_for_workers(places, found, slot_count)
            kept = found.blocks.below(slot_count)
            dropped = len(found.blocks) - len(kept)
            if dropped:
                logger.info("the cache has fewer slots than before: %d blocks are forgotten", dropped)
            if dropped or not 0 < found.slot_count <= slot_count:
                # Records of other slots than there are, too: damaged, one could bring such a slot back, and its file is too short.
                found = replace(found, blocks=kept, good=b"")
            writer = _prepare(places, config.nvme_path, found, geometry, slot_count, identity, on_failure)
        on_failure.pop_all()
        return Opened(
            places=places,
            locks=tuple(locks),
            slot_count=slot_count,
            reserved_bytes=geometry.total_bytes(slot_count),
            resumed=len(found.blocks),
            epoch=found.epoch + 1,
            idle_s=None if written_at is None else time.time() - written_at,
            writer=writer,
        )


def _open_roots(paths: Sequence[str], meanwhile: contextlib.ExitStack) -> list[Directory]:
    """Our directory below every path, made where it is missing, but only when every path may be used."""
    with contextlib.ExitStack() as parents:
        opened = []
        for path in paths:
            with explained(path):
                opened.append(parents.enter_context(Directory.open(path)))
        _refuse_aliases(opened)
        roots = []
        for parent in opened:
            with explained(parent.path):
                roots.append(meanwhile.enter_context(parent.child(namespace.ROOT, create=True)))
    _refuse_aliases(roots)
    return roots


def _refuse_aliases(roots: Sequence[Directory]) -> None:
    """Two names of one directory (a bind mount) would count its space twice."""
    seen: dict[tuple[int, int], str] = {}
    for root in roots:
        found = os.fstat(root.fd)
        other = seen.setdefault((found.st_dev, found.st_ino), root.path)
        if other != root.path:
            raise StoreError(f"{other} and {root.path} are one directory: list it once in nvme_path")


def _hold(root: Directory, name: str, on_failure: contextlib.ExitStack) -> tuple[Directory, Lock]:
    """Open or make the namespace's directory below `root` and hold its lock; one made here goes if opening fails."""
    try:
        directory, is_new = root.child(name), False
    except FileNotFoundError:
        directory, is_new = root.child(name, create=True), True
    on_failure.callback(directory.close)
    lock = namespace.hold_namespace(directory)
    on_failure.callback(lock.release)
    if is_new:
        on_failure.callback(_discard, root, directory)
    return directory, lock


def _discard(root: Directory, directory: Directory) -> None:
    try:
        namespace.remove(root, directory)
    except OSError as error:
        logger.warning("%s was made and could not be removed again: %s", directory.path, error.strerror)


def _written_at(roots: Sequence[Directory]) -> float | None:
    """When a journal was written last, of whatever cache: writes wear the drive, which all caches below a path share."""
    times = []
    for root in roots:
        with explained(root.path):
            for name in root.names():
                if namespace.is_namespace(root, name):
                    with root.child(name) as directory:
                        times.append(directory.changed_at(journal.NAME))
    return max((at for at in times if at is not None), default=None)


def _obsolete(config: Config, roots: Sequence[Directory], keep: Set[str]) -> list[Set[str]]:
    """By path, the namespaces to be removed: only whole ones, for of a part of one its engine refuses what is left."""
    if not config.clean_obsolete_kv_cache:
        return [frozenset()] * len(roots)
    found, stays = [], set(keep)
    for root in roots:
        with explained(root.path):
            names = namespace.obsolete(root, keep)
            stays |= {name for name in root.names() if name not in names and namespace.is_namespace(root, name)}
            found.append(names)
    for name in set().union(*found) - stays:
        if not _is_whole(config, roots, name):
            logger.warning(
                "obsolete namespace %s stays: a part of it lies on paths that are not among these, or cannot be read; `kvoffload "
                "clean` removes it", name,
            )  # fmt: skip
            stays.add(name)
    return [names - stays for names in found]


def _is_whole(config: Config, roots: Sequence[Directory], name: str) -> bool:
    """Whether all of its parts are here, as far as they tell; of those that lay on our paths some may have been removed before."""
    paths: Sequence[str] = ()
    parts = 0
    for root in roots:
        try:
            with root.child(name) as directory:
                parts += 1
                manifest = Manifest.read(directory)
        except FileNotFoundError:
            continue
        except OSError:
            return False
        except StoreError:  # a damaged one, which no engine opens as it is
            continue
        paths = max(paths, manifest.paths if manifest is not None else (), key=len)
    return parts >= len(paths) or set(paths) <= set(config.nvme_path)


def _has_journal(root: Directory, name: str) -> bool:
    with root.child(name) as directory:
        return journal.NAME in directory.names()


def _clean(roots: Sequence[Directory], obsolete: Sequence[Set[str]]) -> bool:
    """False if something is left. The parts with the journals go first: what is left of a namespace without one is empty."""
    first = [{name for name in names if _has_journal(root, name)} for root, names in zip(roots, obsolete, strict=True)]
    are_clean = [namespace.clean(root, names) for root, names in zip(roots, first, strict=True)]
    stay = {name for root, names in zip(roots, first, strict=True) for name in names.intersection(root.names())}
    rest = [names - before - stay for names, before in zip(obsolete, first, strict=True)]
    return all([*are_clean, *(namespace.clean(root, names) for root, names in zip(roots, rest, strict=True))])


def _decide_slots(
    config: Config,
    roots: Sequence[Directory],
    identity: Identity,
    geometry: capacity.Geometry,
    siblings: Set[str],
    obsolete: Sequence[Set[str]],
) -> int:
    uses = []
    for root, names in zip(roots, obsolete, strict=True):
        with explained(root.path):
            uses.append(capacity.measure(root, identity.namespace, siblings, names))
    return capacity.decide_slots(config.ssd_bytes, uses, geometry, 1 + len(siblings))


def _places(directories: Sequence[Directory], identity: Identity, payload_bytes: int, ranks: int) -> tuple[Place, ...]:
    return tuple(
        Place(
            directory,
            tuple(
                Superblock(rank, ranks, index, len(directories), payload_bytes, identity.rank_fingerprint(rank, ranks))
                for rank in range(ranks)
            ),
        )
        for index, directory in enumerate(directories)
    )


def _inspect_or_discard(places: Sequence[Place], identity: Identity, resume: bool) -> _Found:
    """What is there; without `resume` no block is kept, and of files that are damaged nothing is."""
    try:
        found = _inspect(places, identity)
    except StoreError as error:
        if resume:
            raise
        logger.warning("starting empty as asked, although: %s", error)
        return _Found(NO_BLOCKS, b"", 0, 0, _every_file(places), namespace.now())
    return found if resume else replace(found, blocks=NO_BLOCKS, good=b"")


def _every_file(places: Sequence[Place]) -> frozenset[tuple[int, int]]:
    return frozenset((index, rank) for index, place in enumerate(places) for rank in range(len(place.superblocks)))


def _inspect(places: Sequence[Place], identity: Identity) -> _Found:
    """Read and compare everything, change nothing; StoreError if anything is not as a kvoffload leaves it."""
    manifests = [_check_manifest(place.directory, index, len(places)) for index, place in enumerate(places)]
    created = next((manifest.created for manifest in manifests if manifest), namespace.now())
    sizes = {
        (index, rank): slotfile.check(place.directory, superblock)
        for index, place in enumerate(places)
        for rank, superblock in enumerate(place.superblocks)
    }
    slots_before = manifests[0].slot_count if manifests[0] else 0
    recovered = journal.load(places[0].directory, identity.fingerprint, slots_before)
    if recovered is None:
        if any(size is not None and size > SUPERBLOCK_BYTES for size in sizes.values()):
            logger.warning("%s has no journal: starting with an empty cache", places[0].directory.path)
        # Without the journal nobody knows which generations the slots hold, so the slots go too.
        return _Found(NO_BLOCKS, b"", 0, 0, _every_file(places), created)
    for path_index, place in enumerate(places):
        highest = recovered.blocks.highest_slot(path_index, len(places))
        for rank, superblock in enumerate(place.superblocks):
            slotfile.refuse_short(place.directory, superblock, sizes[path_index, rank], highest)
    absent = frozenset(file for file, size in sizes.items() if size is None)
    good = b"" if recovered.skipped or absent else recovered.good
    return _Found(recovered.blocks, good, recovered.epoch, slots_before, absent, created)


def _check_manifest(directory: Directory, path_index: int, path_count: int) -> Manifest | None:
    manifest = Manifest.read(directory)
    if manifest and (manifest.path_index, len(manifest.paths)) != (path_index, path_count):
        raise StoreError(
            f"{directory.path} was written as path {manifest.path_index + 1} of nvme_path {list(manifest.paths)}, "
            f"now it is path {path_index + 1} of {path_count}: list the paths as they were, or {REMEDY}"
        )
    return manifest


def _sync(places: Sequence[Place], absent: Set[tuple[int, int]]) -> None:
    """Sync the slot files there are: of a drive that fails now a new journal would know nothing any more."""
    for path_index, place in enumerate(places):
        files = [superblock for rank, superblock in enumerate(place.superblocks) if (path_index, rank) not in absent]
        Growth([(place.directory, files)]).sync()


def _wait_for_workers(places: Sequence[Place], found: _Found, slot_count: int) -> None:
    """Let workers of an engine that just died end before a file that they may still write is shortened or replaced."""
    deadline = time.monotonic() + namespace.SLOT_FILE_LOCK_SECONDS
    for path_index, place in enumerate(places):
        for rank, superblock in enumerate(place.superblocks):
            if (path_index, rank) in found.absent or slotfile.is_longer(place.directory, superblock, slot_count):
                namespace.wait_unused(place.directory, superblock.file_name, deadline)


def _prepare(
    places: Sequence[Place],
    paths: Sequence[str],
    found: _Found,
    geometry: capacity.Geometry,
    slot_count: int,
    identity: Identity,
    on_failure: contextlib.ExitStack,
) -> JournalWriter:
    """Bring the files to where `found` and `slot_count` say. A kill between any two steps leaves a usable namespace."""
    is_anew = bool(found.absent) and not found.blocks
    for path_index, place in enumerate(places):
        # A journal of other files, or of another order of the paths, must not be found beside new ones.
        if is_anew or path_index > 0:
            place.directory.remove(journal.NAME)
            place.directory.remove(journal.NAME + TEMPORARY_SUFFIX)
        if is_anew:
            place.directory.remove(namespace.MANIFEST)  # it may tell of another order, too
    for path_index, rank in sorted(found.absent):
        slotfile.create(places[path_index].directory, places[path_index].superblocks[rank])
    growth = Growth([(place.directory, place.superblocks) for place in places])
    growth.sync()
    directory, fingerprint = places[0].directory, identity.fingerprint
    writer = JournalWriter(directory, slot_count, found.epoch + 1, fingerprint, found.blocks, found.good, growth.reached)
    on_failure.callback(writer.close, CLOSE_SECONDS)
    # Only now: a manifest of fewer slots beside the old, longer journal would make that one look overgrown.
    for path_index, place in enumerate(places):
        reserved = geometry.path_bytes(path_index, slot_count)
        Manifest(path_index, tuple(paths), slot_count, reserved, found.created).write(place.directory, identity)
    # Only now: the old journal may have known of blocks beyond the new end.
    for place in places:
        for superblock in place.superblocks:
            slotfile.shorten(place.directory, superblock, slot_count)
    return writer
