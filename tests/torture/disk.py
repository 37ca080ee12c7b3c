"""What a power loss may leave of some directories: a disk that promises no more than POSIX does.

While a `Disk` is entered, every change made below its directories through `os` is followed (what the C engine writes is
seen at the next such call). A sync of a file makes its bytes and size durable, a sync of a directory its names. Of what
was not synced, an image has anything: each 512-byte sector of a file as it was at any moment since the last sync, the
size likewise, and each name of a directory as it was at any moment since the last sync.
"""

import os
import random
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

SECTOR = 512
VERSIONS_MAX = 8  # kept of one file or directory
CHANGES = ("open", "write", "pwrite", "ftruncate", "rename", "unlink", "mkdir", "rmdir")
SYNCS = ("fsync", "fdatasync")
SMALL = 64  # sectors; such files are torn more often, or of the large ones nothing would be left whole
# Ways to draw sectors, and how often.
WAYS = {"newest": 6, "oldest": 1, "nearly newest": 3, "sectors": 1, "runs": 1}
WAYS_OF_SMALL = {"newest": 1, "oldest": 1, "sectors": 3}
DIRECTORY = -1


class Disk:
    """`on_change` is called before and after every change and sync, while no other thread can make one."""

    def __init__(self, base: Path, rng: random.Random, on_change: Callable[[], None]) -> None:
        self._base = base
        self._rng = rng
        self._on_change = on_change
        self.still = threading.RLock()  # while it is held nothing changes but by the engine
        self._real = {name: getattr(os, name) for name in CHANGES + SYNCS}
        self._descriptors: dict[int, int] = {}  # inode -> descriptor; held, or the number could be given to another file
        self._files: dict[int, list[bytes]] = {}  # inode -> contents since its last sync, the durable one first
        self._folders: dict[str, list[dict[str, int]]] = {}  # path below base -> names (inode) since its last sync
        self._look()
        for versions in (*self._files.values(), *self._folders.values()):
            del versions[:-1]  # what is there at first is durable

    def __enter__(self) -> Self:
        for name in CHANGES:
            setattr(os, name, self._followed(self._real[name]))
        for name in SYNCS:
            setattr(os, name, self._sync)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for name, real in self._real.items():
            setattr(os, name, real)
        for fd in self._descriptors.values():
            os.close(fd)

    def _followed(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            with self.still:
                self._on_change()
                result = real(*arguments, **options)
                self._look()
                self._on_change()
                return result

        return call

    def _sync(self, fd: int) -> None:
        with self.still:
            self._on_change()
            self._look()
            inode = os.fstat(fd).st_ino
            path = os.readlink(f"/proc/self/fd/{fd}")
            for versions in (self._files.get(inode), self._folders.get(self._below(path))):
                if versions:
                    del versions[:-1]
            self._on_change()

    def _below(self, path: str) -> str:
        return os.path.relpath(path, self._base)

    def _look(self) -> None:
        """Take in what is there now."""
        for folder, folders, files in os.walk(self._base):
            names = dict.fromkeys(folders, DIRECTORY)
            for name in files:
                inode = os.stat(os.path.join(folder, name)).st_ino
                if inode not in self._descriptors:
                    self._descriptors[inode] = self._real["open"](os.path.join(folder, name), os.O_RDONLY)
                names[name] = inode
            self._note(self._folders.setdefault(self._below(folder), [{}]), names)
        for inode, fd in self._descriptors.items():
            self._note(self._files.setdefault(inode, [b""]), os.pread(fd, os.fstat(fd).st_size, 0))
        self._let_go()

    def _note(self, versions: list[Any], now: Any) -> None:
        if versions[-1] != now:
            versions.append(now)
            if len(versions) > VERSIONS_MAX:
                del versions[self._rng.randrange(1, VERSIONS_MAX)]

    def _let_go(self) -> None:
        """Of files that no version of a directory names any more."""
        named = {inode for versions in self._folders.values() for names in versions for inode in names.values()}
        for inode in [inode for inode in self._descriptors if inode not in named]:
            os.close(self._descriptors.pop(inode))
            del self._files[inode]

    # -- after the power loss ------------------------------------------------------------------------------------

    def image(self, target: Path) -> None:
        """Make the directories below `target` as a power loss now might leave them."""
        with self.still:
            self._look()
            self._real["mkdir"](target)
            self._put_folder(".", target)

    def _put_folder(self, folder: str, target: Path) -> None:
        versions = self._folders.get(os.path.normpath(folder), [{}])
        for name in {name for names in versions for name in names}:
            inode = self._rng.choice(versions).get(name)
            if inode == DIRECTORY:
                self._real["mkdir"](target / name, 0o700)
                self._put_folder(os.path.join(folder, name), target / name)
            elif inode is not None:
                fd = self._real["open"](target / name, os.O_WRONLY | os.O_CREAT, 0o600)
                self._real["write"](fd, self._content(self._files[inode]))
                os.close(fd)

    def _content(self, versions: list[bytes]) -> bytes:
        rng = self._rng
        size = len(rng.choice(versions))
        if size == 0:
            return b""
        pages = [np.frombuffer(each[:size].ljust(-(-size // SECTOR) * SECTOR, b"\0"), np.uint8) for each in versions]
        sectors = np.stack(pages).reshape(len(versions), -1, SECTOR)
        count = sectors.shape[1]
        ways = WAYS_OF_SMALL if count <= SMALL else WAYS
        (way,) = rng.choices(list(ways), list(ways.values()))
        if way in ("newest", "oldest"):
            chosen = [0 if way == "oldest" else -1] * count
        elif way == "nearly newest":
            chosen = [rng.randrange(len(versions)) if rng.random() < 0.01 else -1 for _ in range(count)]
        else:
            chosen = []
            while len(chosen) < count:
                chosen += [rng.randrange(len(versions))] * (1 if way == "sectors" else rng.randint(1, 60))
        return sectors[chosen[:count], range(count)].tobytes()[:size]
