"""Run pytest on the engine as it was built: `python tools/run_tests.py <arguments for pytest>`. Run by `make`.

A build with KVO_SANITIZE=address or thread (setup.py) needs its sanitiser's runtime loaded before Python, and options;
they are set here. Without the variable this is pytest and nothing else.
"""

import ctypes
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ENGINE = ROOT / "kvoffload" / "engine"
RUNTIMES = {"address": "libasan", "thread": "libtsan"}
OPTIONS = {
    # Leaks are looked for by a test of its own (tests/engine/test_leaks.py): Python itself leaves memory behind.
    # The order of libraries is not verified because the fault tests put one before the sanitiser's.
    "ASAN_OPTIONS": "detect_leaks=0:verify_asan_link_order=0:detect_stack_use_after_return=1:strict_string_checks=1",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    # What numpy and Python do in code that was not compiled for it is not looked at: it would see half of their locks.
    # Children that a test forks go on: it looks at what is theirs, and not at locks that other threads held at the fork.
    "TSAN_OPTIONS": "halt_on_error=1:second_deadlock_stack=1:ignore_noninstrumented_modules=1:die_after_fork=0",
}
REPORTS = ROOT / "build" / "sanitizer"  # a process that dies leaves its report here: pytest keeps what it printed to itself
TSAN_RANDOM_BITS = 28  # of an address; runtimes of GCC before 14 die at start-up where there are more
KEEP_ADDRESSES = 0x0040000  # ADDR_NO_RANDOMIZE of personality(2)
BESIDE = "libstdc++.so.6"  # a runtime finds what it stands before at its start, and torch throws C++ exceptions
# Unless the arguments choose by -m.
WITHOUT_VLLM = ("-m", "not e2e")
WHY_WITHOUT_VLLM = {
    "address": "they take several times as long: KVO_SANITIZE=address make e2e",
    "thread": "vLLM forks where it has threads, which its runtime does not follow",
}


def say(message: str) -> None:
    print(f"sanitiser: {message}", flush=True)


def runtime(name: str) -> str:
    """The library that the engine was linked to, which is the one to load; a second copy of it would not work."""
    (engine,) = ENGINE.glob("_core*.so")
    listed = subprocess.run(["ldd", str(engine)], capture_output=True, text=True, check=True).stdout
    found = re.search(rf"{RUNTIMES[name]}\S* => (\S+)", listed)
    if found is None:
        sys.exit(f"{engine.name} is not linked to {RUNTIMES[name]}: build it with GCC, by KVO_SANITIZE={name} make setup")
    return found[1]


def keep_addresses() -> None:
    """From the next exec on, for runtimes that know only some layouts of memory."""
    bits = int(Path("/proc/sys/vm/mmap_rnd_bits").read_text())
    if bits <= TSAN_RANDOM_BITS:
        return
    libc = ctypes.CDLL(None)
    if libc.personality(libc.personality(0xFFFFFFFF) | KEEP_ADDRESSES) == -1:
        say(f"addresses have {bits} random bits and cannot be kept here: if tests die at once, sysctl vm.mmap_rnd_bits=28")


def prepare(name: str, environment: dict[str, str]) -> list[str]:
    """Sets the variables that tests under sanitiser `name` need; returns arguments for pytest."""
    if name not in RUNTIMES:
        sys.exit(f"KVO_SANITIZE is {name!r}: set it to {' or '.join(RUNTIMES)}")
    environment["LD_PRELOAD"] = " ".join(filter(None, (runtime(name), BESIDE, environment.get("LD_PRELOAD"))))
    shutil.rmtree(REPORTS, ignore_errors=True)
    REPORTS.mkdir(parents=True)
    REPORTS.chmod(0o1777)  # some tests go on as another user
    for variable, options in OPTIONS.items():
        mine = f"{options}:log_path={REPORTS / 'report'}"
        environment[variable] = ":".join(filter(None, (mine, environment.get(variable))))  # of two, the last counts
    if name == "thread":
        keep_addresses()
    say(f"tests run under {RUNTIMES[name]}")
    if "-m" in sys.argv:
        return []
    say(f"those that start a vLLM (tests/e2e) are left out, for {WHY_WITHOUT_VLLM[name]}")
    return [*WITHOUT_VLLM]


def main() -> None:
    environment = dict(os.environ)
    name = environment.get("KVO_SANITIZE", "")
    arguments = prepare(name, environment) if name else []
    status = subprocess.run([sys.executable, "-m", "pytest", *arguments, *sys.argv[1:]], env=environment, check=False).returncode
    reports = sorted(REPORTS.glob("*")) if name else []
    for report in reports:
        say(f"{report}:\n{report.read_text(errors='replace')}")
    sys.exit(status or bool(reports))


if __name__ == "__main__":
    main()
