"""`make demo`: one prompt, six ways to its first token.

Serves a small random-weight Llama with vLLM and kvoffload. The GPU pool (here: vLLM's KV pool, wherever it lies) and
the DRAM tier are small, so that other prompts really push the prompt out, first of the one, then of the other. Then
the engine is restarted, and killed in the middle of its work. Every answer must have the tokens of the cold one.

Leaves build/demo.json and build/demo.png; exits with 1 if tokens differ or a tier did not serve what it should.
"""

import argparse
import json
import random
import shutil
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from rich.console import Console
from rich.table import Table
from tiny_models import VOCABULARY, make
from vllm_process import VllmProcess

BUILD = Path(__file__).resolve().parent.parent / "build"
PROMPT_TOKENS = 2500
ANSWER_TOKENS = 16
GPU_BLOCKS = 160  # of 32 tokens: two prompts
DRAM_GB, SSD_GB = 0.25, 1.0  # a block is 0.5 MB and a prompt 79 blocks: DRAM holds five prompts, the SSD twenty
EVICT_FROM_GPU, EVICT_FROM_DRAM = 3, 8  # prompts that do it
WHOLE = 0.9  # of the prompt's tokens must come from the tier that a phase is about

SOURCES = {"device": "gpu", "host": "dram", "disk": "ssd"}  # as vLLM's metrics name them
COLOURS = {"none": "#9e9e9e", "gpu": "#43a047", "dram": "#1e88e5", "ssd": "#fb8c00"}


@dataclass
class Phase:
    phase: str
    ttft_s: float
    prompt_tokens: int
    loaded_tokens: int  # from the tier
    tier: str  # the one that supplied most: none, gpu, dram, ssd
    tokens_match: bool  # the answer equals the cold one


class Demo:
    def __init__(self, nvme_path: Path, seed: int):
        self.model = make("wide-llama", BUILD / "models")
        self.config = {"nvme_path": str(nvme_path), "dram_kv_offload_gb": DRAM_GB, "ssd_kv_offload_gb": SSD_GB}
        self.random = random.Random(seed)
        self.prompt = self.other_prompt()
        self.expected: list[int] = []
        self.phases: list[Phase] = []
        self.problems: list[str] = []

    def other_prompt(self) -> list[int]:
        return [self.random.randrange(3, VOCABULARY) for _ in range(PROMPT_TOKENS)]

    def start(self) -> VllmProcess:
        print("starting vLLM ...", flush=True)
        engine = VllmProcess(self.model, self.config, num_gpu_blocks_override=GPU_BLOCKS, log=BUILD / "demo-vllm.log")
        # The first long prompt of a process takes twice as long as the second: not a time to compare with.
        engine.generate([self.other_prompt()], max_tokens=2)
        wait_until_written(engine)
        return engine

    def fill(self, engine: VllmProcess, prompts: int) -> None:
        engine.generate([self.other_prompt() for _ in range(prompts)], max_tokens=1)

    def ask(self, engine: VllmProcess, phase: str, tier: str) -> None:
        """Ask for the prompt; it is meant to be loaded from `tier`."""
        before = tokens_by_tier(engine)
        (answer,) = engine.generate([self.prompt], ANSWER_TOKENS)
        after = tokens_by_tier(engine)
        self.expected = self.expected or answer.tokens
        by_tier = {name: int(after[name] - before[name]) for name in after}
        seen = max(by_tier, key=by_tier.get) if any(by_tier.values()) else "none"
        loaded, match = by_tier.get(seen, 0), answer.tokens == self.expected
        self.phases.append(Phase(phase, round(answer.ttft_s, 4), len(self.prompt), loaded, seen, match))
        if not match:
            self.problems.append(f"{phase}: the answer differs from the cold one")
        if seen != tier or (tier != "none" and loaded < WHOLE * len(self.prompt)):
            self.problems.append(f"{phase}: expected the prompt from {tier}, tokens by tier were {by_tier}")

    def run(self) -> None:
        with self.start() as engine:
            self.ask(engine, "cold", "none")
            self.ask(engine, "GPU hit", "gpu")
            self.fill(engine, EVICT_FROM_GPU)
            self.ask(engine, "DRAM hit", "dram")
            self.fill(engine, EVICT_FROM_DRAM)
            self.ask(engine, "SSD hit", "ssd")
        with self.start() as engine:
            self.ask(engine, "restart and resume", "ssd")
            for _ in range(4):
                engine.submit(self.other_prompt(), max_tokens=64)
            time.sleep(1.5)  # into the middle of prefills and stores
            engine.kill9()
        with self.start() as engine:
            self.ask(engine, "restart after kill -9", "ssd")

    def speedup(self, phase: Phase) -> float:
        return self.phases[0].ttft_s / phase.ttft_s


