"""What makes lives short and full of events. Called in forked children, whose module settings end with them."""

import os
import random

from kvoffload.store import journal, writer


def sync_nothing() -> None:
    """What a killed process wrote is in the page cache, synced or not; on a busy disk the syncs are most of the time."""
    os.fsync = os.fdatasync = lambda fd: None


def write_often(rng: random.Random) -> None:
    """The journal is written, synced and compacted more often than usual, so that kills and power losses meet it at work."""
    writer._GATHER_SECONDS = rng.choice((0.0, 0.002, 0.02, 0.05))
    writer._SYNC_SECONDS = rng.choice((0.01, 0.1, 3.0))
    if rng.random() < 0.7:
        journal._FLOOR_BYTES = 0
