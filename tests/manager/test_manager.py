import errno

import pytest

from kvoffload.breaker import PAUSE_MIN_S
from kvoffload.types import NO_SLOT, Tier
from tests.manager.books import Books, places, prefix


def test_a_stored_block_is_found_in_dram_and_then_on_ssd_too():
    books = Books(dram=4, ssd=8)
    books.store(prefix("a", 4))
    assert books.demote() == prefix("a", 4)
    books.store(prefix("b", 4))  # every DRAM copy of a is clean, so it may go
    assert books.tiers(prefix("a", 4)) == [Tier.SSD] * 4
    assert books.tiers(prefix("b", 4)) == [Tier.DRAM] * 4


def test_store_is_dropped_when_every_slot_is_dirty():
    books = Books(dram=4, ssd=8)
    books.store(prefix("a", 4))
    assert books.store(prefix("b", 2)) == []
    assert books.manager.counters["kvoffload_dropped_stores_total",] == 2


def test_store_is_dropped_when_every_slot_is_promised_to_a_lookup():
    books = Books(dram=4, ssd=0)
    books.store(prefix("a", 4))
    for key in prefix("a", 4):
        books.manager.lookup(key)
    assert books.store(prefix("b", 1)) == []
    books.manager.end_step()
    assert books.store(prefix("b", 1)) == prefix("b", 1)


def test_a_block_that_is_being_loaded_is_not_evicted():
    books = Books(dram=4, ssd=0)
    books.store(prefix("a", 4))
    books.manager.lookup(b"a3")
    books.manager.load([b"a3"], "r")
    books.manager.end_step()
    books.store(prefix("b", 4))
    assert books.manager.tier(b"a3") is Tier.DRAM
    books.manager.load_done([b"a3"], "r")
    books.store(prefix("c", 4))
    assert books.manager.tier(b"a3") is None


def test_the_tail_of_a_prefix_is_evicted_before_its_head():
    books = Books(dram=6, ssd=0)
    books.store(prefix("a", 6))
    books.store(prefix("b", 2))
    assert books.tiers(prefix("a", 6)) == [Tier.DRAM] * 4 + [None] * 2


def test_touching_a_request_keeps_its_head_longest():
    books = Books(dram=6, ssd=0)
    books.store(prefix("a", 3))
    books.store(prefix("b", 3))
    books.manager.touch(prefix("a", 3), "r")
    books.store(prefix("c", 4))
    assert books.tiers(prefix("b", 3)) == [None] * 3
    assert books.tiers(prefix("a", 3)) == [Tier.DRAM, Tier.DRAM, None]


def test_a_hit_on_ssd_moves_into_dram():
    books = Books(dram=4, ssd=8)
    books.store(prefix("a", 4))
    books.demote()
    books.store(prefix("b", 4))
    books.demote()
    assert books.manager.lookup(b"a0") is Tier.SSD
    (place,) = books.manager.load([b"a0"], "r")
    assert place.dram_slot != NO_SLOT and place.ssd_slot != NO_SLOT
    assert books.manager.tier(b"a0") is Tier.SSD  # until it has arrived
    books.manager.load_done([b"a0"], "r")
    assert books.manager.tier(b"a0") is Tier.DRAM


def test_a_block_that_moved_into_dram_is_not_the_first_to_leave_it():
    books = Books(dram=4, ssd=16)
    books.store(prefix("a", 4))
    books.demote()
    books.store(prefix("b", 4))
    books.demote()
    for key in prefix("a", 2):
        books.manager.lookup(key)
    books.manager.load(prefix("a", 2), "r")
    books.manager.load_done(prefix("a", 2), "r")
    books.manager.end_step()
    books.store(prefix("c", 2))  # the same request's next blocks
    assert books.tiers(prefix("a", 2)) == [Tier.DRAM] * 2
    assert books.tiers(prefix("b", 4)) == [Tier.SSD] * 4


def test_a_second_load_of_a_block_on_its_way_to_dram_reads_the_ssd_by_itself():
    books = Books(dram=4, ssd=8)
    books.store(prefix("a", 1))
    books.demote()
    books.store(prefix("b", 4))
    books.demote()
    books.manager.lookup(b"a0")
    (first,) = books.manager.load([b"a0"], "r1")
    (second,) = books.manager.load([b"a0"], "r2")
    assert first.dram_slot != NO_SLOT and second == first._replace(dram_slot=NO_SLOT)
    books.manager.load_done([b"a0"], "r2")
    assert books.manager.tier(b"a0") is Tier.SSD
    books.manager.load_done([b"a0"], "r1")
    books.manager.check()


def test_a_load_passes_through_spare_memory_when_dram_is_dirty():
    books = Books(dram=4, ssd=8)
    books.store(prefix("a", 4))
    books.demote()
    books.store(prefix("b", 4))
    books.manager.lookup(b"a0")
    (place,) = books.manager.load([b"a0"], "r")
    assert place.dram_slot == NO_SLOT


