"""Every policy against a model: in what order blocks go, and that no call finds one that may not go."""

import random
from itertools import product

import numpy as np
import pytest
from hypothesis import note, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test

from kvoffload.policy import DEFAULT, POLICIES
from kvoffload.policy.aged import PASSED_MAX
from kvoffload.policy.answers import Answers
from kvoffload.policy.history import History
from kvoffload.policy.levels import answered, level_of
from tests.policy import models

CAPACITY = 12
ANSWERS = st.sampled_from([0, 0, 1, 5, 300, 70_000])
LEVELS = list(product((0, 1, 5, 15), (0, 3, 5, 10)))  # some, by uses and by answer
KEYS = [bytes([number]) * 16 for number in range(30)]
MODELS = {
    "arc": models.ARCModel,
    "fifo": models.FIFOModel,
    "horizon": models.HorizonModel,
    "lru": models.LRUModel,
    "s3fifo": models.S3FIFOModel,
    "sieve": models.SIEVEModel,
}


class Machine(RuleBasedStateMachine):
    """A tier's life under one policy. Which key is in which frame is its affair; models know keys only."""

    name = DEFAULT

    def __init__(self):
        super().__init__()
        note(f"policy {self.name}, {CAPACITY} blocks")
        self.policy = POLICIES[self.name](CAPACITY)
        self.model = MODELS[self.name](CAPACITY)
        self.held: dict[bytes, bool] = {}  # of each block there
        self.frames: dict[bytes, int] = {}
        self.now = 0

    def key_in(self, frame):
        return next(key for key, at in self.frames.items() if at == frame)

    def gone(self, key):
        del self.held[key], self.frames[key]

    @initialize(keys=st.lists(st.sampled_from(KEYS), unique=True, max_size=CAPACITY), order=st.permutations(range(CAPACITY)))
    def recover(self, keys, order):
        used = range(3, 3 + 4 * len(keys), 4)
        self.policy.recover(np.array(order[: len(keys)], np.int64), np.array(used))
        self.model.recover(keys, used)
        for key, frame in zip(keys, order, strict=False):
            self.held[key], self.frames[key] = False, frame
        self.now = 4 * len(keys)

    @rule(key=st.sampled_from(KEYS), ago=st.integers(0, 3), held=st.booleans(), choice=st.integers(0, CAPACITY), answer=ANSWERS)
    def enter(self, key, ago, held, choice, answer):
        if key in self.held:
            return
        if len(self.held) >= CAPACITY:
            self.evict(frozenset())
        if len(self.held) >= CAPACITY:
            return
        self.now += 4
        free = sorted(set(range(CAPACITY)) - set(self.frames.values()))
        frame = self.frames[key] = free[choice % len(free)]
        self.policy.enter(frame, key, self.now - ago, answer)
        self.held[key] = True
        self.model.enter(key, self.now - ago, answer)
        if not held:
            self.release(key)

    @rule(keys=st.lists(st.sampled_from(KEYS), unique=True), again=st.booleans(), answer=ANSWERS)
    def use(self, keys, again, answer):
        for key in keys:
            self.now += 4
            if key in self.held:
                self.policy.use(self.frames[key], key, self.now, again, answer)
                self.model.use(key, self.now, again, answer)

    @rule(frame=st.integers(0, CAPACITY - 1))
    def hold(self, frame):
        self.policy.hold(frame)
        if frame in self.frames.values():
            self.held[self.key_in(frame)] = True

    @rule(key=st.sampled_from(KEYS))
    def release(self, key):
        if key in self.held:
            self.policy.release(self.frames[key])
            self.held[key] = False

    @rule(frame=st.integers(0, CAPACITY - 1))
    def leave(self, frame):
        self.policy.leave(frame)
        if frame in self.frames.values():
            key = self.key_in(frame)
            self.gone(key)
            self.model.leave(key)

    @rule(spared=st.frozensets(st.sampled_from(KEYS)))
    def evict(self, spared):
        may_go = {key for key, held in self.held.items() if not held and key not in spared}
        expected = self.model.victim(lambda key: key not in may_go) if may_go else None
        frame = self.policy.victim(lambda frame: self.key_in(frame) in spared)
        assert (frame is None) == (not may_go)
        if frame is None:
            return
        key = self.key_in(frame)
        assert key in may_go
        assert key == expected
        self.model.evicted(key)
        self.policy.evict(frame, key)
        self.gone(key)

    @precondition(lambda self: self.held)
    @rule()
    def evict_all(self):
        for key in list(self.held):
            self.release(key)
        for _ in range(len(self.held)):
            self.evict(frozenset())
        assert not self.held

    @invariant()
    def books_add_up(self):
        assert len(self.policy) == sum(not held for held in self.held.values())
        there = {frame: self.held[key] for key, frame in self.frames.items()}
        for frame in range(CAPACITY):
            assert (frame in self.policy) == (frame in there)
            assert self.policy.evictable(frame) == (there.get(frame) is False)


