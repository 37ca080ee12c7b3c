"""What differs between the versions of vLLM that kvoffload runs with. Nothing else in the rim asks for the version.

Each name below says what newer versions offer, and what stands in for it in older ones. tests/rim/signatures.py reads
which names, signatures and attributes of vLLM the rim uses and looks them up in a version's sources.
"""

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, TypeVar

from vllm import envs
from vllm.platforms import current_platform
from vllm.version import __version__ as VLLM_VERSION

from kvoffload.errors import ConfigError
from kvoffload.types import Tier
from kvoffload.vllm.window import FIXED_HASH_SEED, release

if TYPE_CHECKING:
    from vllm.config import ParallelConfig, VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.kv_offload.base import OffloadKey, ReqContext
    from vllm.v1.kv_offload.config import OffloadingConfig

T = TypeVar("T")


VERSION = release(VLLM_VERSION)

# Failed loads are asked for by request. Before, by block.
if VERSION >= (0, 30):
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorTransferResults as TransferResults
else:
    TransferResults = None  # vLLM does not ask


def refuse_unsupported(config: "VllmConfig", kv_cache_config: "KVCacheConfig") -> None:
    """ConfigError for what works with newer versions only."""
    # A failed load of such a model ends vLLM before 0.30, and what order a request's blocks have is not told before 0.31.
    if VERSION < (0, 31) and len(kv_cache_config.kv_cache_groups) > 1:
        raise ConfigError(
            f"kvoffload needs vLLM 0.31 for models with several KV-cache groups, and this is {VLLM_VERSION}: upgrade vLLM"
        )
    # Engines of a dense model are each told that they are alone, so the caps could not be divided among them.
    in_group = re.search(r"_dp\d+$", str(config.kv_transfer_config.engine_id))
    if VERSION < (0, 30) and (in_group or config.parallel_config.data_parallel_size > 1):
        raise ConfigError(f"kvoffload needs vLLM 0.30 for data parallelism, and this is {VLLM_VERSION}: upgrade vLLM")


def engines(parallel: "ParallelConfig") -> int:
    """Data-parallel engines of the deployment. vLLM resets data_parallel_size in engines that run by themselves."""
    if VERSION >= (0, 30):
        return max(parallel.data_parallel_size, parallel.elastic_ep_max_dp_size or 1)
    return 1


# vLLM's numbers of the KV-cache groups that are offloaded. Before, all of them, in order.
if VERSION >= (0, 30):
    from vllm.distributed.kv_transfer.kv_connector.v1.offloading.config import get_offloading_group_ids

    def group_ids(config: "OffloadingConfig") -> list[int]:
        return [group.group_id for group in config.groups]

else:

    def get_offloading_group_ids(kv_cache_config: "KVCacheConfig") -> tuple[int, ...]:
        return tuple(range(len(kv_cache_config.kv_cache_groups)))

    def group_ids(config: "OffloadingConfig") -> list[int]:
        return list(range(len(config.groups)))


def worker_arguments(config: "VllmConfig", kv_cache_config: "KVCacheConfig") -> tuple[Any, ...]:
    """What vLLM's worker half is constructed with, after the spec."""
    return (config, kv_cache_config) if VERSION >= (0, 27) else (kv_cache_config,)


# -- layout ------------------------------------------------------------------------------------------------------------


def preferred_layout() -> str | None:
    """The KV-cache layout to ask for; None: what `OffloadingConnector` asks for.

    In BLHNC a block is one span over all layers, so one copy. vLLM falls back if the attention backend does not have it;
    that of CPUs does not. Before 0.29 `OffloadingConnector` itself asks for one span per block (it
    prefers_cross_layer_blocks), which vLLM's first model runner grants and its second does not.
    """
    return "BLHNC" if VERSION >= (0, 29) and current_platform.is_cuda() else None


def kv_cache_layout(config: "VllmConfig") -> str:
    """The layout that vLLM chose, as the scheduler process knows it."""
    if VERSION >= (0, 29):
        return str(config.cache_config.kv_cache_layout)
    # Chosen in the workers, by these two and by what else is in the namespace's identity.
    return f"{envs.VLLM_KV_CACHE_LAYOUT or 'HND'}, model runner {2 if config.use_v2_model_runner else 1}"


def draws_hash_seed(algorithm: str) -> bool:
    """Whether vLLM draws a new seed for its block hashes at every start, unless PYTHONHASHSEED is set."""
    return VERSION < FIXED_HASH_SEED or "xxhash" in algorithm


# -- what vLLM keeps of a request --------------------------------------------------------------------------------------

if VERSION >= (0, 27):
    from vllm.v1.kv_offload.base import Locality, Medium

    _MEDIUM = {Tier.DRAM: Medium.CPU, Tier.SSD: Medium.STORAGE}

    def may_load_from(tier: Tier, req_context: "ReqContext") -> bool:
        return req_context.load_tier_filter.allows(_MEDIUM[tier], Locality.LOCAL)

    def set_state(req_context: "ReqContext", state: object) -> None:
        req_context.set_state(state)

    def get_state(req_context: "ReqContext", kind: type[T]) -> T | None:
        return req_context.get_state(kind)

else:

    def may_load_from(tier: Tier, req_context: "ReqContext") -> bool:
        return True

    def set_state(req_context: "ReqContext", state: object) -> None:
        vars(req_context)["kvoffload_state"] = state

    def get_state(req_context: "ReqContext", kind: type[T]) -> T | None:
        return vars(req_context).get("kvoffload_state")


# A request's keys and their positions in it: the tokens up to a block's end. Before, they are noted in the order in which vLLM
# names them: it touches and stores the keys of a request (of its one group, see above) from the first to the last.
TELLS_POSITIONS = VERSION >= (0, 31)
if VERSION >= (0, 31):

    def note_keys(req_context: "ReqContext", keys: Iterable["OffloadKey"]) -> None:
        return

    def key_positions(req_context: "ReqContext") -> dict["OffloadKey", int]:
        return req_context._offload_key_positions  # noted by vLLM for managers that want the order of a prefix

    def block_end(position: int, tokens_per_block: int) -> int:
        return position

else:

    def note_keys(req_context: "ReqContext", keys: Iterable["OffloadKey"]) -> None:
        positions = key_positions(req_context)
        for key in keys:
            positions.setdefault(key, len(positions))

    def key_positions(req_context: "ReqContext") -> dict["OffloadKey", int]:
        return vars(req_context).setdefault("kvoffload_positions", {})

    def block_end(position: int, tokens_per_block: int) -> int:
        """In tokens of its request, of the one KV-cache group that there is."""
        return (position + 1) * tokens_per_block


# Which tier supplied a prompt's tokens. Before, vLLM does not ask.
if VERSION >= (0, 32):
    from vllm.v1.metrics.cache_hit_source import CacheHitSource

    HIT_SOURCES = {
        Tier.DRAM: CacheHitSource.HOST,
        Tier.SSD: CacheHitSource.DISK,
        None: CacheHitSource.EXTERNAL_UNSPECIFIED,
    }
else:
    HIT_SOURCES = {}
