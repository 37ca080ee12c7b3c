"""The index journal: its bytes, and what a journal read from disk means. docs/format.md is the manual."""

import logging
import os
import struct
from collections.abc import Iterable, Iterator
from enum import IntEnum
from typing import NamedTuple

import numpy as np
import xxhash

from .._rows import checksums
from ..errors import StoreError
from ..layout import FORMAT_VERSION, JOURNAL_BYTES_PER_SLOT
from ..table import NO_BLOCKS, BlockTable
from ..types import KEY_BYTES_MAX, KEY_ROW, BlockKey, key_row
from .directory import Directory
from .slotfile import REMEDY

logger = logging.getLogger(__name__)

NAME = "index.journal"
MAGIC = b"KVOINDX1"
_HEADER_FIELDS = struct.Struct("<8sIIQ16s16x")  # magic, version, record bytes, epoch, fingerprint, zero
_RECORD_FIELDS = struct.Struct("<QQIHB41p")  # sequence, generation, slot, group, kind, key with its length before it
_RECORD = struct.Struct(_RECORD_FIELDS.format + "Q")
_CHECKSUM = struct.Struct("<Q")
HEADER_BYTES = _HEADER_FIELDS.size + _CHECKSUM.size
RECORD_BYTES = _RECORD.size
_RECORD_DTYPE = np.dtype(
    {
        "names": ["sequence", "generation", "slot", "group", "kind", "key_len", "key", "key_bytes", "checksum"],
        "formats": ["<u8", "<u8", "<u4", "<u2", "u1", "u1", KEY_ROW, ("u1", KEY_BYTES_MAX), "<u8"],
        "offsets": [0, 8, 16, 20, 22, 23, 23, 24, 64],  # the key with its length, and once more by itself
        "itemsize": RECORD_BYTES,
    }
)
EPOCH_SHIFT = 40  # a generation is an epoch and below it a count; more than can be written in a process's life
EPOCH_END = 1 << (64 - EPOCH_SHIFT)
CHUNK_RECORDS = 512  # encoded between two writes; a write lets other threads run
_FLOOR_BYTES = 64 * 1024  # a small journal is not worth compacting
_TAIL_BYTES = 64 * 1024  # what a power loss may leave behind a journal's end; anything longer is no journal's tail


class Kind(IntEnum):
    PUT = 1
    DELETE = 2
    TOUCH = 3
    CLEAR = 4


_PUT, _DELETE, _TOUCH, _CLEAR = map(int, Kind)  # plain numbers: a million comparisons with an IntEnum take seconds


class Record(NamedTuple):
    """One change of the index."""

    kind: Kind
    key: BlockKey = b""
    slot: int = 0
    generation: int = 0
    group: int = 0


class Index:
    """What is on disk once the changes followed so far are: rows by slot. Of a slot one key is known, so its size is bounded.

    What a change says of another slot than the key's is not followed: the block manager knows the slot of each. Were a DELETE
    lost on its way here and the key put elsewhere, it would be in two slots, and `replay` believes the later.
    """

    def __init__(self, slot_count: int, found: BlockTable = NO_BLOCKS):
        """REQUIRES: slots of `found` below slot_count."""
        self._rows = bytearray(KEY_ROW.itemsize * slot_count)
        self._keys = np.frombuffer(self._rows, KEY_ROW)
        self._generations = np.zeros(slot_count, np.uint64)
        self._groups = np.zeros(slot_count, np.uint16)
        self._used = np.zeros(slot_count, np.uint64)  # by a counter of changes; 0: empty
        self._keys[found.slots] = found.keys
        self._generations[found.slots], self._groups[found.slots] = found.generations, found.groups
        self._used[found.slots] = np.arange(1, len(found) + 1, dtype=np.uint64)
        self._now = len(found)

    def apply(self, kind: int, key: BlockKey, slot: int, generation: int, group: int) -> bool:
        """Follow one change; False if it changes nothing and need not be written."""
        if kind == _CLEAR:
            self._used[:] = 0
            return True
        row, begin = key_row(key), KEY_ROW.itemsize * slot
        end = begin + KEY_ROW.itemsize
        if kind != _PUT and (not self._used[slot] or self._rows[begin:end] != row):
            return False
        self._now += 1
        if kind == _PUT:
            self._rows[begin:end] = row
            self._generations[slot], self._groups[slot] = generation, group
        self._used[slot] = 0 if kind == _DELETE else self._now
        return True

    def table(self) -> BlockTable:
        slots = np.flatnonzero(self._used)
        slots = slots[np.argsort(self._used[slots], kind="stable")]
        return BlockTable(self._keys[slots], slots.astype(np.uint32), self._generations[slots], self._groups[slots])


