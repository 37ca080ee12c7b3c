"""What `make wheel` builds: one file for every Python and most Linuxes, whole, and working where there is no checkout."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

import kvoffload
from tools import bootstrap

ROOT = Path(__file__).resolve().parents[2]
GLIBC = {"libc.so.6", "libdl.so.2", "libm.so.6", "libpthread.so.0", "ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1"}
GLIBC_OF_THE_IMAGE = (2, 35)  # docker/Dockerfile's base: Ubuntu 22.04
TIER_TEST = "tests/e2e/test_tiers.py::test_a_prefix_evicted_from_gpu_and_dram_comes_back_from_ssd_and_mixed_with_new_tokens"


def run(*command: object, **options) -> str:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=600, **options)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    if not bootstrap.has_header("liburing.h"):
        pytest.skip("make wheel wants liburing.h, which could not be installed here")
    folder = tmp_path_factory.mktemp("dist")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("KVO_")}
    run(sys.executable, ROOT / "tools" / "bootstrap.py", "wheel", folder, env=environment)
    (wheel,) = folder.iterdir()
    return wheel


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory) -> Path:
    """The Python of a new environment with the wheel. What it depends on is taken from ours, which takes seconds, not minutes."""
    folder = tmp_path_factory.mktemp("installed") / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    python = folder / "bin" / "python"
    run(sys.executable, "-m", "pip", "-q", "--python", python, "install", "--no-deps", "--no-index", wheel)
    packages = sysconfig.get_path("purelib", vars={"base": str(folder)})
    Path(packages, "dependencies.pth").write_text(sysconfig.get_path("purelib"))  # .pth files in there are not read
    return python


@pytest.fixture
def elsewhere(tmp_path) -> Path:
    """The tests and what they drive vLLM with, but nothing of the engine."""
    for name in ("tests", "examples"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "LICENSE"):  # of the latter the tokenizer of the small models is made
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def test_its_tag_says_every_python_from_3_11_on_and_a_glibc_that_the_image_has(wheel):
    found = re.fullmatch(rf"kvoffload-{kvoffload.__version__}-cp311-abi3-manylinux_(\d+)_(\d+)_\w+\.whl", wheel.name)
    assert found is not None, wheel.name
    assert tuple(map(int, found.groups())) <= GLIBC_OF_THE_IMAGE


def test_its_tag_is_what_auditwheel_finds_and_only_glibc_is_wanted_of_the_machine(wheel):
    shown = " ".join(run(sys.executable, "-m", "auditwheel", "show", wheel).split())
    assert f'consistent with the following platform tag: "{wheel.stem.split("-")[-1]}"' in shown
    libraries = re.search(r"shared libraries: (.*?) This constrains", shown)[1]
    wanted = set(re.findall(r"(\S+\.so\S*) with versions", libraries))
    assert "libc.so.6" in wanted and wanted <= GLIBC, wanted


def test_it_holds_the_package_and_its_extensions_and_nothing_else(wheel):
    sources = {str(file.relative_to(ROOT)) for file in (ROOT / "kvoffload").rglob("*.py*") if file.suffix in (".py", ".pyi")}
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
    about = {name for name in names if re.match(r"kvoffload-[\d.]+\.dist-info/", name)}
    bundled = {name for name in names if name.startswith("kvoffload.libs/liburing")}
    assert names - about - bundled == sources | {"kvoffload/engine/_core.abi3.so", "kvoffload/_rows.abi3.so"}
    licences = {Path(name).name for name in about if "/licenses/" in name}
    assert licences == {"LICENSE", "LICENSE.bundled"}, "liburing and xxHash are in it, and ask for their notices"


def test_installed_it_finds_vllm_and_its_plugin_and_has_io_uring_built_in(python, tmp_path):
    found = json.loads(run(python.with_name("kvoffload"), "doctor", "--json", "--nvme-path", tmp_path, cwd=tmp_path))
    levels = {finding["check"]: finding["level"] for finding in found}
    assert levels["vLLM"] == levels["plugin"] == "ok", found
    assert all(level != "fatal" for level in levels.values()), found
    reported = next(finding["found"] for finding in found if finding["check"] == "io_uring")
    assert "built without" not in reported, reported
    where = run(python, "-c", "import kvoffload.engine._core as core; print(core.__file__)", cwd=tmp_path)
    assert Path(where).is_relative_to(python.parents[1])


def test_with_it_vllm_loads_a_prompt_from_dram_and_from_ssd(python, elsewhere):
    where = run(python, "-c", "import kvoffload; print(kvoffload.__file__)", cwd=elsewhere)
    assert Path(where).is_relative_to(python.parents[1])
    done = run(python, "-m", "pytest", "-q", "-p", "no:cacheprovider", TIER_TEST, cwd=elsewhere)
    assert "1 passed" in done, done
