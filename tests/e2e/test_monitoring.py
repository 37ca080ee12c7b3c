"""A real Prometheus scrapes a real vLLM of two ranks: every panel's query is answered, and the exposition is as it should be."""

import os
import subprocess
import time

import pytest
import yaml

from kvoffload.metrics import METRICS
from tests.e2e.conftest import BUILD
from tests.e2e.offload import PROMPT
from tests.e2e.served import answers, free_port, served
from tests.monitoring.test_rules_and_dashboard import program, promtool
from tests.patience import wait_until
from tools import dashboard

NAME = "model"
# Without a cause in this test: failures, a write budget, a drive that tells of its wear.
SILENT = ("failures_total", "deadlines_missed_total", "refused_admissions", "budget_left", "percentage_used")


@pytest.fixture
def server(model, tmp_path):
    flags = ["--nvme-path", tmp_path / "kv", "--dram-kv-offload-gb", 0.06, "--ssd-kv-offload-gb", 0.3, "-tp", 2]
    (tmp_path / "kv").mkdir()
    pool = ["--max-model-len", 1056, "--num-gpu-blocks-override", 40, "--served-model-name", NAME]
    with served(model("llama"), tmp_path / "log", *flags, *pool, ranks=2) as made:
        yield made


@pytest.fixture
def prometheus(server, tmp_path):
    port = free_port()
    target = {"job_name": "vllm", "static_configs": [{"targets": [server.url.removeprefix("http://")]}]}
    settings = tmp_path / "prometheus.yml"
    settings.write_text(yaml.safe_dump({"global": {"scrape_interval": "1s"}, "scrape_configs": [target]}))
    command = [program("prometheus"), f"--config.file={settings}", f"--storage.tsdb.path={tmp_path / 'tsdb'}"]
    with (tmp_path / "prometheus.log").open("wb") as log:
        process = subprocess.Popen([*command, f"--web.listen-address=127.0.0.1:{port}"], stdout=log, stderr=log)
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until(lambda: answers(url + "/-/ready"), pause_s=0.2)
        yield url
    finally:
        process.kill()
        process.wait()


def test_every_panel_shows_what_a_vllm_of_two_ranks_exports(server, prometheus, prompts):
    begin = time.time()
    asked = prompts.many(4, PROMPT)
    for number in range(16):
        wish = {"kvoffload": "load"} if number % 3 else None
        server.complete(NAME, asked[number % len(asked)], kv_transfer_params=wish)
        server.complete(NAME, prompts.one(PROMPT // 2))
    text = server.get("/metrics")[1]
    unanswered = {target["expr"] for panel in dashboard.dashboard()["panels"] for target in panel["targets"]}
    unanswered = {query for query in unanswered if not any(word in query for word in SILENT)}

    def all_are_answered() -> bool:
        """A busy server does not answer every scrape in time."""
        for query in tuple(unanswered):
            if dashboard.series(prometheus, dashboard.concrete(query, "10s"), begin, time.time()):
                unanswered.remove(query)
        return not unanswered

    try:
        wait_until(all_are_answered, pause_s=1.0)
    finally:
        print(f"unanswered: {unanswered}")
    check_exposition(server, text)
    if "KVO_DRAW_DASHBOARD" in os.environ:
        dashboard.draw(BUILD / "dashboard.png", prometheus, begin, time.time(), "10s")


def check_exposition(server, text: str) -> None:
    ours = "".join(line + "\n" for line in text.splitlines() if "kvoffload_" in line)
    checked = promtool("check", "metrics", input=ours)
    # promtool calls a metric without a unit a mistake of style, so only what it says of the format counts as one here.
    assert "error while linting" not in checked.stderr and "parse" not in checked.stderr, checked.stderr
    sums = server.scrape()
    for name, metric in METRICS.items():
        if metric.kind == "histogram" and name == "kvoffload_transfer_latency_seconds":
            assert sums[f"{name}_count"] > 0
    written = sums["kvoffload_demotions_total"]
    assert sums["kvoffload_stored_blocks_total"] >= written > 0
    assert sums["kvoffload_transfer_latency_seconds_count"] > 0
