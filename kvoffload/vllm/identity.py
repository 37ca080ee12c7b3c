"""What makes two KV caches the same: everything that decides the bytes of a block but is not in vLLM's block hash."""

import json
import logging
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blake3 import blake3
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from vllm.platforms import current_platform
from vllm.version import __version__ as vllm_version

from kvoffload.types import BlockKey

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

logger = logging.getLogger(__name__)

BLOB = re.compile("[0-9a-f]{64}")  # a large file's name in the Hugging Face cache
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf")


def _content(path: Path) -> str:
    """What tells a file's content: its name in the hub's cache, which is its SHA-256, or a digest of every byte."""
    blob = path.resolve().name
    if path.is_symlink() and BLOB.fullmatch(blob):
        return blob
    digest = blake3(max_threads=blake3.AUTO)
    digest.update_mmap(path)
    return digest.hexdigest()


def files_digest(directory: Path) -> str:
    """Digest of every weight file's content below a directory, in the order of their names."""
    files = sorted(path for path in directory.rglob("*") if path.suffix in WEIGHT_SUFFIXES and path.is_file())
    total = blake3()
    for path in files:
        total.update(f"{path.relative_to(directory)}\0{_content(path)}\0".encode())
    return total.hexdigest() if files else "none"


def weights_digest(config: "VllmConfig") -> str:
    """Digest of the model's weights as found on this machine; names the source where they cannot be read."""
    model, load = config.model_config, config.load_config
    if load.load_format == "dummy":
        return f"dummy weights of seed {model.seed}"
    directory = Path(model.model)
    if not directory.is_dir():
        try:
            directory = Path(snapshot_download(model.model, revision=model.revision, local_files_only=True))
        except (LocalEntryNotFoundError, HFValidationError):
            logger.warning("kvoffload: the weights of %s are not local files; the cache trusts their name", model.model)
            return f"unread {model.model} {model.revision} {load.load_format}"
    return files_digest(directory)


def _model_shape(hf_config: Any) -> dict[str, Any]:
    """The model's own configuration (RoPE among it), less what does not change a block."""
    shape = hf_config.to_dict()
    for name in ("transformers_version", "_name_or_path", "_commit_hash"):
        shape.pop(name, None)
    return json.loads(json.dumps(shape, default=str))


def identity_fields(config: "VllmConfig", kv_cache_config: "KVCacheConfig") -> dict[str, Any]:
    """The namespace's identity, in clear text and JSON-able. Anything that differs gives another namespace."""
    model, cache, parallel = config.model_config, config.cache_config, config.parallel_config
    if "xxhash" in cache.prefix_caching_hash_algo and "PYTHONHASHSEED" not in os.environ:
        logger.warning(
            "kvoffload: with prefix_caching_hash_algo=%s vLLM draws a new hash seed at every start, so nothing is found "
            "again after a restart; set PYTHONHASHSEED or use sha256",
            cache.prefix_caching_hash_algo,
        )
    return {
        "model": model.model,
        "weights": weights_digest(config),
        "shape": _model_shape(model.hf_config),
        "dtype": str(model.dtype),
        "quantization": str(model.quantization),
        "kv_cache_dtype": str(cache.cache_dtype),
        "kv_cache_layout": str(cache.kv_cache_layout),
        "groups": [
            {"layers": list(group.layer_names), "spec": repr(group.kv_cache_spec)}
            for group in kv_cache_config.kv_cache_groups
        ],
        "hash": [str(cache.prefix_caching_hash_algo), os.environ.get("PYTHONHASHSEED", "")],
        "tensor_parallel": parallel.tensor_parallel_size,
        "pipeline_parallel": parallel.pipeline_parallel_size,
        "context_parallel": [parallel.prefill_context_parallel_size, parallel.decode_context_parallel_size],
        "data_parallel": [parallel.data_parallel_index, parallel.data_parallel_size],
        "attention_backend": str(config.attention_config.backend),
        "platform": current_platform.device_type,
        "vllm": vllm_version,
    }


class LoraSalts:
    """Gives blocks computed with a LoRA adapter keys of their own.

    vLLM hashes an adapter's name and path, not its content, so an adapter replaced under the same name would find the
    old one's blocks in a cache that outlives the process.
    """

    def __init__(self) -> None:
        self._digests: dict[tuple[str, ...], bytes] = {}

    def of(self, lora_path: str) -> bytes:
        """The salt of the adapter as its files are now; read again when their sizes or times changed."""
        directory = Path(lora_path)
        stamps = tuple(
            f"{path} {path.stat().st_size} {path.stat().st_mtime_ns}"
            for path in sorted(directory.rglob("*"))
            if path.is_file()
        )
        if stamps not in self._digests:
            self._digests[stamps] = bytes.fromhex(blake3("".join([files_digest(directory), lora_path]).encode()).hexdigest())
        return self._digests[stamps]


def salted(key: BlockKey, salt: bytes) -> BlockKey:
    """The key under which a block is kept: vLLM's own, or one of the same length that depends on the salt too."""
    if not salt:
        return key
    return blake3(salt + key).digest(len(key) - 4) + key[-4:]
