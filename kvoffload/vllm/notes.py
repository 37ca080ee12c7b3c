"""What the scheduler half remembers of a request, and the keys under which its blocks are kept."""

import errno
import math
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING

from kvoffload.types import BlockKey, Tier
from kvoffload.vllm import contract
from kvoffload.vllm.decisions import Loads
from kvoffload.vllm.identity import salted

if TYPE_CHECKING:
    from vllm.v1.kv_offload.base import OffloadKey, ReqContext


@dataclass
class Notes:
    """In vLLM's own context of the request: completions may come after it has ended."""

    salt: bytes | None  # None: not known, so nothing is loaded or stored
    life: bytes  # what follows is of the time between two resets
    sources: tuple[Tier, ...] = tuple(Tier)  # fewer once a load of it failed, and none once two did
    key_salt: bytes = field(init=False)
    transfer: int = 0  # its load in flight
    failures: int = 0
    has_hole: bool = False  # a block of it was not stored, so those after it would never be reached
    loads: Loads = field(default_factory=Loads)
    written: float = math.inf  # tokens whose KV was computed, once the request has ended
    answered: int = 0  # tokens, once the request has ended, if it got its whole answer
    limit: int | None = None  # lookups of blocks that end behind this token miss: they are not worth loading
    # What was salted, for that takes a microsecond, and vLLM asks for all keys of a prompt at each step.
    _own_keys: dict["OffloadKey", BlockKey] = field(default_factory=dict)
    _own_positions: dict[BlockKey, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.salt is None:
            self.sources, self.has_hole = (), True
        self.key_salt = (self.salt or b"") + self.life

    def own_key(self, key: "OffloadKey") -> BlockKey:
        """The key under which a block of the request is kept."""
        if not self.key_salt:
            return key
        found = self._own_keys.get(key)
        if found is None:
            found = self._own_keys[key] = salted(key, self.key_salt)
        return found

    def own_keys(self, keys: Iterable["OffloadKey"]) -> list[BlockKey]:
        return list(map(self.own_key, keys)) if self.key_salt else list(keys)

    def own_positions(self, context: "ReqContext") -> Mapping[BlockKey, int]:
        """All keys of the request over all groups, by their position in it."""
        positions = contract.key_positions(context)
        if not self.key_salt:
            return positions
        for key, position in islice(positions.items(), len(self._own_positions), None):  # vLLM only ever adds some
            self._own_positions[self.own_key(key)] = position
        return self._own_positions

    def note_failed_load(self, errors: Set[int]) -> None:
        """The request may load once more, from where a second load has something to gain: what arrived by then is in DRAM, and a
        damaged block says nothing of the others. But for the GPU it would only wait again."""
        self.failures += 1
        if self.failures > 1 or errors <= {errno.EREMOTEIO, errno.ECANCELED}:
            self.sources = ()
        elif not errors <= {errno.EBADMSG, errno.ENOENT, errno.ECANCELED}:
            self.sources = (Tier.DRAM,)
