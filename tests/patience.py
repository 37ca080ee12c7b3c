"""Waiting for what must happen. Such waits end when it has, so their limit can be longer than any busy machine or drive takes."""

import time
from collections.abc import Callable

PATIENCE_S = 300.0


def wait_until(condition: Callable[[], bool], pause_s: float = 0.001) -> None:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, f"did not happen within {PATIENCE_S:.0f} s"
        time.sleep(pause_s)
