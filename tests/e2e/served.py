"""A real vLLM server, started by `kvoffload serve` as a user would, and what is asked of it over HTTP."""

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families
from vllm_process import child_environment

from tests.e2e.conftest import Right
from tests.patience import PATIENCE_S, wait_until

COMMAND = Path(sys.executable).with_name("kvoffload")
SMALL = ["--host", "127.0.0.1", "--dtype", "float32", "--enforce-eager", "--block-size", "32"]


class Server:
    def __init__(self, process: subprocess.Popen, url: str, log: Path):
        self.process, self.url, self.log = process, url, log

    def wait(self) -> None:
        wait_until(self._answers, pause_s=0.5)

    def _answers(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()[-3000:]
        return answers(self.url + "/health")

    def get(self, path: str) -> tuple[int, str]:
        with urllib.request.urlopen(self.url + path, timeout=PATIENCE_S) as response:
            return response.status, response.read().decode()

    def post(self, path: str, **body: object) -> str:
        request = urllib.request.Request(self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=PATIENCE_S) as response:
            return response.read().decode()

    def complete(self, model: str, prompt: list[int] | str, **more: object) -> str:
        return self._choice(model, prompt, **more)["text"]

    def answer(self, model: str, prompt: list[int], **more: object) -> Right:
        """Tokens that equal another answer's as far as they are certain."""
        told = self._choice(model, prompt, logprobs=2, return_tokens_as_token_ids=True, **more)["logprobs"]
        likeliest = (sorted(candidates.values(), reverse=True) for candidates in told["top_logprobs"])
        return Right(told["tokens"], [first - second for first, second, *_ in likeliest])

    def _choice(self, model: str, prompt: list[int] | str, **more: object) -> dict:
        body = {"model": model, "prompt": prompt, "max_tokens": 8, "temperature": 0, **more}
        return json.loads(self.post("/v1/completions", **body))["choices"][0]

    def scrape(self) -> Counter[str]:
        """Every sample of kvoffload, summed over labels."""
        sums: Counter[str] = Counter()
        for family in text_string_to_metric_families(self.get("/metrics")[1]):
            for sample in family.samples:
                if sample.name.startswith("kvoffload_"):
                    sums[sample.name] += sample.value
        return sums


def answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=5).close()
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False
    return True


def free_port() -> int:
    """One that the kernel gives to nobody who asks for any, so that it is still free when a server gets to it."""
    first_given, _ = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    while True:
        port = random.SystemRandom().randrange(first_given // 2, first_given)
        with socket.socket() as free, contextlib.suppress(OSError):
            free.bind(("127.0.0.1", port))
            return port


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
