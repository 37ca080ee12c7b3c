"""Digests of weights, remembered: they are right or computed again, and what remembers them is small, private and replaceable."""

import json
import math
import mmap
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from kvoffload.store import Digests, digests
from tests.engine.loop_device import call, unmount
from tests.store.helpers import MB, open_store, tick, used_bytes, write_blocks

IN_MEMORY = digests.IN_MEMORY


@pytest.fixture(autouse=True)
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digests, "SETTLE_SECONDS", -1.0)
    monkeypatch.setattr(digests, "IN_MEMORY", ())  # where tests run may be one


@pytest.fixture
def nvme(tmp_path: Path) -> Path:
    (tmp_path / "nvme").mkdir()
    open_store(tmp_path / "nvme").close()
    return tmp_path / "nvme"


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"weights")
    return path


def digest(path: Path) -> str:
    return path.read_bytes().hex().ljust(64, "0")


def never(path: Path) -> str:
    raise AssertionError(f"{path} was read")


def remember(nvme: Path, path: Path, compute: Callable[[Path], str] = digest) -> str:
    known = Digests.load(str(nvme))
    found = known.of(path, compute)
    known.save()
    return found


def test_a_digest_is_computed_once_and_then_remembered_across_processes(nvme: Path, weights: Path) -> None:
    assert remember(nvme, weights) == remember(nvme, weights, never) == digest(weights)


def rewritten(path: Path) -> None:
    path.write_bytes(b"retrain")


def rewritten_with_the_old_times(path: Path) -> None:
    found = path.stat()
    path.write_bytes(b"retrain")
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))


def replaced_by_another_with_the_old_times(path: Path) -> None:
    found = path.stat()
    (path.parent / "new").write_bytes(b"retrain")
    os.utime(path.parent / "new", ns=(found.st_atime_ns, found.st_mtime_ns))
    os.rename(path.parent / "new", path)


