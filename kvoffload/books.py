"""What must be true of the block manager's books between any two calls. For tests, which ask after every step."""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping

from kvoffload.blocks import ABSENT, MOVING_IN, READY, Block
from kvoffload.drives import Drive
from kvoffload.index import Index
from kvoffload.slots import SlotPool
from kvoffload.types import NO_SLOT, BlockKey


def verify(
    index: Index,
    stores: Mapping[BlockKey, Block],
    loads: Collection[tuple[Block, Drive | None, int]],
    demotions: Iterable[Block],
) -> None:
    """Every slot has one owner, counts add up, policies know what they should. Raises AssertionError."""
    blocks, drives = index.blocks, index.drives
    loading = [block for block, *_ in loads]
    late = [block for drive in drives for block in drive.late_blocks]
    everyone = {id(b): b for b in (*blocks.values(), *stores.values(), *loading, *demotions, *late)}
    late_slots = [slot for drive in drives for _, slot in drive.late_slots]
    _verify_pool("dram", index.dram, [*(b.dram_slot for b in everyone.values() if b.dram is not ABSENT), *late_slots])
    on_ssd = [block for block in everyone.values() if block.ssd is not ABSENT]
    _verify_rows(index)
    for drive in drives:
        here = [block for block in on_ssd if drives.of(block.ssd_slot) is drive]
        cold = {key: slot for key, slot in _cold(index).items() if drives.of(slot) is drive}
        _verify_pool(f"drive {drive.number}", drive.pool, [*(block.ssd_slot for block in here), *cold.values()])
        assert drive.loads == sum(source is drive for _, source, _ in loads), f"drive {drive.number}: loads"
        assert drive.demotions == sum(block.ssd is MOVING_IN for block in here), f"drive {drive.number}: demotions"
        evictable = [block for block in here if not block.gone and drive.policy.evictable(drives.frame(block.ssd_slot)[1])]
        assert len(evictable) + len(cold) == len(drive.policy), f"drive {drive.number}: evictable, but not there"
        idle = [block for block in here if block.ssd is READY and not block.loads and not block.gone]
        assert {id(block) for block in evictable} == {id(block) for block in idle}, f"drive {drive.number}: evictable"
    in_dram = [block for block in blocks.values() if block.dram is not ABSENT and index.dram_policy.evictable(block.dram_slot)]
    assert len(in_dram) == len(index.dram_policy), "evictable in DRAM, but not there"
    in_use = Counter(id(block) for block in loading)
    for block in everyone.values():
        name = block.key.hex()
        assert block.gone == (blocks.get(block.key) is not block), name
        assert block.loads == in_use[id(block)], f"{name}: loads"
        assert (block.demotion is None) == (block.ssd is not MOVING_IN), f"{name}: demotion"
        assert block.dirty == (index.dirty.get(block.key) is block), f"{name}: dirty"
        assert block.late == (block in late) and not (block.late and block.ssd is READY), f"{name}: late"
        assert not (block.dirty or block.late) or block.dram is READY, f"{name}: to be written, without bytes"
        assert not block.gone or block.loads or block.demotion is not None or block.late or block in stores.values(), name
        idle = not block.loads and block.demotion is None and not block.late
        if block.dram is not ABSENT:
            assert (block.dram_slot in index.dram_policy) == (not block.gone), f"{name}: in DRAM"
        if block.ssd is not ABSENT:
            policy, frame = drives.frame(block.ssd_slot)
            assert (frame in policy) == (not block.gone), f"{name}: on SSD"
        waits = block.dirty and drives.writing  # to be written
        assert block.gone or block.dram is not ABSENT or not idle, f"{name}: to be cold"
        if not block.gone:
            evictable = block.dram is not ABSENT and index.dram_policy.evictable(block.dram_slot)
            assert evictable == (block.dram is READY and idle and not waits), f"{name}: evictable in use, or idle and not"


def _cold(index: Index) -> dict[BlockKey, int]:
    """Keys and slots of blocks that have no object."""
    return {key: slot for key, slot in index.on_ssd.items() if key not in index.blocks}


def _verify_rows(index: Index) -> None:
    """The rows are those of blocks that are ready on SSD, and one that is cold is nothing else and may be evicted."""
    for key, slot in index.on_ssd.items():
        assert index.on_ssd.slot(key) == slot, key.hex()
        block = index.blocks.get(key)
        assert block is None or (block.ssd, block.ssd_slot) == (READY, slot), f"{key.hex()}: not in its row's slot"
        policy, frame = index.drives.frame(slot)
        assert block is not None or policy.evictable(frame) and key not in index.dirty, f"{key.hex()}: cold and in use"
    ready = [block for block in index.blocks.values() if block.ssd is READY]
    assert len(ready) + len(_cold(index)) == len(index.on_ssd), "a block ready on SSD has no row"


def _verify_pool(name: str, pool: SlotPool, slots: Iterable[int]) -> None:
    owned = Counter(slots)
    assert all(count == 1 for count in owned.values()), f"{name}: a slot has two owners"
    assert NO_SLOT not in owned, f"{name}: a block without a slot"
    assert len(owned) + pool.free() == pool.count, f"{name}: {len(owned)} owned, {pool.free()} free, of {pool.count}"
    assert not any(pool.is_free(slot) for slot in owned), f"{name}: an owned slot is free"
