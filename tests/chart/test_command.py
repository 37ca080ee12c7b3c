"""The container's command: the real `kvoffload serve` takes it, the real model its settings, and vLLM's own parser the rest."""

import json
import shlex
from functools import cache
from typing import get_args

import pytest
from vllm.config.lora import MaxLoRARanks
from vllm.entrypoints.cli.serve import ServeSubcommand
from vllm.utils.argparse_utils import FlexibleArgumentParser

from kvoffload.cli.serve import VLLM
from kvoffload.config import Config
from tests.chart.rendering import CI, ci, name, render, with_model
from tests.cli.helpers import Command
from tools.chart_values import ARGS, OTHER_SPELLING
from tools.chart_values import VLLM as VALUES

NOT_OURS = {
    "model", "servedModelName", "port", "gpuMemoryUtilization", "maxModelLen", "tensorParallelSize", "enableChunkedPrefill",
    "enablePrefixCaching", "enforceEager", "extraArgs", "noResumeKvCache",
}  # fmt: skip


@cache
def parser() -> FlexibleArgumentParser:
    made = FlexibleArgumentParser()
    ServeSubcommand().subparser_init(made.add_subparsers(dest="subparser"))
    return made


@pytest.fixture
def taken(capsys):
    """What `kvoffload serve` makes of a rendering: the configuration, and what vLLM reads."""
    run = Command(capsys)

    def taken(values: dict):
        program, *words = render(values).command
        done = run(*words, "--dry-run")
        assert program == "kvoffload" and done.code == 0, done.err
        handed = shlex.split(done.out)[len(VLLM) :]
        parsed = parser().parse_args(["serve", *handed])
        transfer = parsed.kv_transfer_config
        return Config.parse(transfer.kv_connector_extra_config) if transfer else None, parsed

    return taken


@pytest.mark.parametrize("file", CI, ids=name)
def test_every_values_file_starts_a_server_that_understands_it(file, taken):
    values = ci(name(file))
    args = values["vllm"]["args"]
    config, parsed = taken(values)
    assert parsed.model_tag == args["model"]
    assert parsed.shutdown_timeout == 60 + 5, "drained and flushed in one deadline"
    assert parsed.tensor_parallel_size == args.get("tensorParallelSize", 1)
    if args.get("disableKVCache"):
        assert config is None
        return
    paths = args.get("nvmePath", "/mnt/nvme0")
    assert list(config.nvme_path) == ([paths] if isinstance(paths, str) else paths)
    assert config.ssd_kv_offload_gb == args.get("ssdKvOffloadGb", args.get("ssdKVOffloadGb", 500))
    assert config.dram_kv_offload_gb == args.get("dramKvOffloadGb", args.get("dramKVOffloadGb", 0))
    assert config.resume_kv_cache is not args.get("noResumeKVCache", False)


def test_the_seeds_example_for_one_gpu_is_served_as_it_says(taken):
    config, parsed = taken(ci("seed-basic"))
    assert config.ssd_bytes == 500 * 10**9 and config.nvme_path == ("/mnt/nvme0",)
    assert parsed.model_tag == "/data/model/Meta-Llama-3.1-8B-Instruct/"
    assert parsed.served_model_name == ["Meta-Llama-3.1-8B-Instruct"], "as its requests call it"
    assert (parsed.port, parsed.max_model_len, parsed.gpu_memory_utilization) == (8000, 8192, 0.9)
    assert parsed.enable_chunked_prefill is True and not parsed.enable_lora


def test_the_seeds_example_for_four_gpus_and_a_lora_is_served_as_it_says(taken):
    config, parsed = taken(ci("seed-multi-gpu-lora"))
    assert config.enabled and config.resume_kv_cache
    assert (parsed.tensor_parallel_size, parsed.gpu_memory_utilization, parsed.max_lora_rank) == (4, 0.85, 32)
    (lora,) = parsed.lora_modules
    assert parsed.enable_lora and (lora.name, lora.path) == ("lora", "/data/lora-adapters/llama3.1-8B-lora/")


def test_every_setting_of_the_engine_has_a_value_of_the_chart(taken):
    everything = with_model(vllm__args={
        "nvmePath": ["/a", "/b"], "dramKvOffloadGb": 1.5, "ssdKvOffloadGb": 7, "ssdAdmission": "second-touch",
        "ssdWriteGbPerDay": 12.5, "noResumeKvCache": True, "cleanObsoleteKvCache": True, "disableGpuReuse": True,
        "disableLongToken": True,
    })  # fmt: skip
    config, _ = taken(everything)
    assert config.model_dump() == {
        "nvme_path": ("/a", "/b"), "dram_kv_offload_gb": 1.5, "ssd_kv_offload_gb": 7.0, "ssd_admission": "second-touch",
        "ssd_write_gb_per_day": 12.5, "resume_kv_cache": False, "clean_obsolete_kv_cache": True, "disable_gpu_reuse": True,
        "disable_long_token": True, "disable_kv_cache": False,
    }  # fmt: skip
    keys = {key for key, entry in ARGS.items() if not entry["description"].startswith(OTHER_SPELLING)} - NOT_OURS
    snake = {"".join("_" + letter.lower() if letter.isupper() else letter for letter in key) for key in keys}
    assert snake == set(Config.model_fields)


def test_what_the_schema_allows_is_what_vllm_allows():
    assert VALUES["lora"]["maxRank"]["enum"] == list(get_args(MaxLoRARanks))


def test_no_word_of_the_command_is_lost(taken):
    _, parsed = taken(with_model(vllm__args__extraArgs=["--max-num-seqs=64", "--chat-template", "$(x) $HOME"]))
    assert parsed.max_num_seqs == 64 and parsed.chat_template == "$(x) $HOME"


def test_settings_are_json_that_no_one_quoted(taken):
    config, parsed = taken(with_model(vllm__args__nvmePath='/mnt/"quoted" and spaced'))
    assert config.nvme_path == ('/mnt/"quoted" and spaced',)
    assert json.loads(json.dumps(parsed.kv_transfer_config.kv_connector_extra_config))
