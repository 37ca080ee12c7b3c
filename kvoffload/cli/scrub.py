"""Reading every block that a cache's journal knows, and saying what is wrong with it.

Nothing is locked or attached, for a running engine grows, rewrites and replaces what is read here. What looks wrong is
looked at again as long as the engine may not have noted yet what it did; only what stays wrong is damage.
"""

import contextlib
import mmap
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import xxhash

from kvoffload.engine.reference import CHECKSUM, SLOT_HEADER, seal
from kvoffload.errors import StoreError
from kvoffload.layout import FORMAT_VERSION, HEADER_BYTES, slot_bytes, slot_offset
from kvoffload.store import catalogue, journal, namespace, slotfile
from kvoffload.store.catalogue import Cache
from kvoffload.store.directory import Directory, explained
from kvoffload.store.slotfile import Superblock
from kvoffload.table import Entry

THREADS = 8  # reads in the drive at once
BATCH = 32  # blocks that a thread takes at a time
# What an engine changed is in its journal within 50 ms if its disk answers; this is how often, and how long apart, we ask.
ROUNDS, PAUSE_SECONDS = 10, 1.0
OTHER_BLOCK = "holds another block than the journal says"
_SLOT_MAGIC = b"KVOSLOT1"


@dataclass(frozen=True)
class Damage:
    namespace: str
    directory: str
    rank: int | None  # None: of all ranks
    slot: int | None  # None: of the file or the journal as a whole
    what: str


@dataclass
class Result:
    """Of one namespace."""

    blocks: int = 0  # read and compared, on every rank
    nbytes: int = 0
    changed: int = 0  # an engine wrote or forgot them meanwhile
    outdated: int = 0  # another block lies there in good order: a miss, as a kill may leave it
    buffered: int = 0  # files read through the page cache, for their file system refuses O_DIRECT
    damage: list[Damage] = field(default_factory=list)


