"""The worker over the real engine and real slot files, and over an engine that never answers."""

import errno
import itertools
import os
import random
from dataclasses import replace

import numpy as np
import pytest

from kvoffload import worker as worker_module
from kvoffload.config import Config
from kvoffload.engine import Engine
from kvoffload.layout import slot_offset
from kvoffload.store import Store
from kvoffload.types import (
    COMPLETION_DTYPE,
    NO_SLOT,
    OP_DTYPE,
    Demotion,
    EngineOptions,
    OpKind,
    ProbeRead,
    Region,
    SlotFiles,
    TransferPlan,
    TransferReport,
)
from kvoffload.worker import BlockList, Worker

BLOCKS, LAYERS, PAGE = 32, 3, 10_000  # not a multiple of any sector
PAYLOAD = LAYERS * PAGE
TRANSFER = 5


class Rig:
    """One rank: a KV cache in memory, an engine, a worker and the files of a store."""

    def __init__(self, path, max_ops: int = 4096):
        self.kv = [np.zeros((BLOCKS, PAGE), np.uint8) for _ in range(LAYERS)]
        config = Config.parse({"nvme_path": str(path), "ssd_kv_offload_gb": 0.01})
        self.store = Store.open(config, {"model": "test"}, PAYLOAD, ranks=1)
        self.files = self.store.slot_files(0)
        self.engine = Engine(EngineOptions(PAYLOAD, dram_slots=16, spare_slots=4, max_ops=max_ops))
        self.engine.bind([[Region(layer.ctypes.data, PAGE, PAGE) for layer in self.kv]])
        self.worker = Worker(self.engine, rank=0, group_bytes=[PAYLOAD])
        self.worker.apply(TransferPlan(attach=(self.files,)))
        self.jobs = 0

    def close(self):
        self.worker.close()
        self.store.close()

    def fill(self, seed: int) -> list[bytes]:
        """Random bytes in every block; what each block holds now."""
        rng = np.random.default_rng(seed)
        for layer in self.kv:
            layer[:] = rng.integers(0, 256, layer.shape, np.uint8)
        return [b"".join(layer[block].tobytes() for layer in self.kv) for block in range(BLOCKS)]

    def content(self, block: int) -> bytes:
        return b"".join(layer[block].tobytes() for layer in self.kv)

    def run(self, verb: str, blocks: BlockList) -> dict[bytes, int]:
        """Carries out a load or a store; the keys that failed, with their errno."""
        self.jobs += 1
        getattr(self.worker, verb)(self.jobs, blocks)
        self.worker.wait({self.jobs})
        self.report = self.worker.take_report()
        failed = self.report.failed.get(TRANSFER, {})
        assert self.worker.take_finished() == [(self.jobs, not failed)]
        return failed

    def demote(self, count: int, generation: int = 7) -> dict[int, int]:
        self.worker.apply(
            TransferPlan(demotions=tuple(Demotion(n, key(n), 0, generation, n, n) for n in range(count)))
        )
        report = self.worker.take_report()
        while len(report.demoted) < count:
            self.engine.wait(1.0)
            self.worker.poll()
            report.add(self.worker.take_report())
        return report.failed_demotions


@pytest.fixture
def rig(tmp_path):
    rig = Rig(tmp_path)
    yield rig
    rig.close()


def key(number: int) -> bytes:
    return b"block %03d" % number + bytes(27)


def block_list(count: int, dram, ssd, kv_blocks, generation: int = 7) -> BlockList:
    return BlockList(
        transfer=TRANSFER,
        keys=[key(number) for number in range(count)],
        generations=np.full(count, generation, np.uint64),
        dram_slots=np.array(dram, np.uint32),
        ssd_slots=np.array(ssd, np.uint32),
        kv_blocks=np.array(kv_blocks, np.int32),
        groups=np.zeros(count, np.uint16),
    )


def stored(rig: Rig, count: int) -> list[bytes]:
    """`count` blocks in DRAM and on SSD, slot n holding block n, and the KV cache overwritten."""
    contents = rig.fill(seed=1)
    assert rig.run("store", block_list(count, range(count), [NO_SLOT] * count, range(count))) == {}
    assert rig.demote(count) == {}
    rig.fill(seed=2)
    return contents


