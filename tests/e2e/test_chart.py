"""What the Helm chart makes of the seed's examples, started on a real vLLM: its requests are answered, `helm test` passes, and a
stop answers what is in flight."""

import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from tiny_models import LORA_RANK, make_lora
from vllm_process import child_environment

from tests.chart.rendering import CHART, ci, merged, render, tree
from tests.e2e.conftest import BUILD
from tests.e2e.served import COMMAND, SMALL, free_port, running
from tests.patience import PATIENCE_S, wait_until

NAME = "Meta-Llama-3.1-8B-Instruct"
SMALLER = ["--max-model-len=1056", "--num-gpu-blocks-override=40"]  # and a machine without a GPU
LONG = 200  # tokens of an answer that takes seconds


@pytest.fixture(scope="module")
def rendered(model, tmp_path_factory):
    """The two examples in one, with the paths of this machine where the chart mounts volumes."""
    folder = tmp_path_factory.mktemp("chart")
    (folder / NAME).symlink_to(model("llama"))
    (folder / "nvme0").mkdir()
    (folder / "home").mkdir()
    here = tree(
        vllm__args__model=f"{folder / NAME}/",
        vllm__args__nvmePath=str(folder / "nvme0"),
        vllm__args__port=free_port(),
        vllm__args__maxModelLen=None,
        vllm__args__ssdKvOffloadGb=0.3,
        vllm__args__dramKvOffloadGb=0.06,
        vllm__args__extraArgs=[*SMALL, *SMALLER],
        vllm__lora=tree(enable=True, modules=f"lora={make_lora(BUILD / 'models')}", maxRank=LORA_RANK),
        service__targetPort=None,
    )
    return folder, render(merged(ci("seed-basic"), here))


@pytest.fixture(scope="module")
def server(rendered):
    folder, objects = rendered
    program, *words = objects.command
    (port,) = objects.container["ports"]
    environment = {**child_environment(1), **objects.environment, "HOME": str(folder / "home")}
    with running([str(COMMAND.with_name(program)), *words], port["containerPort"], folder / "log", environment) as made:
        yield made


def test_the_seeds_requests_are_answered(server):
    assert server.get("/health")[0] == 200
    completion = {"prompt": "What is the capital of France?", "max_tokens": 100, "temperature": 0.7}
    assert json.loads(server.post("/v1/completions", model=NAME, **completion))["choices"][0]["text"]
    messages = [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": "What is machine learning?"},
    ]
    chat = json.loads(server.post("/v1/chat/completions", model=NAME, messages=messages, max_tokens=200))
    assert chat["choices"][0]["message"]["role"] == "assistant"
    assert server.complete("lora", "What is the capital of France?")


def test_helm_test_passes_and_has_loaded_from_the_cache(server, rendered):
    _, objects = rendered
    (container,) = objects.one("Pod")["spec"]["containers"]
    words = container["command"][2:]
    words[words.index("--url") + 1] = server.url  # what the Service's name leads to
    script = CHART / "files" / "helm_test.py"
    done = subprocess.run([sys.executable, script, *words], capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr
    assert "and loaded in" in done.stdout, done.stdout


def test_what_scaling_and_alerts_ask_for_is_exported(server):
    exported = server.get("/metrics")[1]
    assert "\nvllm:num_requests_waiting{" in exported and "\nkvoffload_used_bytes{" in exported


def test_a_stop_answers_what_is_in_flight_within_the_grace_period(server, rendered):
    _, objects = rendered
    with ThreadPoolExecutor(1) as beside:
        more = {"max_tokens": LONG, "ignore_eos": True}
        answer = beside.submit(server.post, "/v1/completions", model=NAME, prompt="Once upon a time", **more)
        wait_until(lambda: is_running(server))
        os.kill(server.process.pid, signal.SIGTERM)
        assert json.loads(answer.result())["usage"]["completion_tokens"] == LONG
    server.process.wait(objects.pod["terminationGracePeriodSeconds"])
    assert server.process.returncode in (0, -signal.SIGTERM)


def is_running(server) -> bool:
    lines = [line for line in server.get("/metrics")[1].splitlines() if line.startswith("vllm:num_requests_running{")]
    return any(float(line.rpartition(" ")[2]) > 0 for line in lines)
