"""What the scheduler side costs per block: pytest-benchmark over the real block manager and the real journal.

    make bench        or: pytest benchmarks/test_costs.py --benchmark-enable
"""

import pytest

from kvoffload.config import Config
from kvoffload.layout import slot_bytes
from kvoffload.manager import BlockManager
from kvoffload.store import Store

BLOCKS = 10_000  # a prompt of 160,000 tokens in blocks of 16
PAYLOAD = 65_536
KEYS = [b"%032d" % number + bytes(4) for number in range(BLOCKS)]


@pytest.fixture
def store(tmp_path):
    config = Config.parse({"nvme_path": str(tmp_path), "ssd_kv_offload_gb": 2.0})
    with Store.open(config, {"model": "benchmark"}, PAYLOAD, ranks=1) as store:
        yield store


def filled(store: Store) -> BlockManager:
    """Every block in DRAM and on SSD."""
    manager = BlockManager(BLOCKS, store.slot_count, 1, store, block_bytes=slot_bytes(PAYLOAD))
    manager.store([(key, 0) for key in KEYS], "request")
    manager.store_done(KEYS)
    while demotions := manager.plan():
        for demotion in demotions:
            manager.ack(demotion.id, 1)
    return manager


def test_lookup_of_a_long_prompt(benchmark, store):
    manager = filled(store)

    def look_up():
        hits = sum(manager.lookup(key) is not None for key in KEYS)
        manager.end_step()
        return hits

    assert benchmark(look_up) == BLOCKS


def test_load_of_a_long_prompt(benchmark, store):
    manager = filled(store)

    def load():
        manager.load(KEYS, "request")
        manager.load_done(KEYS, "request")

    benchmark(load)


def test_store_and_demotion_of_a_long_prompt(benchmark, store):
    benchmark.pedantic(filled, (store,), rounds=5)


def test_a_store_of_what_is_held_already(benchmark, store):
    manager = filled(store)
    pairs = [(key, 0) for key in KEYS]
    assert benchmark(manager.store, pairs, "request").placements == []
