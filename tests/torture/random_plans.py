"""Random plans through the engine under random faults: `python -m tests.torture.random_plans --plans 100000`.

A plan is a mix of faults and some batches of operations. The runner knows which bytes were stored under which generation,
and holds the engine to what csrc/kvo.h promises. Plans follow from the seed; what the engine makes of them depends on
when things happen, too."""

import argparse
import errno
import itertools
import multiprocessing
import os
import random
import tempfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from kvoffload.types import OP_DTYPE, OpFlag, OpKind
from tests.engine.faulty import COPY_FAULTS, GROW_FAULTS, READ_FAULTS, WRITE_FAULTS, FaultPlan, faulty_engines
from tests.engine.planner import Planner
from tests.engine.world import (
    BADMSG,
    CANCELED,
    DRAM_SLOTS,
    FOREVER_US,
    SSD_SLOTS,
    TIMEDOUT,
    KVCache,
    copy_in,
    copy_out,
    load,
    make_files,
    open_engine,
    read,
    write,
)
from tests.patience import PATIENCE_S, wait_until

BACKENDS = ("io_uring", "threads")
PLANS_A_SESSION = 40  # on one engine and one set of files
BATCH_MOST = 24
GRACE_US = 100_000  # KVO_GRACE_US
LATE_SHARE_MAX = 0.02  # of batches, on a machine that others pause
KINDS = {"read": READ_FAULTS, "write": WRITE_FAULTS, "grow": GROW_FAULTS, "copy_in": COPY_FAULTS, "copy_out": COPY_FAULTS}
CHANCES = (0.1, 0.4, 1.0)
STALLS_US = (300, 2_000, 12_000, FOREVER_US)
TIMEOUTS_US = (500, 2_000, 8_000)
LONG_US = int(PATIENCE_S * 1e6)
PROGRESS_S = 10
UNTOUCHED = (BADMSG, CANCELED, TIMEDOUT)  # statuses of a COPY_IN that never began
MAY_FAIL = {
    OpKind.COPY_OUT: (TIMEDOUT, -errno.EREMOTEIO),
    OpKind.COPY_IN: (*UNTOUCHED, -errno.EREMOTEIO),
    OpKind.WRITE: (BADMSG, TIMEDOUT, -errno.EIO, -errno.ENOSPC),
    OpKind.READ: (BADMSG, TIMEDOUT, -errno.EIO, -errno.ENOSPC),
}


@dataclass
class Seen:
    """What happened."""

    statuses: Counter = field(default_factory=Counter)  # of operations, by kind and errno
    injected: Counter = field(default_factory=Counter)  # faults, by kind of request and fault
    late_us: Counter = field(default_factory=Counter)  # the most after a timeout, by whose clock
    batches: Counter = field(default_factory=Counter)  # those with an operation that was later than the grace allows, and others

    def note_late(self, name: str, late_us: int) -> None:
        self.late_us[name] = max(self.late_us[name], late_us)


class FaultyPlanner(Planner):
    """After a failure a slot may hold what it held before, what it should hold, or neither: it asks for either."""

    kinds = (*Planner.kinds, "copy out", "write", "write", "write")  # of which many find nothing to write
    counts = Planner.counts | {"ssd": 8}  # few, so that what is late meets what comes next

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.certain: dict[str, dict[int, dict[str, int]]] = {"dram": {}, "ssd": {}}  # what slots must hold, where that is sure
        self.is_honest = True  # a write that succeeds is one that is on the medium

    def note(self, statuses: dict[int, int]) -> None:
        for number, (tier, slot, fields) in self.filled.items():
            slots = self.dram if tier == "dram" else self.ssd
            if statuses[number] == 0 or self.random.random() < 0.3:
                slots[slot] = fields
            self.certain[tier].pop(slot, None)
            if statuses[number] == 0 and (tier == "dram" or self.is_honest):
                self.certain[tier][slot] = fields

    def must_be_in(self, op: np.void) -> bool:
        """Whether a READ asks for what its slot holds for sure."""
        fields = self.certain["ssd"].get(int(op["ssd_slot"]))
        if fields is None:
            return False
        held = read(dram=0, ssd=0, **fields)[0]
        return all(np.array_equal(held[name], op[name]) for name in ("generation", "group", "key"))


