"""`kvoffload clean`: what goes, what stays whatever is asked, and what is left where it is interrupted or raced."""

import fcntl
import json
import os
import pty
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from kvoffload.errors import StoreError
from kvoffload.store import Store, namespace, removal
from kvoffload.vllm import window
from tests.cli.helpers import fill, namespace_of, running, slot_at, snapshot
from tests.patience import PATIENCE_S, wait_until
from tests.store.helpers import PAYLOAD, config, open_store, slot_file


def names(path: Path) -> set[str]:
    return {each.name for each in (path / "kvoffload").iterdir() if each.is_dir()}


def models(path: Path) -> set[str]:
    found = [json.loads(file.read_text()) for file in (path / "kvoffload").glob("*/manifest.json")]
    return {each["identity"]["fields"]["model"] for each in found}


def made(path: Path, **fields: str) -> str:
    """An empty cache of these identity fields; its name."""
    with Store.open(config(path, 40), fields, PAYLOAD, 2) as store:
        return os.path.basename(store.directory)


def age(path: Path, days: float) -> None:
    then = time.time() - days * 86400
    for each in [*path.iterdir(), path]:
        os.utime(each, (then, then))


def test_all_goes_and_what_is_left_is_the_lock_alone(kvoffload, tmp_path):
    fill(tmp_path, model="a")
    fill(tmp_path, model="b", megabytes=40)
    (tmp_path / "kvoffload" / "digests.json").write_text("{}")
    (tmp_path / "kvoffload" / "digests.json").chmod(0o600)
    assert kvoffload("clean", tmp_path, "--all", "--yes").code == 0
    assert [each.name for each in (tmp_path / "kvoffload").iterdir()] == [".lock"]
    fill(tmp_path, model="a")  # and it can be used again


def test_a_dry_run_says_what_would_go_and_changes_nothing(kvoffload, tmp_path):
    fill(tmp_path)
    before = snapshot(tmp_path)
    done = kvoffload("clean", tmp_path, "--all", "--dry-run")
    assert done.code == 0 and "would be removed" in done.out
    (said,) = json.loads(kvoffload("clean", tmp_path, "--all", "--dry-run", "--json").out)
    assert (said["would_be_removed"], said["removed"], said["stays"]) == (True, False, None)
    assert snapshot(tmp_path) == before


def test_a_cache_in_use_stays_whatever_is_asked_and_its_engine_goes_on(kvoffload, tmp_path):
    fill(tmp_path, model="idle")
    with running(tmp_path, range(4), model="busy", megabytes=40) as filled:
        for choice in (["--all"], ["--all", "--wipe"], ["--model", "busy"]):
            done = kvoffload("clean", tmp_path, *choice, "--yes")
            assert done.code == 1 and f"stays: it is in use by process {os.getpid()}" in done.out
            assert models(tmp_path) == {"busy"} if choice[0] == "--all" else "busy" in models(tmp_path)
        filled.write(range(4), first_key=50)
        assert filled.store.flush(PATIENCE_S)
    assert kvoffload("verify", tmp_path).code == 0
    with open_store(tmp_path, 40, model="busy") as store:
        assert len(store.table()) == 4


def test_an_engine_that_came_after_we_looked_keeps_its_cache(tmp_path):
    fill(tmp_path, model="m")
    name = namespace_of(tmp_path).name
    used_at = time.time() + 1
    with running(tmp_path, range(2), model="m"):
        stays = removal.remove([str(tmp_path)], {name: used_at})
        assert "in use by process" in stays[name]
    stays = removal.remove([str(tmp_path)], {name: time.time() - 60})  # it was used, and ended, since
    assert "used just now" in stays[name]
    assert names(tmp_path) == {name}


