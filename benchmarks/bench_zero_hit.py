"""What kvoffload costs where nothing ever hits: throughput of a real vLLM with it, over that of one without.

Three engines run side by side and take turns, stopped while another works: one with kvoffload and two without, for two engines
started alike differ, too. Every prompt is new, every block is copied out and written to the SSD. Ratios are of the turns of one
round, so that what the machine does meanwhile cancels out. Beside them: what share of the time vLLM spends in the connector's
calls.

    python -m benchmarks.bench_zero_hit [--folder PATH] [--rounds 15] [--prompts 8] [--tokens 1000]
"""

import argparse
import json
import random
import shutil
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))
from tiny_models import VOCABULARY, make  # noqa: E402 - found by the line above
from vllm_process import VllmProcess, transfer_config  # noqa: E402

from benchmarks.timed_connector import STOPPED, VARIABLE, TimedConnector, call_seconds  # noqa: E402

GOAL = 0.99
ANSWER_TOKENS, CONCURRENCY = 16, 4
POOL = {"num_gpu_blocks_override": 400, "max_model_len": 3072}
DRAM_GB, SSD_GB = 1.0, 4.0


@dataclass
class Found:
    """By engine, tokens per second of each turn; of the one with kvoffload also how long all its turns took, and by role and
    call the seconds of those in the connector."""

    rates: dict[str, list[float]]
    turn_s: float
    call_s: dict[str, dict[str, float]]


def turn(engine: VllmProcess, rng: random.Random, prompts: int, tokens: int) -> float:
    """Seconds that a batch of new prompts takes."""
    batch = [[rng.randrange(3, VOCABULARY) for _ in range(tokens)] for _ in range(prompts)]
    with engine.awake():
        begun = time.perf_counter()
        engine.generate(batch, ANSWER_TOKENS, CONCURRENCY)
        return time.perf_counter() - begun


def offloading(model: Path, folder: Path, times: Path) -> VllmProcess:
    settings = {"nvme_path": str(folder), "dram_kv_offload_gb": DRAM_GB, "ssd_kv_offload_gb": SSD_GB}
    config = transfer_config(settings, True) | {
        "kv_connector": TimedConnector.__name__,
        "kv_connector_module_path": TimedConnector.__module__,
    }
    return VllmProcess(model, env={VARIABLE: str(times), "PYTHONPATH": str(ROOT)}, kv_transfer_config=config, **POOL)


def measure(folder: Path, rounds: int, prompts: int, tokens: int, seed: int) -> Found:
    rng = random.Random(seed)
    model = make("llama", ROOT / "build" / "models")
    times = folder / "call_times"
    with (
        VllmProcess(model, None, **POOL) as without,
        VllmProcess(model, None, **POOL) as again,
        offloading(model, folder, times) as with_it,
    ):
        engines = {"without": without, "without, again": again, "with": with_it}
        for engine in engines.values():
            turn(engine, rng, prompts, tokens)  # the first long prompts of a process are slower
        taken: dict[str, list[float]] = {name: [] for name in engines}
        before = call_seconds(times)
        for number in range(rounds):
            for name in random.Random(number).sample(list(engines), len(engines)):
                taken[name].append(turn(engines[name], rng, prompts, tokens))
        after = call_seconds(times)
        spent = {role: {name: seconds - before[role][name] for name, seconds in calls.items()} for role, calls in after.items()}
        with with_it.awake():
            metrics = with_it.metrics()
            assert metrics.sum("kvoffload_hit_blocks_total") == 0 and metrics.sum("kvoffload_stored_blocks_total") > 0
        for engine in engines.values():
            engine.kill9()  # a stopped one would not end in order
    batch_tokens = prompts * (tokens + ANSWER_TOKENS)
    rates = {name: [batch_tokens / seconds for seconds in turns] for name, turns in taken.items()}
    return Found(rates, sum(taken["with"]), spent)


def ratio(ours: list[float], theirs: list[float]) -> tuple[float, str]:
    """The median over the rounds, and that with its quartiles in words."""
    ratios = [our / their for our, their in zip(ours, theirs, strict=True)]
    middle = statistics.median(ratios)
    quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else [middle] * 3
    return middle, f"{middle:.3f} (quartiles {quartiles[0]:.3f}..{quartiles[2]:.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("build/bench_zero_hit"))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**32))
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}")
    arguments.folder.mkdir(parents=True, exist_ok=True)
    try:
        found = measure(arguments.folder, arguments.rounds, arguments.prompts, arguments.tokens, arguments.seed)
    finally:
        shutil.rmtree(arguments.folder)
    rates = found.rates
    print("| | tokens/s, median |\n|---|---:|")
    for name, values in rates.items():
        print(f"| {name} | {statistics.median(values):.0f} |")
    middle, shown = ratio(rates["with"], rates["without"])
    print(f"| with / without, {arguments.rounds} rounds | {shown}, goal {GOAL}: {'met' if middle >= GOAL else '**not met**'} |")
    print(f"| without, again / without | {ratio(rates['without, again'], rates['without'])[1]} |")
    for role, calls in sorted(found.call_s.items()):
        seconds = {name: taken for name, taken in calls.items() if name != STOPPED}
        most = max(seconds, key=seconds.__getitem__)
        shown = f"{sum(seconds.values()) / found.turn_s:.2%} ({most} {seconds[most] / found.turn_s:.2%})"
        print(f"| share of the time in the connector's calls, {role} | {shown} |")
    Path("build/bench_zero_hit.json").write_text(json.dumps(asdict(found), indent=2) + "\n")


if __name__ == "__main__":
    main()
