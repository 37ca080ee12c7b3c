"""What is held: the part that policies made of queues have in common. Scheduler side, one thread."""

from abc import ABC, abstractmethod
from collections.abc import Container, Iterable, MutableMapping, Sequence

from kvoffload.types import BlockKey


class Holding(ABC):
    """A queue policy leaves held blocks in their queues and passes over them: their places are what it knows of them."""

    def __init__(self) -> None:
        self._held: set[BlockKey] = set()
        self._where: dict[BlockKey, MutableMapping[BlockKey, int]] = {}  # the queue each block is in

    @abstractmethod
    def enter(self, key: BlockKey, used: int, depth: int) -> None: ...

    def recover(self, keys: Sequence[BlockKey], used: Sequence[int]) -> None:
        for key, now in zip(keys, used, strict=True):
            self.enter(key, now, 0)
        self._held.clear()

    def hold(self, key: BlockKey) -> None:
        if key in self._where:
            self._held.add(key)

    def release(self, key: BlockKey) -> None:
        self._held.discard(key)

    def leave(self, key: BlockKey) -> None:
        queue = self._where.pop(key, None)
        if queue is not None:
            del queue[key]
            self._held.discard(key)

    def __contains__(self, key: BlockKey) -> bool:
        return key in self._where

    def evictable(self, key: BlockKey) -> bool:
        return key in self._where and key not in self._held

    def __len__(self) -> int:
        return len(self._where) - len(self._held)

    def _spared(self, key: BlockKey, exempt: Iterable[Container[BlockKey]]) -> bool:
        return key in self._held or any(key in keys for keys in exempt)

    def _first(self, queue: Iterable[BlockKey], exempt: Iterable[Container[BlockKey]]) -> BlockKey | None:
        return next((key for key in queue if not self._spared(key, exempt)), None)
