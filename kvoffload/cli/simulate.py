"""`kvoffload simulate`: what tiers of a given size would have saved on a trace, for one policy or for all."""

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from kvoffload.cli.clairvoyant import clairvoyant_hits
from kvoffload.cli.replay import Replay, Result
from kvoffload.cli.traces import Trace, read
from kvoffload.config import Admissions
from kvoffload.errors import UserError
from kvoffload.policy import DEFAULT, POLICIES
from kvoffload.types import Tier

GB = 10**9
GB_MAX = 10**9  # an exabyte
SHARES = (1, 5, 10, 25, 50)  # percent of a trace's different blocks, for a sweep
CLAIRVOYANT = "clairvoyant"


def simulate(
    trace: Annotated[Path, typer.Option(metavar="FILE", help="JSON lines as of Mooncake or Bailian.")],
    dram_gb: Annotated[float, typer.Option(metavar="GB", help="The DRAM tier.")] = 0,
    ssd_gb: Annotated[float, typer.Option(metavar="GB", help="The SSD tier.")] = 0,
    policy: Annotated[str, typer.Option(metavar="NAME", help=f"Which block leaves first: {', '.join(POLICIES)}.")] = DEFAULT,
    ssd_admission: Annotated[Admissions, typer.Option(metavar="WHICH", help="To the SSD: all, or second-touch.")] = "all",
    ssd_write_gb_per_day: Annotated[
        float | None, typer.Option(metavar="GB", help="Budget of writes, on the trace's clock.")
    ] = None,
    kv_bytes_per_token: Annotated[
        int, typer.Option(metavar="BYTES", help="The default is an 8B model's in 16 bits.")
    ] = 131072,
    limit: Annotated[int | None, typer.Option(metavar="COUNT", help="Only the first requests of the trace.")] = None,
    sweep: Annotated[
        bool, typer.Option("--sweep", metavar="", help="All policies, SSDs of 1 to 50 % of its blocks.")
    ] = False,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Where a sweep draws curves (.png, .svg, .pdf).")] = None,
) -> None:
    """Replays a trace through the block manager, and reports hits and bytes written. No data is moved.

    Example: kvoffload simulate --trace requests.jsonl --dram-gb 32 --ssd-gb 500

    Exit code: 0; 2 for a mistake in the call or the trace.
    """
    for size in (dram_gb, ssd_gb, ssd_write_gb_per_day or 0):
        if not 0 <= size <= GB_MAX:
            raise UserError(f"{size:g} GB is no size of a tier or a budget; give 0 to {GB_MAX:g}")
    if ssd_write_gb_per_day == 0:
        raise UserError("--ssd-write-gb-per-day 0 writes nothing; give more, or leave --ssd-gb out")
    if not 1 <= kv_bytes_per_token <= GB or (limit is not None and limit < 1):
        raise UserError(f"--kv-bytes-per-token and --limit count something; give 1 or more, and at most {GB} bytes")
    if policy not in POLICIES:
        raise UserError(f"there is no policy {policy!r}; take one of {', '.join(POLICIES)}")
    if plot and not sweep:
        raise UserError("--plot draws a sweep; add --sweep")
    restrained = ssd_admission != "all" or ssd_write_gb_per_day is not None
    if sweep and (dram_gb or ssd_gb or policy != DEFAULT or restrained):
        raise UserError("--sweep takes all policies, its own sizes of the SSD tier, no DRAM and no budget; leave others out")
    if not sweep and not ssd_gb and restrained:
        raise UserError("--ssd-admission and --ssd-write-gb-per-day are about an SSD tier; give --ssd-gb")
    if plot:
        check_drawable(plot)
    requests = read(trace, limit)
    block_bytes = kv_bytes_per_token * requests.block_tokens
    if sweep:
        rates, sizes = sweep_rates(requests), [slots * block_bytes / GB for slots in sweep_slots(requests)]
        print_sweep(rates, sizes)
        if plot:
            draw(rates, sizes, plot)
        return
    # More than there are blocks is as good as that many.
    dram_slots, ssd_slots = (min(requests.blocks, int(size * GB // block_bytes)) for size in (dram_gb, ssd_gb))
    if not dram_slots and not ssd_slots:
        raise UserError(f"no tier holds a block of {block_bytes / 1e6:g} MB; give --dram-gb or --ssd-gb more")
    budget = None if ssd_write_gb_per_day is None else ssd_write_gb_per_day * GB / block_bytes
    result = run(requests, policy, Replay(dram_slots, ssd_slots, POLICIES[policy], ssd_admission, budget))
    print_result(requests, result, block_bytes)


def run(trace: Trace, name: str, replay: Replay) -> Result:
    console = Console(stderr=True)
    requests = list(zip(trace.requests, trace.seconds, trace.answers, strict=True))
    for request, second, answer in track(requests, name, console=console, transient=True, disable=not console.is_terminal):
        replay.request(request, second, answer)
    return replay.result


def sweep_slots(trace: Trace) -> list[int]:
    """SSD tiers, one for each of SHARES."""
    return [max(1, trace.blocks * share // 100) for share in SHARES]


def sweep_rates(trace: Trace) -> dict[str, list[float]]:
    """Prefix-hit rates by policy, one for each of SHARES; with the bound."""
    slots = sweep_slots(trace)
    rates = {policy: [run(trace, policy, Replay(0, count, made)).hit_rate for count in slots] for policy, made in POLICIES.items()}
    rates[CLAIRVOYANT] = [clairvoyant_hits(trace.requests, count) / trace.uses for count in slots]
    return rates


def print_sweep(rates: dict[str, list[float]], sizes_gb: list[float]) -> None:
    table = Table("SSD, % of blocks", *(str(share) for share in SHARES), title="Prefix-hit rate")
    table.add_row("in GB", *(f"{size:,.3g}" for size in sizes_gb), end_section=True)
    for policy, row in rates.items():
        table.add_row(policy, *(f"{rate:.3f}" for rate in row))
    Console().print(table)


def print_result(trace: Trace, result: Result, block_bytes: int) -> None:
    table = Table("", "", show_header=False)
    table.add_row("prompt tokens asked for", f"{result.asked * trace.block_tokens:,}")
    table.add_row("of these hit", f"{result.hits * trace.block_tokens:,} ({result.hit_rate:.1%})")
    table.add_row("written to SSD", f"{result.written * block_bytes / GB:,.1f} GB")
    table.add_row("of these read at least once", f"{result.useful_rate:.1%}")
    table.add_row("not written when it could have been", f"{result.refused:,} times")
    for tier in Tier:
        table.add_row(f"evictions from {tier.value}", f"{result.evictions[tier]:,}")
    Console().print(table)


def check_drawable(file: Path) -> None:
    """UserError if a plot could not be drawn there, as is better known before the sweep than after it."""
    try:
        from matplotlib.figure import Figure  # not at the top: users need it for this alone
    except ImportError as error:
        raise UserError("--plot needs matplotlib; pip install matplotlib") from error
    known = Figure().canvas.get_supported_filetypes()
    if file.suffix.lower().removeprefix(".") not in known or not os.access(file.parent, os.W_OK):
        raise UserError(f"{file} cannot be drawn; give a .png, .svg or .pdf in a directory that can be written")


def draw(rates: dict[str, list[float]], sizes_gb: list[float], file: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5))
    axes = figure.add_subplot(xlabel="SSD tier, % of the trace's blocks, and in GB", ylabel="prefix-hit rate", xscale="log")
    for policy, row in rates.items():
        axes.plot(SHARES, row, "k--" if policy == CLAIRVOYANT else "o-", label=policy, linewidth=2.5 if policy == DEFAULT else 1)
    axes.set_xticks(SHARES, labels=[f"{share}\n{size:,.3g}" for share, size in zip(SHARES, sizes_gb, strict=True)])
    axes.legend()
    try:
        figure.savefig(file)
    except OSError as error:
        raise UserError(f"{file} cannot be drawn ({error}); draw it elsewhere") from error
