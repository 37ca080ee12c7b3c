"""What follows from a request's end: all metrics, and what policies learn."""

from types import SimpleNamespace

from kvoffload.vllm.manager import EXPORT_S, ManagerAdapter
from tests.rim.test_manager import adapter, request, store


def test_while_requests_go_on_metrics_are_gathered_now_and_then_and_all_of_them_when_the_last_one_ends(monkeypatch):
    manager, now = adapter(), 1000.0
    monkeypatch.setattr(f"{ManagerAdapter.__module__}.time.monotonic", lambda: now)
    going_on = SimpleNamespace(request_id="r", num_output_tokens=0, num_prompt_tokens=0, num_tokens=0)
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


def test_policies_are_told_how_many_tokens_a_request_was_answered_with_when_it_ends(monkeypatch):
    manager = adapter()
    context, keys = request(manager, "r", 3)
    store(manager, context, keys)
    told = []
    monkeypatch.setattr(manager._core, "touch", lambda keys, owner, answer: told.append((list(keys), owner, answer)))
    manager.note_end(SimpleNamespace(request_id="r", num_prompt_tokens=96, num_tokens=117, num_output_tokens=21))
    manager.on_request_finished(context)
    assert told == [(keys, "r", 21)]
