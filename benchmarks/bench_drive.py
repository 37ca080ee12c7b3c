"""kvoffload's data path against the drive's ceiling and against what one would use instead, side by side in one run.

Random slots of five sizes are written and read by fio (the ceiling), kvoffload's engines, vLLM's file-system tier and a
plain loop, in turns; then on tmpfs, where there is no drive, once more. docs/benchmarks.md says how to read the result.

    python -m benchmarks.bench_drive [--folder PATH] [--gib 1] [--repetitions 5] [--without-fio] ...
"""

import argparse
import contextlib
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

import numpy as np
from rich.console import Console

from benchmarks import report
from benchmarks.report import Cell
from benchmarks.rows import fio
from benchmarks.rows.base import Place, Row, RowError, Sample, make_file, settle
from benchmarks.rows.loop import LoopRow
from benchmarks.rows.reference import ReferenceRow
from benchmarks.rows.vllm_fs import VllmFsRow
from kvoffload.cli.passes import EngineRow

SIZES_KIB = (64, 512, 2048, 4096, 16384)
CHECKED_SLOTS = 16
DIRECTIONS = ("write", "read")
PASS_S = {"drive": 0.75, "tmpfs": 0.9}  # of one row over one GiB with what surrounds it, for the estimate
SIZE_S = 4.0  # making files, filling buffers, fio's trials

FIO, FIO_ALL = "fio", "fio, buffers as many as ours"
ENGINE, THREADS, REFERENCE = "kvoffload io_uring", "kvoffload threads", "kvoffload reference"
VLLM, LOOP = "vLLM fs tier", "pread/pwrite loop"


@dataclass
class Bench:
    """One run: what was asked for, and the cells so far."""

    arguments: argparse.Namespace
    console: Console
    cells: list[Cell] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)

    def rows(self, medium: str) -> list[Row]:
        rows: list[Row] = [] if self.arguments.without_fio else [fio.FioRow(FIO)]
        rows += [EngineRow(ENGINE, "io_uring"), EngineRow(THREADS, "threads")]
        if medium == "drive":
            rows[1:1] = [] if self.arguments.without_fio else [fio.FioRow(FIO_ALL, all_buffers=True)]
            rows.append(ReferenceRow(REFERENCE))
        return [*rows, VllmFsRow(VLLM), LoopRow(LOOP)]

    def media(self) -> list[tuple[str, Path, float]]:
        """Name, folder, GiB a pass."""
        arguments = self.arguments
        media = [("drive", arguments.folder, arguments.gib)]
        if not arguments.without_tmpfs:
            media.append(("tmpfs", arguments.tmpfs / f"kvoffload-benchmark-{os.getpid()}", arguments.tmpfs_gib))
        return media

    def estimate_s(self) -> float:
        passes = len(DIRECTIONS) * (self.arguments.repetitions + 1)
        seconds = [PASS_S[medium] * gib * passes * len(self.rows(medium)) + SIZE_S for medium, _, gib in self.media()]
        return sum(seconds) * len(self.arguments.sizes)

    def run(self) -> None:
        for medium, folder, gib in self.media():
            for size in self.arguments.sizes:
                slots = int(gib * 2**30) // (size << 10)
                if slots < 2:
                    raise RowError(f"{gib} GiB are not two slots of {size} KiB: ask for more")
                with emptied(folder):
                    if medium == "drive" and not takes_direct(folder):
                        raise RowError(f"{folder} refuses O_DIRECT: give --folder on a drive that takes it")
                    place = Place(folder.resolve(), medium, size << 10, slots, self.arguments.memory_mib << 20)
                    self.measure(place, self.rows(medium))

    def measure(self, place: Place, rows: list[Row]) -> None:
        make_file(place)
        with contextlib.ExitStack() as stack:
            for row in rows:
                stack.callback(row.close)
                row.prepare(place)
            samples, checked = self.turns(place, rows)
            for row in rows:
                notes = [note.replace(f"{place.folder}/", "") for note in row.notes()]
                for direction in DIRECTIONS:
                    warm_up, *counted = samples[direction][row.name]
                    where = (place.medium, place.slot_bytes, direction)
                    self.cells.append(Cell(*where, row.name, warm_up, counted, checked[row.name], notes))

    def turns(self, place: Place, rows: list[Row]) -> tuple[dict[str, dict[str, list[Sample]]], dict[str, int]]:
        """Samples by direction and row, and how many slots of each row were compared at last."""
        samples: dict[str, dict[str, list[Sample]]] = {direction: {row.name: [] for row in rows} for direction in DIRECTIONS}
        checked = {}
        for turn in range(self.arguments.repetitions + 1):
            first = turn % len(rows)
            for row in rows[first:] + rows[:first]:
                for direction in DIRECTIONS:
                    order = np.random.default_rng([turn, direction == "read"]).permutation(place.slots)
                    settle(place.folder)
                    samples[direction][row.name].append(getattr(row, direction)(order))
                if turn == self.arguments.repetitions:
                    checked[row.name] = row.check(order[:CHECKED_SLOTS].tolist())
        for direction in DIRECTIONS:
            self.tell(place, direction, samples[direction])
        return samples, checked

    def tell(self, place: Place, direction: str, samples: dict[str, list[Sample]]) -> None:
        rates = {name: np.median([sample.gb_per_s for sample in taken[1:]]) for name, taken in samples.items()}
        figures = ", ".join(f"{name} {rate:.2f}" for name, rate in rates.items())
        minutes, seconds = divmod(int(time.monotonic() - self.started), 60)
        size = report.size_name(place.slot_bytes)
        self.console.print(f"{minutes:2}:{seconds:02} {place.medium} {size} {direction}, GB/s: {figures}", highlight=False)


