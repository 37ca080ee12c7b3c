"""Every command that the documentation shows is carried out, every link leads somewhere, and references are as the code says."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from kvoffload.config import Config
from tests.cli.helpers import Command, fill
from tests.patience import PATIENCE_S
from tools import config_reference

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PROGRAMS = ("kvoffload", "make", "vllm", "pip", "curl", "python", "helm", "kubectl", "docker")
OF_CLUSTERS = ("helm", "kubectl", "docker")  # tests/docs/test_kubernetes.py
SERVED = ("/health", "/v1/completions", "/v1/chat/completions", "/metrics", "/v1/load_lora_adapter")  # by tests/e2e/test_server.py


def commands() -> list[tuple[str, str]]:
    """(page, command) of lines in blocks of code: after "$ ", or indented and beginning with a program's name."""
    found = []
    for page in PAGES:
        text = re.sub(r"\\\n\s*", "", page.read_text())
        text = re.sub(r"'\{\n.*?\n\s*\}'", lambda json_text: " ".join(json_text[0].split()), text, flags=re.DOTALL)
        for line in text.splitlines():
            shown = re.match(r"\$ (.*)", line) or re.match(rf"    ((?:{'|'.join(PROGRAMS)}) .*)", line)
            if shown:
                found.append((page.name, re.split(r"\s+# ", shown[1])[0].strip()))
    return found


COMMANDS = commands()


@pytest.fixture
def kvoffload(capsys) -> Command:
    return Command(capsys)


@pytest.fixture
def drive(tmp_path) -> dict[str, str]:
    """What stands in for the paths and files that the documentation names."""
    store = tmp_path / "kv"
    store.mkdir()
    fill(store)
    trace = tmp_path / "requests.jsonl"
    rows = [{"timestamp": 1000 * n, "input_length": 1024, "output_length": 1, "hash_ids": [n % 3, 10 + n]} for n in range(9)]
    trace.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"/mnt/nvme/kv": str(store), "requests.jsonl": str(trace), "curves.png": str(tmp_path / "curves.png"), "llama": "m"}


def test_there_are_commands_on_every_page_for_users():
    assert {page for page, _ in COMMANDS} >= {
        "README.md", "getting-started.md", "kubernetes.md", "operations.md", "tuning.md", "migration.md", "troubleshooting.md"
    }  # fmt: skip


@pytest.mark.parametrize(("page", "command"), [pair for pair in COMMANDS if pair[1].startswith("kvoffload ")])
def test_a_command_of_kvoffload_runs(page, command, kvoffload, drive):
    words = [drive.get(word, word) for word in shlex.split(command.replace("<model>", "MODEL"))][1:]
    if words[0] == "serve" and "--dry-run" not in words:
        words.append("--dry-run")
    if words[0] == "bench":
        words += ["--size-gb", "0.02", "--seconds", "0.2"]
    done = kvoffload(*words)
    assert done.code == 0, done.err
    if words[0] == "serve":
        settings = json.loads(shlex.split(done.out)[-1])["kv_connector_extra_config"]
        assert Config.parse(settings).enabled


@pytest.mark.parametrize(("page", "command"), [pair for pair in COMMANDS if not pair[1].startswith(("kvoffload ", *OF_CLUSTERS))])
def test_a_command_of_another_program_is_one_that_tests_run_or_would_run(page, command):
    words = shlex.split(command.replace("<model>", "MODEL"))
    program, rest = words[0], words[1:]
    if program == "make":
        assert subprocess.run(["make", "-n", rest[0]], cwd=ROOT, capture_output=True, timeout=PATIENCE_S).returncode == 0
    elif program == "vllm":
        transfer = json.loads(rest[rest.index("--kv-transfer-config") + 1])
        assert transfer["kv_connector"] == "KVOffloadConnector" and Config.parse(transfer["kv_connector_extra_config"]).enabled
    elif program == "curl":
        assert any(rest[0] == "http://localhost:8000" + path for path in SERVED)
        if "-d" in rest:
            json.loads(rest[rest.index("-d") + 1])
    elif program == "pip":
        assert rest == ["install", "."]  # what `make setup` does, in place
    else:
        assert program == "python" and (ROOT / rest[-1]).exists() or rest[0] == "-m"


def test_the_configuration_reference_is_as_the_model_says():
    assert config_reference.FILE.read_text() == config_reference.reference(), "run python tools/config_reference.py"


def test_the_site_builds_without_a_warning(tmp_path):
    """Strict: a link that leads nowhere, or a page that is in no menu, fails it."""
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", tmp_path / "site"]
    quiet = {"NO_MKDOCS_2_WARNING": "1", "PATH": ""}
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S, env=quiet)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    assert "One hard cap per tier" in (tmp_path / "site" / "index.html").read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_files_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_metrics_that_are_named_exist(page):
    from kvoffload.metrics import METRICS

    for name in re.findall(r"\bkvoffload_[a-z_]+[a-z]", page.read_text()):
        assert name in METRICS or any(metric.startswith(name) for metric in METRICS), name
