"""The block manager over several drives: what of theirs it uses when one of them fails, and that it takes it back."""

import errno

from kvoffload.breaker import PAUSE_MAX_S, PAUSE_MIN_S
from kvoffload.drives import FULL_S, QUIET_S
from kvoffload.types import NO_SLOT, Tier
from tests.manager.books import Books, prefix


def on_ssd_only(books: Books, name: str, length: int) -> list[bytes]:
    """Blocks whose DRAM copies others have taken; the SSD's slots 0, 1, 2, ... hold them in this order."""
    books.store(prefix(name, length))
    assert books.demote() == prefix(name, length)
    books.store(prefix("other", length))
    books.demote()
    assert books.tiers(prefix(name, length)) == [Tier.SSD] * length
    return prefix(name, length)


def load(books: Books, blocks: list[bytes], error: int = 0) -> list[Tier | None]:
    """Looks the blocks up and loads those that are found in one request; all fail with `error`."""
    found = [books.manager.lookup(key) for key in blocks]
    held = [key for key, tier in zip(blocks, found, strict=True) if tier is not None]
    books.manager.load(held, "r")
    books.manager.end_step()
    books.manager.load_done(held, "r", dict.fromkeys(held, error) if error else {})
    books.manager.check()
    return found


def test_blocks_are_striped_over_drives_from_the_front_of_each():
    books = Books(dram=12, ssd=24, drives=3)
    books.store(prefix("a", 6))
    assert [demotion.ssd_slot for demotion in books.manager.plan()] == [0, 1, 2, 3, 4, 5]


def test_a_late_load_makes_misses_of_its_drives_blocks_only_and_keeps_them():
    books = Books(dram=4, ssd=16, drives=2)
    blocks = on_ssd_only(books, "a", 4)
    load(books, blocks[1:2], errno.ETIMEDOUT)
    assert books.tiers(blocks) == [Tier.SSD, None, Tier.SSD, None]
    assert set(blocks) <= set(books.journal.blocks)


def test_the_first_block_asked_for_is_a_drives_trial_and_brings_the_rest_back():
    books = Books(dram=4, ssd=16, drives=2)
    blocks = on_ssd_only(books, "a", 4)
    load(books, blocks[1:2], errno.ETIMEDOUT)
    books.now += PAUSE_MIN_S
    assert load(books, blocks) == [Tier.SSD, Tier.SSD, Tier.SSD, None]
    assert books.tiers(blocks[3:]) == [Tier.SSD]


def test_what_is_read_only_for_the_time_it_takes_is_in_use_meanwhile_and_takes_no_memory():
    books = Books(dram=4, ssd=8)
    blocks = on_ssd_only(books, "a", 4)
    free = books.manager.usage()[Tier.DRAM]
    places = books.manager.read_for_time([*blocks[:2], b"nowhere"], "probe")
    assert [place.key for place in places] == blocks[:2] and {place.dram_slot for place in places} == {NO_SLOT}
    assert books.manager.usage()[Tier.DRAM] == free
    books.store(prefix("b", 4))
    books.demote()
    books.store(prefix("c", 4))
    books.demote()
    assert books.tiers(blocks[:2]) == [Tier.SSD] * 2, "in use, so not evicted"
    books.manager.load_done(blocks[:2], "probe", {blocks[0]: errno.EBADMSG})
    books.manager.check()
    assert books.tiers(blocks[:2]) == [None, Tier.SSD]


def test_a_trial_that_was_promised_and_not_taken_is_free_again_in_the_next_step():
    books = Books(dram=4, ssd=8)
    blocks = on_ssd_only(books, "a", 4)
    load(books, blocks[:1], errno.ETIMEDOUT)
    books.now += PAUSE_MIN_S
    assert [books.manager.lookup(key) for key in blocks] == [Tier.SSD, None, None, None]
    books.manager.end_step()
    assert [books.manager.lookup(key) for key in reversed(blocks)] == [Tier.SSD, Tier.SSD, None, None]


