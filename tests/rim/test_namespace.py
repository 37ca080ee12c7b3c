"""What gives a deployment a namespace of its own: vLLM's real configuration, changed one setting at a time."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny_models import make
from vllm.config.multimodal import MultiModalConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform

from kvoffload.store import Identity
from kvoffload.vllm import identity as identity_module
from kvoffload.vllm.identity import identity_fields

BUILD = Path(__file__).resolve().parents[2] / "build"


@pytest.fixture(scope="module")
def model() -> Path:
    return make("llama", BUILD / "models")


def groups(*layers_of_groups: tuple[str, ...], spec: str = "FullAttentionSpec(block_size=32)") -> SimpleNamespace:
    class Spec:
        def __repr__(self) -> str:
            return spec

    return SimpleNamespace(
        kv_cache_groups=[SimpleNamespace(layer_names=layers, kv_cache_spec=Spec()) for layers in layers_of_groups]
    )


ONE_GROUP = groups(("layers.0", "layers.1"))


def config_of(model: Path, **arguments):
    return EngineArgs(str(model), **arguments).create_engine_config()


def fields(model: Path, kv_cache_config=ONE_GROUP, change=None, **arguments) -> dict:
    """`change` alters the configuration vLLM made."""
    config = config_of(model, **arguments)
    if change is not None:
        change(config)
    return json.loads(json.dumps(identity_fields(config, kv_cache_config)))


def identity(model: Path, kv_cache_config=ONE_GROUP, change=None, **arguments) -> str:
    """As it goes into the namespace's name."""
    return json.dumps(fields(model, kv_cache_config, change, **arguments), sort_keys=True)


def setting(part: str, name: str, value: object):
    return lambda config: setattr(getattr(config, part), name, value)


def test_what_changes_no_block_changes_no_namespace(model):
    same = identity(model)
    for arguments in ({"max_num_seqs": 7}, {"gpu_memory_utilization": 0.31}, {"disable_log_stats": True}):
        assert identity(model, **arguments) == same, arguments


CHANGES = {
    "length": {"max_model_len": 512},
    "dtype": {"dtype": "float32"},
    "hash": {"prefix_caching_hash_algo": "sha256_cbor"},
    "rope": {"hf_overrides": {"rope_parameters": {"rope_type": "default", "rope_theta": 4321.0}}},
    "generation": {"override_generation_config": {"temperature": 0.5}},
    "dummy weights": {"load_format": "dummy"},
    "weights of another format beside them": {"load_format": "pt"},
    "weights elsewhere": {"model_loader_extra_config": {"tensorizer_uri": "/elsewhere/model.tensors"}},
    "other files left out": {"ignore_patterns": "consolidated*"},
    "kv cache dtype": {"change": setting("cache_config", "cache_dtype", "fp8")},
    "kv cache layout": {"change": setting("cache_config", "kv_cache_layout", "BLHNC")},
    "tensor parallel": {"change": setting("parallel_config", "tensor_parallel_size", 2)},
    "pipeline parallel": {"change": setting("parallel_config", "pipeline_parallel_size", 2)},
    "data parallel": {"change": setting("parallel_config", "data_parallel_size", 2)},
    "data parallel rank": {"change": setting("parallel_config", "data_parallel_index", 1)},
    "decode context parallel": {"change": setting("parallel_config", "decode_context_parallel_size", 2)},
    "prefill context parallel": {"change": setting("parallel_config", "prefill_context_parallel_size", 2)},
    "context parallel interleave": {"change": setting("parallel_config", "cp_kv_cache_interleave_size", 16)},
    "implementation": {"change": setting("model_config", "model_impl", "transformers")},
    "attention backend": {"change": setting("attention_config", "backend", "FLASHINFER")},
    "quantization": {"change": setting("model_config", "quantization", "fp8")},
    "quantization settings": {"change": setting("model_config", "quantization_config", {"ignore": ["lm_head"]})},
    "draft model": {"change": lambda config: setattr(config, "speculative_config", SimpleNamespace(model="draft"))},
    "images": {"change": setting("model_config", "multimodal_config", MultiModalConfig())},
    "layers": {"kv_cache_config": groups(("layers.0",))},
    "groups": {"kv_cache_config": groups(("layers.0", "layers.1"), ("layers.2",))},
    "block size": {"kv_cache_config": groups(("layers.0", "layers.1"), spec="FullAttentionSpec(block_size=64)")},
}


def test_what_changes_a_block_changes_the_namespace(model):
    found = {"as it is": identity(model)} | {name: identity(model, **change) for name, change in CHANGES.items()}
    same = {name: [other for other in found if found[other] == found[name]] for name in found}
    assert all(others == [name] for name, others in same.items()), same


def test_every_field_of_the_identity_is_changed_by_something(model, tmp_path, monkeypatch):
    """A field that nothing changes covers nothing."""
    plain = fields(model)
    moved = shutil.copytree(model, tmp_path / "elsewhere")
    found = [fields(model, **change) for change in CHANGES.values()] + [fields(moved)]
    monkeypatch.setattr(current_platform.__class__, "get_device_name", classmethod(lambda *_: "another processor"))
    monkeypatch.setattr(identity_module, "vllm_version", "0.0")
    found.append(fields(model))
    changed = {name for other in found for name in plain if other[name] != plain[name]}
    assert changed == set(plain)


def test_retrained_weights_below_the_same_path_change_the_namespace(model, tmp_path):
    copy = shutil.copytree(model, tmp_path / model.name)
    plain = fields(copy)
    (file,) = copy.glob("*.safetensors")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert {name for name, value in fields(copy).items() if value != plain[name]} == {"weights"}


def test_keys_of_an_object_store_are_not_written_to_the_manifest(model):
    assert "s3cret" not in identity(model, model_loader_extra_config={"s3_secret_access_key": "s3cret"})


def test_ranks_of_one_namespace_have_files_that_no_other_rank_takes_for_its_own():
    """Sizes are in the fields above; each rank's slots carry its number in their fingerprint."""
    one = Identity.of({}, 4096, 4)
    prints = {one.rank_fingerprint(rank, 4) for rank in range(4)} | {one.rank_fingerprint(0, 2)}
    assert len(prints) == 5


def test_the_engines_own_settings_for_images_change_the_namespace_but_those_of_caches_do_not(model):
    def with_images(**settings):
        return identity(model, change=setting("model_config", "multimodal_config", MultiModalConfig(**settings)))

    plain = with_images()
    assert with_images(mm_processor_cache_gb=1) == plain
    for settings in ({"mm_processor_kwargs": {"num_crops": 4}}, {"video_pruning_rate": 0.5}):
        assert with_images(**settings) != plain


def test_a_hash_seed_of_the_environment_changes_the_namespace(model, monkeypatch):
    plain = identity(model)
    monkeypatch.setenv("PYTHONHASHSEED", "7")
    assert identity(model) != plain


def test_files_beside_the_weights_that_change_what_is_computed_change_the_namespace(model, tmp_path):
    copy = shutil.copytree(model, tmp_path / model.name)
    plain = identity(copy)
    (copy / "README.md").write_text("hello")
    assert identity(copy) == plain
    (copy / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5, 0.5]}')
    assert identity(copy) != plain
