"""What cannot be used is refused in one sentence that names the remedy, and nothing is destroyed."""

import errno
import json
import os
import re
import shutil
import struct
from pathlib import Path

import pytest
import xxhash

from kvoffload.errors import StoreError
from kvoffload.store.directory import explain
from tests.store.helpers import OTHER_UID, as_other_user, namespace_of, open_store, slot_file, write_blocks


def refusal(paths: Path | list[Path], **settings: object) -> str:
    with pytest.raises(StoreError) as caught:
        open_store(paths, **settings)  # type: ignore[arg-type]
    text = str(caught.value)
    assert "\n" not in text
    return text


def contents(path: Path) -> dict[Path, bytes]:
    """Every file below, but for locks: they carry the pid of the last who tried."""
    return {each: each.read_bytes() for each in path.rglob("*") if each.is_file() and "lock" not in each.name}


@pytest.fixture
def filled(tmp_path: Path) -> Path:
    with open_store(tmp_path) as store:
        write_blocks(store, range(6))
    return tmp_path


def assert_refused_and_curable(path: Path, pattern: str) -> None:
    before = contents(path)
    text = refusal(path)
    assert re.search(pattern, text), text
    assert "resume_kv_cache=false" in text
    assert contents(path) == before
    with open_store(path, resume_kv_cache=False) as store:
        assert list(store.table()) == []
        write_blocks(store, range(4))
    with open_store(path) as store:
        assert [entry.slot for entry in store.table()] == list(range(4))


def test_a_missing_path(tmp_path: Path) -> None:
    assert refusal(tmp_path / "no") == f"nvme_path {tmp_path}/no does not exist: create it or correct the path"
    assert not (tmp_path / "no").exists()


def test_a_drive_that_became_read_only_is_no_matter_of_permissions() -> None:
    said = str(explain("/nvme", OSError(errno.EROFS, os.strerror(errno.EROFS), "/nvme/kvoffload")))
    assert said.startswith("/nvme/kvoffload cannot be written (Read-only file system): see the kernel's log")


