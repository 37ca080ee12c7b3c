"""The engine with a KV cache on a CUDA device, played by a libcuda of our own (fake_cuda.c): no GPU is needed."""

import ctypes
import errno
import random
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest

from kvoffload.engine import Engine
from kvoffload.engine.reference import ReferenceEngine
from tests.engine import cuda_leftovers
from tests.engine.cuda_scenarios import SCENARIOS
from tests.engine.fake_cuda import compile_fake, compile_shared
from tests.engine.world import make_options
from tests.patience import PATIENCE_S

ROOT = Path(__file__).parents[2]
VERSIONS = (12040, 12080, 13000)  # without cuMemcpyBatchAsync, with its first form, with its second
ON_ALL_VERSIONS = ("random_plans_give_the_same_statuses_and_bytes_as_the_reference", "any_call_may_fail")
WITH_SMALL_PIECES = "registrations_end_where_slots_do"
PIECE_BYTES = 45_000  # three slots and a part

WITH_CORE = """
import importlib.util, runpy, sys
spec = importlib.util.spec_from_file_location("kvoffload.engine._core", sys.argv.pop(1))
sys.modules[spec.name] = core = importlib.util.module_from_spec(spec)
spec.loader.exec_module(core)
runpy.run_module("tests.engine.cuda_scenarios", run_name="__main__")
"""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="CUDA's driver is looked for as on Linux")


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """libcuda.so.1 by version. A process that has loaded one finds it under that name."""
    folder = tmp_path_factory.mktemp("cuda")
    return {version: compile_fake(folder / f"{version}.so", "fake_cuda.c", version) for version in VERSIONS}


@pytest.fixture(scope="module")
def core_with_small_pieces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The engine, as if a driver refused to pin more than a few slots at once."""
    return compile_shared(
        tmp_path_factory.mktemp("core") / "core.so",
        "-std=gnu11",
        "-DPy_LIMITED_API=0x030B0000",
        f"-DKVO_PIN_PIECE_BYTES={PIECE_BYTES}",
        f"-I{sysconfig.get_path('include')}",
        *sorted((ROOT / "csrc").glob("*.c")),
        "-ldl",
    )


@pytest.fixture
def seed() -> int:
    return random.randrange(2**31)


def run_scenario(arguments: list[object], program: list[object]) -> None:
    command = [str(word) for word in [sys.executable, *program, *arguments]]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("scenario", ON_ALL_VERSIONS)
def test_on_every_driver(scenario: str, version: int, libraries: dict[int, Path], tmp_path: Path, seed: int) -> None:
    run_scenario([scenario, libraries[version], tmp_path, seed], ["-m", "tests.engine.cuda_scenarios"])


@pytest.mark.parametrize("scenario", [name for name in SCENARIOS if name not in (*ON_ALL_VERSIONS, WITH_SMALL_PIECES)])
def test_on_a_device(scenario: str, libraries: dict[int, Path], tmp_path: Path, seed: int) -> None:
    run_scenario([scenario, libraries[13000], tmp_path, seed], ["-m", "tests.engine.cuda_scenarios"])


@pytest.mark.parametrize("scenario", cuda_leftovers.SCENARIOS)
def test_when_it_has_ended(scenario: str, libraries: dict[int, Path], tmp_path: Path, seed: int) -> None:
    run_scenario([scenario, libraries[13000], tmp_path, seed], ["-m", "tests.engine.cuda_leftovers"])


def test_registrations_end_where_slots_do(
    libraries: dict[int, Path], core_with_small_pieces: Path, tmp_path: Path, seed: int
) -> None:
    run_scenario([WITH_SMALL_PIECES, libraries[13000], tmp_path, seed], ["-c", WITH_CORE, core_with_small_pieces])


def test_without_a_driver_opening_fails_with_a_sentence() -> None:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        pass
    else:
        pytest.skip("there is a CUDA driver here")
    with pytest.raises(OSError, match="CUDA device 0 cannot be used, there is no CUDA driver: libcuda") as raised:
        Engine(make_options(device=0))
    assert raised.value.errno == errno.ENODEV


@pytest.mark.parametrize("make", (Engine, ReferenceEngine))
def test_a_device_that_cannot_be_is_a_value_error(make: Callable) -> None:
    with pytest.raises(ValueError, match="device is -1"):
        make(make_options(device=-1))


def test_the_reference_engine_takes_no_device() -> None:
    with pytest.raises(ValueError, match="device is 0, but the reference engine knows a KV cache in host memory only"):
        ReferenceEngine(make_options(device=0))
