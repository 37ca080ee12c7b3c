"""Renders the chart with Helm 4 for tests/chart/test_helm4.py, in a process of its own: a library of Go's runtime stays in memory.

Reads a list of values from standard input; writes for each of them what was rendered, or the reason why not.
"""

import json
import sys

import helm_python
import yaml

from tests.chart.rendering import CHART


def render(chart: helm_python.Chart, values: dict) -> list[dict] | str:
    try:
        files = chart.render(values, name="release", namespace="llm")
    except helm_python.HelmError as error:
        return str(error)
    texts = [text for file, text in files.items() if not file.endswith(".txt")]
    return [found for text in texts for found in yaml.safe_load_all(text) if found]


if __name__ == "__main__":
    loaded = helm_python.Chart.load(str(CHART))
    json.dump([render(loaded, values) for values in json.load(sys.stdin)], sys.stdout)
