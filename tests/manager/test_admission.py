"""Which blocks the SSD takes: by policy, by budget, and never a tail behind a head that was refused."""

import errno
import random
from collections import OrderedDict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvoffload.admission import (
    BURST_BLOCKS_MIN,
    DAY_S,
    FIRST_USE_FLOOR,
    GHOSTS_MAX,
    HOLES_MAX,
    Admission,
    AdmitAll,
    Budget,
    Ghosts,
    SecondTouch,
    WrittenToday,
)
from kvoffload.types import Tier
from tests.manager.books import Books, prefix
from tests.manager.world import World

BOTH = [pytest.param(AdmitAll, id="all"), pytest.param(SecondTouch, id="second-touch")]
SLACK = 1e-6  # of sums of floats


def unlimited(books: Books) -> None:
    """As much saved up as may be: the lower and the upper half of the bucket are full."""
    books.now += DAY_S


# -- the bucket --------------------------------------------------------------------------------------------------------


@given(
    st.integers(1, 10**15),
    st.integers(1, 10**9),
    st.lists(st.tuples(st.floats(-1e5, 1e5), st.integers(0, 40), st.booleans()), max_size=40),
)
def test_no_window_holds_more_than_its_time_gives_and_one_burst_however_often_the_process_starts(per_day, block, steps):
    now, clock = 0.0, [0.0]
    budget = Budget(per_day, block, lambda: clock[0])
    written = []  # how far the clock ever went forward, and bytes
    for jump, wanted, restarts in steps:
        clock[0] += jump
        now += max(0.0, jump)
        if restarts and written:
            budget = Budget(per_day, block, lambda: clock[0], now - written[-1][0])
        for _ in range(wanted):
            if budget.allows(0):
                budget.take()
                written.append((now, block))
    for begin in range(len(written)):
        total = 0
        for at, size in written[begin:]:
            total += size
            given_by_time = budget.rate * (at - written[begin][0])
            assert total <= (budget.burst + given_by_time) * (1 + SLACK), (begin, at)


def test_lives_of_ten_minutes_write_blocks_of_a_first_use_too():
    clock, written, lives = [0.0], 0, 50
    for life in range(lives):
        budget = Budget(24 * 100, 1, lambda: clock[0], 0.0 if life else None)
        for _ in range(60):
            clock[0] += 10.0
            while budget.allows(0, FIRST_USE_FLOOR):
                budget.take()
                written += 1
    assert 0.4 <= written / (budget.rate * clock[0]) <= 1


def test_a_year_of_silence_saves_up_one_burst():
    books = Books(dram=4, ssd=8, budget=24 * 100)
    budget = books.admission.budget
    books.now = 365 * DAY_S
    assert budget.left() == budget.burst == 100


def test_a_clock_that_goes_backwards_adds_nothing_and_takes_nothing():
    clock = [1000.0]
    budget = Budget(24 * 100, 1, lambda: clock[0])
    before = budget.left()
    clock[0] = 0.0
    assert budget.left() == before
    clock[0] = 36.0
    assert budget.left() == pytest.approx(before + 1)


def test_a_first_process_begins_with_half_a_burst():
    budget = Budget(24 * 100, 1, lambda: 0.0)
    assert budget.left() == budget.burst / 2 == 50


@pytest.mark.parametrize("idle_s, left", [(-5.0, 0), (0.0, 0), (36.0, 1), (1800.0, 50), (1e9, 50)])
def test_a_process_that_follows_another_begins_with_what_was_saved_up_since_and_half_a_burst_at_most(idle_s, left):
    assert Budget(24 * 100, 1, lambda: 0.0, idle_s).left() == pytest.approx(left)


def test_the_smallest_budget_still_writes_some():
    clock = [0.0]
    budget = Budget(1, 10**6, lambda: clock[0])
    assert budget.allows(0)
    assert budget.burst == BURST_BLOCKS_MIN * 10**6


# -- what is remembered ------------------------------------------------------------------------------------------------


