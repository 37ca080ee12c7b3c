"""One engine, both tiers: where blocks come from, that answers stay the same, and what the metrics say."""

import os
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from vllm_process import VllmProcess

from tests.e2e.offload import BLOCK, POOL, PROMPT, SOURCES, TOKENS, ask, ask_one, loaded, settle
from tests.patience import wait_until


@pytest.fixture(scope="module")
def both(model, tmp_path_factory):
    """An engine with both tiers: DRAM holds about three prompts of 30 blocks, the SSD all of them."""
    path = tmp_path_factory.mktemp("nvme")
    settings = {"nvme_path": str(path), "dram_kv_offload_gb": 0.06, "ssd_kv_offload_gb": 0.5}
    engine = VllmProcess(model("llama"), settings, log=path / "vllm.log", **POOL)
    yield engine
    engine.kill9()


def test_a_prefix_evicted_from_gpu_and_dram_comes_back_from_ssd_and_mixed_with_new_tokens(both, baseline, prompts):
    (first, *fillers) = prompts.many(5, PROMPT)
    (longer,) = prompts.many(1, 32 * BLOCK, first)
    want = baseline.tokens("llama", [first, *fillers, longer], TOKENS)
    assert ask(both, [first]) == want[:1]
    settle(both)
    answer, source = ask_one(both, fillers[0])  # pushes the first prompt out of the GPU pool
    assert answer.tokens == want[1] and not any(source.values())
    answer, source = ask_one(both, first)
    assert answer.tokens == want[0]
    assert source["host"] > 0 and source["disk"] == 0 and sum(source.values()) == PROMPT, source
    assert ask(both, fillers) == want[1:5]
    settle(both)
    answer, source = ask_one(both, longer)  # the beginning is on SSD, its last two blocks are new
    assert answer.tokens == want[5]
    assert source["disk"] > 0 and sum(source.values()) == PROMPT, source

    check_metrics(both)


def test_one_prompt_is_loaded_partly_from_dram_partly_from_ssd_and_partly_computed(both, baseline, prompts):
    (first, *fillers) = prompts.many(6, PROMPT)
    (half,) = prompts.many(1, PROMPT, first[: 15 * BLOCK])
    (longer,) = prompts.many(1, 32 * BLOCK, first)
    want = baseline.tokens("llama", [first, half, longer], TOKENS)
    ask(both, [first])
    for filler in fillers:  # DRAM holds three prompts
        settle(both)
        ask(both, [filler])
    settle(both)
    both.reset_gpu_prefix_cache()
    answer, source = ask_one(both, half)  # moves half of the first prompt into DRAM
    assert answer.tokens == want[1]
    assert source == {"device": 0, "host": 0, "disk": 15 * BLOCK}
    both.reset_gpu_prefix_cache()
    answer, source = ask_one(both, longer)
    assert answer.tokens == want[2]
    assert source == {"device": 0, "host": 15 * BLOCK, "disk": 15 * BLOCK}


def test_what_was_stored_under_one_cache_salt_serves_no_request_with_another_or_none(both, baseline, prompts):
    (prompt, *fillers) = prompts.many(5, PROMPT)
    (want,) = baseline.tokens("llama", [prompt], TOKENS)

    def source_of(cache_salt: str | None) -> dict[str, float]:
        """Where the prompt is found when nothing of it is in GPU memory; the answer is right in any case."""
        settle(both)
        both.reset_gpu_prefix_cache()
        answer, source = ask_one(both, prompt, cache_salt=cache_salt)
        assert answer.tokens == want
        return source

    nothing = dict.fromkeys(SOURCES, 0)
    ask(both, fillers[:1])
    assert source_of("tenant a") == nothing
    assert source_of("tenant b") == nothing, "tenant a's blocks are in DRAM and on SSD"
    assert source_of("tenant a") == {**nothing, "host": PROMPT}
    for filler in fillers:  # DRAM holds three prompts
        settle(both)
        ask(both, [filler])
    assert source_of("tenant c") == source_of(None) == nothing, "tenants a's and b's blocks are on SSD"
    for tenant in ("tenant b", "tenant a"):
        assert source_of(tenant) == {**nothing, "disk": PROMPT}


def check_metrics(both):
    metrics = both.metrics()
    assert metrics.sum("kvoffload_hit_blocks_total", tier="ssd") > 0
    assert metrics.sum("kvoffload_hit_blocks_total", tier="dram") > 0
    for tier in ("ssd", "dram"):
        assert metrics.sum("kvoffload_hit_tokens_total", tier=tier) == BLOCK * metrics.sum("kvoffload_hit_blocks_total", tier=tier)
    assert metrics.sum("kvoffload_transfer_bytes_total", direction="read") > 0
    assert 0 < metrics.sum("kvoffload_used_bytes", tier="ssd") <= metrics.sum("kvoffload_capacity_bytes", tier="ssd")
    assert metrics.sum("kvoffload_evictions_total", tier="dram") > 0
    assert metrics.sum("kvoffload_load_failures_total") == 0


