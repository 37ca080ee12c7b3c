"""Reads beside requests that are computed, and what they and later loads say of a slow SSD. Worlds with known costs."""

import pytest

from kvoffload.estimates import CONVINCED, PROBE_S, Kind, Part, Probing
from kvoffload.types import Tier
from tests.test_estimates import TOKEN_BYTES, World, probes, ssd, taught


def test_where_loads_wait_for_more_than_the_drive_probes_do_not_bring_them_back_again_and_again():
    """A probe waits for no step of the model and no copy."""
    world = taught()
    world.overhead_s = 1.5 * world.prefill_s(4000, 0)
    asked = [world.request(ssd(4000), 4000) for _ in range(500)]
    assert sum(probes(each) for each in asked) >= 3
    assert sum(decision.kind is Kind.LOAD for decision, _ in asked) <= 12
    assert sum(seconds for _, seconds in asked) <= 1.03 * 500 * world.prefill_s(4000, 0)
    world.overhead_s = 0.0
    world.now += 1000.0
    assert [world.request(ssd(4000), 4000)[0].kind for _ in range(4)][-1] is Kind.LOAD


@pytest.mark.parametrize("share", [1, 2])
def test_a_load_that_arrives_late_makes_the_pause_between_probes_grow_as_one_that_is_given_up_does(share):
    """It takes half as long again as computing what it brings, not as computing the whole prompt."""
    world, tokens = taught(), 4000 // share
    alone, took = world.prefill_s(4000, 0), 0.0
    for _ in range(500):
        decision = world.decide(ssd(tokens), 4000)
        begun, loaded = world.now, tokens if decision.kind is not Kind.RECOMPUTE else 0
        if loaded:
            loading = world.estimates.begin_load(world.now, {Tier.SSD: tokens * TOKEN_BYTES}, None)
            world.now += 1.5 * (alone - world.prefill_s(4000 - tokens, tokens))  # it waits for steps of the model
            world.estimates.end_load(world.now, loading, True, True)
        world.compute(max(1, 4000 - loaded), loaded)
        took += world.now - begun
        if decision.probe is not None:
            world.probe_drive(decision.probe, begun)
    assert took <= 1.01 * 500 * alone


def test_loads_that_one_stall_kept_are_one_reason_to_wait_and_not_one_each():
    world = taught()
    loads = [world.estimates.begin_load(world.now, {Tier.SSD: 4000 * TOKEN_BYTES}, None) for _ in range(8)]
    world.now += 0.25
    world.estimates.end_load(world.now, loads[0], False, True, True)
    world.request(ssd(4000), 4000)
    for loading in loads[1:]:
        world.now += 0.1
        world.estimates.end_load(world.now, loading, False, True, True)
    world.now += 2 * PROBE_S
    assert [world.request(ssd(4000), 4000)[0].kind for _ in range(6)][-1] is Kind.LOAD


def test_a_queue_that_had_a_prompt_computed_leaves_nothing_behind_that_keeps_doubts_off():
    world = taught()
    world.estimates._may_probe(world.now, Tier.SSD)
    assert world.decide(ssd(4000), 4000).kind is Kind.LOAD
    assert Tier.SSD not in world.estimates._probing


def test_a_hit_of_which_dram_has_most_ends_probing_of_the_ssd_as_well():
    world = taught()
    both = [Part(3900, Tier.DRAM, 3900 * TOKEN_BYTES), Part(4000, Tier.SSD, 100 * TOKEN_BYTES)]
    for _ in range(CONVINCED):
        world.request(both[:1], 3900)
    world.estimates._note_probe(world.now, 0, ssd(4000)[0], world.prefill_s(4000, 0))
    world.rate[Tier.DRAM] = 0.5e9
    for _ in range(CONVINCED):
        world.request(both, 4000)
    assert Tier.SSD not in world.estimates._probing


def test_a_slow_drive_is_not_probed_without_a_pause_though_whole_probes_are_quick():
    """Of a hit of thousands of blocks a probe reads a thousand at most."""
    world = taught()
    estimates = world.estimates
    estimates._probing[Tier.SSD] = Probing(world.now, whole_bytes=4000 * TOKEN_BYTES, saved_s=40.0)
    probed = 0
    for _ in range(50):
        if estimates._may_probe(world.now, Tier.SSD):
            probed += 1
            estimates.end_probe(estimates.begin_probe(world.now, 10**6), 6.0, True, False)
        world.now += 6.0
    assert 3 <= probed <= 7, "in five minutes"


def last_of_short_ones(world: World, beside: list[Part]) -> Kind:
    """What the last of twenty short prompts on SSD gets that take turns with long ones."""
    for _ in range(20):
        world.request(beside, 4000)
        decision, _ = world.request(ssd(500), 500)
    return decision.kind


def test_a_drive_of_which_short_prompts_load_is_probed_beside_them_though_long_ones_load_from_dram():
    world = taught()
    long = [Part(4000, Tier.DRAM, 4000 * TOKEN_BYTES)]
    for _ in range(CONVINCED):
        world.request(long, 4000)
    world.rate[Tier.SSD] /= 100
    for _ in range(5):
        world.request(long, 4000)
        world.request(ssd(500), 500)
    world.rate[Tier.SSD] *= 100
    world.now += 1000.0
    assert last_of_short_ones(world, beside=long) is Kind.LOAD


