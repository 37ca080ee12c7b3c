"""Which block leaves a tier first: one file for each policy. Scheduler side, one thread; pure, without a clock."""

from collections.abc import Callable

from kvoffload.policy.arc import ARC
from kvoffload.policy.base import EvictionPolicy
from kvoffload.policy.fifo import FIFO
from kvoffload.policy.horizon import Horizon
from kvoffload.policy.lru import LRU
from kvoffload.policy.s3fifo import S3FIFO
from kvoffload.policy.sieve import SIEVE

# By the names that `kvoffload simulate` takes; an engine has DEFAULT. A new policy is a file and a line here. Each is made for a
# number of blocks.
POLICIES: dict[str, Callable[[int], EvictionPolicy]] = {
    "arc": ARC,
    "fifo": FIFO,
    "horizon": Horizon,
    "lru": LRU,
    "s3fifo": S3FIFO,
    "sieve": SIEVE,
}
DEFAULT = "horizon"

__all__ = ["DEFAULT", "LRU", "POLICIES", "EvictionPolicy"]
