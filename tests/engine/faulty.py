"""An engine with faulty drives and copies: csrc/ and io_fault.c built as one library, and the plan by which a test says
what goes wrong, in this process or in others, while engines run."""

import ctypes
import errno
import fcntl
import hashlib
import importlib.util
import mmap
import os
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Self
from unittest import mock

import kvoffload.engine
from tests import sanitizers
from tests.engine.world import FOREVER_US
from tests.patience import wait_until

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
BUILD = ROOT / "build" / "faulty"

# Explained in io_fault.h. STALL and QUEUED come beside one of the others.
FAULTS = ("error", "again", "short", "torn", "torn_error", "flip", "lost", "misdirect", "stall", "queued")
READ_FAULTS = {"error", "again", "short", "flip", "misdirect", "stall"}
WRITE_FAULTS = READ_FAULTS | {"torn", "torn_error", "lost"}
GROW_FAULTS = {"error", "stall"}
COPY_FAULTS = {"error", "stall", "queued"}

# ---- the library ----

WRAPPED = ("kvo_io_uring_open", "kvo_io_threads_open", "kvo_io_advance", "kvo_copy_host_open", "kvo_pump")
SOURCES = [*sorted((ROOT / "csrc").glob("*.c")), HERE / "io_fault.c"]
HEADERS = [*sorted((ROOT / "csrc").glob("*.h")), HERE / "io_fault.h"]
WARNINGS = ("-Wall", "-Wextra", "-Wconversion", "-Werror")
FLAGS = ("-shared", "-fPIC", "-std=gnu11", "-O2", "-g", "-fvisibility=hidden", "-pthread", *WARNINGS)
LIBURING = (("-DKVO_HAVE_LIBURING=1", "-l:liburing.a", "-Wl,--exclude-libs,ALL"), ("-DKVO_HAVE_LIBURING=1", "-luring"), ())


def _command(library: Path, liburing: tuple[str, ...]) -> list[str]:
    includes = (sysconfig.get_path("include"), ROOT / "build" / "include", ROOT / "csrc")
    return [
        *("cc", *FLAGS, *sanitizers.FLAGS, "-DPy_LIMITED_API=0x030B0000"),
        *(f"-I{folder}" for folder in includes),
        *(f"-Wl,--wrap={name}" for name in WRAPPED),
        *("-o", str(library), *map(str, SOURCES), *liburing, "-ldl"),
    ]


