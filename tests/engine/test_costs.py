"""What an engine costs beside moving bytes: wake-ups when idle, memory beyond its arena."""

import contextlib
import os
import re
import time
from pathlib import Path

import numpy as np
import pytest

from kvoffload.engine import Engine
from kvoffload.types import EngineOptions, Region
from tests.engine.world import C_ENGINES, KVCache, copy_out, make_files, open_engine, run, run_one
from tests.sanitizers import not_with_sanitizers

MIB = 2**20


def threads() -> set[str]:
    return set(os.listdir("/proc/self/task"))


def runs(tasks: set[str]) -> dict[str, int]:
    """How often each of these threads, if it lives, has come to an end of running: to sleep or to make room for others."""
    found = {}
    for task in tasks:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # the kernel ends its own when it does not need them
            status = Path(f"/proc/self/task/{task}/status").read_text()
            found[task] = sum(map(int, re.findall(r"ctxt_switches:\s+(\d+)", status)))
    return found


@pytest.mark.parametrize("name", C_ENGINES)
def test_an_idle_engines_threads_sleep(tmp_path: Path, name: str) -> None:
    others = threads()
    with open_engine(name, KVCache(), make_files(tmp_path)) as engine:
        assert run_one(engine, copy_out(1, 0)) == 0
        before = runs(threads() - others)
        time.sleep(2)
        after = runs(set(before))
    assert len(before) >= 2, "one that pumps and one that copies"
    assert all(after[task] - before[task] <= 4 for task in after), "to fall asleep, and once more for a deadline that was noted"


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@not_with_sanitizers
def test_memory_is_the_arena_and_little_more() -> None:
    payload, slots = 2 * MIB - 4096, 128
    memory = np.ones((1, payload), np.uint8)
    before = resident_bytes()
    with Engine(EngineOptions(payload, slots, spare_slots=4)) as engine:
        engine.bind([[Region(memory.ctypes.data, payload, payload)]])
        statuses = run(engine, np.concatenate([copy_out(0, slot, id=slot) for slot in range(slots)]))
        assert set(statuses.values()) == {0}
        assert resident_bytes() - before <= engine.stats()["arena_bytes"] + 64 * MIB