def test_blocks_come_back_from_dram_and_ssd_to_wherever_they_are_wanted(rig):
    contents = stored(rig, 8)
    targets = random.Random(3).sample(range(BLOCKS), 8)
    dram = [0, NO_SLOT, 2, NO_SLOT, 14, 15, 6, NO_SLOT]  # 14 and 15: the block moves into DRAM on its way
    ssd = [NO_SLOT, 1, NO_SLOT, 3, 4, 5, NO_SLOT, 7]
    assert rig.run("load", block_list(8, dram, ssd, targets)) == {}
    assert [rig.content(block) for block in targets] == contents[:8]
    rig.fill(seed=4)
    promoted = BlockList(TRANSFER, [key(4)], *(np.array([value]) for value in (7, 14, NO_SLOT, 9, 0)))
    assert rig.run("load", promoted) == {}
    assert rig.content(9) == contents[4]


def test_a_damaged_slot_fails_its_block_alone(rig):
    contents = stored(rig, 4)
    with open(rig.files.paths[0], "r+b", buffering=0) as file:
        file.seek(slot_offset(2, PAYLOAD) + 4096 + 12_345)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
        os.fsync(file.fileno())
    before = rig.content(12)
    assert rig.run("load", block_list(4, [NO_SLOT] * 4, range(4), range(10, 14))) == {key(2): errno.EBADMSG}
    assert [rig.content(10), rig.content(11), rig.content(13)] == [contents[0], contents[1], contents[3]]
    assert rig.content(12) == before
    assert rig.report.counters["kvoffload_transfer_failures_total", "read", "EBADMSG"] == 1


def test_a_slot_with_another_generation_is_a_failed_load(rig):
    stored(rig, 2)
    failed = rig.run("load", block_list(2, [0, NO_SLOT], [NO_SLOT, 1], [5, 6], generation=8))
    assert failed == {key(0): errno.EBADMSG, key(1): errno.EBADMSG}


def test_a_block_that_is_nowhere_fails_its_job_and_harms_no_other_block(rig):
    contents = stored(rig, 2)
    assert rig.run("load", block_list(2, [0, NO_SLOT], [NO_SLOT] * 2, [5, 6])) == {
        key(0): errno.ECANCELED,
        key(1): errno.ENOENT,
    }
    assert rig.run("load", block_list(2, [0, 1], [NO_SLOT] * 2, [5, 6])) == {}
    assert [rig.content(5), rig.content(6)] == contents[:2]


def test_a_job_larger_than_the_engine_takes_is_carried_out_in_parts(tmp_path):
    rig = Rig(tmp_path, max_ops=4)
    contents = stored(rig, 16)
    assert rig.run("load", block_list(16, [NO_SLOT] * 16, range(16), range(16))) == {}
    assert [rig.content(block) for block in range(16)] == contents[:16]
    rig.close()


def test_slot_files_that_cannot_be_used_are_reported_and_dram_still_works(rig, tmp_path):
    engine = Engine(EngineOptions(PAYLOAD, dram_slots=4, spare_slots=2))
    engine.bind([[Region(layer.ctypes.data, PAGE, PAGE) for layer in rig.kv]])
    worker = Worker(engine, rank=0, group_bytes=[PAYLOAD])
    worker.apply(TransferPlan(attach=(SlotFiles((str(tmp_path / "none"),), 8, bytes(16)),)))
    assert str(tmp_path / "none") in worker.take_report().attach_error
    worker.store(1, block_list(2, [0, 1], [NO_SLOT] * 2, [0, 1]))
    worker.wait({1})
    assert worker.take_finished() == [(1, True)]
    worker.close()


class DeafEngine:
    """Accepts what it has room for and completes nothing."""

    def __init__(self, room: int):
        self.room = room
        self.streams = []

    def submit(self, ops, stream=0):
        self.streams.append(stream)
        taken = min(self.room, len(ops))
        self.room -= taken
        return taken

    def poll(self, max_completions=0):
        return np.empty(0, COMPLETION_DTYPE)


