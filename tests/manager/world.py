"""A simulated world for the block manager: workers with memory, disks, delays, reordering and faults, but no engine.

Every byte string is unique to one store of one block, so a load that delivers anything but what that store put there
is seen. Workers keep the engine's contract (csrc/kvo.h) and refuse what its caller must not do.
"""

import errno
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from kvoffload.admission import Admission, AdmissionPolicy, AdmitAll, Budget
from kvoffload.blocks import Placement
from kvoffload.manager import BlockManager
from kvoffload.policy import DEFAULT, POLICIES
from kvoffload.types import LATE, NO_SLOT, BlockKey, Demotion, add_errors

BLOCK_BYTES = 1 << 20


class MemoryJournal:
    """What the store would recover after a kill -9 right now."""

    def __init__(self) -> None:
        self.blocks: dict[BlockKey, tuple[int, int, int]] = {}  # key -> slot, generation, group; oldest first
        self._generation = 0

    def put(self, key, slot, generation, group):
        self.blocks = {k: v for k, v in self.blocks.items() if v[0] != slot and k != key}
        self.blocks[key] = (slot, generation, group)

    def delete(self, key, slot):
        assert self.blocks.pop(key)[0] == slot

    def touch(self, blocks):
        for key, slot in blocks:
            assert self.blocks[key][0] == slot
            self.blocks[key] = self.blocks.pop(key)

    def clear(self):
        self.blocks.clear()

    def next_generation(self):
        self._generation += 1
        return self._generation


class Mood(Enum):
    """How a drive of the world behaves, on every rank alike."""

    WELL = "well"
    DEAD = "fails everything at once"
    HUNG = "answers nothing in time; late writes land when the mood passes"
    SLOW = "answers every other load when its request has given it up"
    FULL = "takes no writes"
    LOSSY = "acknowledges writes and keeps the old bytes"


@dataclass
class Action:
    """One rank's share of an operation, to be done at a moment of the world's choosing."""

    kind: str  # "store", "load", "demote"
    place: Placement
    owner: object  # request or demotion id


class SimWorker:
    def __init__(self, rng: random.Random, fault_rate: float, moods: list[Mood]):
        self.rng, self.fault_rate, self.moods = rng, fault_rate, moods
        self.dram: dict[int, tuple[BlockKey, int, bytes]] = {}
        self.ssd: dict[int, tuple[BlockKey, int, bytes]] = {}
        self.waiting: list[Action] = []
        self._targets: set[tuple[str, int]] = set()
        self.in_use: dict[int, int] = {}  # DRAM slots that late operations still use, by which drive's
        self._landing: list[Placement] = []  # late writes on their way

    def begin(self, action: Action) -> None:
        for target in self._fills(action):
            assert target not in self._targets, f"{target} is filled by two operations at once"
            self._targets.add(target)
            assert target[0] == "ssd" or target[1] not in self.in_use, f"{target} is filled while a late operation uses it"
        self.waiting.append(action)

    def _fills(self, action: Action) -> list[tuple[str, int]]:
        place = action.place
        if action.kind == "demote":
            return [("ssd", place.ssd_slot)]
        if place.dram_slot == NO_SLOT or (action.kind == "load" and place.ssd_slot == NO_SLOT):
            return []
        return [("dram", place.dram_slot)]

    def finish_one(self, content: bytes) -> tuple[Action, int, bytes]:
        """Does one waiting action, any of them: action, errno, bytes delivered."""
        action = self.waiting.pop(self.rng.randrange(len(self.waiting)))
        self._targets.difference_update(self._fills(action))
        fault = self.rng.random() < self.fault_rate
        return action, *getattr(self, "_" + action.kind)(action.place, content, fault)

    def _store(self, place: Placement, content: bytes, fault: bool) -> tuple[int, bytes]:
        if fault:
            self.dram.pop(place.dram_slot, None)
            return errno.EIO, b""
        self.dram[place.dram_slot] = (place.key, place.generation, content)
        return 0, b""

    def _demote(self, place: Placement, content: bytes, fault: bool) -> tuple[int, bytes]:
        held = self.dram.get(place.dram_slot)
        if held is None or held[:2] != (place.key, place.generation):
            raise AssertionError("a demotion found another block in its DRAM slot")
        mood = self._mood(place)
        if mood is Mood.HUNG:
            self.in_use[place.dram_slot] = place.ssd_slot % len(self.moods)
            self._landing.append(place)
            return errno.ETIMEDOUT, b""
        if mood in (Mood.DEAD, Mood.FULL):
            return errno.EIO if mood is Mood.DEAD else errno.ENOSPC, b""
        if mood is Mood.LOSSY:
            return 0, b""
        if fault:
            if self.rng.random() < 0.5:
                self.ssd[place.ssd_slot] = (place.key, 0, b"torn")
            return self.rng.choice([errno.EIO, errno.ENOSPC]), b""
        self.ssd[place.ssd_slot] = held
        return 0, b""

    def _mood(self, place: Placement) -> Mood:
        return Mood.WELL if place.ssd_slot == NO_SLOT else self.moods[place.ssd_slot % len(self.moods)]

    def recover(self, drive: int) -> None:
        """The drive no longer hangs: what is late ends now."""
        for place in [place for place in self._landing if place.ssd_slot % len(self.moods) == drive]:
            self._landing.remove(place)
            held = self.dram.get(place.dram_slot)
            assert held is not None and held[:2] == (place.key, place.generation), "memory of a late write was given away"
            self.ssd[place.ssd_slot] = held
        self.in_use = {slot: of for slot, of in self.in_use.items() if of != drive}

    def _load(self, place: Placement, content: bytes, fault: bool) -> tuple[int, bytes]:
        mood = self._mood(place)
        if mood is Mood.HUNG and place.dram_slot != NO_SLOT:
            self.in_use[place.dram_slot] = place.ssd_slot % len(self.moods)
        if mood in (Mood.HUNG, Mood.DEAD):
            return errno.ETIMEDOUT if mood is Mood.HUNG else errno.EIO, b""
        if mood is Mood.SLOW and self.rng.random() < 0.5:
            return errno.ETIME, b""
        if fault:
            return self.rng.choice([errno.EIO, *LATE]), b""
        source = self.dram.get(place.dram_slot) if place.ssd_slot == NO_SLOT else self.ssd.get(place.ssd_slot)
        if source is None or source[:2] != (place.key, place.generation):
            return errno.EBADMSG, b""
        if place.ssd_slot != NO_SLOT and place.dram_slot != NO_SLOT:
            self.dram[place.dram_slot] = source
        return 0, source[2]


