"""Load or recompute: what is learned from what happened, and what is decided by it. Worlds with known costs."""

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvoffload.estimates import (
    CONVINCED,
    PATIENCE,
    PATIENCE_MIN_S,
    PROBE_S,
    SHORTEST_S,
    Decision,
    Estimates,
    Kind,
    Part,
    Probe,
    Why,
)
from kvoffload.types import Tier

MB = 10**6
TOKEN_BYTES = 16_000


class World:
    """Computing and loading take what they take here; an engine does one thing at a time."""

    def __init__(self, token_s: float = 5e-4, pair_s: float = 0.0, step_s: float = 0.01, noise: float = 0.0, seed: int = 0):
        self.now = 0.0
        self.token_s, self.pair_s, self.step_s = token_s, pair_s, step_s
        self.rate = {Tier.DRAM: 10e9, Tier.SSD: 1e9}
        self.latency = {Tier.DRAM: 0.001, Tier.SSD: 0.005}
        self.overhead_s = 0.0  # of a load, beside what the tiers take
        self.noise, self.rng = noise, random.Random(seed)
        self.counters: Counter[tuple[str, ...]] = Counter()
        self.estimates = Estimates(self.counters)

    def prefill_s(self, tokens: int, context: int) -> float:
        return self._noisy(self.step_s + self.token_s * tokens + self.pair_s * tokens * (context + tokens / 2))

    def load_s(self, nbytes: dict[Tier, int]) -> float:
        return self._noisy(max(self.latency[tier] + count / self.rate[tier] for tier, count in nbytes.items())) + self.overhead_s

    def _noisy(self, seconds: float) -> float:
        return seconds * self.rng.lognormvariate(0, self.noise)

    def compute(self, tokens: int, context: int = 0) -> float:
        seconds = self.prefill_s(tokens, context)
        self.now += seconds
        self.estimates.end_prefill(seconds, tokens, context)
        return seconds

    def decide(self, parts: list[Part], total: int, computed: int = 0) -> Decision:
        return self.estimates.decide(self.now, computed, total, parts)

    def request(self, parts: list[Part], total: int) -> tuple[Decision, float]:
        """Does what was decided; returns the time to the first token as well."""
        decision, begun = self.decide(parts, total), self.now
        nbytes, start = Counter(), 0
        for part in parts:
            share = max(0.0, min(1.0, (decision.end - start) / (part.end - start)))
            if share:
                nbytes[part.tier] += int(share * part.nbytes)
            start = part.end
        end = decision.end
        if nbytes:
            loading = self.estimates.begin_load(self.now, dict(nbytes), decision.load_s)
            seconds = self.load_s(nbytes)
            late = decision.patience_s is not None and seconds > decision.patience_s
            self.now += decision.patience_s if late else seconds
            slow = [tier for tier in nbytes if decision.patience_s and self.load_s({tier: nbytes[tier]}) > decision.patience_s]
            self.estimates.end_load(self.now, loading, not late, late, Tier.SSD in slow)
            end = 0 if late else end
        self.compute(max(1, total - end), end)
        took = self.now - begun
        if decision.probe is not None:
            self.probe_drive(decision.probe, begun)
        return decision, took

    def probe_drive(self, wanted: Probe, begun: float) -> None:
        nbytes = (wanted.end - wanted.begin) * TOKEN_BYTES
        loading = self.estimates.begin_probe(begun, nbytes)
        seconds = self.load_s({Tier.SSD: nbytes}) - self.overhead_s
        late = seconds > wanted.patience_s
        self.estimates.end_probe(loading, min(seconds, wanted.patience_s), not late, late)


def ssd(tokens: int) -> list[Part]:
    return [Part(tokens, Tier.SSD, tokens * TOKEN_BYTES)]


def probes(asked: tuple[Decision, float]) -> bool:
    return asked[0].probe is not None


def taught(**world: float) -> World:
    """It has seen prompts computed and loaded."""
    made = World(**world)
    for tokens in (500, 2000, 1000, 4000):
        made.compute(tokens)
        made.request(ssd(tokens), tokens)
    return made


def test_while_nothing_is_known_all_is_loaded():
    decision = World().decide(ssd(1000), 1000)
    assert decision == (1000, Kind.LOAD, Why.LEARNING, None, None, None)


