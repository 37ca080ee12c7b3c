"""kvoffload's reference engine: plain Python on aiofiles, one operation at a time on a file, through the page cache."""

import os
from pathlib import Path

import numpy as np

from benchmarks.rows.base import Place, Sample
from kvoffload.cli.passes import FINGERPRINT, EngineRow
from kvoffload.engine.reference import ReferenceEngine, pack_superblock
from kvoffload.types import EngineOptions

SHARE = 8  # it is slow: an eighth of the slots,
SLOTS_MAX = 512  # and no more than these


class ReferenceRow(EngineRow):
    is_fast = False  # so its latencies are those of the timed pass

    def __init__(self, name: str) -> None:
        super().__init__(name, "reference")

    def open(self, options: EngineOptions) -> ReferenceEngine:
        return ReferenceEngine(options)

    def make_file(self) -> Path:
        """Its own, since what it writes stays in the page cache for a while."""
        file = self.place.folder / "reference.slots"
        file.write_bytes(pack_superblock(self.payload, FINGERPRINT, 0, 1, 0, 1))
        return file

    def prepare(self, place: Place) -> None:
        super().prepare(place)
        self.slots = max(2, min(place.slots // SHARE, SLOTS_MAX))

    def write(self, order: np.ndarray) -> Sample:
        return super().write(order[order < self.slots])

    def read(self, order: np.ndarray) -> Sample:
        fd = os.open(self.place.folder / "reference.slots", os.O_RDWR)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)
        return super().read(order[order < self.slots])

    def check(self, slots) -> int:
        return super().check([slot % self.slots for slot in slots])

    def notes(self) -> list[str]:
        return [
            f"moves {self.slots} of the {self.place.slots} slots",
            "writes end in the page cache; reads begin with an empty one, and then the kernel reads ahead",
        ]
