"""How much of its endurance a drive says it has used up, where it tells: NVMe drives do, to who may ask.

sysfs does not have the figure, so nvme-cli is asked (`nvme smart-log`), which needs root or its capability. Where there is no
nvme-cli, no permission or no NVMe drive there is no figure, and nothing fails. Asked in a thread, once an hour.
"""

import json
import os
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

PAUSE_S = 3600.0
TIMEOUT_S = 10.0
_NAMESPACE = re.compile(r"nvme\d+n\d+")
_FIELDS = ("percent_used", "percentage_used")  # as versions of nvme-cli call it
_PLACES = "/usr/sbin:/sbin"  # not in every PATH


def find_nvme() -> str | None:
    return shutil.which("nvme") or shutil.which("nvme", path=_PLACES)


class DriveWear:
    """Percentages by number of the nvme path, from 0. What a path lies on is looked up each time: it may be mounted anew."""

    def __init__(
        self,
        paths: Sequence[str],
        nvme: str | None = None,
        sysfs: str = "/sys",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`nvme`: the program; None: where it usually is, if at all."""
        self._paths, self._sysfs, self._clock = tuple(paths), Path(sysfs), clock
        self._nvme = nvme or find_nvme()
        self._known: dict[int, int] = {}
        self._asked_at = float("-inf")
        self._asking: threading.Thread | None = None

    def percentages(self) -> dict[int, int]:
        """As they were known last. Never waits; asks anew in the background if that was an hour ago."""
        if self._nvme is not None and self._asking is None and self._clock() - self._asked_at >= PAUSE_S:
            self._asked_at = self._clock()
            self._asking = threading.Thread(target=self._ask, name="kvoffload-wear", daemon=True)
            try:
                self._asking.start()
            except RuntimeError:  # no thread is to be had now: asked again in an hour
                self._asking = None
        return self._known

    def wait(self) -> None:
        """Until what was asked is answered, or was given up."""
        asking = self._asking
        if asking is not None:
            asking.join()

    def _ask(self) -> None:
        try:
            by_path = {number: self._used(path) for number, path in enumerate(self._paths)}
            self._known = {number: used for number, used in by_path.items() if used is not None}
        finally:
            self._asking = None

    def _used(self, path: str) -> int | None:
        """The most worn of the drives that the path lies on."""
        try:
            device = os.stat(path).st_dev
            disks = set(_namespaces(self._sysfs / f"dev/block/{os.major(device)}:{os.minor(device)}"))
        except OSError:
            return None
        found = [used for disk in sorted(disks) if (used := self._smart(disk)) is not None]
        return max(found, default=None)

    def _smart(self, disk: str) -> int | None:
        command = [self._nvme or "nvme", "smart-log", "--output-format=json", f"/dev/{disk}"]
        try:
            done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=TIMEOUT_S, check=True)
            answer = json.loads(done.stdout)
        except (OSError, subprocess.SubprocessError, ValueError, RecursionError):
            return None
        values = [answer.get(field) for field in _FIELDS] if isinstance(answer, dict) else []
        return next((value for value in values if isinstance(value, int) and 0 <= value <= 255), None)


def _namespaces(device: Path) -> Iterator[str]:
    """The NVMe namespaces behind a block device of sysfs: a partition, or a device made of others (LVM, RAID, encryption)."""
    real = device.resolve(strict=True)
    named = [part for part in real.parts if _NAMESPACE.fullmatch(part)]
    if named:
        yield named[-1]
        return
    slaves = real / "slaves"
    if slaves.is_dir():
        for slave in slaves.iterdir():
            yield from _namespaces(slave)
