"""docs/kubernetes.md from top to bottom: Helm's commands are carried out on a made-up cluster, kubectl's name what is there."""

import json
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.chart.api_server import serving
from tests.chart.cluster import Cluster
from tests.chart.helm import Helm
from tests.chart.rendering import CHART, program
from tests.cli.helpers import Command, fill
from tests.docs.test_docs import COMMANDS, OF_CLUSTERS
from tests.patience import PATIENCE_S

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "kubernetes.md"
FILE = re.compile(r'```yaml title="(\S+)"\n(.*?)```', re.DOTALL)
VALUES = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(), re.DOTALL)
TESTED_KUBERNETES = "1.31"


def steps() -> Iterator[tuple[str, str]]:
    """(name, content) of a file to be written, or ("", command)."""
    for found in re.finditer(rf"{FILE.pattern}|^\$ ([^\n]*)", PAGE.read_text(), re.DOTALL | re.MULTILINE):
        name, content, command = found.groups()
        yield (name, content) if name else ("", command)


def plural(kind: str) -> str:
    return "persistentvolumeclaims" if kind == "pvc" else f"{kind}s"


class Reader:
    """Does what the page says, one step after another."""

    def __init__(self, helm: Helm, cluster: Cluster, kvoffload: Command):
        self.helm, self.cluster, self.kvoffload = helm, cluster, kvoffload

    def follow(self, command: str) -> None:
        program, *words = shlex.split(command)
        if program in OF_CLUSTERS:
            {"helm": self.helm, "kubectl": self.kubectl, "docker": self.docker}[program](*words)

    def exists(self, kind: str, name: str) -> bool:
        of_set = kind == "pod" and name.rpartition("-")[0] in self.cluster.names("statefulsets")
        return of_set or name in self.cluster.names(plural(kind))

    def kubectl(self, verb: str, *words: str) -> None:
        if verb == "apply":
            for made in yaml.safe_load_all((self.helm.home / words[words.index("-f") + 1]).read_text()):
                self.cluster.objects[plural(made["kind"].lower()), "", made["metadata"]["name"]] = made
            return
        words = words[1:] if verb == "rollout" else words  # rollout status
        count = len([word for word in words if not word.startswith("-")]) if verb == "delete" else 1
        for word in words[:count]:
            kind, _, name = word.rpartition("/")
            kind = kind or "pod"
            assert self.exists(kind, name), f"kubectl {verb} names {word}, and there are {sorted(self.cluster.objects)}"
            if verb == "delete" and (plural(kind), "default", name) in self.cluster.objects:  # a pod of a set comes again
                self.cluster.delete(plural(kind), "default", name)
        if verb == "exec":
            assert words[1:3] == ("--", "kvoffload")
            done = self.kvoffload(*(word.replace("/mnt/nvme0", str(self.helm.home / "kv")) for word in words[3:]))
            assert done.code == 0, done.err
        elif verb == "patch":
            assert [change["op"] for change in json.loads(words[words.index("-p") + 1])] == ["remove"]
        elif verb == "port-forward":
            ports = {port["port"] for port in self.cluster.find("services", "default", name)["spec"]["ports"]}
            assert int(words[1].split(":")[1]) in ports

    def docker(self, verb: str, *words: str) -> None:
        assert verb in ("build", "push")
        if verb == "build":
            assert words[0] == "-f" and (ROOT / words[1]).exists() and words[-1] == "."


def test_the_page_can_be_followed_from_top_to_bottom(tmp_path, capsys):
    cluster = Cluster()
    (tmp_path / "charts").symlink_to(ROOT / "charts")
    (tmp_path / "kv").mkdir()
    fill(tmp_path / "kv")
    with serving(cluster, tmp_path / "kubeconfig"):
        reader = Reader(Helm(tmp_path, tmp_path / "kubeconfig"), cluster, Command(capsys))
        for name, text in steps():
            if name:
                (tmp_path / name).write_text(text)
            else:
                reader.follow(text)


