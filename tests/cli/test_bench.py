"""`kvoffload bench`: the real engine on a real file, of which nothing is left. Figures mean nothing here."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.engine.loop_device import IMAGE_BYTES, small_file_system
from tests.patience import wait_until

QUICK = ("--seconds", 0.1, "--size-gb", 0.01, "--block-kib", 64)


def measured(kvoffload, path, *arguments):
    done = kvoffload("bench", path, *arguments, "--json")
    assert done.code == 0, done.err
    return json.loads(done.out)


def test_both_directions_are_measured_and_nothing_is_left(kvoffload, tmp_path):
    found = measured(kvoffload, tmp_path, *QUICK)
    for direction in ("write", "read"):
        figures = found[direction]
        assert figures["bytes"] >= found["block_bytes"] and figures["bytes_per_second"] > 0 and figures["cpu_seconds"] > 0
        assert 0 < figures["p50_seconds"] <= figures["p99_seconds"]
    assert any(note.startswith("io: ") for note in found["notes"]) and f"file {tmp_path}: " in found["notes"][-1]
    assert list(tmp_path.iterdir()) == []
    table = kvoffload("bench", tmp_path, *QUICK).out
    assert "write" in table and "read" in table and "CPU per GB" in table


def test_size_block_and_seconds_are_as_asked_for(kvoffload, tmp_path):
    found = measured(kvoffload, tmp_path, "--seconds", 0.3, "--size-gb", 0.02, "--block-kib", 128)
    assert found["block_bytes"] == 128 * 1024
    assert found["file_bytes"] == 20_000_000 // (128 * 1024) * (128 * 1024)
    assert min(found["write"]["seconds"], found["read"]["seconds"]) >= 0.3


def test_blocks_too_large_for_the_space_are_a_mistake(kvoffload, tmp_path):
    done = kvoffload("bench", tmp_path, "--size-gb", 0.01, "--block-kib", 16384)
    assert done.code == 2 and "hold no 8 blocks" in done.err and len(done.err.splitlines()) == 1


def test_where_there_is_no_room_it_says_how_much_there_is_and_writes_nothing(kvoffload, tmp_path):
    with small_file_system(tmp_path) as mounted:
        free = os.statvfs(mounted).f_bavail
        done = kvoffload("bench", mounted, "--seconds", 0.1, "--size-gb", IMAGE_BYTES / 1e9)
        assert done.code == 2 and "of room beside what is left to others" in done.err
        assert os.statvfs(mounted).f_bavail == free
        assert measured(kvoffload, mounted, *QUICK)["file_bytes"]
        wait_until(lambda: os.statvfs(mounted).f_bavail == free)  # the kernel frees what has no name some time after its closing


@pytest.mark.parametrize("name", ["nowhere", "link", "file"])
def test_a_path_that_is_no_directory_of_ours_is_refused(kvoffload, tmp_path, name):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "file").touch()
    done = kvoffload("bench", tmp_path / name, *QUICK)
    assert done.code == 2 and len(done.err.splitlines()) == 1
    assert list((tmp_path / "real").iterdir()) == []


def test_kill_9_in_the_middle_leaves_nothing(tmp_path):
    command = [sys.executable, "-c", "from kvoffload.cli import main; main()", "bench", str(tmp_path), "--seconds", "600"]
    process = subprocess.Popen([*command, "--size-gb", "0.05", "--block-kib", "64"], stdout=subprocess.DEVNULL)

    def is_measuring() -> bool:
        assert process.poll() is None
        for each in Path(f"/proc/{process.pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # closed meanwhile
                if os.readlink(each).endswith(".slots (deleted)"):
                    return True
        return False

    try:
        wait_until(is_measuring)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    wait_until(lambda: list(tmp_path.iterdir()) == [])


@pytest.mark.parametrize("option", ["--size-gb", "--seconds"])
@pytest.mark.parametrize("value", ["inf", "nan", "-1", "1e9"])
def test_a_measurement_without_an_end_is_a_mistake(kvoffload, tmp_path, option, value):
    done = kvoffload("bench", tmp_path, f"{option}={value}")
    assert done.code == 2 and option in done.err and list(tmp_path.iterdir()) == []
