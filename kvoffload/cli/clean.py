"""`kvoffload clean`: removes caches that are of no use any more, or that are chosen. Never one that is in use."""

import re
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TransferSpeedColumn

from kvoffload.cli import output
from kvoffload.cli.scrub import by_namespace
from kvoffload.errors import UserError
from kvoffload.store import catalogue, removal
from kvoffload.store.catalogue import Cache
from kvoffload.vllm import window

COLUMNS = ("namespace", "model", "on disk", "last used", "why", "what happens")
_SECONDS = {"m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
GOES, WOULD_GO = "removed", "would be removed"


def clean(
    paths: Annotated[list[str], typer.Argument(metavar="PATH", help="Directories given to engines as nvme_path.")],
    model: Annotated[str | None, typer.Option(help="Caches of this model, as inspect shows it.")] = None,
    older_than: Annotated[str | None, typer.Option(metavar="AGE", help="Caches not used for so long: 30d, 12h, 2w.")] = None,
    every: Annotated[bool, typer.Option("--all", help="All caches that are not in use.")] = False,
    wipe: Annotated[bool, typer.Option("--wipe", help="Write zeros over the files before they go (docs/tools.md).")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    json: Annotated[bool, typer.Option("--json", help="For programs; with --yes or --dry-run.")] = False,
) -> None:
    """Removes caches below an nvme_path: those that no engine can use any more, or those that are chosen.

    Never one that an engine uses, whatever is asked. Symlinks are not followed. Name all paths of a striped cache.

    Example: kvoffload clean /mnt/nvme/kv --older-than 30d --dry-run

    Exit code: 0; 1 if something that was asked for stayed; 2 for a mistake in the call.
    """
    if every and (model or older_than):
        raise UserError("--all takes everything: leave it out, or --model and --older-than")
    if json and not (yes or dry_run):
        raise UserError("--json asks nobody: add --yes or --dry-run")
    named = output.absolute(paths)
    chosen = _chosen([cache for path in named for cache in catalogue.look(path).caches], model, _age(older_than), every)
    outcome = {parts[0].name: _obstacle(named, parts) for parts, _ in chosen}
    going = [parts for parts, _ in chosen if not outcome[parts[0].name]]
    if not dry_run:
        if going and not yes:
            _print(chosen, {name: stays or WOULD_GO for name, stays in outcome.items()})
            _ask(len(going), wipe)
        outcome |= _remove(named, going, wipe)
        if every:
            for path in named:
                removal.remove_digests(path)
    said = {name: stays or (WOULD_GO if dry_run else GOES) for name, stays in outcome.items()}
    if json:
        output.as_json([_as_json(parts, why, outcome[parts[0].name], dry_run) for parts, why in chosen])
    else:
        _print(chosen, said)
    if any(outcome.values()):
        raise typer.Exit(output.FOUND)


Chosen = tuple[list[Cache], str]  # a namespace's parts, and why it was chosen


def _chosen(caches: Sequence[Cache], model: str | None, age: float | None, every: bool) -> list[Chosen]:
    models = sorted({cache.model for cache in caches if cache.model})
    if model is not None and model not in models:
        raise UserError(f"there is no cache of model {model!r}; there are those of {', '.join(models) or 'none that is known'}")
    found = []
    for parts in by_namespace(caches):
        idle = time.time() - max(part.used_at for part in parts)
        in_use = any(part.holder for part in parts)
        if every:
            found.append((parts, "all"))
        elif model is not None or age is not None:
            is_model = model is None or any(part.model == model for part in parts)
            # What is in use is used now, however long ago it was opened.
            if is_model and (age is None or (idle > age and not in_use)):
                found.append((parts, "chosen"))
        elif not in_use and (why := obsolete(parts)):
            found.append((parts, why))
    return found


def obsolete(parts: Sequence[Cache]) -> str:
    """Why no engine that could be started here would use the cache again; "" if one might."""
    trouble = next((part.refusal for part in parts if part.refusal), "")
    if "newer than" in trouble:
        return ""  # a newer kvoffload's
    if trouble:
        return "damaged: engines refuse it"
    if not any(part.journal for part in parts):
        return "" if all(_lies_elsewhere(part) for part in parts) else "empty: it has no journal"
    fields = next((part.fields for part in parts if part.fields), {})
    here, made_by = window.installed(), str(fields.get("vllm", ""))
    if here and made_by and _public(made_by) != _public(here):
        return f"of vLLM {made_by}, and {here} is installed here"
    model = str(fields.get("model", ""))
    if model.startswith("/") and not Path(model).exists():
        return "its model's files are gone"
    return ""


def _lies_elsewhere(part: Cache) -> bool:
    return part.manifest is not None and part.manifest.path_index > 0


def _public(version: str) -> str:
    """Without what a build adds."""
    return version.split("+")[0]


def _age(text: str | None) -> float | None:
    if text is None:
        return None
    found = re.fullmatch(r"(\d+)([mhdw])", text)
    if not found:
        raise UserError(f"--older-than is {text!r}: give a number and m, h, d or w, for example 30d")
    return int(found[1]) * _SECONDS[found[2]]


def _obstacle(named: Sequence[str], parts: Sequence[Cache]) -> str:
    """What is known to keep a cache from being removed before it is tried."""
    for part in parts:
        if part.holder:
            return f"stays: it is in use by {part.holder}"
        if part.foreign:
            return f"stays: it holds {part.foreign}, which is not kvoffload's"
        others = removal.other_parts(named, part.name, part.manifest) if part.manifest else []
        if others:
            return f"stays: a part of it lies below {', '.join(others)}: name that path too"
    return ""


def _ask(count: int, wipe: bool) -> None:
    if not sys.stdin.isatty():
        raise UserError("there is nobody to ask here: add --yes, or --dry-run to see what would go")
    what = "Overwrite and remove" if wipe else "Remove"
    typer.confirm(f"{what} {output.count(count, 'cache')}?", abort=True)


def _remove(named: Sequence[str], going: Sequence[Sequence[Cache]], wipe: bool) -> Mapping[str, str]:
    console = Console(stderr=True)
    columns = ("{task.description}", BarColumn(), DownloadColumn(), TransferSpeedColumn())
    size = sum(part.disk_bytes for parts in going for part in parts)
    with Progress(*columns, console=console, transient=True, disable=not (wipe and console.is_terminal)) as progress:
        task = progress.add_task("wiping", total=size)
        chosen = {parts[0].name: max(part.used_at for part in parts) for parts in going}
        outcome = removal.remove(named, chosen, wipe, lambda nbytes: progress.advance(task, nbytes))
    return {name: stays and f"stays: {stays}" for name, stays in outcome.items()}


def _print(chosen: Sequence[Chosen], said: Mapping[str, str]) -> None:
    if not chosen:
        output.say("nothing to remove")
        return
    rows = [
        (
            parts[0].name[:12],
            next((part.model for part in parts if part.model), "(unknown)"),
            output.amount(sum(part.disk_bytes for part in parts)),
            output.ago(max(part.used_at for part in parts)),
            why,
            said[parts[0].name],
        )
        for parts, why in chosen
    ]
    output.table(output.count(len(chosen), "cache"), COLUMNS, rows)


def _as_json(parts: Sequence[Cache], why: str, stays: str, dry_run: bool) -> Mapping[str, object]:
    return {
        "namespace": parts[0].name,
        "directories": [part.directory for part in parts],
        "model": next((part.model for part in parts if part.model), None),
        "disk_bytes": sum(part.disk_bytes for part in parts),
        "why": why,
        "removed": not stays and not dry_run,
        "would_be_removed": not stays and dry_run,
        "stays": stays.removeprefix("stays: ") or None,
    }
