"""`kvoffload inspect`: what it tells of a store, and that it leaves no trace."""

import json
import os
from pathlib import Path

import pytest

from tests.cli.helpers import fill, flip, namespace_of, running, slot_at, snapshot
from tests.store.helpers import key, slot_file, used_bytes


def caches(kvoffload, *paths):
    done = kvoffload("inspect", *paths, "--json")
    return done, [cache for path in json.loads(done.out) for cache in path["caches"]]


def test_a_cache_is_described_by_model_sizes_ages_and_use(kvoffload, tmp_path):
    fill(tmp_path, range(5), model="llama [b]")
    done, (cache,) = caches(kvoffload, tmp_path)
    assert done.code == 0 and done.err == ""
    assert cache["model"] == "llama [b]" and cache["namespace"] == namespace_of(tmp_path).name
    assert (cache["slots_used"], cache["starts"], cache["in_use_by"], cache["trouble"]) == (5, 1, None, None)
    assert cache["slots"] > 100
    assert cache["disk_bytes"] == used_bytes(namespace_of(tmp_path))
    assert cache["disk_bytes"] <= cache["reserved_bytes"] <= 20e6
    assert cache["created"] and cache["last_used"]
    table = kvoffload("inspect", tmp_path).out
    assert "llama [b]" in table and f"5 of {cache['slots']}" in table and "nobody" in table


def test_nothing_is_changed_not_even_modes_or_times_and_with_an_engine_running(kvoffload, tmp_path):
    fill(tmp_path, range(3), model="a")
    fill(tmp_path, range(3), model="b", megabytes=40)
    namespace = next((tmp_path / "kvoffload").glob("*/manifest.json"))
    namespace.chmod(0o644)  # an engine would close it to others
    with running(tmp_path, range(3), model="c", megabytes=60):
        before = snapshot(tmp_path)
        done, found = caches(kvoffload, tmp_path)
        assert done.code == 0 and len(found) == 3
        assert snapshot(tmp_path) == before


def test_the_engine_that_uses_a_cache_is_named_and_only_while_it_runs(kvoffload, tmp_path):
    with running(tmp_path, range(2)):
        assert caches(kvoffload, tmp_path)[1][0]["in_use_by"] == f"process {os.getpid()}"
    assert caches(kvoffload, tmp_path)[1][0]["in_use_by"] is None


def test_uses_noted_in_the_journal_are_counted_until_it_is_compacted(kvoffload, tmp_path):
    with running(tmp_path, range(3)) as filled:
        for _ in range(4):
            filled.store.touch([(key(0), 0), (key(1), 1), (key(99), 2)])
        filled.store.flush(10)
        assert caches(kvoffload, tmp_path)[1][0]["uses_noted"] == 8
    fill(tmp_path, ())
    (cache,) = caches(kvoffload, tmp_path)[1]
    assert (cache["uses_noted"], cache["starts"], cache["slots_used"]) == (0, 2, 3)


def test_a_journal_that_is_being_appended_is_no_trouble(kvoffload, tmp_path):
    fill(tmp_path)
    with (namespace_of(tmp_path) / "index.journal").open("ab") as journal:
        journal.write(b"\1" * 40)
    done, (cache,) = caches(kvoffload, tmp_path)
    assert (done.code, done.err, cache["slots_used"], cache["trouble"]) == (0, "", 6, None)


@pytest.mark.parametrize("name", ["manifest.json", "index.journal", "rank1of2.slots"])
def test_a_cache_that_engines_would_refuse_is_shown_with_the_reason(kvoffload, tmp_path, name):
    fill(tmp_path)
    flip(namespace_of(tmp_path) / name, 2)
    done = kvoffload("inspect", tmp_path)
    assert done.code == 1 and "is damaged" in done.out
    done, (cache,) = caches(kvoffload, tmp_path)
    assert done.code == 1 and name in cache["trouble"]


def test_what_is_damaged_in_a_slot_is_not_seen_here(kvoffload, tmp_path):
    fill(tmp_path)
    flip(slot_file(tmp_path), slot_at(1, 5000))
    assert kvoffload("inspect", tmp_path).code == 0


def test_a_cache_striped_over_two_paths_is_shown_below_each(kvoffload, tmp_path):
    paths = [tmp_path / "a", tmp_path / "b"]
    for path in paths:
        path.mkdir()
    fill(paths)
    first, second = caches(kvoffload, *paths)[1]
    assert first["namespace"] == second["namespace"] and first["paths"] == [str(path) for path in paths]
    assert (first["path_index"], first["slots_used"]) == (0, 6)
    assert (second["path_index"], second["slots_used"]) == (1, None)


def test_control_characters_of_a_models_name_do_not_reach_the_terminal(kvoffload, tmp_path):
    fill(tmp_path, model="a\x1b[2Jb")
    assert "\x1b" not in kvoffload("inspect", tmp_path).out


@pytest.mark.parametrize("command", ["inspect", "verify", "clean"])
def test_a_mistake_is_one_sentence_and_leaves_no_directory(kvoffload, tmp_path, command):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    (tmp_path / "empty" / "file").touch()
    before = snapshot(tmp_path)
    for path, says in (
        ("nowhere", "does not exist"),
        ("empty", "holds no store of kvoffload"),
        ("link", "symbolic link"),
        ("empty/file", "is not a directory"),
    ):
        done = kvoffload(command, tmp_path / path)
        assert (done.code, done.out, len(done.err.splitlines())) == (2, "", 1)
        assert says in done.err
    assert "more than once" in kvoffload(command, tmp_path / "empty", Path(f"{tmp_path}/x/../empty")).err
    assert snapshot(tmp_path) == before
