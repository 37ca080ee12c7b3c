"""`kvoffload serve`: what it makes of its flags, without a vLLM."""

import json
import shlex
import subprocess
import sys

import pytest

from kvoffload.config import Config

EXTRA = "kv_connector_extra_config"


def serve(*arguments, python=("-c", "from kvoffload.cli import main; main()")):
    command = [sys.executable, *python, "serve", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env={"COLUMNS": "200"})


def dry(*arguments):
    """The command's words, and the connector's configuration in it."""
    done = serve(*arguments, "--dry-run")
    assert done.returncode == 0, done.stderr
    words = shlex.split(done.stdout)
    assert words[:3] == [sys.executable, "-m", "kvoffload.vllm.server"]
    if "--kv-transfer-config" not in words:
        return words[3:], None
    transfer = json.loads(words.pop())
    assert words.pop() == "--kv-transfer-config"
    settings = transfer.pop(EXTRA)
    Config.parse(settings)
    assert transfer == {
        "kv_connector": "KVOffloadConnector",
        "kv_connector_module_path": "kvoffload.vllm.connector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
    }
    return words[3:], settings


TIER = ["--nvme-path", "/a", "--ssd-kv-offload-gb", "500"]
TIER_SET = {"nvme_path": ["/a"], "ssd_kv_offload_gb": 500}


@pytest.mark.parametrize("spelt", ["dashes", "underscores", "equals"])
@pytest.mark.parametrize(
    ("flags", "settings"),
    [
        (TIER, TIER_SET),
        (["--dram-kv-offload-gb", "32.5"], {"dram_kv_offload_gb": 32.5}),
        (["--nvme-path", "/a"], {"nvme_path": ["/a"], "ssd_kv_offload_gb": -1}),
        (["--nvme-path", "/a", "--ssd-kv-offload-gb", "-1"], {"nvme_path": ["/a"], "ssd_kv_offload_gb": -1}),
        ([*TIER, "--nvme-path", "/b"], {**TIER_SET, "nvme_path": ["/a", "/b"]}),
        ([*TIER, "--resume-kv-cache"], {**TIER_SET, "resume_kv_cache": True}),
        ([*TIER, "--no-resume-kv-cache"], {**TIER_SET, "resume_kv_cache": False}),
        ([*TIER, "--clean-obsolete-kv-cache"], {**TIER_SET, "clean_obsolete_kv_cache": True}),
        ([*TIER, "--disable-gpu-reuse"], {**TIER_SET, "disable_gpu_reuse": True}),
        ([*TIER, "--disable-long-token"], {**TIER_SET, "disable_long_token": True}),
        ([*TIER, "--ssd-admission", "second-touch"], {**TIER_SET, "ssd_admission": "second-touch"}),
        ([*TIER, "--ssd-write-gb-per-day", "100"], {**TIER_SET, "ssd_write_gb_per_day": 100}),
        ([*TIER, "--disable-kv-cache"], None),
        ([*TIER, "--disable-kv-cache-offload"], None),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_every_flag_in_every_spelling_sets_what_it_is_named_after(flags, settings, spelt):
    if spelt == "underscores":
        flags = ["--" + flag[2:].replace("-", "_") if flag.startswith("--") else flag for flag in flags]
    if spelt == "equals":
        joined = []
        for flag in flags:
            if flag.startswith("--"):
                joined.append(flag)
            else:
                joined[-1] += f"={flag}"
        flags = joined
    assert dry("model", *flags) == (["model"], settings)


def test_all_other_arguments_go_to_vllm_as_they_are_and_in_order():
    theirs = ["model", "--max_model_len", "8192", "-tp", "2", "--seed=-1", "-O.level=3", "--lora-modules", "a=/x", "b=/y"]
    words, settings = dry(*theirs[:3], "--nvme-path", "/a", *theirs[3:])
    assert words == theirs
    assert settings is not None


def test_a_vllm_flag_that_begins_like_one_of_ours_is_vllms():
    words, settings = dry("model", "--nvme", "x", "--dram-kv-offload-gb", "1")
    assert words == ["model", "--nvme", "x"]
    assert settings == {"dram_kv_offload_gb": 1}


def test_without_a_tier_it_is_plain_vllm_and_says_so():
    done = serve("model", "--dry-run")
    assert done.returncode == 0
    assert "--kv-transfer-config" not in done.stdout
    assert "nothing is offloaded" in done.stderr
    assert "nothing is offloaded" not in serve("model", "--disable-kv-cache", "--dry-run").stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--resume-kv-cache", "--no-resume-kv-cache"], "contradict each other"),
        (["--ssd-kv-offload-gb", "5"], "nvme_path is not"),
        (["--nvme-path", "/a", "--ssd-kv-offload-gb", "-2"], "must be 0 (off), -1 (automatic)"),
        (["--nvme-path", "/a", "--nvme_path", "/a"], "more than once"),
        (["--kv-transfer-config", "{}"], "leave it out"),
        (["--kv_transfer_config={}"], "leave it out"),
        (["--kv-transfer-config.kv_role", "kv_both"], "leave it out"),
        (["--kv-offloading-size", "5"], "vLLM's own offloading"),
        (["--kv_offloading_backend=native"], "vLLM's own offloading"),
    ],
)
def test_what_users_do_wrong_is_one_sentence(arguments, says):
    done = serve("model", *arguments, "--dry-run")
    assert done.returncode == 2
    assert says in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_without_vllm_in_this_python_it_says_where_it_is_missing():
    done = serve("model", "--nvme-path", "/a", python=("-c", "import sys; sys.modules['vllm'] = None\n"
                                                       "from kvoffload.cli import main; main()"))  # fmt: skip
    assert done.returncode == 2
    assert "pip install vllm" in done.stderr


def test_a_dry_run_needs_no_vllm():
    done = serve("model", "--nvme-path", "/a", "--dry-run", python=("-c", "import sys; sys.modules['vllm'] = None\n"
                                                                    "from kvoffload.cli import main; main()"))  # fmt: skip
    assert done.returncode == 0, done.stderr
