"""Every policy against a model: in what order blocks go, and that no call finds one that may not go."""

import pytest
from hypothesis import note, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test

from kvoffload.policy import DEFAULT, POLICIES
from kvoffload.policy.history import History
from tests.policy import models

CAPACITY = 12
KEYS = [bytes([number]) * 16 for number in range(30)]
MODELS = {
    "arc": models.ARCModel,
    "fifo": models.FIFOModel,
    "lru": models.LRUModel,
    "s3fifo": models.S3FIFOModel,
    "sieve": models.SIEVEModel,
}


class Machine(RuleBasedStateMachine):
    """A tier's life under one policy."""

    name = DEFAULT

    def __init__(self):
        super().__init__()
        note(f"policy {self.name}, {CAPACITY} blocks")
        self.policy = POLICIES[self.name](CAPACITY)
        self.model = MODELS[self.name](CAPACITY) if self.name in MODELS else None
        self.held: dict[bytes, bool] = {}  # of each block there
        self.now = 0

    @initialize(keys=st.lists(st.sampled_from(KEYS), unique=True, max_size=CAPACITY))
    def recover(self, keys):
        self.policy.recover(keys, range(3, 3 + 4 * len(keys), 4))
        for key in keys:
            self.held[key] = False
            if self.model:
                self.model.enter(key, self.now + 3)
            self.now += 4

    @rule(key=st.sampled_from(KEYS), ago=st.integers(0, 3), held=st.booleans())
    def enter(self, key, ago, held):
        if key in self.held:
            return
        if len(self.held) >= CAPACITY:
            self.evict(frozenset())
        if len(self.held) >= CAPACITY:
            return
        self.now += 4
        self.policy.enter(key, self.now - ago, 0)
        self.held[key] = True
        if self.model:
            self.model.enter(key, self.now - ago)
        if not held:
            self.release(key)

    @rule(keys=st.lists(st.sampled_from(KEYS), unique=True), again=st.booleans())
    def use(self, keys, again):
        for key in keys:
            self.now += 4
            if key in self.held and self.model:
                self.model.use(key, self.now, again)
            self.policy.use(key, self.now, again)

    @rule(key=st.sampled_from(KEYS))
    def hold(self, key):
        self.policy.hold(key)
        if key in self.held:
            self.held[key] = True

    @rule(key=st.sampled_from(KEYS))
    def release(self, key):
        if key in self.held:
            self.policy.release(key)
            self.held[key] = False

    @rule(key=st.sampled_from(KEYS))
    def leave(self, key):
        self.policy.leave(key)
        if self.held.pop(key, None) is not None and self.model:
            self.model.leave(key)

    @rule(exempt=st.frozensets(st.sampled_from(KEYS)))
    def evict(self, exempt):
        may_go = {key for key, held in self.held.items() if not held and key not in exempt}
        expected = self.model.victim(lambda key: key not in may_go) if self.model and may_go else None
        got = self.policy.victim(exempt, frozenset())
        assert (got is None) == (not may_go)
        assert got is None or got in may_go
        if self.model and may_go:
            assert got == expected
            self.model.evicted(got)
        self.held.pop(got, None)

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
        for key in KEYS:
            assert (key in self.policy) == (key in self.held)
            assert self.policy.evictable(key) == (self.held.get(key) is False)


@pytest.mark.parametrize("name", POLICIES)
def test_victims_are_those_of_the_model_and_never_held_exempt_or_absent(name):
    machine = type(f"Machine_{name}", (Machine,), {"name": name})
    run_state_machine_as_test(machine, settings=settings(max_examples=40, stateful_step_count=50, print_blob=True))


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("capacity", [0, 1, 2, 3])
def test_the_smallest_tiers_work(name, capacity):
    policy = POLICIES[name](capacity)
    assert policy.victim() is None
    for now, key in enumerate(KEYS):
        if len(policy) >= max(1, capacity):
            assert policy.victim() is not None
        policy.enter(key, now, 0)
        policy.release(key)
    assert len(policy) == max(1, capacity)


@pytest.mark.parametrize("name", POLICIES)
def test_the_same_calls_have_the_same_victims(name):
    def victims():
        policy = POLICIES[name](50)
        found = []
        for now in range(5000):
            key = (now * now * 7919 % 211).to_bytes(16, "big")
            if key in policy:
                policy.use(key, now, False)
                continue
            if len(policy) >= 50:
                found.append(policy.victim())
            policy.enter(key, now, 0)
            policy.release(key)
        return found

    assert victims() == victims()


def test_history_remembers_the_last_keys_that_it_was_made_for():
    history: History[int] = History(4)
    for number, key in enumerate(KEYS):
        history.put(key, number)
    assert [history.take(key) for key in KEYS[-4:]] == [26, 27, 28, 29]
    assert history.take(KEYS[-1]) is None
    assert sum(history.take(key) is not None for key in KEYS) <= 4
