"""The doctor's checks of the machine, the container and what is installed. Each looks for itself and changes nothing."""

import ctypes
import mmap
import os
import re
import resource
from importlib.metadata import entry_points
from pathlib import Path

from kvoffload.cli.finding import Finding, Level, ok
from kvoffload.cli.output import amount
from kvoffload.engine import Engine
from kvoffload.errors import ConfigError
from kvoffload.memory import available_memory
from kvoffload.types import EngineOptions
from kvoffload.vllm import window

SMALL = EngineOptions(payload_bytes=4096, dram_slots=8, spare_slots=4)
HUGE_PAGE = 2 * 2**20
MEMLOCK_ENOUGH = 2**20  # for the rings, which Linux before CHARGED_ELSEWHERE counts as locked memory
CHARGED_ELSEWHERE = (5, 12)
SHM_ENOUGH = 2**30
CU_NO_DEVICE = 100
BATCH_CALLS = (("cuMemcpyBatchAsync_v2", 13000), ("cuMemcpyBatchAsync", 12080))  # and the CUDA that brought them


def io_uring() -> Finding:
    """By opening an engine, which probes it."""
    name = "io_uring"
    try:
        with Engine(SMALL) as engine:
            found = engine.describe()[0].removeprefix("io: ")
    except OSError as error:
        what = error.strerror or str(error)
        return Finding(name, Level.FATAL, what, "no engine opens here", "free memory, or raise this user's or container's limits")
    if found.startswith("io_uring"):
        return ok(name, found)
    cost = "files are read and written by threads, which takes more CPU and is slower where blocks are small"
    return Finding(name, Level.COSTS, found, cost, _allow_io_uring(found))


def _allow_io_uring(found: str) -> str:
    if "without" in found:
        return "install liburing-dev and build kvoffload again"
    switch = Path("/proc/sys/kernel/io_uring_disabled")
    if switch.exists() and switch.read_text().strip() != "0":
        return "sysctl kernel.io_uring_disabled=0"
    if _seccomp_mode() == "2":
        return "allow io_uring_setup, io_uring_enter and io_uring_register in the container's seccomp profile"
    return "raise RLIMIT_MEMLOCK, or use Linux 5.6 or newer"


def seccomp() -> Finding:
    name, mode = "seccomp", _seccomp_mode()
    if mode == "0":
        return ok(name, "no filter")
    kind = {"1": "strict mode", "2": "a filter"}.get(mode, f"mode {mode}")
    cost = "it may deny system calls: see io_uring"
    return Finding(name, Level.NOTE, f"{kind}, as containers have", cost, "none needed if that is ok")


def _seccomp_mode() -> str:
    found = re.search(r"^Seccomp:\s*(\d+)", Path("/proc/self/status").read_text(), re.MULTILINE)
    return found[1] if found else "0"


def memlock(release: str | None = None) -> Finding:
    """`release`: of the kernel; this one's unless told."""
    name, limit = "locked memory", resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if limit == resource.RLIM_INFINITY:
        return ok(name, "no limit")
    found = f"RLIMIT_MEMLOCK is {amount(limit)}"
    if limit >= MEMLOCK_ENOUGH:
        return ok(name, found)
    numbers = re.match(r"(\d+)\.(\d+)", release or os.uname().release)
    if numbers and (int(numbers[1]), int(numbers[2])) >= CHARGED_ELSEWHERE:
        return Finding(name, Level.NOTE, found, "nothing: this kernel does not count io_uring's memory as locked", "none needed")
    cost = "too little for io_uring's rings: files are read and written by threads"
    return Finding(name, Level.COSTS, found, cost, "ulimit -l unlimited, or docker run --ulimit memlock=-1")


def memory() -> Finding:
    there, whose = available_memory()
    return ok("memory", f"{amount(there)}, which {whose}: for vLLM and the DRAM tier together")


