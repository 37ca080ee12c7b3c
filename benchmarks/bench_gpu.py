"""The CUDA path on a real GPU: right bytes, then rates as ratios to one large pinned copy, then what copies cost compute.

    bytes       random plans of every kind of transfer for several block sizes and both layouts (one span a block, one a
                layer), compared byte by byte in GPU memory; a wrong byte ends the program with exit status 1
    copies      GPU -> DRAM and DRAM -> GPU in GB/s, beside one cuMemcpy*Async of 1 GiB from pinned memory
    drive       GPU -> DRAM -> SSD and SSD -> DRAM -> GPU, and the way back without a DRAM slot (DRAM 0)
    compute     a loop of bf16 matrix products with copies in both directions beside it, against the same alone

    python -m benchmarks.bench_gpu [--folder PATH] [--gib 2] [--repetitions 7] [--seconds 1] [--device 0]

The first three need the driver only, the last one torch with CUDA (left out, and said so, where it is not there).
"""

import argparse
import json
import shutil
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.cuda_driver import Cuda
from kvoffload.engine import Engine
from kvoffload.engine.reference import pack_superblock
from kvoffload.types import NO_SLOT, OP_DTYPE, EngineOptions, OpFlag, OpKind, Region, SlotFiles

GIB, MIB, KIB = 2**30, 2**20, 2**10
FINGERPRINT = bytes(16)
BATCH = 2048


@dataclass(frozen=True)
class Shape:
    """A block of `spans` pieces of `span_bytes`, each in a region of its own, as layers are."""

    spans: int
    span_bytes: int

    @property
    def block_bytes(self) -> int:
        return self.spans * self.span_bytes

    def __str__(self) -> str:
        size = f"{self.span_bytes // KIB} KiB" if self.span_bytes < MIB else f"{self.span_bytes // MIB} MiB"
        return f"{self.spans} x {size}"


RATED = ((Shape(1, 2 * MIB), 0.95), (Shape(64, 32 * KIB), 0.85), (Shape(1, 256 * KIB), None), (Shape(32, 64 * KIB), None))
CHECKED = (Shape(1, 2 * MIB), Shape(64, 32 * KIB), Shape(1, 64 * KIB), Shape(28, 4 * KIB), Shape(3, 40_008), Shape(61, 1_000))


