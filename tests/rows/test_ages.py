"""Frames by level and age against a dict that is searched from end to end, and what they refuse."""

import random

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test

from kvoffload._rows import AgeHeaps

FRAMES = 40
LEVELS = st.sampled_from([0, 1, 2, 255])
ALIKE = np.zeros(256)  # levels are worth nothing
WORTHS = [np.arange(256) / 2, ALIKE, np.array([(7 * level % 11) / 3 for level in range(256)])]


def oldest(there, worths, half_life):
    """By the plain reading of what `least` says."""

    def worth(frame):
        used, level = there[frame]
        return worths[level] + used / half_life, level

    return min(there, key=worth, default=None)


class Machine(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.ages = AgeHeaps(FRAMES)
        self.there: dict[int, tuple[int, int]] = {}  # by frame: when used, level
        self.now = 0

    @initialize(frames=st.lists(st.integers(0, FRAMES - 1), unique=True), order=st.randoms())
    def fill(self, frames, order):
        used = order.sample(range(self.now + 1, self.now + 1000), len(frames))
        self.ages.fill(np.array(frames, np.int64), np.array(used, np.int64))
        self.there = {frame: (time, 0) for frame, time in zip(frames, used, strict=True)}
        self.now += 1000

    @precondition(lambda self: not self.there)
    @rule(frames=st.lists(st.integers(0, FRAMES - 1), unique=True), order=st.randoms())
    def fill_again(self, frames, order):
        self.fill(frames, order)

    @rule()
    def drop_all(self):
        for frame in list(self.there):
            self.drop(frame)

    @rule(frame=st.integers(0, FRAMES - 1), ago=st.integers(0, 900), level=LEVELS)
    def put(self, frame, ago, level):
        self.now += 1000  # so that no two are of one age
        self.ages.put(frame, self.now - ago, level)
        self.there[frame] = self.now - ago, level

    @rule(frame=st.integers(0, FRAMES - 1))
    def drop(self, frame):
        self.ages.drop(frame)
        self.there.pop(frame, None)

    @rule(worths=st.sampled_from(WORTHS), half_life=st.sampled_from([1.0, 700.5, 1e6, 1e12]))
    def evict(self, worths, half_life):
        frame = self.ages.least(worths, half_life)
        assert frame == oldest(self.there, worths, half_life)
        if frame is not None:
            self.drop(frame)

    @invariant()
    def it_is_the_dict(self):
        assert len(self.ages) == len(self.there)
        assert [frame in self.ages for frame in range(FRAMES)] == [frame in self.there for frame in range(FRAMES)]

    def teardown(self):
        while self.there:
            self.evict(WORTHS[0], 1000.0)


def test_the_oldest_is_found_whatever_happened_before():
    run_state_machine_as_test(Machine, settings=settings(max_examples=150, stateful_step_count=80, print_blob=True))


def test_many_frames_that_wander_through_the_levels_leave_in_order():
    """Heaps grow and shrink."""
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    rng, count = random.Random(seed), 5000
    ages, used = AgeHeaps(count), {}
    for level in range(8):
        for frame in rng.sample(range(count), count):
            used[frame] = len(used) + rng.randrange(10**9) * count + frame
            ages.put(frame, used[frame], level)
    for frame in sorted(used, key=used.__getitem__):
        assert ages.least(ALIKE, 1.0) == frame
        ages.drop(frame)
    assert len(ages) == 0 and ages.least(ALIKE, 1.0) is None


def test_of_one_age_the_lower_level_and_the_first_frame_go_first():
    ages = AgeHeaps(4)
    for frame, level in ((3, 0), (2, 0), (0, 1), (1, 0)):
        ages.put(frame, 7, level)
    left = []
    while (frame := ages.least(ALIKE, 1.0)) is not None:
        left.append(frame)
        ages.drop(frame)
    assert left == [1, 2, 3, 0]


@pytest.mark.parametrize("frame", [4, 1 << 32, (1 << 64) - 1])
def test_there_are_no_frames_behind_the_last(frame):
    ages = AgeHeaps(4)
    for call in (lambda: ages.put(frame, 1, 0), lambda: ages.drop(frame), lambda: frame in ages):
        with pytest.raises(IndexError):
            call()


def test_levels_end():
    ages = AgeHeaps(4)
    ages.put(0, 1, 255)
    with pytest.raises(IndexError, match="no level 256"):
        ages.put(0, 1, 256)
    assert ages.least(ALIKE, 1.0) == 0


@pytest.mark.parametrize(
    "arguments", [(), (1,), (1, 2), (1, 2, 3, 4), ("a", 1, 1), (1, "a", 1), (1, 1, "a"), (-1, 1, 1), (1, -1, 1)]
)
def test_what_is_no_number_or_too_few_of_them_is_refused(arguments):
    ages = AgeHeaps(4)
    with pytest.raises((TypeError, OverflowError)):
        ages.put(*arguments)
    with pytest.raises(TypeError):
        ages.least(*arguments[:1])
    with pytest.raises(TypeError):
        ages.least(ALIKE, "a")
    with pytest.raises(TypeError):
        ages.least(1.0, 1.0)
    for worths in (ALIKE[1:], np.zeros(2056, np.uint8)[4:-4]):
        with pytest.raises(ValueError, match="256 levels"):
            ages.least(worths, 1.0)
    assert len(ages) == 0


def test_columns_that_do_not_fit_are_refused():
    column = np.arange(3, dtype=np.int64)
    bad = (column, column[:2]), (column[:2], column), (column + 2, column), (column - 1, column), (column // 2, column)
    for frames, used in bad:
        with pytest.raises(ValueError, match="expected empty heaps|is no frame"):
            AgeHeaps(4).fill(frames, used)
    with pytest.raises(ValueError, match="in no time"):
        AgeHeaps(4).fill(column, column - 1)
    with pytest.raises(ValueError, match="expected empty heaps"):
        AgeHeaps(2).fill(column, column)
    ages = AgeHeaps(4)
    ages.put(0, 1, 0)
    with pytest.raises(ValueError, match="expected empty heaps"):
        ages.fill(column, column)


def test_without_frames_there_is_no_least():
    ages = AgeHeaps(0)
    ages.fill(np.zeros(0, np.int64), np.zeros(0, np.int64))
    assert ages.least(ALIKE, 1.0) is None and len(ages) == 0


def test_a_frame_that_had_a_level_before_has_none_when_it_is_filled_in():
    ages = AgeHeaps(4)
    ages.put(0, 1, 5)
    ages.drop(0)
    ages.fill(np.array([0], np.int64), np.array([1], np.int64))
    ages.drop(0)
    assert len(ages) == 0 and ages.least(ALIKE, 1.0) is None


@pytest.mark.parametrize("frames", [(1 << 30) + 1, 1 << 63, 1 << 64, -1])
def test_too_many_frames_are_refused(frames):
    with pytest.raises((ValueError, OverflowError)):
        AgeHeaps(frames)
