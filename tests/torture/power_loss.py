"""Simulated power losses, and what is found afterwards: `python -m tests.torture.power_loss --images 1000`.

A deployment lives on a disk that keeps nothing before it is synced, and of the rest anything (see disk.py). Images of what
a power loss at this instant may leave are taken at random changes of the disk, also while a store is being opened. Each is
resumed from and held against what the deployment had noted by then:

- Opening succeeds. A power loss alone never needs a user's hand.
- Every block the index knows was there at the last flush or was put since. It is byte-right or a miss: slots are not synced.
- What was there at the last flush and is not changed since is there, and its order of recency is kept.

Lives follow each other on such images, so that a power loss also meets what an earlier one left.
"""

import random
import shutil
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from kvoffload.store.journal import Kind
from kvoffload.table import Entry
from tests.torture.children import Failed, in_child
from tests.torture.command import run
from tests.torture.deployment import Deployment, Shape
from tests.torture.disk import Disk
from tests.torture.examine import Examined, examine
from tests.torture.haste import sync_nothing, write_often
from tests.torture.notes import OPEN, OPENING, RUNNING, Change, Notes, state_after

BACKENDS = ("auto", "threads")
IMAGES_SHORT = 60
STEPS = 60
IMAGES_PER_LIFE = 12


@dataclass
class Image:
    """What a power loss left, and how far the deployment had come."""

    folder: Path
    stage: int
    flushed: int
    pushed: int
    generation: int


class Photographer:
    """Takes images at random changes of a disk until there are enough."""

    def __init__(self, folder: Path, target: Path, notes: Notes, rng: random.Random) -> None:
        self._target = target
        self._notes = notes
        self._rng = rng
        self._rates = {OPENING: rng.choice((0.0, 0.01, 0.1)), RUNNING: 0.1}
        self.images: list[Image] = []
        self.is_done = False
        target.mkdir()
        self.disk = Disk(folder, rng, self.perhaps)

    def perhaps(self) -> None:
        with self.disk.still:
            if not self.is_done and self._rng.random() < self._rates.get(self._notes.stage, 0.0):
                self.take()

    def take(self) -> None:
        with self.disk.still:
            notes = self._notes
            # In this order: what counts as flushed is known before the image is made, what may be in it is known after.
            stage, flushed = notes.stage, notes.flushed
            folder = self._target / str(len(self.images))
            self.disk.image(folder)
            self.images.append(Image(folder, stage, flushed, notes.pushed, notes.generation))
            self.is_done = len(self.images) == IMAGES_PER_LIFE


class Chain:
    """Lives and the power losses between them."""

    def __init__(self, rng: random.Random, folder: Path) -> None:
        self.rng = rng
        self.folder = folder
        self.shape = Shape.draw(rng, folder / "first")
        self.found = Examined([], [])
        self.lives = 0
        self.counts: Counter[str] = Counter()

    def one_life(self) -> None:
        rng = self.rng
        resume = rng.random() < 0.9
        backend = BACKENDS[self.lives % 2]
        seed = rng.randrange(1 << 32)
        notes = Notes()
        images: list[Image] = in_child(lambda: self._live(notes, seed, backend, resume))
        results = [(image, self._examine(image, notes, backend, resume)) for image in images]
        self.lives += 1
        image, self.found = rng.choice(results)
        self.shape = self._shape_in(image.folder)
        notes.close()

    def _shape_in(self, folder: Path) -> Shape:
        return self.shape._replace(paths=tuple(folder / path.name for path in self.shape.paths))

    def _live(self, notes: Notes, seed: int, backend: str, resume: bool) -> list[Image]:
        """In a child: what it did is in the notes, what a power loss left in the images."""
        rng = random.Random(seed)
        write_often(rng)
        expected = self.found.entries if resume else []
        misses = frozenset((entry.key, entry.generation) for entry in self.found.misses)
        photographer = Photographer(
            self.shape.paths[0].parent, self.folder / str(self.lives), notes, random.Random(rng.randrange(1 << 32))
        )
        with photographer.disk:
            deployment = Deployment(self.shape, notes, rng, backend, expected, misses, resume)
            for _ in range(STEPS):
                if photographer.is_done:
                    break
                deployment.step()
                photographer.perhaps()
            if not photographer.images:
                photographer.take()
            deployment.close()
        return photographer.images

    def _examine(self, image: Image, notes: Notes, backend: str, resume: bool) -> Examined:
        found: Examined = in_child(lambda: self._look(image, backend))
        before = self.found.entries
        changes = list(notes.changes())[: image.pushed]
        base = before if resume or image.stage < OPEN else []
        check(found.entries, base, changes, image.flushed, is_kept=resume or image.stage >= OPEN)
        self.counts["images"] += 1
        self.counts["images of an opening"] += image.stage < OPEN
        self.counts["blocks recovered"] += len(found.entries)
        self.counts["of them misses"] += len(found.misses)
        self.counts["changes told"] += image.pushed
        self.counts["changes not flushed"] += image.pushed - image.flushed
        return found

    def _look(self, image: Image, backend: str) -> Examined:
        sync_nothing()
        return examine(self._shape_in(image.folder), backend, image.generation, lambda entry: True)


def check(found: list[Entry], base: list[Entry], changes: list[Change], flushed: int, is_kept: bool) -> None:
    """Whether a power loss after these changes, the first `flushed` of them on disk, may leave this index. is_kept: not so
    while a store is being opened that is told to start empty; then anything of the former index may be left."""
    synced, later = state_after(base, changes, flushed), changes[flushed:]
    put = {Entry(*change[1:]) for change in later if change.kind == Kind.PUT}
    strangers = [entry for entry in found if entry not in synced and entry not in put]
    if strangers:
        raise Failed(f"these were not there at the last flush, nor put since: {strangers}")
    if not is_kept or any(change.kind == Kind.CLEAR for change in later):
        return
    slots = {entry.slot for entry in put}
    changed = {change.key for change in later if change.kind != Kind.TOUCH}
    touched = {change.key for change in later}
    kept = [entry for entry in synced if entry.key not in changed and entry.slot not in slots]
    if lost := [entry for entry in kept if entry not in found]:
        raise Failed(f"these were on disk at the last flush, and have not changed since: {lost}")
    untouched = [entry for entry in kept if entry.key not in touched]
    if [entry for entry in found if entry in untouched] != untouched:
        raise Failed(f"the order of recency is not kept: {found}, but it was {untouched}")


def torture(images: int, seed: int, folder: Path) -> Counter[str]:
    rng, counts = random.Random(seed), Counter[str]()
    while counts["images"] < images:
        chain = Chain(rng, folder / str(counts["chains"]))
        for _ in range(rng.choice((1, 2, 6))):
            chain.one_life()
        counts.update(chain.counts)
        counts["chains"] += 1
        counts["lives"] += chain.lives
        shutil.rmtree(chain.folder)  # of one that failed it stays
    return counts


if __name__ == "__main__":
    sys.exit(run("power losses", "images", torture))
