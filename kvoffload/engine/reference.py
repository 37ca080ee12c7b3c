"""The engine once more, in plain Python on numpy and aiofiles: the same interface, formats and statuses.

It is what the C engine is compared with, and shows in few lines what an operation means. It copies bytes instead of
pinning memory, so an operation that timed out can harm no one, and it makes no promise about speed.
"""

import asyncio
import contextlib
import ctypes
import errno
import fcntl
import os
import stat
import struct
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Any, Self

import aiofiles
import numpy as np
import xxhash

from kvoffload.errors import StoreError
from kvoffload.layout import ALIGNMENT, FORMAT_VERSION, HEADER_BYTES, SUPERBLOCK_BYTES, slot_bytes, slot_offset
from kvoffload.types import (
    COMPLETION_DTYPE,
    KEY_BYTES_MAX,
    NO_SLOT,
    OP_DTYPE,
    EngineOptions,
    OpFlag,
    OpKind,
    Region,
    SlotFiles,
)

# magic, version, rank, ranks, path index, path count, 0, payload bytes, fingerprint
SUPERBLOCK = struct.Struct("<8sIIIIIIQ16s")
# magic, version, SSD slot, generation, payload bytes, fingerprint, key length, key, payload checksum
SLOT_HEADER = struct.Struct("<8sIIQQ16sB7x40sQ16x")
CHECKSUM = struct.Struct("<Q")  # follows either of them: XXH3-64 of what is before it
TIMEOUT_DEFAULT_US = 30_000_000


def seal(packed: bytes) -> bytes:
    return packed + CHECKSUM.pack(xxhash.xxh3_64_intdigest(packed))


def pack_superblock(payload_bytes: int, fingerprint: bytes, index: int, count: int, rank: int, ranks: int) -> bytes:
    fields = (b"KVOFILE1", FORMAT_VERSION, rank, ranks, index, count, 0, payload_bytes, fingerprint)
    return seal(SUPERBLOCK.pack(*fields)).ljust(SUPERBLOCK_BYTES, b"\0")


