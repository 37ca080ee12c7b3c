"""What `clean_obsolete_kv_cache` must leave: what is not obsolete, in use after all, or a part of something whole."""

import fcntl
from pathlib import Path

import pytest

from kvoffload.errors import StoreError
from kvoffload.store import Store, namespace
from kvoffload.store.directory import Directory
from tests.store.helpers import PAYLOAD, config, namespace_of, open_store, slot_file, write_blocks


def striped(tmp_path: Path) -> list[Path]:
    """Two paths; a cache is striped over them, its journal on the second."""
    paths = [tmp_path / "a", tmp_path / "b"]
    for path in paths:
        path.mkdir()
    with open_store(paths[::-1], model="striped") as store:
        write_blocks(store, range(6))
    return paths


def test_a_part_of_a_striped_cache_is_not_obsolete_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    paths = striped(tmp_path)
    open_store(paths[0], 10, clean_obsolete_kv_cache=True).close()
    assert "stays: a part of it lies on paths that are not among these, or cannot be read" in caplog.text
    with open_store(paths[::-1], 60, model="striped") as store:
        assert len(store.table()) == 6
    open_store(paths, 10, model="other", clean_obsolete_kv_cache=True).close()
    assert [len(list((path / "kvoffload").glob("*/"))) for path in paths] == [1, 1]


def test_of_a_striped_cache_whose_part_with_the_journal_stays_the_others_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = striped(tmp_path)

    def fails(root: Directory, directory: Directory) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as seam:
        seam.setattr(namespace, "remove", fails)
        seam.setattr(namespace, "clean", lambda root, names, real=namespace.clean: real(root, names) and not names)
        open_store(paths, 10, clean_obsolete_kv_cache=True).close()
    with open_store(paths[::-1], 60, model="striped") as store:
        assert len(store.table()) == 6


def test_of_a_striped_cache_the_part_with_the_journal_is_removed_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = striped(tmp_path)
    real, removed = namespace.remove, []

    def cut_off(root: Directory, directory: Directory) -> None:
        if removed:
            raise KeyboardInterrupt
        removed.append(root.path)
        real(root, directory)

    monkeypatch.setattr(namespace, "remove", cut_off)
    with pytest.raises(KeyboardInterrupt):
        open_store(paths, clean_obsolete_kv_cache=True)
    monkeypatch.undo()
    assert removed == [str(paths[1] / "kvoffload")]
    with open_store(paths[::-1], 60, model="striped") as store:
        assert len(store.table()) == 0
        write_blocks(store, range(6))
    with monkeypatch.context() as seam, pytest.raises(KeyboardInterrupt):
        removed.clear()
        seam.setattr(namespace, "remove", cut_off)
        open_store(paths, clean_obsolete_kv_cache=True)
    open_store(paths, clean_obsolete_kv_cache=True).close()
    assert [len(list((path / "kvoffload").glob("*/"))) for path in paths] == [1, 1], "the next start takes what is left of it"


def test_what_a_worker_still_uses_is_not_obsolete(tmp_path: Path) -> None:
    open_store(tmp_path, 5, model="old").close()
    old, file = namespace_of(tmp_path), slot_file(tmp_path)
    with open(file) as worker:
        fcntl.flock(worker, fcntl.LOCK_SH)
        open_store(tmp_path, clean_obsolete_kv_cache=True).close()
        assert file.exists()
    open_store(tmp_path, clean_obsolete_kv_cache=True).close()
    assert not old.exists()


def open_engine(path: Path, number: int, megabytes: float, engines: int = 2, **settings: object) -> Store:
    """One of a data-parallel deployment's."""
    fields = [{"model": "m", "data_parallel": [each, engines]} for each in range(engines)]
    own = fields.pop(number)
    return Store.open(config(path, megabytes, **settings), own, PAYLOAD, 2, fields)


def test_after_the_cap_was_lowered_what_the_other_engines_left_is_obsolete_if_it_takes_all_of_it(tmp_path: Path) -> None:
    for number in range(2):
        with open_engine(tmp_path, number, 20) as store:
            write_blocks(store, range(store.slot_count))
    with pytest.raises(StoreError, match="clean_obsolete_kv_cache=true"):
        open_engine(tmp_path, 0, 9)
    for number in range(2):
        open_engine(tmp_path, number, 9, clean_obsolete_kv_cache=True).close()


def test_what_the_other_engines_of_a_deployment_left_is_not_obsolete(tmp_path: Path) -> None:
    open_store(tmp_path, 5, model="old").close()
    old = namespace_of(tmp_path)
    for number in range(2):
        with open_engine(tmp_path, number, 20) as store:
            write_blocks(store, range(6))
    for number in range(2):
        with open_engine(tmp_path, number, 20, clean_obsolete_kv_cache=True) as store:
            assert len(store.table()) == 6
    assert not old.exists()