class Kept:
    """How long the kernel kept threads from running although they could: that is the machine's doing, not the engine's."""

    def __init__(self) -> None:
        tasks = [task for task in Path("/proc/self/task").iterdir() if task.name != str(os.getpid())]
        self.pump = next(task for task in tasks if (task / "comm").read_text() == "kvo-pump\n") / "schedstat"
        self.runner = Path(f"/proc/self/task/{os.getpid()}/schedstat")
        self.others = [task / "schedstat" for task in tasks if task / "schedstat" != self.pump]
        self.start()

    def now(self) -> list[int]:
        return [int(file.read_text().split()[1]) // 1000 for file in (self.pump, self.runner, *self.others)]

    def start(self) -> None:
        self.before = self.now()

    def usec(self) -> int:
        """Since the start: the pump, the runner, and one of the others, for which the pump may wait at a lock."""
        pump, runner, *others = (now - before for now, before in zip(self.now(), self.before, strict=True))
        return pump + runner + max(others)


class Session:
    """Plans on one engine and one set of files."""

    def __init__(self, backend: str, folder: Path, seed: int, faults: FaultPlan, seen: Seen) -> None:
        self.random = random.Random(seed)
        self.bytes = np.random.default_rng(seed)
        self.faults, self.seen = faults, seen
        faults.seed(seed)
        self.planner = FaultyPlanner(seed)
        self.kv = KVCache(seed)
        self.shadow = [[array.copy() for array in group] for group in self.kv.arrays]  # what the KV cache must hold
        self.stored: dict[int, tuple[bytes, int, bytes]] = {}  # generation -> key, group, bytes
        self.first_id = itertools.count(0, 10_000)
        self.engine = open_engine(backend, self.kv, make_files(folder))
        self.kept = Kept()

    def close(self) -> None:
        self.engine.close()

    # ---- a plan ----

    def run_plan(self) -> None:
        self.make_faults()
        for _ in range(self.random.randint(1, 4)):
            ops = self.planner.batch(BATCH_MOST)
            if ops:
                self.run_batch(np.concatenate(ops))
        self.faults.heal()
        self.reads_are_right = True
        wait_until(lambda: self.engine.stats()["abandoned"] == 0)
        self.check_dram()
        self.check_ssd()
        self.check_recovery([self.random.randrange(DRAM_SLOTS)], [self.random.randrange(SSD_SLOTS)])

    def make_faults(self) -> None:
        mix = Counter()
        for _ in range(self.random.choice((0, 1, 2, 3, 6, 12))):
            kind = self.random.choice(list(KINDS))
            mix[kind, self.random.choice(sorted(KINDS[kind]))] = self.random.choice(CHANCES)
        for name in KINDS:
            kind = getattr(self.faults, name)
            kind.set(**{fault: chance for (of, fault), chance in mix.items() if of == name})
            kind.stall_us = self.random.choice(STALLS_US)
            if not name.startswith("copy"):
                kind.error = self.random.choice((errno.EIO, errno.ENOSPC))
        chosen = {(of, fault) for of, fault in mix}
        self.planner.is_honest = not chosen & {("write", fault) for fault in ("torn", "flip", "lost", "misdirect")}
        if ("write", "misdirect") in chosen:
            self.planner.certain["ssd"].clear()
        self.reads_are_right = not chosen & {("read", "flip"), ("read", "misdirect")}

    # ---- a batch ----

    def run_batch(self, batch: np.ndarray) -> None:
        first_id = next(self.first_id)
        batch["id"] += first_id
        batch["timeout_us"] = [self.random.choice(TIMEOUTS_US) for _ in batch]
        statuses = self.run(batch)
        self.planner.note({number - first_id: status for number, status in statuses.items()})

    def run(self, batch: np.ndarray) -> dict[int, int]:
        """Submits operations, waits for them, and holds them to the contract. Returns statuses by id."""
        sources = self.fill(batch)
        stalled = self.faults.copy_in.injected("stall")
        self.kept.start()
        completions, waited_us = self.wait_for(batch)
        may_stall = self.faults.copy_in.injected("stall") > stalled
        self.check_times(batch, completions, waited_us, self.kept.usec(), may_stall)
        statuses = {number: int(completion["status"]) for number, completion in completions.items()}
        for op in batch[batch["kind"] == OpKind.COPY_OUT]:
            if statuses[int(op["id"])] == 0:
                self.stored[int(op["generation"])] = (op["key"].tobytes(), int(op["group"]), sources[int(op["id"])])
        for op in batch[batch["kind"] == OpKind.COPY_IN]:
            self.check_delivery(op, statuses[int(op["id"])])
        self.check_untouched()
        for op in batch:
            status = statuses[int(op["id"])]
            assert status == 0 or status in MAY_FAIL[OpKind(op["kind"])], f"{op}: {status}"
            is_lost = status == BADMSG and op["kind"] == OpKind.READ and self.reads_are_right and self.planner.must_be_in(op)
            assert not is_lost, f"{op}: what was written is not there"
            self.seen.statuses[OpKind(op["kind"]).name, errno.errorcode.get(-status, "good")] += 1
        return statuses

    def fill(self, batch: np.ndarray) -> dict[int, bytes]:
        """Gives the blocks that are to be stored new bytes, so that no two generations have the same."""
        sources = {}
        for op in batch[batch["kind"] == OpKind.COPY_OUT]:
            block, group = int(op["kv_block"]), int(op["group"])
            for array, shadow, region in zip(self.kv.arrays[group], self.shadow[group], self.kv.groups[group], strict=True):
                array[block, : region.nbytes] = self.bytes.integers(0, 256, region.nbytes, np.uint8)
                shadow[block] = array[block]
        for op in batch[batch["kind"] == OpKind.COPY_OUT]:  # some of them share a block
            sources[int(op["id"])] = self.kv.block(int(op["kv_block"]), int(op["group"]))
        return sources

    def wait_for(self, batch: np.ndarray) -> tuple[dict[int, np.void], dict[int, int]]:
        """Completions by id, and how long each took by our own clock."""
        ids, accepted = set(batch["id"].tolist()), 0
        completions, waited_us = {}, {}
        submitted = time.monotonic()
        copies_late = submitted + max(TIMEOUTS_US) / 1e6 + 0.002
        while len(completions) < len(batch):
            accepted += self.engine.submit(batch[accepted:])
            self.engine.wait(0.005)
            now = time.monotonic()
            assert now < submitted + PATIENCE_S, f"{len(ids - set(completions))} operations never complete"
            for completion in self.engine.poll():
                number = int(completion["id"])
                assert number in ids, f"{number} was not submitted, or completed before"
                assert number not in completions, f"{number} completed twice"
                completions[number], waited_us[number] = completion, int((now - submitted) * 1e6)
            if now > copies_late and self.faults.copy_in.waiting:
                self.faults.release()  # copies that have begun are waited for without end
        assert len(self.engine.poll()) == 0, "something completed twice"
        return completions, waited_us

    # ---- what must hold ----

    def check_times(self, batch: np.ndarray, completions: dict, waited_us: dict, kept_us: int, may_stall: bool) -> None:
        """Every operation completes before its timeout and the grace, but for what the machine kept us from: how long the kernel
        let threads wait is known, how long others had the machine itself is not. That the engine never sleeps past a deadline is
        certain whatever the machine does."""
        assert self.faults.overdue == 0, "the engine went to sleep past a deadline"
        latest = 0
        timeouts = batch["timeout_us"].copy()
        for number in np.flatnonzero(batch["flags"] == OpFlag.LINK):
            timeouts[number] = min(timeouts[number : number + 2])
        for op, timeout_us in zip(batch, timeouts.tolist(), strict=True):
            if op["kind"] == OpKind.COPY_IN and may_stall:
                continue
            number = int(op["id"])
            for name, usec in (("engine", int(completions[number]["usec"])), ("runner", waited_us[number])):
                late = usec - timeout_us
                self.seen.note_late(name, late)
                self.seen.note_late(f"{name} when not kept", late - kept_us)
                latest = max(latest, late - kept_us)
        self.seen.batches["late" if latest > GRACE_US else "in time"] += 1

    def check_delivery(self, op: np.void, status: int) -> None:
        """A COPY_IN that completed with 0 delivered the bytes of that generation; one that never began changed nothing."""
        block, group = int(op["kv_block"]), int(op["group"])
        if status == 0:
            generation = int(op["generation"])
            assert generation in self.stored, f"{op}: delivered what was never stored"
            key, group_then, right = self.stored[generation]
            assert (key, group_then) == (op["key"].tobytes(), group), f"{op}: delivered under another's name"
            assert self.kv.block(block, group) == right, f"{op}: wrong bytes"
        if status not in UNTOUCHED:
            for array, shadow, region in zip(self.kv.arrays[group], self.shadow[group], self.kv.groups[group], strict=True):
                shadow[block, : region.nbytes] = array[block, : region.nbytes]

    def check_untouched(self) -> None:
        for group, (arrays, shadows) in enumerate(zip(self.kv.arrays, self.shadow, strict=True)):
            for array, shadow in zip(arrays, shadows, strict=True):
                if not np.array_equal(array, shadow):
                    changed = np.flatnonzero((array != shadow).any(axis=1))
                    raise AssertionError(f"blocks {changed} of group {group} changed, though they were nobody's target")

    def run_healed(self, *ops: np.ndarray) -> list[int]:
        """Statuses of operations that meet no fault, in their order."""
        batch = np.concatenate([np.zeros(0, OP_DTYPE), *ops])
        batch["id"] = next(self.first_id) + np.arange(len(batch))
        batch["timeout_us"] = LONG_US
        statuses = self.run(batch)
        return [statuses[number] for number in batch["id"].tolist()]

    def check_dram(self) -> None:
        """What was filled and never failed since is there."""
        certain = self.planner.certain["dram"]
        statuses = self.run_healed(*(copy_in(dram=slot, **fields, kv_block=slot) for slot, fields in certain.items()))
        assert set(statuses) <= {0}, f"DRAM slots {list(certain)} answer {statuses}"

    def check_ssd(self) -> None:
        """Slots hold what was asked of them or they are misses; run() compares the bytes."""
        loads = [load(ssd=slot, to=slot, **fields) for slot, fields in self.planner.ssd.items()]
        statuses = self.run_healed(*loads)  # which sees to it that what must be there is
        assert set(statuses[::2]) <= {0, BADMSG}, statuses
        assert all(second == (0 if first == 0 else CANCELED) for first, second in zip(statuses[::2], statuses[1::2], strict=True))

    def check_recovery(self, dram_slots: list[int], ssd_slots: list[int]) -> None:
        """Slots work again after whatever happened to them."""
        for dram, ssd in itertools.zip_longest(dram_slots, ssd_slots):
            dram, ssd = dram_slots[0] if dram is None else dram, ssd_slots[0] if ssd is None else ssd
            self.planner.generation += 1
            fields = {"block": dram, "generation": self.planner.generation, "group": self.random.randrange(2)}
            assert self.run_healed(copy_out(dram=dram, **fields)) == [0]
            assert self.run_healed(write(dram=dram, ssd=ssd, **fields)) == [0]
            assert self.run_healed(read(dram=dram, ssd=ssd, **fields)) == [0]
            assert self.run_healed(load(ssd=ssd, to=1, **fields), copy_in(dram=dram, **fields, kv_block=2)) == [0, 0, 0]
            self.planner.dram[dram] = self.planner.ssd[ssd] = fields
            self.planner.certain["dram"][dram] = self.planner.certain["ssd"][ssd] = fields

    def check_at_the_end(self) -> None:
        """Every slot works, and no spare memory was lost on the way."""
        self.check_recovery(list(range(DRAM_SLOTS)), list(range(SSD_SLOTS)))
        spares = self.engine.options.spare_slots
        self.faults.read.set(stall=1)
        self.faults.read.stall_us = FOREVER_US
        loads = np.concatenate([load(ssd=slot, to=slot, **self.planner.ssd[slot]) for slot in range(spares)])
        loads["id"] = next(self.first_id) + np.arange(len(loads))
        assert self.engine.submit(loads) == len(loads)
        wait_until(lambda: self.faults.read.waiting == spares)
        self.faults.heal()
        done = 0
        while done < len(loads):
            assert self.engine.wait(PATIENCE_S)
            done += len(self.engine.poll())


def run_plans(backend: str, plans: int, seed: int, folder: Path, progress=lambda done: None) -> Seen:
    """Raises AssertionError with the seed of what went wrong."""
    seen = Seen()
    with FaultPlan(folder / "faults") as faults, faulty_engines(faults):
        for first in range(0, plans, PLANS_A_SESSION):
            session_seed = (seed << 32) + first
            session = Session(backend, folder / "store", session_seed, faults, seen)
            count = min(plans - first, PLANS_A_SESSION)
            try:
                for _ in range(count):
                    session.run_plan()
                session.check_at_the_end()
            except AssertionError as error:
                error.add_note(f"{backend}, --seed {seed}, in the session that began with plan {first}")
                raise
            finally:
                faults.heal()
                session.close()
            progress(first + count)
        for name, kind in zip(KINDS, faults.kinds, strict=True):
            seen.injected.update({(name, fault): kind.injected(fault) for fault in KINDS[name]})
    assert seen.batches["late"] <= LATE_SHARE_MAX * seen.batches.total(), f"{dict(seen.batches)}, {dict(seen.late_us)}"
    return seen


def work(backend: str, plans: int, seed: int) -> Seen:
    start = time.monotonic()
    due = PROGRESS_S

    def tell(done: int) -> None:
        nonlocal due
        if time.monotonic() - start >= due:
            print(f"{backend}: {done} of {plans} plans in {time.monotonic() - start:.0f} s", flush=True)
            due += PROGRESS_S

    with tempfile.TemporaryDirectory() as folder:
        return run_plans(backend, plans, seed, Path(folder), tell)


def tell_counts(title: str, counts: Counter) -> None:
    print(f"  {title}")
    for (kind, what), count in sorted(counts.items()):
        print(f"    {kind:10} {what:12} {count:9}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plans", type=int, default=100_000, help="over all backends")
    seed = os.environ.get("KVOFFLOAD_TEST_SEED", random.SystemRandom().randrange(2**32))
    parser.add_argument("--seed", type=int, default=int(seed))
    parser.add_argument("--backend", choices=BACKENDS, action="append", help="all of them, unless named")
    arguments = parser.parse_args()
    backends = arguments.backend or BACKENDS
    each = arguments.plans // len(backends)
    print(f"{each} plans on {' and '.join(backends)} each, --seed {arguments.seed}", flush=True)
    with ProcessPoolExecutor(len(backends), multiprocessing.get_context("spawn")) as pool:  # which notices a crash
        futures = [pool.submit(work, backend, each, arguments.seed) for backend in backends]
        results = [future.result() for future in futures]
    for backend, seen in zip(backends, results, strict=True):
        print(f"{backend}: no promise was broken; at most {dict(seen.late_us)} us after a timeout, batches {dict(seen.batches)}")
        tell_counts("operations", seen.statuses)
        tell_counts("faults", seen.injected)


if __name__ == "__main__":
    main()