def test_every_command_for_a_cluster_is_on_that_page():
    elsewhere = [command for page, command in COMMANDS if command.startswith(OF_CLUSTERS) and page != PAGE.name]
    assert all(command.startswith("docker ") for command in elsewhere)


def test_the_image_runs_by_hand_with_what_it_needs_mounted(capsys):
    (build,), (run,) = ([command for _, command in COMMANDS if command.startswith(f"docker {verb} ") and "-t kvoffload:" in command
                         or command.startswith(f"docker {verb} --")] for verb in ("build", "run"))  # fmt: skip
    image = shlex.split(build)[shlex.split(build).index("-t") + 1]
    words = shlex.split(run)
    docker, served = words[: words.index(image)], words[words.index(image) + 1 :]
    mounted = [docker[place + 1].split(":")[1] for place, word in enumerate(docker) if word == "-v"]
    home = re.search(r"ENV HOME=(\S+)", (ROOT / "docker" / "Dockerfile").read_text())[1]
    assert set(mounted) == {served[served.index("--nvme-path") + 1], f"{home}/.cache/huggingface"}
    done = Command(capsys)("serve", *served, "--dry-run")
    assert done.code == 0, done.err


def test_amounts_that_the_page_names_are_those_of_the_chart(tmp_path):
    (values,) = (content for name, content in steps() if name == "values.yaml")
    (tmp_path / "values.yaml").write_text(values)
    rendered = Helm(tmp_path, tmp_path / "none")("template", "llm", CHART, "-f", "values.yaml")
    (workload,) = (each for each in yaml.safe_load_all(rendered) if each["kind"] == "StatefulSet")
    claim = workload["spec"]["volumeClaimTemplates"][0]["spec"]["resources"]["requests"]["storage"]
    memory = workload["spec"]["template"]["spec"]["containers"][0]["resources"]["limits"]["memory"]
    text = PAGE.read_text()
    assert f"a tenth ({claim}), memory" in text and f"to know its blocks by ({memory})" in text


def test_the_drive_that_the_page_declares_is_valid_and_large_enough(tmp_path):
    (declared,) = (content for name, content in steps() if name == "drive.yaml")
    (tmp_path / "drive.yaml").write_text(declared)
    check = [program("kubernetes-validate"), "--strict", "-k", TESTED_KUBERNETES, tmp_path / "drive.yaml"]
    done = subprocess.run(check, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stdout + done.stderr
    _, volume = yaml.safe_load_all(declared)
    assert volume["spec"]["capacity"]["storage"] == "600Gi", "more than the claim's 514Gi"


@pytest.mark.parametrize("values", VALUES, ids=range(len(VALUES)))
def test_values_that_the_page_shows_are_taken(values, tmp_path):
    (tmp_path / "values.yaml").write_text(values)
    words = ("template", "llm", CHART, "--set", "vllm.args.model=m", "-f", "values.yaml", "--kube-version", TESTED_KUBERNETES)
    assert Helm(tmp_path, tmp_path / "none")(*words)


def test_the_table_for_those_who_come_from_the_other_chart_has_every_key_of_its_examples():
    def keys(tree: dict, path: str = "") -> Iterator[str]:
        for key, value in tree.items():
            whole = f"{path}{key}"
            is_section = isinstance(value, dict) and whole != "resources"
            yield from keys(value, f"{whole}.") if is_section else [whole]

    table = PAGE.read_text().partition("## From aiDAPTIVCache's chart")[2].partition("\n## ")[0]
    named = set(re.findall(r"`([\w.*]+)`", table))
    examples = sorted((CHART / "ci").glob("seed-*.yaml"))
    assert examples
    for example in examples:
        for key in keys(yaml.safe_load(example.read_text())):
            assert key in named or f"{key.partition('.')[0]}.*" in named, key