def test_damaged_slots_are_recomputed_and_the_engine_lives(serve, baseline, prompts, tmp_path):
    asked = prompts.many(3, PROMPT)
    want = baseline.tokens("llama", asked, TOKENS)
    # kv_load_failure_policy is left at its default, which is to fail
    ssd = serve("llama", {"nvme_path": str(tmp_path), "ssd_kv_offload_gb": 0.3})
    assert ask(ssd, asked) == want
    settle(ssd)
    (slots,) = tmp_path.rglob("*.slots")
    with slots.open("r+b", buffering=0) as file:
        for offset in range(4096 + 100_000, os.path.getsize(slots), 250_000):  # every slot is hit twice or more
            file.seek(offset)
            file.write(os.urandom(512))
        os.fsync(file.fileno())
    assert ask(ssd, asked) == want
    metrics = ssd.metrics()
    assert metrics.sum("kvoffload_load_failures_total") > 0
    assert metrics.sum("kvoffload_transfer_failures_total", direction="read", reason="EBADMSG") > 0

    def is_loaded() -> bool:
        """Stored anew, and good again. So many bad blocks in a row look like a bad drive, which is left alone for a second."""
        assert ask(ssd, asked[1:]) == want[1:]
        answer, source = ask_one(ssd, asked[0])
        assert answer.tokens == want[0]
        return source["disk"] == PROMPT

    wait_until(is_loaded, pause_s=0.5)


@pytest.mark.parametrize("settings", [{"dram_kv_offload_gb": 0.06}, {"dram_kv_offload_gb": 0}])
def test_sixteen_requests_with_shared_prefixes_and_aborts_during_loads(serve, baseline, prompts, tmp_path, settings):
    (head,) = prompts.many(1, 12 * BLOCK)
    asked = [prompt for shared in (4, 8, 12) for prompt in prompts.many(6, 16 * BLOCK, head[: shared * BLOCK])]
    want = baseline.tokens("llama", asked, TOKENS)
    pool = {"num_gpu_blocks_override": 160, "max_num_seqs": 16}
    both = serve("llama", {"nvme_path": str(tmp_path), "ssd_kv_offload_gb": 0.4, **settings}, **pool)
    assert ask(both, asked, concurrency=16) == want
    for round_number in range(4):
        both.reset_gpu_prefix_cache()
        names = [f"doomed {round_number} {number}" for number in range(8)]
        doomed = [both.submit(prompt, 64, request_id=name) for name, prompt in zip(names, asked, strict=False)]
        time.sleep(0.01 * round_number)
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(both.abort, names))
        assert ask(both, asked, concurrency=16) == want
        for future in doomed:
            both.answer(future)
    source = loaded(both)
    assert source["disk"] + source["host"] > 0


def test_blocks_produced_while_decoding_are_kept(both, prompts):
    (prompt,) = prompts.many(1, 4 * BLOCK)
    assert sum(source_of_continuation(both, prompt, prompts).values()) == 6 * BLOCK


def source_of_continuation(engine, prompt, prompts) -> dict[str, float]:
    """Where a prompt and its answer of three blocks are found when they come back as a prompt."""
    (answer,) = engine.generate([prompt], 3 * BLOCK)
    ask(engine, prompts.many(2, PROMPT))
    return ask_one(engine, prompt + answer.tokens)[1]


def test_the_switches_against_gpu_reuse_and_long_tokens(serve, baseline, prompts):
    (prompt,) = prompts.many(1, PROMPT)
    one = serve("llama", {"dram_kv_offload_gb": 0.1, "disable_gpu_reuse": True, "disable_long_token": True})
    assert ask(one, [prompt]) == baseline.tokens("llama", [prompt], TOKENS)
    answer, source = ask_one(one, prompt)
    assert answer.tokens == baseline.tokens("llama", [prompt], TOKENS)[0]
    assert source == {"device": 0, "host": PROMPT, "disk": 0}  # all of it was in GPU memory too
    assert ask(one, [prompt] * 4, concurrency=4) == baseline.tokens("llama", [prompt] * 4, TOKENS)
    assert sum(source_of_continuation(one, prompts.one(4 * BLOCK), prompts).values()) == 4 * BLOCK


def test_off_is_plain_vllm(serve, baseline, prompts):
    asked = prompts.many(2, PROMPT)
    off = serve("llama", {})  # both sizes are 0 by default
    assert ask(off, asked) == baseline.tokens("llama", asked, TOKENS)
    assert ask(off, asked) == baseline.tokens("llama", asked, TOKENS)
    assert not any(loaded(off)[source] for source in ("host", "disk"))
    assert off.metrics().sum("kvoffload_stored_blocks_total") == 0


def test_a_request_preempted_by_a_reset_loads_what_it_had_and_the_engine_lives(serve, baseline, prompts):
    """vLLM preempts it and lets it load again in one step, where a preempted request had only stores in all others."""
    engine = serve("llama", {"dram_kv_offload_gb": 0.2})
    (prompt,) = prompts.many(1, 10 * BLOCK)
    (want,) = baseline.tokens("llama", [prompt], 300)
    going_on = engine.submit(prompt, 300)
    wait_until(lambda: engine.metrics().sum("kvoffload_stored_blocks_total") >= 10)
    assert engine.reset_preempting() and not going_on.done()
    assert engine.answer(going_on).tokens == want
    assert engine.metrics().sum("kvoffload_hit_blocks_total") >= 9
