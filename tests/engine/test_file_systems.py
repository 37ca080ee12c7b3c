"""A file system that is full or lacks something, played by a library that stands before the system calls."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.engine.file_system_scenarios import SCENARIOS
from tests.patience import PATIENCE_S

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    library = tmp_path_factory.mktemp("library") / "file_system.so"
    source = Path(__file__).with_name("file_system.c")
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", str(library), str(source), "-ldl"], check=True)
    return library


@pytest.mark.skipif(sys.platform != "linux", reason="preloads a library the way Linux does")
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_file_systems(scenario: str, library: Path, tmp_path: Path) -> None:
    # Before a sanitiser's, whose own fstat goes past what stands behind it.
    preload = " ".join(filter(None, (str(library), os.environ.get("LD_PRELOAD", ""))))
    done = subprocess.run(
        [sys.executable, "-m", "tests.engine.file_system_scenarios", scenario, str(tmp_path), str(library)],
        cwd=ROOT,
        env=os.environ | {"LD_PRELOAD": preload},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert done.returncode == 0, done.stderr
