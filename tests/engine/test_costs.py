"""What an engine costs beside moving bytes: processor time when idle, memory beyond its arena."""

import os
import resource
import time
from pathlib import Path

import numpy as np
import pytest

from kvoffload.engine import Engine
from kvoffload.types import EngineOptions, Region
from tests.engine.world import C_ENGINES, KVCache, copy_out, make_files, open_engine, run, run_one
from tests.sanitizers import not_with_sanitizers

MIB = 2**20


@pytest.mark.parametrize("name", C_ENGINES)
def test_an_idle_engine_uses_no_measurable_processor_time(tmp_path: Path, name: str) -> None:
    with open_engine(name, KVCache(), make_files(tmp_path)) as engine:
        assert run_one(engine, copy_out(1, 0)) == 0
        before = resource.getrusage(resource.RUSAGE_SELF)
        time.sleep(2)
        after = resource.getrusage(resource.RUSAGE_SELF)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.01


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