def test_a_cache_stays_while_a_worker_of_a_dead_engine_has_its_files(kvoffload, tmp_path):
    fill(tmp_path)
    with slot_file(tmp_path, rank=1).open() as worker:
        fcntl.flock(worker, fcntl.LOCK_SH)
        done = kvoffload("clean", tmp_path, "--all", "--yes")
        assert done.code == 1 and "in use by a worker" in done.out and names(tmp_path)
    assert kvoffload("clean", tmp_path, "--all", "--yes").code == 0 and not names(tmp_path)


def test_engines_that_start_meanwhile_find_a_whole_cache_or_none(tmp_path, monkeypatch):
    """Or, while one is wiped, they are refused."""
    monkeypatch.setattr(namespace, "NAMESPACE_LOCK_SECONDS", 0.2)
    fill(tmp_path, range(4))
    name = namespace_of(tmp_path).name
    ended = threading.Event()
    failures, refusals, starts, outcomes = [], [], [], []

    def start_again_and_again() -> None:
        while not ended.is_set():
            try:
                with running(tmp_path, range(2)) as filled:
                    starts.append(filled)
                    found = len(filled.store.table())
                    if found < 2 or not os.path.exists(filled.store.directory):
                        failures.append(f"{found} blocks")
            except StoreError as error:
                refusals.append(str(error))
                ended.wait(0.5)  # while it waits for the cache's lock it holds the path's, without which no wipe ends

    def both_had_their_turns() -> bool:
        outcomes.append(removal.remove([str(tmp_path)], {name: time.time() + 60}, wipe=len(outcomes) % 2 == 0)[name])
        return outcomes.count("") >= 10 and len(starts) >= 10

    engine = threading.Thread(target=start_again_and_again)
    engine.start()
    try:
        wait_until(both_had_their_turns)
    finally:
        ended.set()
        engine.join()
    assert failures == []
    assert not [each for each in refusals if "is in use by" not in each]
    assert not [each for each in outcomes if each and "in use by" not in each]


def test_by_default_only_what_no_engine_here_can_use_goes(kvoffload, tmp_path, monkeypatch):
    monkeypatch.setattr(window, "installed", lambda: "0.32.0")
    (tmp_path / "weights").mkdir()
    kept = {
        made(tmp_path, model=str(tmp_path / "weights"), vllm="0.32.0"),
        made(tmp_path, model="org/name", vllm="0.32.0+cpu"),
        made(tmp_path, model="unknown version"),
    }
    gone = {
        made(tmp_path, model=str(tmp_path / "gone"), vllm="0.32.0"): "its model's files are gone",
        made(tmp_path, model="org/name", vllm="0.31.0"): "of vLLM 0.31.0, and 0.32.0 is installed here",
    }
    for says, spoil in (("empty", lambda path: path.unlink()), ("damaged", lambda path: path.write_bytes(b"x" * 64))):
        name = made(tmp_path, model=says)
        spoil(tmp_path / "kvoffload" / name / "index.journal")
        gone[name] = says
    newer = tmp_path / "kvoffload" / made(tmp_path, model="newer") / "manifest.json"
    newer.write_text(newer.read_text().replace('"format_version": 1', '"format_version": 2', 1))
    kept.add(newer.parent.name)

    out = kvoffload("clean", tmp_path, "--dry-run").out
    for name, why in gone.items():
        assert any(name[:12] in line and why in line for line in out.splitlines())
    assert not any(name[:12] in out for name in kept)
    assert kvoffload("clean", tmp_path, "--yes").code == 0
    assert names(tmp_path) == kept
    assert "nothing to remove" in kvoffload("clean", tmp_path, "--yes").out


def test_older_than_takes_what_was_not_used_for_so_long(kvoffload, tmp_path):
    old, new = (tmp_path / "kvoffload" / made(tmp_path, model=model) for model in ("old", "new"))
    age(old, 31)
    age(new, 29)
    assert kvoffload("clean", tmp_path, "--older-than", "30d", "--yes").code == 0
    assert names(tmp_path) == {new.name}
    with open_store(tmp_path, 40, model="new"):
        age(new, 31)
        assert "nothing to remove" in kvoffload("clean", tmp_path, "--older-than", "4w", "--yes").out
    assert names(tmp_path) == {new.name}
    age(new, 1)
    assert kvoffload("clean", tmp_path, "--older-than", "12h", "--yes").code == 0 and not names(tmp_path)