def test_a_path_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    assert "is not a directory" in refusal(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_path_that_is_a_symlink(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert "is a symbolic link" in refusal(tmp_path / "link")
    assert not any((tmp_path / "real").iterdir())


@pytest.mark.parametrize("name", ["kvoffload", "namespace", "rank0of2.slots", "index.journal", "manifest.json", "lock"])
def test_a_symlink_below_the_path_is_never_followed(filled: Path, tmp_path_factory: pytest.TempPathFactory, name: str) -> None:
    outside = tmp_path_factory.mktemp("outside")
    namespace = namespace_of(filled)
    victim = {"kvoffload": namespace.parent, "namespace": namespace}.get(name, namespace / name)
    shutil.move(victim, outside / "target")
    victim.symlink_to(outside / "target")
    before = contents(outside)
    text = refusal(filled)
    assert str(victim) in text and "is not a" in text
    assert contents(outside) == before


def test_a_symlink_in_a_slot_files_place_is_replaced_if_asked(filled: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    outside = tmp_path_factory.mktemp("outside") / "target"
    shutil.move(slot_file(filled), outside)
    (namespace_of(filled) / "rank0of2.slots").symlink_to(outside)
    before = outside.read_bytes()
    open_store(filled, resume_kv_cache=False).close()
    assert outside.read_bytes() == before
    assert not slot_file(filled).is_symlink()


def test_a_fifo_instead_of_a_file_does_not_hang(filled: Path) -> None:
    journal = namespace_of(filled) / "index.journal"
    journal.unlink()
    os.mkfifo(journal)
    assert "is not a regular file" in refusal(filled)


def test_a_path_that_is_not_writable(public_path: Path) -> None:
    path = public_path / "nvme"
    path.mkdir()
    path.chmod(0o555)
    if os.geteuid() == 0:
        os.chown(path, OTHER_UID, OTHER_UID)
    assert re.search(rf"{path} is not writable by uid \d+", as_other_user(lambda: open_store(path)))
    assert not any(path.iterdir())


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory away")
def test_a_path_owned_by_another_user(tmp_path: Path) -> None:
    (tmp_path / "nvme").mkdir()
    os.chown(tmp_path / "nvme", OTHER_UID, OTHER_UID)
    text = refusal(tmp_path / "nvme")
    assert f"nvme_path {tmp_path}/nvme is owned by another user (uid {OTHER_UID}, this process is uid 0)" in text


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory away")
def test_a_kvoffload_directory_owned_by_another_user(filled: Path) -> None:
    os.chown(filled / "kvoffload", OTHER_UID, OTHER_UID)
    assert f"{filled}/kvoffload is owned by another user (uid {OTHER_UID}" in refusal(filled)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_journal_owned_by_another_user(filled: Path) -> None:
    os.chown(namespace_of(filled) / "index.journal", OTHER_UID, OTHER_UID)
    assert f"index.journal is owned by another user (uid {OTHER_UID}, this process is uid 0)" in refusal(filled)


def test_a_mount_point_of_root_that_all_may_write_to_serves_every_user(public_path: Path) -> None:
    public_path.chmod(0o1777)
    assert as_other_user(lambda: open_store(public_path).close()) == ""


def test_one_directory_under_two_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [tmp_path / "a", tmp_path / "b"]
    for path in paths:
        path.mkdir()
    identity = os.stat(tmp_path)
    real = os.fstat
    with monkeypatch.context() as seam:  # a bind mount, as far as fstat tells
        seam.setattr("kvoffload.store.opening.os.fstat", lambda fd: identity if real(fd).st_mode & 0o40000 else real(fd))
        assert "are one directory" in refusal(paths)


def test_a_slot_file_cut_within_its_superblock(filled: Path) -> None:
    os.truncate(slot_file(filled, rank=1), 4095)
    assert_refused_and_curable(filled, r"slot file .*rank1of2.slots is truncated \(4095 bytes")


def test_a_slot_file_cut_below_what_the_journal_knows(filled: Path) -> None:
    file = slot_file(filled)
    os.truncate(file, file.stat().st_size - 1)
    assert_refused_and_curable(filled, r"slot file .*rank0of2.slots is truncated")


def test_a_slot_file_that_is_gone(filled: Path) -> None:
    slot_file(filled).unlink()
    assert_refused_and_curable(filled, r"slot file .*rank0of2.slots is missing \(the journal knows of blocks up to byte \d+\)")


def test_a_slot_file_cut_beyond_what_the_journal_knows_is_fine(filled: Path) -> None:
    os.truncate(slot_file(filled), slot_file(filled).stat().st_size + 4096)
    with open_store(filled) as store:
        assert len(store.table()) == 6


def rewrite(path: Path, offset: int, data: bytes, covered: int) -> None:
    """Change a header and make its checksum right again."""
    with open(path, "r+b") as file:
        header = bytearray(file.read(covered))
        header[offset : offset + len(data)] = data
        file.seek(0)
        file.write(bytes(header) + struct.pack("<Q", xxhash.xxh3_64_intdigest(bytes(header))))


def test_a_slot_file_of_a_newer_format(filled: Path) -> None:
    rewrite(slot_file(filled), 8, struct.pack("<I", 2), 56)
    assert_refused_and_curable(filled, r"slot file .*rank0of2.slots has format 2, newer than 1")


@pytest.mark.parametrize(
    ("offset", "field"),
    [
        (12, struct.pack("<I", 1)),
        (16, struct.pack("<I", 3)),
        (20, struct.pack("<I", 1)),
        (24, struct.pack("<I", 2)),
        (32, struct.pack("<Q", 4096)),
        (40, b"x" * 16),
    ],
)
def test_a_slot_file_of_another_geometry(filled: Path, offset: int, field: bytes) -> None:
    rewrite(slot_file(filled), offset, field, 56)
    assert_refused_and_curable(filled, r"slot file .*rank0of2.slots has another geometry")


@pytest.mark.parametrize("offset", [0, 12, 40, 56, 63])
def test_a_damaged_superblock(filled: Path, offset: int) -> None:
    with open(slot_file(filled), "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))
    assert_refused_and_curable(filled, r"slot file .*rank0of2.slots is damaged")


def test_a_journal_of_a_newer_format(filled: Path) -> None:
    rewrite(namespace_of(filled) / "index.journal", 8, struct.pack("<I", 2), 56)
    assert_refused_and_curable(filled, r"journal .*index.journal has format 2, newer than 1")


def test_a_journal_of_a_format_that_never_was(filled: Path) -> None:
    rewrite(namespace_of(filled) / "index.journal", 8, struct.pack("<I", 0), 56)
    assert_refused_and_curable(filled, r"journal .*index.journal has format 0, which this kvoffload does not know")


@pytest.mark.parametrize("epoch", [2**24 - 1, 2**64 - 1])
def test_a_journal_after_which_there_are_no_generations_is_refused_before_they_are_given(filled: Path, epoch: int) -> None:
    rewrite(namespace_of(filled) / "index.journal", 16, struct.pack("<Q", epoch), 56)
    assert_refused_and_curable(filled, rf"journal .*index.journal is damaged \(no start can follow its epoch {epoch}\)")


def test_the_last_epoch_gives_generations(filled: Path) -> None:
    rewrite(namespace_of(filled) / "index.journal", 16, struct.pack("<Q", 2**24 - 2), 56)
    with open_store(filled) as store:
        assert store.next_generation() == ((2**24 - 1) << 40) + 1


@pytest.mark.parametrize("length", [0, 1, 63])
def test_a_journal_shorter_than_its_header(filled: Path, length: int) -> None:
    os.truncate(namespace_of(filled) / "index.journal", length)
    assert_refused_and_curable(filled, rf"journal .*index.journal is truncated \({length} bytes")


def test_a_journal_that_is_something_else(filled: Path) -> None:
    (namespace_of(filled) / "index.journal").write_bytes(b"x" * 1000)
    assert_refused_and_curable(filled, r"journal .*index.journal is damaged")


def test_a_journal_of_another_namespace(filled: Path) -> None:
    rewrite(namespace_of(filled) / "index.journal", 24, b"x" * 16, 56)
    assert_refused_and_curable(filled, r"journal .*index.journal belongs to another namespace")


MANIFEST = {
    "format": "kvoffload",
    "format_version": 1,
    "path_index": 0,
    "paths": ["/a"],
    "slot_count": 9,
    "reserved_bytes": 0,
    "created": "",
}
UNREADABLE = [
    "",
    "{",
    "[]",
    "null",
    '{"format_version": 1}',
    '{"format_version": "x"}',
    "\0\xff",
    "[" * 100_000,
    '{"format_version": Infinity}',
    MANIFEST | {"slot_count": 4294967295},
    MANIFEST | {"reserved_bytes": -1},
    MANIFEST | {"format_version": 0},
    MANIFEST | {"format": "other"},
]


@pytest.mark.parametrize("text", UNREADABLE)
def test_an_unreadable_manifest(filled: Path, text: str | dict[str, object]) -> None:
    written = text if isinstance(text, str) else json.dumps(text)
    (namespace_of(filled) / "manifest.json").write_text(written, encoding="latin-1")
    assert_refused_and_curable(filled, r"manifest.json is damaged")


@pytest.mark.parametrize("data", [b'{"format": "' + b"x" * 10_000 + b'\xa0"}', b'{"format_version": "' + b"x" * 10_000 + b'"}'])
def test_a_refusal_does_not_repeat_a_whole_manifest(filled: Path, data: bytes) -> None:
    manifest = namespace_of(filled) / "manifest.json"
    manifest.write_bytes(data)
    assert len(refusal(filled)) < len(str(manifest)) + 250


@pytest.mark.parametrize("field", ["path_index", "reserved_bytes", "format_version"])
def test_a_manifest_with_a_number_too_long_to_be_written_is_damaged(filled: Path, field: str) -> None:
    """Python writes 4300 digits at most: the sentence about such a number could not be made."""
    text = json.dumps(MANIFEST | {field: 7}).replace(f'"{field}": 7', f'"{field}": {"9" * 4300}')
    (namespace_of(filled) / "manifest.json").write_text(text)
    assert_refused_and_curable(filled, rf"manifest.json is damaged \(ValueError: {field} is out of range\)")


def test_a_manifest_of_paths_that_cannot_be_encoded_is_no_matter(filled: Path) -> None:
    path = namespace_of(filled) / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"paths": ["\ud800"], "created": "\ud800"}))
    with open_store(filled) as store:
        assert len(store.table()) == 6
    path.write_text(json.dumps(json.loads(path.read_text()) | {"path_index": 1, "paths": ["\ud800"]}))
    assert "list the paths as they were" in refusal(filled).encode().decode()


def test_a_manifest_of_a_newer_format(filled: Path) -> None:
    path = namespace_of(filled) / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 2}))
    assert_refused_and_curable(filled, r"manifest.json has format 2, newer than 1")


