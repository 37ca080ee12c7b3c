"""Time to first token of a real vLLM: without kvoffload, with it told to load whatever it holds, and with it left to decide.

Four engines run side by side and take turns at each prompt, the others stopped while one works, in random order.
Two of them are without kvoffload, for two that are started alike differ by up to a tenth, each time the same one. So the one
that decides is also told to recompute, in turns of its own: beside that it shows what deciding costs, whatever engine it is.
The drive is as fast as it is, slowed to a tenth and a hundredth by the tests' fault layer (requests are served one after
the other, each for as much longer than a block of this size takes here), or stalled, so that it answers nothing. Of a prompt
nothing, half or all is on SSD and nowhere else: there is no DRAM tier, and the GPU pool forgets all before each prompt. What
a speed costs until it is known is in the figures: cells are in random order, and speeds follow one another, fast to stalled.

    python -m benchmarks.bench_load_or_recompute [--folder PATH] [--rounds 3] [--seed N] [--quick]
"""

import argparse
import mmap
import os
import platform
import random
import shutil
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))
from tiny_models import VOCABULARY, make  # noqa: E402 - found by the line above
from vllm_process import VllmProcess  # noqa: E402

from benchmarks import load_or_recompute_report as report  # noqa: E402
from kvoffload.estimates import Why  # noqa: E402
from kvoffload.layout import slot_bytes  # noqa: E402
from tests.engine.faulty import FaultPlan, environment  # noqa: E402

BLOCK_TOKENS, BLOCK_BYTES = 32, 2**19  # of the model "wide-llama"
POOL = {"num_gpu_blocks_override": 320, "max_model_len": 4352}
SSD_GB = 6.0
SETTLE_S = 60
PROBE = Why.PROBE.value


@dataclass(frozen=True)
class Speed:
    name: str
    slower: float  # times; infinite: nothing is answered


SPEEDS = (Speed("1x", 1), Speed("1/10", 10), Speed("1/100", 100), Speed("stalled", float("inf")))


@dataclass(frozen=True)
class Shape:
    tokens: tuple[int, ...] = (256, 1024, 4096)
    hits: tuple[int, ...] = (0, 50, 100)  # percent
    speeds: tuple[Speed, ...] = SPEEDS
    warm_ups: int = 3
    # After a prompt, awake: to end what the answer began. For a second after each step vLLM's processes ask one another for work,
    # which takes a core (a prompt of 256 tokens takes 0.14 s beside that, 0.09 s later). So no engine is asked twice in a row: when
    # it is asked again, another has rested meanwhile, and it has long been silent.
    rest_s: float = 1.0


# Too short a rest for its figures to mean anything.
QUICK = Shape((256,), (0, 100), (SPEEDS[0], SPEEDS[3]), warm_ups=1, rest_s=0.1)


@dataclass
class Contender:
    name: str
    engine: VllmProcess
    params: dict[str, str] | None = None

    def ask(self, prompt: list[int], rest_s: float) -> float:
        with self.engine.awake():
            self.engine.reset_gpu_prefix_cache()
            (answer,) = self.engine.generate([prompt], 1, kv_transfer_params=self.params)
            time.sleep(rest_s)
        assert answer.ttft_s is not None
        return answer.ttft_s

    def settle(self) -> None:
        """What was stored is on SSD."""
        deadline = time.monotonic() + SETTLE_S
        with self.engine.awake():
            while time.monotonic() < deadline:
                metrics = self.engine.metrics()
                stored, demoted = metrics.sum("kvoffload_stored_blocks_total"), metrics.sum("kvoffload_demotions_total")
                if demoted >= stored:
                    return
                self.engine.generate([[3, 4, 5]], 1)  # metrics are as fresh as the last step
        raise SystemExit(f"{self.name}: {demoted:.0f} of {stored:.0f} blocks reached the SSD within {SETTLE_S} s")

    def decisions(self) -> dict[str, float]:
        with self.engine.awake():
            samples = self.engine.metrics().samples
        name = "kvoffload_load_decisions_total"
        return {
            f"{of['decision']}, {of['reason']}": value
            for sample, of, value in samples
            if sample == name and value and of["reason"] != Why.ASKED.value
        }

    def probes(self) -> float:
        """Prompts of which some was loaded, or read beside computing them, only to see how fast the tier is."""
        return sum(count for decision, count in self.decisions().items() if decision.endswith(PROBE))


@dataclass
class Prompts:
    rng: random.Random
    kept: dict[int, list[int]] = field(default_factory=dict)  # by length, stored whole before the clock starts

    def fresh(self, tokens: int) -> list[int]:
        return [self.rng.randrange(3, VOCABULARY) for _ in range(tokens)]

    def of(self, tokens: int, hit: int) -> list[int]:
        known = tokens * hit // 100 // BLOCK_TOKENS * BLOCK_TOKENS
        return self.kept[tokens][:known] + self.fresh(tokens - known)


def block_read_s(folder: Path) -> float:
    """What a read of a block takes on this drive when it is alone."""
    count, nbytes = 64, slot_bytes(BLOCK_BYTES)
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        file.write(os.urandom(count * nbytes))
        file.flush()
        os.fsync(file.fileno())
        memory = mmap.mmap(-1, nbytes)
        try:
            source = os.open(file.name, os.O_RDONLY | os.O_DIRECT)
        except OSError:  # a file system in memory
            source = os.open(file.name, os.O_RDONLY)
        times = []
        for number in range(count):
            begun = time.perf_counter()
            os.preadv(source, [memory], number * nbytes)
            times.append(time.perf_counter() - begun)
        os.close(source)
    return statistics.median(times)


