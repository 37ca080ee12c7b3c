"""What the drive benchmark found: JSON, Markdown, a picture, and a verdict on every goal."""

import json
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from matplotlib.figure import Figure

from benchmarks.rows.base import PAGE, Sample

KIB, MIB = 2**10, 2**20
MEASURES = ("gb_per_s", "cpu_s_per_gib", "p50_ms", "p99_ms")


@dataclass(frozen=True)
class Cell:
    medium: str
    slot_bytes: int
    direction: str
    row: str
    warm_up: Sample
    samples: list[Sample]
    checked_slots: int
    notes: list[str]

    def values(self, measure: str) -> list[float]:
        return [getattr(sample, measure) for sample in self.samples]

    def median(self, measure: str) -> float:
        return statistics.median(self.values(measure))

    def summary(self) -> dict[str, object]:
        measured = {
            measure: {"median": self.median(measure), "min": min(values), "max": max(values), "all": values}
            for measure in MEASURES
            for values in [self.values(measure)]
        }
        kept = {name: value for name, value in asdict(self).items() if name not in ("samples", "warm_up")}
        return kept | {"bytes": self.samples[0].nbytes, "warm_up_gb_per_s": self.warm_up.gb_per_s} | measured


@dataclass(frozen=True)
class Names:
    """Of the rows that goals are about."""

    fio: str
    fio_all: str  # with as many buffers as the other rows
    engine: str
    threads: str
    vllm: str


@dataclass(frozen=True)
class Verdict:
    goal: str
    medium: str
    slot_bytes: int
    direction: str
    figure: float
    bound: float
    at_least: bool

    @property
    def is_met(self) -> bool:
        return self.figure >= self.bound if self.at_least else self.figure <= self.bound


def size_name(nbytes: int) -> str:
    return f"{nbytes // MIB} MiB" if nbytes >= MIB else f"{nbytes // KIB} KiB"


class Table:
    """The cells by medium, size, direction and row."""

    def __init__(self, cells: list[Cell]) -> None:
        self.cells = {(cell.medium, cell.slot_bytes, cell.direction, cell.row): cell for cell in cells}
        self.media = list(dict.fromkeys(cell.medium for cell in cells))
        self.sizes = sorted({cell.slot_bytes for cell in cells})
        self.rows = list(dict.fromkeys(cell.row for cell in cells))

    def ratio(self, measure: str, medium: str, size: int, direction: str, rows: tuple[str, str]) -> float | None:
        """Of medians; None where one of the two was not measured."""
        pair = [self.cells.get((medium, size, direction, row)) for row in rows]
        if None in pair or pair[1].median(measure) == 0:
            return None
        return pair[0].median(measure) / pair[1].median(measure)

    def verdicts(self, names: Names) -> list[Verdict]:
        found = []

        def hold(goal: str, measure: str, where: tuple[str, int, str], rows: tuple[str, str], bound: float, least=True) -> None:
            figure = self.ratio(measure, *where, rows)
            if figure is not None:
                found.append(Verdict(goal, *where, figure, bound, least))

        rate, cpu = "gb_per_s", "cpu_s_per_gib"
        for size in self.sizes:
            for direction in ("write", "read"):
                where = ("drive", size, direction)
                against_vllm, small = (names.engine, names.vllm), size < 512 * KIB
                for other in (names.fio, names.fio_all):
                    hold(f"GB/s of {other}", rate, where, (names.engine, other), 0.85 if small else 0.95)
                bound = 1.0 if direction == "read" else 2.5 if small else 1.5
                hold("GB/s of vLLM's fs tier", rate, where, against_vllm, bound)
                hold("CPU of vLLM's fs tier", cpu, where, against_vllm, 0.5 if size < 2 * MIB else 1.0, least=False)
                if not small:
                    hold("threads, GB/s of io_uring", rate, where, (names.threads, names.engine), 0.8)
        for direction, bound in (("write", 2.0), ("read", 1.3)):
            hold("GB/s of vLLM's fs tier", rate, ("tmpfs", 2 * MIB, direction), (names.engine, names.vllm), bound)
        return sorted(found, key=lambda verdict: (verdict.medium, verdict.goal, verdict.direction != "write", verdict.slot_bytes))


def ranged(cell: Cell) -> str:
    rates = cell.values("gb_per_s")
    return f"{cell.median('gb_per_s'):.2f} ({min(rates):.2f}..{max(rates):.2f})"


def latency(cell: Cell) -> str:
    return f"{cell.median('p50_ms'):.3g} / {cell.median('p99_ms'):.3g}"


def grid(table: Table, medium: str, text: Callable[[Cell], str]) -> list[str]:
    lines = ["| | | " + " | ".join(size_name(size) for size in table.sizes) + " |", "|---|---|" + "---:|" * len(table.sizes)]
    for direction in ("write", "read"):
        for row in table.rows:
            cells = [table.cells.get((medium, size, direction, row)) for size in table.sizes]
            if any(cells):
                lines.append(f"| {direction} | {row} | " + " | ".join(text(cell) if cell else "" for cell in cells) + " |")
    return [*lines, ""]