def test_the_last_tokens_of_many_loaded_prompts_do_not_make_a_whole_prompt_look_cheap():
    """One such token takes a step, a thousandth of the prompt; that taken for all of it had every tenth hit computed."""
    world = taught(token_s=7e-4, step_s=0.035, noise=0.2)
    right = world.prefill_s(960, 0)
    for _ in range(300):
        decision, _ = world.request(ssd(960), 960)
        assert decision.kind is Kind.LOAD
        assert 0.3 * right < world.estimates.prefill.seconds(960, 0) < 3 * right


def test_a_slow_tier_is_loaded_from_no_more_once_that_is_known_and_again_when_it_is_fast():
    world = taught()
    assert world.decide(ssd(2000), 2000).kind is Kind.LOAD
    world.rate[Tier.SSD] /= 100
    asked = [world.request(ssd(2000), 2000) for _ in range(100)]
    kinds = [decision.kind for decision, _ in asked]
    assert kinds.index(Kind.RECOMPUTE) <= 2
    times = [seconds for _, seconds in asked]
    assert sorted(times)[50] <= 1.001 * world.prefill_s(2000, 0)
    assert sum(times) <= 1.05 * 100 * world.prefill_s(2000, 0)
    world.rate[Tier.SSD] *= 100
    world.now += 1000.0
    assert [probes(world.request(ssd(2000), 2000)) for _ in range(3)] == [True, False, False]
    assert world.decide(ssd(2000), 2000).kind is Kind.LOAD


def test_a_drive_that_is_fast_again_is_loaded_from_though_small_loads_are_mostly_latency():
    """A sixteenth of this prompt takes a tenth of what computing takes, so one probe alone would never bring the drive back."""
    world = World(token_s=4e-4)
    world.latency[Tier.SSD] = 0.04
    for _ in range(4):
        world.compute(960)
        world.request(ssd(960), 960)
    world.rate[Tier.SSD] /= 1000
    for _ in range(5):
        world.request(ssd(960), 960)
    world.rate[Tier.SSD] *= 1000
    world.now += PROBE_S
    asked = [world.request(ssd(960), 960) for _ in range(5)]
    assert probes(asked[0]) and asked[0][0].kind is Kind.RECOMPUTE and asked[-1][0].kind is Kind.LOAD


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_on_a_drive_that_stays_slow_probes_are_few_and_no_request_waits_for_one(noise):
    world = taught(noise=noise)
    world.rate[Tier.SSD] /= 100
    for _ in range(5):
        world.request(ssd(2000), 2000)
    asked = [world.request(ssd(2000), 2000) for _ in range(500)]
    assert 0 < sum(map(probes, asked)) <= 12 + 24 * bool(noise)
    assert noise or all(decision.kind is Kind.RECOMPUTE for decision, _ in asked)
    cold = [world.compute(2000) for _ in range(500)]
    assert sum(seconds for _, seconds in asked) <= 1.05 * sum(cold)


def test_what_is_in_dram_is_loaded_and_what_is_on_a_slow_drive_behind_it_is_not():
    world = taught()
    for _ in range(3):
        world.request([Part(2000, Tier.DRAM, 32 * MB)], 2000)
    world.rate[Tier.SSD] /= 200
    for _ in range(3):
        world.request(ssd(4000), 4000)
    decision = world.decide([Part(2000, Tier.DRAM, 32 * MB), Part(4000, Tier.SSD, 32 * MB)], 4000)
    assert (decision.end, decision.kind) == (2000, Kind.PART)


def test_a_tier_of_which_nothing_is_known_is_tried_without_the_slow_one_behind_it():
    world = taught()
    world.rate[Tier.SSD] /= 200
    for _ in range(3):
        world.request(ssd(4000), 4000)
    both = [Part(2000, Tier.DRAM, 32 * MB), Part(4000, Tier.SSD, 32 * MB)]
    for _ in range(CONVINCED):
        assert world.decide(both, 4000)[:3] == (2000, Kind.PART, Why.LEARNING)
        assert world.request(both, 4000)[1] < world.prefill_s(4000, 0)
    assert world.decide(both, 4000)[:3] == (2000, Kind.PART, Why.FASTER)


