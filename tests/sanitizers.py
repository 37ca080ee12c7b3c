"""What a test must know of the sanitiser it may run under: KVO_SANITIZE=address|thread make test."""

import os

import pytest

NAME = os.environ.get("KVO_SANITIZE", "")
# For what tests compile of the engine themselves; as in setup.py.
FLAGS = {
    "": (),
    "address": ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"),
    "thread": ("-fsanitize=thread",),
}[NAME]
not_with_sanitizers = pytest.mark.skipif(NAME != "", reason="measures what a sanitiser changes")
