"""`kvoffload doctor`: whether an engine could start here, and what would make it slower than it could be."""

import dataclasses
from collections.abc import Sequence
from typing import Annotated

import typer
from rich.console import Console

from kvoffload.cli import output, path_checks, system_checks
from kvoffload.cli.finding import Finding, Level

COLUMNS = ("check", "", "found, what it costs, what to do")


def doctor(
    nvme_path: Annotated[list[str] | None, typer.Option(metavar="PATH", help="Check it and its drive; may be repeated.")] = None,
    json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Checks machine, container, GPU driver, vLLM and an nvme_path, and says what to do about what it finds.

    Writes to a directory of its own below --nvme-path, for about three seconds a path, and removes it.

    Example: kvoffload doctor --nvme-path /mnt/nvme/kv

    Exit code: 0; 1 if an engine could not start; 2 for a mistake in the call.
    """
    paths = output.absolute(nvme_path or [])
    with Console(stderr=True).status("checking"):
        findings = [check() for check in system_checks.CHECKS]
        findings += [finding for path in paths for finding in path_checks.checked(path)]
    if json:
        output.as_json([dataclasses.asdict(finding) for finding in findings])
    else:
        output.table("kvoffload doctor", COLUMNS, [(each.check, each.level, _text(each)) for each in findings])
        output.say(_verdict(findings))
    if any(finding.level is Level.FATAL for finding in findings):
        raise typer.Exit(output.FOUND)


def _text(finding: Finding) -> str:
    parts = [finding.found, finding.cost and f"costs: {finding.cost}", finding.remedy and f"remedy: {finding.remedy}"]
    return "; ".join(filter(None, parts))


def _verdict(findings: Sequence[Finding]) -> str:
    fatal, costs = (sum(finding.level is level for finding in findings) for level in (Level.FATAL, Level.COSTS))
    if fatal:
        return f"An engine could not start here: {output.count(fatal, 'thing')} to mend first"
    return f"An engine can start here; {output.count(costs, 'thing')} could be better" if costs else "An engine can start here"