def test_what_a_slow_drive_takes_is_not_charged_to_dram_that_was_loaded_beside_it():
    world = World()
    world.rate[Tier.SSD] /= 200
    for tokens in (500, 2000, 1000, 4000):
        world.compute(tokens)
    both = [Part(2000, Tier.DRAM, 32 * MB), Part(4000, Tier.SSD, 32 * MB)]
    world.request(both, 4000)
    assert world.decide(both[:1], 2000).kind is Kind.LOAD


def test_a_drive_that_became_slow_is_not_charged_to_dram_though_dram_had_more_to_load():
    world = taught()
    both = [Part(3900, Tier.DRAM, 3900 * TOKEN_BYTES), Part(4000, Tier.SSD, 100 * TOKEN_BYTES)]
    for _ in range(CONVINCED):
        world.request(both[:1], 3900)
        world.request(both, 4000)
    world.latency[Tier.SSD] = 5.0
    for _ in range(2):
        world.request(both, 4000)
    assert world.decide(both[:1], 3900).kind is Kind.LOAD
    assert world.decide(both, 4000).end < 4000


def test_a_prompt_that_waits_and_is_asked_about_again_and_again_is_one_prompt():
    world = taught()
    for _ in range(20):
        world.decide(ssd(1000), 1000)
    usual = world.estimates._usual_s
    for _ in range(20):
        world.estimates.decide(world.now, 0, 4000, ssd(4000), again=True)
    assert world.estimates._usual_s == usual


def test_a_long_prompt_is_loaded_where_a_short_one_is_recomputed():
    """A load has a latency, and computing grows with the square of the length."""
    world = World(token_s=1e-5, pair_s=1e-8, step_s=0.001)
    world.latency[Tier.SSD] = 0.05
    for tokens in (200, 8000, 1000, 4000) * 3:
        world.compute(tokens)
        loading = world.estimates.begin_load(world.now, {Tier.SSD: tokens * TOKEN_BYTES}, None)
        world.now += world.load_s(loading.nbytes)
        world.estimates.end_load(world.now, loading, True, False)
    assert world.decide(ssd(500), 500).kind is Kind.RECOMPUTE
    assert world.decide(ssd(8000), 8000).kind is Kind.LOAD


def test_a_burst_is_not_queued_behind_the_drive_beyond_what_computing_takes():
    world = taught()
    queued = 0
    while world.decide(ssd(2000), 2000).kind is Kind.LOAD:
        world.estimates.begin_load(world.now, {Tier.SSD: 2000 * TOKEN_BYTES}, None)
        queued += 2000 * TOKEN_BYTES
        assert queued < 100e9
    assert 0.5 * world.prefill_s(2000, 0) < queued / world.rate[Tier.SSD] < 1.5 * world.prefill_s(2000, 0)


def test_loads_that_nobody_will_tell_of_queue_no_longer():
    world = taught()
    world.estimates.begin_load(world.now, {Tier.SSD: 10**12}, None)
    assert world.decide(ssd(2000), 2000).kind is Kind.RECOMPUTE
    world.estimates.forget_loads()
    assert world.decide(ssd(2000), 2000).kind is Kind.LOAD


def test_after_a_restart_on_a_slow_drive_one_prompt_is_recomputed_to_learn_what_that_takes():
    world = World()
    world.rate[Tier.SSD] /= 100
    whys = []
    for _ in range(8):
        decision, _ = world.request(ssd(2000), 2000)
        whys.append((decision.kind, decision.why))
        world.now += PROBE_S
    assert whys.count((Kind.RECOMPUTE, Why.LEARNING)) == 1
    assert whys[-1][0] is not Kind.LOAD


@pytest.mark.parametrize("seen", [0, 5])
def test_one_last_token_that_took_long_does_not_end_loading(seen):
    """It is computed after every load of a whole prompt, and only then. One accident had all of them computed for ever."""
    world = World()
    for tokens in (500, 4000):
        world.compute(tokens)
    for _ in range(seen):
        world.request(ssd(4000), 4000)
    world.estimates.end_prefill(5.0, 1, 3999)
    kinds = []
    for _ in range(12):
        kinds.append(world.request(ssd(4000), 4000)[0].kind)
        world.request(ssd(2000), 4000)  # what of a hit is loaded besides says nothing of it
    assert kinds.count(Kind.RECOMPUTE) <= 6
    assert kinds[-1] is Kind.LOAD


