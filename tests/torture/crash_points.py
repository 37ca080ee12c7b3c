"""Kill -9 at random instants, and what is found afterwards: `python -m tests.torture.crash_points --kills 1000`.

A child lives on a folder until it is killed, also while it opens its store. Then another one resumes from the folder and
holds it against what the first had noted in shared memory:

- Every block the index knows is loaded through the engine. Its bytes are right, or, where another block was being written
  to its slot and the change of the index was not on disk yet, it is a miss.
- The index, its order of recency included, is the one after some first part of the changes that the child told its store,
  no shorter than what the store had said to be on disk.
- Nothing is left behind, the cap holds, the locks are free.

Some folders see one life, some more than ten. This process forks and so must have no threads; engines live in children.
"""

import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from pathlib import Path

from kvoffload.table import Entry
from tests.patience import PATIENCE_S, wait_until
from tests.torture.children import Failed, LastWords, in_child
from tests.torture.command import run
from tests.torture.deployment import SLOTS_LEAST, SLOTS_MOST, Deployment, Shape
from tests.torture.examine import Examined, assert_within_cap, examine
from tests.torture.haste import sync_nothing, write_often
from tests.torture.notes import OPEN, RUNNING, Notes, prefix_that_gives

BACKENDS = ("auto", "threads")
KILLS_SHORT = 40


class Chain:
    """A folder and the lives it has seen."""

    def __init__(self, rng: random.Random, folder: Path) -> None:
        self.rng = rng
        self.folder = folder
        self.shape = Shape.draw(rng, folder)
        self.entries: list[Entry] = []
        self.last_written: dict[int, int] = {}  # slot -> generation that was last to be written there
        self.generation = 0
        self.lives = 0
        self.counts: Counter[str] = Counter()

    def one_life(self) -> None:
        shape, rng = self.shape, self.rng
        if self.entries and rng.random() < 0.2:
            shape = shape._replace(slots=rng.choice((SLOTS_LEAST, rng.randint(SLOTS_LEAST, SLOTS_MOST))))
        resume = rng.random() < 0.95
        expected = [entry for entry in self.entries if resume and entry.slot < shape.slots]
        notes = Notes()
        seed, backend = rng.randrange(1 << 32), BACKENDS[self.lives % 2]
        pid = os.fork()
        if pid == 0:
            lost = frozenset((entry.key, entry.generation) for entry in self.entries if self.may_miss(entry))
            live(shape, notes, seed, backend, expected, lost, resume)
        self._kill(pid, notes)
        self.lives += 1
        self.shape = shape
        self._examine(notes, expected, seed, backend)
        notes.close()

    def may_miss(self, entry: Entry) -> bool:
        """Whether something else was to be written to its slot: that may have happened, or may happen yet."""
        return self.last_written.get(entry.slot, entry.generation) != entry.generation

    def _kill(self, pid: int, notes: Notes) -> None:
        """At an instant of its opening or of its work; of that some after a part of it is on disk, however slow the machine is."""
        rng = self.rng
        if rng.random() < 0.3:
            time.sleep(rng.uniform(0, 0.03))
        else:
            wait_until(lambda: notes.stage == RUNNING or notes.failure)
            if rng.random() < 0.5:
                wait_until(lambda: notes.flushed > 0 or notes.failure)
            time.sleep(rng.uniform(0, rng.choice((0.02, 0.1, 0.3))))
        self.counts["killed while " + ("opening", "opening", "running")[notes.stage]] += 1
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        if not os.WIFSIGNALED(status) or notes.failure:
            raise Failed(f"a life ended by itself: {notes.failure or status}")

    def _examine(self, notes: Notes, expected: list[Entry], seed: int, backend: str) -> None:
        if notes.stage >= OPEN:
            assert_within_cap(self.shape)
        self.last_written.update(notes.writes())
        self.generation = max(self.generation, notes.generation)
        found = in_child(lambda: self._look(backend))
        flushed = notes.flushed
        bases = [expected]
        if notes.stage < OPEN:  # it may or may not have come to forgetting what it was told to forget
            bases.append([entry for entry in self.entries if entry.slot < self.shape.slots])
        least = prefix_that_gives(found.entries, bases[0], notes.changes(), flushed)
        if least is None and found.entries not in bases[1:]:
            raise Failed(
                f"the index is none that was: {found.entries}\nafter {flushed} to {notes.pushed} changes of {expected}, "
                f"life {self.lives} with seed {seed}"
            )
        self.counts["blocks recovered"] += len(found.entries)
        self.counts["of them misses"] += len(found.misses)
        self.counts["changes told"] += notes.pushed
        self.counts["changes lost"] += notes.pushed - (least or 0)
        self.entries = found.entries

    def _look(self, backend: str) -> Examined:
        sync_nothing()
        return examine(self.shape, backend, self.generation, self.may_miss)


def live(
    shape: Shape, notes: Notes, seed: int, backend: str, expected: list[Entry], may_miss: frozenset[tuple[bytes, int]], resume: bool
) -> None:
    """The child: works until it is killed."""
    rng = random.Random(seed)
    sync_nothing()
    write_often(rng)
    with LastWords(notes.tell):
        deployment = Deployment(shape, notes, rng, backend, expected, may_miss, resume)
        while not notes.is_full:
            deployment.step()
        time.sleep(PATIENCE_S)


def torture(kills: int, seed: int, folder: Path) -> Counter[str]:
    rng, counts = random.Random(seed), Counter[str]()
    while counts["kills"] < kills:
        chain = Chain(rng, folder / str(counts["folders"]))
        for _ in range(min(kills - counts["kills"], rng.choice((1, 3, 12)))):
            chain.one_life()
            counts["kills"] += 1
        counts.update(chain.counts)
        counts["folders"] += 1
        counts["lives on one folder, at most"] = max(counts["lives on one folder, at most"], chain.lives)
        shutil.rmtree(chain.folder)  # of one that failed it stays
    return counts


if __name__ == "__main__":
    sys.exit(run("crash points", "kills", torture))
