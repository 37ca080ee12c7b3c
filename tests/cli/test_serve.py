"""`kvoffload serve` up to the moment it becomes vLLM: what it would run, and what it refuses."""

import json
import random
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from kvoffload.cli import main
from kvoffload.cli.serve import VLLM
from kvoffload.config import Config
from kvoffload.vllm import window
from tests.patience import PATIENCE_S

SSD = ["--nvme-path", "/nvme", "--ssd-kv-offload-gb", "500"]
SSD_SETTINGS = {"nvme_path": ["/nvme"], "ssd_kv_offload_gb": 500}


@dataclass
class Done:
    code: int
    out: str
    err: str

    @property
    def arguments(self) -> list[str]:
        """For vLLM, of a dry run."""
        (line,) = self.out.splitlines()
        command = shlex.split(line)
        assert tuple(command[: len(VLLM)]) == VLLM
        return command[len(VLLM) :]

    @property
    def transfer(self) -> dict:
        return json.loads(self.arguments[self.arguments.index("--kv-transfer-config") + 1])

    @property
    def settings(self) -> dict:
        return self.transfer["kv_connector_extra_config"]


@pytest.fixture
def serve(monkeypatch, capsys):
    def serve(*arguments: object, dry_run: bool = True) -> Done:
        command = ["kvoffload", "serve", *(["--dry-run"] if dry_run else []), *map(str, arguments)]
        monkeypatch.setattr(sys, "argv", command)
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        return Done(ended.value.code, captured.out, captured.err)

    return serve


# Each option, and what it adds to the settings of a server with an SSD tier. The first of several spellings is the seed's.
EFFECTS = [
    (["--nvme_path", "/other"], {"nvme_path": ["/nvme", "/other"]}),
    (["--nvme-path", "/other"], {"nvme_path": ["/nvme", "/other"]}),
    (["--dram-kv-offload-gb", "32"], {"dram_kv_offload_gb": 32}),
    (["--dram_kv_offload_gb", "0.5"], {"dram_kv_offload_gb": 0.5}),
    (["--ssd-kv-offload-gb", "-1"], {"ssd_kv_offload_gb": -1}),
    (["--ssd_kv_offload_gb", "7"], {"ssd_kv_offload_gb": 7}),
    (["--ssd-admission", "second-touch"], {"ssd_admission": "second-touch"}),
    (["--ssd_admission", "all"], {"ssd_admission": "all"}),
    (["--ssd-write-gb-per-day", "100"], {"ssd_write_gb_per_day": 100}),
    (["--ssd_write_gb_per_day", "100"], {"ssd_write_gb_per_day": 100}),
    (["--resume-kv-cache"], {"resume_kv_cache": True}),
    (["--resume_kv_cache"], {"resume_kv_cache": True}),
    (["--no-resume-kv-cache"], {"resume_kv_cache": False}),
    (["--no_resume_kv_cache"], {"resume_kv_cache": False}),
    (["--clean-obsolete-kv-cache"], {"clean_obsolete_kv_cache": True}),
    (["--clean_obsolete_kv_cache"], {"clean_obsolete_kv_cache": True}),
    (["--disable-gpu-reuse"], {"disable_gpu_reuse": True}),
    (["--disable_gpu_reuse"], {"disable_gpu_reuse": True}),
    (["--disable-long-token"], {"disable_long_token": True}),
    (["--disable_long_token"], {"disable_long_token": True}),
]
OFF = ["--disable_kv_cache_offload", "--disable-kv-cache-offload", "--disable-kv-cache", "--disable_kv_cache"]


@pytest.mark.parametrize("joined", [False, True], ids=["apart", "joined"])
@pytest.mark.parametrize(("option", "effect"), EFFECTS, ids=lambda value: value[0] if isinstance(value, list) else "")
def test_each_option_is_one_setting_of_the_connector(serve, option, effect, joined):
    done = serve("model", *SSD, *(["=".join(option)] if joined else option))
    assert done.code == 0 and done.err == ""
    assert done.settings == {**SSD_SETTINGS, **effect}
    assert done.arguments == ["model", "--kv-transfer-config", json.dumps(done.transfer)]
    assert Config.parse(done.settings).enabled