def test_after_a_load_that_was_given_up_a_little_is_tried_before_a_lot():
    world = taught()
    world.rate[Tier.SSD] = 1.0
    assert [probes(world.request(ssd(tokens), tokens)) for tokens in (4000, 4000, 4000)] == [False, True, False]
    assert world.decide(ssd(4000), 4000).kind is Kind.RECOMPUTE


def test_one_load_that_was_given_up_by_accident_costs_the_next_ones_no_more_than_computing_them():
    world = taught()
    world.rate[Tier.SSD] /= 1000
    world.request(ssd(4000), 4000)
    world.rate[Tier.SSD] *= 1000
    asked = [world.request(ssd(4000), 4000) for _ in range(6)]
    assert probes(asked[0])
    assert all(seconds <= 1.02 * world.prefill_s(4000, 0) for _, seconds in asked)
    assert asked[-1][0].kind is Kind.LOAD


@pytest.mark.parametrize("pause_s", [0.5, 1.0])
@pytest.mark.parametrize("often", [0.03, 0.1])
def test_a_drive_that_pauses_now_and_then_is_waited_for_as_long_as_that_is_faster_than_computing(pause_s, often):
    """Each load given up is computed, and after two of them all are computed for ten seconds."""
    world = taught()
    loaded_s, quick_s = 0.0, world.latency[Tier.SSD]
    begun = world.now
    for _ in range(500):
        world.latency[Tier.SSD] = quick_s + pause_s * (world.rng.random() < often)
        loaded_s += world.load_s({Tier.SSD: 4000 * TOKEN_BYTES}) + world.prefill_s(1, 4000)
        world.request(ssd(4000), 4000)
    assert world.now - begun <= 1.5 * loaded_s


def test_a_stalled_drive_costs_one_request_some_times_what_a_load_takes_and_later_ones_little():
    world = taught()
    world.rate[Tier.SSD] = 1.0
    alone = world.prefill_s(4000, 0)
    times = [world.request(ssd(4000), 4000)[1] for _ in range(200)]
    load_s = taught().load_s({Tier.SSD: 4000 * TOKEN_BYTES})
    assert times[0] <= alone + max(PATIENCE_MIN_S, PATIENCE * load_s) + load_s
    assert sum(times[1:]) <= 1.05 * 199 * alone


def test_loading_may_take_some_times_what_is_expected_no_longer_than_it_saves_and_no_less_than_noise():
    world = taught()
    assert world.decide(ssd(4000), 4000).patience_s == PATIENCE_MIN_S
    world.estimates.begin_load(world.now, {Tier.SSD: 300 * MB}, None)  # so that it must wait
    longer = world.load_s({Tier.SSD: 300 * MB + 4000 * TOKEN_BYTES})
    assert world.decide(ssd(4000), 4000).patience_s == pytest.approx(PATIENCE * longer, rel=0.1)
    world.estimates.begin_load(world.now, {Tier.SSD: 900 * MB}, None)
    slow = world.decide(ssd(4000), 4000)
    assert slow.kind is Kind.LOAD and PATIENCE * slow.load_s > world.prefill_s(4000, 0)
    assert slow.patience_s == pytest.approx(world.prefill_s(4000, 0) - world.step_s, rel=0.1)


def test_small_probes_that_a_slow_drive_answers_earn_it_no_patience():
    world = taught()
    world.rate[Tier.SSD] /= 100
    for _ in range(30):
        world.request(ssd(500), 500)
        world.now += PROBE_S
    assert world.estimates._patience[Tier.SSD] == PATIENCE


