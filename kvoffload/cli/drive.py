"""What the real engine gets out of the drive below a path, in a file that nobody else sees and that goes by itself."""

import contextlib
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kvoffload.cli.output import amount
from kvoffload.cli.passes import OPS_MAX, EngineRow, Place, Sample
from kvoffload.errors import UserError
from kvoffload.layout import ALIGNMENT, free_floor
from kvoffload.store.directory import Directory, explained
from kvoffload.store.namespace import ROOT
from kvoffload.types import OpKind

MEMORY_BYTES = 256 * 2**20  # of DRAM slots at most
LEAST_SLOTS = 8


@dataclass(frozen=True)
class Figures:
    slot_bytes: int
    file_bytes: int
    write: Sample
    read: Sample
    notes: list[str]  # what the engine found by probing


def room(path: str) -> int:
    """Bytes that a cache may take on the path's file system, what is left to others not among them."""
    with explained(path):
        found = os.statvfs(path)
    return max(0, found.f_bavail * found.f_frsize - free_floor(found.f_blocks * found.f_frsize))


def measure(path: str, slot_bytes: int, file_bytes: int, seconds: float) -> Figures:
    """Fills a file of so many bytes, then writes and reads its slots at random, each for so many seconds.

    UserError if the path cannot be used or has no room.
    """
    slot_bytes = -(-slot_bytes // ALIGNMENT) * ALIGNMENT
    slots = file_bytes // slot_bytes
    if slots < LEAST_SLOTS:
        raise UserError(f"{amount(file_bytes)} hold no {LEAST_SLOTS} blocks of {amount(slot_bytes)}: take more, or smaller blocks")
    there = room(path)
    if there < file_bytes:
        raise UserError(
            f"{path} has {amount(there)} of room beside what is left to others, and {amount(file_bytes)} are to be written: "
            "take less, or free space"
        )
    memory = min(MEMORY_BYTES, OPS_MAX * slot_bytes)
    row = EngineRow("kvoffload", "auto")
    random = np.random.default_rng(0)
    try:
        with scratch(path) as folder:
            place = Place(folder, "drive", slot_bytes, slots, memory)
            place.file.touch(0o600)
            row.prepare(place)
        # From here on the file has no name: whatever ends this process, its space comes back.
        row.write(np.arange(slots))
        write = row.repeat(OpKind.WRITE, random.permutation(slots), seconds)
        read = row.repeat(OpKind.READ, random.permutation(slots), seconds)
        notes = [note.replace(f"{place.file}", path) for note in row.notes()]
    finally:
        row.close()
    return Figures(slot_bytes, slots * slot_bytes, write, read, notes)


def check_usable(path: str) -> None:
    """StoreError if no engine could keep a cache at the path, found by making a directory and a file as the store does."""
    with explained(path), scratch(path) as folder, Directory.open(str(folder)) as parent:
        with parent.child("directory", create=True) as directory:
            os.close(directory.replace("file", [b"content"]))
            directory.remove("file")
        os.rmdir("directory", dir_fd=parent.fd)


@contextlib.contextmanager
def scratch(path: str) -> Iterator[Path]:
    """A directory of ours below the path, gone with all that is in it when the context ends.

    StoreError where an engine could make none. It lies where an engine makes its own, for only that may be this user's.
    Call from the main thread.
    """
    with explained(path), Directory.open(path, only_look=True) as parent:
        with contextlib.suppress(FileNotFoundError), parent.child(ROOT) as root:
            path = root.path
        folder = tempfile.mkdtemp(prefix=".kvoffload-measures-", dir=path)
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # by default nothing below would run
    try:
        yield Path(folder)
    finally:
        shutil.rmtree(folder)
        signal.signal(signal.SIGTERM, before)
