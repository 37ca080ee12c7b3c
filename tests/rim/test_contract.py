"""What is done for each version of vLLM in the window: the module is loaded as each of them would load it."""

import importlib.util
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
from vllm.v1.kv_offload.base import make_offload_key

from kvoffload.config import Config
from kvoffload.errors import ConfigError
from kvoffload.types import Tier
from kvoffload.vllm import contract
from kvoffload.vllm import manager as manager_module
from kvoffload.vllm import notes as notes_module
from tests.rim import test_manager as scenarios


@dataclass
class OldReqContext:
    """As 0.26 has it."""

    req_id: str
    kv_transfer_params: dict | None = None


def load(version: str, monkeypatch):
    monkeypatch.setattr("vllm.version.__version__", version)
    spec = importlib.util.spec_from_file_location("contract_of_a_version", contract.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("version", ["0.25.1", "0.34.0", "0.34.0rc1", "1.0", "dev", "0.1.dev1+gabc"])
def test_a_vllm_outside_the_window_is_refused_with_one_sentence_that_names_it(version, monkeypatch):
    with pytest.raises(ConfigError, match=r"^kvoffload runs with vLLM 0.26 to 0.33, and this is .*: install [^.]*") as refused:
        load(version, monkeypatch)
    assert version in str(refused.value)


@pytest.mark.parametrize(
    ("version", "number"), [("0.26.0", (0, 26)), ("0.32.0+cpu", (0, 32)), ("0.33.1rc2.dev3+gabc", (0, 33))]
)
def test_versions_in_the_window_are_taken_with_whatever_follows_the_number(version, number):
    assert contract.release(version) == number


def deployment(groups=1, data_parallel_size=1, engine_id="engine"):
    config = SimpleNamespace(
        parallel_config=SimpleNamespace(data_parallel_size=data_parallel_size),
        kv_transfer_config=SimpleNamespace(engine_id=engine_id),
    )
    return config, SimpleNamespace(kv_cache_groups=[None] * groups)


def test_old_versions_refuse_hybrid_models_and_data_parallelism(monkeypatch):
    for version, refuses_groups, refuses_engines in (("0.26.0", 1, 1), ("0.30.0", 1, 0), ("0.31.0", 0, 0)):
        module = load(version, monkeypatch)
        module.refuse_unsupported(*deployment())
        for arguments, refuses in (
            ({"groups": 2}, refuses_groups),
            ({"data_parallel_size": 2}, refuses_engines),
            ({"engine_id": "engine_dp0"}, refuses_engines),
        ):
            if refuses:
                with pytest.raises(ConfigError, match=f"this is {version}: upgrade vLLM"):
                    module.refuse_unsupported(*deployment(**arguments))
            else:
                module.refuse_unsupported(*deployment(**arguments))


def test_an_old_versions_layout_is_named_by_what_decides_it(monkeypatch):
    module = load("0.26.0", monkeypatch)
    seen = set()
    for runner in (False, True):
        for layout in ("NHD", None):
            monkeypatch.setattr(module.envs, "VLLM_KV_CACHE_LAYOUT", layout, raising=False)
            seen.add(module.kv_cache_layout(SimpleNamespace(use_v2_model_runner=runner)))
    assert len(seen) == 4


def test_old_versions_draw_their_hash_seed_whatever_the_algorithm(monkeypatch):
    for version, drawn in (("0.28.1", True), ("0.29.0", False)):
        module = load(version, monkeypatch)
        assert module.draws_hash_seed("sha256") is drawn and module.draws_hash_seed("xxhash_cbor")


def test_block_outermost_is_asked_for_on_cuda_only_and_by_versions_that_have_it(monkeypatch):
    for version, is_cuda, layout in (("0.26.0", True, None), ("0.32.0", True, "BLHNC"), ("0.32.0", False, None)):
        module = load(version, monkeypatch)
        monkeypatch.setattr(module, "current_platform", SimpleNamespace(is_cuda=lambda is_cuda=is_cuda: is_cuda))
        assert module.preferred_layout() == layout


def old_adapter(monkeypatch, **arguments):
    old = load("0.26.0", monkeypatch)
    for module in (manager_module, notes_module):
        monkeypatch.setattr(module, "contract", old)
    return scenarios.adapter(**arguments)


def old_request(manager, name: str, blocks: int):
    context = OldReqContext(name)
    manager.on_new_request(context)
    return context, [make_offload_key(b"p" + bytes([number]) * 31, 0) for number in range(blocks)]


def test_an_old_version_stores_loads_and_recomputes_without_state_of_its_own(monkeypatch):
    manager = old_adapter(monkeypatch)
    context, keys = old_request(manager, "r", 6)
    manager.touch(keys[:4], context)
    assert scenarios.store(manager, context, keys[:4]) == keys[:4]
    assert scenarios.store(manager, context, keys[4:]) == keys[4:]
    assert list(manager._notes(context).own_positions(context)) == keys
    other, _ = old_request(manager, "r2", 6)
    assert scenarios.hits(manager, other, keys) == [True] * 6
    spec = manager.prepare_load(keys, other)
    manager.take_in(scenarios.TransferReport(failed={spec.transfer: {keys[2]: 5}}))
    manager.complete_load(set(keys), other)
    assert scenarios.hits(manager, other, keys) == [True, True, False, True, True, True]
    spec = manager.prepare_load(keys, other)
    manager.take_in(scenarios.TransferReport(failed={spec.transfer: {keys[0]: 5}}))
    manager.complete_load(set(keys), other)
    assert scenarios.hits(manager, other, keys) == [False] * 6
    manager.on_request_finished(other)


def test_with_an_old_version_a_prefix_loses_its_end_before_its_head(monkeypatch):
    manager = old_adapter(monkeypatch, dram_slots=12)
    context, keys = old_request(manager, "r", 8)
    manager.touch(keys, context)
    scenarios.store(manager, context, keys)
    manager.on_request_finished(context)
    end = OldReqContext("r2")
    manager.on_new_request(end)
    scenarios.store(manager, end, [make_offload_key(b"q" + bytes([number]) * 31, 0) for number in range(8)])
    left = scenarios.hits(manager, context, keys)
    assert 0 < sum(left) < 8 and left == sorted(left, reverse=True)


def test_an_old_version_may_load_from_any_tier_and_switched_off_stays_off(monkeypatch):
    old_adapter(monkeypatch)
    assert manager_module.contract.may_load_from(Tier.SSD, OldReqContext("r"))
    off = manager_module.ManagerAdapter(Config.parse({}), scenarios.offloading_config())
    context, keys = old_request(off, "r", 2)
    assert off.prepare_store(keys, context).keys_to_store == []
