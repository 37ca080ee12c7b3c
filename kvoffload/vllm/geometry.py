"""How large a block is and where its bytes lie: vLLM's KV-cache configuration in the engine's terms."""

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec, UniformTypeKVCacheSpecs
from vllm.v1.kv_offload.base import CanonicalKVCaches

from kvoffload import layout
from kvoffload.config import Config
from kvoffload.errors import ConfigError
from kvoffload.types import Region
from kvoffload.vllm import contract

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_offload.config import OffloadingConfig


def _group_bytes(group: KVCacheGroupSpec) -> int:
    spec = group.kv_cache_spec
    if isinstance(spec, UniformTypeKVCacheSpecs):
        return spec.page_size_bytes  # already the sum over the group's layers
    return spec.page_size_bytes * len(group.layer_names)


def _unpadded_group_bytes(group: KVCacheGroupSpec) -> int:
    match group.kv_cache_spec:
        case UniformTypeKVCacheSpecs(kv_cache_specs=by_layer):
            layers = list(by_layer.values())
        case spec:
            layers = [spec] * len(group.layer_names)
    is_padded = [getattr(layer, "page_size_padded", None) is not None for layer in layers]
    bare = [replace(layer, page_size_padded=None) if pad else layer for layer, pad in zip(layers, is_padded, strict=True)]
    return sum(layer.page_size_bytes for layer in bare)


@dataclass(frozen=True)
class Geometry:
    """What the sizes of tiers follow from. Every process of a deployment computes the same."""

    payload_bytes: int  # an upper bound of one rank's bytes of one block, over all groups
    least_bytes: tuple[int, ...]  # what one rank's regions of a block must add up to at least, by group
    ranks: int
    engines: int  # data-parallel engines, among which the caps are divided
    blocks_per_step: int  # the most that one step of the model can complete, over all groups

    @classmethod
    def of(cls, config: "VllmConfig", offloading: "OffloadingConfig", kv_cache_config: KVCacheConfig) -> "Geometry":
        groups = [kv_cache_config.kv_cache_groups[group] for group in contract.get_offloading_group_ids(kv_cache_config)]
        tokens = config.scheduler_config.max_num_batched_tokens
        return cls(
            # Pages may be padded and layers may be packed into one page; a slot has room for either.
            payload_bytes=max([offloading.worker_kv_bytes_per_block, *(_group_bytes(group) for group in groups)]),
            least_bytes=tuple(_unpadded_group_bytes(group) for group in groups),
            ranks=offloading.parallel.world_size,
            engines=contract.engines(config.parallel_config),
            blocks_per_step=sum(math.ceil(tokens / group.tokens_per_block) for group in offloading.groups),
        )

    def dram_plan(self, settings: Config) -> layout.DramPlan:
        return layout.dram_plan(
            settings.dram_bytes // self.engines, self.payload_bytes, self.ranks, self.blocks_per_step
        )


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


def check_regions(groups: list[list[Region]], least_bytes: tuple[int, ...]) -> None:
    """ConfigError if vLLM handed out less of a block than its layers have: the rest would come back as other bytes."""
    for number, (group, least) in enumerate(zip(groups, least_bytes, strict=True)):
        found = sum(region.nbytes for region in group)
        if found < least:
            raise ConfigError(
                f"kvoffload finds {found} of the {least} bytes of a KV block of group {number}, so it cannot offload this "
                "model on this vLLM: set disable_kv_cache=true"
            )


def device_of(kv_caches: CanonicalKVCaches) -> int | None:
    """The CUDA ordinal, in this process's counting, of the device whose memory holds the KV cache; None: host memory."""
    devices = {tensor.tensor.device for tensor in kv_caches.tensors}
    if len(devices) != 1:
        named = ", ".join(sorted(map(str, devices))) or "none"
        raise ConfigError(f"kvoffload needs one rank's KV cache on one device, not on {named}: set disable_kv_cache=true")
    (device,) = devices
    return device.index if device.type == "cuda" else None
