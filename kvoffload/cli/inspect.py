"""`kvoffload inspect`: which caches lie below an nvme_path, how large and old they are, and who uses them."""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Annotated, Any

import typer

from kvoffload.cli import output
from kvoffload.store import catalogue
from kvoffload.store.catalogue import Cache, Path

COLUMNS = ("namespace", "model", "blocks", "on disk", "at most", "made", "last used", "in use by", "starts", "uses noted")


def inspect(
    paths: Annotated[list[str], typer.Argument(metavar="PATH", help="Directories given to engines as nvme_path.")],
    json: Annotated[bool, typer.Option("--json", help="For programs: everything, sizes in bytes.")] = False,
) -> None:
    """Lists the caches below an nvme_path. Changes nothing, and may run beside engines that use them.

    Example: kvoffload inspect /mnt/nvme/kv

    Exit code: 0; 1 if an engine would refuse one of them as it is; 2 for a mistake in the call.
    """
    found = [catalogue.look(path) for path in output.absolute(paths)]
    if json:
        output.as_json([_as_json(path) for path in found])
    else:
        for path in found:
            _print(path)
    if any(cache.refusal for path in found for cache in path.caches):
        raise typer.Exit(output.FOUND)


def _print(path: Path) -> None:
    total = sum(cache.disk_bytes for cache in path.caches)
    caches = f"{output.count(len(path.caches), 'cache')} of {output.amount(total)}"
    free = f"{output.amount(path.free_bytes)} free, of which {output.amount(path.kept_free_bytes)} are left to others"
    title = f"{path.path}: {caches}; the drive has {free}"
    output.table(title, COLUMNS, [_row(cache) for cache in path.caches])
    for cache in path.caches:
        if cache.refusal:
            output.say(f"{cache.name[:12]}: {cache.refusal}")
        if cache.foreign:
            output.say(f"{cache.name[:12]}: holds {cache.foreign}, which is not kvoffload's")


def blocks(cache: Cache) -> str:
    """Used and possible, where this path has the journal."""
    if cache.journal is None:
        return "" if cache.manifest is None or cache.manifest.path_index == 0 else "see the first path"
    return f"{len(cache.journal.blocks)}" + (f" of {cache.manifest.slot_count}" if cache.manifest else "")


def _row(cache: Cache) -> tuple[str, ...]:
    manifest, journal = cache.manifest, cache.journal
    return (
        cache.name[:12],
        cache.model or "(unknown)",
        blocks(cache),
        output.amount(cache.disk_bytes),
        output.amount(manifest.reserved_bytes) if manifest else "",
        _made(manifest.created) if manifest else "",
        output.ago(cache.used_at),
        cache.holder or "nobody",
        str(journal.epoch) if journal else "",
        str(journal.touches) if journal else "",
    )


def _made(created: str) -> str:
    try:
        return output.ago(datetime.fromisoformat(created).timestamp())
    except ValueError:
        return created


def _as_json(path: Path) -> Mapping[str, Any]:
    return {
        "path": path.path,
        "file_system_bytes": path.total_bytes,
        "free_bytes": path.free_bytes,
        "kept_free_bytes": path.kept_free_bytes,
        "caches": [_cache_as_json(cache) for cache in path.caches],
    }


def _cache_as_json(cache: Cache) -> Mapping[str, Any]:
    manifest, journal = cache.manifest, cache.journal
    return {
        "namespace": cache.name,
        "directory": cache.directory,
        "model": cache.model or None,
        "identity_fields": cache.fields,
        "path_index": manifest.path_index if manifest else None,
        "paths": list(manifest.paths) if manifest else None,
        "slots": manifest.slot_count if manifest else None,
        "slots_used": len(journal.blocks) if journal else None,
        "disk_bytes": cache.disk_bytes,
        "reserved_bytes": manifest.reserved_bytes if manifest else None,
        "created": manifest.created if manifest else None,
        "last_used": datetime.fromtimestamp(cache.used_at, UTC).isoformat(timespec="seconds"),
        "in_use_by": cache.holder,
        "starts": journal.epoch if journal else None,
        "uses_noted": journal.touches if journal else None,
        "damaged_journal_records": journal.skipped if journal else None,
        "trouble": cache.refusal or None,
        "foreign_file": cache.foreign,
    }
