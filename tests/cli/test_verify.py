"""`kvoffload verify`: finds what is damaged, and only that, also beside an engine that rewrites what is read."""

import json
import os
import threading
from types import SimpleNamespace

import pytest

from kvoffload.cli import scrub
from tests.cli.helpers import fill, flip, namespace_of, running, slot_at, snapshot
from tests.patience import PATIENCE_S
from tests.store.helpers import PAYLOAD, open_store, slot_file, write_blocks


def verified(kvoffload, *paths):
    done = kvoffload("verify", *paths, "--json")
    return done.code, json.loads(done.out)


def test_a_sound_store_is_read_whole_and_left_as_it_was(kvoffload, tmp_path):
    fill(tmp_path, range(9))
    fill(tmp_path, range(3), model="other", megabytes=40)
    before = snapshot(tmp_path)
    code, found = verified(kvoffload, tmp_path)
    assert (code, found["damage"], found["outdated"], found["changed"]) == (0, [], 0, 0)
    assert (found["caches"], found["blocks"]) == (2, 2 * 12)  # of two ranks
    assert found["nbytes"] >= 2 * 12 * PAYLOAD
    assert snapshot(tmp_path) == before
    assert "24 blocks" in kvoffload("verify", tmp_path).out


@pytest.mark.parametrize(
    ("within", "says"),
    [
        (0, "has no header"),
        (9, "header fails"),
        (20, "header fails"),
        (60, "header fails"),
        (125, "header fails"),
        (4096, "payload fails"),
        (4096 + PAYLOAD - 1, "payload fails"),
    ],
)
def test_a_flipped_bit_is_found_and_its_place_is_named(kvoffload, tmp_path, within, says):
    fill(tmp_path)
    flip(slot_file(tmp_path, rank=1), slot_at(3, within))
    code, found = verified(kvoffload, tmp_path)
    assert code == 1
    (damage,) = found["damage"]
    assert (damage["rank"], damage["slot"], damage["namespace"]) == (1, 3, namespace_of(tmp_path).name)
    assert says in damage["what"]
    done = kvoffload("verify", tmp_path)
    assert done.code == 1 and says in done.out and "1 damaged" in done.out


def test_a_slot_copied_to_another_place_is_damage(kvoffload, tmp_path):
    fill(tmp_path)
    with slot_file(tmp_path).open("r+b") as file:
        file.seek(slot_at(1))
        slot = file.read(slot_at(2) - slot_at(1))
        file.seek(slot_at(4))
        file.write(slot)
    code, found = verified(kvoffload, tmp_path)
    assert code == 1 and "written for another place (slot 1" in found["damage"][0]["what"]


def test_another_block_in_good_order_is_a_miss_and_no_damage(kvoffload, tmp_path):
    """What a kill leaves when a slot was rewritten and the journal did not hear of it."""
    fill(tmp_path)
    journal = namespace_of(tmp_path) / "index.journal"
    before = journal.read_bytes()
    with running(tmp_path) as filled:
        filled.write([2], first_key=1000)
    journal.write_bytes(before)
    code, found = verified(kvoffload, tmp_path)
    assert (code, found["damage"], found["outdated"]) == (0, [], 2)
    assert "2 places hold another block" in kvoffload("verify", tmp_path).out


def test_a_slot_file_that_is_missing_or_too_short_is_damage(kvoffload, tmp_path):
    fill(tmp_path)
    os.truncate(slot_file(tmp_path, rank=1), slot_at(4))
    code, found = verified(kvoffload, tmp_path)
    assert code == 1 and {(each["rank"], each["slot"]) for each in found["damage"]} == {(1, 4), (1, 5)}
    assert "beyond the end" in found["damage"][0]["what"]
    slot_file(tmp_path, rank=1).unlink()
    code, found = verified(kvoffload, tmp_path)
    assert code == 1 and [(each["rank"], each["slot"]) for each in found["damage"]] == [(1, None)]


