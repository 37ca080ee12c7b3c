"""The doctor's checks of an nvme_path. They write to a directory of their own there, which goes again."""

import os
from pathlib import Path

from kvoffload.cli.drive import Figures, check_usable, measure, room, scratch
from kvoffload.cli.finding import Finding, Level, ok
from kvoffload.cli.output import amount
from kvoffload.cli.passes import FINGERPRINT
from kvoffload.cli.system_checks import SMALL
from kvoffload.engine import Engine
from kvoffload.engine.reference import pack_superblock
from kvoffload.errors import UserError
from kvoffload.store.digests import IN_MEMORY, file_system
from kvoffload.store.namespace import ROOT
from kvoffload.types import SlotFiles

NETWORK = ("9p", "afs", "beegfs", "ceph", "cifs", "glusterfs", "gpfs", "lustre", "nfs", "nfs4", "smb3", "virtiofs")
LEAST_BYTES, FEW_BYTES = 100 * 10**6, 10 * 10**9
MEASURED_BYTES, BLOCK_BYTES, SECONDS = 256 * 10**6, 2 * 2**20, 1.0
TOKEN_BYTES = 131072  # of an 8B model in 16 bits
SLOW_BYTES_PER_S = 10**9  # 8,000 such tokens a second: a GPU computes about that many


def usable(path: str) -> Finding:
    name = f"{path}: use"
    try:
        check_usable(path)
    except UserError as error:
        what, _, remedy = str(error).rpartition(": ")
        return Finding(name, Level.FATAL, what, "an engine refuses to start with it", remedy)
    return ok(name, "directories and files can be made, and are this user's alone")


def kind(path: str) -> Finding:
    name, found = f"{path}: file system", file_system(os.stat(path).st_dev) or "unknown"
    remedy = "name a directory on a local drive (ext4 or xfs)"
    if found in IN_MEMORY:
        return Finding(name, Level.COSTS, found, "the SSD tier is memory: it takes DRAM and is gone after a reboot", remedy)
    if found in NETWORK or found.startswith("fuse"):
        return Finding(name, Level.COSTS, found, "every block crosses a network or another process", remedy)
    if found == "overlay":
        cost = "it is the container's own layer: the cache goes with the container"
        return Finding(name, Level.COSTS, found, cost, "mount a directory of the host there (docker run -v)")
    return ok(name, found)


def direct_io(path: str) -> Finding:
    """By attaching a slot file, which the engine probes."""
    name = f"{path}: O_DIRECT"
    with scratch(path) as folder, Engine(SMALL) as engine:
        file = Path(folder) / "probe.slots"
        file.touch(0o600)
        file.write_bytes(pack_superblock(SMALL.payload_bytes, FINGERPRINT, 0, 1, 0, 1))
        engine.attach(SlotFiles((str(file),), 1, FINGERPRINT))
        found = engine.describe()[-1].removeprefix(f"file {file}: ")
    if found == "O_DIRECT":
        return ok(name, "taken")
    cost = "blocks go through the page cache: every byte is copied once more and pushes out others' pages"
    return Finding(name, Level.COSTS, found, cost, "use ext4 or xfs on a local drive")


def space(path: str) -> Finding:
    there, name = room(path), f"{path}: space"
    found = f"{amount(there)} beside what is left to others"
    if there < LEAST_BYTES and os.path.isdir(os.path.join(path, ROOT)):
        cost = "a cache that is there is opened as it is; another would find no room"
        return Finding(name, Level.COSTS, found, cost, "free space, or see by kvoffload inspect what may go")
    if there < LEAST_BYTES:
        return Finding(name, Level.FATAL, found, "a cache of a few blocks does not fit", "free space, or name another nvme_path")
    if there < FEW_BYTES:
        tokens = there // TOKEN_BYTES
        cost = f"holds about {tokens:,} tokens of an 8B model"
        return Finding(name, Level.COSTS, found, cost, "free space, or name another nvme_path")
    return ok(name, found)


def drive(path: str) -> Finding:
    return judged(path, measure(path, BLOCK_BYTES, min(MEASURED_BYTES, room(path)), SECONDS))


def judged(path: str, figures: Figures) -> Finding:
    name = f"{path}: drive"
    read, write = figures.read, figures.write
    tokens = read.gb_per_s * 1e9 / TOKEN_BYTES
    found = (
        f"reads {read.gb_per_s:.2f} GB/s ({read.p99_ms:.1f} ms for 99 % of blocks), writes {write.gb_per_s:.2f} GB/s: "
        f"{tokens:,.0f} tokens of an 8B model a second"
    )
    if read.gb_per_s * 1e9 >= SLOW_BYTES_PER_S:
        return ok(name, found)
    cost = "a GPU computes as fast as this loads: hits are often computed anew"
    return Finding(name, Level.COSTS, found, cost, "use a faster drive, or several as a list in nvme_path")


def checked(path: str) -> list[Finding]:
    """All checks of a path, those that need room to write only where there is some."""
    first = usable(path)
    if first.level is Level.FATAL:
        return [first]
    findings = [first, kind(path), space(path)]
    if room(path) >= LEAST_BYTES:
        findings += [direct_io(path), drive(path)]
    return findings
