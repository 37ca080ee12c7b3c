"""What happens with a KV cache on a CUDA device. Run by test_cuda.py, one scenario a process, on a libcuda of our own:
`python -m tests.engine.cuda_scenarios <scenario> <library> <folder> <seed>`."""

import errno
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from kvoffload.engine import Engine
from kvoffload.types import OP_DTYPE, OpKind, Region
from tests.engine.fake_cuda import Device
from tests.engine.planner import Planner
from tests.engine.world import (
    BADMSG,
    CANCELED,
    DRAM_SLOTS,
    KV_BLOCKS,
    TIMEDOUT,
    KVCache,
    copy_in,
    copy_out,
    load,
    make_files,
    make_options,
    open_engine,
    read,
    run,
    run_one,
    write,
)
from tests.patience import PATIENCE_S, wait_until

DEVICE_FAILED = -errno.EREMOTEIO
NOTHING = (0, 0, 0, 0)
TIMEOUT_US = 1_000_000  # in which a copy begins also on a busy machine
LATE_US = 30_000
FENCES = 64  # events the engine has for them
INVALID_VALUE, LAUNCH_FAILED, NOT_SUPPORTED = 1, 719, 801
CALLS = (
    "cuInit cuDriverGetVersion cuGetErrorName cuDeviceGetCount cuDeviceGet cuDeviceGetName cuDevicePrimaryCtxRetain "
    "cuDevicePrimaryCtxRelease_v2 cuCtxPushCurrent_v2 cuCtxPopCurrent_v2 cuMemHostRegister_v2 cuMemHostUnregister "
    "cuStreamCreate cuStreamDestroy_v2 cuStreamWaitEvent cuStreamSynchronize cuEventCreate cuEventDestroy_v2 "
    "cuEventRecord cuEventSynchronize cuStreamIsCapturing cuThreadExchangeStreamCaptureMode cuMemcpyHtoDAsync_v2 "
    "cuMemcpyDtoHAsync_v2 cuMemcpyBatchAsync cuMemcpyBatchAsync_v2"
).split()



def take(engine: Engine, count: int) -> dict[int, int]:
    """Statuses by id of the next `count` completions."""
    statuses = {}
    end = time.monotonic() + PATIENCE_S
    while len(statuses) < count:
        assert time.monotonic() < end, f"{len(statuses)} of {count} operations completed"
        engine.wait(0.5)
        statuses |= {int(done["id"]): int(done["status"]) for done in engine.poll()}
    return statuses


class World:
    """A device, a KV cache in its memory and slot files."""

    def __init__(self, library: str, folder: str, seed: int) -> None:
        self.seed, self.folder = seed, Path(folder)
        self.device, self.kv = Device(library, seed), KVCache(seed)
        self.device.holds(self.kv)
        self.files = make_files(self.folder / "device")

    def open(self, **changes: int) -> Engine:
        return open_engine("threads", self.kv, self.files, **({"device": 0} | changes))

    def is_clean(self) -> bool:
        """The engine is closed and gave everything back, and never did what a device forbids."""
        return self.device.alive() == NOTHING and self.device.fake_violations == 0

    def refusal(self, **changes: int) -> OSError:
        try:
            Engine(make_options("threads", **({"device": 0} | changes))).close()
        except OSError as error:
            return error
        raise AssertionError("the engine opened")


# ---- bytes ----


def random_plans_give_the_same_statuses_and_bytes_as_the_reference(world: World) -> None:
    world.device.fake_delay_us = 200
    planner, other = Planner(world.seed), KVCache(world.seed)
    files = make_files(world.folder / "reference")
    with world.open() as engine, open_engine("reference", other, files) as reference:
        for _ in range(60):
            ops = planner.batch()
            if not ops:
                continue
            statuses = run(engine, *ops)
            assert statuses == run(reference, *ops)
            assert world.kv.everything() == other.everything()
            planner.note(statuses)
        told = next(line for line in engine.describe() if line.startswith("copy: "))
    assert "CUDA device 0 (Fake H0), driver " in told
    assert "failure" not in told
    singly = world.device.calls("cuMemcpyHtoDAsync_v2") + world.device.calls("cuMemcpyDtoHAsync_v2")
    batched = world.device.calls("cuMemcpyBatchAsync") + world.device.calls("cuMemcpyBatchAsync_v2")
    assert (singly > 0, batched > 0) == (("no cuMemcpyBatchAsync" in told), ("no cuMemcpyBatchAsync" not in told))
    assert world.is_clean()


