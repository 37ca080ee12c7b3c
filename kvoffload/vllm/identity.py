"""What makes two KV caches the same: everything that decides the bytes of a block but is not in vLLM's block hash."""

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from blake3 import blake3
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from vllm.platforms import current_platform
from vllm.version import __version__ as vllm_version

from kvoffload.types import BlockKey
from kvoffload.vllm import contract

if TYPE_CHECKING:
    from vllm.config import LoadConfig, MultiModalConfig, VllmConfig
    from vllm.lora.request import LoRARequest
    from vllm.v1.kv_cache_interface import KVCacheConfig

logger = logging.getLogger(__name__)

Content = Callable[[Path], str]  # tells files of different content apart
NO_FILES = "none"
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
LOOK_S = 1.0  # an adapter's files are waited for
ADAPTERS_MAX = 1000  # of which salts are remembered
BESIDE = ("*.json", "*.py")
IN_FIELDS = ("config.json", "generation_config.json")  # as vLLM understands them, overrides included
# Of vLLM's multimodal settings, those that change no block: sizes and ways of caches, limits, profiling.
HARMLESS_MULTIMODAL = (
    "limit_per_prompt",
    "mm_processor_cache_gb",
    "mm_processor_cache_type",
    "mm_shm_cache_max_object_size_mb",
    "mm_tensor_ipc",
    "skip_mm_profiling",
)


def content_digest(path: Path) -> str:
    """Digest of every byte. A file's name in the hub's cache, which was its SHA-256 once, proves nothing: what is saved to a
    snapshot goes through its symlinks."""
    digest = blake3(max_threads=blake3.AUTO)
    digest.update_mmap(path)
    return digest.hexdigest()


def files_digest(directory: Path, paths: Iterable[Path], content_of: Content = content_digest) -> str:
    """Digest of the files' names below a directory and of their content."""
    total = blake3()
    for path in sorted(paths):
        total.update(f"{path.relative_to(directory)}\0{content_of(path)}\0".encode())
    return total.hexdigest()


def model_digest(directory: Path, content_of: Content = content_digest) -> str:
    """Digest of the weight files below a directory, and of the settings and programs beside them (what turns an image into
    tokens, a model's own code); NO_FILES if there are no weights."""
    weights = {path for path in directory.rglob("*") if path.suffix in WEIGHT_SUFFIXES and path.is_file()}
    beside = {path for pattern in BESIDE for path in directory.glob(pattern) if path.name not in IN_FIELDS and path.is_file()}
    return files_digest(directory, weights | beside, content_of) if weights else NO_FILES


def weights_digest(config: "VllmConfig", content_of: Content) -> str:
    """Digest of the model's weights as found on this machine; names the source where they cannot be read."""
    model, load = config.model_config, config.load_config
    if load.load_format == "dummy":
        return f"dummy weights of seed {model.seed}"
    path = Path(model.model)
    if path.is_file():  # GGUF
        return content_of(path)
    if not path.is_dir():
        path = _snapshot(model.model, model.revision, load.download_dir)
    digest = model_digest(path, content_of) if path else NO_FILES
    if digest == NO_FILES:
        logger.warning("kvoffload: the weights of %s are not local files; the cache trusts their name", model.model)
        return f"unread {model.model} {model.model_weights} {model.revision} {load.load_format}"
    return digest


