"""Who may reach what is stored: modes whatever the umask, owners, second names, and files that are none."""

import contextlib
import os
import re
import socket
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvoffload.errors import StoreError
from kvoffload.store import Digests
from tests.patience import PATIENCE_S
from tests.store.helpers import OTHER_UID, as_other_user, namespace_of, open_store, write_blocks

AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
FILES = ("lock", "manifest.json", "index.journal", "rank1of2.slots")


@contextlib.contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def modes(path: Path) -> dict[str, int]:
    """Of everything below our directory, by kind: what others and we may do with it."""
    found = [path / "kvoffload", *(path / "kvoffload").rglob("*")]
    return {str(each.relative_to(path)): stat.S_IMODE(each.lstat().st_mode) for each in found}


def assert_private(path: Path) -> None:
    found = modes(path)
    assert len(found) >= 8
    assert {name: mode for name, mode in found.items() if mode != (0o700 if (path / name).is_dir() else 0o600)} == {}


def fill(path: Path) -> None:
    """Everything a store ever makes: the journal compacted at run time, digests, an end and another beginning."""
    with open_store(path) as store:
        write_blocks(store, range(4))
        store.clear()
        assert store.flush(PATIENCE_S)
        digests = Digests.load(str(path))
        digests._known["0" * 32] = digests._new["0" * 32] = "1" * 64
        digests.save()
    open_store(path).close()


@pytest.mark.parametrize("mask", [0, 0o022, 0o077, 0o777])
def test_directories_are_0700_and_files_0600_whatever_the_umask(tmp_path: Path, mask: int) -> None:
    with umask(mask):
        fill(tmp_path)
    assert_private(tmp_path)


@AS_ROOT
@pytest.mark.parametrize("mask", [0, 0o777])
def test_a_user_without_privileges_can_use_what_any_umask_made(public_path: Path, mask: int) -> None:
    nvme = public_path / "nvme"
    nvme.mkdir()
    os.chown(nvme, OTHER_UID, OTHER_UID)

    def use() -> None:
        os.umask(mask)
        fill(nvme)

    assert as_other_user(use) == ""
    assert_private(nvme)
    assert {each.stat().st_uid for each in (nvme / "kvoffload").rglob("*")} == {OTHER_UID}


def test_what_was_opened_to_others_is_closed_again_and_said_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fill(tmp_path)
    for each in [tmp_path / "kvoffload", *(tmp_path / "kvoffload").rglob("*")]:
        each.chmod(0o777)
    with open_store(tmp_path) as store:
        write_blocks(store, range(4))
        Digests.load(str(tmp_path))
    assert_private(tmp_path)
    for name in ("kvoffload", namespace_of(tmp_path).name, *FILES):
        assert re.search(rf"/{name} was open to other users \(mode 777\), who may have read it", caplog.text), name


def test_a_file_system_that_keeps_no_modes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "kvoffload").mkdir(mode=0o755)
    with monkeypatch.context() as seam, pytest.raises(StoreError, match="/kvoffload is open to other users, for its file system"):
        seam.setattr("kvoffload.store.directory.os.chmod", lambda *_: None)
        open_store(tmp_path)
    assert not any((tmp_path / "kvoffload").iterdir())


def refusal(path: Path) -> str:
    with pytest.raises(StoreError) as caught:
        open_store(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@AS_ROOT
@pytest.mark.parametrize("name", ["", "lock", "manifest.json", "index.journal", "rank1of2.slots", "../.lock"])
def test_what_another_user_owns_is_refused_by_name(tmp_path: Path, name: str) -> None:
    fill(tmp_path)
    theirs = (namespace_of(tmp_path) / name).resolve()
    os.chown(theirs, OTHER_UID, OTHER_UID)
    before = theirs.read_bytes() if name else b""
    assert f"{theirs} is owned by another user (uid {OTHER_UID}, this process is uid 0)" in refusal(tmp_path)
    assert (theirs.read_bytes() if name else b"") == before


@AS_ROOT
def test_what_root_left_below_the_path_is_refused_to_a_user_but_the_path_itself_may_be_roots(public_path: Path) -> None:
    public_path.chmod(0o777)
    (public_path / "kvoffload").mkdir()
    text = as_other_user(lambda: open_store(public_path))
    assert f"{public_path}/kvoffload is owned by another user (uid 0, this process is uid {OTHER_UID})" in text
    (public_path / "kvoffload").rmdir()
    assert as_other_user(lambda: open_store(public_path).close()) == ""


@pytest.mark.parametrize("name", [*FILES, "../.lock"])
def test_a_file_with_a_second_name_is_refused_and_what_it_holds_stays(tmp_path: Path, name: str) -> None:
    fill(tmp_path)
    ours = (namespace_of(tmp_path) / name).resolve()
    precious = tmp_path / "precious"
    precious.write_bytes(b"an only copy")
    ours.unlink()
    os.link(precious, ours)
    assert f"{ours} has a second name (a hard link), by which others may reach it: remove it" in refusal(tmp_path)
    assert precious.read_bytes() == b"an only copy"


def test_a_slot_file_with_a_second_name_is_replaced_if_asked(tmp_path: Path) -> None:
    fill(tmp_path)
    ours = namespace_of(tmp_path) / "rank1of2.slots"
    precious = tmp_path / "precious"
    precious.write_bytes(b"an only copy")
    ours.unlink()
    os.link(precious, ours)
    open_store(tmp_path, resume_kv_cache=False).close()
    assert precious.read_bytes() == b"an only copy" and ours.stat().st_nlink == precious.stat().st_nlink == 1


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))


def make_device(path: Path) -> None:
    try:
        os.mknod(path, 0o600 | stat.S_IFCHR, os.makedev(1, 3))
    except PermissionError:
        pytest.skip("devices cannot be made here")


STRANGERS = {"directory": Path.mkdir, "fifo": os.mkfifo, "device": make_device, "socket": make_socket}


@pytest.mark.parametrize("kind", STRANGERS)
@pytest.mark.parametrize("name", FILES)
def test_what_is_no_file_is_refused_and_hangs_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, kind: str
) -> None:
    fill(tmp_path)
    monkeypatch.chdir(namespace_of(tmp_path))  # a socket's path must be short
    os.unlink(name)
    make: Callable[[Path], object] = STRANGERS[kind]
    make(Path(name))
    assert f"{namespace_of(tmp_path)}/{name} is not a regular file: remove it" in refusal(tmp_path)


@pytest.mark.parametrize("what", ["kvoffload", "namespace"])
def test_a_file_in_a_directorys_place_is_refused(tmp_path: Path, what: str) -> None:
    fill(tmp_path)
    place = {"kvoffload": tmp_path / "kvoffload", "namespace": namespace_of(tmp_path)}[what]
    place.rename(tmp_path / "aside")
    place.write_bytes(b"mine")
    assert f"{place} is not a directory of kvoffload: remove it" in refusal(tmp_path)
    assert place.read_bytes() == b"mine"
