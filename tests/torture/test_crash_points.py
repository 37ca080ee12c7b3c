from pathlib import Path

from tests.torture.command import run_short

KILLS = 40


def test_what_kill_9_leaves_is_right_in_bytes_and_order_and_leaks_nothing(seed: int, tmp_path: Path) -> None:
    counts = run_short("crash_points", "kills", KILLS, seed, tmp_path)
    assert counts["kills"] == KILLS
    assert counts["blocks recovered"] > KILLS
