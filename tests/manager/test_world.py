import errno
import itertools
import random

import pytest

from kvoffload.breaker import BreakerState
from kvoffload.manager import BlockManager
from kvoffload.policy import POLICIES
from kvoffload.table import BlockTable, Entry
from kvoffload.types import Tier
from tests.manager.world import BLOCK_BYTES, Mood, World

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
@pytest.mark.parametrize("eviction", POLICIES)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_load_delivers_the_bytes_that_were_stored(seed, shape, eviction, ranks, fault_rate):
    world = World(seed, ranks, fault_rate=fault_rate, eviction=eviction, **shape)
    world.live(STEPS, until=lambda: world.delivered > 5 and (world.failed_loads > 0 or not fault_rate))
    assert bool(world.failed_loads) == bool(fault_rate)
    world.drain()
    world.manager.check()
    assert not world.jobs


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("fault_rate", [0.0, 0.02])
@pytest.mark.parametrize("eviction", POLICIES)
@pytest.mark.parametrize("shape", SHAPES[:2] + SHAPES[3:])
def test_drives_that_fail_stall_fill_up_lose_writes_and_come_back_cost_no_wrong_byte(seed, shape, eviction, ranks, fault_rate):
    world = World(seed, ranks, drives=3, backlog=20, fault_rate=fault_rate, eviction=eviction, **shape)
    numbers = itertools.count()

    def step() -> None:
        if next(numbers) % 10 == 0:
            world.set_mood(world.rng.randrange(3), world.rng.choice(list(Mood)))
        world.step()

    def has_opened() -> bool:
        return any(name == "kvoffload_drive_openings_total" for name, *_ in world.manager.counters)

    world.live(2 * STEPS, until=lambda: has_opened() and world.delivered > 5, step=step)
    for drive in range(3):
        world.set_mood(drive, Mood.WELL)
    world.fault_rate = 0.0
    for worker in world.workers:
        worker.fault_rate = 0.0
    world.drain()
    world.check()
    world.written.clear()
    world.live(STEPS, until=lambda: all(world.written[drive] for drive in range(3)))  # each is taken back
    assert all(drive.reads.state is not BreakerState.OPEN for drive in world.manager._drives)


@pytest.mark.parametrize("mood", [Mood.DEAD, Mood.HUNG, Mood.FULL])
@pytest.mark.parametrize("shape", SHAPES[:2])
def test_one_bad_drive_of_two_fails_alone_and_is_taken_back(seed, shape, mood):
    world = World(seed, 2, drives=2, backlog=20, **shape)
    world.live(STEPS // 2)
    world.set_mood(1, mood)
    world.live(STEPS // 2)
    world.written.clear(), world.read.clear(), world.asked.clear()
    world.live(2 * STEPS)
    if mood is not Mood.FULL:
        assert world.asked[1] < 60, "a trial now and then"
    # The other works on, and a full drive still serves loads.
    world.live(0, until=lambda: world.written[0] > 20 and world.read[0] > 20 and (world.read[1] > 0 or mood is not Mood.FULL))
    assert not world.written[1]
    assert bool(world.read[1]) == (mood is Mood.FULL)
    world.set_mood(1, Mood.WELL)
    world.drain()
    world.written.clear(), world.read.clear()
    world.live(STEPS, until=lambda: world.written[1] > 20 and world.read[1] > 20)


def test_a_drive_that_lost_writes_loses_those_blocks_only(seed):
    world = World(seed, 1, drives=2, backlog=20, dram=12, ssd=40)
    world.live(STEPS)
    world.set_mood(1, Mood.LOSSY)

    def damaged() -> set[bytes]:
        held, journalled = world.workers[0].ssd, world.journal.blocks.items()
        return {key for key, (slot, generation, _) in journalled if held.get(slot, ())[:2] != (key, generation)}

    while len(damaged()) < 5:
        world.step()
    world.set_mood(1, Mood.WELL)
    world.drain()
    lost = damaged()
    sound = world.journal.blocks.keys() - lost
    assert lost and sound
    for key in sorted(lost | sound):
        world.manager.load([key], "reader")
        error = 0 if key in sound or world.manager.tier(key) is Tier.DRAM else errno.EBADMSG
        world.manager.load_done([key], "reader", {key: error} if error else {})
        world.manager.check()
    assert sound <= world.journal.blocks.keys()


@pytest.mark.parametrize("shape", SHAPES[:2])
def test_what_was_journalled_is_found_again_after_a_kill(seed, shape):
    world = World(seed, 2, **shape)
    world.live(STEPS // 4, until=lambda: len(world.journal.blocks) > 0)
    survivors = dict(world.journal.blocks)
    entries = [Entry(key, slot, generation, group) for key, (slot, generation, group) in survivors.items()]
    again = BlockManager(shape["dram"], shape["ssd"], 2, world.journal, block_bytes=BLOCK_BYTES, recovered=BlockTable.of(entries))
    again.check()
    for key, (slot, generation, _) in survivors.items():
        assert again.lookup(key) is Tier.SSD
        for rank, worker in enumerate(world.workers):
            assert worker.ssd[slot] == (key, generation, world.contents[key, generation, rank])


def test_reset_forgets_everything_and_leaks_nothing(seed):
    world = World(seed, 2, dram=12, ssd=40, fault_rate=0.05)
    world.live(STEPS // 4)
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
    late = sum(len(drive.late_slots) for drive in world.manager._drives)  # kept until the drive is used again
    assert [used for used, _ in world.manager.usage().values()] == [late, 0]
    world.live(STEPS // 4)
