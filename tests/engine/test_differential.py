"""The C engine against the reference engine: the same plans, the same statuses, the same bytes."""

import random
from pathlib import Path

import numpy as np
import pytest

from kvoffload.layout import HEADER_BYTES, slot_offset
from kvoffload.types import NO_SLOT, SlotFiles
from tests.engine.world import (
    BADMSG,
    CANCELED,
    DRAM_SLOTS,
    GROUP_REGIONS,
    KV_BLOCKS,
    PAYLOAD_BYTES,
    SSD_SLOTS,
    KVCache,
    copy_in,
    copy_out,
    load,
    make_files,
    open_engine,
    read,
    run,
    run_one,
    write,
)

IO_BACKENDS = ("io_uring", "threads")
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


class Planner:
    """Makes batches that keep the caller's side of the contract: nothing is the target of an operation and used by
    another one of the same batch."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.generation = 0
        self.dram: dict[int, dict[str, int]] = {}  # slot -> fields of the operation that filled it
        self.ssd: dict[int, dict[str, int]] = {}
        self.used: set[tuple[str, int]] = set()

    def claim(self, kind: str, count: int) -> int:
        free = [number for number in range(count) if (kind, number) not in self.used]
        number = self.random.choice(free) if free else NO_SLOT
        self.used.add((kind, number))
        return number

    def block_in(self, slots: dict[int, dict[str, int]], slot: int) -> dict[str, int]:
        """What to ask of a slot: usually what it holds, sometimes something else."""
        fields = dict(slots.get(slot, {"block": 0, "generation": 0, "group": 0}))
        if self.random.random() < 0.1:
            fields["generation"] += 1
        if self.random.random() < 0.1:
            fields["block"] += 1
        return fields

    def batch(self) -> list[np.ndarray]:
        self.used = set()
        self.filled: dict[int, tuple[str, int, dict[str, int]]] = {}
        ops: list[np.ndarray] = []
        for number in range(self.random.randint(1, 12)):
            made = self.operation(number * 10)
            if made is not None:
                ops.append(made)
        return ops

    def operation(self, number: int) -> np.ndarray | None:
        kind = self.random.choice(["copy out", "copy in", "write", "read", "load", "load staged"])
        needs_kv, needs_ssd = kind in ("copy out", "copy in", "load", "load staged"), kind[0] in "wrl"
        kv = self.claim("kv", KV_BLOCKS) if needs_kv else 0
        dram = self.claim("dram", DRAM_SLOTS) if kind != "load staged" else 0
        ssd = self.claim("ssd", SSD_SLOTS) if needs_ssd else 0
        if NO_SLOT in (kv, dram, ssd):
            return None
        if kind == "copy out":
            self.generation += 1
            fields = {"block": kv, "generation": self.generation, "group": self.random.randrange(2)}
            self.filled[number] = ("dram", dram, fields)
            return copy_out(dram=dram, **fields, id=number)
        if kind == "copy in":
            return copy_in(dram=dram, **self.block_in(self.dram, dram), id=number, kv_block=kv)
        if kind == "write":
            fields = self.block_in(self.dram, dram)
            self.filled[number] = ("ssd", ssd, fields)
            return write(dram=dram, ssd=ssd, **fields, id=number)
        fields = self.block_in(self.ssd, ssd)
        if kind == "load staged":
            return load(ssd=ssd, to=kv, **fields, id=number)
        self.filled[number] = ("dram", dram, fields)
        if kind == "read":
            return read(dram=dram, ssd=ssd, **fields, id=number)
        return load(ssd=ssd, to=kv, dram=dram, **fields, id=number)

    def note(self, ops: list[np.ndarray], statuses: dict[int, int]) -> None:
        """Learns what the batch did. What a slot holds after a failed read into it is not told: refill it first."""
        for number, (tier, slot, fields) in self.filled.items():
            slots = self.dram if tier == "dram" else self.ssd
            if statuses[number] == 0:
                slots[slot] = fields
            elif tier == "dram":
                slots[slot] = {"block": 999, "generation": 0, "group": 0}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("backend", IO_BACKENDS)
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
            planner.note(ops, statuses)
    for slot, fields in planner.ssd.items():
        group = fields["group"]
        assert slot_bytes_of(files[0], slot, group) == slot_bytes_of(files[1], slot, group)

    # each reads what the other wrote, some of it damaged
    damage = random.Random(seed)
    for slot in list(planner.ssd)[::3]:
        offset, flip = damage.randrange(HEADER_BYTES + 4096), 1 << damage.randrange(8)
        for one in files:
            edit(one, slot, offset, flip)
    loads = [
        load(ssd=slot, to=number, **fields, id=number) for number, (slot, fields) in enumerate(planner.ssd.items())
    ]
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


@pytest.mark.parametrize("backend", (*IO_BACKENDS, "reference"))
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


@pytest.mark.parametrize("backend", (*IO_BACKENDS, "reference"))
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
@pytest.mark.parametrize("backend", (*IO_BACKENDS, "reference"))
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
