"""`kvoffload doctor`: each check finds what is well, and what is not, in the real thing where it can be had."""

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from kvoffload.cli import path_checks, system_checks
from kvoffload.cli.drive import Figures, check_usable
from kvoffload.cli.finding import Level
from kvoffload.cli.passes import Sample
from kvoffload.store.directory import Directory
from kvoffload.vllm import window
from tests.engine import fake_cuda
from tests.engine.loop_device import small_file_system
from tests.patience import PATIENCE_S, wait_until
from tests.store.helpers import OTHER_UID, as_other_user

ROOT = Path(__file__).resolve().parents[2]
# Before the checks run, the process takes something from itself.
DENY_IO_URING = """
import ctypes, errno, struct
class Filter(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("code", ctypes.c_void_p)]
code = b"".join(struct.pack("<HBBI", *step) for step in (
    (0x20, 0, 0, 0), (0x15, 0, 1, 425), (0x06, 0, 0, 0x00050000 | errno.EPERM), (0x06, 0, 0, 0x7FFF0000)))
memory = ctypes.create_string_buffer(code, len(code))
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, ctypes.byref(Filter(4, ctypes.addressof(memory))), 0, 0) == 0
"""
DENY_HUGE_PAGES = "import ctypes\nassert ctypes.CDLL(None).prctl(41, 1, 0, 0, 0) == 0\n"  # PR_SET_THP_DISABLE
LITTLE_MEMLOCK = "import resource\nresource.setrlimit(resource.RLIMIT_MEMLOCK, (65536, 65536))\n"


def after(taking: str, check: str) -> tuple[str, str, str]:
    """Level, finding and remedy of a check in a process of its own."""
    code = taking + f"from kvoffload.cli import system_checks as s\nf = s.{check}\nprint(f.level, f.found, f.remedy, sep='|')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr
    level, found, remedy = done.stdout.strip().split("|")
    return level, found, remedy


def test_io_uring_is_found_or_what_denies_it():
    if system_checks.io_uring().level is not Level.OK:
        pytest.skip("no io_uring to deny here")
    assert after("", "io_uring()")[0] == "ok"
    level, found, remedy = after(DENY_IO_URING, "io_uring()")
    assert level == "costs" and "Operation not permitted" in found and "seccomp profile" in remedy


def test_a_seccomp_filter_is_noted():
    assert after(DENY_IO_URING, "seccomp()")[0] == "note"
    assert after("", "seccomp()")[0] in ("ok", "note")


def test_little_locked_memory_matters_where_the_kernel_counts_it():
    assert after(LITTLE_MEMLOCK, "memlock('5.10.0')")[0] == "costs"
    assert after(LITTLE_MEMLOCK, "memlock('6.1.0-13-amd64')")[0] == "note"
    assert after("", "memlock('6.1.0')")[0] in ("ok", "note")


def test_huge_pages_that_are_not_given_cost():
    if system_checks.huge_pages().level is not Level.OK or int(system_checks._meminfo("HugePages_Free") or 0):
        pytest.skip("none are given here, or some are reserved")
    level, _, remedy = after(DENY_HUGE_PAGES, "huge_pages()")
    assert level == "costs" and "transparent_hugepage" in remedy


def test_little_shared_memory_costs(tmp_path):
    assert system_checks.shared_memory(str(tmp_path)).level is Level.OK
    assert system_checks.shared_memory(str(tmp_path / "nowhere")).level is Level.COSTS
    with small_file_system(tmp_path) as mounted:
        found = system_checks.shared_memory(str(mounted))
        assert found.level is Level.COSTS and "--shm-size" in found.remedy


@pytest.mark.parametrize(("version", "level"), [(13000, "ok"), (12080, "ok"), (12000, "costs")])
def test_a_gpu_is_found_and_whether_its_driver_copies_in_batches(tmp_path, version, level):
    library = fake_cuda.compile_fake(tmp_path / "cuda.so", "fake_cuda.c", version)
    found = after(f"import ctypes\nctypes.CDLL({str(library)!r})\n", "gpu()")
    assert found[0] == level, found
    assert f"CUDA {version // 1000}." in found[1]


def test_without_a_driver_there_is_no_gpu_which_is_noted():
    if system_checks.gpu().level is Level.OK:
        pytest.skip("there is a GPU here")
    assert system_checks.gpu().level in (Level.NOTE, Level.COSTS)


@pytest.mark.parametrize(
    ("version", "level"),
    [(None, Level.FATAL), ("0.25.1", Level.FATAL), ("0.34.0", Level.FATAL), ("dev", Level.FATAL), ("0.33.0", Level.NOTE),
     ("0.26.0+cu129", Level.NOTE), ("0.32.1", Level.OK)],
)  # fmt: skip
def test_vllm_must_be_of_the_window(monkeypatch, version, level):
    monkeypatch.setattr(window, "installed", lambda: version)
    assert system_checks.vllm().level is level