def test_a_list_of_paths_in_another_order_or_number(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in "abc"]
    for path in paths:
        path.mkdir()
    with open_store(paths[:2]) as store:
        write_blocks(store, range(6))
    before = contents(tmp_path)
    for other in ([paths[1], paths[0]], paths, paths[:1], paths[1:2]):
        text = refusal(other)
        assert "list the paths as they were, or set resume_kv_cache=false" in text
        assert str(paths[0]) in text and str(paths[1]) in text
    assert contents(tmp_path) == before
    with open_store(paths[:2]) as store:
        assert len(store.table()) == 6
    with open_store([paths[1], paths[0]], resume_kv_cache=False) as store:
        assert list(store.table()) == []
        write_blocks(store, range(6))
    with open_store([paths[1], paths[0]]) as store:
        assert len(store.table()) == 6
    for other in (paths[1:2], paths):  # a drive is gone for good; others came
        with open_store(other, resume_kv_cache=False) as store:
            assert list(store.table()) == []
            write_blocks(store, range(6))
        with open_store(other) as store:
            assert len(store.table()) == 6


def test_a_path_that_moved_is_the_same_cache(tmp_path: Path) -> None:
    (tmp_path / "before").mkdir()
    with open_store(tmp_path / "before") as store:
        write_blocks(store, range(6))
    (tmp_path / "before").rename(tmp_path / "after")
    with open_store(tmp_path / "after") as store:
        assert len(store.table()) == 6
        assert store.directory.startswith(str(tmp_path / "after"))