def test_operations_the_engine_never_had_room_for_fail_at_their_deadline(monkeypatch):
    monkeypatch.setattr(worker_module, "LOAD_TIMEOUT_S", -1.0)
    worker = Worker(DeafEngine(room=0), rank=0, group_bytes=[PAYLOAD])
    worker.load(1, block_list(2, [NO_SLOT] * 2, [0, 1], [0, 1]))
    worker.poll()
    assert worker.take_finished() == [(1, False)]
    report = worker.take_report()
    assert report.failed == {TRANSFER: {key(0): errno.ECANCELED, key(1): errno.ECANCELED}}


def test_a_demotion_the_engine_never_had_room_for_is_not_called_late(monkeypatch):
    """Its drive was not asked, so nothing is to be held against it."""
    monkeypatch.setattr(worker_module, "DEMOTION_TIMEOUT_S", -1.0)
    worker = Worker(DeafEngine(room=0), rank=0, group_bytes=[PAYLOAD])
    worker.apply(TransferPlan(demotions=(Demotion(1, key(0), 0, 7, 0, 0),)))
    assert worker.take_report().failed_demotions == {1: errno.ECANCELED}


class LateEngine(DeafEngine):
    """Answers reads at once and copies too late."""

    def submit(self, ops, stream=0):
        self.ops = ops.copy()
        return len(ops)

    def poll(self, max_completions=0):
        ops, self.ops = self.ops, np.empty(0, OP_DTYPE)
        done = np.zeros(len(ops), COMPLETION_DTYPE)
        done["id"], done["status"] = ops["id"], np.where(ops["kind"] == OpKind.READ, 0, -errno.ETIMEDOUT)
        return done


def test_a_copy_that_waits_too_long_for_the_gpu_is_not_held_against_the_drive():
    """Copies wait for the step of the model that was launched before them: one that took longer than a load may take had
    every drive left alone that had just answered."""
    worker = Worker(LateEngine(room=0), rank=0, group_bytes=[PAYLOAD])
    worker.load(1, block_list(2, [NO_SLOT, 1], [0, NO_SLOT], [0, 1]))
    worker.poll()
    report = worker.take_report()
    assert report.failed == {TRANSFER: {key(0): errno.EREMOTEIO, key(1): errno.EREMOTEIO}}
    assert report.counters["kvoffload_transfer_failures_total", "copy_in", "ETIMEDOUT"] == 2
    assert report.counters["kvoffload_deadlines_missed_total", "copy_in", "operation"] == 2


class SlowEngine(DeafEngine):
    """Ends the operations that `ended` names as it says, when it is polled."""

    def __init__(self):
        super().__init__(room=1000)
        self.ids, self.ended = [], {}

    def submit(self, ops, stream=0):
        self.ids += ops["id"].tolist()
        return super().submit(ops, stream)

    def poll(self, max_completions=0):
        ended, self.ended = self.ended, {}
        done = np.zeros(len(ended), COMPLETION_DTYPE)
        done["id"], done["status"] = list(ended), [-error for error in ended.values()]
        return done


@pytest.mark.parametrize(("patience_s", "deadline"), [(2.5, "request"), (None, "operation")])
@pytest.mark.parametrize(("answered", "error"), [(1, errno.ETIME), (0, errno.ETIMEDOUT)])
def test_a_load_that_waits_behind_another_is_not_held_against_a_drive_that_answers_that_one(
    answered, error, patience_s, deadline
):
    """The scheduler side sees jobs end, so to it the drive looked silent until the first load was through. After a restart
    nothing is known of computing, so requests have patience without end, and many large hits come at once."""
    engine = SlowEngine()
    worker = Worker(engine, rank=0, group_bytes=[PAYLOAD])
    worker.load(1, block_list(3, [NO_SLOT] * 3, [0, 1, 2], [0, 1, 2]))
    first, engine.ids = engine.ids, []
    impatient = block_list(1, [NO_SLOT], [3], [3])
    worker.load(2, replace(impatient, transfer=TRANSFER + 1, patience_s=patience_s))
    engine.ended = dict.fromkeys(first[: 2 * answered], 0)
    worker.poll()
    engine.ended = {engine.ids[0]: errno.ETIMEDOUT, engine.ids[1]: errno.ECANCELED}
    worker.poll()
    assert worker.take_finished() == [(2, False)]
    report = worker.take_report()
    assert report.failed == {TRANSFER + 1: {key(0): error}}
    assert report.counters["kvoffload_deadlines_missed_total", "read", deadline] == 1
    assert len(report.latencies.get("read", [])) == answered