def test_a_failed_load_forgets_the_block_in_both_tiers():
    books = Books(dram=4, ssd=8)
    books.store(prefix("a", 2))
    books.demote()
    books.manager.lookup(b"a0")
    books.manager.load(prefix("a", 2), "r")
    books.manager.load_done(prefix("a", 2), "r", failed={b"a0": errno.EBADMSG})
    books.manager.check()
    assert books.tiers(prefix("a", 2)) == [None, Tier.DRAM]
    assert list(books.journal.blocks) == [b"a1"]
    assert books.store([b"a0"]) == [b"a0"]


def test_a_late_load_keeps_the_block_and_stops_reads_for_a_while():
    books = Books(dram=4, ssd=8)
    books.store(prefix("a", 4))
    books.demote()
    books.store(prefix("b", 3))
    books.demote()
    books.manager.lookup(b"a3")
    books.manager.load([b"a3"], "r")
    books.manager.load_done([b"a3"], "r", failed={b"a3": errno.ETIMEDOUT})
    books.manager.check()
    assert b"a3" in books.journal.blocks
    assert books.manager.lookup(b"a3") is None
    books.now += PAUSE_MIN_S
    assert books.manager.lookup(b"a3") is Tier.SSD


@pytest.mark.parametrize("error", [errno.EREMOTEIO, errno.ECANCELED])
def test_a_failure_that_says_nothing_about_the_block_keeps_it(error):
    books = Books(dram=4, ssd=8)
    books.store(prefix("a", 2))
    books.demote()
    books.store(prefix("b", 3))
    books.manager.load(prefix("a", 2), "r")
    books.manager.load_done(prefix("a", 2), "r", failed={b"a1": error})
    books.manager.check()
    assert set(prefix("a", 2)) <= set(books.journal.blocks)
    assert books.manager.lookup(b"a1") is not None


def test_a_block_that_is_not_held_is_loaded_from_nowhere():
    books = Books(dram=4, ssd=8)
    (place,) = books.manager.load([b"a0"], "r")
    assert (place.dram_slot, place.ssd_slot) == (NO_SLOT, NO_SLOT)
    books.manager.load_done([b"a0"], "r", failed={b"a0": errno.ENOENT})
    books.manager.check()


def test_a_store_does_not_evict_its_own_prefix():
    books = Books(dram=8, ssd=0)
    books.store(prefix("a", 6))
    books.store(prefix("b", 2))
    stored = books.manager.store([(key, 0) for key in prefix("a", 12)], "w", own=places(prefix("a", 12)))
    assert [place.key for place in stored.placements] == [b"a6", b"a7"]
    assert stored.dropped == 4
    assert books.tiers(prefix("a", 6)) == [Tier.DRAM] * 6


def test_a_prompt_longer_than_dram_goes_to_the_ssd_whole():
    books = Books(dram=10, ssd=200)
    blocks = prefix("a", 100)
    for start in range(0, 100, 5):
        stored = books.manager.store([(key, 0) for key in blocks[start : start + 5]], "w", own=places(blocks))
        assert stored.dropped == 0
        books.manager.store_done([place.key for place in stored.placements])
        books.demote()
    assert all(Tier.SSD in books.manager.tiers(key) for key in blocks)


def test_a_slot_the_drive_could_not_write_is_the_last_to_be_tried_again():
    books = Books(dram=4, ssd=8)
    books.store(prefix("a", 2))
    first = [demotion.ssd_slot for demotion in books.manager.plan()]
    for number in range(2):
        books.manager.ack(number, 1, errno.ETIMEDOUT)
    books.now += PAUSE_MIN_S
    assert not set(first) & {demotion.ssd_slot for demotion in books.manager.plan()}


def test_a_late_copy_from_dram_says_nothing_about_the_ssd():
    books = Books(dram=4, ssd=8)
    books.store([b"a"])
    books.demote()
    books.manager.lookup(b"a")
    books.manager.load([b"a"], "r")
    books.manager.load_done([b"a"], "r", failed={b"a": errno.ETIMEDOUT})
    assert books.manager.tiers(b"a") == [Tier.DRAM, Tier.SSD]


def test_a_failed_store_leaves_nothing_behind():
    books = Books(dram=4, ssd=8)
    placed = books.manager.store([(key, 0) for key in prefix("a", 2)], "w").placements
    books.manager.store_done([place.key for place in placed], failed={b"a1"})
    assert books.tiers(prefix("a", 2)) == [Tier.DRAM, None]
    assert books.demote() == [b"a0"]


def test_a_demotion_counts_only_when_every_rank_acknowledged_it():
    books = Books(dram=4, ssd=8, ranks=3)
    books.store([b"a"])
    (demotion,) = books.manager.plan()
    books.manager.ack(demotion.id, 2)
    assert not books.journal.blocks
    books.manager.ack(demotion.id, 1)
    assert list(books.journal.blocks) == [b"a"]


