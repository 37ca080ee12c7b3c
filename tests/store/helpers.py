"""What store tests share: a small store in a temporary directory, and an engine's footprint without an engine."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from kvoffload.config import Config
from kvoffload.layout import slot_bytes, slot_offset
from kvoffload.store import Store

PAYLOAD = 64 * 1024
MB = 10**6


def config(paths: Path | Iterable[Path], megabytes: float = 20, **settings: Any) -> Config:
    listed = [paths] if isinstance(paths, Path) else list(paths)
    return Config.parse({"nvme_path": [str(path) for path in listed], "ssd_kv_offload_gb": megabytes / 1000, **settings})


def open_store(paths: Path | Iterable[Path], megabytes: float = 20, model: str = "m", ranks: int = 2, **settings: Any) -> Store:
    return Store.open(config(paths, megabytes, **settings), {"model": model}, PAYLOAD, ranks)


def key(number: int) -> bytes:
    return b"%032d" % number + (0).to_bytes(4, "big")


def write_blocks(store: Store, slots: Iterable[int], ranks: int = 2) -> None:
    """What happens on disk when blocks are stored: the engine allocates and writes the slot, the index learns of it."""
    for slot in slots:
        for rank in range(ranks):
            files = store.slot_files(rank).paths
            fd = os.open(files[slot % len(files)], os.O_WRONLY)
            try:
                os.posix_fallocate(fd, slot_offset(slot // len(files), PAYLOAD), slot_bytes(PAYLOAD))
            finally:
                os.close(fd)
        store.put(key(slot), slot, store.next_generation(), 0)
    assert store.flush(10)


def used_bytes(path: Path) -> int:
    """What `du` says of everything below."""
    return sum(each.lstat().st_blocks * 512 for each in [path, *path.rglob("*")])


def slot_file(path: Path, rank: int = 0, ranks: int = 2) -> Path:
    (found,) = (path / "kvoffload").glob(f"*/rank{rank}of{ranks}.slots")
    return found


def namespace_of(path: Path) -> Path:
    (found,) = (each for each in (path / "kvoffload").iterdir() if each.is_dir())
    return found
