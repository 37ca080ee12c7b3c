"""Random plans for an engine, from a seed."""

import random

import numpy as np

from kvoffload.types import NO_SLOT
from tests.engine.world import DRAM_SLOTS, KV_BLOCKS, SSD_SLOTS, copy_in, copy_out, load, read, write


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

    def note(self, statuses: dict[int, int]) -> None:
        """Learns what the batch did. What a slot holds after a failed read into it is not told: refill it first."""
        for number, (tier, slot, fields) in self.filled.items():
            slots = self.dram if tier == "dram" else self.ssd
            if statuses[number] == 0:
                slots[slot] = fields
            elif tier == "dram":
                slots[slot] = {"block": 999, "generation": 0, "group": 0}
