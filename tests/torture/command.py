"""The command line that the tortures share, and how the tests run their short modes."""

import argparse
import logging
import random
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from tests.patience import PATIENCE_S
from tests.torture.children import Failed

ROOT = Path(__file__).parents[2]


def run(title: str, unit: str, torture: Callable[[int, int, Path], Counter[str]], default: int = 1000) -> int:
    """torture(count, seed, folder): count is of `unit`s. Returns the exit status."""
    parser = argparse.ArgumentParser()
    parser.add_argument(f"--{unit}", dest="count", type=int, default=default)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    parser.add_argument("--folder", type=Path, help="below which to work; the one for temporary files by default")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)  # what the store says of damage is expected here, thousands of times
    print(f"{title}: --seed {arguments.seed}", flush=True)
    folder = Path(tempfile.mkdtemp(prefix="kvoffload-torture-", dir=arguments.folder))
    try:
        counts = torture(arguments.count, arguments.seed, folder)
    except (Failed, AssertionError) as failure:
        print(f"{failure}\nthe files are in {folder}", file=sys.stderr)
        return 1
    for name, count in counts.items():
        print(f"{count:8} {name}")
    shutil.rmtree(folder)
    return 0


def run_short(module: str, unit: str, count: int, seed: int, folder: Path) -> dict[str, int]:
    """What the torture counted, run in a process of its own: it forks and so must have no threads. AssertionError if it failed."""
    done = subprocess.run(
        [sys.executable, "-m", f"tests.torture.{module}", f"--{unit}", str(count), "--seed", str(seed), "--folder", str(folder)],
        cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S,
    )  # fmt: skip
    print(done.stdout)
    assert done.returncode == 0, done.stderr
    return {name: int(number) for number, name in re.findall(r"^ *(\d+) (.+)$", done.stdout, re.MULTILINE)}