class Side:
    """An engine over a KV cache in GPU memory: region r holds span r of every block."""

    def __init__(self, cuda: Cuda, shape: Shape, blocks: int, dram_slots: int, file: Path | None, ssd_slots: int = 0) -> None:
        self.cuda, self.shape, self.blocks = cuda, shape, blocks
        self.memory = cuda.alloc(blocks * shape.block_bytes)
        spares = max(16, 64 * MIB // shape.block_bytes)
        self.engine = Engine(EngineOptions(shape.block_bytes, dram_slots, spares, device=cuda.ordinal))
        layer = blocks * shape.span_bytes
        self.engine.bind([[Region(self.memory + i * layer, shape.span_bytes, shape.span_bytes) for i in range(shape.spans)]])
        if file is not None:
            file.write_bytes(pack_superblock(shape.block_bytes, FINGERPRINT, 0, 1, 0, 1))
            self.engine.attach(SlotFiles((str(file),), ssd_slots, FINGERPRINT))

    def fill(self, content: np.ndarray) -> None:
        """content[block, byte of the block]."""
        layers = content.reshape(self.blocks, self.shape.spans, self.shape.span_bytes).transpose(1, 0, 2)
        self.cuda.write(self.memory, np.ascontiguousarray(layers).reshape(-1))

    def content(self) -> np.ndarray:
        layers = self.cuda.read(self.memory, self.blocks * self.shape.block_bytes)
        layers = layers.reshape(self.shape.spans, self.blocks, self.shape.span_bytes).transpose(1, 0, 2)
        return np.ascontiguousarray(layers).reshape(self.blocks, self.shape.block_bytes)

    def run(self, ops: np.ndarray) -> None:
        """Runs operations to their end. Raises OSError if one fails."""
        taken = done = 0
        while done < len(ops):
            taken += self.engine.submit(ops[taken : taken + BATCH])
            self.engine.wait(60)
            completions = self.engine.poll(BATCH)
            failed = completions["status"][completions["status"] != 0]
            if len(failed):
                raise OSError(-int(failed[0]), "an operation failed")
            done += len(completions)

    def close(self) -> None:
        self.engine.close()
        self.cuda.free(self.memory)


def ops_of(kind: OpKind, names: np.ndarray, **columns: np.ndarray | int) -> np.ndarray:
    """`names`: what the blocks are, used as key and generation."""
    ops = np.zeros(len(names), OP_DTYPE)
    ops["kind"], ops["key_len"], ops["generation"] = kind, 8, names
    ops["key"][:, :8] = names.astype("<u8").view(np.uint8).reshape(-1, 8)
    ops["dram_slot"] = ops["ssd_slot"] = NO_SLOT
    for name, column in columns.items():
        ops[name] = column
    return ops


def loads_from_ssd(names: np.ndarray, ssd_slots: np.ndarray, blocks: np.ndarray, dram_slots: np.ndarray | int) -> np.ndarray:
    columns = {"ssd_slot": ssd_slots, "kv_block": blocks, "dram_slot": dram_slots}
    pairs = np.stack([ops_of(OpKind.READ, names, **columns), ops_of(OpKind.COPY_IN, names, **columns)], axis=1)
    pairs["flags"][:, 0] = OpFlag.LINK
    return pairs.reshape(-1)


# -- bytes -----------------------------------------------------------------------------------------------------------


def check_bytes(cuda: Cuda, shape: Shape, folder: Path, random: np.random.Generator) -> int:
    """Sends every block out, on to SSD, and back to another place by each of three ways. Returns blocks compared."""
    blocks = min(96, max(12, 64 * MIB // shape.block_bytes // 3 * 3))
    side = Side(cuda, shape, blocks, blocks, folder / "check.slots", blocks)
    try:
        content = random.integers(0, 256, (blocks, shape.block_bytes), dtype=np.uint8)
        side.fill(content)
        names, slots, ssd_slots = (random.permutation(blocks) for _ in range(3))
        side.run(ops_of(OpKind.COPY_OUT, names, kv_block=np.arange(blocks), dram_slot=slots))
        side.run(ops_of(OpKind.WRITE, names, dram_slot=slots, ssd_slot=ssd_slots))
        side.fill(np.zeros_like(content))
        target = random.permutation(blocks)  # block b comes back as target[b]
        ways = np.array_split(random.permutation(blocks), 3)
        from_dram, by_dram, staged = ways
        side.run(ops_of(OpKind.COPY_IN, names[from_dram], dram_slot=slots[from_dram], kv_block=target[from_dram]))
        side.run(loads_from_ssd(names[staged], ssd_slots[staged], target[staged], NO_SLOT))
        side.run(loads_from_ssd(names[by_dram], ssd_slots[by_dram], target[by_dram], slots[by_dram]))
        found = side.content()[target]
        wrong = np.flatnonzero((found != content).any(axis=1))
        if len(wrong):
            sys.exit(f"WRONG BYTES: {shape}: {len(wrong)} of {blocks} blocks, the first one is {wrong[0]}")
        return blocks
    finally:
        side.close()


# -- rates -----------------------------------------------------------------------------------------------------------


def gb_per_s(nbytes: int, work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return nbytes / (time.perf_counter() - start) / 1e9


def rate_copies(cuda: Cuda, shape: Shape, gib: float, repetitions: int) -> dict[str, list[float]]:
    """GB/s of the engine and of one large pinned copy, in turns; the first turn is not counted."""
    blocks = int(gib * GIB) // shape.block_bytes
    side, numbers = Side(cuda, shape, blocks, blocks, None), np.arange(blocks)
    out = ops_of(OpKind.COPY_OUT, numbers, kv_block=numbers, dram_slot=numbers)
    back = ops_of(OpKind.COPY_IN, numbers, kv_block=numbers, dram_slot=numbers)
    plain = cuda.pinned(min(GIB, blocks * shape.block_bytes))
    turns = {
        "out": (blocks * shape.block_bytes, lambda: side.run(out)),
        "out plain": (plain.nbytes, lambda: plain.copy_from(side.memory)),
        "in": (blocks * shape.block_bytes, lambda: side.run(back)),
        "in plain": (plain.nbytes, lambda: plain.copy_to(side.memory)),
    }
    rates: dict[str, list[float]] = {name: [] for name in turns}
    for turn in range(repetitions + 1):
        for name, (nbytes, work) in turns.items():
            rate = gb_per_s(nbytes, work)
            if turn:
                rates[name].append(rate)
    plain.free()
    side.close()
    return rates


def rate_drive(cuda: Cuda, shape: Shape, folder: Path, gib: float, repetitions: int) -> dict[str, list[float]]:
    blocks = int(gib * GIB) // shape.block_bytes
    side = Side(cuda, shape, blocks, blocks, folder / "drive.slots", blocks)
    numbers = np.arange(blocks)
    random = np.random.default_rng(1)
    side.fill(random.integers(0, 256, (blocks, shape.block_bytes), dtype=np.uint8))
    side.run(ops_of(OpKind.COPY_OUT, numbers, kv_block=numbers, dram_slot=numbers))

    def out() -> None:
        side.run(ops_of(OpKind.COPY_OUT, numbers, kv_block=numbers, dram_slot=numbers))
        side.run(ops_of(OpKind.WRITE, numbers, dram_slot=numbers, ssd_slot=numbers))

    turns = {
        "GPU to DRAM to SSD": out,
        "SSD to DRAM to GPU": lambda: side.run(loads_from_ssd(numbers, numbers, numbers, numbers)),
        "SSD to GPU, DRAM 0": lambda: side.run(loads_from_ssd(numbers, numbers, numbers, NO_SLOT)),
    }
    rates: dict[str, list[float]] = {name: [] for name in turns}
    for turn in range(repetitions + 1):
        for name, work in turns.items():
            rate = gb_per_s(blocks * shape.block_bytes, work)
            if turn:
                rates[name].append(rate)
    side.close()
    return rates


# -- compute ---------------------------------------------------------------------------------------------------------


def product_ms(torch, device: int, seconds: float) -> float:
    """Milliseconds of a matrix product by the GPU's own clock: the mean, since copies may slow down some of them only.

    In a stream of its own. Copies wait for what was in the default stream when they were submitted, so that they would run
    in turns with products there, not beside them.
    """
    size, products, spent_ms, count = 8192, 50, 0.0, 0
    with torch.cuda.stream(torch.cuda.Stream(device)):
        left, right = (torch.randn(size, size, device=f"cuda:{device}", dtype=torch.bfloat16) for _ in range(2))
        product, end = torch.empty_like(left), time.monotonic() + seconds
        while time.monotonic() < end:
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            for _ in range(products):
                torch.matmul(left, right, out=product)
            last.record()
            last.synchronize()
            spent_ms += first.elapsed_time(last)
            count += products
    return spent_ms / count


def slowdown(cuda: Cuda, shape: Shape, gib: float, seconds: float, repetitions: int) -> dict[str, list[float]]:
    """Milliseconds of a product, alone and beside copies at full rate in both directions, and their GB/s."""
    import torch

    blocks = int(gib * GIB) // shape.block_bytes
    side, numbers = Side(cuda, shape, blocks, blocks, None), np.arange(blocks)
    side.run(ops_of(OpKind.COPY_OUT, numbers, kv_block=numbers, dram_slot=numbers))
    half = blocks // 2
    both = np.concatenate(
        [
            ops_of(OpKind.COPY_OUT, numbers[:half], kv_block=numbers[:half], dram_slot=numbers[:half]),
            ops_of(OpKind.COPY_IN, numbers[half:], kv_block=numbers[half:], dram_slot=numbers[half:]),
        ]
    )
    stop = threading.Event()
    found: dict[str, list[float]] = {"alone": [], "beside copies": [], "copied GB/s": []}

    def copy() -> None:
        start, copied = time.perf_counter(), 0
        while not stop.is_set():
            side.run(both)
            copied += blocks * shape.block_bytes
        found["copied GB/s"].append(copied / (time.perf_counter() - start) / 1e9)

    product_ms(torch, cuda.ordinal, seconds)  # clocks and libraries warm up
    for _ in range(repetitions):
        found["alone"].append(product_ms(torch, cuda.ordinal, seconds))
        stop.clear()
        copier = threading.Thread(target=copy)
        copier.start()
        found["beside copies"].append(product_ms(torch, cuda.ordinal, seconds))
        stop.set()
        copier.join()
    side.close()
    return found


# -- the program -----------------------------------------------------------------------------------------------------


def cell(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} .. {max(values):.2f})"


def copy_rows(shape: Shape, goal: float | None, rates: dict[str, list[float]]) -> Iterator[str]:
    for way, name in (("out", "GPU to DRAM"), ("in", "DRAM to GPU")):
        ratio = statistics.median(rates[way]) / statistics.median(rates[f"{way} plain"])
        verdict = "" if goal is None else f"{goal:.2f}: {'met' if ratio >= goal else '**not met**'}"
        yield f"| {name} | {shape} | {cell(rates[way])} | {cell(rates[f'{way} plain'])} | {ratio:.3f} | {verdict} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("build/bench_gpu"))
    parser.add_argument("--gib", type=float, default=2.0)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=1.0, help="of products, alone and beside copies, each repetition")
    parser.add_argument("--device", type=int, default=0)
    parser.add_argument("--seed", type=int, default=time.time_ns() % 2**32)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, object] = {"seed": arguments.seed}
    try:
        with Cuda(arguments.device) as cuda:
            print(f"{cuda.name}, driver {cuda.driver}; seed {arguments.seed}")
            measure(cuda, arguments, found)
    finally:
        shutil.rmtree(arguments.folder)
    target = Path("build/bench_gpu.json")
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(found, indent=2) + "\n")


