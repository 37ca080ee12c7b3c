"""Opens what a life left behind, loads every block it knows through the engine, and looks for what leaked."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kvoffload.store import Store
from kvoffload.table import Entry
from kvoffload.types import NO_SLOT
from kvoffload.worker import BlockList
from tests.torture.deployment import KV_BLOCKS, RANKS, Rank, Shape


class Examined(NamedTuple):
    entries: list[Entry]  # oldest first
    misses: list[Entry]  # of these, the ones whose slot is not what the index says, on some rank


def used_bytes(path: Path) -> int:
    """What `du` says of everything below."""
    return sum(each.lstat().st_blocks * 512 for each in path.rglob("*"))


def assert_within_cap(shape: Shape) -> None:
    used = sum(used_bytes(path) for path in shape.paths)
    assert used <= shape.cap_bytes, f"{used} bytes below nvme_path, the cap is {shape.cap_bytes}"


def examine(shape: Shape, backend: str, highest_generation: int, may_miss: Callable[[Entry], bool]) -> Examined:
    """Resume, twice, as a next engine would. AssertionError says what is not as it should be.

    highest_generation: of all that were ever given. may_miss: whether a block's slot may hold something else.
    """
    with shape.open_store() as store:
        entries = list(store.table())
        misses = load_all(store, entries, backend)
        surprising = [entry for entry in misses if not may_miss(entry)]
        assert not surprising, f"lost, although nothing else was written there: {surprising}"
        generation = store.next_generation()
        assert generation > highest_generation, f"generation {generation} is given a second time"
        assert_within_cap(shape)
    left = [str(each) for path in shape.paths for each in path.rglob("*.tmp")]
    assert not left, f"left behind: {left}"
    with shape.open_store() as store:
        assert list(store.table()) == entries, "a second start finds another index"
    assert_within_cap(shape)
    return Examined(entries, misses)


def load_all(store: Store, entries: list[Entry], backend: str) -> list[Entry]:
    """Load every block on every rank; the ones that are an honest miss somewhere. AssertionError for wrong bytes."""
    assert len(entries) <= KV_BLOCKS
    assert len({entry.slot for entry in entries}) == len({entry.key for entry in entries}) == len(entries)
    if not entries:
        return []
    missed = set()
    for number in range(RANKS):
        rank = Rank(store, number, backend, dram_slots=2)
        errors = load(rank, entries)
        for block, entry in enumerate(entries):
            error = errors.get(entry.key)
            assert error in (None, errno.EBADMSG), f"{entry}: {os.strerror(error or 0)}"
            if error is None:
                assert rank.holds(block, entry.key, entry.generation, entry.group), f"rank {number}: wrong bytes for {entry}"
            else:
                missed.add(entry)
        rank.worker.close()
    return [entry for entry in entries if entry in missed]


def load(rank: Rank, entries: list[Entry]) -> dict[bytes, int]:
    """Load block i of the list into KV block i; the errno of each that failed."""
    count = len(entries)
    for each in rank.kv:
        each[:] = 0
    blocks = BlockList(
        transfer=1,
        keys=[entry.key for entry in entries],
        generations=np.array([entry.generation for entry in entries], np.uint64),
        dram_slots=np.full(count, NO_SLOT, np.uint32),
        ssd_slots=np.array([entry.slot for entry in entries], np.uint32),
        kv_blocks=np.arange(count, dtype=np.uint32),
        groups=np.array([entry.group for entry in entries], np.uint16),
    )
    rank.worker.load(1, blocks)
    rank.worker.wait([1])
    rank.worker.take_finished()
    return rank.worker.take_report().failed.get(1, {})
