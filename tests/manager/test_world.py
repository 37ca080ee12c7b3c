import random

import pytest

from kvoffload.manager import BlockManager
from kvoffload.types import Tier
from tests.manager.world import World

STEPS = 400
SHAPES = [
    pytest.param({"dram": 12, "ssd": 40}, id="both tiers"),
    pytest.param({"dram": 4, "ssd": 40, "tier": False}, id="bounce slots only"),
    pytest.param({"dram": 20, "ssd": 0}, id="no ssd"),
    pytest.param({"dram": 40, "ssd": 10}, id="ssd smaller than dram"),
]


@pytest.fixture
def seed(request):
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    return seed


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("fault_rate", [0.0, 0.1])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_load_delivers_the_bytes_that_were_stored(seed, shape, ranks, fault_rate):
    world = World(seed, ranks, fault_rate=fault_rate, **shape)
    for _ in range(STEPS):
        world.step()
    assert world.delivered > 20
    assert bool(world.failed_loads) == bool(fault_rate)
    world.drain()
    world.manager.check()
    assert not world.jobs


@pytest.mark.parametrize("shape", SHAPES[:2])
def test_what_was_journalled_is_found_again_after_a_kill(seed, shape):
    world = World(seed, 2, **shape)
    for _ in range(STEPS // 4):
        world.step()
    survivors = dict(world.journal.blocks)
    assert survivors
    entries = [Entry(key, slot, generation, group) for key, (slot, generation, group) in survivors.items()]
    again = BlockManager(shape["dram"], shape["ssd"], 2, world.journal, recovered=entries)
    again.check()
    for key, (slot, generation, _) in survivors.items():
        assert again.lookup(key) is Tier.SSD
        for rank, worker in enumerate(world.workers):
            assert worker.ssd[slot] == (key, generation, world.contents[key, generation, rank])


def test_reset_forgets_everything_and_leaks_nothing(seed):
    world = World(seed, 2, dram=12, ssd=40, fault_rate=0.05)
    for _ in range(STEPS // 4):
        world.step()
    for worker in world.workers:  # what REQUIRES of reset says: loads and stores end first
        finished = [action for action in worker.waiting if action.kind != "demote"]
        worker.waiting = [action for action in worker.waiting if action.kind == "demote"]
        for action in finished:
            worker._targets.difference_update(worker._fills(action))
    world.jobs.clear()
    world.manager.reset()
    world.manager.check()
    assert all(world.manager.tier(key) is None for prefix in world._prefixes for key in prefix)
    world.drain()
    assert all(used == 0 for used, _ in world.manager.usage().values())
    for _ in range(STEPS // 4):
        world.step()


class Entry:
    def __init__(self, key, slot, generation, group):
        self.key, self.slot, self.generation, self.group = key, slot, generation, group
