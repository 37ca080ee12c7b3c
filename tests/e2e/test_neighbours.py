"""Other models, dtypes and parallel sizes below the same path."""

import subprocess

from tests.e2e.conftest import Right
from tests.e2e.offload import BLOCK, PROMPT, TOKENS, ask_one, settle


def test_other_models_dtypes_and_tensor_parallel_sizes_neither_hit_nor_harm(serve, prompts, tmp_path):
    asked = prompts.many(2, PROMPT)
    settings = {"nvme_path": str(tmp_path), "ssd_kv_offload_gb": 1.0}
    first = serve("llama", settings)
    want = [Right(answer.tokens, answer.margins) for answer in first.generate(asked, TOKENS, with_margins=True)]
    settle(first)
    first.shutdown()
    before = subprocess.run(["find", str(tmp_path), "-name", "*.slots"], capture_output=True, text=True).stdout.split()
    digests = digest(before)
    for name, arguments in (("gemma", {}), ("llama", {"dtype": "bfloat16"}), ("llama", {"tensor_parallel_size": 2})):
        other = serve(name, settings, **{"num_gpu_blocks_override": 130, **arguments})
        _, source = ask_one(other, asked[0])
        assert not any(source.values()), (name, arguments, source)
        other.kill9()
    assert digest(before) == digests
    again = serve("llama", settings)
    for prompt, tokens in zip(asked, want, strict=True):
        answer, source = ask_one(again, prompt)
        assert answer.tokens == tokens and source["disk"] >= 29 * BLOCK


def digest(paths: list[str]) -> str:
    return subprocess.run(["sha256sum", *paths], capture_output=True, text=True, check=True).stdout
