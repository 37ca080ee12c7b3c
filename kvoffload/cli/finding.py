"""What a check of the doctor says."""

from dataclasses import dataclass
from enum import StrEnum


class Level(StrEnum):
    OK = "ok"
    NOTE = "note"  # worth knowing, costs nothing by itself
    COSTS = "costs"  # works, but slower or for a shorter time than it could
    FATAL = "fatal"  # an engine could not start


@dataclass(frozen=True)
class Finding:
    check: str
    level: Level
    found: str
    cost: str = ""  # what it costs to leave it so
    remedy: str = ""


def ok(check: str, found: str) -> Finding:
    return Finding(check, Level.OK, found)
