"""Nothing the engine allocated is lost when it is closed, nor when it could not be opened. Looks with LeakSanitizer, and so
only in a build with it: KVO_SANITIZE=address. Python's own leaks are many, so the report is searched for ours."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.engine.world import C_ENGINES
from tests.sanitizers import NAME

ROOT = Path(__file__).parents[2]
LOST_BYTES = 12345  # by the program below, on purpose: if that is not reported, nothing is
USES = f"""
import ctypes, sys
from pathlib import Path
import numpy as np
from kvoffload.errors import StoreError
from kvoffload.types import Region, SlotFiles
from tests.engine.world import *

def refused(error, call, *arguments, **fields):
    try:
        call(*arguments, **fields)
    except error:
        return
    raise AssertionError(call)

folder = Path(sys.argv[2])
files = make_files(folder)
for turn in range(2):
    with open_engine(sys.argv[1], KVCache(), files) as engine:
        for n in range(4):
            assert run_one(engine, copy_out(n, n)) == run_one(engine, write(n, n, n)) == 0
        assert run_one(engine, load(1, 1, 8)) == 0
        assert run_one(engine, read(2, 5, 1)) == BADMSG
        engine.stats(), engine.describe()
        refused(ValueError, engine.submit, copy_out(1, 99))
        refused(ValueError, engine.bind, [[Region(1, 1, 1)]])
        refused(StoreError, engine.attach, files)
    refused(ValueError, engine.wait, 0)
    with open_engine(sys.argv[1], KVCache()) as engine:
        (folder / "damaged").write_bytes(bytes(4096))
        for paths in ((str(folder / "missing"),), (str(folder / "damaged"),), (files.paths[0], str(folder / "missing"))):
            refused(StoreError, engine.attach, SlotFiles(paths, 8, FINGERPRINT))
        assert engine.submit(copy_out(0, 0)) == 1
    refused(ValueError, open_engine, sys.argv[1], KVCache(), io_depth=0)
    refused(OSError, open_engine, sys.argv[1], KVCache(), dram_slots=2**31, payload_bytes=2**40)
ctypes.CDLL(None).malloc({LOST_BYTES})
"""


def lost_by_us(report: str) -> list[str]:
    """The leaks of a report that have a frame of the engine's in the stack of their allocation."""
    return [leak for leak in report.split("\n\n") if "leak of" in leak and " csrc/" in leak]


@pytest.mark.skipif(NAME != "address", reason="needs a build with AddressSanitizer")
@pytest.mark.parametrize("name", C_ENGINES)
def test_nothing_is_lost_when_an_engine_is_closed_or_could_not_be_opened(name: str, tmp_path: Path) -> None:
    options = f"{os.environ['ASAN_OPTIONS']}:detect_leaks=1:fast_unwind_on_malloc=0:log_path=stderr"
    environment = os.environ | {"ASAN_OPTIONS": options, "LSAN_OPTIONS": "exitcode=0", "PYTHONMALLOC": "malloc"}
    command = [sys.executable, "-c", USES, name, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    if "LeakSanitizer has encountered a fatal error" in done.stderr:
        pytest.skip("LeakSanitizer may not stop threads here")
    assert done.returncode == 0, done.stderr
    assert f"leak of {LOST_BYTES} byte(s)" in done.stderr, done.stderr
    assert not lost_by_us(done.stderr), "\n\n".join(lost_by_us(done.stderr))
