"""Random plans for an engine, from a seed."""

import random

import numpy as np

from kvoffload.types import NO_SLOT
from tests.engine.world import DRAM_SLOTS, KV_BLOCKS, SSD_SLOTS, copy_in, copy_out, load, read, write

# What an operation uses, and whether that is a target.
USES = {
    "copy out": {"kv": False, "dram": True},
    "copy in": {"kv": True, "dram": False},
    "write": {"dram": False, "ssd": True},
    "read": {"dram": True, "ssd": False},
    "read for its time": {"ssd": False},
    "load": {"kv": True, "dram": True, "ssd": False},
    "load staged": {"kv": True, "ssd": False},
}


class Planner:
    """Makes batches that keep the caller's side of the contract: nothing is the target of an operation and used by
    another one of the same batch."""

    kinds = tuple(USES)
    counts = {"kv": KV_BLOCKS, "dram": DRAM_SLOTS, "ssd": SSD_SLOTS}

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.generation = 0
        self.dram: dict[int, dict[str, int]] = {}  # slot -> fields of the operation that filled it
        self.ssd: dict[int, dict[str, int]] = {}

    def claim(self, what: str, is_target: bool) -> int:
        """A slot or KV block for an operation, or NO_SLOT. A target is its own, others may be shared."""
        taken = self.targets | self.sources if is_target else self.targets
        free = [number for number in range(self.counts[what]) if (what, number) not in taken]
        number = self.random.choice(free) if free else NO_SLOT
        (self.targets if is_target else self.sources).add((what, number))
        return number

    def block_in(self, slots: dict[int, dict[str, int]], slot: int) -> dict[str, int]:
        """What to ask of a slot: usually what it holds, sometimes something else."""
        fields = dict(slots.get(slot, {"block": 0, "generation": 0, "group": 0}))
        if self.random.random() < 0.1:
            fields["generation"] += 1
        if self.random.random() < 0.1:
            fields["block"] += 1
        return fields

    def batch(self, most: int = 12) -> list[np.ndarray]:
        self.targets: set[tuple[str, int]] = set()
        self.sources: set[tuple[str, int]] = set()
        self.filled: dict[int, tuple[str, int, dict[str, int]]] = {}
        ops: list[np.ndarray] = []
        for number in range(self.random.randint(1, most)):
            made = self.operation(number * 10)
            if made is not None:
                ops.append(made)
        return ops

    def operation(self, number: int) -> np.ndarray | None:
        kind = self.random.choice(self.kinds)
        claimed = {what: self.claim(what, is_target) for what, is_target in USES[kind].items()}
        if NO_SLOT in claimed.values():
            return None
        kv, dram, ssd = (claimed.get(what, NO_SLOT) for what in self.counts)
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
        if kind == "read for its time":
            return read(dram=NO_SLOT, ssd=ssd, **fields, id=number)
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
