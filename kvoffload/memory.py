"""How much memory there is to take from: the machine's, or less where a control group limits it, as containers do."""

import os
from pathlib import Path

# Of cgroup v2 and v1: the line's second field in /proc/self/cgroup, where its tree is mounted, and the limit's file.
_TREES = (("", "sys/fs/cgroup", "memory.max"), ("memory", "sys/fs/cgroup/memory", "memory.limit_in_bytes"))


def available_memory(root: Path = Path("/")) -> tuple[int, str]:
    """Bytes that this process and its relatives may take together, and whose they are, for a sentence.

    `root`: what /proc and /sys are below. Source: the kernel's admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst; a limit of
    a group holds for all groups below it.
    """
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = min(_limits(root), default=machine)  # v1 says "no limit" by a number larger than any machine
    return (limit, "its container or control group allows") if limit < machine else (machine, "this machine has")


def _limits(root: Path) -> list[int]:
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    places = dict(line.split(":", 2)[1:] for line in lines)
    found = []
    for controller, tree, name in _TREES:
        if controller in places:
            group = Path(places[controller].lstrip("/"))
            # Inside a container its own group may be the top of what is mounted, whatever its path says.
            for above in (group, *group.parents):
                try:
                    found.append(int((root / tree / above / name).read_text()))
                except (OSError, ValueError):  # none there, or "max"
                    continue
    return found
