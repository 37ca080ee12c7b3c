"""Directories by descriptor: every access is relative to an open directory and follows no symlink.

What is opened belongs to this process's user alone: nobody else owns it, may read or write it, or has another name for
it. A file made by `replace` is whole or absent after a kill at any moment.
"""

import contextlib
import errno
import logging
import os
import stat
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Self

from ..errors import StoreError

logger = logging.getLogger(__name__)

DIRECTORY_MODE = 0o700
FILE_MODE = 0o600
TEMPORARY_SUFFIX = ".tmp"
_DIRECTORY_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
_REFUSALS = (errno.EACCES, errno.EPERM)
_FULL = (errno.ENOSPC, errno.EDQUOT)


def explain(path: str, error: OSError) -> StoreError:
    """The user's sentence for an operating system error met at `path`, or below it if the error says where."""
    if isinstance(error.filename, str) and os.path.isabs(error.filename):
        path = error.filename
    if error.errno == errno.EROFS:  # as file systems become after errors of the drive
        return StoreError(
            f"{path} cannot be written ({error.strerror}): see the kernel's log for errors of the drive, and mount it to be written"
        )
    if error.errno in _REFUSALS:
        return StoreError(
            f"{path} is not writable by uid {os.geteuid()} ({error.strerror}): change its permissions or name another nvme_path"
        )
    if error.errno in _FULL:
        return StoreError(f"{path} cannot be written ({error.strerror}): free some space there, for a start writes its index anew")
    return StoreError(f"{path} cannot be used ({error.strerror}): check the drive or name another nvme_path")


@contextlib.contextmanager
def explained(path: str) -> Iterator[None]:
    """What the operating system refuses meanwhile becomes the user's sentence."""
    try:
        yield
    except OSError as error:
        raise explain(path, error) from error


def _refuse_other_owner(path: str, found: os.stat_result) -> None:
    if found.st_uid != os.geteuid():
        raise StoreError(
            f"{path} is owned by another user (uid {found.st_uid}, this process is uid {os.geteuid()}): "
            "run this as that user, give it to this one, or name another nvme_path"
        )


def _set_mode(path: str, fd: int, found: os.stat_result, mode: int) -> None:
    """Gives it the mode, whatever the umask made of it, or somebody's chmod since. StoreError if others keep access."""
    before = found.st_mode & 0o777
    if before & 0o077 == 0 and before & mode == mode:
        return
    os.chmod(f"/proc/self/fd/{fd}", mode)  # fchmod refuses a descriptor opened by O_PATH
    if os.fstat(fd).st_mode & 0o077:
        raise StoreError(f"{path} is open to other users, for its file system keeps no modes: name another nvme_path")
    if before & 0o077:
        logger.warning("%s was open to other users (mode %o), who may have read it: it no longer is", path, before)