def test_the_message_of_an_operating_system_error_names_the_file(filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as seam:
        seam.setattr("kvoffload.store.directory.os.rename", fail)
        text = refusal(filled)
    assert text == (
        f"{namespace_of(filled)}/index.journal cannot be used (Input/output error): check the drive or name another nvme_path"
    )
    with open_store(filled) as store:
        assert len(store.table()) == 6


def test_an_error_below_the_second_path_names_the_file_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [tmp_path / "a", tmp_path / "b"]
    for path in paths:
        path.mkdir()
    with open_store(paths) as store:
        write_blocks(store, range(store.slot_count))
    file = str(slot_file(paths[1], rank=1))
    real = os.ftruncate

    def fail(fd: int, length: int) -> None:
        if os.readlink(f"/proc/self/fd/{fd}") == file:
            raise OSError(5, "Input/output error")
        real(fd, length)

    with monkeypatch.context() as seam:
        seam.setattr("kvoffload.store.slotfile.os.ftruncate", fail)
        assert refusal(paths, megabytes=10).startswith(f"{file} cannot be used (Input/output error)")


def test_a_file_that_cannot_be_opened_is_named(filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def fail(name: str, *arguments: object, **options: object) -> int:
        if name == "rank1of2.slots":
            raise OSError(5, "Input/output error", name)
        return real(name, *arguments, **options)  # type: ignore[arg-type]

    with monkeypatch.context() as seam:
        seam.setattr("kvoffload.store.directory.os.open", fail)
        assert refusal(filled).startswith(f"{slot_file(filled, rank=1)} cannot be used")


def test_a_journal_that_outgrew_its_slots_is_refused_unread(filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = namespace_of(filled) / "index.journal"
    os.truncate(journal, 1 << 40)  # a hole
    with monkeypatch.context() as seam:
        seam.setattr("kvoffload.store.journal.replay", lambda body: pytest.fail("it was read"))
        text = refusal(filled)
    assert re.search(r"index.journal is damaged \(\d+ bytes, but one of \d+ slots never exceeds \d+\)", text)
    assert "resume_kv_cache=false" in text
    open_store(filled, resume_kv_cache=False).close()


def test_of_several_paths_none_is_touched_if_one_is_missing(tmp_path: Path) -> None:
    (tmp_path / "good").mkdir()
    assert "does not exist" in refusal([tmp_path / "good", tmp_path / "missing"])
    assert not any((tmp_path / "good").iterdir())


def test_the_second_path_never_has_a_journal(tmp_path: Path) -> None:
    paths = [tmp_path / "a", tmp_path / "b"]
    for path in paths:
        path.mkdir()
    with open_store(paths) as store:
        write_blocks(store, range(6))
    (namespace_of(paths[0]) / "index.journal.tmp").write_bytes(b"x")
    open_store(paths[::-1], resume_kv_cache=False).close()
    assert not list(namespace_of(paths[0]).glob("index.journal*"))
    shutil.copy(namespace_of(paths[1]) / "index.journal", namespace_of(paths[0]))
    open_store(paths[::-1]).close()
    assert not list(namespace_of(paths[0]).glob("index.journal*"))


def test_a_start_anew_that_stops_before_its_manifests_leaves_none_of_another_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [tmp_path / "a", tmp_path / "b"]
    for path in paths:
        path.mkdir()
    open_store(paths).close()

    def fail(*_: object) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as seam:
        seam.setattr("kvoffload.store.namespace.Manifest.write", fail)
        assert "Input/output error" in refusal(paths[::-1], resume_kv_cache=False)
    open_store(paths[::-1]).close()
