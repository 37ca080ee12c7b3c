"""What all tests share: seeds that are printed, faults on demand, and the examples directory on the import path."""

import os
import random
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.engine.faulty import FaultPlan, faulty_engines

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))  # the end-to-end tests drive vLLM with the demo's helpers

# How long an example takes says how busy the machine is.
settings.register_profile("whatever the machine does", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("whatever the machine does")

# In the environment, because pytest-xdist's workers must have the same.
SEED = int(os.environ.setdefault("KVOFFLOAD_TEST_SEED", str(random.SystemRandom().randrange(2**32))))


def pytest_report_header() -> str:
    return f"random tests: run again with KVOFFLOAD_TEST_SEED={SEED}"


@pytest.fixture(scope="session")
def seed() -> int:
    """One seed for the whole run, printed in pytest's header."""
    return SEED


@pytest.fixture
def faults(tmp_path: Path) -> Iterator[FaultPlan]:
    """Engines opened in this process have the faults that this plan is told."""
    with FaultPlan(tmp_path / "faults") as plan, faulty_engines(plan):
        yield plan


@pytest.fixture
def public_path() -> Iterator[Path]:
    """A directory that an unprivileged process can reach; pytest's own are root's alone."""
    path = Path(tempfile.mkdtemp(prefix="kvoffload-test-"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)
