"""How large a block is and where its bytes lie: vLLM's KV-cache configuration in the engine's terms."""

from typing import TYPE_CHECKING

from vllm.distributed.kv_transfer.kv_connector.v1.offloading.config import get_offloading_group_ids
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec, UniformTypeKVCacheSpecs
from vllm.v1.kv_offload.base import CanonicalKVCaches

from kvoffload.types import Region

if TYPE_CHECKING:
    from vllm.v1.kv_offload.config import OffloadingConfig


def _group_bytes(group: KVCacheGroupSpec) -> int:
    spec = group.kv_cache_spec
    if isinstance(spec, UniformTypeKVCacheSpecs):
        return spec.page_size_bytes  # already the sum over the group's layers
    return spec.page_size_bytes * len(group.layer_names)


def payload_bytes(config: "OffloadingConfig", kv_cache_config: KVCacheConfig) -> int:
    """An upper bound of one rank's bytes of one block, over all groups. The same on scheduler and workers.

    Pages may be padded and layers may be packed into one page; a slot has room for either.
    """
    groups = [kv_cache_config.kv_cache_groups[group] for group in get_offloading_group_ids(kv_cache_config)]
    return max([config.worker_kv_bytes_per_block, *(_group_bytes(group) for group in groups)])


def regions(kv_caches: CanonicalKVCaches) -> list[list[Region]]:
    """Per group, where each layer's bytes of a block lie."""
    return [
        [
            Region(
                base=kv_caches.tensors[ref.tensor_idx].tensor.data_ptr(),
                stride=kv_caches.tensors[ref.tensor_idx].tensor.stride(0),  # of an int8 tensor: bytes
                nbytes=ref.page_size_bytes,
            )
            for ref in refs
        ]
        for refs in kv_caches.group_data_refs
    ]
