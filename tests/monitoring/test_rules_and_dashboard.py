"""The dashboard and the alert rules: what they ask for is what is exported, in labels too, and Prometheus understands it."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from kvoffload.metrics import METRICS
from tests.patience import PATIENCE_S
from tools import dashboard

ROOT = Path(__file__).resolve().parents[2]
ALERTS = ROOT / "docs" / "monitoring" / "alerts.yml"
PACKAGES = {"promtool": "what Debian calls prometheus", "helm": "Helm 3"}
TARGET_LABELS = {"job", "instance", "le"}  # of Prometheus itself


def program(name: str) -> str:
    """Of the virtual environment, where `make setup` puts it, or of the system."""
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    assert found, f"{name} is neither in .venv nor on the PATH: install {PACKAGES.get(name, name)}"
    return found


def promtool(*arguments: object, **more: object) -> subprocess.CompletedProcess:
    command = [program("promtool"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, **more)


def dashboard_queries() -> list[str]:
    made = json.loads(dashboard.FILE.read_text())
    return [dashboard.concrete(target["expr"], "5m") for panel in made["panels"] for target in panel["targets"]]


def alert_queries() -> list[str]:
    return [rule["expr"] for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]]


def exported_name(series: str) -> str:
    return re.sub("_(bucket|sum|count)$", "", series) if series not in METRICS else series


@pytest.mark.parametrize("query", [*dashboard_queries(), *alert_queries()])
def test_a_query_asks_for_series_and_labels_that_are_exported(query):
    names = set(re.findall(r"kvoffload_\w+", query))
    assert names
    labels = set(TARGET_LABELS)
    for name in names:
        metric = METRICS[exported_name(name)]
        assert (metric.kind == "histogram") == (name != exported_name(name))
        labels |= set(metric.labels)
    for names in re.findall(r"by \(([^)]*)\)", query):
        assert set(re.split(r",\s*", names)) <= labels
    for matchers in re.findall(r"\{([^}]*)\}", query):
        assert set(re.findall(r"(\w+)\s*[=!]", matchers)) <= labels


def test_every_metric_is_on_the_dashboard_or_in_an_alert():
    queries = " ".join([*dashboard_queries(), *alert_queries()])
    asked = {exported_name(name) for name in re.findall(r"kvoffload_\w+", queries)}
    elsewhere = {
        "kvoffload_hit_blocks_total", "kvoffload_missed_lookups_total", "kvoffload_read_back_blocks_total",
        "kvoffload_demotion_failures_total", "kvoffload_predicted_seconds_total",
        "kvoffload_store_failures_total", "kvoffload_transfer_seconds_total",
    }  # fmt: skip
    assert METRICS.keys() - asked == elsewhere


def test_the_dashboard_is_as_its_panels_say():
    assert json.loads(dashboard.FILE.read_text()) == dashboard.dashboard(), "run python tools/dashboard.py"


def test_every_legend_names_labels_that_its_query_keeps():
    for panel in dashboard.PANELS:
        for legend, query in panel.queries.items():
            kept = {label for names in re.findall(r"by \(([^)]*)\)", query) for label in re.split(r",\s*", names)}
            assert set(re.findall(r"\{\{(\w+)\}\}", legend)) <= kept, (panel.title, legend)


def test_prometheus_understands_rules_and_queries(tmp_path):
    checked = promtool("check", "rules", ALERTS)
    assert checked.returncode == 0, checked.stderr
    recorded = [{"record": f"panel:query{number}", "expr": query} for number, query in enumerate(dashboard_queries())]
    rules = tmp_path / "queries.yml"
    rules.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": recorded}]}))
    checked = promtool("check", "rules", rules)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_a_query_that_is_wrong_is_found(tmp_path):
    rules = tmp_path / "wrong.yml"
    rules.write_text(yaml.safe_dump({"groups": [{"name": "x", "rules": [{"record": "a:b", "expr": "rate(x[5m]"}]}]}))
    assert promtool("check", "rules", rules).returncode != 0


def test_alerts_fire_when_they_should_and_not_before(tmp_path):
    cases = tmp_path / "cases.yml"
    cases.write_text((Path(__file__).with_name("alerts_test.yml")).read_text().replace("RULES", str(ALERTS)))
    done = promtool("test", "rules", cases)
    assert done.returncode == 0, done.stdout + done.stderr