def many_blocks_share_a_call(world: World) -> None:
    count = DRAM_SLOTS
    with world.open() as engine:
        assert set(run(engine, *(copy_out(n, n) for n in range(count))).values()) == {0}
        before = world.device.calls("cuMemcpyBatchAsync_v2")
        world.device.fake_hold = 1
        assert engine.submit(np.concatenate([copy_in(n, n, kv_block=n + count) for n in range(count)])) == count
        wait_until(lambda: engine.stats()["in_flight"] == count)
        world.device.fake_hold = 0
        assert take(engine, count) == dict.fromkeys(range(count), 0)
        assert world.device.calls("cuMemcpyBatchAsync_v2") - before < count
    assert all(world.kv.block(n) == world.kv.block(n + count) for n in range(count))
    assert world.is_clean()


def blocks_of_many_small_spans_take_several_calls(world: World) -> None:
    layers, blocks, nbytes = 400, 16, 20
    cache = np.random.default_rng(world.seed).integers(0, 256, (layers, blocks, nbytes), dtype=np.uint8)
    world.device.library.fake_device_memory(cache.ctypes.data, cache.nbytes)
    with Engine(make_options("threads", device=0)) as engine:
        engine.bind([[Region(cache[layer].ctypes.data, nbytes, nbytes) for layer in range(layers)]])
        world.device.fake_delay_us = 10
        assert set(run(engine, *(copy_out(n, n) for n in range(8))).values()) == {0}
        calls = world.device.calls("cuMemcpyBatchAsync_v2")
        assert calls > 8 * layers // 1024
        assert set(run(engine, *(copy_in(n, n, kv_block=n + 8) for n in range(8))).values()) == {0}
    assert np.array_equal(cache[:, :8], cache[:, 8:])
    assert world.is_clean()


def refused_batches_are_copied_span_by_span(world: World) -> None:
    """Whether the driver refuses all of them, or only those with memory of some kind."""
    for first, code in ((1, INVALID_VALUE), (1, NOT_SUPPORTED), (3, INVALID_VALUE), (3, NOT_SUPPORTED)):
        with world.open() as engine:
            world.device.fail("cuMemcpyBatchAsync_v2", first, forever=True, code=code)
            for n in range(4):
                assert run_one(engine, copy_out(n, n)) == run_one(engine, copy_in(n, n, kv_block=9)) == 0
                assert world.kv.block(9) == world.kv.block(n)
            assert any("(cuMemcpyBatchAsync refused)" in line for line in engine.describe()) == (first == 1)
        world.device.fail("cuMemcpyBatchAsync_v2", 0)
    assert world.is_clean()


def registrations_end_where_slots_do(world: World) -> None:
    """On an engine built with small pieces."""
    world.device.fake_register_limit = 45_000
    random_plans_give_the_same_statuses_and_bytes_as_the_reference(world)
    assert world.device.calls("cuMemHostRegister_v2") == world.device.calls("cuMemHostUnregister") > 50


# ---- order ----


def copy_out_takes_what_the_compute_stream_wrote_before_it(world: World, stream: int | None = None) -> None:
    stream = world.device.stream() if stream is None else stream
    with world.open() as engine:
        for turn in range(5):
            array = world.kv.arrays[1][0][turn, :4096]
            value = np.full(4096, 100 + turn, np.uint8)
            world.device.write(stream, array, value, LATE_US)
            assert engine.submit(copy_out(turn, 0, group=1), stream) == 1
            assert world.device.depth() == 0, "the caller's context is its own again"
            assert take(engine, 1) == {turn: 0}
            assert run_one(engine, copy_in(turn, 0, group=1, kv_block=10 + turn)) == 0
            assert world.kv.block(10 + turn, 1) == value.tobytes()


