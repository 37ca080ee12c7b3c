"""vLLM with kvoffload over a KV pool that holds one prompt, and what the tests ask about it."""

from collections.abc import Callable

from vllm_process import Answer, Metrics, VllmProcess

from kvoffload.vllm import window
from tests.patience import wait_until

VLLM = window.release(window.installed() or "")
TOKENS = 8  # answered per prompt
BLOCK = 32  # tokens
PROMPT = 30 * BLOCK
POOL = {"max_model_len": 1056, "num_gpu_blocks_override": 40}  # a prompt of 30 blocks pushes out the one before
SOURCES = ("device", "host", "disk")
LOAD = {"kvoffload": "load"}  # whether that is faster depends on how busy this machine is; tests/e2e/test_slow_drive.py asks it


def ask(engine: VllmProcess, prompts: list[list[int]], wish: dict | None = LOAD, **options) -> list[list[int]]:
    return [answer.tokens for answer in engine.generate(prompts, TOKENS, kv_transfer_params=wish, **options)]


def ask_one(
    engine: VllmProcess, prompt: list[int], wish: dict | None = LOAD, **options
) -> tuple[Answer, dict[str, float]]:
    """The answer, and how many of the prompt's tokens were found where: in GPU memory, DRAM ("host") or on SSD."""
    before = loaded(engine)
    (answer,) = engine.generate([prompt], TOKENS, kv_transfer_params=wish, **options)
    after = loaded(engine)
    return answer, {source: after[source] - before[source] for source in SOURCES}


def loaded(engine: VllmProcess) -> dict[str, float]:
    metrics = engine.metrics()
    if VLLM >= (0, 32):
        return {source: metrics.sum("vllm:prompt_tokens_cached_by_source_total", source=source) for source in SOURCES}
    # vLLM does not tell yet. What we tell are blocks, which are tokens in models with one KV-cache group; others are refused there.
    blocks = {tier: metrics.sum("kvoffload_hit_blocks_total", tier=tier) for tier in ("dram", "ssd")}
    device = metrics.sum("vllm:prefix_cache_hits_total")
    return {"device": device, "host": BLOCK * blocks["dram"], "disk": BLOCK * blocks["ssd"]}


def settle(engine: VllmProcess) -> None:
    """Waits until every stored block is on SSD."""
    wait_until_written(engine, lambda metrics: metrics.sum("kvoffload_stored_blocks_total"))


def wait_until_written(engine: VllmProcess, blocks: Callable[[Metrics], float]) -> None:
    """Waits until at least so many are on SSD, and one. An engine that has been idle for some time does not step for a slow drive,
    which this machine's is now and then, so it is asked something each second."""
    checks = 0

    def is_written() -> bool:
        nonlocal checks
        checks += 1
        if checks % 10 == 0:
            engine.generate([[3, 4, 5]], 1)
        metrics = engine.metrics()
        return metrics.sum("kvoffload_demotions_total") >= max(1, blocks(metrics))

    try:
        wait_until(is_written, pause_s=0.1)
    except AssertionError:
        counted = [sample for sample in engine.metrics().samples if sample[0].startswith("kvoffload_") and sample[2]]
        raise AssertionError(f"not all that was stored is on SSD: {counted}\n{engine.log_text()[-3000:]}") from None
