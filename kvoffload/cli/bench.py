"""`kvoffload bench`: what the engine writes to and reads from a drive, and what that costs."""

from typing import Annotated, Any

import typer
from rich.console import Console

from kvoffload.cli import output
from kvoffload.cli.drive import Figures, measure
from kvoffload.cli.passes import Sample

COLUMNS = ("", "GB/s", "half within", "99 % within", "CPU per GB")
GB, KIB = 10**9, 1024
SIZE_MAX, SECONDS_MAX = 10**6, 3600  # GB; what is longer is no measurement but wear


def bench(
    path: Annotated[str, typer.Argument(metavar="PATH", help="A directory on the drive, for example an nvme_path.")],
    size_gb: Annotated[
        float, typer.Option(metavar="GB", min=0.001, max=SIZE_MAX, help="Space to use; it is free again afterwards.")
    ] = 1.0,
    block_kib: Annotated[int, typer.Option(metavar="KIB", min=8, max=16384, help="A block's size on the drive.")] = 2048,
    seconds: Annotated[
        float, typer.Option(metavar="S", min=0.1, max=SECONDS_MAX, help="To write, and to read, after the space was filled once.")
    ] = 4.0,
    json: Annotated[bool, typer.Option("--json", help="For programs: bytes and seconds.")] = False,
) -> None:
    """Measures what the engine writes to a drive and reads from it: blocks at random places, checksums as always.

    The times are from asking to having, with 16 blocks asked for at once.

    An engine that runs on the same drive takes its share, and so does this from it.

    Example: kvoffload bench /mnt/nvme --size-gb 4 --block-kib 512

    Exit code: 0; 2 for a mistake in the call, or where there is no room.
    """
    (named,) = output.absolute([path])
    with Console(stderr=True).status(output.plain(f"measuring {named}")):
        figures = measure(named, block_kib * KIB, int(size_gb * GB), seconds)
    if json:
        output.as_json(as_json(named, figures))
        return
    title = f"{named}: blocks of {output.amount(figures.slot_bytes)} in {output.amount(figures.file_bytes)}"
    output.table(title, COLUMNS, [("write", *_row(figures.write)), ("read", *_row(figures.read))])
    for note in figures.notes:
        output.say(note)


def _row(sample: Sample) -> tuple[str, ...]:
    cpu = sample.cpu_seconds / (sample.nbytes / GB)
    return f"{sample.gb_per_s:.2f}", f"{sample.p50_ms:.2f} ms", f"{sample.p99_ms:.2f} ms", f"{cpu:.3f} s"


def as_json(path: str, figures: Figures) -> dict[str, Any]:
    def of(sample: Sample) -> dict[str, float]:
        return {
            "bytes": sample.nbytes,
            "seconds": sample.seconds,
            "bytes_per_second": sample.nbytes / sample.seconds,
            "cpu_seconds": sample.cpu_seconds,
            "p50_seconds": sample.p50_ms / 1e3,
            "p99_seconds": sample.p99_ms / 1e3,
        }

    return {
        "path": path,
        "block_bytes": figures.slot_bytes,
        "file_bytes": figures.file_bytes,
        "write": of(figures.write),
        "read": of(figures.read),
        "notes": figures.notes,
    }
