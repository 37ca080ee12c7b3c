"""What outlives an engine: restarts, kill -9, other models beside it."""

import pytest
from vllm_process import EngineError

from tests.e2e.offload import BLOCK, PROMPT, TOKENS, ask, ask_one, settle
from tests.engine.faulty import FaultPlan, environment
from tests.patience import wait_until


def test_a_wrong_setting_is_one_clear_sentence(serve):
    with pytest.raises(EngineError, match="unknown configuration key 'dram_kv_ofload_gb'.*'dram_kv_offload_gb'"):
        serve("llama", {"dram_kv_ofload_gb": 1})


def test_a_restart_resumes_and_resume_off_starts_empty(serve, baseline, prompts, tmp_path):
    asked = prompts.many(3, PROMPT)
    want = baseline.tokens("llama", asked, TOKENS)
    settings = {"nvme_path": str(tmp_path), "dram_kv_offload_gb": 0.06, "ssd_kv_offload_gb": 0.3}
    first = serve("llama", settings, with_module_path=True)
    assert ask(first, asked) == want
    settle(first)
    with pytest.raises(EngineError, match="another engine|in use|held by"):
        serve("llama", settings)  # the namespace has an owner
    assert ask(first, asked[:1]) == want[:1]
    first.shutdown()

    second = serve("llama", settings)
    for prompt, tokens in zip(asked, want, strict=True):
        answer, source = ask_one(second, prompt)
        assert answer.tokens == tokens
        assert source["disk"] >= 29 * BLOCK, source
    second.shutdown()

    third = serve("llama", {**settings, "resume_kv_cache": False})
    answer, source = ask_one(third, asked[0])
    assert answer.tokens == want[0] and not any(source.values())


def test_kill_9_in_the_middle_of_stores_loses_only_what_was_not_acknowledged(serve, baseline, prompts, tmp_path):
    """One block in twenty stays in the drive until the engine is killed, so that it is killed before all of them are stored."""
    asked = prompts.many(6, PROMPT)
    want = baseline.tokens("llama", asked, TOKENS)
    settings = {"nvme_path": str(tmp_path), "ssd_kv_offload_gb": 0.3}
    with FaultPlan(tmp_path / "plan") as plan:
        first = serve("llama", settings, env=environment(plan))
        assert ask(first, asked[:2]) == want[:2]
        settle(first)
        plan.write.set(stall=0.05)
        for prompt in asked[2:]:
            first.submit(prompt, 8)
        wait_until(lambda: plan.write.waiting > 0)
        first.kill9()

    second = serve("llama", settings)
    sources = []
    for prompt, tokens in zip(asked, want, strict=True):
        answer, source = ask_one(second, prompt)
        assert answer.tokens == tokens
        sources.append(source["disk"])
    assert sources[0] >= 29 * BLOCK and sources[1] >= 29 * BLOCK, sources
    assert sum(sources) < 6 * PROMPT, sources
    assert second.metrics().sum("kvoffload_load_failures_total") == 0
