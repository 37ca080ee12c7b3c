"""Helm 4, which reads schemas with another library than Helm 3 does, renders the same and refuses the same."""

import json
import os
import platform
import subprocess
import sys

import pytest

from tests.chart.rendering import CI, ROOT, ci, merged, name, render, tree, with_model
from tests.patience import PATIENCE_S

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="Helm 4 as a Python package is for x86_64")
TYPO = with_model(vllm__args__dramKvOffloadGB=1)
CONTRADICTION = merged(ci("seed-basic"), tree(vllm__args__tensorParallelSize=2))


@pytest.fixture(scope="module")
def rendered() -> list:
    asked = json.dumps([*(ci(name(file)) for file in CI), TYPO, CONTRADICTION])
    command = [sys.executable, "-m", "tests.chart.helm4"]
    plain = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}  # a sanitiser's, beside Go's runtime
    done = subprocess.run(command, cwd=ROOT, env=plain, input=asked, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def by_name(objects: list[dict]) -> dict[tuple, dict]:
    """Without what is drawn anew in each rendering."""
    named = {(found["kind"], found["metadata"]["name"]): found for found in objects}
    for found in named.values():
        if found["kind"] == "Secret" and "data" in found:
            found["data"] = sorted(found["data"])
    return named


def test_every_values_file_is_rendered_alike(rendered):
    for file, objects in zip(CI, rendered, strict=False):
        assert by_name(objects) == by_name(json.loads(json.dumps(render(ci(name(file))).objects))), file.name


def test_a_typo_and_a_contradiction_are_refused(rendered):
    typo, contradiction = rendered[len(CI) :]
    assert "dramKvOffloadGB" in typo and "schema" in typo
    assert "name 1 GPUs and vllm.args.tensorParallelSize is 2" in contradiction
