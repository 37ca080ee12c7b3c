from pathlib import Path

from tests.torture.command import run_short

CASES = 30
CLASSES = ("superblock", "journal header", "journal record", "manifest", "lock", "slot header", "payload")


def test_a_flipped_bit_of_any_byte_class_is_a_miss_or_a_clear_refusal(seed: int, tmp_path: Path) -> None:
    counts = run_short("byte_flips", "cases", CASES, seed, tmp_path)
    for name in CLASSES:
        assert sum(count for title, count in counts.items() if title.startswith(name)) >= CASES // 2, name
