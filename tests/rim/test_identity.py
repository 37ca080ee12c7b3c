"""What separates caches whose blocks vLLM's hash would mix up."""

import os
import shutil
import threading
from functools import partial

import pytest
import safetensors.torch
import torch
from vllm.lora.request import LoRARequest

from kvoffload.store import Digests, digests
from kvoffload.types import KEY_BYTES_MAX
from kvoffload.vllm import identity as identity_module
from kvoffload.vllm.identity import LoraSalts, content_digest, model_digest, salted
from tests.store.helpers import tick

KEY = bytes(range(32)) + (3).to_bytes(4, "big")


@pytest.fixture
def weights(tmp_path):
    folder = tmp_path / "weights"
    folder.mkdir()
    (folder / "a.safetensors").write_bytes(os.urandom(10_000))
    (folder / "b.safetensors").write_bytes(os.urandom(10_000))
    (folder / "README.md").write_text("hello")
    return folder


@pytest.fixture(autouse=True)
def settled(monkeypatch):
    """A file's times are trusted although it was written just now: what the file systems of tests keep is fine enough."""
    monkeypatch.setattr(digests, "SETTLE_SECONDS", -1.0)
    monkeypatch.setattr(digests, "IN_MEMORY", ())  # where tests run may be one


def test_one_changed_byte_of_the_weights_changes_the_digest(weights):
    before = model_digest(weights)
    content = bytearray((weights / "b.safetensors").read_bytes())
    content[5_000] ^= 1
    (weights / "b.safetensors").write_bytes(content)
    assert model_digest(weights) != before


def test_weights_copied_elsewhere_with_other_notes_have_the_same_digest(weights, tmp_path):
    copy = shutil.copytree(weights, tmp_path / "elsewhere")
    (copy / "README.md").write_text("other")
    assert model_digest(copy) == model_digest(weights)


def test_weights_rewritten_in_the_hubs_cache_are_told_by_their_content(tmp_path):
    """Its files are named by their SHA-256, but what is saved over a snapshot goes through its symlinks."""
    folder = tmp_path / "snapshot"
    folder.mkdir()
    (tmp_path / ("a" * 64)).write_bytes(b"first weights")
    (folder / "model.safetensors").symlink_to(tmp_path / ("a" * 64))
    before = model_digest(folder)
    (folder / "model.safetensors").write_bytes(b"other weights")
    assert (folder / "model.safetensors").is_symlink()
    assert model_digest(folder) != before


def test_retrained_weights_of_the_same_names_sizes_and_headers_have_another_digest(tmp_path):
    digests = []
    for value in (1.0, 1.0001):
        folder = tmp_path / str(value)
        folder.mkdir()
        tensors = {"model.layers.0.weight": torch.full((64, 64), value)}
        safetensors.torch.save_file(tensors, folder / "model.safetensors")
        digests.append(model_digest(folder))
    first, second = ((tmp_path / str(value) / "model.safetensors").read_bytes() for value in (1.0, 1.0001))
    header = 8 + int.from_bytes(first[:8], "little")
    assert first[:header] == second[:header] and len(first) == len(second)
    assert digests[0] != digests[1]


def test_a_models_own_code_is_part_of_its_digest(weights):
    before = model_digest(weights)
    (weights / "modeling_own.py").write_text("scale = 2")
    assert model_digest(weights) != before


def test_a_digest_remembered_gives_the_same_namespace_and_reads_nothing(weights, tmp_path):
    (tmp_path / "nvme" / "kvoffload").mkdir(parents=True, mode=0o700)
    read = []

    def counted(path):
        read.append(path.resolve().name)
        return content_digest(path)

    def digest_of(weights) -> str:
        remembered = Digests.load(str(tmp_path / "nvme"))
        digest = model_digest(weights, partial(remembered.of, compute=counted))
        remembered.save()
        return digest

    first = digest_of(weights)
    assert first == model_digest(weights) and sorted(read) == ["a.safetensors", "b.safetensors"]
    assert digest_of(weights) == first and len(read) == 2
    times = (weights / "a.safetensors").stat()
    (weights / "a.safetensors").write_bytes(os.urandom(10_000))
    os.utime(weights / "a.safetensors", ns=(times.st_atime_ns, times.st_mtime_ns))  # as cp -p would leave it
    assert digest_of(weights) == model_digest(weights) != first
    assert read[2:] == ["a.safetensors"]


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


def retrain(path) -> None:
    """Other content, with the old one's size and time of modification."""
    times = (path / "a.safetensors").stat()
    (path / "a.safetensors").write_bytes(os.urandom(times.st_size))
    os.utime(path / "a.safetensors", ns=(times.st_atime_ns, times.st_mtime_ns))


