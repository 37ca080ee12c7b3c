"""A drive that does not answer, for real: a file system on a loop device, frozen. Needs root."""

import select
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engine.loop_device import call, small_file_system
from tests.engine.world import C_ENGINES
from tests.patience import PATIENCE_S

ROOT = Path(__file__).parents[2]
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


@pytest.fixture
def frozen_later(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, which the test may freeze."""
    with small_file_system(tmp_path) as folder:
        try:
            yield folder
        finally:
            subprocess.run(["fsfreeze", "-u", str(folder)], capture_output=True)


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
            has_answered = bool(select.select([process.stdout], [], [], PATIENCE_S)[0])
            assert has_answered, "close hangs"
            assert process.stdout.readline() == "closed\n"
        finally:
            subprocess.run(["fsfreeze", "-u", str(frozen_later)], capture_output=True)
            process.stdin.close()
            process.stdin = None
        assert process.wait(PATIENCE_S) == 0