def test_a_drive_is_taken_back_by_a_model_that_loads_several_blocks_or_none():
    """One block was promised at a time, of which such a model had no use: its drive was never tried, and its blocks, which
    counted as held, were never stored again."""
    books = Books(dram=8, ssd=32)
    blocks = on_ssd_only(books, "a", 8)
    load(books, blocks[:1], errno.ETIMEDOUT)
    books.now += PAUSE_MIN_S
    for promised in (1, 2, 4, 5):
        found = [books.manager.lookup(key) for key in reversed(blocks[2:7])]
        assert found == [Tier.SSD] * promised + [None] * (5 - promised)
        if promised < 5:
            books.manager.end_step()
    books.manager.load(blocks[2:7], "r")
    assert books.manager.lookup(blocks[0]) is None, "the trial is in flight"
    books.manager.end_step()
    books.manager.load_done(blocks[2:7], "r")
    books.manager.check()
    assert books.tiers(blocks) == [Tier.SSD] * 8


def test_a_drive_that_failed_again_is_tried_with_one_block_again():
    books = Books(dram=4, ssd=16)
    blocks = on_ssd_only(books, "a", 4)
    load(books, blocks[:1], errno.ETIMEDOUT)
    books.now += PAUSE_MIN_S
    for promised in (1, 2):
        assert sum(books.manager.lookup(key) is not None for key in blocks) == promised
        books.manager.end_step()
    load(books, blocks, errno.ETIMEDOUT)
    books.now += 2 * PAUSE_MIN_S
    assert sum(books.manager.lookup(key) is not None for key in blocks) == 1


def test_a_slow_block_in_the_midst_of_a_prompt_does_not_keep_its_drive_away():
    """The prompt's first block was the trial and succeeded; then the slow one was loaded beside it, late, and kept."""
    books = Books(dram=4, ssd=8, tier=False)
    books.store(prefix("a", 4))
    books.demote()
    for _ in range(4):
        held = [key for key in prefix("a", 4) if books.manager.lookup(key) is not None]
        books.manager.load(held, "r")
        books.manager.end_step()
        books.manager.load_done(held, "r", {b"a2": errno.ETIMEDOUT} if b"a2" in held else {})
        books.manager.check()
        books.now += books.manager._drives.of(0).reads.left_s()
    assert books.tiers(prefix("a", 4)) == [Tier.SSD, Tier.SSD, None, Tier.SSD]


def test_a_trial_takes_no_dram_slot_which_a_drive_that_still_hangs_would_keep():
    books = Books(dram=4, ssd=8)
    blocks = on_ssd_only(books, "a", 4)
    load(books, blocks[:1], errno.ETIMEDOUT)
    books.now += PAUSE_MIN_S
    (place,) = books.manager.load(blocks[1:2], "r")
    assert place.dram_slot == NO_SLOT and place.ssd_slot != NO_SLOT


def demote_one(books: Books, name: str, error: int = 0) -> int:
    """Stores a block and ends its demotion; returns its SSD slot."""
    books.store(prefix(name, 1))
    (demotion,) = books.manager.plan()
    books.manager.ack(demotion.id, 1, error)
    books.manager.check()
    return demotion.ssd_slot


def test_a_full_drive_gives_the_slots_it_has_to_younger_blocks_and_is_asked_for_room_again_later():
    books = Books(dram=4, ssd=16)
    assert [demote_one(books, name) for name in "abcd"] == [0, 1, 2, 3]
    assert demote_one(books, "e", errno.ENOSPC) == 4
    books.now += PAUSE_MIN_S
    (again,) = books.manager.plan()
    assert again.ssd_slot == 0, "the oldest block's"
    books.manager.ack(again.id, 1)
    assert demote_one(books, "f") == 1
    books.now += FULL_S
    assert demote_one(books, "g") == 5, "room that the drive may have by now"


def test_a_full_drive_takes_no_blocks_and_gives_those_it_has():
    books = Books(dram=4, ssd=16, drives=2)
    blocks = on_ssd_only(books, "a", 4)
    books.store(prefix("b", 4))
    demotions = books.manager.plan()
    assert [demotion.ssd_slot % 2 for demotion in demotions] == [0, 1, 0, 1]
    for demotion in demotions:
        books.manager.ack(demotion.id, 1, errno.ENOSPC if demotion.ssd_slot % 2 else 0)
    assert [demotion.ssd_slot % 2 for demotion in books.manager.plan()] == [0, 0], "they go to the other drive"
    assert load(books, blocks) == [Tier.SSD] * 4


