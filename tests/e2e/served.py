"""A real vLLM server, started by `kvoffload serve` as a user would, and what is asked of it over HTTP."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families
from vllm_process import child_environment

COMMAND = Path(sys.executable).with_name("kvoffload")
START_S = 240
SMALL = ["--host", "127.0.0.1", "--dtype", "float32", "--enforce-eager", "--block-size", "32"]


class Server:
    def __init__(self, process: subprocess.Popen, url: str, log: Path):
        self.process, self.url, self.log = process, url, log

    def wait(self) -> None:
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            try:
                urllib.request.urlopen(self.url + "/health", timeout=5).close()
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.5)
            else:
                return
        raise AssertionError(f"the server did not answer within {START_S} s")

    def get(self, path: str) -> tuple[int, str]:
        with urllib.request.urlopen(self.url + path, timeout=30) as response:
            return response.status, response.read().decode()

    def post(self, path: str, **body: object) -> str:
        request = urllib.request.Request(self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=120) as response:
            return response.read().decode()

    def complete(self, model: str, prompt: list[int] | str, **more: object) -> str:
        body = {"model": model, "prompt": prompt, "max_tokens": 8, "temperature": 0, **more}
        return json.loads(self.post("/v1/completions", **body))["choices"][0]["text"]

    def scrape(self) -> Counter[str]:
        """Every sample of kvoffload, summed over labels."""
        sums: Counter[str] = Counter()
        for family in text_string_to_metric_families(self.get("/metrics")[1]):
            for sample in family.samples:
                if sample.name.startswith("kvoffload_"):
                    sums[sample.name] += sample.value
        return sums


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextmanager
def served(model: Path, log: Path, *flags: object, env: dict[str, str] | None = None, ranks: int = 1) -> Iterator[Server]:
    port = free_port()
    command = [str(COMMAND), "serve", str(model), "--port", str(port), *SMALL, *map(str, flags)]
    with running(command, port, log, {**child_environment(ranks), **(env or {})}) as server:
        yield server


@contextmanager
def running(command: list[str], port: int, log: Path, environment: dict[str, str]) -> Iterator[Server]:
    """A server that `command` starts on `port`, until it ends or nobody needs it any more."""
    with log.open("ab") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)
    try:
        server = Server(process, f"http://127.0.0.1:{port}", log)
        server.wait()
        yield server
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
