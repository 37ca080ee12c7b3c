"""The SSD tier's files and its index on disk: which blocks a deployment left there, and how many it may leave.

A store belongs to one namespace (one model in one geometry) and one process. Slots hold their own proof of what they
are, so the index may lag behind them without danger; see docs/format.md.
"""

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, Self

from ..config import Config
from ..table import BlockTable
from ..types import BlockKey, SlotFiles
from .digests import Digests
from .journal import EPOCH_SHIFT, Kind, Record
from .namespace import OWN_DIRECTORIES, Identity
from .opening import CLOSE_SECONDS, Opened, open_namespace
from .wear import DriveWear

__all__ = ["Digests", "DriveWear", "Identity", "Store", "StoreStats"]

logger = logging.getLogger(__name__)


class StoreStats(NamedTuple):
    """Figures of now; bytes are bytes, the rest are counts."""

    slot_count: int
    reserved_bytes: int  # of the cap, once every slot has been written
    resumed: int  # blocks found on SSD when opened
    queued: int  # changes not yet taken by the journal's thread
    dropped: int  # changes that will not be found after a restart
    journal_bytes: int
    compactions: int


class Store:
    """An open namespace. `put`, `delete`, `touch`, `clear` and `next_generation` are for one thread, the scheduler's:
    they never wait for the disk and never raise. The rest may be called from any thread.
    """

    def __init__(self, opened: Opened) -> None:
        """Not to be called directly: see `open`."""
        self._opened = opened
        self._writer = opened.writer
        self._generation = opened.epoch << EPOCH_SHIFT
        self._closed = False

    @classmethod
    def open(
        cls,
        config: Config,
        identity_fields: Mapping[str, object],
        payload_bytes: int,
        ranks: int,
        siblings: Sequence[Mapping[str, object]] = (),
    ) -> Self:
        """Open or create the namespace of `identity_fields` below every nvme path, and hold it until `close`.

        identity_fields: what must be equal for bytes to be shared, writable as JSON. payload_bytes: the largest block
        of any group on one rank. siblings: identity_fields of this deployment's other engines, with which the cap is divided
        (data parallelism); what they left is not obsolete, unless the cap leaves no room beside it. May take seconds.
        StoreError: the paths, the files or the cap do not allow it.
        REQUIRES: config has an SSD tier.
        """
        if config.ssd_bytes == 0:
            raise ValueError("the configuration has no SSD tier")
        identity = Identity.of(identity_fields, payload_bytes, ranks)
        others = frozenset(Identity.of(fields, payload_bytes, ranks).namespace for fields in siblings)
        return cls(open_namespace(config, identity, payload_bytes, ranks, others))

    @property
    def slot_count(self) -> int:
        """Blocks the SSD tier has room for; slots are 0 .. slot_count-1."""
        return self._opened.slot_count

    @property
    def directory(self) -> str:
        """The namespace on the first nvme path."""
        return self._opened.places[0].directory.path

    def slot_files(self, rank: int) -> SlotFiles:
        """What the engine of `rank` attaches."""
        superblocks = [place.superblocks[rank] for place in self._opened.places]
        return SlotFiles(
            paths=tuple(
                os.path.join(place.directory.path, superblock.file_name)
                for place, superblock in zip(self._opened.places, superblocks, strict=True)
            ),
            slot_count=self.slot_count,
            fingerprint=superblocks[0].fingerprint,
            own_directories=OWN_DIRECTORIES,
        )

    @property
    def idle_s(self) -> float | None:
        """Seconds by the wall clock from when any engine wrote an index below these paths last to this one's start, below 0 if the
        clock was set back; None if none did."""
        return self._opened.idle_s

    def table(self) -> BlockTable:
        """The blocks on SSD; changes still queued are not in it."""
        return self._writer.table()

    def next_generation(self) -> int:
        """A number never given before in this namespace, not even if the end of the journal was lost."""
        self._generation += 1
        return self._generation

    def put(self, key: BlockKey, slot: int, generation: int, group: int) -> None:
        """Note that every rank wrote the block to its slot. It is now the most recent."""
        self._writer.push((Record(Kind.PUT, key, slot, generation, group),))

    def delete(self, key: BlockKey, slot: int) -> None:
        """Note that the slot is no longer the block's. Nothing if it was not."""
        self._writer.push((Record(Kind.DELETE, key, slot),))

    def touch(self, blocks: Iterable[tuple[BlockKey, int]]) -> None:
        """Note that the blocks in these slots were used, the last one most recently. Those not there are ignored."""
        self._writer.push(Record(Kind.TOUCH, key, slot) for key, slot in blocks)

    def clear(self) -> None:
        """Note that no block is on SSD any more."""
        self._writer.push((Record(Kind.CLEAR),))

    def flush(self, timeout: float) -> bool:
        """Wait until changes made before are on disk; False if that takes longer than `timeout` seconds."""
        return self._writer.flush(timeout)

    def stats(self) -> StoreStats:
        return StoreStats(
            slot_count=self.slot_count,
            reserved_bytes=self._opened.reserved_bytes,
            resumed=self._opened.resumed,
            queued=self._writer.queued,
            dropped=self._writer.dropped,
            journal_bytes=self._writer.size,
            compactions=self._writer.compactions,
        )

    def close(self) -> None:
        """Bring queued changes to disk, for two seconds at most, and let the namespace go. May be called again."""
        if self._closed:
            return
        self._closed = True
        if not self._writer.close(CLOSE_SECONDS):
            # Its thread may still write, so the namespace stays ours until the process ends.
            logger.warning("the journal's disk does not answer: the latest changes of the SSD index are lost")
            return
        for lock in self._opened.locks:
            lock.release()
        for place in self._opened.places:
            place.directory.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