def test_one_drive_that_hangs_does_not_hold_all_demotions():
    books = Books(dram=8, ssd=64, drives=2)
    for name in "abcd":
        books.store(prefix(name, 8))
        for demotion in books.manager.plan():
            if demotion.ssd_slot % 2 == 0:
                books.manager.ack(demotion.id, 1)
        books.manager.check()
    assert books.manager.counters["kvoffload_demotions_total",] >= 10
    assert len(list(books.manager._demotions.blocks())) == 4


def test_a_block_whose_drive_is_left_alone_is_stored_again_for_another():
    books = Books(dram=4, ssd=16, drives=2)
    blocks = on_ssd_only(books, "a", 4)
    assert books.store(blocks) == []
    load(books, blocks[1:2], errno.ETIMEDOUT)
    assert books.store(blocks) == [blocks[1], blocks[3]]
    assert books.demote() == [blocks[1], blocks[3]]
    assert books.tiers(blocks) == [Tier.SSD, Tier.DRAM, Tier.SSD, Tier.DRAM]
    assert all(books.journal.blocks[key][0] % 2 == 0 for key in blocks)


def test_dram_that_a_late_load_may_still_fill_is_not_given_away_until_the_drive_answers():
    books = Books(dram=4, ssd=8)
    blocks = on_ssd_only(books, "a", 4)
    (place,) = books.manager.load(blocks[:1], "r")
    books.manager.load_done(blocks[:1], "r", {blocks[0]: errno.ETIMEDOUT})
    books.manager.check()
    placed = books.manager.store([(key, 0) for key in prefix("b", 4)], "w").placements
    assert len(placed) == 3 and place.dram_slot not in [other.dram_slot for other in placed]
    books.now += PAUSE_MIN_S
    assert load(books, blocks[1:2]) == [Tier.SSD]
    (again,) = books.manager.store([(b"b3", 0)], "w").placements
    assert again.dram_slot == place.dram_slot


def test_a_drive_that_hangs_for_good_holds_one_dram_slot_more_than_at_first():
    books = Books(dram=4, ssd=32, drives=2)
    books.store(prefix("a", 2))
    for demotion in books.manager.plan():
        books.manager.ack(demotion.id, 1, errno.ETIMEDOUT if demotion.ssd_slot % 2 else 0)
    for number in range(50):
        books.now += 60.0
        books.store(prefix(f"b{number}.", 2))
        for demotion in books.manager.plan():
            books.manager.ack(demotion.id, 1, errno.ETIMEDOUT if demotion.ssd_slot % 2 else 0)
        books.manager.check()
        books.manager.end_step()
    assert books.manager.tiers(b"a1") == [Tier.DRAM], "its demotion is late, and it can be loaded"
    assert len(books.store(prefix("c", 3))) == 2


def test_a_late_block_that_arrives_while_its_drive_is_left_alone_for_another_reason_is_no_longer_late():
    """It was once demoted a second time, and the slot it had was lost."""
    books = Books(dram=4, ssd=16)
    blocks = on_ssd_only(books, "a", 4)
    books.store(prefix("late", 1))
    assert books.demote(errno.ETIMEDOUT) == [b"late0"]
    books.now += PAUSE_MIN_S
    (trial,) = books.manager.plan()
    load(books, blocks[:1], errno.ETIMEDOUT)
    books.manager.ack(trial.id, 1)
    books.manager.check()
    assert books.manager.tiers(b"late0") == [Tier.DRAM] and b"late0" in books.journal.blocks
    books.now += 2 * PAUSE_MIN_S
    books.store(prefix("b", 2))
    assert books.demote() == [b"b0"]


