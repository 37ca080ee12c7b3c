"""The harness itself, on vLLM without the connector: what the other end-to-end tests rely on."""

import pytest
from vllm_process import EngineError

from tests.e2e.conftest import Right


def test_an_answer_is_right_if_it_agrees_up_to_the_first_token_that_might_be_another():
    certain, tie = Right([5, 6, 7], [0.2, 0.01, 0.3]), Right([5, 6, 7], [0.2, 0.00001, 0.3])
    assert [5, 6, 7] == certain and [5, 6, 7] == tie and [5, 8, 9] == tie
    for wrong in ([5, 6, 8], [5, 8, 7], [4, 6, 7], [5, 6], [5, 6, 7, 8], []):
        assert wrong != certain and [wrong] != [certain]
    for wrong in ([4, 6, 7], [5, 6], [5, 6, 7, 8]):
        assert wrong != tie and [wrong] != [tie]


def test_vllm_alone_answers_the_same_with_and_without_its_prefix_cache(start, baseline, prompts):
    engine = start("llama", num_gpu_blocks_override=128)
    asked = prompts.many(3, 700)
    cold = engine.generate(asked)
    hits = engine.generate(asked, concurrency=3)
    assert [answer.cached_tokens for answer in cold] == [0, 0, 0]
    assert [answer.cached_tokens for answer in hits] == [672, 672, 672]
    baseline.check("llama", asked, cold)
    baseline.check("llama", asked, hits)
    assert sum(right.certain for right in baseline.tokens("llama", asked)) > 0.7 * 3 * 16, "ties are rare"
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
