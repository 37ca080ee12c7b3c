"""A long life of real vLLMs over one nvme path: prompts of random sizes from shared prefixes, several namespaces, ends in order and
by SIGKILL. Never may the path hold more than its cap, the file system less than it had to keep, or DRAM more than its cap; a
process that lives on may not grow in memory, descriptors or threads; the same prompt always has the same answer.

    python -m tests.torture.soak [--minutes 10] [--seed N] [--folder PATH]     (or: make soak)
"""

import argparse
import random
import shutil
import statistics
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from rich.console import Console

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "examples"))  # as tests/conftest.py does

from tiny_models import VOCABULARY, make  # noqa: E402
from vllm_process import EngineError, VllmProcess  # noqa: E402

from kvoffload.layout import free_floor, slot_bytes  # noqa: E402
from tests.e2e.offload import BLOCK  # noqa: E402
from tests.e2e.test_caps import PAYLOAD, arena_bytes, disk_bytes  # noqa: E402

DRAM_GB = 0.03
SSD_GB = 300 * slot_bytes(PAYLOAD) / 1e9  # the three namespaces together want more
POOL_BLOCKS = 96
PROMPT_BLOCKS = 40
PROMPTS, SHARED = 60, 6
NAMESPACES = ({}, {"dtype": "bfloat16"}, {"block_size": 64})
SAMPLE_S = 0.2
LONG_S = 120.0  # a life that long is past the first use of its memory when half of it is over
GROWTH_BYTES, GROWTH_COUNT = 24 * 2**20, 6  # allowed to an engine in its second half, its workers' memory apart
# vLLM's CPU worker grows by itself: by 2 MiB an answer, or 0.7 if freed buffers go back to the system at once, as these
# settings of malloc have it. A plain life tells how much; ours may grow by this more.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "131072", "MALLOC_ARENA_MAX": "2"}
WORKER_GROWTH_BYTES = 2**19  # an answer


@dataclass
class Size:
    """Of all processes of an engine together, after so many answers."""

    answers: int
    worker: int  # bytes
    others: int  # bytes
    descriptors: int
    threads: int

    @staticmethod
    def of(engine: VllmProcess, answers: int) -> "Size":
        worker = others = descriptors = threads = 0
        for process in engine.processes():
            try:
                if "Worker" in process.name():
                    worker += process.memory_info().rss
                else:
                    others += process.memory_info().rss
                descriptors += process.num_fds()
                threads += process.num_threads()
            except psutil.NoSuchProcess:  # helpers come and go
                continue
        return Size(answers, worker, others, descriptors, threads)


