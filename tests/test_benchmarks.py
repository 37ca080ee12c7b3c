"""The drive benchmark runs, reports every cell, and notices bytes that are not those it wrote. Figures mean nothing here."""

import json

import numpy as np
import pytest

from benchmarks import bench_drive
from benchmarks.rows import fio
from benchmarks.rows.base import PAGE, Place, RowError, make_file
from benchmarks.rows.loop import LoopRow
from kvoffload.cli.passes import EngineRow
from tests.engine.world import has_io_uring

SLOTS = 64
SLOT_BYTES = 65_536
GIB = str(SLOTS * SLOT_BYTES / 2**30)


@pytest.fixture
def folder(tmp_path):
    if not bench_drive.takes_direct(tmp_path):
        pytest.skip("the temporary folder refuses O_DIRECT")
    return tmp_path


@pytest.mark.skipif(not has_io_uring(), reason="no io_uring here, and it is one of the rows")
def test_every_row_delivers_every_cell(folder, monkeypatch):
    monkeypatch.setattr(fio, "DEPTHS", (16,))  # half a second each
    sizes = ["--sizes", str(SLOT_BYTES >> 10), "--gib", GIB, "--tmpfs-gib", GIB, "--memory-mib", "2", "--repetitions", "1"]
    where = ["--folder", str(folder / "drive"), "--tmpfs", str(folder), "--output", str(folder / "output")]
    without = [] if fio.is_installed() else ["--without-fio"]
    assert bench_drive.main([*sizes, *where, *without]) == 0

    cells = json.loads((folder / "output" / "bench_drive.json").read_text())["cells"]
    rows = [bench_drive.ENGINE, bench_drive.THREADS, bench_drive.VLLM, bench_drive.LOOP, *([] if without else [bench_drive.FIO])]
    expected = {(medium, way, row) for medium in ("drive", "tmpfs") for way in ("write", "read") for row in rows}
    expected |= {("drive", way, bench_drive.REFERENCE) for way in ("write", "read")}
    expected |= {("drive", way, bench_drive.FIO_ALL) for way in ("write", "read") if not without}
    assert {(cell["medium"], cell["direction"], cell["row"]) for cell in cells} == expected
    assert len(cells) == len(expected)
    for cell in cells:
        assert cell["gb_per_s"]["median"] > 0 and cell["cpu_s_per_gib"]["median"] >= 0
        assert 0 < cell["p50_ms"]["median"] <= cell["p99_ms"]["median"]
        assert cell["checked_slots"] == (0 if cell["row"] in (bench_drive.FIO, bench_drive.FIO_ALL) else bench_drive.CHECKED_SLOTS)
    for name in ("bench_drive.md", "bench_drive.png"):
        assert (folder / "output" / name).stat().st_size > 1000
    assert not (folder / "drive").exists()


@pytest.mark.parametrize(
    "row", [EngineRow("engine", "auto"), EngineRow("engine", "threads"), LoopRow("loop")], ids=["engine", "threads", "loop"]
)
def test_a_flipped_byte_is_noticed(folder, row):
    try:
        place = Place(folder, "drive", SLOT_BYTES, SLOTS, memory_bytes=16 * SLOT_BYTES)
        make_file(place)
        row.prepare(place)
        order = np.random.default_rng(0).permutation(SLOTS)
        for _ in range(2):  # what was read is what is written next
            row.write(order)
            row.read(order[::-1])
        assert row.check(range(SLOTS)) == SLOTS
        with place.file.open("r+b") as opened:
            opened.seek(PAGE + SLOTS * SLOT_BYTES - 100)
            byte = opened.read(1)
            opened.seek(-1, 1)
            opened.write(bytes([byte[0] ^ 1]))
        with pytest.raises(RowError):
            row.check(range(SLOTS))
    finally:
        row.close()


def test_without_fio_it_says_how_to_get_it(monkeypatch, capsys):
    monkeypatch.setattr(fio, "is_installed", lambda: False)
    assert bench_drive.main([]) == 1
    assert "apt-get install fio" in capsys.readouterr().err