def test_one_rank_failing_a_demotion_fails_it():
    books = Books(dram=4, ssd=8, ranks=2)
    books.store([b"a"])
    (demotion,) = books.manager.plan()
    books.manager.ack(demotion.id, 1, errno.EIO)
    books.manager.ack(demotion.id, 1)
    assert not books.journal.blocks
    assert books.manager.tier(b"a") is Tier.DRAM
    books.manager.check()


@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC])
def test_writes_pause_after_a_failure_and_are_tried_again(error):
    books = Books(dram=4, ssd=8)
    books.store([b"a"])
    assert books.demote(error) == [b"a"]
    assert books.manager.pending(), "an idle engine waits for the end of the first pause"
    assert books.demote() == []
    books.now += PAUSE_MIN_S
    assert books.demote(error) == [b"a"]
    assert not books.manager.pending(), "and of no longer one"
    assert books.demote() == []
    books.now += 2 * PAUSE_MIN_S
    assert books.manager.pending()
    assert books.demote() == [b"a"]
    assert not books.manager.pending()


def test_writes_pause_after_a_late_one_which_is_the_first_to_be_tried_again():
    books = Books(dram=4, ssd=8)
    books.store(prefix("a", 2))
    assert books.demote(errno.ETIMEDOUT) == prefix("a", 2)
    assert books.demote() == [] and not books.manager.pending()
    books.store(prefix("b", 2))
    assert books.demote() == []
    books.now += PAUSE_MIN_S
    assert books.demote() == prefix("a", 1)
    assert books.demote() == [*prefix("b", 2), b"a1"]
    assert [books.manager.tiers(key) for key in prefix("a", 2)] == [[Tier.DRAM, Tier.SSD]] * 2


def test_dirty_blocks_may_be_evicted_while_writes_pause():
    books = Books(dram=4, ssd=8)
    books.store(prefix("a", 4))
    books.demote(errno.EIO)
    assert books.store(prefix("b", 2)) == prefix("b", 2)


def test_bounce_slots_are_free_again_once_the_block_is_on_ssd():
    books = Books(dram=4, ssd=8, tier=False)
    books.store(prefix("a", 4))
    assert books.tiers(prefix("a", 4)) == [None] * 4
    books.demote()
    assert books.tiers(prefix("a", 4)) == [Tier.SSD] * 4
    assert books.manager.usage()[Tier.DRAM] == (0, 4)
    books.manager.lookup(b"a0")
    (place,) = books.manager.load([b"a0"], "r")
    assert place.dram_slot == NO_SLOT


def test_a_block_the_ssd_lost_to_a_younger_one_is_not_written_again():
    books = Books(dram=8, ssd=4)
    books.store(prefix("a", 4))
    books.demote()
    books.store(prefix("b", 4), "another")
    assert books.demote() == prefix("b", 4)
    assert books.demote() == []
    assert books.tiers(prefix("a", 4)) == [Tier.DRAM] * 4
    assert not books.manager.pending()


def test_without_the_ssd_dram_goes_on_and_the_journal_keeps_what_it_knows():
    books = Books(dram=4, ssd=8)
    books.store(prefix("a", 4))
    books.demote()
    books.store(prefix("b", 2))
    books.demote()
    journalled = dict(books.journal.blocks)
    books.manager.disable_ssd()
    books.manager.check()
    assert books.journal.blocks == journalled
    assert books.tiers(prefix("a", 2)) == [Tier.DRAM] * 2  # their copies in DRAM are still good
    assert books.tiers(prefix("a", 4)[2:]) == [None] * 2
    assert books.tiers(prefix("b", 2)) == [Tier.DRAM] * 2
    assert books.store(prefix("c", 4)) == prefix("c", 4)
    assert books.demote() == []
    assert not books.manager.pending()


def test_one_load_does_not_look_for_dram_slots_again_and_again():
    books = Books(dram=200, ssd=400)
    books.store(prefix("a", 200))
    books.demote()
    books.store(prefix("b", 200))
    books.demote()
    for key in [*prefix("b", 200), *prefix("a", 200)]:
        books.manager.lookup(key)
    asked = []
    take = books.manager._index.take_dram_slot
    books.manager._index.take_dram_slot = lambda *own: asked.append(1) or take(*own)
    books.manager.load(prefix("a", 200), "r")
    assert len(asked) == 1


def test_a_block_that_is_offered_twice_in_one_store_gets_one_slot():
    books = Books(dram=4, ssd=8)
    assert books.store([b"a", b"a", b"b"]) == [b"a", b"b"]


def test_a_reset_keeps_the_memory_that_a_load_may_still_fill_until_the_drive_answers():
    """It may be late on one rank already, which nobody will tell when the load is forgotten."""
    books = Books(dram=2, ssd=8)
    books.store([b"a"])
    books.demote()
    books.store([b"b", b"c"])
    books.demote()
    (place,) = books.manager.load([b"a"], "r")
    assert place.dram_slot != NO_SLOT
    books.manager.reset()
    books.manager.check()
    assert books.store([b"d", b"e"]) == [b"d"]
    books.demote()  # answered
    books.store([b"f"])
    assert books.tiers([b"d", b"f"]) == [Tier.DRAM, Tier.DRAM]