def test_a_late_block_that_is_lost_in_dram_is_not_its_drives_trial_for_ever():
    """A write that finds its slot damaged says nothing about the drive, which was tried with nothing else any more."""
    books = Books(dram=4, ssd=16)
    books.store([b"late"])
    books.demote(errno.ETIMEDOUT)
    books.now += PAUSE_MIN_S
    books.store([b"b"])
    assert books.demote(errno.EBADMSG) == [b"late"]
    assert books.tiers([b"late"]) == [None]
    assert books.demote() == [b"b"]
    assert books.manager.usage() == {Tier.DRAM: (1, 4), Tier.SSD: (1, 16)}


def test_a_single_write_that_never_returns_does_not_keep_its_drive_from_being_written():
    """Each trial was of its block, whose DRAM slot that write went on using, so none ever succeeded."""
    books = Books(dram=4, ssd=16)
    books.store([b"stuck"])
    books.demote(errno.ETIMEDOUT)
    books.store(prefix("b", 3))
    books.now += PAUSE_MIN_S
    assert books.demote(errno.ETIMEDOUT) == [b"stuck"]
    books.now += 2 * PAUSE_MIN_S
    (trial,) = books.manager.plan()
    assert trial.key == b"b0"
    books.manager.ack(trial.id, 1)
    books.manager.check()
    assert {demotion.key for demotion in books.manager.plan()} == {b"b1", b"b2", b"stuck"}


def test_a_drive_that_hangs_is_tried_with_its_late_blocks_in_turn():
    books = Books(dram=8, ssd=16)
    books.store([b"late"])
    books.demote(errno.ETIMEDOUT)
    books.store(prefix("b", 5))
    tried = []
    for _ in range(8):
        books.now += PAUSE_MAX_S
        tried += books.demote(errno.ETIMEDOUT)
    assert tried == [b"late", b"b0", *[b"late", b"b0"] * 3]


def test_an_idle_engine_is_not_kept_awake_by_a_drive_that_hangs():
    books = Books(dram=4, ssd=8)
    books.store(prefix("a", 4))
    books.manager.plan()
    books.now += QUIET_S - 0.1
    assert books.manager.pending(), "a busy drive takes its time to make a file grow"
    books.now += 0.1
    assert not books.manager.pending()


def test_an_idle_engine_is_not_kept_awake_by_blocks_that_find_no_slot_on_a_drive_that_hangs():
    books = Books(dram=8, ssd=4)
    books.store(prefix("a", 8))
    assert len(books.manager.plan()) == 4 and books.manager.queues()["demotion_waiting"] == 4
    assert books.manager.pending()
    books.now += QUIET_S
    assert books.manager.plan() == [] and not books.manager.pending()


def test_bounced_blocks_go_to_another_drive_when_one_fails():
    books = Books(dram=4, ssd=16, drives=2, tier=False)
    books.store(prefix("a", 2))
    for demotion in books.manager.plan():
        books.manager.ack(demotion.id, 1, errno.EIO if demotion.ssd_slot % 2 else 0)
    books.demote()
    assert books.tiers(prefix("a", 2)) == [Tier.SSD] * 2
    assert all(slot % 2 == 0 for slot, _, _ in books.journal.blocks.values())


def test_bounced_blocks_are_forgotten_when_no_drive_is_left():
    books = Books(dram=4, ssd=16, tier=False)
    books.store(prefix("a", 2))
    books.demote(errno.EIO)
    assert books.store(prefix("b", 2)) == []
    assert books.manager.usage()[Tier.DRAM] == (0, 4)
    books.now += PAUSE_MIN_S
    assert books.store(prefix("b", 2)) == prefix("b", 2)
    assert books.demote() == prefix("b", 1), "the trial"
    assert books.demote() == [b"b1"]


def test_a_bounced_block_whose_demotion_is_late_is_stored_again():
    """It cannot be loaded, so it would be a hole in every prompt that holds it."""
    books = Books(dram=4, ssd=16, drives=2, tier=False)
    books.store(prefix("a", 2))
    for demotion in books.manager.plan():
        books.manager.ack(demotion.id, 1, errno.ETIMEDOUT if demotion.ssd_slot % 2 else 0)
    assert books.tiers(prefix("a", 2)) == [Tier.SSD, None]
    assert books.store(prefix("a", 2)) == [b"a1"]
    assert books.demote()
    assert books.tiers(prefix("a", 2)) == [Tier.SSD] * 2


