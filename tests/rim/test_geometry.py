"""Where a block's bytes lie in vLLM's layouts, and on which device."""

from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheGroupSpec, UniformTypeKVCacheSpecs
from vllm.v1.kv_offload.base import CanonicalKVCacheRef, CanonicalKVCaches, CanonicalKVCacheTensor

from kvoffload.engine import Engine
from kvoffload.errors import ConfigError
from kvoffload.types import EngineOptions, OpKind, Region
from kvoffload.vllm import connector
from kvoffload.vllm.geometry import Geometry, check_regions, device_of, regions
from kvoffload.worker import block_ops
from tests.patience import PATIENCE_S

BLOCKS, LAYERS, PAGE = 6, 3, 1000


def by_layer(padding: int = 0) -> CanonicalKVCaches:
    """A span per layer; pages may be padded."""
    tensors = [torch.zeros((BLOCKS, PAGE + padding), dtype=torch.int8) for _ in range(LAYERS)]
    return CanonicalKVCaches(
        [CanonicalKVCacheTensor(tensor, PAGE + padding) for tensor in tensors],
        [[CanonicalKVCacheRef(layer, PAGE) for layer in range(LAYERS)]],
    )


def packed(groups: int = 1) -> CanonicalKVCaches:
    """A span over all layers, as vLLM hands out block-outermost layouts: every group names the whole block."""
    whole = torch.zeros(BLOCKS * LAYERS * PAGE, dtype=torch.int8).as_strided((BLOCKS, LAYERS * PAGE), (LAYERS * PAGE, 1))
    return CanonicalKVCaches(
        [CanonicalKVCacheTensor(whole, LAYERS * PAGE)], [[CanonicalKVCacheRef(0, LAYERS * PAGE)] for _ in range(groups)]
    )


def views_into_one_storage() -> CanonicalKVCaches:
    """Layers that begin somewhere in one allocation, their blocks further apart than they are long."""
    storage = torch.zeros(100 + BLOCKS * 2 * PAGE * LAYERS, dtype=torch.int8)
    starts = [100 + layer * BLOCKS * 2 * PAGE for layer in range(LAYERS)]
    return CanonicalKVCaches(
        [CanonicalKVCacheTensor(storage.as_strided((BLOCKS, PAGE), (2 * PAGE, 1), start), PAGE) for start in starts],
        [[CanonicalKVCacheRef(layer, PAGE) for layer in range(LAYERS)]],
    )


def configs(groups: int, worker_bytes: int, layers_of_a_group: int):
    spec = SimpleNamespace(page_size_bytes=PAGE, prefix_cacheable=True)  # of no padding
    kv_cache_groups = [SimpleNamespace(kv_cache_spec=spec, layer_names=["l"] * layers_of_a_group) for _ in range(groups)]
    config = SimpleNamespace(
        scheduler_config=SimpleNamespace(max_num_batched_tokens=64),
        parallel_config=SimpleNamespace(data_parallel_size=1, elastic_ep_max_dp_size=None),
    )
    offloading = SimpleNamespace(
        worker_kv_bytes_per_block=worker_bytes,
        parallel=SimpleNamespace(world_size=1),
        groups=[SimpleNamespace(tokens_per_block=16)] * groups,
    )
    kv_cache_config = SimpleNamespace(
        kv_cache_groups=kv_cache_groups, hisparse_host_num_blocks=None, prefix_cacheable_group_ids=tuple(range(groups))
    )
    return config, offloading, kv_cache_config