def tokens_by_tier(engine: VllmProcess) -> dict[str, float]:
    metrics = engine.metrics()
    name = "vllm:prompt_tokens_cached_by_source_total"
    return {tier: metrics.sum(name, source=source) for source, tier in SOURCES.items()}


def wait_until_written(engine: VllmProcess) -> None:
    """Until background writes to the SSD have ended. Short requests keep the engine stepping and its metrics fresh."""
    demotions, unchanged = -1.0, 0
    while unchanged < 3:
        engine.generate([[3, 4, 5]], max_tokens=2)
        now = engine.metrics().sum("kvoffload_demotions_total")
        demotions, unchanged = now, unchanged + 1 if now == demotions else 0
        time.sleep(0.2)


def print_table(demo: Demo) -> None:
    table = Table(title=f"Time to first token of one {PROMPT_TOKENS}-token prompt, vLLM with kvoffload")
    for heading in ("phase", "TTFT", "vs cold", "prompt tokens", "loaded tokens", "tier", "same tokens as cold"):
        table.add_column(heading, justify="left" if heading in ("phase", "tier") else "right")
    for phase in demo.phases:
        table.add_row(
            phase.phase,
            f"{phase.ttft_s * 1000:.0f} ms",
            f"{demo.speedup(phase):.1f}x",
            str(phase.prompt_tokens),
            str(phase.loaded_tokens),
            phase.tier,
            "yes" if phase.tokens_match else "[bold red]NO",
        )
    Console(width=110).print(table)


def plot(demo: Demo, file: Path) -> None:
    figure, axes = pyplot.subplots(figsize=(9, 3.8), layout="constrained")
    names = [phase.phase for phase in demo.phases]
    bars = axes.barh(names, [p.ttft_s * 1000 for p in demo.phases], color=[COLOURS[p.tier] for p in demo.phases])
    labels = [f"{p.ttft_s * 1000:.0f} ms  ({demo.speedup(p):.1f}x, {p.loaded_tokens} tokens)" for p in demo.phases]
    axes.bar_label(bars, labels, padding=4, fontsize=9)
    axes.invert_yaxis()
    axes.margins(x=0.32)
    axes.set_xlabel(f"time to first token of a {PROMPT_TOKENS}-token prompt [ms]")
    axes.legend([pyplot.Rectangle((0, 0), 1, 1, color=c) for c in COLOURS.values()], COLOURS, title="KV loaded from")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=150)


def main() -> int:
    parser = argparse.ArgumentParser(description="Show what each tier saves.")
    parser.add_argument("--nvme-path", type=Path, default=BUILD / "demo-cache", help="a directory for the SSD tier")
    parser.add_argument("--seed", type=int, default=1, help="of the prompts")
    options = parser.parse_args()
    shutil.rmtree(options.nvme_path / "kvoffload", ignore_errors=True)  # cold must be cold
    options.nvme_path.mkdir(parents=True, exist_ok=True)

    demo = Demo(options.nvme_path, options.seed)
    demo.run()
    (BUILD / "demo.json").write_text(json.dumps([asdict(phase) for phase in demo.phases], indent=2) + "\n")
    plot(demo, BUILD / "demo.png")
    print_table(demo)
    print("wrote build/demo.json and build/demo.png")
    for problem in demo.problems:
        print(f"PROBLEM: {problem}", file=sys.stderr)
    return 1 if demo.problems else 0


if __name__ == "__main__":
    sys.exit(main())
