"""What is loaded of a request, between vLLM's scheduler and the estimates."""

import errno
from types import SimpleNamespace

import pytest
from vllm.v1.core.sched.output import CachedRequestData
from vllm.v1.kv_offload.base import Medium, TierFilter, TierMatcher
from vllm.v1.request import RequestStatus

from kvoffload.estimates import CONVINCED, PATIENCE_MIN_S, Probe
from kvoffload.types import Tier, TransferReport
from kvoffload.vllm import contract, decisions
from tests.rim.test_manager import GROUPS, PAYLOAD, adapter, end_step, hits, request, step, store

BLOCKS, TOKENS = 10, 320


class Clock:
    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(decisions, "time", clock)
    return clock


def ask(name: str = "r", **params) -> SimpleNamespace:
    return SimpleNamespace(
        request_id=name, num_tokens=TOKENS, num_prompt_tokens=TOKENS, num_output_tokens=1, status=None,
        kv_transfer_params=params or None, pooling_params=None,
    )


def computed(manager, clock: Clock, seconds: float, tokens: int = TOKENS) -> None:
    """A prompt without a hit: begun in a step, and its first token is there before the next."""
    cold = begun(manager, tokens)
    clock.now += seconds
    cold.num_output_tokens = 1
    manager.note_end(cold)


def begun(manager, tokens: int = TOKENS, context: int = 0) -> SimpleNamespace:
    """A prompt that is being computed from this step on."""
    cold = SimpleNamespace(
        request_id="cold", num_output_tokens=0, status=None, lora_request=None, pooling_params=None, num_computed_tokens=0
    )
    manager.announce(cold)
    manager.note_step(step([("cold", tokens, context)]))
    return cold


def loaded(manager, clock: Clock, seconds: float, error: int = 0) -> None:
    """As often as it takes to be believed."""
    for _ in range(CONVINCED):
        context, keys = request(manager, "warm", BLOCKS)
        store(manager, context, keys)  # what failed before
        spec = manager.prepare_load(keys, context)
        clock.now += seconds
        if error:
            manager._failed[spec.transfer] = dict.fromkeys(spec.keys, error)
        manager.complete_load(keys, context)


def held(clock: Clock):
    manager = adapter()
    context, keys = request(manager, "r", BLOCKS)
    assert store(manager, context, keys) == keys
    end_step(manager)
    return manager, context, keys


def decided(manager) -> dict[tuple[str, str], float]:
    return {tuple(labels): value for (name, *labels), value in manager._core.counters.items() if "decisions" in name}


def test_a_load_that_takes_longer_than_computing_is_not_promised_and_one_that_does_not_is(clock):
    manager, context, keys = held(clock)
    computed(manager, clock, 1.0)
    loaded(manager, clock, 5.0)
    assert manager.limit_load(ask(), 0, TOKENS)
    assert not any(hits(manager, context, keys))
    manager.note_scheduled(ask())
    for _ in range(10):
        loaded(manager, clock, 0.01)
    manager.lift_limit(ask(), 0)
    assert not manager.limit_load(ask(), 0, TOKENS)
    assert all(hits(manager, context, keys))
    assert decided(manager) == {("recompute", "faster"): 1}, "vLLM asks again and again, and is given blocks once"


def test_a_part_that_is_loaded_ends_with_a_block(clock):
    manager, context, keys = held(clock)
    computed(manager, clock, 1.0)
    loaded(manager, clock, 5.0)
    assert manager.limit_load(ask(), 0, TOKENS)
    clock.now += 1e4  # past the pause: a small part shows whether it is as slow as it was
    assert manager.limit_load(ask(), 0, TOKENS)
    assert hits(manager, context, keys) == [True] + [False] * (BLOCKS - 1)


def tokens(manager) -> dict[str, float]:
    counters = manager._core.counters
    return {"hit": counters["kvoffload_hit_tokens_total", "dram"], "missed": counters["kvoffload_missed_tokens_total",]}


def test_prompt_tokens_are_counted_once_as_hit_or_missed_whatever_was_asked_before(clock):
    manager, context, keys = held(clock)
    for _ in range(2):
        manager.lift_limit(ask(), 32)
        assert not manager.limit_load(ask(), 32, TOKENS - 32)
    for _ in range(2):
        manager.note_scheduled(ask())
    assert tokens(manager) == {"hit": TOKENS - 32, "missed": 0}


