"""Whether the model of the tests on a real vLLM notices what these tests are there to find."""

import random
from pathlib import Path

import torch
from tiny_models import VOCABULARY, make
from transformers import DynamicCache, LlamaForCausalLM

BUILD = Path(__file__).resolve().parents[1] / "build"
TOKENS, BLOCK, ANSWER = 960, 32, 8  # as most of these tests have them
PROMPTS, BLOCKS = 4, range(0, TOKENS // BLOCK - 1, 2)
NOTICED = 0.8  # of wrong blocks, each alone in its prompt: a test compares several prompts with several blocks each

KV = list[tuple[torch.Tensor, torch.Tensor]]  # by layer, each (prompts, heads, tokens, head_dim)


def computed(model: LlamaForCausalLM, prompts: list[list[int]]) -> KV:
    """Of all tokens but the last."""
    cache = DynamicCache()
    model(torch.tensor(prompts)[:, :-1], past_key_values=cache)
    return [(layer.keys, layer.values) for layer in cache.layers]


def answers(model: LlamaForCausalLM, kv: KV, last: int) -> list[list[int]]:
    """One for each prompt in `kv`; all of them end with token `last`."""
    cache = DynamicCache()
    for layer, (keys, values) in enumerate(kv):
        cache.update(keys, values, layer)
    tokens = [torch.full((kv[0][0].shape[0], 1), last)]
    while len(tokens) <= ANSWER:
        tokens.append(model(tokens[-1], past_key_values=cache).logits[:, -1:].argmax(-1))
    return torch.cat(tokens[1:], 1).tolist()


def with_wrong_blocks(pair: torch.Tensor) -> torch.Tensor:
    """Of two prompts: the first, and the first with one of BLOCKS from the second, each of them once."""
    right, other = pair
    mixed = right.repeat(1 + len(BLOCKS), 1, 1, 1)
    for row, block in enumerate(BLOCKS, 1):
        mixed[row, :, block * BLOCK : (block + 1) * BLOCK] = other[:, block * BLOCK : (block + 1) * BLOCK]
    return mixed


@torch.no_grad()
def test_one_wrong_block_of_thirty_changes_the_answer(seed):
    numbers = random.Random(seed)
    model = LlamaForCausalLM.from_pretrained(make("llama", BUILD / "models")).eval()
    noticed = []
    for _ in range(PROMPTS):
        pair = [[numbers.randrange(3, VOCABULARY) for _ in range(TOKENS)] for _ in range(2)]
        kv = [(with_wrong_blocks(keys), with_wrong_blocks(values)) for keys, values in computed(model, pair)]
        right, *wrong = answers(model, kv, pair[0][-1])
        noticed += [tokens != right for tokens in wrong]
    assert sum(noticed) >= NOTICED * len(noticed), f"{sum(noticed)} of {len(noticed)}"