def ratios(table: Table, names: Names) -> list[str]:
    lines = ["| | of | " + " | ".join(size_name(size) for size in table.sizes) + " |", "|---|---|" + "---:|" * len(table.sizes)]
    for medium in table.media:
        for direction in ("write", "read"):
            for other in (names.fio, names.fio_all, names.vllm):
                if not any((medium, size, direction, other) in table.cells for size in table.sizes):
                    continue
                figures = [
                    tuple(
                        table.ratio(measure, medium, size, direction, (names.engine, other))
                        for measure in ("gb_per_s", "cpu_s_per_gib")
                    )
                    for size in table.sizes
                ]
                texts = [" / ".join("-" if one is None else f"{one:.2f}" for one in pair) for pair in figures]
                lines.append(f"| {medium}, {direction} | {other} | " + " | ".join(texts) + " |")
    return [*lines, ""]


def notes(table: Table, medium: str) -> list[str]:
    """What the rows say of themselves; a note that does not hold for every size with those it holds for."""
    lines = []
    for row in table.rows:
        sizes: dict[str, list[str]] = {}
        for size in table.sizes:
            cell = table.cells.get((medium, size, "write", row))
            for note in cell.notes if cell else []:
                sizes.setdefault(note, []).append(size_name(size))
        said = [note if len(where) == len(table.sizes) else f"{note} ({', '.join(where)})" for note, where in sizes.items()]
        lines += [f"- {row}: {'; '.join(said)}"] if said else []
    return [*lines, ""]


def markdown(table: Table, names: Names, machine: str, settings: dict[str, object]) -> str:
    lines = [f"{machine}. Medians of {settings['repetitions']} interleaved passes.", ""]
    for medium in table.media:
        gib = settings["gib" if medium == "drive" else "tmpfs_gib"]
        lines += [f"### {medium}, {gib:g} GiB a pass", "", "GB/s (least..most):", "", *grid(table, medium, ranged)]
        lines += ["CPU seconds per GiB:", "", *grid(table, medium, lambda cell: f"{cell.median('cpu_s_per_gib'):.3f}")]
        lines += ["Latency, p50 / p99 in ms:", "", *grid(table, medium, latency), *notes(table, medium)]
    lines += [f"### {names.engine}, GB/s / CPU per GiB relative to", "", *ratios(table, names)]
    lines += ["### Goals", "", "| | where | goal | found | |", "|---|---|---:|---:|---|"]
    for verdict in table.verdicts(names):
        where = f"{verdict.medium}, {verdict.direction}, {size_name(verdict.slot_bytes)}"
        bound = f"{'at least' if verdict.at_least else 'at most'} {verdict.bound:g}"
        outcome = "met" if verdict.is_met else "**not met**"
        lines.append(f"| {verdict.goal} | {where} | {bound} | {verdict.figure:.2f} | {outcome} |")
    return "\n".join(lines) + "\n"


def picture(table: Table, path: Path) -> None:
    columns = [(medium, direction) for medium in table.media for direction in ("write", "read")]
    figure = Figure(figsize=(4.2 * len(columns), 7.5))
    axes = figure.subplots(2, len(columns), sharex=True, squeeze=False)
    names = [size_name(size) for size in table.sizes]
    for column, (medium, direction) in enumerate(columns):
        for line, measure in enumerate(("gb_per_s", "cpu_s_per_gib")):
            axis = axes[line][column]
            for number, row in enumerate(table.rows):
                cells = [table.cells.get((medium, size, direction, row)) for size in table.sizes]
                if all(cells):
                    values = [cell.median(measure) for cell in cells]
                    axis.plot(names, values, "o-", color=f"C{number}", label=row, markersize=4)
                    if measure == "gb_per_s":
                        ends = [[end(cell.values(measure)) for cell in cells] for end in (min, max)]
                        axis.fill_between(names, *ends, color=f"C{number}", alpha=0.12)
            axis.grid(alpha=0.3)
            axis.set_title(f"{medium}, {direction}" if line == 0 else "")
            axis.set_ylabel(("GB/s", "CPU s/GiB")[line] if column == 0 else "")
            if measure == "gb_per_s":
                axis.set_ylim(bottom=0)
            else:
                axis.set_yscale("log")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=len(labels), frameon=False)
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    figure.savefig(path, dpi=110)


def write(folder: Path, cells: list[Cell], names: Names, machine: str, settings: dict[str, object]) -> None:
    table = Table(cells)
    verdicts = [asdict(verdict) | {"is_met": verdict.is_met} for verdict in table.verdicts(names)]
    payload = {size: (size - PAGE) / size for size in table.sizes}
    folder.mkdir(parents=True, exist_ok=True)
    result = {"machine": machine, "settings": settings, "payload_share": payload, "verdicts": verdicts}
    result["cells"] = [cell.summary() for cell in cells]
    (folder / "bench_drive.json").write_text(json.dumps(result, indent=1, default=str) + "\n")
    (folder / "bench_drive.md").write_text(markdown(table, names, machine, settings))
    picture(table, folder / "bench_drive.png")