def library() -> Path:
    """The faulty engine, built if its sources changed."""
    digest = hashlib.sha256(repr(_command(Path("core"), ())).encode())
    for file in (*SOURCES, *HEADERS):
        digest.update(file.read_bytes())
    built = BUILD / digest.hexdigest()[:16] / "_core.abi3.so"
    built.parent.mkdir(parents=True, exist_ok=True)
    with open(BUILD / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # tests run in several processes
        if not built.exists():
            _compile(built)
    return built


def _compile(built: Path) -> None:
    unfinished = built.with_name("unfinished.so")
    for liburing in LIBURING:
        done = subprocess.run(_command(unfinished, liburing), capture_output=True, text=True)
        if done.returncode == 0:
            unfinished.rename(built)
            return
    raise AssertionError(done.stderr)


def environment(plan: "FaultPlan") -> dict[str, str]:
    """What a process needs in its environment, so that its engine and those of its children have the plan's faults."""
    python_path = [str(HERE / "faulty_site"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"KVO_FAULTS": str(plan.path), "KVO_FAULTY_CORE": str(library()), "PYTHONPATH": os.pathsep.join(python_path)}


def _load() -> ModuleType:
    path = library()
    name = f"faulty_{path.parent.name}._core"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


@contextmanager
def faulty_engines(plan: "FaultPlan") -> Iterator[None]:
    """Engines that this process opens meanwhile have the plan's faults."""
    with mock.patch.object(kvoffload.engine, "_core", _load()), mock.patch.dict(os.environ, KVO_FAULTS=str(plan.path)):
        yield


# ---- the plan: mirrors io_fault.h ----


class FaultyKind(ctypes.Structure):
    """The faults of one kind of request: `error` (an errno), `stall_us` and `in_turn` may be set at any time."""

    _fields_ = (
        ("chance", ctypes.c_uint32 * len(FAULTS)),
        ("scripted_fault", ctypes.c_uint32),
        ("scripted", ctypes.c_uint32),
        ("error", ctypes.c_uint32),
        ("in_turn", ctypes.c_uint32),
        ("stall_us", ctypes.c_uint64),
        ("free_at", ctypes.c_uint64),
        ("seed", ctypes.c_uint64),
        ("requests", ctypes.c_uint64),
        ("waiting", ctypes.c_uint64),
        ("_injected", ctypes.c_uint64 * len(FAULTS)),
    )

    def set(self, **chances: float) -> None:
        """How often each fault happens, 0 .. 1; those not named do not."""
        for number, fault in enumerate(FAULTS):
            self.chance[number] = int(chances.pop(fault, 0) * 65536)
        assert not chances, f"no such fault: {', '.join(chances)}"

    def script(self, fault: str, count: int = 1) -> None:
        """The next `count` requests get this fault."""
        self.scripted_fault = FAULTS.index(fault)
        self.scripted = count

    def throttle(self, request_s: float) -> None:
        """From now on each request takes so much of the drive's time, beside what it takes by itself."""
        self.stall_us, self.in_turn, self.free_at = int(request_s * 1e6), 1, 0
        self.set(stall=1)

    def injected(self, fault: str) -> int:
        """How often it happened."""
        return self._injected[FAULTS.index(fault)]


class _Layout(ctypes.Structure):
    _fields_ = (
        ("device", ctypes.c_uint64),
        ("inode", ctypes.c_uint64),
        ("released", ctypes.c_uint64),
        ("passed", ctypes.c_uint64),
        ("turned", ctypes.c_uint64),
        ("overdue", ctypes.c_uint64),
        ("kinds", FaultyKind * 5),
    )


class FaultPlan:
    """A file of faults, mapped here and by engines. Nothing goes wrong until a test says so."""

    def __init__(self, path: Path, seed: int = 0) -> None:
        self.path = path
        path.write_bytes(bytes(ctypes.sizeof(_Layout)))
        with path.open("r+b") as file:
            self._layout = _Layout.from_buffer(mmap.mmap(file.fileno(), 0))
        self.read, self.write, self.grow, self.copy_in, self.copy_out = self.kinds = tuple(self._layout.kinds)
        self.seed(seed)
        for kind in self.kinds:
            kind.error, kind.stall_us = errno.EIO, FOREVER_US
        self.copy_in.error = self.copy_out.error = errno.EREMOTEIO

    def seed(self, seed: int) -> None:
        for number, kind in enumerate(self.kinds):
            kind.seed = (seed * len(self.kinds) + number) % 2**64

    def only(self, path: Path | str | None) -> None:
        """Drives' faults happen on this slot file alone; None: on every one. Copies have theirs all the same."""
        found = None if path is None else os.stat(path)
        self._layout.device, self._layout.inode = (found.st_dev, found.st_ino) if found else (0, 0)

    def release(self) -> None:
        """Lets go what waits now."""
        self._layout.released += 1

    def deadlines_pass(self) -> None:
        """Those of all operations that have a timeout of their own; on an engine where something waits. It has seen to it then."""
        self._layout.passed += 1
        wait_until(lambda: self._layout.turned == self._layout.passed)

    @property
    def overdue(self) -> int:
        """How often an operation's deadline had come and the engine went to sleep, or was to come before it would awake."""
        return self._layout.overdue

    def heal(self) -> None:
        """No more faults, and nothing waits any longer."""
        for kind in self.kinds:
            kind.set()
            kind.scripted = kind.in_turn = 0
            kind.stall_us = FOREVER_US
        self.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.heal()
