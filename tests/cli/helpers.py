"""What tests of the commands share: the command in this process, and a store filled by real engines."""

import contextlib
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import pytest

from kvoffload.cli import main
from kvoffload.engine import Engine
from kvoffload.layout import slot_offset
from kvoffload.store import Store
from kvoffload.types import EngineOptions, OpKind, Region
from kvoffload.worker import block_ops
from tests.patience import PATIENCE_S
from tests.store.helpers import PAYLOAD, key, namespace_of, open_store

DRAM_SLOTS = 16


class Done(NamedTuple):
    code: int
    out: str
    err: str


class Command:
    """`kvoffload` with arguments, as its entry point runs it."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *arguments: object) -> Done:
        self._capsys.readouterr()
        with mock.patch.object(sys, "argv", ["kvoffload", *map(str, arguments)]), pytest.raises(SystemExit) as ended:
            main()
        out, err = self._capsys.readouterr()
        return Done(ended.value.code or 0, out, err)


class Filled:
    """An open store of two ranks, and the engine of each."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._engines = contextlib.ExitStack()
        self._content = np.random.default_rng(0).integers(0, 256, (DRAM_SLOTS, PAYLOAD), dtype=np.uint8)
        self.engines = []
        for rank in range(2):
            engine = self._engines.enter_context(Engine(EngineOptions(PAYLOAD, DRAM_SLOTS, 4)))
            engine.bind([[Region(self._content.ctypes.data, PAYLOAD, PAYLOAD)]])
            engine.attach(store.slot_files(rank))
            self.engines.append(engine)

    def write(self, slots: Iterable[int], first_key: int = 0) -> None:
        """As a manager does: the slot's former block is forgotten, every rank writes, and the index learns of it."""
        for slot in slots:
            name, generation = key(first_key + slot), self.store.next_generation()
            for entry in self.store.table():
                if entry.slot == slot:
                    self.store.delete(entry.key, entry.slot)
            for engine in self.engines:
                fields: dict[str, Any] = {"generation": generation, "dram_slot": slot % DRAM_SLOTS, "ssd_slot": slot}
                for kind in (OpKind.COPY_OUT, OpKind.WRITE):
                    assert engine.submit(block_ops(kind, [name], fields)) == 1
                    assert engine.wait(30)
                    assert engine.poll()["status"].tolist() == [0]
            self.store.put(name, slot, generation, 0)

    def close(self) -> None:
        self._engines.close()
        self.store.close()


@contextlib.contextmanager
def running(paths: Path | Iterable[Path], slots: Iterable[int] = (), **options: Any) -> Iterator[Filled]:
    """An engine that has written blocks to these slots, and still runs. Its files take all of their cap at once."""
    filled = Filled(open_store(paths, **options))
    try:
        filled.write(slots)
        assert filled.store.flush(PATIENCE_S)
        yield filled
    finally:
        filled.close()


def fill(paths: Path | Iterable[Path], slots: Iterable[int] = range(6), **options: Any) -> None:
    with running(paths, slots, **options):
        pass


def flip(file: Path, offset: int) -> None:
    with file.open("r+b", buffering=0) as opened:
        opened.seek(offset)
        byte = opened.read(1)[0]
        opened.seek(offset)
        opened.write(bytes([byte ^ 1]))
        os.fsync(opened.fileno())


def slot_at(number: int, within: int = 0) -> int:
    """Where in a slot file of one path a byte of a slot lies."""
    return slot_offset(number, PAYLOAD) + within


def snapshot(path: Path) -> dict[str, tuple]:
    """All that looking must not change."""
    found = {}
    for each in [path, *path.rglob("*")]:
        stat = each.lstat()
        content = each.read_bytes() if each.is_file() else b""
        found[str(each)] = stat.st_mode, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, hash(content)
    return found


__all__ = ["Command", "Done", "Filled", "fill", "flip", "namespace_of", "running", "slot_at", "snapshot"]
