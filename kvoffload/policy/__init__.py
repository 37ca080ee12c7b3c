"""Which block leaves a tier first: one file for each policy. Scheduler side, one thread; pure, without a clock."""

from kvoffload.policy.base import EvictionPolicy
from kvoffload.policy.lru import LRU

__all__ = ["LRU", "EvictionPolicy"]
