"""vLLM's server with kvoffload by its name alone: the HTTP API answers, and /metrics shows what kvoffload did."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
from prometheus_client.parser import text_string_to_metric_families
from vllm_process import child_environment

from kvoffload.metrics import METRICS
from tests.e2e.offload import POOL, PROMPT

START_S = 240


@pytest.fixture
def server(model, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    extra = {"nvme_path": str(tmp_path), "ssd_kv_offload_gb": 0.3, "dram_kv_offload_gb": 0.06}
    transfer = {"kv_connector": "KVOffloadConnector", "kv_role": "kv_both", "kv_connector_extra_config": extra}
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]  # the CLI asks for a package called vllm
    command += ["--model", str(model("llama")), "--port", str(port)]
    command += ["--host", "127.0.0.1", "--dtype", "float32", "--enforce-eager", "--block-size", "32"]
    for name, value in POOL.items():
        command += ["--" + name.replace("_", "-"), str(value)]
    command += ["--kv-transfer-config", json.dumps(transfer)]
    with (tmp_path / "serve.log").open("wb") as log:
        process = subprocess.Popen(
            command, env=child_environment(1), stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    url = f"http://127.0.0.1:{port}"
    try:
        wait_for(url, process)
        yield url
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_for(url: str, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        assert process.poll() is None, "the server ended"
        try:
            urllib.request.urlopen(url + "/health", timeout=5).close()
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.5)
        else:
            return
    raise AssertionError(f"the server did not answer within {START_S} s")


def complete(url: str, model: str, prompt: list[int]) -> str:
    body = {"model": model, "prompt": prompt, "max_tokens": 8, "temperature": 0}
    request = urllib.request.Request(
        url + "/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        return json.load(response)["choices"][0]["text"]


def scrape(url: str) -> dict[str, float]:
    """Every sample of kvoffload, summed over labels."""
    with urllib.request.urlopen(url + "/metrics", timeout=30) as response:
        families = text_string_to_metric_families(response.read().decode())
    sums: dict[str, float] = {}
    for family in families:
        for sample in family.samples:
            if sample.name.startswith("kvoffload_"):
                sums[sample.name] = sums.get(sample.name, 0) + sample.value
    return sums


def test_a_served_model_answers_from_the_cache_and_its_metrics_say_so(server, model, prompts):
    asked = prompts.many(3, PROMPT)
    first = [complete(server, str(model("llama")), prompt) for prompt in asked]
    second = [complete(server, str(model("llama")), prompt) for prompt in asked]
    assert first == second
    sums = scrape(server)
    assert sums["kvoffload_hit_blocks_total"] > 0
    assert sums["kvoffload_stored_blocks_total"] >= 90
    assert sums["kvoffload_used_bytes"] > 0
    assert {name for name in sums if not name.endswith("_created")} <= set(METRICS)