def copies_are_ordered_behind_the_legacy_default_stream_too(world: World) -> None:
    copy_out_takes_what_the_compute_stream_wrote_before_it(world, 0)


def copy_in_waits_for_earlier_reads_of_the_compute_stream(world: World) -> None:
    stream = world.device.stream()
    with world.open() as engine:
        assert run_one(engine, copy_out(1, 0, group=1)) == 0
        array, seen = world.kv.arrays[1][0][5, :4096], np.zeros(4096, np.uint8)
        before = array.copy()
        world.device.read(stream, array, seen, LATE_US)
        assert engine.submit(copy_in(1, 0, group=1, kv_block=5), stream) == 1
        assert take(engine, 1) == {1: 0}
        assert seen.tobytes() == before.tobytes() != array.tobytes() == world.kv.block(1, 1)


def order_holds_across_streams_and_many_submissions(world: World) -> None:
    """More submissions than there are fences, so that each event serves several, on three streams in turn."""
    chance = random.Random(world.seed)
    streams = [0, world.device.stream(), world.device.stream()]
    world.device.fake_delay_us = 300
    with world.open(max_ops=1000, dram_slots=3 * FENCES) as engine:
        for turn in range(10):
            values = {}
            for n in range(KV_BLOCKS):
                values[n] = np.full(4096, chance.randrange(256), np.uint8)
                stream = chance.choice(streams)
                world.device.write(stream, world.kv.arrays[1][0][n, :4096], values[n], chance.randrange(2000))
                assert engine.submit(copy_out(n, n, group=1, generation=turn), stream) == 1
                for more in range(chance.randrange(8)):  # take up fences
                    assert engine.submit(copy_in(0, 100, kv_block=0, id=1000 * n + more + 100), streams[0]) == 1
            statuses = {}
            while engine.stats()["in_flight"] + engine.stats()["queued"] > 0 or engine.wait(0):
                statuses |= {int(done["id"]): int(done["status"]) for done in engine.poll()}
            assert all(statuses[n] == 0 for n in values)
            back = [copy_in(n, n, group=1, generation=turn, kv_block=(n + 1) % KV_BLOCKS, id=n) for n in values]
            assert set(run(engine, *back).values()) == {0}
            assert all(world.kv.block((n + 1) % KV_BLOCKS, 1) == values[n].tobytes() for n in values)
    assert world.is_clean()


def loads_do_not_wait_behind_stores(world: World) -> None:
    with world.open(dram_slots=60, max_ops=64) as engine:
        assert run_one(engine, copy_out(1, 59)) == 0
        world.device.fake_delay_us = 20_000
        stores = [copy_out(n % KV_BLOCKS, n, id=n) for n in range(50)]
        assert engine.submit(np.concatenate([*stores, copy_in(1, 59, kv_block=3, id=99)])) == 51
        statuses = take(engine, 51)
        assert set(statuses.values()) == {0}
        assert list(statuses).index(99) < 40


# ---- failures ----


class Journey:
    """Random plans on an engine whose device fails. Whatever is delivered as good is good."""

    def __init__(self, world: World, seed: int) -> None:
        self.world, self.planner = world, Planner(seed)
        self.written: dict[int, bytes] = {}
        self.seen: set[int] = set()
        self.delivered = 0

    def go(self, engine: Engine, batches: int) -> None:
        kv = self.world.kv
        for _ in range(batches):
            batch = np.concatenate([np.zeros(0, OP_DTYPE), *self.planner.batch()])
            for op in batch[batch["kind"] == OpKind.COPY_OUT]:
                self.written[int(op["generation"])] = kv.block(int(op["kv_block"]), int(op["group"]))
            statuses = run(engine, batch)
            for op in batch[batch["kind"] == OpKind.COPY_IN]:
                if statuses[int(op["id"])] == 0:
                    assert kv.block(int(op["kv_block"]), int(op["group"])) == self.written[int(op["generation"])]
                    self.delivered += 1
            self.seen |= set(statuses.values())
            self.planner.note(statuses)