@given(st.integers(1, 5), st.lists(st.tuples(st.binary(max_size=1), st.integers(1, 9) | st.none())))
def test_ghosts_are_the_last_that_left(capacity, events):
    ghosts, model = Ghosts(capacity), OrderedDict()
    for key, uses in events:
        if uses is None:
            assert ghosts.come(key) == model.pop(key, 0)
        else:
            ghosts.leave(key, uses)
            model.pop(key, None)
            model[key] = uses
            if len(model) > capacity:
                model.popitem(last=False)
        assert len(ghosts) == len(model)


def test_memory_of_blocks_and_requests_is_bounded():
    admission = Admission(SecondTouch(), None, 10**9)
    assert admission.ghosts._capacity == GHOSTS_MAX
    for number in range(2 * HOLES_MAX):
        assert admission.refusal(f"r{number}", 0, 0, 1, 0) == "first_use"
    assert len(admission._holes) == HOLES_MAX


def test_what_is_written_today_begins_at_midnight_utc_and_a_clock_set_back_does_not_begin_it_anew():
    today = WrittenToday(10 * DAY_S + 5)
    assert today.of(100, 10 * DAY_S + 10) == 100
    assert today.of(150, 11 * DAY_S - 1) == 150
    assert today.of(170, 11 * DAY_S + 1) == 20
    assert today.of(180, 10 * DAY_S + 9) == 30
    assert today.of(190, 11 * DAY_S + 9) == 40


# -- whole prefixes ----------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 3), st.integers(0, 5000)), max_size=200))
def test_no_block_of_a_request_is_written_behind_one_that_was_refused(offers):
    clock = [0.0]
    admission = Admission(AdmitAll(), Budget(24 * 40, 1, lambda: clock[0]), 8)
    refused, depths = set(), [0, 0, 0]
    for group, uses, wait in offers:
        clock[0] += wait
        reason = admission.refusal("r", group, depths[group], uses, 0)
        depths[group] += 1
        if reason:
            refused.add(group)
            continue
        assert group not in refused
        admission.written()


def test_a_block_of_the_same_request_in_another_group_is_not_behind():
    admission = Admission(SecondTouch(), None, 8)
    assert admission.refusal("r", 0, 3, 1, 0) == "first_use"
    assert admission.refusal("r", 0, 4, 2, 0) == "behind"
    assert admission.refusal("r", 0, 2, 2, 0) == ""
    assert admission.refusal("r", 1, 4, 2, 0) == ""
    assert admission.refusal("other", 0, 4, 2, 0) == ""


# -- in the block manager ----------------------------------------------------------------------------------------------


def refusals(books: Books | World) -> dict[str, int]:
    return {labels[0]: n for (name, *labels), n in books.manager.counters.items() if name == "kvoffload_refused_admissions_total"}


def test_by_default_everything_is_written_and_nothing_is_remembered():
    books = Books(dram=8, ssd=8)
    books.store(prefix("a", 4))
    assert books.demote() == prefix("a", 4)
    assert books.admission.ghosts is None and not refusals(books)


def test_second_touch_writes_what_another_request_uses_again():
    books = Books(dram=8, ssd=8, policy=SecondTouch())
    books.store(prefix("a", 4), "r1")
    books.manager.touch(prefix("a", 4), "r1")
    assert books.demote() == [] and refusals(books) == {"first_use": 1, "behind": 3}
    books.manager.touch(prefix("a", 2), "r2")
    assert books.demote() == prefix("a", 2)
    assert books.tiers(prefix("a", 4)) == [Tier.DRAM] * 4


def test_a_refused_block_may_be_evicted_and_is_known_when_it_comes_back():
    books = Books(dram=4, ssd=8, policy=SecondTouch())
    books.store(prefix("a", 4), "r1")
    assert books.store(prefix("b", 4), "r2") == prefix("b", 4)
    assert books.tiers(prefix("a", 4)) == [None] * 4
    books.store(prefix("a", 4), "r3")
    assert books.demote() == prefix("a", 4)


def test_a_refused_block_leaves_its_bounce_slot_at_once_and_is_known_when_it_comes_back():
    books = Books(dram=4, ssd=8, tier=False, policy=SecondTouch())
    books.store(prefix("a", 4), "r1")
    assert books.manager.usage()[Tier.DRAM] == (0, 4) and books.demote() == []
    books.store(prefix("a", 4), "r2")
    assert books.demote() == prefix("a", 4)
    assert books.tiers(prefix("a", 4)) == [Tier.SSD] * 4