def test_tokens_that_are_not_worth_loading_or_are_gone_are_missed(clock):
    manager, context, keys = held(clock)
    computed(manager, clock, 1.0)
    loaded(manager, clock, 5.0)
    manager.lift_limit(ask(), 0)
    assert manager.limit_load(ask(), 0, TOKENS)
    clock.now += 1e4
    manager.lift_limit(ask(), 0)
    assert manager.limit_load(ask(), 0, TOKENS)  # a probe, of one block
    manager.note_scheduled(ask())
    assert tokens(manager) == {"hit": 32, "missed": TOKENS - 32}
    request(manager, "s", BLOCKS)
    manager.lift_limit(ask("s"), 0)
    manager.note_scheduled(ask("s"))
    assert tokens(manager) == {"hit": 32, "missed": 2 * TOKENS - 32}


def test_a_vllm_that_does_not_tell_positions_has_what_it_loads_counted_all_the_same(clock, monkeypatch):
    manager, context, keys = held(clock)
    monkeypatch.setattr(contract, "TELLS_POSITIONS", False)
    manager.lift_limit(ask(), 64)
    assert not manager.limit_load(ask(), 64, TOKENS - 96)
    manager.prepare_load(keys[2:-1], context)
    for _ in range(2):
        manager.note_scheduled(ask())
    assert tokens(manager) == {"hit": TOKENS - 96, "missed": 32}
    assert not decided(manager)


@pytest.mark.parametrize("tells", [True, False])
def test_a_slow_drive_is_left_alone_where_nothing_is_decided_about_it(clock, monkeypatch, tmp_path, tells):
    """With a vLLM that tells no positions each hit would wait for it as long as a load may take, without end."""
    manager = adapter(nvme_path=str(tmp_path), ssd_kv_offload_gb=0.01)
    context, keys = request(manager, "r", BLOCKS)
    store(manager, context, keys)
    manager.take_in(TransferReport(demoted={demotion.id: 1 for demotion in end_step(manager).demotions}))
    context.load_tier_filter = TierFilter((TierMatcher(medium=Medium.STORAGE),))
    monkeypatch.setattr(contract, "TELLS_POSITIONS", tells)
    spec = manager.prepare_load(keys, context)
    manager.take_in(TransferReport(failed={spec.transfer: dict.fromkeys(keys[1:], errno.ETIME)}))
    manager.complete_load(keys, context)
    assert any(name == "kvoffload_drive_openings_total" for name, *_ in manager._core.counters) == (not tells)
    manager.shutdown()


@pytest.mark.parametrize("knows", ["suspect", "probing"])
def test_blocks_of_several_groups_that_end_at_one_token_and_lie_in_two_tiers_are_probed_as_one(clock, monkeypatch, knows):
    """The last block of the last group is the first that DRAM loses of a request."""
    manager = adapter()
    context, keys = request(manager, "r", BLOCKS, GROUPS)
    store(manager, context, keys)
    computed(manager, clock, 1.0)
    monkeypatch.setattr(manager, "_loadable_from", lambda key, *_: Tier.SSD if key == keys[-1] else Tier.DRAM)
    estimates = manager._decisions._estimates
    for tier, seconds in ((Tier.DRAM, 0.01), (Tier.SSD, 0.01 if knows == "suspect" else 0.5)):
        for _ in range(CONVINCED):
            estimates._load[tier].observe(seconds, PAYLOAD, 1.0)
    if knows == "suspect":
        estimates._suspects.add(Tier.SSD)
    else:
        estimates._may_probe(clock.now, Tier.SSD)
        clock.now += 1e4
    assert manager.limit_load(ask(), 0, TOKENS)
    loads = manager._notes(context).loads
    assert [part.end for part in loads.parts] == [TOKENS - 32, TOKENS]
    assert loads.end == TOKENS - 32


@pytest.mark.parametrize(("wish", "hit"), [("load", True), ("recompute", False)])
def test_a_request_may_say_what_it_wants(clock, wish, hit):
    manager, context, keys = held(clock)
    computed(manager, clock, 1.0)
    loaded(manager, clock, 0.01 if wish == "recompute" else 5.0)
    manager.limit_load(ask(kvoffload=wish), 0, TOKENS)
    assert hits(manager, context, keys) == [hit] * BLOCKS
    manager.note_scheduled(ask())
    assert decided(manager) == {(wish, "asked"): 1}


