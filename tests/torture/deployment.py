"""A small deployment without vLLM, made of the real parts: store, block manager, and for each rank a worker and a C
engine over host memory. Everything is so small that evictions and demotions go on all the time.

What a block holds is a pure function of its key, generation, group and rank, so whoever reads it knows what is right.
"""

import errno
import hashlib
import itertools
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kvoffload.blocks import Placement
from kvoffload.config import GB, Config
from kvoffload.engine import Engine
from kvoffload.layout import slot_bytes
from kvoffload.manager import BlockManager
from kvoffload.store import Store
from kvoffload.store.capacity import Geometry
from kvoffload.table import Entry
from kvoffload.types import BlockKey, EngineOptions, Region, TransferPlan, TransferReport, add_errors
from kvoffload.worker import BlockList, Worker
from tests.torture.notes import OPEN, RUNNING, NotedStore, Notes

RANKS = 2
GROUP_BYTES = (6000, 2500)  # of a block on one rank; of no size that a drive likes
PAYLOAD_BYTES = max(GROUP_BYTES)
KV_BLOCKS = 48
KEYS = 70
SLOTS_LEAST, SLOTS_MOST = 8, 44
RUN_MAX = 6  # blocks of one request
# A machine that is busy, or a drive that is, says nothing about the block.
EXCUSES = (errno.ETIMEDOUT, errno.ECANCELED)


class Shape(NamedTuple):
    """What is drawn once for all lives of a folder, except the number of slots, which may change between them."""

    paths: tuple[Path, ...]
    slots: int
    dram_slots: int
    dram_is_tier: bool

    @classmethod
    def draw(cls, rng: random.Random, folder: Path) -> "Shape":
        paths = tuple(folder / name for name in ("a", "b")[: rng.randint(1, 2)])
        for path in paths:
            path.mkdir(parents=True)
        return cls(paths, rng.randint(SLOTS_LEAST, SLOTS_MOST), rng.randint(6, 14), rng.random() < 0.7)

    @property
    def cap_bytes(self) -> int:
        return Geometry(PAYLOAD_BYTES, RANKS, len(self.paths)).total_bytes(self.slots) + len(self.paths)

    def config(self, resume: bool = True) -> Config:
        return Config.parse(
            {
                "nvme_path": [str(path) for path in self.paths],
                "ssd_kv_offload_gb": self.cap_bytes / GB,
                "resume_kv_cache": resume,
            }
        )

    def open_store(self, resume: bool = True) -> Store:
        return Store.open(self.config(resume), {"model": "torture"}, PAYLOAD_BYTES, RANKS)


def key_of(number: int) -> BlockKey:
    return b"%032d" % number + group_of(number).to_bytes(4, "big")


def group_of(number: int) -> int:
    return int(number % 3 == 0)


def content(key: BlockKey, generation: int, group: int, rank: int) -> bytes:
    return hashlib.shake_128(b"%b/%d/%d" % (key, generation, rank)).digest(GROUP_BYTES[group])


class Rank:
    """One rank's KV cache, engine and worker."""

    def __init__(self, store: Store, rank: int, backend: str, dram_slots: int) -> None:
        self.rank = rank
        self.kv = [np.zeros((KV_BLOCKS, size), np.uint8) for size in GROUP_BYTES]
        self.engine = Engine(EngineOptions(PAYLOAD_BYTES, dram_slots, spare_slots=4, max_ops=512, io_backend=backend))
        self.engine.bind([[Region(each.ctypes.data, each.strides[0], each.shape[1])] for each in self.kv])
        self.worker = Worker(self.engine, rank, list(GROUP_BYTES))
        self.worker.apply(TransferPlan(attach=tuple(store.slot_files(number) for number in range(RANKS))))
        error = self.worker.take_report().attach_error
        assert not error, error

    def fill(self, block: int, key: BlockKey, generation: int, group: int) -> None:
        self.kv[group][block] = np.frombuffer(content(key, generation, group, self.rank), np.uint8)

    def holds(self, block: int, key: BlockKey, generation: int, group: int) -> bool:
        return self.kv[group][block].tobytes() == content(key, generation, group, self.rank)


@dataclass
class Job:
    kind: str  # "load" or "store"
    owner: str
    places: list[Placement]
    groups: list[int]
    blocks: list[int]  # in the KV cache, the same on every rank
    left: int = RANKS
    failed: dict[BlockKey, int] = field(default_factory=dict)

    @property
    def keys(self) -> list[BlockKey]:
        return [place.key for place in self.places]

    def block_list(self, transfer: int) -> BlockList:
        _, generations, dram_slots, ssd_slots = zip(*self.places, strict=True)
        return BlockList(
            transfer,
            self.keys,
            np.array(generations, np.uint64),
            np.array(dram_slots, np.uint32),
            np.array(ssd_slots, np.uint32),
            np.array(self.blocks, np.uint32),
            np.array(self.groups, np.uint16),
        )