def test_a_drive_that_answered_long_ago_when_a_load_had_begun_and_nothing_since_is_silent(monkeypatch):
    engine = SlowEngine()
    worker = Worker(engine, rank=0, group_bytes=[PAYLOAD])
    worker.load(1, block_list(2, [NO_SLOT] * 2, [0, 1], [0, 1]))
    monkeypatch.setattr(worker_module, "LOAD_TIMEOUT_S", 0.0)
    engine.ended = dict.fromkeys(engine.ids[:2], 0)
    worker.poll()
    engine.ended = {engine.ids[2]: errno.ETIMEDOUT, engine.ids[3]: errno.ECANCELED}
    worker.poll()
    assert worker.take_report().failed == {TRANSFER: {key(1): errno.ETIMEDOUT}}


@pytest.mark.parametrize(("copied", "error"), [(False, errno.ETIME), (True, errno.ETIMEDOUT)])
def test_a_load_that_finds_no_memory_while_others_wait_for_the_gpu_is_not_held_against_the_drive(copied, error):
    """Memory to read into is held by blocks that wait for a step of the model: until that ends the drive is not asked."""
    engine = SlowEngine()
    worker = Worker(engine, rank=0, group_bytes=[PAYLOAD])
    worker.load(1, block_list(1, [NO_SLOT], [0], [0]))
    read, copy = engine.ids
    engine.ended = {read: 0, copy: 0} if copied else {read: 0}
    worker.poll()
    engine.ids = []
    impatient = block_list(1, [NO_SLOT], [3], [3])
    worker.load(2, replace(impatient, transfer=TRANSFER + 1, patience_s=2.5))
    engine.ended = {engine.ids[0]: errno.ETIMEDOUT, engine.ids[1]: errno.ECANCELED}
    worker.poll()
    assert worker.take_report().failed == {TRANSFER + 1: {key(0): error}}


def test_of_several_ranks_words_on_a_demotion_lateness_stays():
    """Whatever the others say, the late one may still use its memory."""
    for errors in ((errno.ETIMEDOUT, errno.EIO), (errno.EIO, errno.ETIMEDOUT)):
        report = TransferReport()
        for error in errors:
            report.add(TransferReport(demoted={1: 1}, failed_demotions={1: error}))
        assert report.demoted == {1: 2} and report.failed_demotions == {1: errno.ETIMEDOUT}


def test_operations_the_engine_refuses_fail_and_those_behind_them_are_carried_out(rig):
    """A refusal used to leave the batch at the head of its queue, and every later step of vLLM raised."""
    contents = rig.fill(seed=1)
    beyond = 99  # there are 16 DRAM slots
    assert rig.run("store", block_list(2, [0, beyond], [NO_SLOT] * 2, [0, 1])) == {key(0): errno.EINVAL, key(1): errno.EINVAL}
    assert rig.run("store", block_list(2, [0, 1], [NO_SLOT] * 2, [0, 1])) == {}
    rig.worker.apply(TransferPlan(demotions=(Demotion(5, key(0), 0, 7, beyond, 0),)))
    assert rig.worker.take_report().failed_demotions == {5: errno.EINVAL}
    assert rig.run("load", block_list(1, [beyond], [NO_SLOT], [7])) == {key(0): errno.EINVAL}
    assert rig.run("load", block_list(1, [0], [NO_SLOT], [7])) == {}
    assert rig.content(7) == contents[0]