def test_a_wish_that_is_none_is_said_once_and_passed_over(clock, monkeypatch):
    manager, context, keys = held(clock)
    said = []
    monkeypatch.setattr(decisions.logger, "warning", lambda text, *values: said.append(text % values))
    for _ in range(3):
        assert not manager.limit_load(ask(kvoffload="never"), 0, TOKENS)
    assert len(said) == 1 and "'never', which is neither 'load' nor 'recompute'" in said[0]
    assert all(hits(manager, context, keys))


@pytest.mark.parametrize(("load_s", "patience_s"), [(0.01, PATIENCE_MIN_S), (0.4, 0.8), (2.0, 3.0)])
def test_a_load_is_given_some_times_what_it_should_take_and_no_longer_than_it_saves(clock, load_s, patience_s):
    manager, context, keys = held(clock)
    computed(manager, clock, 3.0)
    loaded(manager, clock, load_s)
    assert not manager.limit_load(ask(), 0, TOKENS)
    assert manager.prepare_load(keys, context).patience_s == pytest.approx(patience_s, rel=0.15)


@pytest.mark.parametrize("error", [errno.ETIME, errno.ETIMEDOUT, errno.ECANCELED])
def test_a_load_that_was_given_up_counts_as_slow_and_one_that_failed_does_not(clock, error):
    manager, *_ = held(clock)
    computed(manager, clock, 1.0)
    loaded(manager, clock, 0.01)
    loaded(manager, clock, 0.6, errno.EIO)
    request(manager, "r", BLOCKS)
    assert not manager.limit_load(ask(), 0, TOKENS)
    loaded(manager, clock, 0.6, error)
    assert manager.limit_load(ask(), 0, TOKENS)


def test_what_a_preempted_request_computes_again_is_not_timed(clock):
    manager, *_ = held(clock)
    cold = begun(manager)
    manager.note_step(step(preempted={"cold"}))
    clock.now += 100.0
    cold.num_output_tokens = 1
    manager.note_end(cold)
    assert manager._decisions._estimates.prefill.seconds(TOKENS, 0) is None


def test_what_a_request_that_goes_on_after_a_preemption_computes_again_is_not_timed(clock):
    """vLLM's second model runner is told of it as of a new one."""
    manager, *_ = held(clock)
    resumed = begun(manager)
    manager.note_step(step(preempted={"cold"}))
    resumed.num_output_tokens = 7
    manager.note_step(step([("cold", TOKENS, 0)]))
    clock.now += 0.01
    manager.note_step(step())
    assert manager._decisions._estimates.prefill.seconds(TOKENS, 0) is None


def test_a_prompt_is_computed_when_its_first_token_is_there_and_not_when_it_is_expected(clock):
    manager, *_ = held(clock)
    cold = begun(manager, 1000, 200)
    clock.now += 2.0
    # Asynchronous scheduling: the next step is made up while the first runs, and counts the token that this one will bring.
    manager.note_step(step(cached=CachedRequestData(["cold"], set(), [], {}, [None], [1000], [1])))
    clock.now += 2.0
    cold.num_output_tokens = 1
    manager.note_step(step())
    assert manager._decisions._estimates.prefill.seconds(800, 200) == pytest.approx(4.0)
    assert manager._decisions._prefilling == {}


def test_after_a_reset_loads_in_flight_queue_no_longer(clock):
    manager, context, keys = held(clock)
    manager.prepare_load(keys, context)
    manager.reset_cache()
    assert manager._decisions._estimates._queued == dict.fromkeys(Tier, 0)


def test_learned_rates_are_gauges(clock):
    manager, *_ = held(clock)
    computed(manager, clock, 1.0)
    loaded(manager, clock, 0.01)
    gauges = dict(manager._gauges())
    assert gauges["kvoffload_prefill_tokens_per_second",] == pytest.approx(TOKENS)
    assert gauges["kvoffload_load_bytes_per_second", "dram"] > 0


