"""A short run of the random plans; `make torture` is the long one."""

from pathlib import Path

import pytest

from tests.engine.world import NEEDS_IO_URING
from tests.torture.random_plans import KINDS, run_plans

PLANS = 300


@pytest.mark.parametrize("backend", (pytest.param("io_uring", marks=NEEDS_IO_URING), "threads"))
def test_no_promise_is_broken_under_random_faults(backend: str, seed: int, tmp_path: Path) -> None:
    seen = run_plans(backend, PLANS, seed, tmp_path)
    print(seen)
    for kind in ("COPY_OUT", "COPY_IN", "WRITE", "READ"):
        assert seen.statuses[kind, "good"] > PLANS
    for kind in ("COPY_OUT", "WRITE", "READ"):
        assert seen.statuses[kind, "ETIMEDOUT"] > 0
    for name, faults in KINDS.items():
        if name != "grow":  # files grow once
            assert sum(seen.injected[name, fault] for fault in faults) > PLANS / 10
