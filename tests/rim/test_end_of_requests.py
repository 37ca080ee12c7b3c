"""What follows from a request's end: all metrics, and what policies learn."""

from types import SimpleNamespace

import pytest
from vllm.v1.request import RequestStatus

from kvoffload.vllm.manager import EXPORT_S, ManagerAdapter
from tests.rim.test_manager import adapter, request, store


def test_while_requests_go_on_metrics_are_gathered_now_and_then_and_all_of_them_when_the_last_one_ends(monkeypatch):
    manager, now = adapter(), 1000.0
    monkeypatch.setattr(f"{ManagerAdapter.__module__}.time.monotonic", lambda: now)
    going_on = SimpleNamespace(
        request_id="r", num_output_tokens=0, num_prompt_tokens=0, num_tokens=0, status=None, pooling_params=None
    )
    manager.get_stats()
    manager._decisions.begin_request(going_on)

    def exported() -> float | None:
        manager._core.counters["kvoffload_missed_tokens_total",] += 1
        stats = manager.get_stats()
        return None if stats is None else stats.data["data"]["kvoffload_missed_tokens_total"][()]

    assert exported() is None and exported() is None
    now += EXPORT_S
    assert exported() == 3 and exported() is None
    manager.note_end(going_on)
    assert exported() == 2 and exported() == 1


@pytest.mark.parametrize(
    "status, answered", [("FINISHED_STOPPED", 21), ("FINISHED_LENGTH_CAPPED", 21), ("FINISHED_ABORTED", 0), ("FINISHED_ERROR", 0)]
)
def test_policies_are_told_how_long_an_answer_was_if_the_request_got_all_of_it(monkeypatch, status, answered):
    manager = adapter()
    context, keys = request(manager, "r", 3)
    store(manager, context, keys)
    told = []
    monkeypatch.setattr(manager._core, "touch", lambda keys, owner, answer: told.append((list(keys), owner, answer)))
    ended = SimpleNamespace(
        request_id="r", num_prompt_tokens=96, num_tokens=117, num_output_tokens=21,
        status=getattr(RequestStatus, status), pooling_params=None,
    )
    manager.note_end(ended)
    manager.on_request_finished(context)
    assert told == [(keys, "r", answered)]
