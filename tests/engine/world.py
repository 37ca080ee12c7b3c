"""What engine tests share: a KV cache in host memory, slot files, and shorthand for operations."""

import errno
import time
from pathlib import Path

import numpy as np
import pytest

from kvoffload.engine import Engine
from kvoffload.engine.reference import ReferenceEngine, pack_superblock
from kvoffload.types import NO_SLOT, OP_DTYPE, EngineOptions, OpFlag, OpKind, Region, SlotFiles
from tests.patience import PATIENCE_S

FINGERPRINT = bytes(range(16))
GROUP_REGIONS = ((3000, 5000, 1), (4096,))  # bytes of each group's regions: odd sizes, and one smaller group
PAYLOAD_BYTES = sum(GROUP_REGIONS[0])
KV_BLOCKS, DRAM_SLOTS, SSD_SLOTS = 24, 8, 20
BADMSG, CANCELED, TIMEDOUT = -errno.EBADMSG, -errno.ECANCELED, -errno.ETIMEDOUT
FOREVER_US = 2**64 - 1


class KVCache:
    """Two groups of regions with gaps between a region's blocks, filled from a seed."""

    def __init__(self, seed: int = 0) -> None:
        random = np.random.default_rng(seed)
        self.arrays = [
            [random.integers(0, 256, (KV_BLOCKS, nbytes + 64), dtype=np.uint8) for nbytes in group] for group in GROUP_REGIONS
        ]
        self.groups = [
            [Region(array.ctypes.data, array.strides[0], nbytes) for array, nbytes in zip(*pair, strict=True)]
            for pair in zip(self.arrays, GROUP_REGIONS, strict=True)
        ]

    def block(self, number: int, group: int = 0) -> bytes:
        pairs = zip(self.arrays[group], GROUP_REGIONS[group], strict=True)
        return b"".join(array[number, :nbytes].tobytes() for array, nbytes in pairs)

    def everything(self) -> bytes:
        return b"".join(array.tobytes() for group in self.arrays for array in group)


def make_files(folder: Path, count: int = 2, slots: int = SSD_SLOTS, payload_bytes: int = PAYLOAD_BYTES) -> SlotFiles:
    """Slot files as the store makes them."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = tuple(str(folder / f"{index}.slots") for index in range(count))
    for index, path in enumerate(paths):
        Path(path).write_bytes(pack_superblock(payload_bytes, FINGERPRINT, index, count, rank=0, ranks=1))
    return SlotFiles(paths, slots, FINGERPRINT)


def make_options(io_backend: str = "auto", **changes: int) -> EngineOptions:
    fields = {"payload_bytes": PAYLOAD_BYTES, "dram_slots": DRAM_SLOTS, "spare_slots": 4, "max_ops": 64, "io_depth": 8}
    return EngineOptions(**(fields | changes), io_backend=io_backend)


def has_io_uring() -> bool:
    try:
        Engine(make_options("io_uring")).close()
    except OSError:
        return False
    return True


NEEDS_IO_URING = pytest.mark.skipif(not has_io_uring(), reason="io_uring cannot be used here")
C_ENGINES = (pytest.param("io_uring", marks=NEEDS_IO_URING), "threads")
ENGINES = (*C_ENGINES, "reference")


def open_engine(name: str, kv: KVCache, files: SlotFiles | None = None, **changes: int) -> Engine | ReferenceEngine:
    """An engine that is bound and attached; `name` is an I/O backend or "reference"."""
    make = ReferenceEngine if name == "reference" else Engine
    engine = make(make_options("auto" if name == "reference" else name, **changes))
    engine.bind(kv.groups)
    engine.kv = kv  # the engine has addresses only: the arrays must live as long
    if files is not None:
        engine.attach(files)
    return engine


def op(op_kind: OpKind, block: int = 0, dram: int = NO_SLOT, ssd: int = NO_SLOT, **fields: int) -> np.ndarray:
    """One operation on the block named `block`: the name gives its key, the generation is 1 unless told."""
    made = np.zeros(1, OP_DTYPE)
    made["id"], made["kind"], made["kv_block"], made["dram_slot"], made["ssd_slot"] = block, op_kind, block, dram, ssd
    made["generation"], made["key_len"] = 1, 36
    made["key"][0, :36] = np.frombuffer(f"key of block {block}".ljust(36).encode(), np.uint8)
    for name, value in fields.items():
        made[name] = value
    return made


def copy_out(block: int, dram: int, **fields: int) -> np.ndarray:
    return op(OpKind.COPY_OUT, block, dram, **fields)


def copy_in(block: int, dram: int, **fields: int) -> np.ndarray:
    return op(OpKind.COPY_IN, block, dram, **fields)


def write(block: int, dram: int, ssd: int, **fields: int) -> np.ndarray:
    return op(OpKind.WRITE, block, dram, ssd, **fields)


def read(block: int, dram: int, ssd: int, **fields: int) -> np.ndarray:
    return op(OpKind.READ, block, dram, ssd, **fields)


def load(block: int, ssd: int, to: int, dram: int = NO_SLOT, **fields: int) -> np.ndarray:
    """SSD slot -> KV block `to`, by a linked pair. The COPY_IN's id is the READ's plus 1000."""
    first = read(block, dram, ssd, **({"id": block} | fields), flags=OpFlag.LINK)
    second = copy_in(block, dram, kv_block=to, **(fields | {"id": int(first["id"][0]) + 1000}))
    return np.concatenate([first, second])


def run(engine: Engine | ReferenceEngine, *ops: np.ndarray) -> dict[int, int]:
    """Submits operations and waits for them; returns statuses by id. Every id completes exactly once."""
    batch = np.concatenate(ops)
    assert len(set(batch["id"].tolist())) == len(batch)
    accepted, statuses = 0, {}
    end = time.monotonic() + PATIENCE_S
    while len(statuses) < len(batch):
        assert time.monotonic() < end, f"only {len(statuses)} of {len(batch)} operations completed"
        accepted += engine.submit(batch[accepted:])
        engine.wait(0.5)
        for completion in engine.poll():
            assert completion["id"] not in statuses
            statuses[int(completion["id"])] = int(completion["status"])
    assert set(statuses) == set(batch["id"].tolist())
    assert not engine.wait(0) and len(engine.poll()) == 0
    return statuses


def run_one(engine: Engine | ReferenceEngine, *ops: np.ndarray) -> int:
    """The status of the last of the operations."""
    return run(engine, *ops)[int(ops[-1]["id"][-1])]


def stored(engine: Engine | ReferenceEngine, block: int, dram: int, ssd: int) -> None:
    """The block lies in this DRAM slot and this SSD slot from now on."""
    assert run_one(engine, copy_out(block, dram)) == 0
    assert run_one(engine, write(block, dram, ssd)) == 0