def any_call_may_fail(world: World) -> None:
    """Each call in turn: once or from then on, soon or late. The process goes on, nothing wrong is delivered."""
    world.device.fake_delay_us = 20
    opened = failed = 0
    for number, call in enumerate(CALLS):
        for nth, forever in ((1, False), (1, True), (4, False), (12, True)):
            world.device.fail(call, nth, forever, LAUNCH_FAILED)
            journey = Journey(world, world.seed + number)
            world.files = make_files(world.folder / f"{call} {nth} {forever}")  # generations begin anew
            try:
                with world.open() as engine:
                    opened += 1
                    journey.go(engine, 12)
                    assert journey.seen <= {0, DEVICE_FAILED, BADMSG, CANCELED}
                    failed += DEVICE_FAILED in journey.seen
            except OSError as error:
                assert str(error).count("CUDA device 0") == 1, error
                assert error.errno in (errno.ENODEV, errno.ENOMEM)
            gave_back = world.device.alive() == NOTHING
            assert gave_back or call.startswith(("cuCtx", "cuStreamDestroy", "cuEventDestroy", "cuMemHostUn", "cuDeviceP"))
            world.device.forget()
    assert opened > 60
    assert failed > 8
    assert world.device.fake_violations == 0


def failed_copy_out_leaves_nothing_and_failed_copy_in_what_was_there(world: World) -> None:
    with world.open() as engine:
        for call in ("cuMemcpyBatchAsync_v2", "cuEventSynchronize"):
            assert run_one(engine, copy_out(1, 0)) == 0
            world.device.fail(call)
            assert run_one(engine, copy_in(1, 0, kv_block=5)) == DEVICE_FAILED
            assert run_one(engine, copy_in(1, 0, kv_block=5)) == 0
            assert world.kv.block(1) == world.kv.block(5)
            world.device.fail(call)
            assert run_one(engine, copy_out(2, 0)) == DEVICE_FAILED
            assert run_one(engine, copy_in(2, 0, kv_block=5)) == run_one(engine, copy_in(1, 0, kv_block=5)) == BADMSG
        assert any("first failure: cuMemcpyBatchAsync CUDA_ERROR_LAUNCH_FAILED" in line for line in engine.describe())
    assert world.is_clean()


def memory_of_an_unsettled_copy_is_never_used_again(world: World) -> None:
    """A copy and the wait for its end fail, but the device goes on and writes late."""
    with world.open(spare_slots=1) as engine:
        assert run_one(engine, copy_out(1, 1)) == run_one(engine, write(1, 1, 3)) == 0
        world.device.fake_hold = 1
        world.device.fail("cuEventSynchronize")
        world.device.fail("cuStreamSynchronize")
        assert run_one(engine, copy_out(2, 0)) == DEVICE_FAILED
        assert run_one(engine, read(1, 0, 3)) == 0, "into the spare"
        world.device.fake_hold = 0
        time.sleep(0.1)
        assert run_one(engine, write(1, 0, 5)) == 0
        assert run_one(engine, copy_out(2, 1)) == DEVICE_FAILED, "the device counts as lost"
        assert any("LOST" in line for line in engine.describe())
    other = KVCache(world.seed + 1)
    with open_engine("threads", other, world.files) as host:
        assert run(host, load(1, 5, 9)) == {1: 0, 1001: 0}
    assert other.block(9) == world.kv.block(1), "what was read, not what the device wrote late"


def close_leaves_the_memory_of_an_unsettled_copy_to_the_device(world: World) -> None:
    with world.open() as engine:
        world.device.fake_hold = 1
        world.device.fail("cuEventSynchronize")
        world.device.fail("cuStreamSynchronize")
        assert run_one(engine, copy_out(2, 0)) == DEVICE_FAILED
    world.device.fake_hold = 0
    time.sleep(0.05)
    assert world.device.fake_violations == 0, "it is still pinned"