def pack_slot(op: np.void, payload: bytes, fingerprint: bytes) -> bytes:
    """A slot as it lies on SSD."""
    header = SLOT_HEADER.pack(
        b"KVOSLOT1",
        FORMAT_VERSION,
        op["ssd_slot"],
        op["generation"],
        len(payload),
        fingerprint,
        op["key_len"],
        op["key"].tobytes(),
        xxhash.xxh3_64_intdigest(payload),
    )
    slot = seal(header).ljust(HEADER_BYTES, b"\0") + payload
    return slot.ljust(-(-len(slot) // ALIGNMENT) * ALIGNMENT, b"\0")


def open_slot_file(path: str, own_directories: int) -> int:
    """Its descriptor. No symlink is followed in the last `own_directories` and the user's directory before them."""
    *directories, name = path.rsplit("/", own_directories + 1)
    no_follow = os.O_NOFOLLOW if own_directories else 0
    with contextlib.ExitStack() as opened:
        at = None
        for number, directory in enumerate(directories):
            at = os.open(directory or "/", os.O_PATH | os.O_DIRECTORY | no_follow, dir_fd=at)
            opened.callback(os.close, at)
            if own_directories and os.fstat(at).st_uid not in (os.geteuid(), os.geteuid() if number else 0):
                raise StoreError(f"slot file {path}: found a directory of its path to be another user's")
        fd = os.open(name, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=at)
        found = os.fstat(fd)
        for is_wrong, what in (
            (not stat.S_ISREG(found.st_mode), "found no regular file, expected a slot file"),
            (found.st_uid != os.geteuid(), "found a file of another user, expected our own"),
            (found.st_nlink > 1, "found a file with a second name (a hard link): remove it"),
        ):
            if is_wrong:
                os.close(fd)
                raise StoreError(f"slot file {path}: {what}")
        return fd


def check_superblock(path: str, found: bytes, expected: bytes) -> None:
    """Raises StoreError unless the superblocks are equal but for the rank."""
    size = SUPERBLOCK.size
    if len(found) < SUPERBLOCK_BYTES or found[:8] != expected[:8]:
        raise StoreError(f"slot file {path}: found no superblock, expected one that begins with KVOFILE1")
    if found[: size + CHECKSUM.size] != seal(found[:size]):
        raise StoreError(f"slot file {path}: found a damaged superblock, expected a matching checksum")
    names = ("version", "rank", "ranks", "path index", "path count", "zero", "payload bytes", "fingerprint")
    values = zip(names, SUPERBLOCK.unpack(found[:size])[1:], SUPERBLOCK.unpack(expected[:size])[1:], strict=True)
    for name, is_value, should_be in values:
        if name not in ("rank", "ranks") and is_value != should_be:
            raise StoreError(f"slot file {path}: found {name} {is_value!r}, expected {should_be!r}")


class ReferenceEngine:
    """See `kvoffload.engine.Engine`."""

    def __init__(self, options: EngineOptions) -> None:
        if options.device is not None:
            raise ValueError(f"device is {options.device}, but the reference engine knows a KV cache in host memory only")
        self.options = options
        self._groups: list[list[Region]] = []
        self._files: list[Any] = []
        self._paths: tuple[str, ...] = ()
        self._slot_count = 0
        self._fingerprint = b""
        self._slots: dict[int, tuple[tuple[int, bytes], bytes]] = {}  # DRAM slot -> (generation, key), payload
        self._changed = threading.Condition()
        self._completions: deque[tuple[int, int, int]] = deque()
        self._outstanding = 0
        self._counts = {name: [0] * len(OpKind) for name in ("ops", "failed", "bytes", "usec")}
        self._loop = asyncio.new_event_loop()
        self._tasks: set[asyncio.Task] = set()
        self._spares = asyncio.Semaphore(options.spare_slots)
        self._depth = asyncio.Semaphore(options.io_depth)
        self._file_locks: list[asyncio.Lock] = []
        self._thread = threading.Thread(target=self._run, name="kvoffload-reference")
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()

    def bind(self, groups: Sequence[Sequence[Region]]) -> None:
        if self._groups or not groups or not all(groups):
            raise ValueError("the KV cache is bound already, or a group has no regions")
        if any(sum(region.nbytes for region in regions) > self.options.payload_bytes for regions in groups):
            raise ValueError("a group has more bytes a block than the payload of a slot")
        self._groups = [list(regions) for regions in groups]

    def attach(self, files: SlotFiles) -> None:
        asyncio.run_coroutine_threadsafe(self._attach(files), self._loop).result()

    async def _attach(self, files: SlotFiles) -> None:
        opened = []
        try:
            for index, path in enumerate(files.paths):
                try:
                    fd = open_slot_file(path, files.own_directories)
                except OSError as error:
                    raise StoreError(f"slot file {path}: {error.strerror}") from error
                opened.append(await aiofiles.open(fd, "r+b", buffering=0))
                try:
                    fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except BlockingIOError as error:
                    raise StoreError(f"slot file {path}: the file is being resized by another engine") from error
                payload_bytes = self.options.payload_bytes
                expected = pack_superblock(payload_bytes, files.fingerprint, index, len(files.paths), 0, 0)
                check_superblock(path, await opened[-1].read(SUPERBLOCK_BYTES), expected)
        except StoreError:
            for file in opened:
                await file.close()
            raise
        self._files, self._file_locks = opened, [asyncio.Lock() for _ in opened]
        self._slot_count, self._fingerprint = files.slot_count, files.fingerprint
        self._paths = files.paths

    def submit(self, ops: np.ndarray, stream: int = 0) -> int:
        if ops.dtype != OP_DTYPE:
            raise ValueError(f"operations are an array of {ops.dtype}, expected OP_DTYPE")
        chains: list[list[np.void]] = []
        linked = False
        for op in ops.copy():
            if linked:
                chains[-1].append(op)
            else:
                chains.append([op])
            linked = op["flags"] == OpFlag.LINK
        if linked or not all(self._is_well_formed(chain) for chain in chains):
            raise ValueError(
                "malformed operation: kind, flags, link, slot, group or key out of range, or nothing bound"
            )
        accepted = 0
        now = time.monotonic()
        with self._changed:
            for chain in chains:
                if self._outstanding + len(chain) > self.options.max_ops:
                    break
                self._outstanding += len(chain)
                accepted += len(chain)
                self._loop.call_soon_threadsafe(self._start, chain, now)
        return accepted

    def _is_well_formed(self, chain: list[np.void]) -> bool:
        if len(chain) > 1 and [op["kind"] for op in chain] != [OpKind.READ, OpKind.COPY_IN]:
            return False
        if any(op["dram_slot"] != chain[0]["dram_slot"] for op in chain):
            return False
        return all(self._is_operation(op, is_paired=len(chain) > 1) for op in chain)

    def _is_operation(self, op: np.void, is_paired: bool) -> bool:
        on_ssd = op["kind"] in (OpKind.WRITE, OpKind.READ)
        may_stage = is_paired or op["kind"] == OpKind.READ
        return bool(
            op["kind"] <= OpKind.READ
            and op["flags"] <= OpFlag.LINK
            and op["group"] < len(self._groups)
            and 1 <= op["key_len"] <= KEY_BYTES_MAX
            and not op["key"][op["key_len"] :].any()
            and (op["dram_slot"] < self.options.dram_slots or (may_stage and op["dram_slot"] == NO_SLOT))
            and (not on_ssd or not self._files or op["ssd_slot"] < self._slot_count)
        )

    def _start(self, chain: list[np.void], submitted: float) -> None:
        task = self._loop.create_task(self._run_chain(chain, submitted))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run_chain(self, chain: list[np.void], submitted: float) -> None:
        staging: dict[int, tuple] = {}
        is_staged = chain[0]["dram_slot"] == NO_SLOT
        slots = staging if is_staged else self._slots
        deadlines = [submitted + int(op["timeout_us"] or TIMEOUT_DEFAULT_US) / 1e6 for op in chain]
        deadlines[0] = min(deadlines)
        has_spare = False
        status = 0
        for op, deadline in zip(chain, deadlines, strict=True):
            if status == 0:
                try:
                    async with asyncio.timeout_at(deadline):
                        if is_staged and not has_spare:
                            has_spare = await self._spares.acquire()
                        status = await self._run_op(op, slots)
                except TimeoutError:
                    status = -errno.ETIMEDOUT
                except OSError as error:
                    status = -(error.errno or errno.EIO)
            else:
                status = -errno.ECANCELED
            self._complete(op, status, submitted)
        if has_spare:
            self._spares.release()

    async def _run_op(self, op: np.void, slots: dict[int, tuple]) -> int:
        """One operation; returns its status. `slots` is where its DRAM slot is looked up."""
        kind, dram_slot = int(op["kind"]), int(op["dram_slot"])
        block = (int(op["generation"]), op["key"][: op["key_len"]].tobytes())
        if kind == OpKind.COPY_OUT:
            slots[dram_slot] = (block, b"".join(view.tobytes() for view in self._views(op)))
            return 0
        if kind in (OpKind.WRITE, OpKind.READ) and not self._files:
            return -errno.ENXIO
        if kind == OpKind.READ:
            slots.pop(dram_slot, None)
            payload = await self._shielded(self._read(op))
            if payload is None:
                return -errno.EBADMSG
            slots[dram_slot] = (block, payload)
            return 0
        found, payload = slots.get(dram_slot, (None, b""))
        if found != block or len(payload) != self._group_bytes(op):
            return -errno.EBADMSG
        if kind == OpKind.WRITE:
            await self._shielded(self._write(op, payload))
        else:
            for view in self._views(op):
                view[:] = np.frombuffer(payload[: len(view)], np.uint8)
                payload = payload[len(view) :]
        return 0

    def _group_bytes(self, op: np.void) -> int:
        return sum(region.nbytes for region in self._groups[op["group"]])

    def _views(self, op: np.void) -> list[np.ndarray]:
        """The block's bytes in the KV cache, a view for each region."""
        block = int(op["kv_block"])
        return [
            np.ctypeslib.as_array((ctypes.c_uint8 * region.nbytes).from_address(region.base + block * region.stride))
            for region in self._groups[op["group"]]
        ]

    async def _shielded(self, io: Any) -> Any:
        """Awaits I/O that goes on, its file locked, when the wait for it ends by a timeout."""
        task = self._loop.create_task(io)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return await asyncio.shield(task)

    async def _seek(self, op: np.void) -> tuple[Any, int]:
        file = self._files[op["ssd_slot"] % len(self._files)]
        offset = slot_offset(int(op["ssd_slot"]) // len(self._files), self.options.payload_bytes)
        await file.seek(offset)
        return file, offset

    async def _read(self, op: np.void) -> bytes | None:
        async with self._depth, self._file_locks[op["ssd_slot"] % len(self._files)]:
            file, _ = await self._seek(op)
            slot = await file.read(HEADER_BYTES + self._group_bytes(op))
        payload = slot[HEADER_BYTES:]
        # Everything a right header says is known before, so the test is equality.
        right = pack_slot(op, payload, self._fingerprint)[: SLOT_HEADER.size + CHECKSUM.size]
        return payload if len(payload) == self._group_bytes(op) and slot.startswith(right) else None

    async def _write(self, op: np.void, payload: bytes) -> None:
        async with self._depth, self._file_locks[op["ssd_slot"] % len(self._files)]:
            file, offset = await self._seek(op)
            end = offset + slot_bytes(self.options.payload_bytes)
            if os.fstat(file.fileno()).st_size < end:
                await file.truncate(end)  # whole slots only, as the C engine has them
            await file.write(pack_slot(op, payload, self._fingerprint))

    def _complete(self, op: np.void, status: int, submitted: float) -> None:
        usec = int((time.monotonic() - submitted) * 1e6)
        kind = op["kind"]
        with self._changed:
            if status == 0:
                self._counts["ops"][kind] += 1
                self._counts["bytes"][kind] += self._group_bytes(op)
                self._counts["usec"][kind] += usec
            else:
                self._counts["failed"][kind] += 1
            self._completions.append((int(op["id"]), status, usec))
            self._changed.notify_all()

    def poll(self, max_completions: int = 1024) -> np.ndarray:
        with self._changed:
            count = min(max_completions, len(self._completions))
            self._outstanding -= count
            return np.array([self._completions.popleft() for _ in range(count)], COMPLETION_DTYPE)

    def wait(self, timeout_s: float) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: bool(self._completions), min(timeout_s, threading.TIMEOUT_MAX))

    def stats(self) -> dict[str, int | tuple[int, ...]]:
        with self._changed:
            counts = {name: tuple(by_kind) for name, by_kind in self._counts.items()}
            queued = self._outstanding - len(self._completions)
        return counts | {"queued": queued, "in_flight": 0, "abandoned": 0, "arena_bytes": 0, "huge_bytes": 0}

    def describe(self) -> list[str]:
        return ["io: aiofiles", "copy: numpy", *(f"file {path}: buffered" for path in self._paths)]

    def close(self) -> None:
        if self._loop.is_closed():
            return
        asyncio.run_coroutine_threadsafe(self._shut_down(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _shut_down(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for file in self._files:
            await file.close()
        await self._loop.shutdown_default_executor()