def test_every_setting_has_an_option():
    reached = {key for _, effect in EFFECTS for key in effect}
    assert reached | {"disable_kv_cache"} == set(Config.model_fields)


def test_the_connector_recomputes_what_does_not_load_and_is_found_without_a_plugin(serve):
    transfer = serve("model", *SSD).transfer
    del transfer["kv_connector_extra_config"]
    assert transfer == {
        "kv_connector": "KVOffloadConnector",
        "kv_connector_module_path": "kvoffload.vllm.connector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
    }


def test_paths_are_absolute_in_the_command(serve, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert serve("model", "--nvme-path", "cache", "--ssd-kv-offload-gb=1").settings["nvme_path"] == [str(tmp_path / "cache")]


@pytest.mark.parametrize("off", OFF)
def test_offloading_switched_off_is_plain_vllm(serve, off):
    done = serve("model", *SSD, off, "--port", 80)
    assert done.code == 0
    assert done.arguments == ["model", "--port", "80"]
    assert "--disable-kv-cache is set" in done.err and len(done.err.splitlines()) == 1


@pytest.mark.parametrize(
    "sizes",
    [[], ["--dram-kv-offload-gb", 0, "--ssd-kv-offload-gb", 0]],
)
def test_no_sizes_is_plain_vllm_and_says_so(serve, sizes):
    done = serve("model", *sizes, "--kv-transfer-config", "{}")
    assert done.code == 0
    assert done.arguments == ["model", "--kv-transfer-config", "{}"]
    assert "give --nvme-path or --dram-kv-offload-gb" in done.err and len(done.err.splitlines()) == 1


def test_a_path_of_which_nothing_may_be_taken_is_plain_vllm_and_says_what_to_give(serve):
    done = serve("model", "--nvme-path", "/nvme", "--ssd-kv-offload-gb", 0)
    assert done.code == 0 and done.arguments == ["model"]
    assert "give --ssd-kv-offload-gb more than 0" in done.err and len(done.err.splitlines()) == 1


def test_a_path_without_a_size_takes_what_is_free(serve):
    done = serve("model", "--nvme-path", "/nvme")
    assert done.code == 0
    settings = json.loads(done.arguments[-1])["kv_connector_extra_config"]
    assert settings == {"nvme_path": ["/nvme"], "ssd_kv_offload_gb": -1}


FOREIGN = [
    ["a model's name"],
    ["--port", "8000"],
    ["--port=8001"],
    ["-tp", "2"],
    ["-O3"],
    ["--enable-lora"],
    ["--lora-modules", "one=/a b", "two=/c", '{"name": "three"}'],
    ["--seed", "-1"],
    ["--override-generation-config.temperature", "0.5"],
    ["--served_model_name", "under_score"],
    ["--chat-template", ""],
    ["--api-key", "$HOME 'quoted' \"twice\" \\"],
    ["--help=all"],
    ["-h"],
]
OURS = [SSD[:2], SSD[2:], ["--dram_kv_offload_gb=1"], ["--disable-gpu-reuse"], ["--no_resume_kv_cache"], ["--nvme_path=/b"]]


def test_everything_else_reaches_vllm_unchanged_and_in_order(serve, seed):
    rng = random.Random(seed)
    for _ in range(50):
        parts = rng.sample(FOREIGN, len(FOREIGN))
        theirs = [word for part in parts for word in part]
        mixed = list(parts)
        for part in OURS:
            mixed.insert(rng.randint(0, len(mixed)), part)
        done = serve(*(word for part in mixed for word in part))
        assert done.code == 0, (mixed, done.err)
        assert done.arguments[:-2] == theirs, mixed
        assert done.settings["disable_gpu_reuse"] is True and sorted(done.settings["nvme_path"]) == ["/b", "/nvme"]


def test_behind_two_dashes_nothing_is_ours_and_the_connector_stays_before_them(serve):
    done = serve("--port", "1", *SSD, "--", "model", "--help", "--disable-gpu-reuse")
    assert done.arguments[:2] == ["--port", "1"]
    assert done.arguments[2] == "--kv-transfer-config"
    assert done.arguments[4:] == ["--", "model", "--help", "--disable-gpu-reuse"]
    assert done.settings == SSD_SETTINGS


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "no model is named"),
        (SSD, "no model is named"),
        (["m", "--resume-kv-cache", "--no_resume_kv_cache", *SSD], "leave one of them out"),
        (["m", *SSD, "--kv-transfer-config", "{}"], "--kv-transfer-config sets up KV transfer"),
        (["m", *SSD, "--kv_transfer_config={}"], "leave it out"),
        (["m", *SSD, "--kv-transfer-config.kv_role", "kv_both"], "leave it out"),
        (["m", *SSD, "--kv-transfer", "{}"], "leave it out"),
        (["m", "--kv_offloading_size", "4", *SSD], "--kv-offloading-size sets up KV transfer"),
        (["m", "--dram-kv-offload-gb", "ten"], "--dram-kv-offload-gb must be a number of GB"),
        (["m", "--dram-kv-offload-gb=-1"], "must be 0 (off) or more"),
        (["m", "--dram-kv-offload-gb=nan"], "must be a finite number"),
        (["m", "--ssd-kv-offload-gb=5"], "name the directory"),
        (["m", "--dram-kv-offload-gb=5", "--ssd-admission=all"], "there is no SSD tier"),
        (["m", *SSD, "--ssd-admission=third-touch"], "'all' or 'second-touch'"),
        (["m", *SSD, "--ssd-write-gb-per-day=0"], "must be more than 0"),
        (["m", *SSD, "--nvme-path="], "must not hold an empty path"),
        (["m", *SSD, "--nvme-path", "/nvme"], "list each path once"),
        (["m", "--ssd-kv-offload-gb"], "needs a value"),
        (["m", "--nvme-path", "--ssd-kv-offload-gb", "5"], "--nvme-path needs a value"),
        (["m", *SSD, "--disable-gpu-reuse=true"], "takes no value"),
    ],
)
def test_what_users_do_wrong_is_one_sentence(serve, arguments, says):
    done = serve(*arguments)
    assert done.code == 2
    assert says in done.err and len(done.err.splitlines()) == 1
    assert done.out == ""


