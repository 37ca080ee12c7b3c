"""What the block manager asks of a policy. Scheduler side, one thread."""

from collections.abc import Callable
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from kvoffload.types import BlockKey


class EvictionPolicy(Protocol):
    """Which block leaves a tier, or one drive of the SSD tier, first.

    It knows blocks by their frames: a frame is a block's slot, counted from 0 among those of the tier or drive; a policy is made
    for so many. Of each it knows whether it is held: in use, so that no eviction may find it. Keys it is told only where a block
    that left may be known again. Time is a counter of uses, and begins at 1. Blocks of a request are used from the last to the
    first, so that a prefix can lose its tail before its head.
    """

    def enter(self, frame: int, key: BlockKey, used: int, answer: int) -> None:
        """The block came into the frame and is held. `used`: when it was last used, which may be long ago. `answer`: tokens that
        the request which used it then was answered with; 0 while, or if, that is not known. REQUIRES: the frame is empty."""

    def recover(self, frames: NDArray[np.int64], used: NDArray[np.int64]) -> None:
        """What was found at start, each block with when it was last used, in that order; none is held. REQUIRES: all frames are
        empty."""

    def use(self, frame: int, key: BlockKey, now: int, again: bool, answer: int) -> None:
        """A request uses the block; `again`: the one that used it last. `answer`: see `enter`; it is known when the request ends,
        which is a use, too. REQUIRES: it is there."""

    def hold(self, frame: int) -> None:
        """The block may not be evicted. Nothing if it is held already or the frame is empty."""

    def release(self, frame: int) -> None:
        """The block may be evicted. Nothing if it may already. REQUIRES: it is there."""

    def leave(self, frame: int) -> None:
        """The block is gone, other than by eviction. Nothing if the frame is empty."""

    def victim(self, spared: Callable[[int], bool]) -> int | None:
        """The frame of the next block to evict, leaving those that are held or `spared`; None if there is none, or
        none but behind hundreds that are spared."""

    def evict(self, frame: int, key: BlockKey) -> None:
        """The block is evicted. REQUIRES: the frame is what `victim` said last, and nothing was called since."""

    def __contains__(self, frame: int) -> bool:
        """Whether a block is there, held or not."""

    def evictable(self, frame: int) -> bool:
        """Whether a block is there and not held."""

    def __len__(self) -> int:
        """How many are evictable."""