class Deployment:
    """One life: opens the store and then does what `step` draws. AssertionError when a load delivers anything wrong.

    expected: what the index must be when opened, recency included. may_miss: blocks whose slots are not what the
    index says, by key and generation.
    """

    def __init__(self, shape: Shape, notes: Notes, rng: random.Random, backend: str, expected: list[Entry],
                 may_miss: frozenset[tuple[BlockKey, int]] = frozenset(), resume: bool = True) -> None:  # fmt: skip
        self.rng, self.notes = rng, notes
        self.may_miss = may_miss
        self.store = shape.open_store(resume)
        recovered = self.store.table()
        assert list(recovered) == expected, f"opened with {list(recovered)}, expected {expected}"
        notes.stage = OPEN
        self.journal = NotedStore(self.store, notes)
        self.ranks = [Rank(self.store, rank, backend, shape.dram_slots) for rank in range(RANKS)]
        self.manager = BlockManager(shape.dram_slots, self.store.slot_count, RANKS, self.journal,
                                    block_bytes=RANKS * slot_bytes(PAYLOAD_BYTES), dram_is_tier=shape.dram_is_tier,
                                    recovered=recovered)  # fmt: skip
        self.jobs: dict[int, Job] = {}
        self.free_blocks = list(range(KV_BLOCKS))
        self.numbers = itertools.count()
        self.loaded = 0
        notes.stage = RUNNING

    def step(self) -> None:
        """One scheduler step and some of the workers' doings."""
        draw = self.rng.random()
        if draw < 0.01:
            self.reset()
        elif draw < 0.06:
            self.journal.flush()
        for _ in range(self.rng.randint(1, 3)):
            self._request()
        self.work()
        if draw > 0.9:
            self.manager.check()

    def work(self) -> None:
        """The part of a step that is not requests."""
        self.manager.end_step()
        demotions = tuple(self.manager.plan())
        for demotion in demotions:
            self.notes.add_write(demotion.ssd_slot, demotion.generation)
        for rank in self.ranks:
            rank.worker.apply(TransferPlan(demotions=demotions))
        self.ranks[0].engine.wait(0.001)
        self.take_in()

    def reset(self) -> None:
        """Forget everything; the manager requires that loads and stores in flight end first."""
        for rank in self.ranks:
            rank.worker.wait(list(self.jobs))
        self.take_in()
        assert not self.jobs
        self.manager.reset()

    def _request(self) -> None:
        """A prompt: loads what there is of it, stores the rest, and notes that it was used."""
        start = self.rng.randrange(KEYS)
        numbers = [(start + offset) % KEYS for offset in range(self.rng.randint(1, RUN_MAX))]
        keys = [key_of(number) for number in numbers]
        if len(keys) > len(self.free_blocks):
            return
        owner = f"r{next(self.numbers)}"
        hits = list(itertools.takewhile(lambda key: self.manager.lookup(key) is not None, keys))
        if hits and self.rng.random() < 0.7:
            self._begin("load", owner, self.manager.load(hits, owner), numbers)
        elif self.rng.random() < 0.8:
            stored = self.manager.store(list(zip(keys, map(group_of, numbers), strict=True)), owner, dict.fromkeys(keys, 0))
            self._begin("store", owner, stored.placements, numbers)
        if self.rng.random() < 0.5:
            self.manager.touch(keys, owner)

    def _begin(self, kind: str, owner: str, places: list[Placement], numbers: list[int]) -> None:
        if not places:
            return
        groups = {key_of(number): group_of(number) for number in numbers}
        blocks = [self.free_blocks.pop() for _ in places]
        job = Job(kind, owner, places, [groups[place.key] for place in places], blocks)
        number = next(self.numbers)
        self.jobs[number] = job
        for rank in self.ranks:
            if kind == "store":
                for place, group, block in zip(places, job.groups, blocks, strict=True):
                    rank.fill(block, place.key, place.generation, group)
            getattr(rank.worker, kind)(number, job.block_list(number))

    def take_in(self) -> None:
        """What the workers have done, as the rim hands it to the manager."""
        report, ended = TransferReport(), []
        for rank in self.ranks:
            rank.worker.poll()
            report.add(rank.worker.take_report())
            for number, _ in rank.worker.take_finished():
                self.jobs[number].left -= 1
                if not self.jobs[number].left:
                    ended.append(number)
        for number, errors in report.failed.items():
            add_errors(self.jobs[number].failed, errors)
        for demotion, ranks in report.demoted.items():
            error = report.failed_demotions.get(demotion, 0)
            assert error in (0, *EXCUSES), f"a demotion failed: {errno.errorcode.get(error, error)}"
            self.manager.ack(demotion, ranks, error)
        for number in ended:
            self._end(self.jobs.pop(number))

    def _end(self, job: Job) -> None:
        if job.kind == "store":
            assert set(job.failed.values()) <= set(EXCUSES), f"a store failed: {job.failed}"
            self.manager.store_done(job.keys, job.failed)
        else:
            self._check_loaded(job)
            self.manager.load_done(job.keys, job.owner, job.failed)
        self.free_blocks += job.blocks

    def _check_loaded(self, job: Job) -> None:
        for place, group, block in zip(job.places, job.groups, job.blocks, strict=True):
            error = job.failed.get(place.key)
            if error is None:
                for rank in self.ranks:
                    assert rank.holds(block, place.key, place.generation, group), f"rank {rank.rank}: wrong bytes for {place}"
                self.loaded += 1
            elif error not in EXCUSES:
                is_known = error == errno.EBADMSG and (place.key, place.generation) in self.may_miss
                assert is_known, f"{place} did not load: {errno.errorcode.get(error, error)}"

    def close(self) -> None:
        for rank in self.ranks:
            rank.worker.close()
        self.store.close()
