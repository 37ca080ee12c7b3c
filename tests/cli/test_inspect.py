"""`kvoffload inspect`: what it tells of a store, and that it leaves no trace."""

import json
import os
import re
from pathlib import Path

import pytest

from kvoffload.errors import StoreError
from tests.cli.helpers import fill, flip, namespace_of, running, slot_at, snapshot
from tests.patience import PATIENCE_S
from tests.store.helpers import OTHER_UID, key, slot_file, used_bytes


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
        filled.store.flush(PATIENCE_S)
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


def shorten(namespace: Path) -> None:
    os.truncate(namespace / "rank1of2.slots", slot_at(3))


def lose(namespace: Path) -> None:
    (namespace / "rank0of2.slots").unlink()


def rename(namespace: Path) -> None:
    (namespace / "rank0of2.slots").rename(namespace / "rank0of4.slots")


def swap(namespace: Path) -> None:
    for name, other in (("rank0of2.slots", "x"), ("rank1of2.slots", "rank0of2.slots"), ("x", "rank1of2.slots")):
        (namespace / name).rename(namespace / other)


def take_anothers(namespace: Path) -> None:
    other = namespace.parents[1] / "other"
    other.mkdir()
    fill(other, model="another")
    slot_file(other).replace(namespace / "rank0of2.slots")


@pytest.mark.parametrize("damage", [shorten, lose, rename, swap, take_anothers])
def test_files_that_do_not_belong_together_are_told_as_an_engine_would_refuse_them(kvoffload, tmp_path, damage):
    fill(tmp_path)
    damage(namespace_of(tmp_path))
    with pytest.raises(StoreError) as refused:
        fill(tmp_path)
    done, (cache,) = caches(kvoffload, tmp_path)
    assert done.code == 1 and cache["trouble"] == str(refused.value)
    done = kvoffload("verify", tmp_path)
    assert done.code == 1 and done.err == ""
    assert kvoffload("clean", tmp_path, "--yes").code == 0
    assert not list((tmp_path / "kvoffload").glob("*/"))


def second_name(namespace: Path) -> None:
    os.link(namespace / "lock", namespace.parents[1] / "hard")


def other_kind(namespace: Path) -> None:
    (namespace / "lock").unlink()
    os.mkfifo(namespace / "lock")


def other_owner(namespace: Path) -> None:
    if os.geteuid() == 0:
        os.chown(namespace, OTHER_UID, OTHER_UID)
    else:
        namespace.chmod(0)


@pytest.mark.parametrize("damage", [second_name, other_kind, other_owner])
def test_a_cache_that_cannot_be_looked_into_hides_no_other(kvoffload, tmp_path, damage):
    fill(tmp_path, model="bad")
    bad = namespace_of(tmp_path)
    fill(tmp_path, megabytes=40, model="good")
    damage(bad)
    done, found = caches(kvoffload, tmp_path)
    assert done.code == 1 and len(found) == 2
    assert {bool(cache["trouble"]) for cache in found} == {True, False}
    assert (json.loads(kvoffload("verify", tmp_path, "--json").out))["blocks"] == 12
    assert kvoffload("clean", tmp_path, "--model", "good", "--yes").code == 0
    done = kvoffload("clean", tmp_path, "--all", "--yes")
    assert done.code == 1 and "stays" in done.out and bad.exists()


def test_json_is_strict_whatever_a_manifest_holds(kvoffload, tmp_path):
    fill(tmp_path)
    manifest = namespace_of(tmp_path) / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"fields": {', '"fields": {"x": NaN, "y": -Infinity,'))
    out = kvoffload("inspect", tmp_path, "--json").out
    json.loads(out, parse_constant=lambda name: pytest.fail(name))


def test_in_a_pipe_a_row_is_a_line_and_on_a_narrow_terminal_nothing_is_cut(kvoffload, tmp_path, monkeypatch):
    fill(tmp_path, model="a" * 200)
    monkeypatch.setenv("COLUMNS", "80")
    name = namespace_of(tmp_path).name[:12]
    (row,) = (line for line in kvoffload("inspect", tmp_path).out.splitlines() if name in line)
    assert "a" * 200 in row and "nobody" in row
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal
    out = kvoffload("inspect", tmp_path).out
    assert name in out and "\u2026" not in out and max(len(re.sub("\x1b.*?m", "", line)) for line in out.splitlines()) == 80
    assert "uses" in out  # the last column


def test_one_directory_by_two_names_is_a_mistake(kvoffload, tmp_path):
    (tmp_path / "real").mkdir()
    fill(tmp_path / "real")
    (tmp_path / "link").symlink_to(tmp_path)
    for command in (["inspect"], ["verify"], ["clean", "--all", "--yes"]):
        done = kvoffload(*command, tmp_path / "real", tmp_path / "link" / "real")
        assert done.code == 2 and "are one directory: name it once" in done.err


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
    assert "a path is empty" in kvoffload(command, "").err  # as of an unset variable, and not the working directory
    assert "more than once" in kvoffload(command, tmp_path / "empty", Path(f"{tmp_path}/x/../empty")).err
    assert snapshot(tmp_path) == before
