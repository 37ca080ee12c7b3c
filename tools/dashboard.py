"""Writes docs/monitoring/dashboard.json, the Grafana dashboard, from the panels below; or draws the panels from a Prometheus.

    python tools/dashboard.py
    python tools/dashboard.py --draw docs/images/dashboard.png --prometheus http://localhost:9090 --minutes 30
"""

import argparse
import json
import time
import urllib.parse
import urllib.request
from pathlib import Path
from typing import NamedTuple

FILE = Path(__file__).resolve().parent.parent / "docs" / "monitoring" / "dashboard.json"
WINDOW = "$__rate_interval"  # Grafana's own variable: long enough for two scrapes
COLUMNS, WIDTH, HEIGHT = 3, 8, 7  # of Grafana's grid, which has 24 columns
MATCH = 'job=~"$job", instance=~"$instance"'


class Panel(NamedTuple):
    title: str
    unit: str  # Grafana's name for it
    queries: dict[str, str]  # legend -> PromQL; METRIC{} stands for the chosen servers' series of it


def rate(metric: str, by: str) -> str:
    return f"sum by ({by}) (rate({metric}{{}}[{WINDOW}]))"


def quantile(share: float, metric: str, by: str) -> str:
    return f"histogram_quantile({share}, sum by (le, {by}) (rate({metric}_bucket{{}}[{WINDOW}])))"


PANELS = [
    Panel("Prompt tokens by where they came from", "short", {
        "loaded from {{tier}}": rate("kvoffload_hit_tokens_total", "tier"),
        "computed": "sum(" + rate("kvoffload_missed_tokens_total", "instance") + ")",
    }),
    Panel("Tiers, share in use", "percentunit", {
        "{{tier}}": "sum by (tier) (kvoffload_used_bytes{}) / sum by (tier) (kvoffload_capacity_bytes{})",
    }),
    Panel("Load or recompute, decisions a second", "short", {
        "{{decision}}, {{reason}}": rate("kvoffload_load_decisions_total", "decision, reason"),
    }),
    Panel("Bytes moved a second", "Bps", {"{{direction}}": rate("kvoffload_transfer_bytes_total", "direction")}),
    Panel("Transfer of a block, median and 99th percentile", "s", {
        "{{direction}} p50": quantile(0.5, "kvoffload_transfer_latency_seconds", "direction"),
        "{{direction}} p99": quantile(0.99, "kvoffload_transfer_latency_seconds", "direction"),
    }),
    Panel("Load of a request, median and 99th percentile", "s", {
        "{{tier}} p50": quantile(0.5, "kvoffload_load_seconds", "tier"),
        "{{tier}} p99": quantile(0.99, "kvoffload_load_seconds", "tier"),
    }),
    Panel("Blocks in flight or waiting", "short", {"{{queue}}": "sum by (queue) (kvoffload_queued_blocks{})"}),
    Panel("Drives: 0 in use, 1 on trial, 2 left alone", "short", {
        "drive {{drive}}, {{direction}}": "max by (instance, drive, direction) (kvoffload_drive_state{})",
    }),
    Panel("Failures a second", "short", {
        "{{direction}}, {{reason}}": rate("kvoffload_transfer_failures_total", "direction, reason"),
        "{{direction}}, deadline of the {{deadline}} missed": rate("kvoffload_deadlines_missed_total", "direction, deadline"),
        "blocks recomputed after a failed load": rate("kvoffload_load_failures_total", "job"),
    }),
    Panel("Blocks a second: stored, demoted, evicted, dropped", "short", {
        "stored": rate("kvoffload_stored_blocks_total", "job"),
        "written to the SSD": rate("kvoffload_demotions_total", "job"),
        "evicted from {{tier}}": rate("kvoffload_evictions_total", "tier"),
        "dropped": rate("kvoffload_dropped_stores_total", "job"),
        "not admitted: {{reason}}": rate("kvoffload_refused_admissions_total", "reason"),
    }),
    Panel("Written to the SSD", "bytes", {
        "today": "sum by (instance) (kvoffload_ssd_written_today_bytes{})",
        "budget left": "sum by (instance) (kvoffload_write_budget_left_bytes{})",
    }),
    Panel("Wear", "percentunit", {
        "writes read back": "avg by (instance) (kvoffload_useful_write_ratio{})",
        "endurance used, drive {{drive}}": "max by (instance, drive) (kvoffload_drive_percentage_used_ratio{})",
    }),
    Panel("Learned: loading", "Bps", {"{{tier}}": "avg by (tier) (kvoffload_load_bytes_per_second{})"}),
    Panel("Learned: prefill, tokens a second", "short", {
        "prefill": "avg by (instance) (kvoffload_prefill_tokens_per_second{})",
    }),
    Panel("Error of predictions, share of what it took", "percentunit", {
        "{{activity}}": rate("kvoffload_prediction_error_seconds_total", "activity")
        + " / " + rate("kvoffload_actual_seconds_total", "activity"),
    }),
]  # fmt: skip