@pytest.mark.parametrize("name", ["manifest.json", "index.journal", "rank1of2.slots"])
def test_a_damaged_file_is_damage_as_a_whole(kvoffload, tmp_path, name):
    fill(tmp_path)
    flip(namespace_of(tmp_path) / name, 2)
    code, found = verified(kvoffload, tmp_path)
    assert code == 1 and [each["slot"] for each in found["damage"]] == [None] and name in found["damage"][0]["what"]


def test_a_damaged_record_inside_the_journal_is_damage(kvoffload, tmp_path):
    fill(tmp_path)
    flip(namespace_of(tmp_path) / "index.journal", 64 + 72 + 10)
    code, found = verified(kvoffload, tmp_path)
    assert code == 1 and "1 damaged records" in found["damage"][0]["what"]


def test_a_striped_cache_is_read_on_all_its_paths_and_on_no_half(kvoffload, tmp_path):
    paths = [tmp_path / "a", tmp_path / "b"]
    for path in paths:
        path.mkdir()
    fill(paths, range(8))
    assert verified(kvoffload, *reversed(paths))[1]["blocks"] == 16
    done = kvoffload("verify", paths[1])
    assert done.code == 2 and f"name all of them ({paths[0]}, {paths[1]})" in done.err
    flip(slot_file(paths[1]), slot_at(2, 5000))
    code, found = verified(kvoffload, *paths)
    assert code == 1 and found["damage"][0]["slot"] == 5  # the third of those with odd numbers


def test_what_an_engine_rewrites_forgets_and_grows_meanwhile_is_no_damage(kvoffload, tmp_path, monkeypatch):
    stop = threading.Event()
    with running(tmp_path, range(24)) as filled:
        # Pauses end when the engine has noted what it did: within how many of them a busy disk lets it is another matter.
        monkeypatch.setattr(scrub, "time", SimpleNamespace(sleep=lambda _seconds: filled.store.flush(PATIENCE_S)))

        def rewrite() -> None:
            turn = 1
            while not stop.is_set():
                filled.write(range(turn % 5, min(24 + turn, filled.store.slot_count), 5), first_key=1000 * turn)
                turn += 1

        writer = threading.Thread(target=rewrite)
        writer.start()
        try:
            found = [verified(kvoffload, tmp_path) for _ in range(6)]
        finally:
            stop.set()
            writer.join()
        for code, figures in found:
            assert (code, figures["damage"], figures["outdated"]) == (0, [], 0)
            assert figures["blocks"] > 0
    code, figures = verified(kvoffload, tmp_path)
    assert (code, figures["changed"], figures["outdated"]) == (0, 0, 0)


def test_damage_beside_a_running_engine_is_found_all_the_same(kvoffload, tmp_path, monkeypatch):
    monkeypatch.setattr(scrub, "PAUSE_SECONDS", 0.01)
    with running(tmp_path, range(6)):
        flip(slot_file(tmp_path), slot_at(2, 5000))
        code, found = verified(kvoffload, tmp_path)
        assert code == 1 and [each["slot"] for each in found["damage"]] == [2]


def test_an_empty_cache_is_sound(kvoffload, tmp_path):
    open_store(tmp_path).close()
    assert verified(kvoffload, tmp_path)[0] == 0
    with open_store(tmp_path) as store:
        write_blocks(store, [1])
    for rank in range(2):
        os.truncate(slot_file(tmp_path, rank), slot_at(0))
    code, found = verified(kvoffload, tmp_path)
    assert code == 1 and len(found["damage"]) == 2


def test_what_refuses_direct_reads_is_read_through_the_page_cache_and_said_so(kvoffload, tmp_path, monkeypatch):
    fill(tmp_path)
    real = os.open

    def refuse(path, flags, *arguments, **words):
        if flags & os.O_DIRECT:
            raise OSError(22, "Invalid argument")
        return real(path, flags, *arguments, **words)

    monkeypatch.setattr(os, "open", refuse)
    code, found = verified(kvoffload, tmp_path)
    assert (code, found["blocks"], found["buffered_files"]) == (0, 12, 2)
    assert "page cache" in kvoffload("verify", tmp_path).out
