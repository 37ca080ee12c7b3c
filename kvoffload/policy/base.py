"""What the block manager asks of a policy. Scheduler side, one thread."""

from collections.abc import Container, Sequence
from typing import Protocol

from kvoffload.types import BlockKey


class EvictionPolicy(Protocol):
    """Which block leaves a tier, or one drive of the SSD tier, first.

    It knows all blocks that lie there, and which of them are held: in use, so that no eviction may find them. Time is a
    counter of uses. Blocks of a request are used from the last to the first, so that a prefix can lose its tail before its
    head.
    """

    def enter(self, key: BlockKey, used: int, depth: int) -> None:
        """The block came into the tier and is held. `used`: when it was last used, which may be long ago. `depth`: its place
        in its request, from 0; 0 also when that is not known. REQUIRES: it is not there."""

    def recover(self, keys: Sequence[BlockKey], used: Sequence[int]) -> None:
        """What was found at start, each block with when it was last used, in that order; none is held. REQUIRES: nothing is
        there."""

    def use(self, key: BlockKey, now: int, again: bool) -> None:
        """A request uses the block; `again`: the one that used it last. Nothing if it is not there."""

    def hold(self, key: BlockKey) -> None:
        """The block may not be evicted. Nothing if it is held already or is not there."""

    def release(self, key: BlockKey) -> None:
        """The block may be evicted. Nothing if it may already. REQUIRES: it is there."""

    def leave(self, key: BlockKey) -> None:
        """The block is gone, other than as a victim. Nothing if it is not there."""

    def victim(self, *exempt: Container[BlockKey]) -> BlockKey | None:
        """Takes the next block to evict out of the tier, leaving those that are held or in `exempt`; None if there is none."""

    def __contains__(self, key: BlockKey) -> bool:
        """Whether the block is there, held or not."""

    def evictable(self, key: BlockKey) -> bool:
        """Whether the block is there and not held."""

    def __len__(self) -> int:
        """How many are evictable."""
