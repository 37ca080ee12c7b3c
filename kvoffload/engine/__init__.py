"""The engine moves KV blocks between the KV cache, DRAM slots and SSD slots. csrc/kvo.h is the manual.

`Engine` is the face of the C extension; `kvoffload.engine.reference.ReferenceEngine` is the same in plain Python.
"""

import os
from collections.abc import Sequence
from typing import Self

import numpy as np

from kvoffload.engine import _core
from kvoffload.errors import StoreError
from kvoffload.types import COMPLETION_DTYPE, OP_DTYPE, EngineOptions, Region, SlotFiles

__all__ = ["Engine"]

if (OP_DTYPE.itemsize, COMPLETION_DTYPE.itemsize) != (_core.OP_BYTES, _core.COMPLETION_BYTES):
    raise ImportError("kvoffload.engine._core was built for other operations than kvoffload.types has; build it again")

_IO_BACKENDS = {"auto": 0, "io_uring": 1, "threads": 2}
_WAIT_MAX_S = 1e9
_NO_DEVICE = -1


class Engine:
    """One rank's engine. Its memory is allocated here, its threads run until `close`.

    `submit`, `poll`, `wait`, `stats` and `describe` may be called from any thread, one call of each at a time; `bind`, `attach` and
    `close` must not run beside another call (`close` then raises RuntimeError). After a fork only the parent may use it.
    Use on a closed engine raises ValueError.
    """

    def __init__(self, options: EngineOptions) -> None:
        """Raises ValueError for options out of range, OSError if memory, threads, the asked I/O or the device cannot be had."""
        if options.io_backend not in _IO_BACKENDS:
            raise ValueError(f"io_backend is {options.io_backend!r}, expected one of {', '.join(_IO_BACKENDS)}")
        if options.device is not None and options.device < 0:
            raise ValueError(f"device is {options.device}, expected a CUDA device's number, or None for host memory")
        self.options = options
        self._core = _core.CoreEngine(
            options.payload_bytes,
            options.dram_slots,
            options.spare_slots,
            options.max_ops,
            options.io_depth,
            _IO_BACKENDS[options.io_backend],
            _NO_DEVICE if options.device is None else options.device,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def bind(self, groups: Sequence[Sequence[Region]]) -> None:
        """Tell where the KV cache lies: the regions of each group, in the order of a slot's payload.

        Once, before the first `submit`; the memory must stay until `close`. Raises ValueError if a group has no
        regions or more bytes a block than `payload_bytes`.
        """
        rows = [(region.base, region.stride, region.nbytes) for regions in groups for region in regions]
        first = np.cumsum([0, *(len(regions) for regions in groups)], dtype=np.uint32)
        self._core.bind(np.array(rows, dtype=np.uint64).reshape(-1, 3), first)

    def attach(self, files: SlotFiles) -> None:
        """Open this rank's slot files. Once; before it, operations on SSD slots complete with -ENXIO.

        Raises StoreError with a sentence if a file is missing, damaged, of another kind, another user's or being resized, or
        if a symlink leads to it; the engine then goes on without SSD.
        """
        paths = tuple(os.fsencode(path) for path in files.paths)
        try:
            self._core.attach(paths, files.own_directories, files.slot_count, files.fingerprint)
        except OSError as error:
            raise StoreError(error.strerror) from error

    def submit(self, ops: np.ndarray, stream: int = 0) -> int:
        """Hand over operations (an array of OP_DTYPE) from the front, as many whole chains as there is room for.

        Returns how many were accepted. With a device, copies start after the work now in CUDA stream `stream` (0 is the
        legacy default stream, which is torch's too); without one, `stream` is ignored. Raises ValueError, with nothing
        accepted, if an operation is malformed.
        """
        if ops.dtype != OP_DTYPE:
            raise ValueError(f"operations are an array of {ops.dtype}, expected OP_DTYPE")
        return self._core.submit(np.ascontiguousarray(ops), stream)

    def poll(self, max_completions: int = 1024) -> np.ndarray:
        """The oldest completions not yet polled, an array of COMPLETION_DTYPE. Never blocks."""
        completions = np.empty(max_completions, COMPLETION_DTYPE)
        return completions[: self._core.poll(completions)]

    def wait(self, timeout_s: float) -> bool:
        """Sleep until there is a completion to poll (True) or `timeout_s` seconds passed (False)."""
        return self._core.wait(int(min(max(timeout_s, 0.0), _WAIT_MAX_S) * 1e6))

    def stats(self) -> dict[str, int | tuple[int, int, int, int]]:
        """Counts since opening. By kind (a tuple indexed by OpKind): `ops` that succeeded, `failed` ones, and of those
        that succeeded payload `bytes` and `usec` from submission to completion. Now: `queued`, `in_flight`, `abandoned`
        operations, `arena_bytes` mapped, and `huge_bytes` of them on huge pages when `describe` last looked."""
        return self._core.stats()

    def describe(self) -> list[str]:
        """What was found by probing, one finding a line. Takes milliseconds."""
        return self._core.describe().splitlines()

    def close(self) -> None:
        """Stop the threads and free the memory. Operations under way may or may not take effect; none completes
        any more. May take up to 2 s if a drive or the device does not answer. Closing twice is fine."""
        self._core.close()
