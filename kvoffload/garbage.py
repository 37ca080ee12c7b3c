"""Python's cyclic garbage collector, out of the way."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """For making millions of objects that stay: the collector would walk through all of them again and again as they come, which
    takes a third of the time. vLLM freezes what there is once an engine is up, so they are not walked through later."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
