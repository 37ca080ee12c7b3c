"""What bench_policies found as Markdown: what the default loses, what it gains of what is left to gain, what budgets cost."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from kvoffload.cli.simulate import CLAIRVOYANT, SHARES
from kvoffload.policy import DEFAULT, POLICIES

CLOSE = 0.3  # points, of which 100 are all that was asked for
GAP_SHARES = (5, 10, 25)  # percent of a trace's blocks, at which the bound is looked at
GAP_GOAL = 20  # percent of the gap to it
BUDGET_GOAL = 10  # percent of the hit rate that a budget may cost
LEADING = ("all", "budget 25", "budget 50", "second-touch", "knowing")
Rates = Mapping[str, Sequence[float]]


def ahead(rates: Rates, policy: str, place: int) -> tuple[float, str]:
    """Points by which the policy is better than the best of the others, and which that is."""
    best = max((other for other in POLICIES if other != policy), key=lambda other: rates[other][place])
    return 100 * (rates[policy][place] - rates[best][place]), best


def closed(rates: Rates, place: int) -> float | None:
    """Percent of the gap between the best of the simple policies and the bound; None if there is none."""
    points, best = ahead(rates, DEFAULT, place)
    gap = rates[CLAIRVOYANT][place] - rates[best][place]
    return points / gap if gap > 0 else None


def table(heads: Iterable[object], numbers_from: int, rows: Iterable[Iterable[object]]) -> str:
    heads = list(heads)
    ruler = "|" + "".join("---|" if column < numbers_from else "---:|" for column in range(len(heads)))
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in [heads, *rows]]
    return "\n".join([lines[0], ruler, *lines[1:]]) + "\n"


def rates_table(rates: Rates) -> str:
    names = [*(policy for policy in POLICIES if policy != DEFAULT), DEFAULT, CLAIRVOYANT]
    return table(["policy", *SHARES], 1, ([name, *(f"{rate:.3f}" for rate in rates[name])] for name in names))


def loss_cell(rates: Rates, place: int) -> str:
    points, best = ahead(rates, DEFAULT, place)
    shown = f"{points:+.1f} {best}"
    return shown if points >= -CLOSE else f"**{shown}**"


def loss_table(sweeps: Mapping[str, Any]) -> str:
    rows = []
    for name, swept in sweeps.items():
        rates = swept["rates"]
        gaps = [closed(rates, SHARES.index(share)) for share in GAP_SHARES]
        shown = ["" if gap is None else f"{gap:.0f} %" for gap in gaps]
        rows.append([name, swept["blocks"], swept["uses"], *(loss_cell(rates, place) for place in range(len(SHARES))), *shown])
    return table(["trace", "blocks", "used", *SHARES, *(f"gap at {share}" for share in GAP_SHARES)], 1, rows)


def cells_of(sweeps: Mapping[str, Any], policy: str) -> list[tuple[float, str, int]]:
    """Points by which the policy is better than the best of the others, with the trace and the share of its blocks."""
    return [
        (ahead(swept["rates"], policy, place)[0], name, share)
        for name, swept in sweeps.items()
        for place, share in enumerate(SHARES)
    ]


def within(cells: Sequence[tuple[float, str, int]]) -> str:
    """In how many cells the policy is close to the best of the others, or better."""
    return f"{sum(points >= -CLOSE for points, _, _ in cells)} of {len(cells)}"


def policies_table(sweeps: Mapping[str, Any]) -> str:
    rows = []
    for policy in POLICIES:
        cells = cells_of(sweeps, policy)
        points, name, share = min(cells)
        rows.append([policy, within(cells), f"{-min(points, 0):.1f}", f"{name}, {share} %"])
    return table(["policy", f"within {CLOSE} points", "worst loss", "where"], 1, rows)


def goals(sweeps: Mapping[str, Any], budgets: Sequence[Any]) -> str:
    gaps = [closed(swept["rates"], SHARES.index(share)) for swept in sweeps.values() for share in GAP_SHARES]
    closes = [gap >= GAP_GOAL for gap in gaps if gap is not None]
    keeps = [relative(cell, "budget 25") >= -BUDGET_GOAL for cell in budgets]
    rows = [
        [f"{DEFAULT} no worse than the best of the others by more than {CLOSE} points", within(cells_of(sweeps, DEFAULT))],
        [f"closes {GAP_GOAL} % of the gap between the best of the others and the bound", f"{sum(closes)} of {len(closes)}"],
        [f"a budget of 25 % of the writes costs {BUDGET_GOAL} % of the hit rate at most", f"{sum(keeps)} of {len(keeps)}"],
    ]
    return table(["goal", "met in cells"], 1, rows)


def relative(cell: Any, kind: str) -> float:
    """Percent by which the hit rate differs from admit-all's."""
    everything = cell["rates"]["all"]
    return 100 * (cell["rates"][kind] / everything - 1) if everything else 0.0


def budget_table(budgets: Sequence[Any]) -> str:
    rows = []
    for cell in budgets:
        row = [cell["trace"], cell["ssd"], cell["dram"], f"{cell['turnovers']:.0f}", f"{cell['rates']['all']:.3f}"]
        for kind in LEADING[1:]:
            percent = relative(cell, kind)
            shown = f"{percent:+.0f} %" if percent >= -BUDGET_GOAL else f"**{percent:+.0f} %**"
            row += [f"{cell['rates'][kind]:.3f} {shown}"]
        rows.append([*row, f"{100 * cell['writes']['second-touch']:.0f} %"])
    heads = ["trace", "SSD", "DRAM", "turnovers", "admit-all", "budget 25 %", "budget 50 %", "second-touch", "knowing, 25 %"]
    return table([*heads, "second-touch writes"], 1, rows)


def report(sweeps: Mapping[str, Any], budgets: Sequence[Any], given: Sequence[str]) -> str:
    title = "prefix-hit rate by the SSD tier's size in percent of its blocks"
    parts = [(f"{name}: {title}", rates_table(sweeps[name]["rates"])) for name in given]
    parts += [
        (f"{DEFAULT} against the best of the others in points, and how much of the gap to the bound it closes", loss_table(sweeps)),
        ("Each policy against the best of the others", policies_table(sweeps)),
        ("Write budgets", budget_table(budgets)),
        ("Goals", goals(sweeps, budgets)),
    ]
    return "\n".join(f"{title}:\n\n{found}" for title, found in parts)
