"""The script that `helm test` runs in the cluster, against servers that are right or wrong in one way (a stand-in; a real one is
asked in tests/e2e/test_chart.py)."""

import json
import os
import subprocess
import sys
import threading
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tests.chart.rendering import CHART
from tests.patience import PATIENCE_S

SCRIPT = CHART / "files" / "helm_test.py"
POOL = 4096  # tokens
KEY = "secret"


class StandIn(BaseHTTPRequestHandler):
    """Counts as kvoffload does, each token a letter, and does of it what the server's `wrong` says."""

    protocol_version = "HTTP/1.1"

    def answer(self, code: int, body: str) -> None:
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            self.answer(200, json.dumps({"data": [{"id": "other"}, {"id": "m", "max_model_len": 1000}]}))
        elif self.path == "/metrics":
            self.answer(200, self.server.metrics())
        else:
            self.answer(503 if self.server.wrong == "unhealthy" else 200, "")

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.headers["Authorization"] != f"Bearer {KEY}":
            self.answer(401, "no key")
        elif body["model"] != "m":
            self.answer(404, "no such model")
        else:
            self.answer(200, json.dumps(self.server.complete(body["prompt"])))

    def log_message(self, *_: object) -> None:
        """Nothing is printed."""


class Server(ThreadingHTTPServer):
    daemon_threads = True
    SECOND_TOUCH = "second touch"  # not wrong, but a server that stores nothing at its first use

    def __init__(self, wrong: str):
        super().__init__(("127.0.0.1", 0), StandIn)
        self.wrong, self.pool, self.seen, self.stored, self.hits = wrong, [], Counter(), 0, 0

    def complete(self, prompts: list[str]) -> dict:
        for prompt in prompts:
            uses = self.seen[prompt]
            if uses > (self.wrong == self.SECOND_TOUCH) and prompt not in self.pool and self.wrong != "loads nothing":
                self.hits += len(prompt) // 16
            if self.wrong != "stores nothing":
                self.stored += len(prompt) // 16
            self.seen[prompt] += 1
            self.pool.append(prompt)
            while sum(map(len, self.pool)) > POOL:
                self.pool.pop(0)
        return {"choices": [{"text": prompts[0][-8:]}], "usage": {"prompt_tokens": sum(map(len, prompts))}}

    def metrics(self) -> str:
        return (
            f'vllm:cache_config_info{{block_size="16",num_gpu_blocks="{POOL // 16}"}} 1.0\n'
            f'kvoffload_stored_blocks_total{{engine="0"}} {float(self.stored)}\n'
            f'kvoffload_hit_blocks_total{{tier="ssd"}} {self.hits}\nkvoffload_hit_blocks_total{{tier="dram"}} 0\n'
        )


@contextmanager
def standing_in(wrong: str = ""):
    server = Server(wrong)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


IMPATIENT = "import helm_test; helm_test.READY_S = helm_test.SETTLE_S = 1; helm_test.main()"


def run(url: str, *more: str, key: str = KEY) -> subprocess.CompletedProcess:
    words = [sys.executable, "-c", IMPATIENT, "--url", url, "--model", "m", *more]
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parent), "VLLM_API_KEY": key, "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=PATIENCE_S)


@pytest.mark.parametrize("wrong", ["", Server.SECOND_TOUCH])
def test_a_server_that_loads_a_repeated_prompt_passes(wrong):
    with standing_in(wrong) as url:
        done = run(url)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[:2] == ["health: ok", "completion: ok"] and "and loaded in" in done.stdout


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ("unhealthy", "/health answers 503"),
        ("stores nothing", "kvoffload_stored_blocks_total does not grow"),
        ("loads nothing", "kvoffload_hit_blocks_total does not grow"),
    ],
)
def test_a_server_that_is_wrong_fails_by_a_sentence(wrong, says):
    with standing_in(wrong) as url:
        done = run(url)
    assert done.returncode == 1 and says in done.stderr and "Traceback" not in done.stderr


def test_a_wrong_key_and_no_server_fail_by_a_sentence():
    with standing_in() as url:
        done = run(url, key="other")
    assert done.returncode == 1 and "/v1/completions answers 401: no key" in done.stderr
    done = run("http://127.0.0.1:1")
    assert done.returncode == 1 and "/health does not answer" in done.stderr and "Traceback" not in done.stderr


def test_a_pool_too_large_to_push_out_is_said_and_passes():
    with standing_in("loads nothing") as url:
        done = run(url, "--push-out-tokens", "100")
    assert done.returncode == 0 and "loading was not tried" in done.stdout


def test_without_a_cache_only_answers_are_asked_for():
    with standing_in("stores nothing") as url:
        done = run(url, "--no-cache")
    assert done.returncode == 0 and "cache" not in done.stdout