def test_a_slow_ssd_is_probed_beside_a_request_that_is_computed_and_used_again_when_it_is_fast(clock, tmp_path):
    manager = adapter(nvme_path=str(tmp_path), ssd_kv_offload_gb=0.01)
    context, keys = request(manager, "r", BLOCKS)
    store(manager, context, keys)
    manager.take_in(TransferReport(demoted={demotion.id: 1 for demotion in end_step(manager).demotions}))
    context.load_tier_filter = TierFilter((TierMatcher(medium=Medium.STORAGE),))
    computed(manager, clock, 1.0)
    for _ in range(CONVINCED):
        manager.prepare_load(keys, context)
        clock.now += 5.0
        manager.complete_load(keys, context)
    assert manager.limit_load(ask(), 0, TOKENS) and not end_step(manager).probes
    for seconds, is_fast in ((4.0, False), (0.01, True)):
        clock.now += 1e4
        manager.lift_limit(ask(), 0)
        assert manager.limit_load(ask(), 0, TOKENS) and not any(hits(manager, context, keys)), "nothing is waited for"
        (probe,) = end_step(manager).probes
        assert probe.keys == tuple(keys[:1])
        assert manager.limit_load(ask(), 0, TOKENS) and not end_step(manager).probes, "one at a time"
        late = {probe.transfer: {keys[0]: errno.ETIME}}
        manager.take_in(TransferReport(probes={probe.transfer: (1, seconds)}, failed={} if is_fast else late))
        manager._core.check()
    for _ in range(3):  # the next ones are larger
        manager.lift_limit(ask(), 0)
        manager.limit_load(ask(), 0, TOKENS)
        for probe in end_step(manager).probes:
            manager.take_in(TransferReport(probes={probe.transfer: (1, 0.01)}))
    manager.lift_limit(ask(), 0)
    assert not manager.limit_load(ask(), 0, TOKENS) and all(hits(manager, context, keys))
    manager.shutdown()


def test_a_probe_planned_or_in_flight_is_forgotten_with_a_reset(clock, tmp_path):
    manager = adapter(nvme_path=str(tmp_path), ssd_kv_offload_gb=0.01)
    wanted = Probe(0, TOKENS, 1.0)

    def begin(number: int) -> None:
        context, keys = request(manager, f"r{number}", BLOCKS)
        store(manager, context, keys)
        manager.take_in(TransferReport(demoted={demotion.id: 1 for demotion in end_step(manager).demotions}))
        own = manager._notes(context).own_keys(keys)
        manager._probes.begin(number, wanted, [(32 * (n + 1), Tier.SSD, key) for n, key in enumerate(own)])

    begin(901)
    assert len(end_step(manager).probes[0].keys) == BLOCKS
    manager.reset_cache()
    manager.take_in(TransferReport(probes={901: (1, 0.5)}))
    assert manager._decisions._estimates._queued[Tier.SSD] == 0
    begin(902)
    manager.reset_cache()
    assert end_step(manager).probes == ()
    begin(903)
    manager.take_in(TransferReport(probes={902: (1, 0.5)}))
    assert set(manager._probes._in_flight) == {903}
    manager.shutdown()


def test_a_probe_that_an_idle_engine_saw_fail_late_took_no_longer_than_it_was_given(clock, tmp_path, monkeypatch):
    manager = adapter(nvme_path=str(tmp_path), ssd_kv_offload_gb=0.01)
    context, keys = request(manager, "r", BLOCKS)
    store(manager, context, keys)
    manager.take_in(TransferReport(demoted={demotion.id: 1 for demotion in end_step(manager).demotions}))
    ended = []
    monkeypatch.setattr(manager._decisions._estimates, "end_probe", lambda loading, *told: ended.append(told))
    for number, error, told in ((901, errno.ETIME, (2.0, False, True)), (902, errno.ECANCELED, (2.0, False, False))):
        manager._probes.begin(number, Probe(0, TOKENS, 2.0), [(32 * (n + 1), Tier.SSD, key) for n, key in enumerate(keys)])
        (probe,) = end_step(manager).probes
        manager.take_in(TransferReport(probes={number: (1, 600.0)}, failed={number: dict.fromkeys(probe.keys, error)}))
        assert ended[-1] == told
    assert manager._core.counters["kvoffload_load_failures_total",] == 0
    manager.shutdown()


def test_a_request_that_is_to_probe_and_has_to_wait_stays_at_it(clock):
    manager, context, keys = held(clock)
    computed(manager, clock, 1.0)
    loaded(manager, clock, 5.0)
    assert manager.limit_load(ask(), 0, TOKENS)
    clock.now += 1e4
    for _ in range(3):  # there are no KV blocks for it yet
        manager.lift_limit(ask(), 0)
        assert manager.limit_load(ask(), 0, TOKENS)
        assert hits(manager, context, keys) == [True] + [False] * (BLOCKS - 1)
    manager.note_scheduled(ask())
    assert decided(manager) == {("part", "probe"): 1}