def test_a_value_may_begin_with_dashes_behind_an_equals_sign(serve):
    assert serve("m", *SSD, "--nvme-path=--odd").settings["nvme_path"][1].endswith("/--odd")


KV_TRANSFER = ["kv-transfer-config", "kv_transfer_config", "kv-transfer-config.kv_role", "kv_offloading_size"]


@pytest.mark.parametrize("spelling", KV_TRANSFER)
@pytest.mark.parametrize("joined", [False, True], ids=["apart", "joined"])
def test_another_connector_in_the_file_of_config_is_refused_as_on_the_command_line(serve, tmp_path, spelling, joined):
    file = tmp_path / "vllm.yaml"
    file.write_text(f"model: m\nport: 8000\n{spelling}: {{}}\n")
    option = [f"--config={file}"] if joined else ["--config", file]
    done = serve(*option, *SSD)
    assert done.code == 2 and done.out == "" and len(done.err.splitlines()) == 1
    assert f"--{spelling.replace('_', '-')} in {file} sets up KV transfer" in done.err
    assert serve(*option).arguments == list(map(str, option))  # plain vLLM may have it


@pytest.mark.parametrize("text", ["model: m\nport: 8000", "", "- a\n- b", "{", "\x00", None])
def test_any_other_file_of_config_is_left_to_vllm(serve, tmp_path, text):
    file = tmp_path / "vllm.yaml"
    if text is not None:
        file.write_text(text)
    done = serve("--config", file, *SSD)
    assert done.code == 0 and done.arguments[:3] == ["--config", str(file), "--kv-transfer-config"]