def test_bounced_blocks_of_a_drive_that_answers_again_are_written():
    books = Books(dram=4, ssd=16, tier=False)
    books.store(prefix("a", 2))
    books.demote(errno.ETIMEDOUT)
    books.now += PAUSE_MIN_S
    assert books.demote() == [b"a0"], "the trial"
    assert books.demote() == [b"a1"]
    assert books.tiers(prefix("a", 2)) == [Tier.SSD] * 2


def test_a_block_stored_anew_can_be_evicted_after_a_load_of_what_it_replaced_ended():
    """The end of that load took it off the eviction list, and it held its slot for good."""
    books = Books(dram=4, ssd=8, drives=2, tier=False)
    books.store(prefix("a", 4))
    books.demote()
    books.manager.load([b"a1"], "slow")
    load(books, [b"a3"], errno.ETIMEDOUT)
    books.now += PAUSE_MIN_S / 2
    assert books.store([b"b", b"a1"]) == [b"b", b"a1"]
    books.now += PAUSE_MIN_S / 2
    other, again = books.manager.plan()
    assert (other.ssd_slot % 2, again.ssd_slot % 2) == (0, 1), "on the drive where it was"
    books.manager.ack(other.id, 1)
    books.manager.ack(again.id, 1)
    books.manager.load_done([b"a1"], "slow")
    books.manager.check()


def test_loads_that_a_reset_made_void_do_not_count_as_in_flight():
    books = Books(dram=4, ssd=8)
    books.manager.load(on_ssd_only(books, "a", 4)[:1], "r")
    books.manager.reset()
    books.manager.check()
    assert [drive.loads for drive in books.manager._drives] == [0]


def test_a_drive_too_small_for_a_slot_is_not_waited_for():
    books = Books(dram=4, ssd=1, drives=2)
    books.store(prefix("a", 2))
    for demotion in books.manager.plan():
        books.manager.ack(demotion.id, 1, errno.EROFS)
    books.now += PAUSE_MIN_S
    for demotion in books.manager.plan():
        books.manager.ack(demotion.id, 1, errno.EROFS)
    assert not books.manager.pending()


def test_a_bounced_block_that_failed_as_one_drives_trial_is_the_next_ones():
    books = Books(dram=4, ssd=16, drives=2, tier=False)
    books.store(prefix("a", 2))
    books.demote(errno.EIO)
    books.now += PAUSE_MIN_S
    assert books.demote(errno.EIO) == [b"a0"]
    assert books.demote() == [b"a0"]
    assert books.tiers([b"a0"]) == [Tier.SSD]


def test_a_load_that_its_request_gave_up_is_no_fault_of_a_drive_that_answers_others():
    books = Books(dram=4, ssd=16, tier=False)
    blocks = prefix("a", 4)
    books.store(blocks)
    books.demote()
    for _ in range(6):
        books.manager.load(blocks, "r")
        books.manager.load_done(blocks, "r", dict.fromkeys(blocks[1:], errno.ETIME))
        books.manager.check()
    assert books.tiers(blocks)[1:] == [Tier.SSD] * 3


def test_a_load_that_began_before_another_was_late_does_not_give_back_its_slot():
    """What a load brings is told when all of it has ended, so an answer of before came after, and memory was filled twice."""
    books = Books(dram=8, ssd=16)
    blocks = on_ssd_only(books, "a", 8)[:3]
    books.manager.load(blocks[:1], "early")
    books.manager.load(blocks[1:2], "late")
    used, _ = books.manager.usage()[Tier.DRAM]
    books.manager.load_done(blocks[1:2], "late", {blocks[1]: errno.ETIME})
    books.manager.load_done(blocks[:1], "early")
    books.manager.check()
    assert books.manager.usage()[Tier.DRAM][0] == used
    load(books, blocks[2:])
    assert books.manager.usage()[Tier.DRAM][0] == used - 1, "what began after was answered"