def set_speed(plan: FaultPlan, speed: Speed, read_s: float) -> None:
    plan.heal()
    for kind in (plan.read, plan.write) if speed.slower > 1 else ():
        if speed.slower == float("inf"):
            kind.set(stall=1)
        else:
            kind.throttle((speed.slower - 1) * read_s)


def start(stack: ExitStack, folder: Path, plan: FaultPlan) -> list[Contender]:
    model = make("wide-llama", ROOT / "build" / "models")

    def engine(name: str, settings: dict | None) -> VllmProcess:
        made = VllmProcess(model, settings, env=environment(plan), log=folder / f"{name}.log", **POOL)
        stack.callback(made.kill9)  # a stopped one would not end in order
        return made

    def offloading(name: str) -> VllmProcess:
        path = folder / name
        path.mkdir()
        return engine(name, {"nvme_path": str(path), "ssd_kv_offload_gb": SSD_GB})

    always, decides = offloading("always"), offloading("decides")
    return [
        Contender(report.WITHOUT, engine("without", None)),
        Contender(report.WITHOUT, engine("without too", None)),
        Contender(report.ALWAYS, always, {"kvoffload": "load"}),
        Contender(report.RECOMPUTES, decides, {"kvoffload": "recompute"}),
        Contender(report.DECIDES, decides),
    ]


def turns(rng: random.Random, contenders: list[Contender], last: VllmProcess | None) -> list[Contender]:
    """In random order, but no engine after itself, nor after `last`, that was asked before them."""
    while True:
        order = rng.sample(contenders, len(contenders))
        engines = [last, *(contender.engine for contender in order)]
        if all(one is not next_one for one, next_one in pairwise(engines)):
            return order


def warm_up(contenders: list[Contender], prompts: Prompts, shape: Shape) -> None:
    """Stores what will be hit, and lets each process take its first long prompts, which are slower."""
    prompts.kept = {tokens: prompts.fresh(tokens) for tokens in shape.tokens}
    for contender in contenders:
        if contender.name == report.RECOMPUTES:
            continue  # its engine is the one that decides
        for tokens in shape.tokens:
            contender.ask(prompts.kept[tokens], shape.rest_s)
        if contender.name != report.WITHOUT:
            contender.settle()
        for _ in range(shape.warm_ups):
            contender.ask(prompts.fresh(max(shape.tokens)), shape.rest_s)
            contender.ask(prompts.kept[max(shape.tokens)], shape.rest_s)


def measure(folder: Path, shape: Shape, rounds: int, seed: int) -> tuple[list[report.Cell], dict[str, object]]:
    rng = random.Random(seed)
    prompts, cells, decided, last = Prompts(rng), {}, {}, None
    with ExitStack() as stack:
        plan = stack.enter_context(FaultPlan(folder / "plan"))
        read_s = block_read_s(folder)
        contenders = start(stack, folder, plan)
        warm_up(contenders, prompts, shape)
        before = contenders[-1].decisions()
        for speed in shape.speeds:
            set_speed(plan, speed, read_s)
            for number in range(rounds):
                for tokens, hit in rng.sample(grid := [(t, h) for t in shape.tokens for h in shape.hits], len(grid)):
                    cell = cells.setdefault((speed.name, tokens, hit), report.Cell(speed.name, tokens, hit))
                    probes = contenders[-1].probes()
                    for contender in turns(rng, contenders, last):
                        # Each its own: what an engine was asked before, under whatever name, it holds.
                        cell.ttft_s[contender.name].append(contender.ask(prompts.of(tokens, hit), shape.rest_s))
                        last = contender.engine
                    cell.probes += contenders[-1].probes() > probes
                print(f"{speed.name}, round {number + 1} of {rounds}", flush=True)
            after = contenders[-1].decisions()
            decided[speed.name] = {name: count - before.get(name, 0) for name, count in after.items() if count != before.get(name)}
            before = after
        plan.heal()
    order = sorted(cells.values(), key=lambda cell: ([s.name for s in SPEEDS].index(cell.speed), cell.tokens, cell.hit))
    return order, {"block_read_ms": 1e3 * read_s, "decisions": decided}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "bench_load_or_recompute", help="on the drive")
    parser.add_argument("--output", type=Path, default=ROOT / "build")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**32))
    parser.add_argument("--quick", action="store_true", help="one round of a few cells: to see that it runs")
    options = parser.parse_args(arguments)
    print(f"seed {options.seed}")
    shutil.rmtree(options.folder, ignore_errors=True)
    options.folder.mkdir(parents=True)
    begun = time.monotonic()
    load_before = os.getloadavg()[0]
    rounds = 1 if options.quick else options.rounds
    try:
        cells, notes = measure(options.folder, QUICK if options.quick else Shape(), rounds, options.seed)
    finally:
        shutil.rmtree(options.folder)
    notes |= {"rounds": rounds, "seed": options.seed, "minutes": (time.monotonic() - begun) / 60}
    notes |= {"load_average": [load_before, os.getloadavg()[0]], "cores": os.cpu_count(), "kernel": platform.release()}
    print(report.write(options.output, cells, notes))
    return 0


if __name__ == "__main__":
    sys.exit(main())
