"""When a drive is left alone and when it is tried: the breaker by itself, and what the drives make of errors."""

import errno
import random
from collections import Counter

import pytest

from kvoffload import drives as drives_module
from kvoffload.breaker import PAUSE_MAX_S, PAUSE_MIN_S, Breaker, BreakerState
from kvoffload.drives import BRISK, DAMAGED_MAX, ERRORS_MAX, QUIET_S, Drives
from kvoffload.policy import LRU
from tests.manager.world import BLOCK_BYTES

DEMOTIONS = 8


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def drives(clock):
    return Drives(["0 (/a)", "1 (/b)"], 20, BLOCK_BYTES, DEMOTIONS, clock, LRU, Counter())


def read(drive, drives, error=0):
    """Returns whether the block is to be forgotten."""
    drives.begin_load(drive)
    return drives.end_load(drive, error)[1]


def write(drive, drives, error=0):
    drives.begin_demotion(drive)
    drives.end_demotion(drive, error)


def states(drives) -> list[int]:
    return [state.value for _, state in drives.states()]


def test_pauses_double_from_a_second_to_a_minute_while_trials_fail(clock):
    breaker, lengths = Breaker(clock), []
    for _ in range(9):
        breaker.trip()
        assert breaker.state is BreakerState.OPEN
        lengths.append(breaker.left_s())
        clock.now += breaker.left_s()
        assert breaker.state is BreakerState.HALF_OPEN
    assert lengths == [1, 2, 4, 8, 16, 32, 60, 60, 60] and (PAUSE_MIN_S, PAUSE_MAX_S) == (1, 60)


def test_a_drive_that_fails_soon_after_it_was_taken_back_is_left_alone_for_longer(clock):
    breaker = Breaker(clock)
    for well_s, pause_s in ((0, 1), (0.5, 2), (1.9, 4), (4, 1)):
        clock.now += well_s
        breaker.trip()
        assert breaker.left_s() == pause_s
        clock.now += pause_s
        breaker.close()


def test_a_random_life_of_a_breaker_agrees_with_its_rules():
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng, clock = random.Random(seed), Clock()
    breaker = Breaker(clock)
    state, pause, since, closed_since = BreakerState.CLOSED, 0.0, 0.0, 0.0
    for _ in range(5000):
        clock.now += rng.choice([0.0, 0.25, 1.0, 7.0, 70.0])
        if state is BreakerState.OPEN and clock.now - since >= pause:
            state = BreakerState.HALF_OPEN
        assert breaker.state is state
        if state is not BreakerState.OPEN and rng.random() < 0.5:
            breaker.trip()
            doubles = state is BreakerState.HALF_OPEN or clock.now - closed_since < pause
            pause = min(60.0, 2 * pause) if doubles and pause else 1.0
            state, since = BreakerState.OPEN, clock.now
            assert 1.0 <= pause <= 60.0 and breaker.left_s() == pytest.approx(pause)
        elif state is BreakerState.HALF_OPEN:
            breaker.close()
            state, closed_since = BreakerState.CLOSED, clock.now


def test_a_late_load_stops_reads_and_writes_of_its_drive_alone(drives):
    first, second = drives
    assert not read(second, drives, errno.ETIMEDOUT), "the block is kept"
    assert states(drives) == [0, 0, 2, 2]
    assert drives.to_write() == [first] and drives.writing and drives.take_stores()
    assert first.may_read(b"a") and not second.may_read(b"b")


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EROFS, errno.EIO, errno.ETIMEDOUT])
def test_a_failed_write_stops_writes_and_no_reads(drives, error):
    first, second = drives
    write(second, drives, error)
    assert states(drives) == [0, 0, 0, 2]
    assert second.may_read(b"b") and drives.to_write() == [first]


def test_one_bad_sector_costs_its_block_and_repeated_errors_are_the_drives(drives):
    first, _ = drives
    for _ in range(10):
        assert [read(first, drives, errno.EIO) for _ in range(ERRORS_MAX - 1)] == [True] * (ERRORS_MAX - 1)
        assert not read(first, drives), "a good read between them"
    assert states(drives) == [0, 0, 0, 0]
    assert [read(first, drives, errno.EIO) for _ in range(ERRORS_MAX + 5)] == [True] * (ERRORS_MAX - 1) + [False] * 6
    assert states(drives) == [2, 2, 0, 0]


def test_wrong_bytes_cost_their_blocks_and_stop_a_drive_that_brings_nothing_else(drives):
    first, _ = drives
    for _ in range(10):
        assert all(read(first, drives, errno.EBADMSG) for _ in range(DAMAGED_MAX - 1))
        read(first, drives)
    assert states(drives) == [0, 0, 0, 0]
    assert all(read(first, drives, errno.EBADMSG) for _ in range(DAMAGED_MAX + 5))
    assert states(drives) == [2, 2, 0, 0]


@pytest.mark.parametrize("error", [errno.ECANCELED, errno.EREMOTEIO])
def test_what_never_reached_the_drive_says_nothing_about_it(drives, error):
    first, _ = drives
    assert not any(read(first, drives, error) for _ in range(100))
    for _ in range(10):
        write(first, drives, error)
        write(first, drives, errno.EBADMSG)  # the DRAM slot did not hold the block
    assert states(drives) == [0, 0, 0, 0]


