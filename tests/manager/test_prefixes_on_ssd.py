"""What of a prefix stays on the SSD, and what of it is not written: heads before tails."""

import errno

import pytest

from kvoffload import manager as manager_module
from kvoffload.admission import SecondTouch
from kvoffload.breaker import PAUSE_MIN_S
from kvoffload.policy import POLICIES
from kvoffload.policy.aged import PASSED_MAX as PASSED_IN_A_SEARCH
from kvoffload.types import Tier
from tests.manager.books import Books, places, prefix


@pytest.mark.parametrize("eviction", POLICIES)
@pytest.mark.parametrize(("dram", "ssd"), [(0, 4), (4, 0)])
def test_under_every_policy_a_prefix_loses_its_tail_before_its_head(eviction, dram, ssd):
    books = Books(dram or 8, ssd, tier=dram > 0, eviction=eviction)
    for name, length in (("a", 4), ("b", 1)):
        books.store(prefix(name, length))
        books.demote()
    assert [tier is not None for tier in books.tiers(prefix("a", 4))] == [True, True, True, False]


@pytest.mark.parametrize("eviction", POLICIES)
def test_a_prompt_longer_than_the_ssd_keeps_its_head_there_and_writes_no_more(eviction):
    books = Books(dram=4, ssd=5, tier=False, eviction=eviction)
    blocks = prefix("a", 12)
    for _ in range(3):
        rest = [key for key in blocks if books.manager.tier(key) is None]
        while rest:
            stored = books.manager.store([(key, 0) for key in rest], "w", own=places(blocks))
            books.manager.store_done([place.key for place in reversed(stored.placements)])
            books.demote()
            rest = rest[len(stored.placements) :]
        assert books.tiers(blocks) == [Tier.SSD] * 5 + [None] * 7
    assert books.manager.counters["kvoffload_demotions_total",] == 5
    assert not books.manager.pending()
    books.store(prefix("b", 2), "another")
    assert books.demote() == prefix("b", 2), "what another request wants is another matter"


def test_blocks_that_wait_behind_one_that_only_its_own_head_could_make_room_for_are_written():
    books = Books(dram=12, ssd=4)
    books.store(prefix("a", 6), "a")
    books.store(prefix("b", 2), "b")
    books.demote()
    assert books.demote() == prefix("b", 2)
    assert [Tier.SSD in books.manager.tiers(key) for key in prefix("a", 6)] == [True, True, False, False, False, False]
    assert books.manager.counters["kvoffload_refused_admissions_total", "own_head"] == 2


def test_a_prompts_tail_for_which_there_is_no_room_does_not_hold_up_what_others_wait_to_write():
    """Not even while something is in flight that may make room: on a busy server something always is."""
    books = Books(dram=12, ssd=4)
    books.store(prefix("b", 2), "b")
    books.demote()
    books.store(prefix("a", 4), "a")
    books.manager.read_for_time(prefix("b", 2), "reader")
    assert books.demote() == prefix("a", 2)
    books.store(prefix("c", 1), "c")
    assert books.demote() == [b"c0"]


def test_what_was_left_off_is_offered_again_before_what_a_later_request_has_behind_it():
    """A chat's next turn: else its new blocks would be written behind the ones that are missing."""
    books = Books(dram=12, ssd=4)
    books.store(prefix("a", 6), "a")
    books.demote(), books.demote()
    books.store(prefix("b", 3), "b")
    books.demote()
    books.store(prefix("a", 7), "a again")
    assert books.demote() == [b"a4", b"a5", b"a6"]
    assert not books.manager._index.left_off & {b"a4", b"a5"}


def test_leaving_off_is_bounded_in_a_step(monkeypatch):
    monkeypatch.setattr(manager_module, "PASSED_MAX", 10)
    books = Books(dram=100, ssd=4)
    books.store(prefix("a", 60), "a")
    books.demote()
    left = []
    while books.manager.queues()["demotion_waiting"]:
        before = books.manager.counters["kvoffload_refused_admissions_total", "own_head"]
        books.demote()
        left.append(books.manager.counters["kvoffload_refused_admissions_total", "own_head"] - before)
    assert sum(left) == 56 and max(left) <= 10