def test_a_request_that_is_to_recompute_to_learn_what_that_takes_and_has_to_wait_stays_at_it(clock):
    manager, context, keys = held(clock)
    loaded(manager, clock, 5.0)
    assert not manager.limit_load(ask(), 0, TOKENS)
    clock.now += 1e4
    for _ in range(3):
        manager.lift_limit(ask(), 0)
        assert manager.limit_load(ask(), 0, TOKENS)
    manager.note_scheduled(ask())
    assert decided(manager) == {("recompute", "learning"): 1}


def test_a_request_waits_for_anothers_load_of_its_blocks_unless_computing_it_is_sooner(clock):
    manager, context, keys = held(clock)
    computed(manager, clock, 1.0)
    loaded(manager, clock, 0.1)
    manager.limit_load(ask(), 0, TOKENS)
    manager.prepare_load(keys, context)
    shares, _ = request(manager, "s", BLOCKS)
    manager.lift_limit(ask("s"), 0)
    assert not manager.forgo_load(ask("s"), 0), "a tenth of a second more"
    assert all(hits(manager, shares, keys))
    assert not manager.forgo_load(ask("s", kvoffload="load"), 0)
    clock.now += 1.0  # the load takes longer than was thought
    manager.lift_limit(ask("s"), 0)
    assert manager.forgo_load(ask("s"), 0)
    assert not any(hits(manager, shares, keys))
    manager.note_scheduled(ask("s"))
    assert decided(manager) == {("recompute", "faster"): 1}


def test_a_request_does_not_wait_for_a_load_that_will_take_longer_than_computing_it(clock):
    manager, context, keys = held(clock)
    computed(manager, clock, 1.0)
    computed(manager, clock, 1000.0, 100 * TOKENS)
    loaded(manager, clock, 5.0)
    long = SimpleNamespace(**vars(ask()) | {"num_tokens": 100 * TOKENS})
    manager.limit_load(long, 0, TOKENS)
    manager.prepare_load(keys, context)
    shares, _ = request(manager, "s", BLOCKS)
    manager.lift_limit(ask("s"), 0)
    assert manager.forgo_load(ask("s"), 0)
    wants, _ = request(manager, "t", BLOCKS)
    manager.lift_limit(ask("t"), 0)
    assert manager.forgo_load(ask("t", kvoffload="recompute"), 0)
    manager.complete_load(keys, context)
    assert manager._loading == {}


def test_what_a_model_with_windows_matches_of_its_last_block_is_not_cut_off(clock):
    """vLLM leaves the last token of such a prompt to be computed, so what it matched need not end with a block."""
    manager, context, keys = held(clock)
    computed(manager, clock, 3.0)
    loaded(manager, clock, 0.01)
    assert not manager.limit_load(ask(), 0, TOKENS - 1)
    assert all(hits(manager, context, keys))


@pytest.mark.parametrize("error", [errno.EREMOTEIO, errno.ENOENT])
def test_a_load_that_failed_at_once_teaches_nothing_and_one_whose_copies_were_late_does(clock, error):
    for seconds, is_late in ((0.001, False), (10.0, True)):
        manager, context, keys = held(clock)
        computed(manager, clock, 1.0)
        loaded(manager, clock, 0.01)
        manager.limit_load(ask(), 0, TOKENS)
        spec = manager.prepare_load(keys, context)
        clock.now += seconds
        manager._failed[spec.transfer] = {key: error if number else errno.ECANCELED for number, key in enumerate(spec.keys)}
        manager.complete_load(keys, context)
        request(manager, "r", BLOCKS)
        assert manager.limit_load(ask(), 0, TOKENS) == is_late


@pytest.mark.parametrize(("status", "learned"), [("FINISHED_STOPPED", True), ("FINISHED_ABORTED", False)])
def test_what_an_embedding_took_to_compute_is_learned_when_it_ends_for_it_has_no_tokens(clock, status, learned):
    manager = adapter()
    pooled = begun(manager)
    pooled.pooling_params, pooled.status = object(), getattr(RequestStatus, status)
    clock.now += 2.0
    manager.note_end(pooled)
    assert (manager._decisions._estimates.prefill.seconds(TOKENS, 0) is not None) == learned