def test_a_model_is_chosen_by_its_name(kvoffload, tmp_path):
    for model in ("a", "b"):
        made(tmp_path, model=model)
    assert kvoffload("clean", tmp_path, "--model", "a", "--yes").code == 0
    assert models(tmp_path) == {"b"}
    age(tmp_path / "kvoffload" / names(tmp_path).pop(), 2)
    assert kvoffload("clean", tmp_path, "--model", "b", "--older-than", "3d", "--yes").code == 0 and models(tmp_path) == {"b"}
    done = kvoffload("clean", tmp_path, "--model", "c", "--yes")
    assert done.code == 2 and "there is no cache of model 'c'; there are those of b" in done.err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--all"], "add --yes"),
        (["--all", "--json"], "add --yes or --dry-run"),
        (["--all", "--model", "m", "--yes"], "--all takes everything"),
        (["--older-than", "soon", "--yes"], "for example 30d"),
    ],
)
def test_a_call_that_is_not_clear_removes_nothing(kvoffload, tmp_path, arguments, says):
    fill(tmp_path)
    done = kvoffload("clean", tmp_path, *arguments)
    assert done.code == 2 and says in done.err and len(done.err.splitlines()) == 1
    assert names(tmp_path)


@pytest.mark.parametrize(("answer", "code", "left"), [("n", 1, 1), ("y", 0, 0)])
def test_on_a_terminal_it_asks_first(tmp_path, answer, code, left):
    fill(tmp_path)
    ours, theirs = pty.openpty()
    command = [sys.executable, "-c", "from kvoffload.cli import main; main()", "clean", str(tmp_path), "--all"]
    process = subprocess.Popen(command, stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    os.write(ours, f"{answer}\n".encode())
    out = process.communicate(timeout=PATIENCE_S)[0].decode()
    os.close(ours)
    os.close(theirs)
    assert "Remove 1 cache?" in out and "would be removed" in out
    assert (process.returncode, len(names(tmp_path))) == (code, left)


def test_wiping_leaves_zeros_on_what_was_held_open_and_no_content_anywhere(kvoffload, tmp_path):
    """Whoever had a file open before sees what became of its blocks: zeros, and then nothing."""
    fill(tmp_path, range(6))
    journal = namespace_of(tmp_path) / "index.journal"
    written = []
    with slot_file(tmp_path).open("rb", buffering=0) as slots, journal.open("rb", buffering=0) as records:
        assert any(slots.read())
        assert kvoffload("clean", tmp_path, "--all", "--yes", "--wipe").code == 0
        for file in (slots, records):
            written.append(os.pread(file.fileno(), slot_at(6), 0))
        assert all(written) and not any(map(any, written))
    assert not names(tmp_path)


@pytest.mark.parametrize("files", range(4))
def test_a_wipe_that_is_cut_off_leaves_an_empty_cache_that_opens(tmp_path, monkeypatch, files):
    """After so many files were overwritten: the journal, two slot files, and last the manifest."""
    fill(tmp_path, range(6))
    name, real, done = namespace_of(tmp_path).name, removal._zero, []

    class CutOff(BaseException):
        pass

    def cut_off(fd: int, wiped: object) -> None:
        if len(done) == files:
            raise CutOff
        real(fd, wiped)
        done.append(fd)

    with monkeypatch.context() as seam:
        seam.setattr(removal, "_zero", cut_off)
        with pytest.raises(CutOff):
            removal.remove([str(tmp_path)], {name: time.time() + 60}, wipe=True)
    with open_store(tmp_path) as store:
        assert list(store.table()) == []


def test_a_wipe_that_was_cut_off_is_taken_up_again(kvoffload, tmp_path, monkeypatch):
    fill(tmp_path, range(6))

    def cut_off(*_: object) -> None:
        raise KeyboardInterrupt

    journal = namespace_of(tmp_path) / "index.journal"
    with slot_file(tmp_path).open("rb", buffering=0) as slots, journal.open("rb", buffering=0) as records:
        with monkeypatch.context() as seam:
            seam.setattr(removal, "_zero", cut_off)
            with pytest.raises(KeyboardInterrupt):
                removal.remove([str(tmp_path)], {namespace_of(tmp_path).name: time.time() + 60}, wipe=True)
        assert any(os.pread(slots.fileno(), slot_at(6), 0))
        assert kvoffload("clean", tmp_path, "--yes", "--wipe").code == 0, "empty, so it is chosen without being named"
        assert not any(os.pread(slots.fileno(), slot_at(6), 0)) and not any(records.read()) and not names(tmp_path)


def test_what_a_start_that_was_killed_left_can_be_wiped(kvoffload, tmp_path):
    fill(tmp_path)
    (namespace_of(tmp_path) / "manifest.json").unlink()
    assert kvoffload("clean", tmp_path, "--all", "--yes", "--wipe").code == 0
    assert not names(tmp_path)


def test_other_caches_can_be_opened_while_one_is_wiped_and_it_itself_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(namespace, "NAMESPACE_LOCK_SECONDS", 0.1)
    fill(tmp_path, range(6), model="wiped")
    name, tried = namespace_of(tmp_path).name, []

    def meanwhile(nbytes: int) -> None:
        if (tmp_path / "kvoffload" / name / "manifest.json").exists():  # until then, for it is the last
            open_store(tmp_path, 40, model="other").close()
            with pytest.raises(StoreError, match="in use by process") as refused:
                open_store(tmp_path, 40, model="wiped")
            tried.append(refused)

    assert removal.remove([str(tmp_path)], {name: time.time() + 60}, wipe=True, wiped=meanwhile) == {name: ""}
    assert len(tried) >= 3 and models(tmp_path) == {"other"}


def test_what_is_not_ours_stays(kvoffload, tmp_path):
    fill(tmp_path)
    foreign = namespace_of(tmp_path) / "notes.txt"
    foreign.touch()
    done = kvoffload("clean", tmp_path, "--all", "--yes")
    assert done.code == 1 and "stays: it holds notes.txt" in done.out
    assert slot_file(tmp_path).exists()
    (tmp_path / "kvoffload" / ("f" * 32)).symlink_to(tmp_path)
    foreign.unlink()
    assert kvoffload("clean", tmp_path, "--all", "--yes").code == 0
    assert [each.name for each in tmp_path.iterdir()] == ["kvoffload"] and names(tmp_path) == {"f" * 32}


def test_a_copy_of_a_store_is_removed_without_the_store_that_it_was_made_of(kvoffload, tmp_path):
    (tmp_path / "first").mkdir()
    fill(tmp_path / "first")
    shutil.copytree(tmp_path / "first", tmp_path / "copy")
    before = snapshot(tmp_path / "first")
    assert kvoffload("clean", tmp_path / "copy", "--all", "--yes").code == 0
    assert not names(tmp_path / "copy") and snapshot(tmp_path / "first") == before


def test_a_striped_cache_goes_from_all_its_paths_or_from_none(kvoffload, tmp_path):
    paths = [tmp_path / "a", tmp_path / "b"]
    for path in paths:
        path.mkdir()
    fill(paths)
    for path, other in (paths, reversed(paths)):
        done = kvoffload("clean", path, "--all", "--yes")
        assert done.code == 1 and f"a part of it lies below {other}: name that path too" in done.out
    assert names(paths[0]) == names(paths[1]) != set()
    assert kvoffload("clean", *reversed(paths), "--all", "--yes", "--wipe").code == 0
    assert names(paths[0]) == names(paths[1]) == set()