@pytest.mark.parametrize("name", POLICIES)
def test_victims_are_those_of_the_model_and_never_held_spared_or_absent(name):
    machine = type(f"Machine_{name}", (Machine,), {"name": name})
    run_state_machine_as_test(machine, settings=settings(max_examples=40, stateful_step_count=50, print_blob=True))


def nobody(frame):
    return False


@pytest.mark.parametrize("seed", range(6))
def test_horizon_takes_the_half_life_and_the_worths_that_its_model_takes_as_traffic_changes(seed):
    """Rounds are longer than a machine's life above."""
    rng, policy, model = random.Random(seed), POLICIES["horizon"](CAPACITY), models.HorizonModel(CAPACITY)
    frames, chosen = {}, set()
    for now in range(1, 6000):
        if now % 1500 == 1:  # some keys wanted again and again, or loops, or the latest ones
            favourites = rng.sample(KEYS, rng.randint(3, 20))
            share = rng.choice((0.2, 0.6, 0.95))
            answers = rng.choice(((0, 0), (20, 900), (900, 20), (7, 7)))  # to favourites, and to others
        key = rng.choice(favourites) if rng.random() < share else now.to_bytes(16, "big")
        if key in frames:
            policy.use(frames[key], key, now, False, 0)
            model.use(key, now, False, 0)
        else:
            frame = len(frames)
            if frame == CAPACITY:
                frame, out = policy.victim(nobody), model.victim(nobody)
                assert frames[out] == frame, f"seed {seed}, use {now}"
                policy.evict(frame, out)
                model.evicted(out)
                del frames[out]
            frames[key] = frame
            policy.enter(frame, key, now, 0)
            policy.release(frame)
            model.enter(key, now, 0)
        answer = answers[key not in favourites]
        policy.use(frames[key], key, now, True, answer)
        model.use(key, now, True, answer)
        chosen.add(model.chosen)
        assert policy.half_life() == model.half_lives[model.chosen] * model.turnover
        assert all(policy._worths[16 * uses + kind] == model.worth((uses, kind)) for uses, kind in LEVELS)
    print(f"seed {seed}: half-lives {sorted(chosen)}")
    assert len(chosen) > 1


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("capacity", [0, 1, 2, 3])
def test_the_smallest_tiers_work(name, capacity):
    policy = POLICIES[name](capacity)
    assert policy.victim(nobody) is None
    free = list(range(capacity))
    keys = {}
    for now, key in enumerate(KEYS if capacity else [], 1):
        if not free:
            frame = policy.victim(nobody)
            assert frame is not None
            policy.evict(frame, keys[frame])
            free = [frame]
        frame = free.pop()
        keys[frame] = key
        policy.enter(frame, key, now, 0)
        policy.release(frame)
    assert len(policy) == capacity


@pytest.mark.parametrize("name", POLICIES)
def test_the_same_calls_have_the_same_victims(name):
    def victims():
        policy = POLICIES[name](50)
        found, frames = [], {}
        for now in range(1, 5000):
            key = (now * now * 7919 % 211).to_bytes(16, "big")
            if key in frames:
                policy.use(frames[key], key, now, False, 0)
                continue
            frame = len(frames)
            if frame == 50:
                frame = policy.victim(nobody)
                found.append(next(key for key, at in frames.items() if at == frame))
                policy.evict(frame, found[-1])
                del frames[found[-1]]
            frames[key] = frame
            policy.enter(frame, key, now, 0)
            policy.release(frame)
        return found

    assert victims() == victims()