@pytest.mark.parametrize(
    ("kv_caches", "groups", "worker_bytes"),
    [
        (by_layer(), 1, LAYERS * PAGE),
        (by_layer(padding=24), 1, LAYERS * (PAGE + 24)),
        (packed(), 1, LAYERS * PAGE),
        (views_into_one_storage(), 1, LAYERS * PAGE),
        (packed(groups=3), 3, LAYERS * PAGE),  # three groups of a layer each share the block
    ],
    ids=["by layer", "padded", "packed", "views", "packed hybrid"],
)
def test_a_slot_holds_any_groups_block_and_copies_touch_that_block_only(kv_caches, groups, worker_bytes):
    payload = Geometry.of(*configs(groups, worker_bytes, LAYERS // groups)).payload_bytes
    generator = torch.Generator().manual_seed(1)
    for tensor in kv_caches.tensors:
        tensor.tensor.random_(-128, 127, generator=generator)
    before = [tensor.tensor.clone() for tensor in kv_caches.tensors]
    with Engine(EngineOptions(payload, dram_slots=4, spare_slots=2)) as engine:
        engine.bind(regions(kv_caches))
        for group in range(groups):
            for kind, block in ((OpKind.COPY_OUT, 1), (OpKind.COPY_IN, 4)):
                fields = {"generation": 1, "dram_slot": 0, "kv_block": block, "group": group, "timeout_us": int(PATIENCE_S * 1e6)}
                assert engine.submit(block_ops(kind, [b"key"], fields)) == 1
                assert engine.wait(PATIENCE_S) and engine.poll()["status"].tolist() == [0]
    for tensor, was in zip(kv_caches.tensors, before, strict=True):
        same = np.array([bool((tensor.tensor[block] == was[block]).all()) for block in range(BLOCKS)])
        assert same.tolist() == [True, True, True, True, False, True]
        assert (tensor.tensor[4, :PAGE] == was[1, :PAGE]).all()


def test_a_packed_block_is_one_region():
    ((region,),) = regions(packed())
    assert (region.stride, region.nbytes) == (LAYERS * PAGE, LAYERS * PAGE)


PAGES = {"block_size": 16, "num_kv_heads": 2, "head_size": 8, "dtype": torch.float32}  # 16 * 2 * 8 * 4 * 2 = 2048 bytes
PLAIN, PADDED = FullAttentionSpec(**PAGES), FullAttentionSpec(**PAGES, page_size_padded=4096)


@pytest.mark.parametrize(
    ("spec", "layers", "least"),
    [
        (PLAIN, ["a", "b"], 4096),
        (PADDED, ["a", "b"], 4096),
        (UniformTypeKVCacheSpecs(block_size=16, kv_cache_specs={"a": PLAIN, "b": PADDED}), ["a", "b"], 4096),
    ],
    ids=["plain", "padded", "layers of their own"],
)
def test_less_of_a_block_than_its_layers_have_is_refused(spec, layers, least):
    config, offloading, kv_cache_config = configs(1, 0, 2)
    kv_cache_config.kv_cache_groups = [KVCacheGroupSpec(layers, spec)]
    geometry = Geometry.of(config, offloading, kv_cache_config)
    check_regions([[Region(4096, 2048, 2048)] * 2], geometry.least_bytes)
    with pytest.raises(ConfigError, match=f"finds 2048 of the {least} bytes of a KV block of group 0"):
        check_regions([[Region(4096, 2048, 2048)]], geometry.least_bytes)


def on(*devices: str) -> CanonicalKVCaches:
    tensors = [SimpleNamespace(tensor=SimpleNamespace(device=torch.device(device))) for device in devices]
    return CanonicalKVCaches(tensors, [])


def test_the_engine_is_told_the_ordinal_of_the_device_that_holds_the_cache():
    assert device_of(by_layer()) is None
    assert device_of(on("cuda:3", "cuda:3")) == 3
    with pytest.raises(ConfigError, match="not on cpu, cuda:0: set disable_kv_cache=true"):
        device_of(on("cuda:0", "cpu"))


class Platform(SimpleNamespace):
    def is_cuda(self) -> bool:
        return self.name == "CUDA"

    def is_cpu(self) -> bool:
        return self.name == "CPU"


@pytest.mark.parametrize(("name", "refused"), [("CUDA", False), ("CPU", False), ("ROCM", True), ("XPU", True)])
def test_cuda_and_cpu_are_the_platforms_taken(name, refused, monkeypatch):
    monkeypatch.setattr(connector, "current_platform", Platform(name=name, _enum=SimpleNamespace(name=name)))
    config = SimpleNamespace(
        parallel_config=SimpleNamespace(pipeline_parallel_size=1, data_parallel_size=1),
        kv_transfer_config=SimpleNamespace(engine_id="engine"),
    )
    kv_cache_config = SimpleNamespace(kv_cache_groups=[None])
    sentence = f"{name} platform, only on CUDA and CPU: set disable_kv_cache=true"
    with pytest.raises(ConfigError, match=sentence) if refused else nullcontext():
        connector.refuse_unsupported(config, kv_cache_config)
