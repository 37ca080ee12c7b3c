"""What is remembered of blocks that left. Scheduler side, one thread."""

from array import array

import xxhash

from kvoffload._rows import KeyMap
from kvoffload.types import BlockKey

DIGEST_BYTES = 8


class History:
    """Of the last `size` keys put in those that were not taken since, each with when it was last used and how often.

    They go in the order in which they came, and none is lost at random: a prefix of which every second block is known to be
    wanted is kept with holes, and is worth nothing. A ring of digests, for dicts of a million keys take ten times the memory; were
    two keys of one digest, one would be taken for the other, and the guess be wrong.
    """

    def __init__(self, size: int):
        self._size = max(1, size)
        self._rows = KeyMap(self._size, DIGEST_BYTES)
        self._used = array("Q", bytes(8 * self._size))
        self._uses = array("f", bytes(4 * self._size))
        self._next = 0

    def put(self, key: BlockKey, used: int, uses: float) -> None:
        digest, row = xxhash.xxh3_64_digest(key), self._next
        self._next = (row + 1) % self._size
        self._rows.pop(digest)
        oldest = self._rows.key(row)
        if oldest:
            self._rows.pop(oldest)
        self._rows.put(digest, row)
        self._used[row], self._uses[row] = used, uses

    def take(self, key: BlockKey) -> tuple[int, float] | None:
        """When it was last used and how often; it is forgotten."""
        row = self._rows.pop(xxhash.xxh3_64_digest(key))
        return None if row is None else (self._used[row], self._uses[row])