def dashboard() -> dict:
    panels = []
    for number, panel in enumerate(PANELS):
        targets = [
            {"expr": query.replace("{}", "{" + MATCH + "}"), "legendFormat": legend, "refId": chr(ord("A") + place)}
            for place, (legend, query) in enumerate(panel.queries.items())
        ]
        row, column = divmod(number, COLUMNS)
        panels.append({
            "id": number + 1,
            "type": "timeseries",
            "title": panel.title,
            "datasource": {"type": "prometheus", "uid": "${datasource}"},
            "gridPos": {"x": column * WIDTH, "y": row * HEIGHT, "w": WIDTH, "h": HEIGHT},
            "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
            "targets": targets,
        })  # fmt: skip
    return {
        "title": "kvoffload",
        "uid": "kvoffload",
        "schemaVersion": 39,
        "tags": ["vllm", "kvoffload"],
        "time": {"from": "now-1h", "to": "now"},
        "refresh": "30s",
        "templating": {"list": [
            {"name": "datasource", "type": "datasource", "query": "prometheus"},
            variable("job"),
            variable("instance"),
        ]},
        "panels": panels,
    }  # fmt: skip


def variable(label: str) -> dict:
    """Several values of a label of our series, all of them at first."""
    return {
        "name": label,
        "type": "query",
        "datasource": {"type": "prometheus", "uid": "${datasource}"},
        "query": f"label_values(kvoffload_used_bytes, {label})",
        "refresh": 2,
        "includeAll": True,
        "multi": True,
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
    }


def concrete(expression: str, window: str) -> str:
    """A query of the dashboard as Grafana would send it with all servers chosen."""
    return expression.replace(WINDOW, window).replace("$job", ".*").replace("$instance", ".*")


def series(prometheus: str, expression: str, begin: float, end: float) -> list[dict]:
    """What Prometheus answers: a list of {"metric": labels, "values": [[seconds, text], ...]}."""
    step = max(1.0, (end - begin) / 200)
    asked = urllib.parse.urlencode({"query": expression, "start": begin, "end": end, "step": step})
    with urllib.request.urlopen(f"{prometheus}/api/v1/query_range?{asked}", timeout=30) as response:
        return json.load(response)["data"]["result"]


def draw(file: Path, prometheus: str, begin: float, end: float, window: str) -> None:
    from matplotlib.figure import Figure

    panels = dashboard()["panels"]
    figure = Figure(figsize=(18, 3.2 * -(-len(panels) // COLUMNS)), layout="constrained")
    for place, panel in zip(figure.subplots(-(-len(panels) // COLUMNS), COLUMNS).flat, panels, strict=False):
        place.set_title(panel["title"], fontsize=10)
        for target in panel["targets"]:
            for line in series(prometheus, concrete(target["expr"], window), begin, end):
                legend = target["legendFormat"]
                for label, value in line["metric"].items():
                    legend = legend.replace("{{" + label + "}}", value)
                points = [(float(at) - begin, float(value)) for at, value in line["values"]]
                place.plot(*zip(*points, strict=True), label=legend)
        place.set_ylim(bottom=0)
        if place.get_legend_handles_labels()[0]:
            place.legend(fontsize=6)
    figure.supxlabel("seconds")
    figure.savefig(file, dpi=70)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draw", type=Path)
    parser.add_argument("--prometheus", default="http://localhost:9090")
    parser.add_argument("--minutes", type=float, default=60)
    options = parser.parse_args()
    if options.draw is None:
        FILE.write_text(json.dumps(dashboard(), indent=1) + "\n")
    else:
        now = time.time()
        draw(options.draw, options.prometheus, now - 60 * options.minutes, now, "5m")


if __name__ == "__main__":
    main()
