"""What kvoffload costs where nothing ever hits: throughput of a real vLLM with it, over that of the same without.

One engine takes turns with kvoffload switched on and off, for two that are started alike differ by more than what is looked for.
Every prompt is new; when it is on, every block is copied out and written to the SSD. Ratios are of the turns of one round, so that
what the machine does meanwhile cancels out; short turns and many tell more than long ones. vLLM's processes do not spin for work,
or on few cores that decides how long a turn takes. Beside the ratio: what share of the time vLLM spends in the connector's calls,
and how long they take in a step, which does not depend on how long steps are.

    python -m benchmarks.bench_zero_hit [--folder PATH] [--rounds 150] [--prompts 2] [--tokens 1000]
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
from vllm_process import ENGINE_DEFAULTS, VllmProcess, transfer_config  # noqa: E402

from benchmarks.resampling import likely  # noqa: E402
from benchmarks.timed_connector import VARIABLE, Switch, TimedConnector, call_times  # noqa: E402

GOAL = 0.99
STEP = "build_connector_meta"  # once in each
ON, OFF = "with", "switched off"
REST_S = 0.5  # after a turn, outside its time: what it left in flight ends
ANSWER_TOKENS, CONCURRENCY = 16, 4
POOL = {"num_gpu_blocks_override": 400, "max_model_len": 3072}
DRAM_GB, SSD_GB = 1.0, 4.0


@dataclass
class Found:
    """Tokens per second of each turn; of those with kvoffload also how long they took together, in how many steps, and by role and
    call the seconds of those in the connector."""

    rates: dict[str, list[float]]
    turn_s: float
    steps: int
    call_s: dict[str, dict[str, float]]


def turn(engine: VllmProcess, rng: random.Random, prompts: int, tokens: int) -> float:
    """Seconds that a batch of new prompts takes."""
    batch = [[rng.randrange(3, VOCABULARY) for _ in range(tokens)] for _ in range(prompts)]
    begun = time.perf_counter()
    engine.generate(batch, ANSWER_TOKENS, CONCURRENCY)
    taken = time.perf_counter() - begun
    time.sleep(REST_S)
    return taken


def started(model: Path, folder: Path, times: Path) -> VllmProcess:
    settings = {"nvme_path": str(folder), "dram_kv_offload_gb": DRAM_GB, "ssd_kv_offload_gb": SSD_GB}
    config = transfer_config(settings, True) | {
        "kv_connector": TimedConnector.__name__,
        "kv_connector_module_path": TimedConnector.__module__,
    }
    env = {VARIABLE: str(times), "PYTHONPATH": str(ROOT)}
    return VllmProcess(model, shares_cores=True, env=env, kv_transfer_config=config, **POOL)


def measure(folder: Path, rounds: int, prompts: int, tokens: int, seed: int) -> Found:
    rng = random.Random(seed)
    model = make("wide-llama", ROOT / "build" / "models")
    times = folder / "call_times"
    switch = Switch(times)
    with started(model, folder, times) as engine:
        for _ in range(2):
            turn(engine, rng, prompts, tokens)  # the first long prompts of a process are slower
        taken: dict[str, list[float]] = {ON: [], OFF: []}
        before = call_times(times)
        for number in range(rounds):
            for name in random.Random(number).sample(list(taken), len(taken)):
                switch.turn(name == ON)
                taken[name].append(turn(engine, rng, prompts, tokens))
        switch.turn(True)
        after = call_times(times)
        spent = {
            role: {name: of.seconds - before[role][name].seconds for name, of in calls.items()} for role, calls in after.items()
        }
        steps = after["scheduler"][STEP].calls - before["scheduler"][STEP].calls
        metrics = engine.metrics()
        stored = metrics.sum("kvoffload_stored_blocks_total")
        wanted = (rounds + 2) * prompts * (tokens // ENGINE_DEFAULTS["block_size"])
        assert metrics.sum("kvoffload_hit_blocks_total") == 0 and 0.9 * wanted < stored < 1.2 * wanted, (stored, wanted)
    batch_tokens = prompts * (tokens + ANSWER_TOKENS)
    rates = {name: [batch_tokens / seconds for seconds in turns] for name, turns in taken.items()}
    return Found(rates, sum(taken[ON]), steps, spent)


def ratio(ours: list[float], theirs: list[float]) -> tuple[float, float, str]:
    """The median over the rounds, the least that it is likely to be, and in words with what 95 of 100 repetitions would find."""
    ratios = [our / their for our, their in zip(ours, theirs, strict=True)]
    low, high = likely(lambda rng: statistics.median(rng.choices(ratios, k=len(ratios))))
    middle = statistics.median(ratios)
    return middle, low, f"{middle:.3f} ({low:.3f}..{high:.3f} with 95 %; rounds {min(ratios):.3f}..{max(ratios):.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("build/bench_zero_hit"))
    parser.add_argument("--rounds", type=int, default=150)
    parser.add_argument("--prompts", type=int, default=2)
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
    middle, low, shown = ratio(rates[ON], rates[OFF])
    verdict = "met" if low >= GOAL else "met, if not for noise" if middle >= GOAL else "**not met**"
    print(f"| {ON} / {OFF}, one engine, {arguments.rounds} rounds | {shown}, goal {GOAL}: {verdict} |")
    for role, calls in sorted(found.call_s.items()):
        most = max(calls, key=calls.__getitem__)
        share, of_most = sum(calls.values()) / found.turn_s, calls[most] / found.turn_s
        shown = f"{share:.2%} ({most} {of_most:.2%}), {1e3 * sum(calls.values()) / found.steps:.2f} ms a step"
        print(f"| share of the time in the connector's calls, {role} | {shown} |")
    Path("build/bench_zero_hit.json").write_text(json.dumps(asdict(found), indent=2) + "\n")


if __name__ == "__main__":
    main()
