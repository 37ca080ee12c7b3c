"""What bench_load_or_recompute found: JSON, Markdown, a heat map, and the cells that lose."""

import json
import math
import random
import statistics
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure

from benchmarks.resampling import likely

WITHOUT, ALWAYS, RECOMPUTES, DECIDES = "without", "always loads", "told to recompute", "decides"
NAMES = (WITHOUT, ALWAYS, RECOMPUTES, DECIDES)
GOAL = 1.05  # of the time without kvoffload
NAME = "bench_load_or_recompute"


@dataclass
class Cell:
    speed: str
    tokens: int
    hit: int  # percent
    ttft_s: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in NAMES})
    probes: int = 0  # of the prompts left to decide about

    def median(self, name: str) -> float:
        return statistics.median(self.ttft_s[name])

    def ratio(self, name: str, to: str = WITHOUT) -> float:
        """Of medians."""
        return self.median(name) / self.median(to)

    def drawn(self, name: str, rng: random.Random) -> float:
        """The median of as many prompts, drawn from them with replacement."""
        return statistics.median(rng.choices(self.ttft_s[name], k=len(self.ttft_s[name])))

    @cached_property
    def likely(self) -> tuple[float, float]:
        """What the ratio to the time without would be if it were measured again."""
        return likely(lambda rng: self.drawn(DECIDES, rng) / self.drawn(WITHOUT, rng))

    @property
    def within_noise(self) -> bool:
        """Measured again it may well meet the goal, and some prompt without kvoffload took as long. Of the two, the first asks more
        the more prompts there are, the second the fewer."""
        return self.likely[0] <= GOAL and self.median(DECIDES) <= max(self.ttft_s[WITHOUT])

    @property
    def against_better(self) -> float:
        return self.median(DECIDES) / min(self.median(WITHOUT), self.median(ALWAYS))

    @property
    def verdict(self) -> str:
        probed = f" ({self.probes} of {len(self.ttft_s[DECIDES])} probed)" if self.probes else ""
        if self.ratio(DECIDES) <= GOAL:
            return "met" + probed
        return ("within noise" if self.within_noise else "**not met**") + probed

    def summary(self) -> dict[str, object]:
        figures = {name: {"median": self.median(name), "all": values} for name, values in self.ttft_s.items()}
        ratios = {
            "decides_to_without": self.ratio(DECIDES),
            "decides_to_recompute": self.ratio(DECIDES, RECOMPUTES),
            "decides_to_better": self.against_better,
            "decides_to_without_likely": self.likely,
        }
        return {"speed": self.speed, "tokens": self.tokens, "hit": self.hit, "ttft_s": figures, "verdict": self.verdict} | ratios


def spread(values: list[float]) -> str:
    return f"{1e3 * statistics.median(values):.0f} ({1e3 * min(values):.0f}..{1e3 * max(values):.0f})"


def markdown(cells: list[Cell], notes: dict[str, object]) -> str:
    before, after = notes["load_average"]
    lines = [
        f"{notes['cores']} cores, Linux {notes['kernel']}, load average {before:.1f} before and {after:.1f} after; a block read "
        f"alone takes {notes['block_read_ms']:.2f} ms; {notes['rounds']} rounds in {notes['minutes']:.0f} minutes; seed "
        f"{notes['seed']}.",
        "",
        f"| drive | tokens | hit % | {', ms | '.join(NAMES)}, ms | decides / without | decides / told to | decides / better | |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    for cell in cells:
        times = " | ".join(spread(cell.ttft_s[name]) for name in NAMES)
        ratios = [cell.ratio(DECIDES), cell.ratio(DECIDES, RECOMPUTES), cell.against_better]
        ratio, *others = (f"{ratio:.2f}" for ratio in ratios)
        shown = " | ".join([f"{ratio} ({cell.likely[0]:.2f}..{cell.likely[1]:.2f})", *others])
        lines.append(f"| {cell.speed} | {cell.tokens} | {cell.hit} | {times} | {shown} | {cell.verdict} |")
    lines += ["", "All prompts of a drive's speed together, learning included, as a multiple of the time without kvoffload:", ""]
    lines += [f"| drive | {ALWAYS} | {RECOMPUTES} | {DECIDES} | decisions |", "|---|---:|---:|---:|---|"]
    for speed in dict.fromkeys(cell.speed for cell in cells):
        of = [cell for cell in cells if cell.speed == speed]
        total = {name: sum(statistics.mean(cell.ttft_s[name]) for cell in of) for name in NAMES}
        decided = "; ".join(f"{name}: {count:.0f}" for name, count in notes["decisions"][speed].items())
        ratios = " | ".join(f"{total[name] / total[WITHOUT]:.2f}" for name in NAMES[1:])
        lines.append(f"| {speed} | {ratios} | {decided} |")
    return "\n".join(lines) + "\n"


def picture(cells: list[Cell], path: Path) -> None:
    rows = list(dict.fromkeys((cell.speed, cell.hit) for cell in cells))
    columns = sorted({cell.tokens for cell in cells})
    by_place = {(cell.speed, cell.hit, cell.tokens): cell for cell in cells}
    figure = Figure(figsize=(9, 1.6 + 0.42 * len(rows)), layout="constrained")
    for axes, name in zip(figure.subplots(1, 2, sharey=True), (ALWAYS, DECIDES), strict=True):
        ratios = [[by_place[speed, hit, tokens].ratio(name) for tokens in columns] for speed, hit in rows]
        shown = [[max(-3.0, min(3.0, math.log2(ratio))) for ratio in row] for row in ratios]
        axes.imshow(shown, cmap="RdYlGn_r", norm=TwoSlopeNorm(0, -3, 3), aspect="auto")
        axes.set_xticks(range(len(columns)), [str(tokens) for tokens in columns])
        axes.set_yticks(range(len(rows)), [f"{speed}, {hit} %" for speed, hit in rows])
        axes.set_xlabel("tokens of the prompt")
        axes.set_title(name)
        for y, row in enumerate(ratios):
            for x, ratio in enumerate(row):
                axes.text(x, y, f"{ratio:.2f}", ha="center", va="center", fontsize=9)
    figure.suptitle("Median time to first token, over that without kvoffload", fontsize=11)
    figure.supylabel("speed of the drive, share of the prompt on it", fontsize=10)
    figure.savefig(path, dpi=110)


def write(folder: Path, cells: list[Cell], notes: dict[str, object]) -> str:
    """Returns the Markdown."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{NAME}.json").write_text(json.dumps(notes | {"cells": [cell.summary() for cell in cells]}, indent=1) + "\n")
    text = markdown(cells, notes)
    (folder / f"{NAME}.md").write_text(text)
    picture(cells, folder / f"{NAME}.png")
    return text
