"""The connector, with a watch on every call that vLLM makes of it, and a switch that turns it off. For benchmarks; loaded by vLLM
through its module's path.

vLLM waits for these calls, in its scheduler and in its workers; all else that kvoffload does is done by threads beside it.
Every process writes what they took to `$KVOFFLOAD_CALL_TIMES.<role>.<pid>`: seconds and calls, by name.

Switched off, calls answer what a connector does that has nothing and wants nothing, so that one engine can be measured with and
without kvoffload: two that are started alike differ by more than what it costs.
"""

import json
import mmap
import os
import time
from collections import defaultdict
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, NamedTuple

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorMetadata

from kvoffload.vllm.connector import KVOffloadConnector

VARIABLE = "KVOFFLOAD_CALL_TIMES"
WRITE_EVERY_S = 0.5
CALLS = (
    *("on_new_request", "get_num_new_matched_tokens", "update_state_after_alloc", "request_finished"),
    *("request_finished_all_groups", "build_connector_meta", "update_connector_output", "take_events", "has_pending_push_work"),
    *("start_load_kv", "wait_for_layer_load", "save_kv_layer", "wait_for_save", "get_finished", "get_transfer_results"),
    *("get_block_ids_with_load_errors", "build_connector_worker_meta", "handle_preemptions", "bind_connector_metadata"),
    *("clear_connector_metadata", "get_kv_connector_stats", "get_kv_connector_kv_cache_events"),
)
# What calls answer when they are switched off; the others nothing, or what vLLM's own base class does.
ABSTRACT: dict[str, Any] = {
    "get_num_new_matched_tokens": (0, False),
    "update_state_after_alloc": None,
    "request_finished_all_groups": (False, None),
    "build_connector_meta": KVConnectorMetadata(),
    "start_load_kv": None,
    "wait_for_layer_load": None,
    "save_kv_layer": None,
    "wait_for_save": None,
}


class Switch:
    """A byte in a file that the benchmark and the engine's processes share. REQUIRES: turned while nothing is asked of the engine
    and all that it had in flight has ended."""

    def __init__(self, times: Path):
        path = Path(f"{times}.switch")
        if not path.exists():
            path.write_bytes(bytes(1))
        with path.open("r+b") as file:
            self._byte = mmap.mmap(file.fileno(), 1)

    def turn(self, on: bool) -> None:
        self._byte[0] = not on

    @property
    def is_off(self) -> bool:
        return self._byte[0] != 0


class Watch:
    """Of the outermost calls, for they call one another."""

    def __init__(self) -> None:
        self._taken: dict[str, list[float]] = defaultdict(lambda: [0.0, 0])
        self._inside = False
        self._written = 0.0

    def timed(self, name: str, method: Callable[..., Any], role: str, *args: Any, **kwargs: Any) -> Any:
        if self._inside:
            return method(*args, **kwargs)
        self._inside = True
        begun = time.perf_counter()
        try:
            return method(*args, **kwargs)
        finally:
            now = time.perf_counter()
            taken = self._taken[name]
            taken[0] += now - begun
            taken[1] += 1
            self._inside = False
            if now - self._written > WRITE_EVERY_S:
                self._written = now
                Path(f"{os.environ[VARIABLE]}.{role}.{os.getpid()}").write_text(json.dumps(self._taken))


class TimedConnector(KVOffloadConnector):
    watch = Watch()

    def __init__(self, *args: Any, **kwargs: Any):
        self.switch = Switch(Path(os.environ[VARIABLE]))
        super().__init__(*args, **kwargs)


def _watched(name: str) -> Callable[..., Any]:
    method, idle = getattr(KVOffloadConnector, name), getattr(KVConnectorBase_V1, name, None)

    @wraps(method)
    def call(self: TimedConnector, *args: Any, **kwargs: Any) -> Any:
        if not self.switch.is_off:
            return self.watch.timed(name, method, self.role.name.lower(), self, *args, **kwargs)
        return ABSTRACT[name] if name in ABSTRACT or idle is None else idle(self, *args, **kwargs)

    return call


for _name in CALLS:
    if hasattr(KVOffloadConnector, _name):
        setattr(TimedConnector, _name, _watched(_name))


class Taken(NamedTuple):
    seconds: float = 0.0
    calls: int = 0


def call_times(path: Path) -> dict[str, dict[str, Taken]]:
    """What all processes wrote so far, by role and call."""
    found: dict[str, dict[str, Taken]] = defaultdict(lambda: defaultdict(Taken))
    for file in path.parent.glob(f"{path.name}.*.*"):
        role = file.name.removeprefix(path.name).split(".")[1]
        for name, (seconds, calls) in json.loads(file.read_text()).items():
            before = found[role][name]
            found[role][name] = Taken(before.seconds + seconds, before.calls + calls)
    return found