def measure(cuda: Cuda, arguments: argparse.Namespace, found: dict[str, object]) -> None:
    random = np.random.default_rng(arguments.seed)
    for shape in CHECKED:
        print(f"bytes: {shape}: {check_bytes(cuda, shape, arguments.folder, random)} blocks by every way, all right")
    print("\n| copies | block | engine GB/s | one pinned copy GB/s | ratio | goal |\n|---|---|---:|---:|---:|---|")
    for shape, goal in RATED:
        rates = rate_copies(cuda, shape, arguments.gib, arguments.repetitions)
        found[f"copies {shape}"] = rates
        print("\n".join(copy_rows(shape, goal, rates)))
    print("\n| drive | block | GB/s |\n|---|---|---:|")
    for shape, _ in RATED[:2]:
        rates = rate_drive(cuda, shape, arguments.folder, arguments.gib, arguments.repetitions)
        found[f"drive {shape}"] = rates
        print("\n".join(f"| {name} | {shape} | {cell(values)} |" for name, values in rates.items()))
    if not cuda.has_torch():
        print("\ncompute: left out, there is no torch with CUDA")
        return
    head = "| compute | block | product alone ms | beside copies ms | slowdown | goal | copied GB/s |"
    print(f"\n{head}\n|---|---|---:|---:|---:|---|---:|")
    for shape, _ in RATED[:2]:
        times = slowdown(cuda, shape, arguments.gib, arguments.seconds, arguments.repetitions)
        found[f"compute {shape}"] = times
        alone, beside, copied = (cell(times[name]) for name in ("alone", "beside copies", "copied GB/s"))
        ratio = statistics.median(times["beside copies"]) / statistics.median(times["alone"]) - 1
        verdict = f"2 %: {'met' if ratio <= 0.02 else '**not met**'}"
        print(f"| 8192^3 bf16 | {shape} | {alone} | {beside} | {ratio:.1%} | {verdict} | {copied} |")


if __name__ == "__main__":
    main()
