"""What store tests share: a small store in a temporary directory, and an engine's footprint without an engine."""

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from kvoffload.config import Config
from kvoffload.errors import StoreError
from kvoffload.layout import slot_bytes, slot_offset
from kvoffload.store import Store
from tests.patience import PATIENCE_S, wait_until

PAYLOAD = 64 * 1024
MB = 10**6
OTHER_UID = 12345


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
    assert store.flush(PATIENCE_S)


def used_bytes(path: Path) -> int:
    """What `du` says of everything below."""
    return sum(each.lstat().st_blocks * 512 for each in [path, *path.rglob("*")])


def slot_file(path: Path, rank: int = 0, ranks: int = 2) -> Path:
    (found,) = (path / "kvoffload").glob(f"*/rank{rank}of{ranks}.slots")
    return found


def namespace_of(path: Path) -> Path:
    (found,) = (each for each in (path / "kvoffload").iterdir() if each.is_dir())
    return found


def tick(folder: Path) -> None:
    """Until what is changed from now on gets a later time than what was changed before: the clock that stamps files is coarse."""
    probe = folder / "tick"

    def stamp() -> int:
        probe.write_bytes(b"")
        return probe.stat().st_ctime_ns

    first = stamp()
    wait_until(lambda: stamp() > first)
    probe.unlink()


def as_other_user(action: Callable[[], object]) -> str:
    """What StoreError `action` meets in a process without privileges."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        if os.geteuid() == 0:
            os.setgroups([])
            os.setgid(OTHER_UID)
            os.setuid(OTHER_UID)
        status = 1
        try:
            action()
            status = 0
        except StoreError as error:
            os.write(write_end, str(error).encode())
            status = 0
        finally:
            os._exit(status)
    os.close(write_end)
    with os.fdopen(read_end, "rb") as pipe:
        text = pipe.read().decode()
    assert os.waitpid(child, 0)[1] == 0
    return text