def huge_pages() -> Finding:
    """By asking for one, as the DRAM tier does."""
    name = "huge pages"
    reserved = int(_meminfo("HugePages_Free")) if _meminfo("HugePages_Free") else 0
    with mmap.mmap(-1, 2 * HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        try:
            memory.madvise(mmap.MADV_HUGEPAGE)
        except OSError as error:
            got, why = False, error.strerror
        else:
            for at in range(0, len(memory), mmap.PAGESIZE):
                memory[at] = 1
            got, why = _is_huge(memory), "the kernel gave small pages"
    if reserved or got:
        return ok(name, f"{reserved} reserved ones are free" if reserved else "transparent ones are given when asked for")
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    enabled = setting.read_text().strip() if setting.exists() else "not in this kernel"
    cost = "direct I/O handles every 4 KiB by itself: about half of a fast drive's rate"
    remedy = f"echo madvise > {setting}, or reserve some: sysctl vm.nr_hugepages=N (2 MiB each)"
    return Finding(name, Level.COSTS, f"{why} (transparent_hugepage: {enabled})", cost, remedy)


def _meminfo(field: str) -> str:
    found = re.search(rf"^{field}:\s*(\d+)", Path("/proc/meminfo").read_text(), re.MULTILINE)
    return found[1] if found else ""


def _is_huge(memory: mmap.mmap) -> bool:
    """Whether any of the mapping is on a huge page."""
    window_of = (ctypes.c_char * len(memory)).from_buffer(memory)
    address = ctypes.addressof(window_of)
    del window_of  # or the mapping cannot be closed
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *values = line.split()
        if "-" in first and not first.endswith(":"):
            low, high = (int(end, 16) for end in first.split("-"))
            inside = low < address + len(memory) and high > address
        elif inside and first == "AnonHugePages:" and int(values[0]):
            return True
    return False


def shared_memory(path: str = "/dev/shm") -> Finding:
    cost = "vLLM's processes exchange messages there and may not start with tensor parallelism; kvoffload keeps nothing there"
    remedy = "docker run --shm-size=8g (or --ipc=host); Kubernetes: an emptyDir of medium Memory mounted there"
    try:
        found = os.statvfs(path)
    except OSError as error:
        return Finding(path, Level.COSTS, error.strerror, cost, remedy)
    free = found.f_bavail * found.f_frsize
    if free >= SHM_ENOUGH:
        return ok(path, f"{amount(free)} free")
    return Finding(path, Level.COSTS, f"{amount(free)} free", cost, remedy)


def gpu() -> Finding:
    """What the engine would find when it opens CUDA's driver. Makes no context, so it takes no memory of a GPU."""
    name = "GPU"
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        what = "no CUDA driver (libcuda.so.1)"
        return Finding(name, Level.NOTE, what, "vLLM runs on its CPU platform", "where there is an NVIDIA GPU: install its driver")
    version, count = ctypes.c_int(), ctypes.c_int()
    result = cuda.cuInit(0)
    if result in (0, CU_NO_DEVICE):
        cuda.cuDriverGetVersion(ctypes.byref(version))
        cuda.cuDeviceGetCount(ctypes.byref(count))
    elif result:
        remedy = "reboot after a driver update; in a container, mount the driver of the host"
        return Finding(name, Level.COSTS, f"CUDA's driver does not start (error {result})", "vLLM finds no GPU", remedy)
    found = f"CUDA {version.value // 1000}.{version.value % 1000 // 10}, {count.value} devices"
    if not count.value:
        return Finding(name, Level.NOTE, found, "vLLM runs on its CPU platform", "check CUDA_VISIBLE_DEVICES")
    batch = next((call for call, since in BATCH_CALLS if version.value >= since and hasattr(cuda, call)), None)
    if batch:
        return ok(name, f"{found}, {batch}")
    cost = "a call of the driver for each layer of a block instead of one for many: more CPU time"
    return Finding(name, Level.COSTS, f"{found}, without cuMemcpyBatchAsync", cost, "install a driver of CUDA 12.8 or newer")


def vllm() -> Finding:
    name, found = "vLLM", window.installed()
    wanted = f"install vLLM {window.number(window.TESTED)} ({window.WINDOW} are supported)"
    if found is None:
        return Finding(name, Level.FATAL, "not installed for this Python", "there is nothing to plug into", wanted)
    try:
        number = window.release(found)
    except ConfigError as error:
        return Finding(name, Level.FATAL, str(error).split(":")[0], "kvoffload refuses to start", wanted)
    if number != window.TESTED:
        what = f"{found}, supported; the tests run with {window.number(window.TESTED)}"
        return Finding(name, Level.NOTE, what, "it was looked through, not run", "none needed")
    return ok(name, found)


def plugin() -> Finding:
    name, chosen = "plugin", os.environ.get("VLLM_PLUGINS")
    remedy = 'add "kv_connector_module_path": "kvoffload.vllm.connector" to the kv-transfer-config'
    if not any(each.name == "kvoffload" for each in entry_points(group="vllm.general_plugins")):
        what = "kvoffload is not installed as a plugin of vLLM (it runs from its sources)"
        return Finding(name, Level.COSTS, what, "vLLM does not know the connector by its name", f"pip install it, or {remedy}")
    if chosen is not None and "kvoffload" not in chosen.split(","):
        what = f"VLLM_PLUGINS is {chosen!r}, without kvoffload"
        cost = "vLLM does not know the connector by its name"
        return Finding(name, Level.COSTS, what, cost, f"list kvoffload there, or {remedy}")
    return ok(name, "KVOffloadConnector is known by its name")


CHECKS = (io_uring, seccomp, memlock, memory, huge_pages, shared_memory, gpu, vllm, plugin)
