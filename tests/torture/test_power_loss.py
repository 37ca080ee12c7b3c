import os
import random
from pathlib import Path

import pytest

from tests.store.helpers import open_store, write_blocks
from tests.torture.command import run_short
from tests.torture.disk import Disk

IMAGES = 60


def test_what_a_power_loss_leaves_opens_and_holds_what_was_flushed(seed: int, tmp_path: Path) -> None:
    counts = run_short("power_loss", "images", IMAGES, seed, tmp_path)
    assert counts["images"] >= IMAGES
    assert counts["blocks recovered"] > counts["of them misses"]


def test_a_power_loss_while_a_namespace_is_removed_leaves_it_whole_or_empty(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its slot files were gone and its journal was not, and the next start with that model was refused."""
    rng, images = random.Random(seed), []
    path = tmp_path / "disk" / "nvme"
    path.mkdir(parents=True)
    with open_store(path, model="old") as store:
        write_blocks(store, range(3))
        entries = list(store.table())

    def perhaps() -> None:
        if rng.random() < 0.5:
            images.append(tmp_path / f"image{len(images)}")
            disk.image(images[-1])

    with Disk(path.parent, rng, perhaps) as disk:
        open_store(path, model="new", clean_obsolete_kv_cache=True).close()
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    found = []
    for image in images:
        with open_store(image / path.name, model="old") as store:
            found.append(list(store.table()))
    assert all(each in (entries, []) for each in found)
    assert entries in found and [] in found
