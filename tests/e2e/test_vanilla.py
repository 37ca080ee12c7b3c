"""The harness itself, on vLLM without the connector: what the other end-to-end tests rely on."""

import pytest
from vllm_process import EngineError


def test_vllm_alone_answers_the_same_with_and_without_its_prefix_cache(start, baseline, prompts):
    engine = start("llama", num_gpu_blocks_override=128)
    asked = prompts.many(3, 700)
    cold = engine.generate(asked)
    hits = engine.generate(asked, concurrency=3)
    assert [answer.cached_tokens for answer in cold] == [0, 0, 0]
    assert [answer.cached_tokens for answer in hits] == [672, 672, 672]
    baseline.check("llama", asked, cold)
    baseline.check("llama", asked, hits)
    assert len({tuple(answer.tokens) for answer in cold}) == 3, "a model that answers all prompts alike tests nothing"

    engine.reset_gpu_prefix_cache()
    (again,) = engine.generate(asked[:1])
    assert again.cached_tokens == 0

    future = engine.submit(prompts.one(700), max_tokens=500, request_id="unwanted")
    engine.abort("unwanted")
    assert engine.answer(future).finish_reason == "abort"

    pending = engine.submit(prompts.one(700))
    engine.kill9()  # raises if a process outlives it
    with pytest.raises(EngineError):
        engine.answer(pending)
