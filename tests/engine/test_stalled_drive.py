"""A drive that does not answer, for real: a file system on a loop device, frozen. Needs root."""

import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engine.world import C_ENGINES

ROOT = Path(__file__).parents[2]
IMAGE_BYTES = 64 * 2**20
CLOSE_S = 20.0  # close gives a drive 2 s
CLOSES = """
import sys, time
from pathlib import Path
from tests.engine.world import *

with open_engine(sys.argv[1], KVCache(), make_files(Path(sys.argv[2]))) as engine:
    assert run_one(engine, copy_out(1, 0)) == run_one(engine, write(1, 0, 3)) == 0
    print("ready", flush=True)
    sys.stdin.readline()
    assert run_one(engine, write(1, 0, int(sys.argv[3]), timeout_us=100_000)) == TIMEDOUT
    engine.close()
    print("closed", flush=True)
"""


def call(*command: object) -> None:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=60)
    if done.returncode != 0:
        pytest.skip(f"no file system on a loop device here: {command[0]}: {done.stderr.strip()}")


def unmount(folder: Path) -> None:
    """The kernel closes the files of an io_uring some time after its process ended."""
    for _ in range(100):
        done = subprocess.run(["umount", str(folder)], capture_output=True, text=True)
        if "busy" not in done.stderr:
            break
        time.sleep(0.1)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def frozen_later(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, which the test may freeze."""
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    image, folder = tmp_path / "image", tmp_path / "mounted"
    folder.mkdir()
    with image.open("wb") as file:
        file.truncate(IMAGE_BYTES)
    try:
        call("mkfs.ext4", "-q", image)
        call("mount", "-o", "loop", image, folder)
    except FileNotFoundError as error:
        pytest.skip(f"no file system on a loop device here: {error}")
    try:
        yield folder
    finally:
        subprocess.run(["fsfreeze", "-u", str(folder)], capture_output=True)
        unmount(folder)


@pytest.mark.skipif(sys.platform != "linux", reason="freezes a file system the way Linux does")
@pytest.mark.parametrize("slot", (3, 2), ids=("a write", "growth"))
@pytest.mark.parametrize("name", C_ENGINES)
def test_close_returns_while_a_drive_does_not_answer(name: str, slot: int, frozen_later: Path) -> None:
    """Slot 3 has room; slot 2 is the first in its file, which has to grow."""
    command = [sys.executable, "-c", CLOSES, name, str(frozen_later / "store"), str(slot)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        try:
            call("fsfreeze", "-f", frozen_later)
            process.stdin.write("go\n")
            process.stdin.flush()
            has_answered = bool(select.select([process.stdout], [], [], CLOSE_S)[0])
            assert has_answered, "close hangs"
            assert process.stdout.readline() == "closed\n"
        finally:
            subprocess.run(["fsfreeze", "-u", str(frozen_later)], capture_output=True)
            process.stdin.close()
            process.stdin = None
        assert process.wait(60) == 0