def assert_of_this_process_alone(salt: bytes, weights) -> None:
    """Nothing computed under it is found by a process that starts now, or one that started before."""
    assert salt and salt not in (LoraSalts().of(adapter(weights)), LoraSalts().of(adapter(weights, load_inplace=True)))


def test_blocks_of_an_adapter_whose_files_changed_while_in_use_are_never_found_again(weights):
    salts = LoraSalts()
    before = salts.of(adapter(weights))
    retrain(weights)
    after = salts.of(adapter(weights))  # vLLM still computes with the old weights
    assert salts.of(adapter(weights)) == after != before
    assert_of_this_process_alone(after, weights)


def test_an_adapter_changed_after_vllm_may_have_read_it_and_before_its_first_request_is_not_taken_for_the_new_one(weights):
    salts = LoraSalts()  # vLLM reads adapters when it starts
    tick(weights.parent)
    retrain(weights)
    salt = salts.of(adapter(weights))
    assert salts.of(adapter(weights)) == salt
    assert_of_this_process_alone(salt, weights)


def led_elsewhere(path, prepared) -> None:
    path.unlink()
    path.symlink_to(prepared)


def renamed(path, prepared) -> None:
    path.rename(path.with_name("old"))
    prepared.rename(path)


@pytest.mark.parametrize("swap", [led_elsewhere, renamed])
@pytest.mark.parametrize("is_used_before", [False, True])
def test_an_adapter_swapped_for_one_whose_files_are_old_is_not_taken_for_what_vllm_read(weights, swap, is_used_before):
    prepared = weights.with_name("prepared")
    shutil.copytree(weights, prepared)
    retrain(prepared)
    name = weights
    if swap is led_elsewhere:
        name = weights.with_name("link")
        name.symlink_to(weights)
    salts = LoraSalts()  # vLLM reads adapters when it starts
    before = salts.of(adapter(name)) if is_used_before else b""
    tick(weights.parent)
    swap(name, prepared)
    salt = salts.of(adapter(name))
    assert salts.of(adapter(name)) == salt != before
    assert_of_this_process_alone(salt, name)


@pytest.mark.parametrize("reload", ["in place", "unloaded and loaded again"])
def test_a_retrained_adapter_that_is_reloaded_at_run_time_misses_what_the_old_one_left(weights, reload):
    salts = LoraSalts()
    before = salts.of(adapter(weights))
    retrain(weights)
    again = adapter(weights, load_inplace=True) if reload == "in place" else LoRARequest("adapter", 2, str(weights))
    after = salts.of(again)
    assert salts.of(again) == after
    assert len({KEY, salted(KEY, before), salted(KEY, after)}) == 3
    assert_of_this_process_alone(after, weights)
    retrain(weights)
    assert salts.of(again) not in (before, after)


def test_any_file_of_an_adapter_tells_it_apart_whatever_it_is_called(weights):
    before = LoraSalts().of(adapter(weights))
    (weights / "adapter_model.tensors").write_bytes(b"in a format of tomorrow")
    assert LoraSalts().of(adapter(weights)) != before


def test_an_adapter_that_cannot_be_read_shares_its_blocks_with_no_other_process(tmp_path):
    salts = LoraSalts()
    missing = salts.of(adapter(tmp_path / "missing"))
    assert salts.of(adapter(tmp_path / "missing")) == missing
    assert LoraSalts().of(adapter(tmp_path / "missing")) != missing


def test_files_that_do_not_answer_hold_nobody_up_and_share_their_blocks_with_nobody(weights, monkeypatch, caplog):
    salts = LoraSalts()
    right = salts.of(adapter(weights))
    answers = threading.Event()
    real = identity_module._stamps
    with monkeypatch.context() as during:
        during.setattr(identity_module, "LOOK_S", 0.01)
        salts._took_s = 0.0
        during.setattr(identity_module, "_stamps", lambda path: answers.wait() and real(path))
        assert [salts.of(adapter(weights)) for _ in range(3)] == [None] * 3 and caplog.text.count("cannot be read in") == 1
        answers.set()
        salts._looking.join()
        answers.clear()
        salts._took_s = 1.0
        assert salts.of(adapter(weights)) is None
        assert caplog.text.count("cannot be read in") == 1, "it is not waited for again before it has answered in time"
        answers.set()
        salts._looking.join()
    assert salts.of(adapter(weights)) == right


def test_salts_of_many_adapters_are_not_all_remembered(weights, monkeypatch):
    monkeypatch.setattr(identity_module, "ADAPTERS_MAX", 2)
    salts = LoraSalts()
    for number in range(5):
        salts.of(LoRARequest(f"a{number}", number + 1, str(weights)))
    assert len(salts._seen) == 2


def test_a_salted_key_keeps_its_length_and_group():
    key = salted(KEY, b"adapter")
    assert len(key) == len(KEY) <= KEY_BYTES_MAX and key[-4:] == KEY[-4:]
    assert salted(KEY, b"") == KEY
