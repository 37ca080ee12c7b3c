"""The chart as the real Helm renders it, remembered by values and Kubernetes version, and Kubernetes' own schemas."""

import functools
import importlib.resources
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import jsonschema
import yaml
from referencing import Registry, Resource

from tests.chart.custom_resources import SCHEMAS
from tests.monitoring.test_rules_and_dashboard import program
from tests.patience import PATIENCE_S

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "charts" / "kvoffload-inference"
CI = sorted((CHART / "ci").glob("*-values.yaml"))
KUBERNETES = ("1.29", "1.31", "1.34", "1.37")
NEWEST = KUBERNETES[-1]
NEEDS_1_31 = {"model-image"}  # by name of its values file
MODEL = "/data/model/llama"
Object = dict[str, Any]


def helm(*arguments: object, timeout: float = PATIENCE_S, **more: Any) -> subprocess.CompletedProcess[str]:
    """Of the virtual environment, which has none on machines other than x86_64, or of the system. `more`: of subprocess.run."""
    return subprocess.run([program("helm"), *map(str, arguments)], capture_output=True, text=True, timeout=timeout, **more)


def name(file: Path) -> str:
    return file.name.removesuffix("-values.yaml")


def ci(which: str) -> Object:
    return yaml.safe_load((CHART / "ci" / f"{which}-values.yaml").read_text())


def merged(below: Object, above: Object) -> Object:
    """As Helm lays values over values."""
    both = dict(below)
    for key, value in above.items():
        is_section = isinstance(value, dict) and isinstance(both.get(key), dict)
        both[key] = merged(both[key], value) if is_section else value
    return both


def tree(**dotted: object) -> Object:
    """tree(vllm__args__port=1) is {"vllm": {"args": {"port": 1}}}."""
    made: Object = {}
    for path, value in dotted.items():
        *sections, key = path.split("__")
        inner = made
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[key] = value
    return made


@functools.cache
def _template(values: str, kubernetes: str, chart: Path) -> subprocess.CompletedProcess:
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write(values)
        file.flush()
        return helm("template", "release", chart, "--namespace", "llm", "-f", file.name, "--kube-version", f"{kubernetes}.0")


class Rendered:
    """All objects of one rendering."""

    def __init__(self, text: str):
        self.objects: list[Object] = [found for found in yaml.safe_load_all(text) if found]

    def all(self, kind: str) -> list[Object]:
        return [found for found in self.objects if found["kind"] == kind]

    def one(self, kind: str, suffix: str = "") -> Object:
        (found,) = (found for found in self.all(kind) if found["metadata"]["name"].endswith(suffix))
        return found

    @property
    def workload(self) -> Object:
        (found,) = self.all("StatefulSet") + self.all("Deployment")
        return found

    @property
    def service(self) -> Object:
        (found,) = (found for found in self.all("Service") if found["spec"].get("clusterIP") != "None")
        return found

    @property
    def pod(self) -> Object:
        return self.workload["spec"]["template"]["spec"]

    @property
    def container(self) -> Object:
        (found,) = (found for found in self.pod["containers"] if found["name"] == "vllm-api")
        return found

    @property
    def command(self) -> list[str]:
        """As the kubelet starts it: it reads $$ as $, and there is no variable in it."""
        return [word.replace("$$", "$") for word in self.container["command"]]

    @property
    def environment(self) -> dict[str, str]:
        return {entry["name"]: entry["value"].replace("$$", "$") for entry in self.container["env"] if "value" in entry}

    def volumes(self) -> dict[str, Object]:
        return {volume["name"]: volume for volume in self.pod["volumes"]}

    def mounts(self) -> dict[str, Object]:
        return {mount["name"]: mount for mount in self.container["volumeMounts"]}


def render(values: Object, kubernetes: str = NEWEST, chart: Path = CHART) -> Rendered:
    done = _template(json.dumps(values), kubernetes, chart)
    assert done.returncode == 0, done.stderr
    return Rendered(done.stdout)


def refusal(values: Object, kubernetes: str = NEWEST) -> str:
    """What Helm says instead of rendering."""
    done = _template(json.dumps(values), kubernetes, CHART)
    assert done.returncode != 0, "it was rendered"
    assert done.stdout == ""
    return done.stderr


def with_model(**dotted: object) -> Object:
    """Values that name a model, and what is given beside it."""
    return merged({"vllm": {"args": {"model": MODEL}}}, tree(**dotted))


@functools.cache
def _schemas(kubernetes: str) -> tuple[Path, Registry]:
    """The same files and strictness that the command kubernetes-validate uses; read once a version here."""
    schemas = importlib.resources.files("kubernetes_validate") / "kubernetes-json-schema"
    (folder,) = (folder for folder in map(Path, schemas.iterdir()) if folder.match(f"v{kubernetes}.*-local-strict"))
    definitions = Resource.from_contents(json.loads((folder / "_definitions.json").read_text()))
    return folder, definitions @ Registry()


@functools.cache
def _validator(kubernetes: str, kind: str, api: str) -> jsonschema.Draft202012Validator:
    if (kind, api) in SCHEMAS:
        return jsonschema.Draft202012Validator(SCHEMAS[kind, api])
    folder, registry = _schemas(kubernetes)
    group, _, version = api.rpartition("/")
    file = folder / f"{kind.lower()}-{'-'.join(filter(None, (group.split('.')[0], version)))}.json"
    schema = json.loads(file.read_text())
    return jsonschema.Draft202012Validator(schema, registry=Resource.from_contents(schema) @ registry)


def validate(found: Object, kubernetes: str) -> None:
    _validator(kubernetes, found["kind"], found["apiVersion"]).validate(found)
