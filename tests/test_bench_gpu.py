"""`make bench-gpu` runs to its end on the fake driver, and says so when bytes come back wrong. Its rates mean nothing here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.engine.fake_cuda import compile_fake
from tests.patience import PATIENCE_S

ROOT = Path(__file__).parents[1]
PROGRAM = """
import ctypes, sys
ctypes.CDLL(sys.argv.pop(1))
from benchmarks import bench_gpu
if sys.argv.pop(1) == "damaged":
    copy_of = bench_gpu.Side.content
    def content(side):
        found = copy_of(side)
        found[-1, -1] ^= 1
        return found
    bench_gpu.Side.content = content
if sys.argv[-1] == "torch":
    from tests import fake_torch
    sys.modules["torch"] = fake_torch
    sys.argv.pop()
bench_gpu.main()
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_fake(tmp_path_factory.mktemp("cuda") / "fake.so", "fake_cuda_memory.c", 13000)


def run(library: Path, bytes_are: str, folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    few = ["--gib", "0.01", "--repetitions", "1", "--seconds", "0.01", "--folder", str(folder / "drive")]
    command = [sys.executable, "-c", PROGRAM, str(library), bytes_are, *few, *more]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=PATIENCE_S)


def test_every_table_is_printed(library, tmp_path):
    done = run(library, "right", tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("blocks by every way, all right") == 6
    for row in ("GPU to DRAM", "DRAM to GPU", "GPU to DRAM to SSD", "SSD to DRAM to GPU", "SSD to GPU, DRAM 0"):
        for block in ("1 x 2 MiB", "64 x 32 KiB"):
            assert f"| {row} | {block} |" in done.stdout
    assert "compute: left out" in done.stdout  # the fake device cannot multiply
    assert len(json.loads((tmp_path / "build" / "bench_gpu.json").read_text())) == 7


def test_copies_run_beside_the_products_and_not_in_turns_with_them(library, tmp_path):
    """fake_torch ends a product in the default stream with an error: copies are ordered behind it."""
    done = run(library, "right", tmp_path, "torch")
    assert done.returncode == 0, done.stderr
    for block in ("1 x 2 MiB", "64 x 32 KiB"):
        assert f"| 8192^3 bf16 | {block} |" in done.stdout
        copied = json.loads((tmp_path / "build" / "bench_gpu.json").read_text())[f"compute {block}"]["copied GB/s"]
        assert min(copied) > 0


def test_a_wrong_byte_ends_it_with_a_sentence(library, tmp_path):
    done = run(library, "damaged", tmp_path)
    assert done.returncode == 1
    assert "WRONG BYTES: 1 x 2 MiB: 1 of" in done.stderr