@pytest.mark.parametrize(
    ("version", "given", "seed"),
    [("0.26.0", None, "0"), ("0.28.1+cpu", None, "0"), ("0.28.1", "7", "7"), ("0.29.0", None, None), ("0.33.0", None, None)],
)
def test_block_hashes_are_the_same_at_every_start_of_any_vllm(serve, monkeypatch, tmp_path, version, given, seed):
    ssd = ["--nvme-path", tmp_path]
    monkeypatch.setattr(window, "installed", lambda: version)
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    if given:
        monkeypatch.setenv("PYTHONHASHSEED", given)
    started = {}
    monkeypatch.setattr("os.execvpe", lambda _file, _command, environment: started.update(environment))
    assert serve("m", *ssd, dry_run=False).code == 0
    assert started.get("PYTHONHASHSEED") == seed
    shown = serve("m", *ssd).out
    assert shown.startswith("PYTHONHASHSEED=0 ") == (seed == "0")
    started.clear()
    serve("m", dry_run=False)
    assert started.get("PYTHONHASHSEED") == given  # plain vLLM stays as it is


def test_a_path_that_no_engine_could_use_is_told_before_a_model_is_loaded(serve, monkeypatch, tmp_path):
    started = []
    monkeypatch.setattr("os.execvpe", lambda *command: started.append(command))
    (tmp_path / "file").touch()
    for name, says in (("nowhere", "does not exist: create it"), ("file", "is not a directory")):
        flags = ["--nvme-path", tmp_path / name]
        done = serve("m", *flags, dry_run=False)
        assert done.code == 2 and says in done.err and len(done.err.splitlines()) == 1
        assert serve("m", *flags).code == 0  # the command may be for another machine
    for name, make in (("file_in", Path.touch), ("link_in", lambda path: path.symlink_to(tmp_path))):
        (tmp_path / name).mkdir()
        make(tmp_path / name / "kvoffload")
        done = serve("m", "--nvme-path", tmp_path / name, dry_run=False)
        assert done.code == 2 and "kvoffload is not a directory of kvoffload: remove it" in done.err
        (tmp_path / name / "kvoffload").unlink()
        (tmp_path / name).rmdir()
    assert not started
    assert serve("m", "--nvme-path", tmp_path, dry_run=False).code == 0 and started
    assert serve("m", "--nvme-path", tmp_path / "nowhere", "--disable-kv-cache", dry_run=False).code == 0
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_a_vllm_outside_the_window_is_refused_before_it_starts(serve, monkeypatch):
    monkeypatch.setattr(window, "installed", lambda: "0.34.0")
    done = serve("m", *SSD)
    assert done.code == 2 and "kvoffload runs with vLLM 0.26 to 0.33, and this is 0.34.0" in done.err
    assert serve("m").arguments == ["m"]


@pytest.mark.parametrize(
    ("arguments", "code", "says"), [(["--dry-run"], 0, ""), ([], 2, "vLLM is not installed")], ids=["dry run", "run"]
)
def test_without_vllm_a_dry_run_works_and_a_run_says_what_is_missing(arguments, code, says):
    program = "import sys; sys.modules |= dict.fromkeys(['vllm', 'torch']); from kvoffload.cli import main; main()"
    command = [sys.executable, "-c", program, "serve", "model", *SSD, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == code
    assert says in done.stderr and len(done.stderr.splitlines()) == (1 if says else 0)


def test_help_fits_one_screen_and_gives_an_example(serve, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    done = serve("model", "--help", dry_run=False)
    assert done.code == 0
    lines = done.out.splitlines()
    assert len(lines) <= 40 and max(map(len, lines)) <= 80
    assert "Example: kvoffload serve" in done.out
    for key in Config.model_fields:
        assert "--" + key.replace("_", "-") in done.out
