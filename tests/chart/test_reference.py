"""README, values.yaml and schema say the same, and what the chart copies from elsewhere is what it is there."""

import json
import re
import shlex
import subprocess

import jsonschema
import pytest
import yaml

import kvoffload
from tests.chart.rendering import CHART, CI, ROOT, ci, name, program
from tests.patience import PATIENCE_S
from tools import chart_reference
from tools.chart_values import ARGS, OTHER_SPELLING, VALUES

SHELL = sorted((CHART / "files").glob("*.sh"))
YAMLLINT = "{extends: relaxed, rules: {line-length: {max: 132}, empty-lines: {max: 1}}}"


@pytest.mark.parametrize("file", chart_reference.files(), ids=lambda file: file.name)
def test_values_schema_and_readme_are_as_the_table_of_values_says(file):
    assert file.read_text() == chart_reference.files()[file], "run python -m tools.chart_reference"


def test_every_default_is_one_that_the_schema_allows():
    schema = json.loads((CHART / "values.schema.json").read_text())
    jsonschema.Draft7Validator.check_schema(schema)
    jsonschema.Draft7Validator(schema).validate(yaml.safe_load((CHART / "values.yaml").read_text()))


def test_no_section_takes_keys_that_it_does_not_know():
    free = {"/".join(path) for path, entry in chart_reference.leaves() if entry.get("additionalProperties")}
    free |= {f"{section}/{which}" for section in ("resources", "initContainer/resources") for which in ("requests", "limits")}

    def closed(schema: dict, path: str = "") -> None:
        if "properties" in schema:
            assert schema["additionalProperties"] is False, path
            for key, inner in schema["properties"].items():
                closed(inner, f"{path}/{key}".lstrip("/"))
        elif "object" in schema["type"]:
            assert path in free or path == "global", path

    closed(json.loads((CHART / "values.schema.json").read_text()))


def test_an_other_spelling_is_of_a_key_that_there_is_and_of_its_kind():
    spelt = {key: entry for key, entry in ARGS.items() if entry["description"].startswith(OTHER_SPELLING)}
    assert len(spelt) == 6
    for key, entry in spelt.items():
        (of,) = re.findall("`(.*)`", entry["description"])
        assert of.lower() == key.lower() and of != key
        assert ARGS[of].get("minimum") == entry.get("minimum") and entry["type"][0] in ARGS[of]["type"]


def test_the_chart_is_of_this_projects_version():
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["appVersion"] == chart["version"] == kvoffload.__version__
    assert VALUES["image"]["repository"]["default"] == "ghcr.io/kvoffload/kvoffload" and VALUES["image"]["tag"]["default"] == ""


@pytest.mark.parametrize("file", ["alerts.yml", "dashboard.json"])
def test_what_the_chart_carries_is_a_copy_of_the_documentations(file):
    """A chart cannot read files outside of it, and a package holds no links."""
    assert (CHART / "files" / file).read_bytes() == (ROOT / "docs" / "monitoring" / file).read_bytes()


def test_the_seeds_examples_are_whole():
    basic, lora = ci("seed-basic"), ci("seed-multi-gpu-lora")
    assert basic["image"]["repository"] == "docker.io/library/aidaptiv" and "mount -t nfs4" in basic["prescript"]
    for example in (basic, lora):
        limits = {"otterscale.com/vgpu", "otterscale.com/vgpumem-percentage", "phison.com/ai100"}
        assert set(example["resources"]["limits"]) == set(example["resources"]["requests"]) == limits
    assert set(lora) == {"vllm", "resources"}


def test_scripts_have_no_finding_of_shellcheck(tmp_path):
    written = tmp_path / "prescript.sh"
    written.write_text("#!/bin/sh\n" + ci("seed-basic")["prescript"])
    for arguments in ([*SHELL], ["-S", "warning", written]):  # the seed's own is good enough
        done = subprocess.run([program("shellcheck"), *arguments], capture_output=True, text=True, timeout=PATIENCE_S)
        assert done.returncode == 0, done.stdout


def test_a_script_that_is_wrong_is_found(tmp_path):
    wrong = tmp_path / "wrong.sh"
    wrong.write_text("#!/bin/sh\nrm -r $1/*\n")
    assert subprocess.run([program("shellcheck"), wrong], capture_output=True, timeout=PATIENCE_S).returncode == 1


def test_yaml_files_have_no_finding_of_yamllint():
    files = [CHART / "Chart.yaml", CHART / "values.yaml", *(file for file in CI if not name(file).startswith("seed-"))]
    done = subprocess.run([program("yamllint"), "-s", "-d", YAMLLINT, *files], capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stdout


def test_templates_are_short():
    for file in (CHART / "templates").iterdir():
        assert len(file.read_text().splitlines()) <= 150, file.name


README = (CHART / "README.md").read_text()


@pytest.mark.parametrize("command", re.findall(r"^\$ helm install (.*)", README, re.MULTILINE))
def test_a_command_of_the_readme_renders(command, tmp_path):
    (tmp_path / "values.yaml").write_text((CHART / "ci" / "seed-basic-values.yaml").read_text())
    words = [str(ROOT / word) if word.startswith("./") else word for word in shlex.split(command)]
    done = subprocess.run([program("helm"), "template", *words], cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr


def test_every_value_that_the_readme_names_exists():
    names = {".".join(path) for path, _ in chart_reference.leaves()}
    sections = {".".join(path[:depth]) for path, _ in chart_reference.leaves() for depth in range(1, len(path))}
    before_the_table = README.partition(chart_reference.BEGIN)[0]
    for named in re.findall(r"`([a-zA-Z]+(?:\.[a-zA-Z]+)+)(?::[^`]*)?`", before_the_table):
        assert named in names | sections or named.rpartition(".")[0] in names or named.endswith(".yaml"), named