@dataclass(frozen=True)
class SlotFile:
    """One slot file, open for reading past the page cache where that can be."""

    directory: Directory
    superblock: Superblock
    fd: int
    is_direct: bool

    def offset(self, slot: int) -> int:
        return slot_offset(slot // self.superblock.path_count, self.superblock.payload_bytes)


@dataclass(frozen=True, slots=True)
class Block:
    """What a slot should hold, by the journal."""

    entry: Entry
    rank: int
    file: SlotFile


class Scrub:
    """One namespace, on all of its paths that were named. `parts`: with the journal's path among them."""

    def __init__(self, parts: Sequence[Cache], read: Callable[[int], None]) -> None:
        """`read` is called with the bytes of blocks as they are read, from several threads."""
        self._parts = parts
        self._first = next(part for part in parts if part.journal is not None)
        self._read = read
        self._result = Result()
        self._buffers = threading.local()

    @staticmethod
    def size(parts: Sequence[Cache]) -> int:
        """About how many bytes `run` will read."""
        return sum(part.disk_bytes for part in parts)

    def run(self) -> Result:
        if self._first.journal.skipped:
            self._damage(None, None, f"{self._first.journal.skipped} damaged records in the journal, which are skipped")
        with contextlib.ExitStack() as opened, explained(self._first.nvme_path):
            files = self._open(opened)
            blocks = self._blocks(self._entries(), files)
            suspects = self._unsound(blocks)
            self._result.blocks = len(blocks)
            self._settle(suspects)
        return self._result

    def _damage(self, rank: int | None, slot: int | None, what: str, directory: str | None = None) -> None:
        self._result.damage.append(Damage(self._first.name, directory or self._first.directory, rank, slot, what))

    def _directory(self, part: Cache) -> Directory:
        with catalogue.open_root(part.nvme_path, only_look=True) as root:
            return root.child(part.name)

    def _entries(self) -> list[Entry]:
        """As the journal has them now; none if it is gone."""
        try:
            with self._directory(self._first) as directory:
                slots = self._first.manifest.slot_count if self._first.manifest else 0
                found = journal.read(directory, self._first.fingerprint, slots)
        except (FileNotFoundError, StoreError):
            return []  # removed meanwhile, or made anew for another number of slots
        return list(found.blocks) if found else []

    def _open(self, opened: contextlib.ExitStack) -> dict[tuple[int, int], SlotFile]:
        """The slot files by path index and rank."""
        files = {}
        for part in self._parts:
            try:
                directory = opened.enter_context(self._directory(part))
            except FileNotFoundError:
                continue  # removed meanwhile
            for name in part.slot_files:
                try:
                    there = slotfile.read(directory, name)
                    if there is None:
                        continue  # removed meanwhile
                    superblock = Superblock.decode(there[0])
                    if superblock.file_name != name:
                        raise StoreError(f"{name} was made as {superblock.file_name}")
                    file = open_slot_file(directory, superblock)
                except FileNotFoundError:
                    continue
                except StoreError as error:
                    self._damage(None, None, str(error), part.directory)
                    continue
                opened.callback(os.close, file.fd)
                files[file.superblock.path_index, file.superblock.rank] = file
                self._result.buffered += not file.is_direct
        return files

    def _blocks(self, entries: Sequence[Entry], files: dict[tuple[int, int], SlotFile]) -> list[Block]:
        """In the order in which they lie, of every rank; damage where a file that should hold them is not there."""
        if not files or not entries:
            if entries and not self._result.damage:
                self._damage(None, None, f"no slot files, but the journal knows {len(entries)} blocks")
            return []
        some = next(iter(files.values())).superblock
        named = {part.manifest.path_index for part in self._parts if part.manifest} | {index for index, _ in files}
        found = []
        for index in sorted(named):
            mine = sorted((entry for entry in entries if entry.slot % some.path_count == index), key=lambda entry: entry.slot)
            for rank in range(some.ranks):
                file = files.get((index, rank))
                if file is not None:
                    found += [Block(entry, rank, file) for entry in mine]
                elif mine and not self._result.damage:
                    self._damage(rank, None, f"no slot file of path {index + 1}, but the journal knows {len(mine)} blocks in it")
        return found

    def _unsound(self, blocks: Sequence[Block]) -> list[tuple[Block, str]]:
        """The blocks that are not as the journal says, and why."""
        batches = [blocks[at : at + BATCH] for at in range(0, len(blocks), BATCH)]
        found = []
        pool = ThreadPoolExecutor(THREADS)
        try:
            for batch, verdicts in zip(batches, pool.map(self._judge_all, batches), strict=True):
                found += [(block, verdict) for block, verdict in zip(batch, verdicts, strict=True) if verdict]
        finally:
            pool.shutdown(cancel_futures=True)
        return found

    def _judge_all(self, blocks: Sequence[Block]) -> list[str]:
        return [self._judge(block) for block in blocks]

    def _judge(self, block: Block) -> str:
        size = slot_bytes(block.file.superblock.payload_bytes)
        if not hasattr(self._buffers, "memory") or len(self._buffers.memory) < size:
            self._buffers.memory = mmap.mmap(-1, size)  # on a page's border, as O_DIRECT wants it
        view = memoryview(self._buffers.memory)[:size]
        try:
            count = os.preadv(block.file.fd, [view], block.file.offset(block.entry.slot))
        except OSError as error:
            return f"cannot be read: {error.strerror}"
        if not block.file.is_direct:
            os.posix_fadvise(block.file.fd, block.file.offset(block.entry.slot), size, os.POSIX_FADV_DONTNEED)
        self._read(count)
        return fault(view[:count], block)

    def _settle(self, suspects: list[tuple[Block, str]]) -> None:
        """Looks again at what seemed wrong until nobody can be about to say why, and notes what is left."""
        for left in reversed(range(ROUNDS)):
            if not suspects:
                return
            in_use = self._is_in_use()
            if in_use:
                time.sleep(PAUSE_SECONDS)  # before: what the engine did is noted by then
            now = {entry.slot: entry for entry in self._entries()}
            same = [block for block, _ in suspects if now.get(block.entry.slot) == block.entry]
            with contextlib.ExitStack() as opened:
                again = self._unsound(self._reopened(same, opened))
            self._result.changed += len(suspects) - len(again)
            suspects = again
            if not left or not in_use:
                break
        for block, verdict in suspects:
            if verdict == OTHER_BLOCK:
                self._result.outdated += 1
            else:
                self._damage(block.rank, block.entry.slot, verdict, block.file.directory.path)

    def _reopened(self, blocks: Sequence[Block], opened: contextlib.ExitStack) -> list[Block]:
        """The same blocks in the files that have the names now."""
        files: dict[int, SlotFile] = {}
        for block in blocks:
            if block.file.fd not in files:
                with contextlib.suppress(FileNotFoundError):
                    files[block.file.fd] = open_slot_file(block.file.directory, block.file.superblock)
                    opened.callback(os.close, files[block.file.fd].fd)
        return [Block(block.entry, block.rank, files[block.file.fd]) for block in blocks if block.file.fd in files]

    def _is_in_use(self) -> bool:
        try:
            with self._directory(self._first) as directory:
                return namespace.is_held(directory)
        except (FileNotFoundError, StoreError):
            return False


def open_slot_file(directory: Directory, superblock: Superblock) -> SlotFile:
    try:
        fd, is_direct = directory.open_file(superblock.file_name, os.O_RDONLY | os.O_DIRECT), True
    except OSError:
        fd, is_direct = directory.open_file(superblock.file_name, os.O_RDONLY), False
    return SlotFile(directory, superblock, fd, is_direct)


def fault(slot: memoryview, block: Block) -> str:
    """What keeps the engine from using the slot's bytes; "" if they are what the journal says."""
    if len(slot) < HEADER_BYTES:
        return "lies beyond the end of its file"
    fields = SLOT_HEADER.unpack_from(slot)
    magic, version, number, generation, nbytes, fingerprint, key_bytes, key, checksum = fields
    if magic != _SLOT_MAGIC:
        return "has no header"
    header = bytes(slot[: SLOT_HEADER.size + CHECKSUM.size])
    if header != seal(header[: SLOT_HEADER.size]):
        return "its header fails its checksum"
    if version != FORMAT_VERSION or header != seal(SLOT_HEADER.pack(*fields)):
        return f"its header is of no format that this kvoffload knows (version {version})"
    if number != block.entry.slot or fingerprint != block.file.superblock.fingerprint:
        return f"was written for another place (slot {number}, fingerprint {fingerprint.hex()})"
    if HEADER_BYTES + nbytes > len(slot):
        return f"its header says {nbytes} bytes, more than there are"
    if xxhash.xxh3_64_intdigest(slot[HEADER_BYTES : HEADER_BYTES + nbytes]) != checksum:
        return "its payload fails its checksum"
    if (generation, key[:key_bytes]) != (block.entry.generation, block.entry.key):
        return OTHER_BLOCK
    return ""


def by_namespace(caches: Sequence[Cache]) -> Iterator[list[Cache]]:
    """The parts of each namespace, in the order of their paths."""
    parts: dict[str, list[Cache]] = {}
    for cache in caches:
        parts.setdefault(cache.name, []).append(cache)
    yield from parts.values()
