"""Slot files grow by extents as they are written: an engine that ends meanwhile leaves a cache that opens, and is what it says.

The other tortures' caches fit into one extent, so that thousands of lives can be looked at; here few are, of larger blocks.
"""

import os
import random
import signal
from pathlib import Path

import numpy as np
import pytest

from kvoffload.blocks import Placement
from kvoffload.config import Config
from kvoffload.engine import Engine
from kvoffload.layout import slot_bytes
from kvoffload.manager import BlockManager
from kvoffload.store import Store
from kvoffload.types import EngineOptions, Region, TransferPlan
from kvoffload.worker import BlockList, Worker
from tests.patience import PATIENCE_S, wait_until
from tests.torture.children import LastWords
from tests.torture.deployment import Job

PAYLOAD = 1 << 20
BLOCKS = 160  # 2.5 extents
KEYS = [b"%032d" % number for number in range(BLOCKS)]
JOB = 1


class Life:
    def __init__(self, folder: Path) -> None:
        settings = Config.parse({"nvme_path": [str(folder)], "ssd_kv_offload_gb": 2 * BLOCKS * PAYLOAD / 1e9})
        self.store = Store.open(settings, {"model": "growth"}, PAYLOAD, 1)
        self.found = self.store.table()
        self.kv = np.zeros((BLOCKS, PAYLOAD), np.uint8)
        engine = Engine(EngineOptions(PAYLOAD, BLOCKS, spare_slots=4))
        engine.bind([[Region(self.kv.ctypes.data, self.kv.strides[0], PAYLOAD)]])
        self.worker = Worker(engine, 0, [PAYLOAD])
        self.worker.apply(TransferPlan(attach=(self.store.slot_files(0),)))
        self.manager = BlockManager(
            BLOCKS, self.store.slot_count, 1, self.store, block_bytes=slot_bytes(PAYLOAD), recovered=self.found
        )
        self.written = 0

    def store_all(self) -> None:
        self.kv[:] = np.arange(BLOCKS, dtype=np.uint8)[:, None]
        places = self.manager.store([(key, 0) for key in KEYS], "writer").placements
        self.worker.store(JOB, block_list(places))
        self.worker.wait([JOB])
        self.manager.store_done(KEYS)
        self.worker.apply(TransferPlan(demotions=tuple(self.manager.plan())))

    def take_in(self) -> int:
        """How many blocks are on SSD by now."""
        self.worker.poll()
        report = self.worker.take_report()
        assert not report.failed_demotions
        for demotion, ranks in report.demoted.items():
            self.manager.ack(demotion, ranks)
            self.written += 1
        return self.written

    def load_all(self) -> None:
        keys = [entry.key for entry in self.found]
        places = self.manager.load(keys, "reader")
        self.worker.load(JOB, block_list(places))
        self.worker.wait([JOB])
        assert not self.worker.take_report().failed
        for place, block in zip(places, self.kv, strict=False):
            assert (block == int(place.key)).all(), place

    def close(self) -> None:
        """As vLLM: workers first."""
        self.worker.close()
        self.store.close()


def block_list(places: list[Placement]) -> BlockList:
    """To and from the first KV blocks, in order."""
    count = len(places)
    return Job("", "", places, [0] * count, list(range(count))).block_list(JOB)


def live(folder: Path, least: int, end: str) -> None:
    """In a child, that ends here when at least so many blocks are on SSD."""
    life = Life(folder)
    life.store_all()
    wait_until(lambda: life.take_in() >= least)
    if end == "stopped":
        life.close()
        os._exit(0)
    assert life.store.flush(PATIENCE_S)
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("end", ["killed", "stopped"])
@pytest.mark.parametrize("part", [0.1, 0.5, 0.9])
def test_an_engine_that_ends_while_its_slot_file_grows_leaves_what_its_index_says(tmp_path, seed, end, part):
    least = random.Random(seed).randint(1, int(part * BLOCKS))
    pid = os.fork()
    if pid == 0:
        with LastWords(print):
            live(tmp_path, least, end)
    _, status = os.waitpid(pid, 0)
    assert status == (signal.SIGKILL if end == "killed" else 0)

    life = Life(tmp_path)
    print(f"{len(life.found)} blocks are there, {least} were waited for")
    assert len(life.found) >= least
    life.load_all()
    life.close()
