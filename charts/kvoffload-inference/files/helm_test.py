"""What `helm test` runs in the cluster: the server is healthy, answers, and loads a repeated prompt from the cache.

Only Python's standard library is used. Where the GPU's own pool would answer the repeated prompt, other prompts push it out
first, unless that would take more than --push-out-tokens.
"""

import argparse
import http.client
import json
import os
import re
import sys
import time
import urllib.parse
import uuid

REQUEST_S = 300
READY_S = 120
SETTLE_S = 30  # for what was computed to be stored
WORDS_MAX = 500  # of a prompt
ROUNDS = 2  # the second for an SSD tier that takes only what was used twice
AT_ONCE = 8  # prompts of a request
HITS = "kvoffload_hit_blocks_total"
STORED = "kvoffload_stored_blocks_total"


class Failure(Exception):
    """What is wrong with the server, in a sentence."""


def check(holds: bool, otherwise: str) -> None:
    if not holds:
        raise Failure(otherwise)


class Server:
    """One of the replicas behind an address: the one that the connection, which is kept, leads to."""

    def __init__(self, url: str, model: str):
        self.url, self.model = url, model
        self.connection = http.client.HTTPConnection(urllib.parse.urlsplit(url).netloc, timeout=REQUEST_S)
        key = os.environ.get("VLLM_API_KEY")
        self.headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}

    def ask(self, path: str, body: dict | None = None) -> str:
        try:
            self.connection.request("GET" if body is None else "POST", path, body and json.dumps(body), self.headers)
            answer = self.connection.getresponse()
            text = answer.read().decode()
        except (OSError, http.client.HTTPException) as error:
            self.connection.close()
            raise Failure(f"{self.url}{path} does not answer: {error!r}") from None
        check(answer.status == 200, f"{self.url}{path} answers {answer.status}: {text[:300]}")
        return text

    def wait(self) -> None:
        deadline = time.monotonic() + READY_S
        while True:
            try:
                self.ask("/health")
                return
            except Failure:
                if time.monotonic() > deadline:
                    raise
                time.sleep(1)

    def complete(self, *prompts: str, tokens: int = 8) -> tuple[str, int]:
        """The answer to the first one, and how many tokens they have together."""
        wish = {"kv_transfer_params": {"kvoffload": "load"}}
        asked = {"model": self.model, "prompt": list(prompts), "max_tokens": tokens, "temperature": 0, **wish}
        answer = json.loads(self.ask("/v1/completions", asked))
        return answer["choices"][0]["text"], answer["usage"]["prompt_tokens"]

    def metrics(self) -> str:
        return self.ask("/metrics")

    def sum(self, name: str) -> float:
        return sum(map(float, re.findall(rf"^{name}(?:{{[^}}]*}})? (\S+)$", self.metrics(), re.MULTILINE)))

    def longest(self) -> int:
        """Tokens of a sequence."""
        (model,) = (card for card in json.loads(self.ask("/v1/models"))["data"] if card["id"] == self.model)
        return model["max_model_len"]

    def pool_tokens(self) -> int:
        """Of the GPU's own pool."""
        (info,) = re.findall(r"^vllm:cache_config_info{(.*)} ", self.metrics(), re.MULTILINE)[:1] or [""]
        found = dict(re.findall(r'(\w+)="([^"]*)"', info))
        check("num_gpu_blocks" in found, "/metrics does not say how large the GPU's pool is")
        return int(found["num_gpu_blocks"]) * int(found["block_size"])


def prompt_of(words: int) -> str:
    """Never asked before, from its first word on."""
    text = ""
    while text.count(" ") < words:
        text += uuid.uuid4().hex[:4] + " "
    return text


def check_cache(server: Server, push_out_tokens: int) -> str:
    words = min(WORDS_MAX, server.longest() // 8)  # four letters and a space are at most five tokens
    prompt = prompt_of(words)
    stored, hits = server.sum(STORED), server.sum(HITS)
    first, tokens = server.complete(prompt)
    deadline = time.monotonic() + SETTLE_S
    while server.sum(STORED) == stored:
        check(time.monotonic() < deadline, f"{STORED} does not grow: nothing is stored of a prompt of {tokens} tokens")
        server.complete("Hello", tokens=1)  # stores are brought on by the steps of other requests
        time.sleep(0.2)
    pool = server.pool_tokens()
    if ROUNDS * pool > push_out_tokens:
        server.complete(prompt)
        return f"stored; loading was not tried, for the GPU's pool of {pool} tokens is too large for --push-out-tokens"
    for _ in range(ROUNDS):
        for _ in range(pool // (AT_ONCE * tokens) + 1):
            server.complete(*(prompt_of(words) for _ in range(AT_ONCE)), tokens=1)
        again, _ = server.complete(prompt)
        loaded = server.sum(HITS) - hits
        if loaded > 0:
            answer = "the same answer" if again == first else "another answer, as rounding may give it"
            return f"stored, and loaded in {loaded:g} blocks with {answer}"
    raise Failure(f"{HITS} does not grow: the repeated prompt was not loaded")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--push-out-tokens", type=int, default=500_000)
    parser.add_argument("--no-cache", action="store_true", help="nothing is offloaded")
    options = parser.parse_args()
    server = Server(options.url.rstrip("/"), options.model)
    try:
        server.wait()
        print("health: ok", flush=True)
        answer, _ = server.complete("The capital of France is")
        check(bool(answer), "a completion is answered by nothing")
        print("completion: ok", flush=True)
        if not options.no_cache:
            print(f"cache: ok, {check_cache(server, options.push_out_tokens)}", flush=True)
    except Failure as failure:
        sys.exit(f"failed: {failure}")


if __name__ == "__main__":
    main()