def test_a_spent_budget_stores_the_head_of_a_prefix_and_no_tail():
    books = Books(dram=64, ssd=64, budget=24 * 32)
    unlimited(books)
    assert len(books.store(prefix("a", 40), "r1")) == 40
    assert books.demote() == prefix("a", 16), "half a burst is for blocks that were used before"
    assert refusals(books) == {"budget": 1, "behind": 23}
    books.manager.touch(prefix("a", 40), "r2")
    assert books.demote() == prefix("a", 32)[16:], "used blocks take the rest, in order"
    assert books.admission.budget.left() == 0


def test_used_blocks_are_written_while_others_are_refused():
    books = Books(dram=64, ssd=64, budget=24 * 32)
    books.store(prefix("a", 8), "r1")
    assert books.demote() == []
    books.manager.touch(prefix("a", 8), "r2")
    books.store(prefix("b", 8), "r3")
    assert books.demote() == prefix("a", 8)


def test_blocks_admitted_and_not_yet_written_are_counted_against_the_budget():
    books = Books(dram=64, ssd=64, budget=24 * 32)
    for number in range(4):
        books.store(prefix("abcd"[number], 8), f"r{number}")
        books.manager.touch(prefix("abcd"[number], 8), f"s{number}")
    assert len(books.demote()) == 16, "half a burst"


def test_a_failed_write_is_paid_for_and_repeated_only_if_the_budget_has_it():
    books = Books(dram=64, ssd=64, budget=24 * 32)
    books.store(prefix("a", 16), "r1")
    books.manager.touch(prefix("a", 16), "r2")
    assert len(books.demote(errno.EIO)) == 16
    books.now += 2.0  # past the breaker's pause
    assert books.demote() == [] and books.manager.pending() is False
    assert books.tiers(prefix("a", 16)) == [Tier.DRAM] * 16
    books.now += 3600.0  # the budget is there again
    assert books.demote() == [], "nobody asks for them"
    books.manager.touch(prefix("a", 16), "r3")
    assert books.demote()[:1] == prefix("a", 1), "as the drive's trial"
    assert books.demote() == prefix("a", 16)[1:]


def test_a_reset_forgets_what_was_used():
    books = Books(dram=4, ssd=8, policy=SecondTouch())
    books.store(prefix("a", 4), "r1")
    books.manager.reset()
    assert len(books.admission.ghosts) == 0
    books.store(prefix("a", 4), "r2")
    assert books.demote() == []


def test_a_block_is_read_back_once_and_only_if_this_process_wrote_it():
    books = Books(dram=4, ssd=16)
    books.store(prefix("a", 4), "r1")
    books.demote()
    books.store(prefix("b", 4), "r2")  # pushes the DRAM copies out
    books.demote()
    for owner in ("r3", "r4"):
        books.manager.load(prefix("a", 2), owner)
        books.manager.load_done(prefix("a", 2), owner)
        books.store(prefix("c" + owner, 4), owner)
        books.demote()
    assert books.manager.counters["kvoffload_read_back_blocks_total",] == 2


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("fault_rate", [0.0, 0.1])
@pytest.mark.parametrize("policy", BOTH)
@pytest.mark.parametrize("per_hour", [0, 24], ids=["no budget", "a tight budget"])
@pytest.mark.parametrize("tier", [True, False], ids=["both tiers", "bounce slots only"])
def test_with_any_admission_loads_are_right_and_writes_stay_within_the_budget(tier, per_hour, policy, fault_rate, ranks):
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    world = World(seed, ranks, 12, 40, tier=tier, fault_rate=fault_rate, drives=2, policy=policy(), budget=24 * per_hour)
    budget = world.admission.budget

    def step() -> None:
        world.now += 2.0
        world.step()
        if budget is not None:
            assert world.writes <= (budget.burst / 2 + budget.rate * world.now) * (1 + SLACK)
            assert budget.left() >= len(world.manager._index.dirty)

    def has_happened() -> bool:
        is_enough = budget is None or not fault_rate  # without faults it is for some seeds
        return world.delivered > 0 and sum(world.written.values()) > 0 and (is_enough or refusals(world).get("budget", 0) > 0)

    world.live(400, until=has_happened, step=step)
    world.drain()
    world.check()