def test_a_half_open_drive_is_tried_with_one_block_at_a_time(drives, clock):
    first, second = drives
    read(first, drives, errno.ETIMEDOUT)
    assert not first.may_read(b"a")
    clock.now += PAUSE_MIN_S
    assert states(drives)[:2] == [1, 1]
    assert first.may_read(b"a") and first.may_read(b"b"), "whichever is asked for first"
    first.promise(b"a")
    assert first.may_read(b"a") and not first.may_read(b"b")
    drives.begin_load(first)
    drives.forget_trials()
    assert not first.may_read(b"b"), "its trial is in flight"
    assert drives.to_write() == [first, second]
    drives.begin_demotion(first)
    assert drives.to_write() == [second], "its trial is in flight"
    drives.end_load(first, 0)
    drives.end_demotion(first, 0)
    assert states(drives) == [0, 0, 0, 0] and drives.all_well


def test_what_began_before_a_drive_was_left_alone_neither_closes_nor_prolongs(drives, clock):
    first, _ = drives
    for _ in range(4):
        drives.begin_load(first)
    drives.begin_demotion(first)
    drives.end_load(first, errno.ETIMEDOUT)
    for error in (0, errno.ETIMEDOUT):
        assert drives.end_load(first, error) == (False, False)
    assert states(drives)[:2] == [2, 2]
    clock.now += PAUSE_MIN_S
    assert states(drives)[:2] == [1, 1]
    assert not drives.end_demotion(first, 0)
    assert drives.end_load(first, 0) == (False, False)
    assert states(drives)[:2] == [1, 1]


def test_a_failed_trial_is_forgotten_so_that_one_bad_block_does_not_keep_its_drive_away(drives, clock):
    first, _ = drives
    read(first, drives, errno.ETIMEDOUT)
    for error in (errno.ETIMEDOUT, errno.EIO, errno.EBADMSG):
        clock.now += first.reads.left_s()
        assert read(first, drives, error)
        assert states(drives)[:2] == [2, 2]


def test_nothing_is_written_to_a_drive_whose_reads_have_the_longer_pause(drives, clock):
    first, second = drives
    read(first, drives, errno.ETIMEDOUT)
    clock.now += PAUSE_MIN_S
    write(first, drives)
    clock.now += PAUSE_MIN_S
    read(first, drives, errno.ETIMEDOUT)
    clock.now += PAUSE_MIN_S
    assert (first.reads.state, first.writes.state) == (BreakerState.OPEN, BreakerState.HALF_OPEN)
    assert drives.to_write() == [second] and states(drives) == [2, 2, 0, 0]
    clock.now += PAUSE_MIN_S
    assert first in drives.to_write()


def test_each_drive_has_its_share_of_the_demotions(drives):
    first, second = drives
    for _ in range(DEMOTIONS // 2):
        assert first in drives.to_write()
        drives.begin_demotion(first)
    assert drives.to_write() == [second]


def test_an_idle_engine_waits_for_drives_that_answer_only(drives, clock):
    first, _ = drives
    drives.begin_demotion(first)
    assert drives.answering()
    clock.now += QUIET_S
    assert not drives.answering()
    drives.end_demotion(first, 0)
    drives.begin_demotion(first)
    assert drives.answering()


@pytest.mark.parametrize(("speed", "blocks"), [(2 * BRISK, 1000), (BRISK / 2, 95), (BRISK / 100, 0)])
def test_an_idle_engine_waits_for_as_long_as_a_drive_is_brisk(drives, clock, speed, blocks):
    first, _ = drives
    drives.begin_demotion(first)
    ended = 0
    while ended < 1000:
        clock.now += BLOCK_BYTES / speed
        if not drives.answering():
            break
        drives.begin_demotion(first)
        drives.end_demotion(first, 0)
        ended += 1
    assert abs(ended - blocks) <= 2, "a drive of half the speed uses up its second in two"


@pytest.mark.parametrize("is_silent", [True, False])
def test_an_idle_engine_waits_anew_for_what_a_request_brings_unless_the_drive_is_silent(drives, clock, is_silent):
    first, _ = drives
    drives.begin_demotion(first)
    drives.begin_demotion(first)
    if not is_silent:
        drives.end_demotion(first, 0)
    clock.now += QUIET_S
    assert not drives.answering(), "one is in flight all the time"
    drives.begin_demotion(first)
    assert drives.answering() is not is_silent


def test_an_idle_engine_waits_no_longer_for_a_drive_that_was_fast_before(drives, clock):
    first, _ = drives
    drives.begin_demotion(first)
    for _ in range(1000):
        clock.now += 0.0001
        drives.begin_demotion(first)
        drives.end_demotion(first, 0)
    clock.now += QUIET_S
    assert not drives.answering()


def test_a_drives_failure_is_said_once_and_counted_each_time(clock, monkeypatch):
    counters, texts = Counter(), []
    monkeypatch.setattr(drives_module.logger, "warning", lambda text, *values: texts.append(text % values))
    drives = Drives(["0 (/a)", "1 (/b)"], 20, BLOCK_BYTES, DEMOTIONS, clock, LRU, counters)
    _, second = drives
    for _ in range(20):
        read(second, drives, errno.ETIMEDOUT)
    for _ in range(3):
        clock.now += second.reads.left_s()
        read(second, drives, errno.EIO)
    clock.now += second.reads.left_s()
    for _ in range(20):
        read(second, drives)
        write(second, drives)
    assert len(texts) == 3 and all("1 (/b)" in text for text in texts)
    assert "reads fail (ETIMEDOUT)" in texts[0] and "reads succeed" in texts[1] and "writes succeed" in texts[2]
    assert counters == {
        ("kvoffload_drive_openings_total", "1", "read", "ETIMEDOUT"): 1,
        ("kvoffload_drive_openings_total", "1", "read", "EIO"): 3,
    }