def order_that_failed_once_is_asked_for_again(world: World) -> None:
    """More copies behind one fence than a batch has. The first batch cannot wait for it, the later ones must."""
    stream, array = world.device.stream(), world.kv.arrays[1][0][0, :4096]
    value = np.full(4096, 77, np.uint8)
    with world.open(max_ops=1024, dram_slots=300) as engine:
        world.device.write(stream, array, value, LATE_US)
        world.device.fail("cuStreamWaitEvent", 2)  # the first is the one of the fence itself
        copies = np.concatenate([copy_out(n, n, group=1, kv_block=0) for n in range(300)])
        assert engine.submit(copies, stream) == 300
        statuses = take(engine, 300)
        assert set(statuses.values()) == {0, DEVICE_FAILED}
        for n in [n for n, status in statuses.items() if status == 0]:
            assert run_one(engine, copy_in(n, n, group=1, kv_block=9)) == 0
            assert world.kv.block(9, 1) == value.tobytes()
    assert world.is_clean()


def copies_under_way_spoil_no_capture_that_begins(world: World) -> None:
    world.device.fake_delay_us = 100
    with world.open(max_ops=1024, dram_slots=300) as engine:
        assert engine.submit(np.concatenate([copy_out(n % KV_BLOCKS, n, id=n) for n in range(300)])) == 300
        world.device.fake_captures = 1
        assert set(take(engine, 300).values()) == {0}
        world.device.fake_captures = 0
    assert world.is_clean()


def lost_device_fails_copies_and_leaves_the_drives_alone(world: World) -> None:
    with world.open(max_ops=512, dram_slots=60) as engine:
        for n in range(8):
            assert run_one(engine, copy_out(n, n)) == run_one(engine, write(n, n, n)) == 0
        world.device.fake_delay_us = 5000
        copies = [copy_out(n % KV_BLOCKS, n, id=100 + n) for n in range(10, 50)]
        copies += [copy_in(n % 8, n % 8, kv_block=8 + n % 8, id=200 + n) for n in range(40)]
        assert engine.submit(np.concatenate(copies)) == 80
        world.device.fake_hold = 1
        assert engine.submit(copy_in(0, 0, kv_block=20, id=300)) == 1
        wait_until(lambda: engine.stats()["in_flight"] > 0)
        world.device.lose()
        statuses = take(engine, 81)
        assert set(statuses.values()) <= {0, DEVICE_FAILED}
        assert statuses[300] == DEVICE_FAILED
        for n in range(8):
            assert run_one(engine, write(n, n, 8 + n)) == run_one(engine, read(n, 50 + n, 8 + n)) == 0
            assert run(engine, load(n, n, 20)) == {n: 0, 1000 + n: DEVICE_FAILED}
        before = world.device.calls()
        assert run(engine, *(copy_out(n, 50, id=n) for n in range(1))) == {0: DEVICE_FAILED}
        assert world.device.calls() == before, "no call is worth trying"


def broken_stream_fails_only_what_was_to_wait_for_it(world: World) -> None:
    with world.open() as engine:
        assert run_one(engine, copy_out(1, 0)) == run_one(engine, write(1, 0, 3)) == 0
        assert engine.submit(np.concatenate([copy_out(2, 1), load(1, 3, 9, id=7)]), 0xDEAD) == 3
        assert take(engine, 3) == {2: DEVICE_FAILED, 7: 0, 1007: DEVICE_FAILED}
        assert run(engine, load(1, 3, 9)) == {1: 0, 1001: 0}
        assert world.kv.block(9) == world.kv.block(1)
        world.device.fake_captures = 1
        assert run_one(engine, copy_out(2, 1)) == DEVICE_FAILED, "nothing of ours gets into a graph that is being captured"
        world.device.fake_captures = 0
        assert run_one(engine, copy_out(2, 1)) == 0
    assert world.is_clean()


