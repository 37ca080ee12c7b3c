"""Which block should leave first, and what a write budget costs, on the traffic of benchmarks/workloads.py and on traces given.

Every policy through the real block manager, with SSD tiers of several sizes and no DRAM, beside the clairvoyant bound; and the
default with budgets, on traces stretched to a day each. Nothing is moved. A given trace counts as three: whole, and its halves.

    python -m benchmarks.bench_policies [--trace FILE ...] [--output build] [--seed N] [--quick]
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import TypedDict

from benchmarks.knowing import knowing
from benchmarks.policies_report import report
from benchmarks.workloads import WORKLOADS, generated, halves
from kvoffload.admission import DAY_S
from kvoffload.cli.replay import Replay, Result
from kvoffload.cli.simulate import SHARES, run, sweep_rates
from kvoffload.cli.traces import Trace, read
from kvoffload.config import Admissions
from kvoffload.policy import DEFAULT, POLICIES

QUICK = 0.02  # of the full size
BUDGETED = ("chats", "agents", "documents", "mixture")  # beside those given, whole
BUDGETS = (25, 50)  # percent of what admit-all writes
SSD_SHARES, DRAM_SHARES = (5, 20), (0, 2, 10)  # percent of a trace's different blocks


class Swept(TypedDict):
    requests: int
    blocks: int
    uses: int
    rates: dict[str, list[float]]  # by policy, the bound with them: one for each of SHARES


class Budgeted(TypedDict):
    trace: str
    ssd: int
    dram: int
    turnovers: float  # how many times over admit-all wrote the SSD tier
    rates: dict[str, float]
    writes: dict[str, float]  # of what admit-all wrote


def traces(files: list[Path], seed: int, size: float) -> dict[str, Trace]:
    """By name. Those given are refused if they could not be told apart or do not say when requests came."""
    found = {name: generated(name, seed, size) for name in WORKLOADS}
    for file in files:
        if file.stem in found:
            raise SystemExit(f"{file}: there is a trace called {file.stem} already; give the file another name")
        whole = read(file)
        stretched(whole)
        found[file.stem] = whole
        found[f"{file.stem}, first half"], found[f"{file.stem}, second half"] = halves(whole)
    return found


def slots(trace: Trace, share: int) -> int:
    return max(1, trace.blocks * share // 100) if share else 0


def stretched(trace: Trace) -> Trace:
    """To a day, so that the hour's worth that a budget may save up is a part of it."""
    first, last = trace.seconds[0], trace.seconds[-1]
    if last <= first:
        raise SystemExit("a budget is by the day, and the trace does not tell when requests came: give one with timestamps")
    return trace._replace(seconds=[(second - first) * DAY_S / (last - first) for second in trace.seconds])


def played(trace: Trace, dram: int, ssd: int, admission: Admissions = "all", budget: float | None = None) -> Result:
    return run(trace, admission, Replay(dram, ssd, POLICIES[DEFAULT], admission, budget))


def budgeted(name: str, trace: Trace, ssd_share: int, dram_share: int) -> Budgeted:
    ssd, dram = slots(trace, ssd_share), slots(trace, dram_share)
    everything = played(trace, dram, ssd)
    results = {"all": everything}
    for percent in BUDGETS:
        results[f"budget {percent}"] = played(trace, dram, ssd, "all", everything.written * percent / 100)
    results["second-touch"] = played(trace, dram, ssd, "second-touch")
    results["knowing"] = knowing(trace, dram, ssd, everything.written * BUDGETS[0] / 100)
    return Budgeted(
        trace=name,
        ssd=ssd_share,
        dram=dram_share,
        turnovers=everything.written / ssd,
        rates={kind: result.hit_rate for kind, result in results.items()},
        writes={kind: result.written / everything.written for kind, result in results.items()},
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, nargs="*", default=[], metavar="FILE", help="as of `kvoffload simulate`")
    parser.add_argument("--output", type=Path, default=Path("build"))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="small traces, whose figures mean nothing")
    given = parser.parse_args(arguments)
    begun = time.monotonic()

    def progress(what: str) -> None:
        print(f"{time.monotonic() - begun:5.0f} s  {what}", file=sys.stderr)

    found = traces(given.trace, given.seed, QUICK if given.quick else 1)
    sweeps, budgets = {}, []
    for name, trace in found.items():
        progress(f"policies on {name}")
        sweeps[name] = Swept(requests=len(trace.requests), blocks=trace.blocks, uses=trace.uses, rates=sweep_rates(trace))
    for name in (*(file.stem for file in given.trace), *BUDGETED):
        trace = stretched(found[name])
        for ssd_share in SSD_SHARES:
            for dram_share in DRAM_SHARES:
                progress(f"budgets on {name}, SSD {ssd_share} %, DRAM {dram_share} %")
                budgets.append(budgeted(name, trace, ssd_share, dram_share))
    progress("done")
    print(report(sweeps, budgets, [file.stem for file in given.trace]))
    given.output.mkdir(parents=True, exist_ok=True)
    result = {"seed": given.seed, "quick": given.quick, "shares": SHARES, "policies": sweeps, "budgets": budgets}
    (given.output / "bench_policies.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
