"""Fixtures of the tests that start a real vLLM: models, prompts from a seed, and the tokens vLLM alone answers with."""

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tiny_models import VOCABULARY, make
from vllm_process import Answer, VllmProcess

from tests.e2e.offload import POOL

BUILD = Path(__file__).resolve().parents[2] / "build"
Prompt = list[int]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.e2e)


@pytest.fixture(scope="session")
def model() -> Callable[[str], Path]:
    """`model("llama")` is the folder of that model, made at first use and kept under build/."""
    return lambda name: make(name, BUILD / "models")


class Prompts:
    """Prompts of random tokens. They share no prefix unless one is given."""

    def __init__(self, seed: int):
        self.random = random.Random(seed)

    def one(self, tokens: int, prefix: Prompt = ()) -> Prompt:
        return [*prefix, *(self.random.randrange(3, VOCABULARY) for _ in range(tokens - len(prefix)))]

    def many(self, count: int, tokens: int, prefix: Prompt = ()) -> list[Prompt]:
        return [self.one(tokens, prefix) for _ in range(count)]


@pytest.fixture
def prompts(seed: int, request: pytest.FixtureRequest) -> Prompts:
    """Of a seed that follows from the run's seed and the test's name, so that a test can be run again alone."""
    return Prompts(f"{seed} {request.node.name}")


class Right(list):
    """The tokens vLLM alone answers with; equal to an answer that agrees with them as far as they are certain.

    Where its two likeliest tokens are as good as equal, vLLM alone takes one or the other: floating point sums depend on which
    requests are computed in one batch. What follows such a token is not comparable. One answer in a hundred has one."""

    TIE = 1e-4  # in logarithms of probability; float32 tells apart about 1e-6 of them, and sums of 500 terms 1e-5

    def __init__(self, tokens: list[int], margins: list[float]):
        super().__init__(tokens)
        self.certain = next((index for index, margin in enumerate(margins) if margin < self.TIE), len(tokens))

    def __eq__(self, answer: object) -> bool:
        if not isinstance(answer, list):
            return NotImplemented
        return len(answer) == len(self) and answer[: self.certain] == self[: self.certain]

    def __ne__(self, answer: object) -> bool:
        return not self == answer

    __hash__ = None


class Baseline:
    """The right answers: what vLLM says without the connector. One engine per model and options."""

    # Nothing is evicted and nothing is shared: each prompt is computed from its first token.
    ENGINE = {"num_gpu_blocks_override": 1024, "enable_prefix_caching": False, "max_model_len": 3072}

    def __init__(self, model: Callable[[str], Path], logs: Path):
        self._model = model
        self._logs = logs
        self._engines: dict[tuple, VllmProcess] = {}
        self._known: dict[tuple, Right] = {}

    def tokens(self, model: str, prompts: list[Prompt], max_tokens: int = 16, **options) -> list[Right]:
        def key(prompt: Prompt) -> tuple:
            return model, max_tokens, tuple(prompt), *options.items()

        unknown = list({key(prompt): prompt for prompt in prompts if key(prompt) not in self._known}.values())
        if unknown:
            engine = self._engine(model, options)
            with engine.awake():
                answers = engine.generate(unknown, max_tokens, with_margins=True)
            for prompt, answer in zip(unknown, answers, strict=True):
                self._known[key(prompt)] = Right(answer.tokens, answer.margins)
        return [self._known[key(prompt)] for prompt in prompts]

    def check(self, model: str, prompts: list[Prompt], answers: list[Answer], max_tokens: int = 16) -> None:
        """Every answer has exactly the tokens that vLLM alone gives."""
        wrong = [
            f"prompt {index}: {answer.tokens}, right is {right} ({answer.cached_tokens} tokens were cached)"
            for index, (answer, right) in enumerate(
                zip(answers, self.tokens(model, prompts, max_tokens), strict=True)
            )
            if answer.tokens != right
        ]
        assert not wrong, "\n".join(wrong)

    def close(self) -> None:
        for engine in self._engines.values():
            engine.kill9()

    def _engine(self, model: str, options: dict) -> VllmProcess:
        key = (model, *options.items())
        if key not in self._engines:
            log = self._logs / f"baseline-{len(self._engines)}.log"
            self._engines[key] = VllmProcess(self._model(model), log=log, shares_cores=True, **{**self.ENGINE, **options})
        return self._engines[key]


@pytest.fixture(scope="session")
def baseline(model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Baseline]:
    answers = Baseline(model, tmp_path_factory.mktemp("baseline"))
    yield answers
    answers.close()


@pytest.fixture
def start(model: Callable[[str], Path], tmp_path: Path) -> Iterator[Callable[..., VllmProcess]]:
    """`start("llama", {"dram_kv_offload_gb": 1}, num_gpu_blocks_override=128)`: an engine that ends with the test."""
    engines: list[VllmProcess] = []

    def start(name: str, connector_config: dict | None = None, **options) -> VllmProcess:
        log = tmp_path / f"vllm-{len(engines)}.log"
        engines.append(VllmProcess(model(name), connector_config, log=log, shares_cores=True, **options))
        return engines[-1]

    yield start
    for engine in engines:
        engine.kill9()  # whoever wants it to end in order calls shutdown()


@pytest.fixture
def serve(start: Callable[..., VllmProcess]) -> Callable[..., VllmProcess]:
    """`start`, over a KV pool that holds one prompt."""
    return lambda name, settings, **options: start(name, settings, **{**POOL, **options})