@contextlib.contextmanager
def emptied(folder: Path) -> Iterator[None]:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield
    finally:
        shutil.rmtree(folder)


def takes_direct(folder: Path) -> bool:
    """Whether a file in the folder can be opened for direct I/O."""
    try:
        os.close(os.open(folder / "probe", os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o600))
    except OSError:
        return False
    return True


def machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), platform.machine())
    return f"{os.cpu_count()} processors ({model}), Linux {platform.release()}, {date.today()}"


def parsed(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("build/bench_drive"), help="on the drive; emptied and removed")
    parser.add_argument("--tmpfs", type=Path, default=Path("/dev/shm"), help="a tmpfs; a folder of its own is made there")
    parser.add_argument("--output", type=Path, default=Path("build"), help="gets bench_drive.json, .md and .png")
    parser.add_argument("--gib", type=float, default=1.0, help="a pass of one row moves on the drive")
    parser.add_argument("--tmpfs-gib", type=float, default=0.5, help="a pass of one row moves on tmpfs")
    parser.add_argument("--repetitions", type=int, default=5, help="counted ones; one before them is not")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES_KIB, metavar="KIB", help="of a slot")
    parser.add_argument("--memory-mib", type=int, default=256, help="buffers of each row")
    parser.add_argument("--without-fio", action="store_true")
    parser.add_argument("--without-tmpfs", action="store_true")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    arguments = parsed(argv)
    if not arguments.without_fio and not fio.is_installed():
        print("fio, the ceiling of this benchmark, is missing: apt-get install fio, or --without-fio", file=sys.stderr)
        return 1
    console = Console(soft_wrap=True)
    bench = Bench(arguments, console)
    console.print(f"{machine()}; this takes about {max(1, round(bench.estimate_s() / 60))} minutes", highlight=False)
    try:
        bench.run()
    except RowError as error:
        print(error, file=sys.stderr)
        return 1
    names = report.Names(FIO, FIO_ALL, ENGINE, THREADS, VLLM)
    report.write(arguments.output, bench.cells, names, machine(), vars(arguments))
    print((arguments.output / "bench_drive.md").read_text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