class Directory:
    """An open directory of ours. Not for use by several threads at once, except `replace` of different names.

    One that is only looked at changes nothing by being opened, nor does what is opened below it: modes stay as they are
    found, and the times at which files were last read do too.
    """

    def __init__(self, path: str, fd: int, only_look: bool = False) -> None:
        self.path = path
        self.fd = fd
        self._only_look = only_look
        self._unseen = os.O_NOATIME if only_look else 0

    @classmethod
    def open(cls, path: str, only_look: bool = False) -> Self:
        """Open an nvme_path: a real directory that belongs to this user or to root, as mount points do."""
        try:
            found = os.lstat(path)
        except FileNotFoundError:
            raise StoreError(f"nvme_path {path} does not exist: create it or correct the path") from None
        if stat.S_ISLNK(found.st_mode):
            raise StoreError(f"nvme_path {path} is a symbolic link, which is never followed: name its target instead")
        if not stat.S_ISDIR(found.st_mode):
            raise StoreError(f"nvme_path {path} is not a directory: name a directory")
        directory = cls(path, os.open(path, _DIRECTORY_FLAGS), only_look)
        owner = os.fstat(directory.fd).st_uid
        if owner not in (os.geteuid(), 0):
            directory.close()
            raise StoreError(
                f"nvme_path {path} is owned by another user (uid {owner}, this process is uid {os.geteuid()}): "
                "run this as that user, give it to this one, or name another directory"
            )
        return directory

    @contextlib.contextmanager
    def located(self, name: str) -> Iterator[str]:
        """Gives the absolute path of `name`, which an OSError met meanwhile then carries too."""
        path = os.path.join(self.path, name)
        try:
            yield path
        except OSError as error:
            error.filename, error.filename2 = path, None
            raise

    def child(self, name: str, create: bool = False) -> "Directory":
        """Open a directory below. FileNotFoundError if there is none and it is not to be created."""
        if create:
            with contextlib.suppress(FileExistsError):
                os.mkdir(name, DIRECTORY_MODE, dir_fd=self.fd)
                os.fsync(self.fd)
        with self.located(name) as path:
            try:
                # O_PATH needs no permission, and a umask may have left the new directory without any.
                place = os.open(name, _DIRECTORY_FLAGS | os.O_PATH, dir_fd=self.fd)
            except OSError as error:
                if error.errno not in (errno.ELOOP, errno.ENOTDIR):
                    raise
                raise StoreError(f"{path} is not a directory of kvoffload: remove it or name another nvme_path") from None
            try:
                found = os.fstat(place)
                _refuse_other_owner(path, found)
                if not self._only_look:
                    _set_mode(path, place, found, DIRECTORY_MODE)
                return Directory(path, os.open(".", _DIRECTORY_FLAGS | self._unseen, dir_fd=place), self._only_look)
            finally:
                os.close(place)

    def open_file(self, name: str, flags: int = os.O_RDWR) -> int:
        """Open a regular file of ours; returns its descriptor. FileNotFoundError unless O_CREAT is in flags."""
        with self.located(name) as path:
            try:
                # O_NONBLOCK: a fifo of that name must not stop us before we can see that it is one.
                fd = os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK | self._unseen, FILE_MODE, dir_fd=self.fd)
            except OSError as error:
                if error.errno not in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
                    raise
                raise StoreError(f"{path} is not a regular file: remove it") from None
            try:
                found = os.fstat(fd)
                if not stat.S_ISREG(found.st_mode):
                    raise StoreError(f"{path} is not a regular file: remove it")
                _refuse_other_owner(path, found)
                if found.st_nlink > 1:
                    # What is written here would land in a file that may be none of ours.
                    raise StoreError(f"{path} has a second name (a hard link), by which others may reach it: remove it")
                if not self._only_look:
                    _set_mode(path, fd, found, FILE_MODE)
            except (OSError, StoreError):
                os.close(fd)
                raise
            return fd

    def read(self, name: str, limit: int) -> bytes | None:
        """The file's first `limit` bytes, or None if there is no such file."""
        try:
            fd = self.open_file(name, os.O_RDONLY)
        except FileNotFoundError:
            return None
        with self.located(name), os.fdopen(fd, "rb") as file:
            return file.read(limit)

    def changed_at(self, name: str) -> float | None:
        """When the file's content last changed, in seconds of the wall clock; None if there is no such file."""
        try:
            with self.located(name):
                return os.stat(name, dir_fd=self.fd, follow_symlinks=False).st_mtime
        except FileNotFoundError:
            return None

    def replace(self, name: str, chunks: Iterable[bytes]) -> int:
        """Put a new durable file in place of `name` in one step; returns its descriptor, open to read and write."""
        temporary = name + TEMPORARY_SUFFIX
        self.remove(temporary)
        with self.located(name):
            fd = self.open_file(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL)
            try:
                for chunk in chunks:
                    write_all(fd, chunk)
                os.fsync(fd)
                os.rename(temporary, name, src_dir_fd=self.fd, dst_dir_fd=self.fd)
                os.fsync(self.fd)
            except OSError:
                os.close(fd)
                self.remove(temporary)
                raise
            return fd

    def rename(self, name: str, other: str) -> None:
        """Give a file another name, in place of what has it."""
        with self.located(name):
            os.rename(name, other, src_dir_fd=self.fd, dst_dir_fd=self.fd)

    def remove(self, name: str) -> None:
        """Remove a file (or the symlink itself) if it is there."""
        with contextlib.suppress(FileNotFoundError), self.located(name):
            os.unlink(name, dir_fd=self.fd)

    def sync(self) -> None:
        """Make durable which names there are."""
        with self.located("."):
            os.fsync(self.fd)

    def names(self) -> list[str]:
        return sorted(os.listdir(self.fd))

    def tree_bytes(self, name: str) -> int:
        """Physical bytes of `name` and everything below it."""
        with self.located(name):
            found = os.stat(name, dir_fd=self.fd, follow_symlinks=False)
        total = found.st_blocks * 512
        if not stat.S_ISDIR(found.st_mode):
            return total
        for _, directories, files, fd in os.fwalk(name, dir_fd=self.fd, follow_symlinks=False):
            for each in directories + files:
                try:
                    total += os.stat(each, dir_fd=fd, follow_symlinks=False).st_blocks * 512
                except FileNotFoundError:
                    continue  # a live engine replaced a file meanwhile
        return total

    def close(self) -> None:
        os.close(self.fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def write_all(fd: int, data: bytes) -> None:
    """Append all of `data`; OSError when the disk takes no more."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
