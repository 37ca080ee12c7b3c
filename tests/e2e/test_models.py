"""Tensor parallelism, and a model with several KV-cache groups."""

from tests.e2e.offload import BLOCK, PROMPT, TOKENS, ask, ask_one, loaded, settle


def test_tensor_parallel_two_over_two_paths_hits_in_dram_and_ssd_and_after_a_restart(serve, baseline, prompts, tmp_path):
    paths = [tmp_path / "nvme0", tmp_path / "nvme1"]
    for path in paths:
        path.mkdir()
    tp = {"tensor_parallel_size": 2}
    asked = prompts.many(4, PROMPT)
    want = baseline.tokens("llama", asked, TOKENS, **tp)
    settings = {"nvme_path": [str(path) for path in paths], "dram_kv_offload_gb": 0.06, "ssd_kv_offload_gb": 0.3}
    first = serve("llama", settings, **tp)
    assert ask(first, asked) == want
    settle(first)
    assert ask(first, asked) == want
    source = loaded(first)
    assert source["disk"] + source["host"] > 3 * 20 * BLOCK
    settle(first)
    first.shutdown()

    second = serve("llama", settings, **tp)
    answer, source = ask_one(second, asked[0])
    assert answer.tokens == want[0] and source["disk"] >= 29 * BLOCK


def test_a_hybrid_model_restores_all_its_groups(serve, baseline, prompts, tmp_path):
    asked = prompts.many(4, PROMPT)
    (longer,) = prompts.many(1, 31 * BLOCK, asked[0])
    want = baseline.tokens("gemma", [*asked, longer], TOKENS)
    settings = {"nvme_path": str(tmp_path), "dram_kv_offload_gb": 0.06, "ssd_kv_offload_gb": 0.3}
    pool = {"num_gpu_blocks_override": 130}  # shared by three groups
    first = serve("gemma", settings, **pool)
    assert ask(first, asked) == want[:4]
    settle(first)
    assert ask(first, [*asked, longer]) == want
    source = loaded(first)
    assert source["disk"] + source["host"] > 0
    settle(first)
    first.shutdown()

    second = serve("gemma", settings, **pool)
    assert ask(second, [longer, *asked]) == [want[4], *want[:4]]
    assert loaded(second)["disk"] > 0