def test_history_remembers_the_last_keys_that_it_was_made_for():
    history = History(4)
    for number, key in enumerate(KEYS):
        history.put(key, number, number / 2)
    assert [history.take(key) for key in KEYS[-4:]] == [(26, 13.0), (27, 13.5), (28, 14.0), (29, 14.5)]
    assert not any(history.take(key) for key in KEYS)


def test_history_remembers_a_key_that_came_back_from_its_last_time():
    history = History(3)
    history.put(b"a", 1, 1.0)
    history.put(b"b", 2, 1.0)
    assert history.take(b"a") == (1, 1.0)
    history.put(b"a", 3, 2.0)
    history.put(b"c", 4, 1.0)  # in the place that the first had
    assert history.take(b"a") == (3, 2.0)
    assert history.take(b"b") == (2, 1.0)


@pytest.mark.parametrize("name", ["lru", "horizon"])
def test_an_eviction_by_age_passes_over_hundreds_of_spared_blocks_and_no_more(name):
    """It is asked for each of a load's blocks, in a step of the scheduler."""
    policy, asked = POLICIES[name](1000), []
    for frame in range(1000):
        policy.enter(frame, frame.to_bytes(16, "big"), 1 + frame, 0)
        policy.release(frame)
    assert policy.victim(lambda frame: asked.append(frame) or frame < 800) is None
    assert len(asked) <= PASSED_MAX + 1
    assert policy.victim(lambda frame: frame < PASSED_MAX - 1) == PASSED_MAX - 1
    assert len(policy) == 1000 and policy.victim(nobody) == 0


def test_who_was_answered_at_length_and_did_not_come_back_makes_room_for_who_was_answered_briefly_and_did():
    """Both are used once, and the others later."""
    policy = POLICIES["horizon"](CAPACITY)
    now, frames = 0, {}

    def ask(key: bytes, answer: int) -> None:
        nonlocal now
        now += 1
        if key in frames:
            policy.use(frames[key], key, now, False, 0)
        else:
            frame = len(frames)
            if frame == CAPACITY:
                frame = policy.victim(nobody)
                gone = next(key for key, at in frames.items() if at == frame)
                policy.evict(frame, gone)
                del frames[gone]
            frames[key] = frame
            policy.enter(frame, key, now, 0)
            policy.release(frame)
        policy.use(frames[key], key, now, True, answer)

    for number in range(3000):
        brief, long = number.to_bytes(8, "big"), number.to_bytes(9, "big")
        ask(brief, 20)
        ask(long, 900)
        ask(brief, 20)
    for number in range(CAPACITY // 2):
        ask(b"brief %d" % number, 20)
    for number in range(CAPACITY // 2):
        ask(b"long %d" % number, 900)
    for number in range(CAPACITY // 2 - 1):
        ask(b"new %d" % number, 0)
    assert all(b"brief %d" % number in frames for number in range(CAPACITY // 2))


def test_a_request_that_ends_while_others_use_its_blocks_has_not_come_back():
    """Of several at once who ends first would have the others' ends for uses of its blocks again."""
    policy = POLICIES["horizon"](CAPACITY)
    policy.enter(0, KEYS[0], 1, 0)
    policy.use(0, KEYS[0], 2, False, 0)
    policy.use(0, KEYS[0], 3, True, 20)
    policy.use(0, KEYS[0], 4, False, 900)
    assert sum(policy._answers._seen) == 1 and sum(policy._answers._again) == 0
    policy.use(0, KEYS[0], 5, False, 0)
    assert sum(policy._answers._again) == 1


def test_a_large_tier_learns_from_a_sample_and_believes_no_few_of_it():
    policy = POLICIES["horizon"](1 << 16)
    for number in range(20_000):
        policy.enter(number, random.Random(number).randbytes(16), number + 1, 20 if number % 2 else 900)
    looked_at = sum(policy._answers._seen)
    assert 60 < looked_at < 300
    few = Answers(1 << 20)
    few.end(b"a", answered(level_of(1), 900))
    few.end(b"b", answered(level_of(1), 20))
    few.use(b"b")
    few.learn()
    assert -0.1 < few.worths[answered(level_of(1), 900)] < 0 < few.worths[answered(level_of(2), 900)]
