"""docker/Dockerfile, as far as it can be judged where no image can be built: its text, by a linter's rules and by ours."""

import json
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml
from dockerfile_parse import DockerfileParser

import kvoffload
from kvoffload.vllm import window
from tests.chart.helm import Helm
from tests.chart.rendering import CHART, program
from tests.patience import PATIENCE_S

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = ROOT / "docker" / "Dockerfile"


@pytest.fixture(scope="module")
def steps() -> list[dict[str, str]]:
    """Of all stages: {"instruction": "RUN", "value": "..."}, without comments."""
    with DOCKERFILE.open("rb") as file:
        parsed = DockerfileParser(fileobj=file).structure
    return [step for step in parsed if step["instruction"] != "COMMENT"]


def values(steps: list[dict[str, str]], instruction: str) -> list[str]:
    return [step["value"] for step in steps if step["instruction"] == instruction]


def copied(steps: list[dict[str, str]]) -> list[Path]:
    return [ROOT / source for value in values(steps, "COPY") for source in value.split()[:-1]]


def scripts(steps: list[dict[str, str]]) -> list[str]:
    return [re.sub(r"^(--\S+\s+)*", "", value) for value in values(steps, "RUN")]


def context() -> set[Path]:
    """The files that .dockerignore lets through to the daemon: of its patterns the last that matches counts."""
    patterns = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert patterns[0] == "*"
    allowed = {file for entry in patterns if entry[0] == "!" for file in below(ROOT / entry[1:])}
    return {file for file in allowed if file.suffix != ".so" and "__pycache__" not in file.parts}


def below(path: Path) -> set[Path]:
    return {file for file in path.rglob("*") if file.is_file()} if path.is_dir() else {path}


def test_the_linter_finds_nothing():
    done = subprocess.run([program("hadolint"), DOCKERFILE], capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_run_script_passes_shellcheck(steps):
    assert len(scripts(steps)) == 3
    for script in scripts(steps):
        command = [program("shellcheck"), "--shell=sh", "-"]
        done = subprocess.run(command, input=script + "\n", capture_output=True, text=True, timeout=PATIENCE_S)
        assert done.returncode == 0, done.stdout


def test_the_base_is_the_vllm_that_the_tests_run_on_and_every_base_is_pinned(steps):
    defaults = dict(value.split("=", 1) for value in values(steps, "ARG"))
    assert defaults["VLLM"].startswith(f"vllm/vllm-openai:v{window.number(window.TESTED)}.")
    assert window.installed() in defaults["VLLM"]
    images = [value.split()[0] for value in values(steps, "FROM")]
    assert images == ["debian:bookworm-slim", "${VLLM}"]


def test_what_is_copied_exists_and_reaches_the_daemon_with_nothing_beside_it(steps):
    sources = copied(steps)
    assert sources and all(source.exists() for source in sources)
    wanted = {file for source in sources for file in below(source) if file.suffix != ".so" and "__pycache__" not in file.parts}
    assert context() == wanted


def test_what_is_copied_is_all_that_the_wheel_is_built_from(steps, tmp_path):
    """The commands of the builder stage are one: make wheel."""
    assert scripts(steps)[1] == "make wheel"
    assert {ROOT / "csrc", ROOT / "kvoffload", ROOT / "tools" / "bootstrap.py", ROOT / "Makefile"} <= set(copied(steps))
    alone = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}  # not called by make
    done = subprocess.run(
        ["make", "-n", "wheel", "PYTHON=python3"], cwd=ROOT, env=alone, capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert done.stdout.split() == ["python3", "tools/bootstrap.py", "wheel", "dist"], "dist is what the last stage mounts"
    assert "source=/src/dist" in values(steps, "RUN")[2]


def test_it_runs_as_a_numbered_user_and_becomes_the_server_without_a_shell(steps):
    (user,) = values(steps, "USER")
    uid, gid = map(int, user.split(":"))
    assert uid > 0 and f"useradd --non-unique --uid {uid} --gid {gid} " in scripts(steps)[2]
    (entrypoint,) = values(steps, "ENTRYPOINT")
    assert json.loads(entrypoint) == ["kvoffload", "serve"]
    assert not values(steps, "CMD")
    order = [step["instruction"] for step in steps]
    assert "RUN" not in order[order.index("USER") :]


def test_user_home_and_command_are_those_that_the_chart_starts_it_with(steps, tmp_path):
    rendered = Helm(tmp_path, tmp_path / "none")("template", CHART, "--set", "vllm.args.model=/m")
    (workload,) = (each for each in yaml.safe_load_all(rendered) if each and each["kind"] == "StatefulSet")
    pod = workload["spec"]["template"]["spec"]
    server = pod["containers"][0]
    assert values(steps, "USER") == ["{runAsUser}:{runAsGroup}".format(**pod["securityContext"])]
    assert server["command"][:2] == json.loads(values(steps, "ENTRYPOINT")[0])
    homes = {each["value"] for each in server["env"] if each["name"] == "HOME"}
    assert homes == {values(steps, "ENV")[0].removeprefix("HOME=")} == set(values(steps, "WORKDIR")[1:])
    assert server["image"].endswith(f":{kvoffload.__version__}")


def test_its_labels_are_those_of_the_open_container_initiative_and_the_version_is_ours(steps):
    (labels,) = values(steps, "LABEL")
    named = dict(word.split("=", 1) for word in shlex.split(labels))
    prefix = "org.opencontainers.image."
    assert named.keys() == {prefix + name for name in ("title", "description", "licenses", "version", "revision")}
    defaults = dict(value.split("=", 1) for value in values(steps, "ARG"))
    assert defaults["VERSION"] == kvoffload.__version__ and named[prefix + "version"] == "${VERSION}"


def test_nothing_is_downloaded_and_run_and_no_secret_is_taken(steps):
    text = "\n".join(f"{step['instruction']} {step['value']}" for step in steps)
    assert not re.search(r"curl|wget|\bADD\b|\| *(ba)?sh\b|sudo|chmod 777", text)
    assert not re.search(r"token|password|secret|api_key|credential", text, re.IGNORECASE)