def _snapshot(name: str, revision: str | None, cache: str | None) -> Path | None:
    """Where the hub's files of a model or adapter lie on this machine, if they do."""
    try:
        return Path(snapshot_download(name, revision=revision, cache_dir=cache, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    """A model's own configuration (RoPE among it) as JSON, less what does not change a block."""
    ignored = ("transformers_version", "_name_or_path", "_commit_hash")
    return json.loads(json.dumps({name: value for name, value in config.items() if name not in ignored}, default=str))


def _hardware() -> list[str]:
    """What an attention backend chooses its kernel, and with it the layout inside a block, by."""
    device = [current_platform.device_type, str(current_platform.get_device_name())]
    if current_platform.is_cpu():
        features = {"amx": torch.cpu._is_amx_tile_supported(), "avx512": torch.cpu._is_avx512_supported()}
        device += [name for name, present in features.items() if present]
    return device


def _loading(load: "LoadConfig") -> list[str]:
    """What chooses among the weight files beside each other, or names others elsewhere, which their digest does not tell."""
    extra = blake3(repr(load.model_loader_extra_config).encode()).hexdigest()  # may hold keys of an object store
    return [str(load.load_format), extra, repr(load.ignore_patterns)]


def _multimodal(config: "MultiModalConfig | None") -> dict[str, str]:
    """vLLM's hash of an image covers what a request says of it, not what the engine was started with."""
    if config is None:
        return {}
    return {name: repr(value) for name, value in sorted(vars(config).items()) if name not in HARMLESS_MULTIMODAL}


def identity_fields(
    config: "VllmConfig", kv_cache_config: "KVCacheConfig", content_of: Content = content_digest
) -> dict[str, Any]:
    """The namespace's identity, in clear text and JSON-able. Anything that differs gives another namespace."""
    model, cache, parallel = config.model_config, config.cache_config, config.parallel_config
    if contract.draws_hash_seed(cache.prefix_caching_hash_algo) and "PYTHONHASHSEED" not in os.environ:
        logger.warning(
            "kvoffload: with prefix_caching_hash_algo=%s vLLM %s draws a new hash seed at every start, so nothing is found "
            "again after a restart; set PYTHONHASHSEED, or use sha256 and vLLM 0.29 or newer",
            cache.prefix_caching_hash_algo,
            vllm_version,
        )
    return {
        "model": model.model,
        "weights": weights_digest(config, content_of),
        "loading": _loading(config.load_config),
        "shape": _plain(model.hf_config.to_dict()),
        # Some models choose rotary factors or attention temperature by how long a sequence may get.
        "max_model_len": model.max_model_len,
        "implementation": str(model.model_impl),  # vLLM's own and transformers' may order a head's values differently
        "generation": _plain({**model.try_get_generation_config(), **model.override_generation_config}),
        "dtype": str(model.dtype),
        "quantization": [str(model.quantization), repr(model.quantization_config)],
        "multimodal": _multimodal(model.multimodal_config),
        "kv_cache_dtype": str(cache.cache_dtype),
        "kv_cache_layout": contract.kv_cache_layout(config),
        "groups": [
            {"layers": list(group.layer_names), "spec": repr(group.kv_cache_spec)}
            for group in kv_cache_config.kv_cache_groups
        ],
        "hash": [str(cache.prefix_caching_hash_algo), os.environ.get("PYTHONHASHSEED", "")],
        # By name only: a draft from other weights costs accepted tokens, not right ones.
        "draft_model": str(config.speculative_config.model) if config.speculative_config else "",
        "tensor_parallel": parallel.tensor_parallel_size,
        "pipeline_parallel": parallel.pipeline_parallel_size,
        "context_parallel": [
            parallel.prefill_context_parallel_size,
            parallel.decode_context_parallel_size,
            parallel.cp_kv_cache_interleave_size,  # which tokens of a block a rank holds
        ],
        "data_parallel": [parallel.data_parallel_index, parallel.data_parallel_size],
        "attention_backend": str(config.attention_config.backend),
        "hardware": _hardware(),
        "vllm": vllm_version,
    }


def siblings(fields: Mapping[str, Any], engines: int) -> list[dict[str, Any]]:
    """The same of the deployment's other data-parallel engines; each has a cache of its own."""
    if engines == 1:
        return []
    own, size = fields["data_parallel"]
    return [{**fields, "data_parallel": [number, size]} for number in range(engines) if number != own]


class LoraSalts:
    """Gives blocks computed with a LoRA adapter keys of their own.

    vLLM hashes an adapter's name and path, not its content, so an adapter replaced under the same name would find the
    old one's blocks in a cache that outlives the process. The salt is a digest of the adapter's files. But vLLM keeps the
    weights it read once, at a time it does not tell us. Only of files that have not changed since this process began is it
    certain that what vLLM computes with is what lies there; with all others the salt is random, so that nothing computed
    with them is found after this process or after their next change.
    """

    def __init__(self) -> None:
        self._began_ns = time.time_ns()
        self._seen: dict[tuple[int, str], tuple[list[str], bytes]] = {}
        self._looking: threading.Thread | None = None
        self._took_s = 0.0

    def of(self, adapter: "LoRARequest") -> bytes | None:
        """None: not known now, so nothing of the request may be loaded or stored. The files are looked at in a thread, for a
        network's file system may never answer. That is waited for LOOK_S, once: not before it has answered in less again."""
        if self._looking is not None and self._looking.is_alive():
            return None
        found: list[bytes] = []
        self._looking = threading.Thread(target=self._time, args=(adapter, found), name="kvoffload-lora", daemon=True)
        wait_s = LOOK_S if self._took_s < LOOK_S else 0.0
        try:
            self._looking.start()
        except RuntimeError:  # there is no thread to be had now
            self._looking = None
            return None
        self._looking.join(wait_s)
        if not found and wait_s:
            logger.warning(
                "kvoffload: the files of LoRA adapter %s cannot be read in %g s: until they can, requests with adapters are "
                "computed and not kept", adapter.lora_path, LOOK_S,
            )  # fmt: skip
        return found[0] if found else None

    def _time(self, adapter: "LoRARequest", found: list[bytes]) -> None:
        begun = time.monotonic()
        self._took_s = float("inf")  # until it is known
        found.append(self._look(adapter))
        self._took_s = time.monotonic() - begun

    def _look(self, adapter: "LoRARequest") -> bytes:
        name = (adapter.lora_int_id, adapter.lora_path)
        try:
            stamps, changed_ns = _stamps(adapter.lora_path)
            if name not in self._seen and changed_ns < self._began_ns:
                self._seen[name] = stamps, _adapter_digest(adapter.lora_path)
        except (OSError, RuntimeError, UnicodeError) as error:  # the latter two of odd names
            logger.warning("kvoffload: LoRA adapter %s cannot be read: %s", adapter.lora_path, error)
            stamps = []
        if name not in self._seen or self._seen[name][0] != stamps:
            if stamps:
                logger.warning(
                    "kvoffload: the files of LoRA adapter %s changed while vLLM runs: until it is started again, what is "
                    "computed with the adapter is not kept for the next start",
                    adapter.lora_path,
                )
            self._seen[name] = stamps, os.urandom(16)
        salt = self._seen[name][1]
        while len(self._seen) > ADAPTERS_MAX:
            del self._seen[next(iter(self._seen))]
        return salt


def _adapter_directory(lora_path: str) -> Path:
    path = Path(lora_path).expanduser()
    return path if path.exists() else _snapshot(lora_path, None, None) or path


def _adapter_files(lora_path: str) -> tuple[Path, list[Path]]:
    """Where an adapter lies and all of its files, few and small, whatever they are called. OSError if there are none."""
    directory = _adapter_directory(lora_path)
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    if not files:
        raise FileNotFoundError(lora_path)
    return directory, files


def _links(path: Path) -> list[Path]:
    """The symlinks on the way to a path, one behind the other."""
    found: list[Path] = []
    ways = [path.absolute()]
    while ways:
        way = ways.pop()
        for each in (way, *way.parents):
            if each.is_symlink() and each not in found:
                found.append(each)
                ways.append(each.parent / each.readlink())
    return found


def _stamps(lora_path: str) -> tuple[list[str], int]:
    """What is different after an adapter's files changed, and when one last did. OSError if they change just now.

    Old files may take its name, by a symlink or a rename: these change the times of the symlink and of the directory only.
    """
    directory, files = _adapter_files(lora_path)
    ways = {directory.resolve(), *(path.parent for path in files), *(link for path in files for link in _links(path))}
    stats = [(path, path.stat()) for path in files] + [(path, path.lstat()) for path in sorted(ways)]
    stamps = [f"{path} {stat.st_ino} {stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns}" for path, stat in stats]
    return stamps, max(max(stat.st_mtime_ns, stat.st_ctime_ns) for _, stat in stats)


def _adapter_digest(lora_path: str) -> bytes:
    return blake3(files_digest(*_adapter_files(lora_path)).encode()).digest(16)


def salted(key: BlockKey, salt: bytes) -> BlockKey:
    """The key under which a block is kept: vLLM's own, or one of the same length that depends on the salt too."""
    if not salt:
        return key
    return blake3(salt + key).digest(len(key) - 4) + key[-4:]
