"""The C engine against the reference engine: the same plans, the same statuses, the same bytes."""

import random
from pathlib import Path

import pytest

from kvoffload.layout import HEADER_BYTES, slot_offset
from kvoffload.types import SlotFiles
from tests.engine.planner import Planner
from tests.engine.world import (
    BADMSG,
    C_ENGINES,
    CANCELED,
    ENGINES,
    GROUP_REGIONS,
    PAYLOAD_BYTES,
    KVCache,
    copy_out,
    load,
    make_files,
    open_engine,
    read,
    run,
    run_one,
    write,
)

BATCHES = 60


def slot_bytes_of(files: SlotFiles, slot: int, group: int) -> bytes:
    with open(files.paths[slot % len(files.paths)], "rb") as file:
        file.seek(slot_offset(slot // len(files.paths), PAYLOAD_BYTES))
        return file.read(HEADER_BYTES + sum(GROUP_REGIONS[group]))


def edit(files: SlotFiles, slot: int, offset: int, flip: int) -> None:
    """Flips bits of the byte `offset` of a slot."""
    with open(files.paths[slot % len(files.paths)], "r+b") as file:
        at = slot_offset(slot // len(files.paths), PAYLOAD_BYTES) + offset
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ flip]))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("backend", C_ENGINES)
def test_random_plans_give_the_same_statuses_and_bytes(tmp_path: Path, backend: str, seed: int) -> None:
    print(f"seed {seed}")
    caches = [KVCache(seed), KVCache(seed)]
    files = [make_files(tmp_path / name) for name in ("c", "reference")]
    planner = Planner(seed)
    with (
        open_engine(backend, caches[0], files[0]) as engine,
        open_engine("reference", caches[1], files[1]) as reference,
    ):
        for _ in range(BATCHES):
            ops = planner.batch()
            if not ops:
                continue
            statuses = run(engine, *ops)
            assert statuses == run(reference, *ops)
            assert caches[0].everything() == caches[1].everything()
            planner.note(statuses)
    for slot, fields in planner.ssd.items():
        group = fields["group"]
        assert slot_bytes_of(files[0], slot, group) == slot_bytes_of(files[1], slot, group)

    # each reads what the other wrote, some of it damaged
    damage = random.Random(seed)
    for slot in list(planner.ssd)[::3]:
        offset, flip = damage.randrange(HEADER_BYTES + 4096), 1 << damage.randrange(8)
        for one in files:
            edit(one, slot, offset, flip)
    loads = [load(ssd=slot, to=number, **fields, id=number) for number, (slot, fields) in enumerate(planner.ssd.items())]
    with (
        open_engine(backend, caches[0], files[1]) as engine,
        open_engine("reference", caches[1], files[0]) as reference,
    ):
        statuses = run(engine, *loads)
        assert statuses == run(reference, *loads)
    assert caches[0].everything() == caches[1].everything()
    assert 0 in statuses.values()


FIELDS = {
    "magic": 0,
    "version": 8,
    "ssd slot": 12,
    "generation": 16,
    "payload bytes": 24,
    "fingerprint": 32,
    "key length": 48,
    "zero after key length": 49,
    "key": 56,
    "end of key": 95,
    "payload checksum": 96,
    "zero before header checksum": 104,
    "header checksum": 120,
    "first byte of payload": HEADER_BYTES,
    "last byte of payload": HEADER_BYTES + PAYLOAD_BYTES - 1,
}


@pytest.mark.parametrize("backend", ENGINES)
def test_a_flipped_bit_anywhere_that_counts_is_a_miss(tmp_path: Path, backend: str) -> None:
    kv, files = KVCache(), make_files(tmp_path)
    with open_engine(backend, kv, files) as engine:
        assert run_one(engine, copy_out(1, 0)) == 0
        assert run_one(engine, write(1, 0, 5)) == 0
        for field, offset in FIELDS.items():
            edit(files, 5, offset, 0x10)
            before = kv.everything()
            assert run(engine, load(1, 5, 2)) == {1: BADMSG, 1001: CANCELED}, field
            assert kv.everything() == before
            edit(files, 5, offset, 0x10)
            assert run_one(engine, load(1, 5, 2)) == 0, field
        assert kv.block(2) == kv.block(1)


@pytest.mark.parametrize("backend", ENGINES)
def test_a_stale_foreign_torn_or_moved_slot_is_a_miss(tmp_path: Path, backend: str) -> None:
    kv, files = KVCache(), make_files(tmp_path, count=1)
    with open_engine(backend, kv, files) as engine:
        assert run_one(engine, copy_out(1, 0)) == 0
        assert run_one(engine, write(1, 0, 3)) == 0
        assert run_one(engine, write(1, 0, 4)) == 0
        assert run_one(engine, read(1, 1, 3, generation=2)) == BADMSG
        assert run_one(engine, read(2, 1, 3)) == BADMSG
        assert run_one(engine, read(1, 1, 3, group=1)) == BADMSG
        with open(files.paths[0], "r+b") as file:
            start, length = slot_offset(3, PAYLOAD_BYTES), slot_offset(4, PAYLOAD_BYTES) - slot_offset(3, PAYLOAD_BYTES)
            file.seek(start)
            slot = file.read(length)
            file.seek(slot_offset(2, PAYLOAD_BYTES))
            file.write(slot)
            file.seek(start)
            file.write(slot[: length // 2] + bytes(length - length // 2))
        assert run_one(engine, read(1, 1, 2)) == BADMSG, "moved"
        assert run_one(engine, read(1, 1, 3)) == BADMSG, "torn"
        assert run_one(engine, read(1, 1, 4)) == 0, "untouched"


@pytest.mark.parametrize("cut", (1, 512, 4096, 5000))
@pytest.mark.parametrize("backend", ENGINES)
def test_a_truncated_file_is_a_miss(tmp_path: Path, backend: str, cut: int) -> None:
    kv, files = KVCache(), make_files(tmp_path, count=1, slots=3)
    with open_engine(backend, kv, files) as engine:
        assert run_one(engine, copy_out(1, 0)) == 0
        for slot in range(3):
            assert run_one(engine, write(1, 0, slot)) == 0
        with open(files.paths[0], "r+b") as file:
            file.truncate(slot_offset(2, PAYLOAD_BYTES) + HEADER_BYTES + PAYLOAD_BYTES - cut)
        assert run_one(engine, read(1, 1, 2)) == BADMSG
        assert run_one(engine, read(1, 1, 1)) == 0
    with open_engine(backend, kv, files) as engine:
        assert run_one(engine, read(1, 1, 2)) == BADMSG
        assert run_one(engine, read(1, 1, 1)) == 0
