from pathlib import Path

from tests.torture.command import run_short

IMAGES = 60


def test_what_a_power_loss_leaves_opens_and_holds_what_was_flushed(seed: int, tmp_path: Path) -> None:
    counts = run_short("power_loss", "images", IMAGES, seed, tmp_path)
    assert counts["images"] >= IMAGES
    assert counts["blocks recovered"] > counts["of them misses"]