def test_a_drive_that_is_slow_is_probed_beside_prompts_that_take_long_anyway():
    world = taught(token_s=5e-4)
    world.rate[Tier.SSD] /= 100
    probed = Counter()
    for number in range(200):
        tokens = (250, 250, 4000)[number % 3]
        decision, _ = world.request(ssd(tokens), tokens)
        probed[tokens] += decision.probe is not None
    assert probed[4000] >= 3 and probed[250] <= 2  # after it was given up, until a long one comes: nobody waits for it
    world.rate[Tier.SSD] *= 100
    world.now += 1000.0
    for tokens in (250, 4000, 4000):
        world.request(ssd(tokens), tokens)
    assert world.decide(ssd(250), 250).kind is Kind.LOAD


def test_where_all_prompts_are_alike_the_drive_is_probed_beside_each():
    world = taught()
    world.rate[Tier.SSD] /= 100
    assert sum(probes(world.request(ssd(1000), 1000)) for _ in range(100)) >= 3


@pytest.mark.parametrize("seed", range(10))
def test_on_a_slow_drive_no_hit_is_loaded_whole_to_see_what_computing_the_rest_takes(seed):
    """Half of a long prompt took twice as long as computing all of it would have: predicted was what small loads had taken."""
    world = taught(token_s=3e-4, pair_s=4.5e-8, noise=0.1, seed=seed)
    world.rate[Tier.SSD] /= 100
    world.request(ssd(2000), 4000)  # it is late, which tells
    for _ in range(60):
        tokens, share = world.rng.choice((256, 1024, 4096)), world.rng.choice((1, 2))
        decision, _ = world.request(ssd(tokens // share), tokens)
        world.now += 5.0
        assert (decision.kind, decision.why) != (Kind.LOAD, Why.PROBE)


def test_a_load_that_saves_little_is_not_waited_for_much_longer_than_that():
    world = taught()
    assert world.decide(ssd(250), 250).patience_s == pytest.approx(world.prefill_s(250, 0), rel=0.2)
    assert world.decide(ssd(100), 100).patience_s == SHORTEST_S


def test_predictions_are_counted_beside_what_came_of_them():
    world = taught(noise=0.1)
    for activity in ("load", "prefill"):
        actual = world.counters["kvoffload_actual_seconds_total", activity]
        assert world.counters["kvoffload_predicted_seconds_total", activity] == pytest.approx(actual, rel=0.5)
        assert 0 < world.counters["kvoffload_prediction_error_seconds_total", activity] < actual


lengths = st.integers(16, 20_000)
costs = st.tuples(st.floats(1e-6, 1e-2), st.floats(0, 1e-7), st.floats(1e-4, 0.1))  # a token, a pair, a step
drives = st.tuples(st.floats(1e6, 1e11), st.floats(1e-4, 0.5))


@settings(max_examples=200)
@given(costs, drives, st.lists(lengths, min_size=3, max_size=12), st.integers(0, 2**32), st.floats(0, 0.3))
def test_no_choice_looks_better_than_the_one_made(cost, drive, prompts, seed, noise):
    world = World(*cost, noise=noise, seed=seed)
    world.rate[Tier.SSD], world.latency[Tier.SSD] = drive
    for tokens in prompts:
        world.compute(tokens)
        loading = world.estimates.begin_load(world.now, {Tier.SSD: tokens * TOKEN_BYTES}, None)
        world.now += world.load_s(loading.nbytes)
        world.estimates.end_load(world.now, loading, True, False)
    total = max(prompts)
    decision = world.decide(ssd(total), total)
    assert decision.why is Why.FASTER and decision.end in (0, total)
    loaded = world.estimates._loads_s(ssd(total))[-1] + world.estimates.prefill.seconds(1, total)
    computed = world.estimates.prefill.seconds(total, 0)
    assert (loaded <= computed) == (decision.end == total)


@settings(max_examples=200)
@given(costs, st.lists(lengths, min_size=4, max_size=12, unique=True), st.integers(0, 2**32))
def test_without_noise_what_was_seen_is_predicted(cost, prompts, seed):
    world = World(*cost, seed=seed)
    for tokens in prompts * 3:
        world.compute(tokens)
    for tokens in prompts:
        seconds = world.estimates.prefill.seconds(tokens, 0)
        longest = world.prefill_s(max(prompts), 0)
        assert seconds == pytest.approx(world.prefill_s(tokens, 0), rel=0.4, abs=0.4 * longest), "by the simplest formula"
