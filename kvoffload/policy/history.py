"""What is remembered of blocks that left. Scheduler side, one thread."""

from typing import Generic, TypeVar

from kvoffload.types import BlockKey

T = TypeVar("T")


class History(Generic[T]):
    """The last `size` keys to the last twice as many, each with what was known of it.

    Two dicts, of which the older is dropped when the younger is full, rather than a table that loses keys at random: a prefix
    of which every second block is known to be wanted is kept with holes, and is worth nothing.
    """

    def __init__(self, size: int):
        self._size = max(1, size)
        self._young: dict[BlockKey, T] = {}
        self._old: dict[BlockKey, T] = {}

    def put(self, key: BlockKey, known: T) -> None:
        if len(self._young) >= self._size:
            self._young, self._old = {}, self._young
        self._young[key] = known

    def take(self, key: BlockKey) -> T | None:
        if not self._young and not self._old:
            return None
        known = self._young.pop(key, None)
        return self._old.pop(key, None) if known is None else known
