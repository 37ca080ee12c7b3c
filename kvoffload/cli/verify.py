"""`kvoffload verify`: reads every block that a store knows and compares it with its checksums."""

import dataclasses
import threading
from collections.abc import Sequence
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

from kvoffload.cli import output
from kvoffload.cli.scrub import Damage, Result, Scrub, by_namespace
from kvoffload.errors import UserError
from kvoffload.store import catalogue
from kvoffload.store.catalogue import Cache

COLUMNS = ("namespace", "rank", "slot", "what", "where")


def verify(
    paths: Annotated[list[str], typer.Argument(metavar="PATH", help="Directories given to engines as nvme_path.")],
    json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Reads every block of the caches below an nvme_path and checks headers and checksums. Changes nothing.

    May run beside engines: what they write meanwhile is not called damage. Reads past the page cache.

    Damage costs no wrong answer: engines check what they read, and compute it anew.

    Name all paths of a cache that is striped over several.

    Example: kvoffload verify /mnt/nvme/kv

    Exit code: 0 if all is sound; 1 if damage was found; 2 for a mistake in the call.
    """
    caches = [cache for path in output.absolute(paths) for cache in catalogue.look(path).caches]
    damage = [Damage(cache.name, cache.directory, None, None, cache.trouble) for cache in caches if cache.trouble]
    sound = [parts for parts in by_namespace(caches) if not any(part.trouble for part in parts)]
    _refuse_halves(sound)
    results = _scrubbed([parts for parts in sound if any(part.journal for part in parts)])
    damage += [each for result in results for each in result.damage]
    damaged = {each.namespace for each in damage}
    refused = [cache for cache in caches if cache.refusal and cache.name not in damaged]
    damage += [Damage(cache.name, cache.directory, None, None, cache.refusal) for cache in refused]
    _report(results, damage, json)
    if damage:
        raise typer.Exit(output.FOUND)


def _refuse_halves(namespaces: Sequence[Sequence[Cache]]) -> None:
    for parts in namespaces:
        manifest = next((part.manifest for part in parts if part.manifest), None)
        if manifest is not None and len(manifest.paths) > len(parts):
            raise UserError(
                f"cache {parts[0].name[:12]} is striped over {len(manifest.paths)} paths, of which {len(parts)} are named: "
                f"name all of them ({', '.join(manifest.paths)})"
            )


def _scrubbed(namespaces: Sequence[Sequence[Cache]]) -> list[Result]:
    console = Console(stderr=True)
    columns = ("{task.description}", BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    results = []
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("verifying", total=sum(Scrub.size(parts) for parts in namespaces))
        lock, count = threading.Lock(), 0

        def read(nbytes: int) -> None:
            nonlocal count
            with lock:
                count += nbytes
                progress.update(task, completed=count)

        for parts in namespaces:
            before = count
            result = Scrub(parts, read).run()
            result.nbytes = count - before
            results.append(result)
    return results


def _report(results: Sequence[Result], damage: Sequence[Damage], json: bool) -> None:
    totals = {name: sum(getattr(result, name) for result in results) for name in ("blocks", "nbytes", "changed", "outdated")}
    buffered = sum(result.buffered for result in results)
    if json:
        figures = {"caches": len(results), **totals, "buffered_files": buffered}
        output.as_json(figures | {"damage": [dataclasses.asdict(each) for each in damage]})
        return
    if damage:
        rows = [(each.namespace[:12], _or_all(each.rank), _or_all(each.slot), each.what, each.directory) for each in damage]
        output.table(f"{len(damage)} damaged", COLUMNS, rows)
    size = output.amount(totals["nbytes"])
    read = f"{output.count(totals['blocks'], 'block')} ({size}) of {output.count(len(results), 'cache')} read"
    output.say(f"{read}, {len(damage)} damaged")
    if totals["outdated"]:
        output.say(f"{totals['outdated']} places hold another block than noted, in good order: misses, as a kill leaves them")
    if totals["changed"]:
        output.say(f"{totals['changed']} were written or forgotten by an engine meanwhile")
    if buffered:
        output.say(f"{buffered} files were read through the page cache: their file system refuses O_DIRECT")


def _or_all(number: int | None) -> str:
    return "all" if number is None else str(number)
