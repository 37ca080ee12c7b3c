"""What separates caches whose blocks vLLM's hash would mix up."""

import os
import shutil

import pytest
from vllm.lora.request import LoRARequest

from kvoffload.types import KEY_BYTES_MAX
from kvoffload.vllm.identity import LoraSalts, files_digest, salted

KEY = bytes(range(32)) + (3).to_bytes(4, "big")


@pytest.fixture
def weights(tmp_path):
    folder = tmp_path / "weights"
    folder.mkdir()
    (folder / "a.safetensors").write_bytes(os.urandom(10_000))
    (folder / "b.safetensors").write_bytes(os.urandom(10_000))
    (folder / "README.md").write_text("hello")
    return folder


def test_one_changed_byte_of_the_weights_changes_the_digest(weights):
    before = files_digest(weights)
    content = bytearray((weights / "b.safetensors").read_bytes())
    content[5_000] ^= 1
    (weights / "b.safetensors").write_bytes(content)
    assert files_digest(weights) != before


def test_weights_copied_elsewhere_with_other_notes_have_the_same_digest(weights, tmp_path):
    copy = shutil.copytree(weights, tmp_path / "elsewhere")
    (copy / "README.md").write_text("other")
    assert files_digest(copy) == files_digest(weights)


def test_weights_in_the_hubs_cache_are_told_by_the_name_of_their_blob(tmp_path):
    digests = []
    for name in ("a" * 64, "b" * 64):
        folder = tmp_path / name[0]
        folder.mkdir()
        (folder / name).write_bytes(b"the same bytes")
        (folder / "model.safetensors").symlink_to(folder / name)
        digests.append(files_digest(folder))
    assert digests[0] != digests[1]


def adapter(path, **options) -> LoRARequest:
    return LoRARequest("adapter", 1, str(path), **options)


def test_an_adapter_with_other_content_gets_other_keys_after_a_restart(weights):
    before = LoraSalts().of(adapter(weights))
    assert LoraSalts().of(adapter(weights)) == before
    (weights / "a.safetensors").write_bytes(os.urandom(10_000))
    after = LoraSalts().of(adapter(weights))
    assert len({KEY, salted(KEY, before), salted(KEY, after)}) == 3


def test_an_adapter_with_another_scale_gets_other_keys_after_a_restart(weights):
    (weights / "adapter_config.json").write_text('{"r": 8, "lora_alpha": 16}')
    before = LoraSalts().of(adapter(weights))
    (weights / "adapter_config.json").write_text('{"r": 8, "lora_alpha": 64}')
    assert LoraSalts().of(adapter(weights)) != before


def test_blocks_of_an_adapter_whose_files_changed_while_in_use_are_never_found_again(weights):
    salts = LoraSalts()
    before = salts.of(adapter(weights))
    (weights / "a.safetensors").write_bytes(os.urandom(10_001))
    after = salts.of(adapter(weights))  # vLLM still computes with the old weights
    assert salts.of(adapter(weights)) == after
    assert after not in (before, LoraSalts().of(adapter(weights)))


def test_an_adapter_loaded_anew_in_place_is_known_by_its_new_content(weights):
    salts = LoraSalts()
    salts.of(adapter(weights))
    (weights / "a.safetensors").write_bytes(os.urandom(10_001))
    assert salts.of(adapter(weights, load_inplace=True)) == LoraSalts().of(adapter(weights))


def test_an_adapter_that_cannot_be_read_shares_its_blocks_with_no_other_process(tmp_path):
    salts = LoraSalts()
    missing = salts.of(adapter(tmp_path / "missing"))
    assert salts.of(adapter(tmp_path / "missing")) == missing
    assert LoraSalts().of(adapter(tmp_path / "missing")) != missing


def test_a_salted_key_keeps_its_length_and_group():
    key = salted(KEY, b"adapter")
    assert len(key) == len(KEY) <= KEY_BYTES_MAX and key[-4:] == KEY[-4:]
    assert salted(KEY, b"") == KEY
