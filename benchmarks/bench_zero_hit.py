"""What kvoffload costs where nothing ever hits: throughput of a real vLLM with it, over that of one without.

Both engines run side by side and take turns, one stopped while the other works; every prompt is new. Every block is copied
out, and written to the SSD. Ratios are of the two turns of a round, so that what the machine does meanwhile cancels out.

    python -m benchmarks.bench_zero_hit [--folder PATH] [--rounds 15] [--prompts 8] [--tokens 1000]
"""

import argparse
import json
import random
import shutil
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))
from tiny_models import VOCABULARY, make  # noqa: E402 - found by the line above
from vllm_process import VllmProcess  # noqa: E402

GOAL = 0.99
ANSWER_TOKENS, CONCURRENCY = 16, 4
POOL = {"num_gpu_blocks_override": 400, "max_model_len": 3072}
DRAM_GB, SSD_GB = 1.0, 4.0


def turn(engine: VllmProcess, rng: random.Random, prompts: int, tokens: int) -> float:
    """Tokens per second over a batch of new prompts."""
    batch = [[rng.randrange(3, VOCABULARY) for _ in range(tokens)] for _ in range(prompts)]
    with engine.awake():
        begun = time.perf_counter()
        engine.generate(batch, ANSWER_TOKENS, CONCURRENCY)
        return prompts * (tokens + ANSWER_TOKENS) / (time.perf_counter() - begun)


def measure(folder: Path, rounds: int, prompts: int, tokens: int, seed: int) -> dict[str, list[float]]:
    rng = random.Random(seed)
    model = make("llama", ROOT / "build" / "models")
    settings = {"nvme_path": str(folder), "dram_kv_offload_gb": DRAM_GB, "ssd_kv_offload_gb": SSD_GB}
    rates: dict[str, list[float]] = {"without": [], "with": []}
    with VllmProcess(model, None, **POOL) as without, VllmProcess(model, settings, **POOL) as offloading:
        engines = {"without": without, "with": offloading}
        for engine in engines.values():
            turn(engine, rng, prompts, tokens)  # the first long prompts of a process are slower
        for number in range(rounds):
            names = ["without", "with"] if number % 2 else ["with", "without"]
            for name in names:
                rates[name].append(turn(engines[name], rng, prompts, tokens))
        with offloading.awake():
            metrics = offloading.metrics()
            assert metrics.sum("kvoffload_hit_blocks_total") == 0 and metrics.sum("kvoffload_stored_blocks_total") > 0
        for engine in engines.values():
            engine.kill9()  # a stopped one would not end in order
    return rates


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
        rates = measure(arguments.folder, arguments.rounds, arguments.prompts, arguments.tokens, arguments.seed)
    finally:
        shutil.rmtree(arguments.folder)
    ratios = [ours / theirs for ours, theirs in zip(rates["with"], rates["without"], strict=True)]
    ratio = statistics.median(ratios)
    quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else [ratio] * 3
    print("| | tokens/s, median |\n|---|---:|")
    for name, values in rates.items():
        print(f"| {name} kvoffload | {statistics.median(values):.0f} |")
    spread = f"{ratio:.3f} (quartiles {quartiles[0]:.3f}..{quartiles[2]:.3f})"
    print(f"| ratio, median of {len(ratios)} rounds | {spread}, goal {GOAL}: {'met' if ratio >= GOAL else '**not met**'} |")
    Path("build/bench_zero_hit.json").write_text(json.dumps(rates | {"ratios": ratios}, indent=2) + "\n")


if __name__ == "__main__":
    main()