def test_a_plugin_that_vllm_would_not_load_is_found(monkeypatch):
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    assert system_checks.plugin().level is Level.OK
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    assert "kv_connector_module_path" in system_checks.plugin().remedy
    monkeypatch.setenv("VLLM_PLUGINS", "other,kvoffload")
    assert system_checks.plugin().level is Level.OK
    monkeypatch.setattr(system_checks, "entry_points", lambda group: ())
    assert system_checks.plugin().level is Level.COSTS


def test_a_good_path_is_found_good_and_left_as_it_was(tmp_path):
    levels = {finding.check.split(": ")[1]: finding.level for finding in path_checks.checked(str(tmp_path))}
    assert levels.keys() == {"use", "file system", "space", "O_DIRECT", "drive"}
    assert levels["use"] is Level.OK
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["nowhere", "link", "file"])
def test_a_path_that_cannot_be_used_is_fatal_and_nothing_more_is_asked_of_it(tmp_path, name):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "file").touch()
    (finding,) = path_checks.checked(str(tmp_path / name))
    assert finding.level is Level.FATAL and finding.remedy


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory away")
def test_a_cache_that_an_engine_could_not_open_is_fatal(tmp_path):
    (tmp_path / "kvoffload").mkdir()
    os.chown(tmp_path / "kvoffload", OTHER_UID, OTHER_UID)
    (finding,) = path_checks.checked(str(tmp_path))
    assert finding.level is Level.FATAL and "owned by another user" in finding.found


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory away")
def test_a_path_in_which_only_the_cache_is_this_users_is_good(tmp_path):
    (tmp_path / "kvoffload").mkdir(mode=0o700)
    os.chown(tmp_path / "kvoffload", OTHER_UID, OTHER_UID)
    for above in (tmp_path, *tmp_path.parents[:-1]):
        above.chmod(above.stat().st_mode | 0o055)
    assert as_other_user(lambda: check_usable(str(tmp_path))) == ""
    assert list((tmp_path / "kvoffload").iterdir()) == []


def test_a_doctor_that_is_told_to_go_leaves_nothing(tmp_path):
    program = "from kvoffload.cli import main; main()"
    command = [sys.executable, "-c", program, "doctor", "--nvme-path", str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) as running:
        wait_until(lambda: any(tmp_path.iterdir()))
        running.terminate()
        assert running.wait(PATIENCE_S) == 128 + signal.SIGTERM
    assert list(tmp_path.iterdir()) == []


def test_a_drive_that_is_full_is_said_to_be_full_and_nothing_is_left_on_it(tmp_path, monkeypatch):
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Directory, "replace", full)
    (finding,) = path_checks.checked(str(tmp_path))
    assert finding.level is Level.FATAL and "No space left on device" in finding.found and "is a directory" not in finding.found
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_in_memory_costs_and_takes_no_direct_io_or_does():
    folder = Path(f"/dev/shm/kvoffload-doctor-{os.getpid()}")
    folder.mkdir()
    try:
        found = {finding.check.split(": ")[1]: finding for finding in path_checks.checked(str(folder))}
    finally:
        folder.rmdir()
    assert found["file system"].level is Level.COSTS and "after a reboot" in found["file system"].cost


def test_a_file_system_without_room_is_fatal(tmp_path):
    with small_file_system(tmp_path) as mounted:
        levels = {finding.check.split(": ")[1]: finding.level for finding in path_checks.checked(str(mounted))}
        (mounted / "kvoffload").mkdir()
        *_, space = path_checks.checked(str(mounted))
    assert levels == {"use": Level.OK, "file system": Level.OK, "space": Level.FATAL}
    assert space.level is Level.COSTS and "a cache that is there is opened" in space.cost


@pytest.mark.parametrize(("gb_per_s", "level"), [(5.0, Level.OK), (0.2, Level.COSTS)])
def test_a_drive_that_a_gpu_outpaces_costs(gb_per_s, level):
    sample = Sample(int(gb_per_s * 1e9), 1.0, 0.1, 1.0, 2.0)
    found = path_checks.judged("/mnt", Figures(2**21, 2**28, sample, sample, []))
    assert found.level is level and f"{gb_per_s:.2f} GB/s" in found.found


def test_the_command_says_all_and_fails_where_an_engine_could_not_start(kvoffload, tmp_path, monkeypatch):
    done = kvoffload("doctor", "--nvme-path", tmp_path)
    assert done.code == 0 and "An engine can start here" in done.out and "io_uring" in done.out
    done = kvoffload("doctor", "--nvme-path", tmp_path, "--json")
    checks = [each["check"] for each in json.loads(done.out)]
    assert done.code == 0 and len(checks) == 14 and f"{tmp_path}: drive" in checks
    done = kvoffload("doctor", "--nvme-path", tmp_path / "nowhere", "--json")
    assert done.code == 1 and json.loads(done.out)[-1]["level"] == "fatal"
    monkeypatch.setattr(window, "installed", lambda: None)
    done = kvoffload("doctor")
    assert done.code == 1 and "could not start" in done.out