@pytest.mark.parametrize("seen", [[5.0], [3.0, 3.0], [10.0] * 3])
def test_a_drive_that_is_well_again_is_loaded_from_though_last_tokens_took_long_meanwhile(seen):
    """On a busy machine, say. They are computed after loads only, so nothing else would tell that they do not."""
    world = taught()
    world.rate[Tier.SSD] /= 100
    world.request(ssd(4000), 4000)
    for seconds in seen:
        world.now += seconds
        world.estimates.end_prefill(seconds, 1, 3999)
    slow = [world.request(ssd(4000), 4000) for _ in range(200)]
    assert sum(seconds for _, seconds in slow) <= 1.01 * 200 * world.prefill_s(4000, 0)
    world.rate[Tier.SSD] *= 100
    world.now += 1000.0
    assert [world.request(ssd(4000), 4000)[0].kind for _ in range(40)][-1] is Kind.LOAD


def test_long_prompts_of_which_the_ssd_has_only_the_end_do_not_keep_it_from_being_probed_beside_others():
    """DRAM loses tails first, so most hits look like that; of their tails a probe says little."""
    world = taught()
    both = [Part(3900, Tier.DRAM, 3900 * TOKEN_BYTES), Part(4000, Tier.SSD, 100 * TOKEN_BYTES)]
    for _ in range(CONVINCED):
        world.request(both[:1], 3900)
    world.rate[Tier.SSD] /= 100
    for _ in range(5):
        world.request(both, 4000)
        world.request(ssd(500), 500)
    probed = 0
    for _ in range(100):
        world.request(both, 4000)
        probed += probes(world.request(ssd(500), 500))
    assert probed >= 2
    world.rate[Tier.SSD] *= 100
    world.now += 1000.0
    assert last_of_short_ones(world, beside=both) is Kind.LOAD


def test_a_hit_that_lies_in_many_parts_of_two_tiers_makes_no_other_prompt_look_small():
    """Of two drives one was slow: what arrived of the other is in DRAM."""
    world = taught()
    many = [
        Part(16 * (number + 1), Tier.SSD if number % 2 else Tier.DRAM, 16 * TOKEN_BYTES) for number in range(200)
    ]  # fmt: skip
    for _ in range(CONVINCED):
        world.request([Part(3200, Tier.DRAM, 3200 * TOKEN_BYTES)], 3200)
    for tokens in (20, 50, 100, 200):  # short ones take more a token
        for _ in range(3):
            world.now += 0.1
            world.estimates.end_prefill(0.05 + tokens * 1e-3, tokens, 0)
    world.rate[Tier.SSD] /= 1000
    for _ in range(3):
        world.request(many, 3200)
        world.request(ssd(2000), 4000)
    assert world.estimates._usual_s[Tier.SSD] <= world.prefill_s(4000, 0)
    world.rate[Tier.SSD] *= 1000
    world.now += 1000.0
    kinds = []
    for number in range(40):
        kinds.append(world.request(ssd(2000), 4000)[0].kind)
        if number % 10 == 0:
            world.request(many, 3200)
    assert kinds[-1] is not Kind.RECOMPUTE


def test_similar_hits_with_two_parts_on_the_ssd_have_it_probed():
    world = taught()
    both = [Part(1000, Tier.SSD, 1000 * TOKEN_BYTES), Part(2000, Tier.DRAM, 1000 * TOKEN_BYTES),
            Part(4000, Tier.SSD, 2000 * TOKEN_BYTES)]  # fmt: skip
    for _ in range(CONVINCED):
        world.request([Part(2000, Tier.DRAM, 2000 * TOKEN_BYTES)], 2000)
    world.rate[Tier.SSD] /= 1000
    for _ in range(50):
        world.request(both, 4000)
    world.rate[Tier.SSD] *= 1000
    world.now += 1000.0
    assert [world.request(both, 4000)[0].kind for _ in range(10)][-1] is Kind.LOAD


def test_one_block_of_a_drive_that_was_given_up_is_enough_to_try_it():
    """A breaker that is half-open shows one block of a hit, and two after that."""
    world = taught()
    world.rate[Tier.SSD] /= 1000
    world.request(ssd(4000), 4000)
    world.rate[Tier.SSD] *= 1000
    assert world.request(ssd(16), 4000)[0].probe is not None


def test_one_fast_block_clears_no_suspicion_that_a_large_load_raised():
    """Of two drives one is slow, and the block was the other's."""
    world = taught()
    world.rate[Tier.SSD] /= 1000
    world.request(ssd(4000), 4000)
    decision = world.decide(ssd(256), 4000)
    world.estimates.end_probe(world.estimates.begin_probe(world.now, 16 * TOKEN_BYTES), 0.001, True, False)
    world.now += 0.1
    assert decision.probe is not None and Tier.SSD in world.estimates._suspects
    assert world.request(ssd(4000), 4000)[0].probe is not None, "one that tells more follows at once"
