"""A small file system of a test's own, on a loop device. Needs root; where it cannot be had, the test is skipped."""

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.patience import PATIENCE_S, wait_until

IMAGE_BYTES = 64 * 2**20


def call(*command: object) -> None:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=PATIENCE_S)
    if done.returncode != 0:
        pytest.skip(f"no file system on a loop device here: {command[0]}: {done.stderr.strip()}")


def unmount(folder: Path) -> None:
    """The kernel closes the files of an io_uring some time after its process ended."""

    def was_tried() -> bool:
        done = subprocess.run(["umount", str(folder)], capture_output=True, text=True)
        assert done.returncode == 0 or "busy" in done.stderr, done.stderr
        return done.returncode == 0

    wait_until(was_tried, pause_s=0.1)


@contextlib.contextmanager
def small_file_system(folder: Path) -> Iterator[Path]:
    """Gives the directory in `folder` on which it is mounted."""
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    image, mounted = folder / "image", folder / "mounted"
    mounted.mkdir()
    with image.open("wb") as file:
        file.truncate(IMAGE_BYTES)
    try:
        call("mkfs.ext4", "-q", image)
        call("mount", "-o", "loop", image, mounted)
    except FileNotFoundError as error:
        pytest.skip(f"no file system on a loop device here: {error}")
    try:
        yield mounted
    finally:
        unmount(mounted)