def test_a_load_of_any_size_leaves_room_for_stores(monkeypatch):
    monkeypatch.setattr(worker_module, "READ_OPS_MAX", 8)
    monkeypatch.setattr(worker_module, "COPY_OPS_MAX", 4)
    engine = DeafEngine(room=14)
    worker = Worker(engine, rank=0, group_bytes=[PAYLOAD])
    worker.load(1, block_list(16, [NO_SLOT] * 16, range(16), range(16)))
    assert engine.room == 6
    worker.load(2, block_list(16, range(16), [NO_SLOT] * 16, range(16)))
    assert engine.room == 2, "blocks that are in DRAM do not wait for all of a load that reads a drive"
    engine.room += 8
    worker._load_ops[True] = 0  # as if those of the first load had completed
    worker.poll()
    assert engine.room == 2, "and those that are read not for all that comes from DRAM"
    worker.store(3, block_list(2, [0, 1], [NO_SLOT] * 2, [0, 1]))
    assert engine.room == 0


def probe(count: int, generation: int = 7) -> ProbeRead:
    numbers = tuple(range(count))
    return ProbeRead(TRANSFER, tuple(map(key, numbers)), (0,) * count, (generation,) * count, numbers, 60.0)


def test_blocks_are_read_for_the_time_it_takes_and_told_of_to_us_alone(rig):
    stored(rig, 4)
    before = [rig.content(block) for block in range(BLOCKS)]
    for generation, failed in ((7, {}), (8, dict.fromkeys(map(key, range(4)), errno.EBADMSG))):
        rig.worker.apply(TransferPlan(probes=(probe(4, generation),)))
        report = rig.worker.take_report()
        while TRANSFER not in report.probes:
            rig.engine.wait(1.0)
            rig.worker.poll()
            report.add(rig.worker.take_report())
        ranks, seconds = report.probes[TRANSFER]
        assert ranks == 1 and 0 < seconds < 60.0 and report.failed.get(TRANSFER, {}) == failed
    assert rig.worker.take_finished() == [] and [rig.content(block) for block in range(BLOCKS)] == before
    assert not rig.worker._jobs and not rig.worker._copying and rig.worker._load_ops == {True: 0, False: 0}


def test_of_several_ranks_the_slowest_tells_how_long_reading_took():
    first = TransferReport(probes={1: (1, 0.5), 2: (1, 0.1)})
    first.add(TransferReport(probes={1: (1, 2.0)}))
    assert first.probes == {1: (2, 2.0), 2: (1, 0.1)}


def test_a_load_whose_time_is_up_ends_though_an_earlier_one_still_waits():
    worker = Worker(DeafEngine(room=2), rank=0, group_bytes=[PAYLOAD])
    worker.load(1, block_list(4, [NO_SLOT] * 4, range(4), range(4)))
    worker.load(2, replace(block_list(1, [NO_SLOT], [5], [5]), patience_s=0.0))
    worker.poll()
    assert worker.take_finished() == [(2, False)]
    assert set(worker.take_report().failed[TRANSFER].values()) == {errno.ECANCELED}


def test_every_hand_over_to_the_engine_names_the_stream_that_is_current_then(monkeypatch):
    monkeypatch.setattr(worker_module, "READ_OPS_MAX", 2)
    engine, streams = DeafEngine(room=100), iter([11, 22, 33])
    worker = Worker(engine, rank=0, group_bytes=[PAYLOAD], current_stream=lambda: next(streams))
    worker.store(1, block_list(1, [0], [NO_SLOT], [0]))
    worker.load(2, block_list(2, [NO_SLOT] * 2, [0, 1], [0, 1]))
    assert engine.streams == [11, 22]
    worker._load_ops[True] = 0  # as if the first pair had completed
    worker.poll()
    assert engine.streams == [11, 22, 33]


FAILURES = (errno.ECANCELED, errno.EREMOTEIO, errno.EBADMSG, errno.ETIME, errno.ETIMEDOUT)


@pytest.mark.parametrize("order", list(itertools.permutations(FAILURES)))
def test_of_several_ranks_failures_lateness_stays_then_damage_and_then_the_gpus(order):
    """A late read still writes to its memory on its rank, which must not be given away though a block is damaged on another."""
    for most in range(1, len(FAILURES)):
        report = TransferReport()
        for error in order:
            if error in FAILURES[: most + 1]:
                report.add(TransferReport(failed={1: {b"a": error}}))
        assert report.failed == {1: {b"a": FAILURES[most]}}