def puts(table: BlockTable) -> Iterator[Record]:
    """The shortest list of changes that leads to it from nothing."""
    for key, slot, generation, group in table:
        yield Record(Kind.PUT, key, slot, generation, group)


def size_limit(slot_count: int) -> int:
    """Journal bytes at which it is compacted.

    The compacted copy is written beside the old journal, and both together must fit the journal's share of the cap.
    """
    return _FLOOR_BYTES + slot_count * (JOURNAL_BYTES_PER_SLOT - RECORD_BYTES)


def encode_header(epoch: int, fingerprint: bytes) -> bytes:
    fields = _HEADER_FIELDS.pack(MAGIC, FORMAT_VERSION, RECORD_BYTES, epoch, fingerprint)
    return fields + _CHECKSUM.pack(xxhash.xxh3_64_intdigest(fields))


def encode_records(records: Iterable[Record], sequence: int) -> Iterator[bytes]:
    """The records' bytes in chunks, numbered from `sequence`."""
    chunk: list[bytes] = []
    for kind, key, slot, generation, group in records:
        fields = _RECORD_FIELDS.pack(sequence, generation, slot, group, kind, key)
        chunk += (fields, _CHECKSUM.pack(xxhash.xxh3_64_intdigest(fields)))
        sequence += 1
        if len(chunk) == 2 * CHUNK_RECORDS:
            yield b"".join(chunk)
            chunk = []
    if chunk:
        yield b"".join(chunk)


def decode_header(data: bytes, fingerprint: bytes, path: str) -> int:
    """The epoch in a journal's first bytes; StoreError if they are not a header of this namespace and format."""
    if len(data) < HEADER_BYTES:
        raise StoreError(f"journal {path} is truncated ({len(data)} bytes, its header has {HEADER_BYTES}): {REMEDY}")
    magic, version, record_bytes, epoch, found = _HEADER_FIELDS.unpack_from(data)
    if magic != MAGIC:
        raise StoreError(f"journal {path} is damaged (not a kvoffload journal): {REMEDY}")
    if version > FORMAT_VERSION:
        raise StoreError(
            f"journal {path} has format {version}, newer than {FORMAT_VERSION}, the newest this kvoffload reads: "
            f"use the newer kvoffload, or {REMEDY}"
        )
    checksum = _CHECKSUM.unpack_from(data, _HEADER_FIELDS.size)[0]
    if checksum != xxhash.xxh3_64_intdigest(data[: _HEADER_FIELDS.size]) or record_bytes != RECORD_BYTES:
        raise StoreError(f"journal {path} is damaged (its header fails its checksum): {REMEDY}")
    if version != FORMAT_VERSION:
        raise StoreError(f"journal {path} has format {version}, which this kvoffload does not know: {REMEDY}")
    if found != fingerprint:
        raise StoreError(f"journal {path} belongs to another namespace: {REMEDY}")
    if epoch + 1 >= EPOCH_END:
        raise StoreError(f"journal {path} is damaged (no start can follow its epoch {epoch}): {REMEDY}")
    return int(epoch)


class Replayed(NamedTuple):
    """What the records after the header say."""

    blocks: BlockTable
    touches: int
    used_bytes: int  # up to the last good record
    skipped: int  # bad records before that


def replay(body: bytes) -> Replayed:
    """Follow the good records after the header.

    Bad ones between them are skipped: slots prove what they hold, so a change that is not known costs one block or a
    miss, and not everything that was stored after it. A CLEAR, which is more than that, is never among them, for the
    journal is rewritten instead.
    """
    is_good = _good_records(body)
    places = np.flatnonzero(is_good)
    count = int(places[-1]) + 1 if len(places) else 0
    records = np.frombuffer(body, _RECORD_DTYPE, count=count)
    if len(places) < count:
        records = records[places]
    clears = np.flatnonzero(records["kind"] == _CLEAR)
    blocks = _follow(records[int(clears[-1]) + 1 :] if len(clears) else records)
    return Replayed(blocks, int(np.count_nonzero(records["kind"] == _TOUCH)), count * RECORD_BYTES, count - len(places))


def _follow(records: np.ndarray) -> BlockTable:
    """Where changes other than CLEAR lead from nothing, a key being in one slot and a slot having one key.

    A block is there if the last PUT or DELETE of its key is a PUT, and that is the last PUT into its slot. Asked so, and not by
    doing one after the other, a million records take a third of a second.
    """
    keys, key_count = _numbered_keys(records)
    changed, touched = np.full(key_count, -1), np.full(key_count, -1)  # the last record of each that was
    is_touch = records["kind"] == _TOUCH
    changes, touches = np.flatnonzero(~is_touch), np.flatnonzero(is_touch)
    changed[keys[changes]] = changes  # of several the last remains
    touched[keys[touches]] = touches
    puts = np.flatnonzero(records["kind"] == _PUT)[::-1]
    _, first = np.unique(records["slot"][puts], return_index=True)
    last_puts = puts[first]  # of each slot
    is_there = np.zeros(len(records), bool)
    is_there[last_puts] = changed[keys[last_puts]] == last_puts
    there = np.flatnonzero(is_there)
    if len(touches):
        there = there[np.argsort(np.maximum(there, touched[keys[there]]), kind="stable")]
    if len(there) < len(records):
        records = records[there]
    return BlockTable(*(np.ascontiguousarray(records[name]) for name in ("key", "slot", "generation", "group")))