def test_nothing_is_written_behind_what_was_left_off():
    books = Books(dram=12, ssd=4)
    books.store(prefix("a", 6), "a")
    books.demote()
    assert books.demote() == []
    books.store(prefix("b", 4), "b")
    books.demote()
    stored = books.manager.store([(b"a6", 0)], "a", places(prefix("a", 7)))
    books.manager.store_done([place.key for place in stored.placements])
    assert books.demote() == [], "though there are others' blocks to evict now"


def test_a_full_drive_is_not_asked_for_room_for_the_tail_of_a_prompt_of_which_it_has_the_head():
    books = Books(dram=12, ssd=8)
    books.store(prefix("b", 3), "b")
    books.demote()
    books.store(prefix("c", 1), "c")
    books.demote(errno.ENOSPC)
    books.now += 2 * PAUSE_MIN_S
    books.demote()  # c takes the place of a b
    asked = []
    for blocks in (prefix("a", 2), prefix("a", 6)):
        books.store(blocks, "a")
        for _ in range(4):
            demotions = books.manager.plan()
            asked += [demotion.ssd_slot for demotion in demotions]
            for demotion in demotions:
                books.manager.ack(demotion.id, 1)
    assert max(asked) < 4 and books.manager.counters["kvoffload_drive_openings_total", "0", "write", "ENOSPC"] <= 1


def test_looks_at_a_prompts_own_head_are_bounded_in_a_step(monkeypatch):
    """One used before is wanted more than a new head under a long half-life, so the head comes first in each search."""
    monkeypatch.setattr(manager_module, "PASSED_MAX", 20)
    books = Books(dram=400, ssd=200)
    books.store(prefix("b", 100), "b")
    books.demote()
    for number in range(6):
        books.manager.touch(prefix("b", 100), f"again {number}")
    books.store(prefix("a", 180), "a")
    steps = 0
    while books.manager.queues()["demotion_waiting"] and steps < 100:
        books.demote()
        assert books.manager._index.passed <= 20 + PASSED_IN_A_SEARCH
        steps += 1
    assert not books.manager.queues()["demotion_waiting"]


def test_a_load_of_a_tail_whose_head_is_in_gpu_memory_uses_the_head_as_well():
    """Offered again by that load, the tail would evict it from the SSD, where it does not look like the same request's."""
    books = Books(dram=12, ssd=4)
    blocks = prefix("a", 6)
    books.store(blocks, "a")
    books.demote(), books.demote()
    books.manager.load(blocks[4:], "b", own=places(blocks))
    books.demote()
    assert [Tier.SSD in books.manager.tiers(key) for key in blocks] == [True] * 4 + [False] * 2


def test_holes_of_a_request_that_ends_are_none_of_the_one_that_blocks_were_admitted_for():
    """It uses all its blocks once more as it ends, in the step in which its successor was given its place."""
    books = Books(dram=12, ssd=12, policy=SecondTouch())
    blocks = prefix("c", 6)
    books.store(blocks, "c")
    assert books.demote() == []
    books.manager.touch(blocks, "d")
    books.manager.touch(blocks, "c")
    assert books.demote() == blocks


def test_stale_names_of_what_was_left_off_do_not_push_out_those_still_in_dram():
    books = Books(dram=8, ssd=2)
    for number in range(40):
        books.store(prefix(f"{number} ", 8), f"r{number}")
        books.demote(), books.demote()
        left = {key for key in prefix(f"{number} ", 8) if books.tiers([key]) == [Tier.DRAM]} - set(books.journal.blocks)
        assert left <= books.manager._index.left_off
        assert len(books.manager._index.left_off) <= 2 * 8 + 1
