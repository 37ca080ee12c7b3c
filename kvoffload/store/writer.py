"""The thread that keeps the journal: it takes changes from the scheduler and brings them to disk in its own time."""

import itertools
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable

import numpy as np
from numpy.typing import NDArray

from ..errors import StoreError
from ..table import NO_BLOCKS, BlockTable
from ..types import KEY_BYTES_MAX
from . import journal
from .directory import Directory, write_all
from .journal import Index, Kind, Record

logger = logging.getLogger(__name__)

QUEUE_RECORDS = 1 << 17
REUSED_MAX = 2  # records for each block, in a journal that a start leaves as it is
_GATHER_SECONDS = 0.05  # changes that arrive within this time share a write
_SYNC_SECONDS = 3.0
_RETRY_SECONDS = 30.0  # after the disk failed
# What bringing the index to disk can raise: the disk, something else in a file's place, and no memory to encode it in.
_FAILURES = (OSError, StoreError, MemoryError)


class JournalWriter:
    """Appends records to the journal and compacts it.

    `push` never blocks on the disk and never raises; one thread at a time may call it. The other methods may be
    called from any thread. When the queue is full or the disk fails, records are dropped and counted: a missing PUT
    is a lost block, a missing DELETE an entry that the engine finds wanting when it reads the slot.
    """

    def __init__(
        self,
        directory: Directory,
        slot_count: int,
        epoch: int,
        fingerprint: bytes,
        found: BlockTable = NO_BLOCKS,
        good: bytes = b"",
        reached: Callable[[NDArray[np.uint32]], NDArray[np.bool_]] = lambda slots: np.ones(len(slots), bool),
    ) -> None:
        """Writes the journal of a new life at once (OSError or StoreError if that fails), then starts the thread.

        `found`: the blocks there are. `good`: records, one whole after the other, that say the same; if they are not many more
        than needed they are written as they are, which for a million is a second less than making them anew.
        `reached` says which slots lie in files that are sure to hold them, and is asked before a PUT is written to the journal, for
        the kernel may bring that to the disk before it is asked to. PUTs of other slots are left out until their files do.
        """
        self._directory = directory
        self._index = Index(slot_count, found)
        self._slot_count = slot_count
        self._limit = journal.size_limit(slot_count)
        self._header = journal.encode_header(epoch, fingerprint)
        self._reached = reached

        self._queue: deque[Record] = deque()
        self._pushed = 0  # written by the pushing thread only, so that neither counter needs a lock
        self._taken = 0  # written by the journal's thread only
        self._overflowed = 0
        self._wake = threading.Event()
        self._stopping = False
        self._sync_target = 0

        self._changed = threading.Condition()  # guards the index, and tells of progress
        self._durable = 0  # of the pushed records, how many are on disk or dropped
        self._synced_at = time.monotonic()
        self._failed_at: float | None = None
        self._dropped = 0
        self._compactions = 0
        self._fd = -1
        self._size = self._sequence = 0
        self._left_out: set[int] = set()  # slots of which a PUT is not written, for their file may not reach there
        self._left_at = 0.0
        is_short = 0 < len(good) <= REUSED_MAX * len(found) * journal.RECORD_BYTES and len(good) < self._limit
        if is_short and self._reached(found.slots).all():
            self._replace([good], len(good) // journal.RECORD_BYTES)
        else:
            self._compact()
        self._thread = threading.Thread(target=self._run, name="kvoffload-journal", daemon=True)
        self._thread.start()

    def push(self, records: Iterable[Record]) -> None:
        for record in records:
            if self._pushed - self._taken >= QUEUE_RECORDS:
                if not self._overflowed:
                    logger.warning("the journal's disk is too slow: changes of the SSD index are being dropped")
                self._overflowed += 1
            else:
                self._queue.append(record)
                self._pushed += 1
        if not self._wake.is_set():
            self._wake.set()

    def table(self) -> BlockTable:
        """The blocks on SSD as far as the thread has followed."""
        with self._changed:
            return self._index.table()

    @property
    def queued(self) -> int:
        return self._pushed - self._taken

    @property
    def dropped(self) -> int:
        return self._overflowed + self._dropped

    @property
    def size(self) -> int:
        return self._size

    @property
    def compactions(self) -> int:
        return self._compactions

    def flush(self, timeout: float) -> bool:
        """Wait until every record pushed before is on disk (or dropped); False after `timeout` seconds."""
        self._sync_target = target = self._pushed
        self._wake.set()
        with self._changed:
            return self._changed.wait_for(lambda: self._durable >= target, timeout)

    def close(self, timeout: float) -> bool:
        """Drain, sync and stop; False if the disk did not let the thread end within `timeout` seconds."""
        self._stopping = True
        self._wake.set()
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        last = False
        while not last:
            restless = self._durable < self._taken or self._failed_at is not None or bool(self._left_out)
            self._wake.wait(_SYNC_SECONDS if restless else None)
            if not (self._stopping or self._is_flush_waiting()):
                time.sleep(_GATHER_SECONDS)
            self._wake.clear()
            last = self._stopping
            if self._failed_at is not None and (last or time.monotonic() - self._failed_at >= _RETRY_SECONDS):
                self._repair()
            self._drain()
            if self._left_out and (last or time.monotonic() - self._left_at >= _RETRY_SECONDS):
                self._bring_in()
            if last or self._is_flush_waiting() or time.monotonic() - self._synced_at >= _SYNC_SECONDS:
                self._sync()
        os.close(self._fd)

    def _is_flush_waiting(self) -> bool:
        return self._durable < self._sync_target

    def _drain(self) -> None:
        while batch := self._take():
            sound = [record for record in batch if self._is_sound(record)]
            self._dropped += len(batch) - len(sound)
            with self._changed:
                batch = [record for record in sound if self._index.apply(*record)]
            if self._failed_at is not None:
                self._dropped += len(batch)
                continue
            try:
                self._append(batch)
            except _FAILURES as error:
                self._dropped += len(batch)
                self._fail(error)

    def _take(self) -> list[Record]:
        batch: list[Record] = []
        while self._queue and len(batch) < journal.CHUNK_RECORDS:
            batch.append(self._queue.popleft())
        self._taken += len(batch)
        return batch

    def _is_sound(self, record: Record) -> bool:
        """Whether the format can hold it; a mistake of the caller must not end the thread."""
        return (
            isinstance(record.key, bytes)
            and len(record.key) <= KEY_BYTES_MAX
            and 0 <= record.slot < self._slot_count
            and 0 <= record.generation < 1 << 64
            and 0 <= record.group < 1 << 16
        )

    def _append(self, batch: list[Record]) -> None:
        # A CLEAR is never appended: of all changes it alone must not be lost to a damaged record.
        is_cleared = any(record.kind == Kind.CLEAR for record in batch)
        if is_cleared or self._size + len(batch) * journal.RECORD_BYTES > self._limit:
            self._compact()
            return
        batch = self._holdable(batch)
        for chunk in journal.encode_records(batch, self._sequence):
            write_all(self._fd, chunk)
            self._size += len(chunk)
        self._sequence += len(batch)

    def _holdable(self, batch: list[Record]) -> list[Record]:
        slots = np.array([record.slot for record in batch if record.kind == Kind.PUT], np.uint32)
        unreached = set(slots[~self._reached(slots)].tolist())
        self._left_out |= unreached
        return [record for record in batch if record.kind != Kind.PUT or record.slot not in unreached]

    def _bring_in(self) -> None:
        """Write what was left out, if its files reach there by now."""
        self._left_at, left_out = time.monotonic(), self._left_out
        try:
            if self._failed_at is None and self._reached(np.array(sorted(left_out), np.uint32)).any():
                self._compact()
        except _FAILURES:
            self._left_out = left_out  # the journal that there is stays, and good

    def _compact(self) -> None:
        """Put a journal in place that says what the index says; the old one stays whole until then."""
        table = self._index.table()
        is_held = self._reached(table.slots)
        self._left_out = set(table.slots[~is_held].tolist())
        table = table.where(is_held)
        self._replace(journal.encode_records(journal.puts(table), 1), len(table))
        self._compactions += 1

    def _replace(self, body: Iterable[bytes], records: int) -> None:
        fd = self._directory.replace(journal.NAME, itertools.chain([self._header], body))
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = fd
        self._size = os.fstat(fd).st_size
        self._sequence = records + 1

    def _sync(self) -> None:
        if self._failed_at is None:
            try:
                os.fdatasync(self._fd)
            except _FAILURES as error:
                self._fail(error)
        self._synced_at = time.monotonic()
        with self._changed:
            self._durable = self._taken
            self._changed.notify_all()

    def _fail(self, error: Exception) -> None:
        """After a failed write the file may end in half a record, so nothing is appended until it was rewritten."""
        logger.warning(
            "the journal %s cannot be written (%s): blocks stored on SSD from now on may be forgotten at restart",
            os.path.join(self._directory.path, journal.NAME),
            error,
        )
        self._failed_at = time.monotonic()

    def _repair(self) -> None:
        """Rewrite the journal from the index, which followed every change that was not written."""
        try:
            self._compact()
        except _FAILURES:
            self._failed_at = time.monotonic()
            return
        self._failed_at = None
        logger.warning("the journal %s is written again", os.path.join(self._directory.path, journal.NAME))