def _numbered_keys(records: np.ndarray) -> tuple[np.ndarray, int]:
    """The number of each record's key, and how many keys there are.

    Keys are sorted by a hash. Should two have the same, which nobody can bring about who does not know the seed, it is done
    again with another seed.
    """
    marks = np.empty(len(records), np.uint64)
    begin = _RECORD_DTYPE.fields["key"][1]
    while True:
        seed = int.from_bytes(os.urandom(8))
        checksums(records, RECORD_BYTES, begin, begin + KEY_ROW.itemsize, seed, marks)
        order = np.argsort(marks, kind="stable")
        is_new = np.ones(len(records), bool)
        is_new[1:] = marks[order[1:]] != marks[order[:-1]]
        same = np.flatnonzero(~is_new)
        if np.array_equal(records["key"][order[same]], records["key"][order[same - 1]]):
            numbers = np.empty(len(records), np.int64)
            numbers[order] = np.cumsum(is_new) - 1
            return numbers, int(np.count_nonzero(is_new))


def _good_records(body: bytes) -> np.ndarray:
    """Which records are numbered, formed and checksummed as they should be where they are."""
    records = np.frombuffer(body, _RECORD_DTYPE, count=len(body) // RECORD_BYTES)
    sums = np.empty(len(records), np.uint64)
    checksums(records, RECORD_BYTES, 0, RECORD_BYTES - _CHECKSUM.size, 0, sums)
    return (
        (records["checksum"] == sums)
        & (records["sequence"] == np.arange(1, len(records) + 1, dtype=np.uint64))
        & (records["kind"] >= _PUT)
        & (records["kind"] <= _CLEAR)
        & (records["key_len"] <= KEY_BYTES_MAX)
        & ((records["key_len"] > 0) | (records["kind"] == _CLEAR))
        & _is_padded(records)
    )


def _is_padded(records: np.ndarray) -> np.ndarray:
    """Whether behind each key there are zeros: else one key could be in a table as two."""
    lengths, padded = records["key_len"], np.ones(len(records), bool)
    for place in range(int(lengths.min(initial=KEY_BYTES_MAX)), KEY_BYTES_MAX):
        padded &= (records["key_bytes"][:, place] == 0) | (place < lengths)
    return padded


class Journal(NamedTuple):
    """A journal as it lies on disk."""

    epoch: int
    blocks: BlockTable
    touches: int
    skipped: int  # damaged records before good ones
    tail_bytes: int  # behind the last good record: torn, damaged or being written
    good: bytes  # before that, without the header


def read(directory: Directory, fingerprint: bytes, slot_count: int) -> Journal | None:
    """None if there is no journal, StoreError if it is no use.

    slot_count: what the journal was kept for, which bounds its size. A tail that is torn or damaged is what a kill
    leaves behind: the records before it count.
    """
    try:
        fd = directory.open_file(NAME, os.O_RDONLY)
    except FileNotFoundError:
        return None
    with directory.located(NAME) as path, os.fdopen(fd, "rb") as file:
        epoch = decode_header(file.read(HEADER_BYTES), fingerprint, path)
        size, most = os.fstat(fd).st_size, size_limit(slot_count) + _TAIL_BYTES
        if size > most:
            raise StoreError(
                f"journal {path} is damaged ({size} bytes, but one of {slot_count} slots never exceeds {most}): {REMEDY}"
            )
        body = file.read(most)
    found = replay(body)
    good = body[: found.used_bytes]
    return Journal(epoch, found.blocks, found.touches, found.skipped, len(body) - found.used_bytes, good)


def load(directory: Directory, fingerprint: bytes, slot_count: int) -> Journal | None:
    """A journal that is about to be used (see `read`), with a warning for what of it is not."""
    found = read(directory, fingerprint, slot_count)
    if found is None:
        return None
    path = os.path.join(directory.path, NAME)
    if found.skipped:
        logger.warning("journal %s has %d damaged records, which are skipped", path, found.skipped)
    if found.tail_bytes:
        logger.warning(
            "journal %s ends in %d bytes that are torn or damaged: the %d records before them are used",
            path,
            found.tail_bytes,
            len(found.good) // RECORD_BYTES - found.skipped,
        )
    return found