@dataclass
class Job:
    kind: str
    places: list[Placement]
    failed: dict[BlockKey, int]
    left: int


class World:
    """Drives manager and workers through random steps. In a world without faults and moods no load may fail. With a `backlog`
    workers leave no more than that undone in a step, so that there is more to and fro."""

    def __init__(
        self, seed: int, ranks: int, dram: int, ssd: int,
        *, tier: bool = True, fault_rate: float = 0.0, drives: int = 1, backlog: int | None = None,
        policy: AdmissionPolicy | None = None, budget: float = 0.0, eviction: str = DEFAULT,
    ):  # fmt: skip
        self.rng = random.Random(seed)
        self.now = 0.0
        self.ranks, self.fault_rate = ranks, fault_rate
        self.journal = MemoryJournal()
        names = [str(drive) for drive in range(drives)]
        spent = Budget(budget, 1, lambda: self.now) if budget else None  # in blocks per day
        self.admission = Admission(policy or AdmitAll(), spent, 4 * (dram + ssd))
        self.manager = BlockManager(
            dram, ssd, ranks, self.journal, block_bytes=BLOCK_BYTES, dram_is_tier=tier, drives=names,
            admission=self.admission, clock=lambda: self.now, policy=POLICIES[eviction],
        )  # fmt: skip
        self.moods = [Mood.WELL] * drives
        self.moody = False
        self.backlog = backlog
        self.workers = [SimWorker(self.rng, fault_rate, self.moods) for _ in range(ranks)]
        self.contents: dict[tuple[BlockKey, int, int], bytes] = {}  # key, generation, rank -> stored bytes
        self.jobs: dict[str, Job] = {}
        self.delivered = self.failed_loads = 0
        self.written, self.read, self.asked = Counter(), Counter(), Counter()  # by drive: what succeeded, and all attempts
        self.writes = 0  # demotions begun
        self._names = 0
        self._prefixes = self._grow_prefixes()

    def _grow_prefixes(self) -> list[list[BlockKey]]:
        """Requests that share prefixes, as conversations do."""
        prefixes: list[list[BlockKey]] = []
        for number in range(30):
            base = self.rng.choice(prefixes) if prefixes and self.rng.random() < 0.7 else []
            head = base[: self.rng.randint(0, len(base))]
            tail = [b"%03d.%02d" % (number, i) for i in range(self.rng.randint(1, 12))]
            prefixes.append(head + tail)
        return prefixes

    def step(self) -> None:
        """One scheduler step: some requests look up, load and store; some work of the workers comes back."""
        self.now += self.rng.random()
        stores = []
        for _ in range(self.rng.randint(0, 3)):
            self._names += 1
            stores.append((f"r{self._names}", self._request(f"r{self._names}")))
        self.manager.end_step()
        self._demote(self.manager.plan())
        for name, keys in stores:
            self._store(name, keys)
        self.check()
        for _ in range(self.rng.randint(0, 3 * self.ranks)):
            self.finish_one()
        while self.backlog is not None and sum(len(worker.waiting) for worker in self.workers) > self.backlog:
            self.finish_one()
        self.check()

    def live(self, steps: int, until: Callable[[], bool] = lambda: True, step: Callable[[], None] | None = None) -> None:
        """So many steps, and with an unlucky seed more, until there is something for the test to look at. `step`: what is done
        in place of a step alone."""
        step = step or self.step
        for _ in range(steps):
            step()
        more = 100_000
        while not until():
            step()
            more -= 1
            assert more, "it never happens"

    def _demote(self, demotions: list[Demotion]) -> None:
        self.writes += len(demotions)
        for demotion in demotions:
            place = Placement(demotion.key, demotion.generation, demotion.dram_slot, demotion.ssd_slot)
            self._begin("demote", [place], demotion.id)

    def set_mood(self, drive: int, mood: Mood) -> None:
        self.moody = True
        if self.moods[drive] is Mood.HUNG:
            for worker in self.workers:
                worker.recover(drive)
        self.moods[drive] = mood

    def check(self) -> None:
        """The books are right, and a kill now would lose nothing that is ready on SSD and find nothing else."""
        self.manager.check()
        on_ssd = dict(self.manager._index.on_ssd.items())
        assert {key: slot for key, (slot, *_) in self.journal.blocks.items()} == on_ssd

    def _request(self, name: str) -> list[BlockKey]:
        keys = self.rng.choice(self._prefixes)
        hits = 0
        while hits < len(keys) and self.manager.lookup(keys[hits]) is not None:
            hits += 1
        if hits and self.rng.random() < 0.8:
            loaded = keys[: self.rng.randint(1, hits)]
            places = self.manager.load(loaded, name)
            self._load(places, name)
        elif hits:
            self._load(self.manager.read_for_time(keys[:hits], f"{name} probe"), f"{name} probe")
        self.manager.touch(keys, name)
        return keys

    def _load(self, places: list[Placement], name: str) -> None:
        if places:
            self.jobs[name] = Job("load", places, {}, len(places) * self.ranks)
            self._begin("load", places, name)

    def _store(self, name: str, keys: list[BlockKey]) -> None:
        own = {key: place for place, key in enumerate(keys)}
        places = self.manager.store([(key, 0) for key in keys], name, own if self.admission.selective else {}).placements
        if not places:
            return
        name += " store"
        self.jobs[name] = Job("store", places, {}, len(places) * self.ranks)
        self._begin("store", places, name)

    def _begin(self, kind: str, places: list[Placement], owner: object) -> None:
        self.asked.update(place.ssd_slot % len(self.moods) for place in places if place.ssd_slot != NO_SLOT)
        for worker in self.workers:
            for place in places:
                worker.begin(Action(kind, place, owner))

    def finish_one(self) -> bool:
        """Lets one rank finish one action; False when nobody has anything to do."""
        busy = [rank for rank, worker in enumerate(self.workers) if worker.waiting]
        if not busy:
            return False
        rank = self.rng.choice(busy)
        fresh = self.rng.randbytes(8)
        action, error, data = self.workers[rank].finish_one(fresh)
        place = action.place
        identity = (place.key, place.generation, rank)
        if action.kind == "demote":
            self.manager.ack(action.owner, 1, error)
            self.written[place.ssd_slot % len(self.moods)] += not error
            return True
        if action.kind == "store" and not error:
            self.contents[identity] = fresh
        if action.kind == "load" and not error:
            assert data == self.contents[identity], f"wrong bytes for {place}"
            self.delivered += 1
            if place.ssd_slot != NO_SLOT:
                self.read[place.ssd_slot % len(self.moods)] += 1
        if action.kind == "load" and error:
            assert self.fault_rate or self.moody, f"a load failed with errno {error} in a world without faults: {place}"
            self.failed_loads += 1
        self._account(action, error)
        return True

    def _account(self, action: Action, error: int) -> None:
        job = self.jobs[action.owner]
        job.left -= 1
        if error:
            add_errors(job.failed, {action.place.key: error})
        if job.left:
            return
        del self.jobs[action.owner]
        keys = [place.key for place in job.places]
        if job.kind == "store":
            self.manager.store_done(keys, job.failed)
            return
        self.manager.load_done(keys, action.owner, job.failed)

    def drain(self) -> None:
        """Until no operation is in flight and nothing more is planned."""
        while True:
            while self.finish_one():
                pass
            self.now += 100.0  # past any pause
            self.manager.end_step()
            demotions = self.manager.plan()
            self._demote(demotions)
            if not demotions:
                return