def one_byte_written_in_place(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(b"W")


@pytest.mark.parametrize(
    "change", [rewritten, rewritten_with_the_old_times, replaced_by_another_with_the_old_times, one_byte_written_in_place]
)
def test_a_file_of_the_same_size_that_changed_is_read_again(nvme: Path, weights: Path, change: Callable[[Path], None]) -> None:
    before = remember(nvme, weights)
    tick(nvme.parent)
    change(weights)
    assert weights.stat().st_size == 7
    assert remember(nvme, weights) == digest(weights) != before


def test_a_file_changed_just_now_is_not_remembered(nvme: Path, weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within a tick of the clock its next change would leave it the same times."""
    monkeypatch.setattr(digests, "SETTLE_SECONDS", math.inf)  # however long this test takes
    remember(nvme, weights)
    weights.write_bytes(b"retrain")
    assert remember(nvme, weights) == digest(weights)
    assert not (nvme / "kvoffload" / "digests.json").exists()


def test_what_was_read_of_a_file_that_changed_meanwhile_is_not_taken_for_it(nvme: Path, weights: Path) -> None:
    def torn(path: Path) -> str:
        tick(nvme.parent)
        path.write_bytes(b"retrain")
        return "0" * 64

    assert remember(nvme, weights, torn) == "0" * 64
    assert remember(nvme, weights) == digest(weights)


def test_what_was_read_of_another_file_under_the_same_name_is_not_taken_for_it(nvme: Path, tmp_path: Path) -> None:
    """A symlink led elsewhere between the look at the file and its reading, and was led back later: no time tells of that."""
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(name.encode())
    current = tmp_path / "current"
    weights = current / "model.safetensors"

    def lead_to(name: str) -> None:
        current.unlink(missing_ok=True)
        current.symlink_to(name)

    def led_elsewhere(path: Path) -> str:
        lead_to("new")
        return digest(path)

    lead_to("old")
    remember(nvme, weights, led_elsewhere)
    lead_to("old")
    assert remember(nvme, weights) == digest(weights)
    lead_to("new")
    assert remember(nvme, weights) == digest(weights)


def image(folder: Path, content: str) -> Path:
    """A file system with weights in it, as a build makes it whose times are always the same."""
    (folder / content).mkdir()
    (folder / content / "model.safetensors").write_text(content)
    made = folder / f"{content}.image"
    try:
        call("mkfs.ext4", "-q", "-I", "128", "-d", folder / content, made, "4M")
        for field in ("ctime", "mtime", "atime"):
            call("debugfs", "-w", "-R", f"set_inode_field /model.safetensors {field} 20200101000000", made)
    except FileNotFoundError as error:
        pytest.skip(f"no image can be made here: {error}")
    return made


def test_other_weights_in_an_image_built_with_the_same_times_are_read_again(nvme: Path, tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    mounted = tmp_path / "models"
    mounted.mkdir()
    stamps = set()
    for content in ("old", "new"):
        call("mount", "-o", "loop,ro", image(tmp_path, content), mounted)
        try:
            weights = mounted / "model.safetensors"
            stamps.add(digests._stamp(weights, weights.stat()))
            assert remember(nvme, weights) == digest(weights)
        finally:
            unmount(mounted)
    if len(stamps) > 1:
        pytest.skip("another test took the loop device in between")


def test_weights_in_memory_that_a_mapping_changed_without_a_time_are_read_again(
    nvme: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if digests.file_system(os.stat("/dev/shm").st_dev) != "tmpfs":
        pytest.skip("/dev/shm is no tmpfs here")
    monkeypatch.setattr(digests, "IN_MEMORY", IN_MEMORY)
    with tempfile.NamedTemporaryFile(dir="/dev/shm", suffix=".gguf") as file:
        weights = Path(file.name)
        weights.write_bytes(b"weights")
        tick(nvme.parent)
        remember(nvme, weights)
        with weights.open("r+b") as opened, mmap.mmap(opened.fileno(), 0) as mapping:
            assert mapping[0] == ord("w")  # the page is there now, and writable: writing meets no fault
            mapping[0] = ord("W")
        assert remember(nvme, weights) == digest(weights)


def test_weights_that_a_mapping_goes_on_writing_are_read_again(nvme: Path, weights: Path) -> None:
    """A page that is dirty already is written without a time changing."""
    if digests.file_system(weights.stat().st_dev) in IN_MEMORY:
        pytest.skip("files in memory are always read again")
    with weights.open("r+b") as opened, mmap.mmap(opened.fileno(), 0) as mapping:
        mapping[0] = ord("x")
        tick(nvme.parent)
        before = remember(nvme, weights)
        mapping[0] = ord("y")
        assert remember(nvme, weights) == digest(weights) != before


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"a": "b"}', '{"%s": 1}' % ("0" * 32), "[" * 100_000, "\0\xff", '{"x": {"y": []}}']
)
def test_what_is_not_as_we_write_it_is_forgotten_and_replaced(nvme: Path, weights: Path, text: str) -> None:
    file = nvme / "kvoffload" / "digests.json"
    file.write_text(text, encoding="latin-1")
    assert remember(nvme, weights) == digest(weights)
    assert list(json.loads(file.read_text()).values()) == [digest(weights)]


def test_without_a_path_or_with_one_that_cannot_be_used_nothing_is_remembered_and_nothing_made(
    tmp_path: Path, weights: Path
) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    for path in (None, str(tmp_path / "missing"), str(weights), str(tmp_path / "link")):
        known = Digests.load(path)
        assert known.of(weights, digest) == digest(weights)
        known.save()
    assert {each.name for each in tmp_path.iterdir()} == {"link", weights.name}


def test_loading_makes_nothing(tmp_path: Path, weights: Path) -> None:
    Digests.load(str(tmp_path)).of(weights, digest)
    assert [each.name for each in tmp_path.iterdir()] == [weights.name]


def test_a_symlink_in_its_place_is_not_followed_and_said(
    nvme: Path, weights: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    target = tmp_path / "precious"
    target.write_text("{}")
    (nvme / "kvoffload" / "digests.json").symlink_to(target)
    assert remember(nvme, weights) == digest(weights)
    assert target.read_text() == "{}"
    assert f"computed anew: {nvme}/kvoffload/digests.json is not a regular file: remove it" in caplog.text


def test_processes_that_save_at_the_same_time_lose_nothing_of_each_other(nvme: Path, tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}.safetensors" for number in range(4)]
    known = []
    for number, path in enumerate(paths):
        path.write_bytes(b"%d" % number)
        known.append(Digests.load(str(nvme)))
        known[-1].of(path, digest)
    for each in known:
        each.save()
    assert [remember(nvme, path, never) for path in paths] == [digest(path) for path in paths]


def test_the_newest_are_kept_and_all_of_it_is_within_the_cap(nvme: Path, tmp_path: Path) -> None:
    with open_store(nvme) as store:
        slots = store.slot_count
    known = Digests.load(str(nvme))
    paths = [tmp_path / f"{number}.safetensors" for number in range(digests.ENTRIES_MAX + 5)]
    for number, path in enumerate(paths):
        path.write_bytes(b"%d" % number)
        known.of(path, digest)
    known.save()
    file = nvme / "kvoffload" / "digests.json"
    assert file.stat().st_size <= digests._BYTES_MAX
    again = Digests.load(str(nvme))
    assert [again.of(path, never) for path in paths[5:]] == [digest(path) for path in paths[5:]]
    (nvme / "kvoffload" / "digests.json.tmp").write_bytes(file.read_bytes())  # as a kill may leave it
    with open_store(nvme) as store:
        assert store.slot_count == slots, "no block is lost to them"
        write_blocks(store, range(store.slot_count))
        assert used_bytes(nvme / "kvoffload") <= 20 * MB