def hanging_device_holds_up_neither_deadlines_nor_drives(world: World) -> None:
    """Two stores begin and are abandoned; the one behind them and the load behind two others never begin."""
    with world.open() as engine:
        for n in (0, 1):
            assert run_one(engine, copy_out(n, n)) == run_one(engine, write(n, n, n)) == 0
        world.device.fake_hold = 1
        begun = world.device.calls("cuEventSynchronize")
        for n in range(3):
            assert engine.submit(copy_out(2 + n, 2 + n, timeout_us=TIMEOUT_US)) == 1
            assert engine.submit(copy_in(1, 1, kv_block=20 + n, id=20 + n, timeout_us=TIMEOUT_US)) == 1
            begin = begun + min(2 * n + 2, 4)
            wait_until(lambda begin=begin: world.device.calls("cuEventSynchronize") == begin)
        late = take(engine, 4)
        assert late == {2: TIMEDOUT, 3: TIMEDOUT, 4: TIMEDOUT, 22: TIMEDOUT}, "two loads have begun"
        assert engine.stats()["abandoned"] == 2
        assert run(engine, read(0, 2, 0), write(1, 1, 5)) == {0: 0, 1: 0}, "the slot of an abandoned store is free"
        world.device.fake_hold = 0
        assert take(engine, 2) == {20: 0, 21: 0}
        wait_until(lambda: engine.stats()["abandoned"] == 0)
        assert run_one(engine, copy_in(0, 2, kv_block=9)) == 0
        assert world.kv.block(9) == world.kv.block(0)
        assert world.kv.block(20) == world.kv.block(21) == world.kv.block(1) != world.kv.block(22)
        assert run_one(engine, copy_in(3, 3)) == BADMSG
    assert world.is_clean()


# ---- opening, idling, closing ----


def without_devices_opening_fails_with_a_sentence(world: World) -> None:
    world.device.fake_devices = 0
    assert world.refusal().strerror == "CUDA device 0 cannot be used: there are 0 devices"
    world.device.fake_devices = 2
    assert world.refusal(device=2).strerror == "CUDA device 2 cannot be used: there are 2 devices"
    assert world.is_clean()


def memory_that_cannot_be_pinned_is_told_in_a_sentence(world: World) -> None:
    world.device.fake_register_limit = 4096
    error = world.refusal()
    assert error.errno == errno.ENOMEM
    assert error.strerror == (
        "the arena of 2 MiB cannot be pinned for CUDA device 0: cuMemHostRegister: CUDA_ERROR_OUT_OF_MEMORY after 0 MiB; "
        "a smaller one may fit"
    )
    assert world.is_clean()


def idle_engine_makes_no_calls(world: World) -> None:
    with world.open() as engine:
        assert run_one(engine, copy_out(1, 0)) == run_one(engine, copy_in(1, 0)) == 0
        calls = world.device.calls()
        assert run_one(engine, write(1, 0, 3)) == run_one(engine, read(1, 0, 3)) == 0
        assert not engine.wait(0.3)
        assert world.device.calls() == calls


def close_with_copies_in_flight_gives_everything_back(world: World) -> None:
    world.device.fake_delay_us = 2000
    for _ in range(5):
        with world.open(dram_slots=30) as engine:
            assert run_one(engine, copy_out(1, 0)) == 0
            stores = [copy_out(n, n, id=n) for n in range(1, 24)]
            loads = [copy_in(1, 0, kv_block=n, id=100 + n) for n in range(10)]
            assert engine.submit(np.concatenate(stores + loads)) == 33
        assert world.is_clean()


def close_ends_while_the_device_hangs(world: World) -> None:
    with world.open() as engine:
        assert run_one(engine, copy_out(1, 0)) == 0
        world.device.fake_hold = 1
        assert engine.submit(np.concatenate([copy_out(2, 1), copy_in(1, 0)])) == 2
        wait_until(lambda: engine.stats()["in_flight"] == 2)
        start = time.monotonic()
        engine.close()
        assert time.monotonic() - start > 1, "it was given a while, and hangs still"
    world.device.fake_hold = 0
    time.sleep(0.05)
    assert world.device.fake_violations == 0, "what the device still used is still there"


def main(scenarios: dict[str, Callable]) -> None:
    scenario, library, folder, seed = sys.argv[1:]
    print(f"seed {seed}", file=sys.stderr)
    scenarios[scenario](World(library, folder, int(seed)))


SCENARIOS = {name: member for name, member in list(globals().items()) if getattr(member, "__module__", "") == __name__}
for helper in ("World", "Journey", "take", "main"):
    del SCENARIOS[helper]

if __name__ == "__main__":
    main(SCENARIOS)