@dataclass
class Watch:
    """Looks at the disk and at the engine's memory all the time."""

    path: Path
    floor: int  # bytes of the file system that stay free
    engine: VllmProcess | None = None
    peaks: Counter = field(default_factory=Counter)
    least_free: int = sys.maxsize
    samples: int = 0
    done: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        while not self.done.wait(SAMPLE_S):
            self.samples += 1
            self.peaks["disk"] = max(self.peaks["disk"], disk_bytes(self.path / "kvoffload") if self.path.exists() else 0)
            self.least_free = min(self.least_free, shutil.disk_usage(self.path).free)
            engine = self.engine
            if engine is not None:
                try:
                    arena = sum(arena_bytes(process.pid) for process in engine.processes())
                except (psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
                    continue  # it was killed meanwhile
                self.peaks["dram"] = max(self.peaks["dram"], arena)


class Soak:
    def __init__(self, folder: Path, seed: int, console: Console) -> None:
        self.folder, self.console = folder, console
        self.random = random.Random(seed)
        self.nvme = folder / "nvme"
        self.nvme.mkdir(parents=True)
        self.model = make("wide-llama", ROOT / "build" / "models")
        heads = [self.tokens(self.random.randrange(1, PROMPT_BLOCKS - 4) * BLOCK) for _ in range(SHARED)]
        self.prompts = [self.prompt(heads) for _ in range(PROMPTS)]
        self.known: dict[tuple[int, int], list[int]] = {}  # by namespace and prompt: its answer
        self.counts: Counter[str] = Counter()
        self.plain_growth = float("inf")  # of a worker, per answer
        self.watch = Watch(self.nvme, free_floor(shutil.disk_usage(folder).total))

    def tokens(self, count: int) -> list[int]:
        return [self.random.randrange(3, VOCABULARY) for _ in range(count)]

    def prompt(self, heads: list[list[int]]) -> list[int]:
        head = self.random.choice([[], *heads])
        return head + self.tokens(self.random.randrange(1, PROMPT_BLOCKS * BLOCK - len(head)))

    def plain_life(self, seconds: float) -> None:
        """Without kvoffload, on the same traffic."""
        options = {"max_model_len": 1536, "num_gpu_blocks_override": POOL_BLOCKS, "max_num_seqs": 8}
        engine = VllmProcess(self.model, log=self.folder / "plain.log", env=MALLOC, **options)
        try:
            self.plain_growth = self.growth(self.traffic(engine, 0, seconds))["worker"]
        finally:
            engine.kill9()
        self.console.print(f"plain vLLM's worker: {self.plain_growth / 2**20:.1f} MiB an answer", highlight=False)

    def life(self, seconds: float) -> None:
        number = self.random.randrange(len(NAMESPACES))
        settings = {"nvme_path": str(self.nvme), "dram_kv_offload_gb": DRAM_GB, "ssd_kv_offload_gb": SSD_GB}
        log = self.folder / f"life-{self.counts['lives']}.log"
        options = {"max_model_len": 1536, "num_gpu_blocks_override": POOL_BLOCKS, "max_num_seqs": 8, **NAMESPACES[number]}
        options["env"] = MALLOC
        try:
            engine = VllmProcess(self.model, settings, log=log, **options)
        except EngineError as error:
            if "set clean_obsolete_kv_cache=true" not in str(error):
                raise
            self.counts["refused: the other namespaces hold the cap"] += 1
            engine = VllmProcess(self.model, settings | {"clean_obsolete_kv_cache": True}, log=log, **options)
        self.counts["lives"] += 1
        self.watch.engine = engine
        try:
            sizes = self.traffic(engine, number, seconds)
            self.note_metrics(engine)
            self.check_growth(self.growth(sizes), seconds >= LONG_S)
        finally:
            self.watch.engine = None
            if self.random.random() < 0.5:
                engine.shutdown()
                self.counts["ended in order"] += 1
            else:
                engine.kill9()
                self.counts["killed"] += 1

    def traffic(self, engine: VllmProcess, number: int, seconds: float) -> list[Size]:
        start = time.monotonic()
        sizes: list[Size] = []
        while time.monotonic() < start + seconds:
            batch = [self.random.randrange(PROMPTS) for _ in range(self.random.randrange(1, 9))]
            doomed = [engine.submit(self.prompts[index], 64, request_id=f"doomed {self.counts['aborted'] + turn}")
                      for turn, index in enumerate(batch[: self.random.choice((0, 0, 0, 2))])]  # fmt: skip
            with ThreadPoolExecutor(len(batch)) as pool:
                answers = list(pool.map(lambda index: engine.generate([self.prompts[index]], 8)[0], batch))
            for turn, future in enumerate(doomed):
                engine.abort(f"doomed {self.counts['aborted'] + turn}")
                engine.answer(future)
            self.counts["aborted"] += len(doomed)
            for index, answer in zip(batch, answers, strict=True):
                self.check(number, index, answer.tokens)
            if time.monotonic() > start + seconds / 2:
                sizes.append(Size.of(engine, self.counts["answers"]))
        return sizes

    def check(self, number: int, index: int, tokens: list[int]) -> None:
        self.counts["answers"] += 1
        known = self.known.setdefault((number, index), tokens)
        # In bfloat16 a small random model answers in ties, which batches decide.
        assert tokens == known or "dtype" in NAMESPACES[number], f"prompt {index}: {tokens}, before {known}"

    def note_metrics(self, engine: VllmProcess) -> None:
        metrics = engine.metrics()
        for name in ("hit_blocks", "evictions", "demotions", "load_failures"):
            self.counts[name] += int(metrics.sum(f"kvoffload_{name}_total"))

    @staticmethod
    def growth(sizes: list[Size]) -> dict[str, float]:
        """Between the medians of the first and the last tenth, since single looks catch what is allocated for a moment. The
        worker's by answer."""
        tenth = max(1, len(sizes) // 10)
        grown = {}
        for name in ("answers", "worker", "others", "descriptors", "threads"):
            first, last = (statistics.median(getattr(size, name) for size in part) for part in (sizes[:tenth], sizes[-tenth:]))
            grown[name] = last - first
        return grown | {"worker": grown["worker"] / max(1, grown["answers"])}

    def check_growth(self, grown: dict[str, float], is_long: bool) -> None:
        self.console.print(
            f"  grown in the second half: workers {grown['worker'] / 2**20:.2f} MiB an answer, "
            f"others {grown['others'] / 2**20:.1f} MiB, {grown['descriptors']:.0f} descriptors, {grown['threads']:.0f} threads"
        )
        assert grown["descriptors"] <= GROWTH_COUNT and grown["threads"] <= GROWTH_COUNT, grown
        if is_long:
            assert grown["others"] <= GROWTH_BYTES, grown
            assert grown["worker"] <= self.plain_growth + WORKER_GROWTH_BYTES, (grown, self.plain_growth)

    def run(self, seconds: float) -> None:
        self.plain_life(LONG_S)
        watcher = threading.Thread(target=self.watch.run)
        watcher.start()
        start = time.monotonic()
        try:
            while (left := start + seconds - time.monotonic()) > 0:
                self.life(min(max(30.0, left / 3), 150.0))
                self.console.print(f"{int(time.monotonic() - start)} s: {dict(self.counts)}, peaks {dict(self.watch.peaks)}")
                self.check_caps()
        finally:
            self.watch.done.set()
            watcher.join()
        self.check_caps()
        for name in ("hit_blocks", "evictions", "demotions"):
            assert self.counts[name] > 0, f"the soak saw no {name}"

    def check_caps(self) -> None:
        assert 0 < self.watch.peaks["disk"] <= SSD_GB * 1e9
        assert 0 < self.watch.peaks["dram"] <= DRAM_GB * 1e9
        assert self.watch.least_free >= self.watch.floor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**32))
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "soak", help="emptied first; kept if the soak fails")
    arguments = parser.parse_args()
    shutil.rmtree(arguments.folder, ignore_errors=True)
    console = Console(soft_wrap=True)
    console.print(f"seed {arguments.seed}, caps: SSD {SSD_GB:.3f} GB, DRAM {DRAM_GB} GB", highlight=False)
    soak = Soak(arguments.folder, arguments.seed, console)
    soak.run(arguments.minutes * 60)
    console.print(f"held: {soak.watch.samples} looks, peaks {dict(soak.watch.peaks)}, {dict(soak.counts)}", highlight=False)
    shutil.rmtree(arguments.folder)


if __name__ == "__main__":
    main()
