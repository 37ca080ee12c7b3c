"""Small models with random weights, made locally: nothing is downloaded, and the same seed gives the same bytes.

They answer nonsense, but exactly the same nonsense for the same prompt, which is what a test of a KV cache needs.
Queries and keys are larger than usual in a fresh model: attention then looks at particular tokens instead of averaging
over all of them, and a wrong block anywhere in a prompt changes the tokens that follow (tests/test_tiny_models.py).

    python examples/tiny_models.py [directory]
"""

import fcntl
import hashlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.utils.logging import disable_progress_bar

SEED = 20260101
VOCABULARY = 1024
POSITIONS = 16384
SLIDING_WINDOW = 128
QUERY_STD = 0.06 * 512  # of weights of queries and keys, times the hidden size: the narrower, the more it takes
HIDDEN, LAYERS, HEADS, HEAD_DIM = 256, 8, 8, 64  # of the model "llama"
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
CHAT = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}assistant:"
TEXT = Path(__file__).resolve().parent.parent / "LICENSE"  # any English text does for training the tokenizer


def tokenizer() -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(TEXT.read_text().splitlines(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, model_max_length=POSITIONS, chat_template=CHAT, **SPECIAL)


def llama(hidden_size: int = HIDDEN, intermediate_size: int = 512) -> PreTrainedModel:
    """8 layers of 4 KV heads: in float32 a block of 32 tokens is 0.5 MB. To compute it takes little."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=LAYERS,
        head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        num_key_value_heads=4,
        max_position_embeddings=POSITIONS,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        dtype=torch.float32,
    )
    return LlamaForCausalLM(config)


def wide_llama() -> PreTrainedModel:
    """As much KV, and several times as much to compute."""
    return llama(512, 1408)


def gemma() -> PreTrainedModel:
    """Two sliding-window layers to one full layer, as Gemma 3 mixes them: several KV-cache groups in vLLM."""
    config = Gemma3TextConfig(
        vocab_size=VOCABULARY,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        query_pre_attn_scalar=64,
        sliding_window=SLIDING_WINDOW,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=False,  # tied and random, it would repeat its last token for ever
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        dtype=torch.float32,
    )
    return Gemma3ForCausalLM(config)


MODELS: dict[str, Callable[[], PreTrainedModel]] = {"llama": llama, "wide-llama": wide_llama, "gemma": gemma}


LORA_RANK = 8


def make_lora(directory: Path, seed: int = SEED) -> Path:
    """Make a LoRA adapter for the model "llama" in a folder of `directory`; answer that folder."""
    folder = directory / f"lora-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    config = {"peft_type": "LORA", "r": LORA_RANK, "lora_alpha": 4 * LORA_RANK, "target_modules": ["o_proj"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps({**config, "task_type": "CAUSAL_LM"}))
    random = torch.Generator().manual_seed(seed)
    weights = {}
    for layer in range(LAYERS):
        name = f"base_model.model.model.layers.{layer}.self_attn.o_proj"
        weights[f"{name}.lora_A.weight"] = 0.1 * torch.randn(LORA_RANK, HEADS * HEAD_DIM, generator=random)
        weights[f"{name}.lora_B.weight"] = 0.1 * torch.randn(HIDDEN, LORA_RANK, generator=random)
    save_file(weights, folder / "adapter_model.safetensors")
    return folder


def make(name: str, directory: Path, seed: int = SEED) -> Path:
    """Make model `name` in a folder of `directory`, unless it is there already; answer that folder."""
    recipe = hashlib.sha256(Path(__file__).read_bytes() + TEXT.read_bytes()).hexdigest()[:16]
    folder = directory / (name if seed == SEED else f"{name}-{seed}")
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:  # test processes may ask for the same model at once
        fcntl.flock(lock, fcntl.LOCK_EX)
        _make_once(name, folder, seed, recipe)
    return folder


def _make_once(name: str, folder: Path, seed: int, recipe: str) -> None:
    stamp = folder / "recipe"
    if stamp.exists() and stamp.read_text() == recipe:
        return
    disable_progress_bar()
    torch.manual_seed(seed)
    model = MODELS[name]()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "q_proj" in parameter_name or "k_proj" in parameter_name:
                parameter.normal_(std=QUERY_STD / parameter.shape[1])
            if "q_norm" in parameter_name or "k_norm" in parameter_name:
                parameter.fill_(0.5)  # Gemma normalises queries and keys, then multiplies by 1 + this
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    stamp.write_text(recipe)  # last, so that an interrupted run starts over


if __name__ == "__main__":
    for model_name in MODELS:
        print(make(model_name, Path(sys.argv[1] if len(sys.argv) > 1 else "build/models")))
