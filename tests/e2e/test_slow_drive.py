"""A drive that is slower than computing, under a running vLLM: prompts are computed, and loaded again when it is fast."""

import json

import pytest

from benchmarks import bench_load_or_recompute as bench
from benchmarks import load_or_recompute_report as report
from tests.e2e.offload import BLOCK, LOAD, PROMPT, TOKENS, ask, ask_one, settle
from tests.e2e.test_drive_faults import LOGGING, Life
from tests.engine.faulty import FaultPlan, environment
from tests.patience import wait_until

SLOWER = 5  # to load a prompt takes as many times as long as to compute it takes on this machine, now


@pytest.fixture
def plan(tmp_path):
    with FaultPlan(tmp_path / "plan") as plan:
        yield plan


def decisions(engine) -> dict[str, float]:
    metrics = engine.metrics()
    return {
        kind: metrics.sum("kvoffload_load_decisions_total", decision=kind) for kind in ("load", "part", "recompute")
    }


def test_a_prompt_is_computed_while_its_drive_is_slow_and_loaded_when_it_is_fast_again(serve, baseline, prompts, tmp_path, plan):
    settings = {"nvme_path": str(tmp_path), "ssd_kv_offload_gb": 0.3}
    life = Life(serve, plan, baseline, prompts, settings)
    assert decisions(life.engine)["load"] >= len(life.asked)
    fast = life.engine.metrics().sum("kvoffload_load_bytes_per_second", tier="ssd")

    (computed,) = life.engine.generate(life.asked[:1], TOKENS, kv_transfer_params={"kvoffload": "recompute"})
    plan.read.throttle(SLOWER * max(computed.ttft_s, 1.0) * BLOCK / PROMPT)
    life.check_answers(wish=None)  # the first two of them find out
    before = decisions(life.engine)
    life.check_answers(rounds=2, wish=None)
    after = decisions(life.engine)
    made = {kind: after[kind] - before[kind] for kind in after}
    assert made["recompute"] > made["load"], made  # of these there may be one, where a busy machine makes computing slow
    metrics = life.engine.metrics()
    assert 0 < metrics.sum("kvoffload_load_bytes_per_second", tier="ssd") < fast
    assert metrics.sum("kvoffload_prefill_tokens_per_second") > 0

    plan.heal()
    life.wait_until_loads_come_back(wish=None)


def test_a_request_does_not_wait_for_anothers_slow_load_of_blocks_that_it_computes_sooner(serve, baseline, prompts, tmp_path, plan):
    settings = {"nvme_path": str(tmp_path), "ssd_kv_offload_gb": 0.3}
    engine = serve("llama", settings, env={**environment(plan), **LOGGING}, num_gpu_blocks_override=4 * PROMPT // BLOCK)
    asked = prompts.many(2, PROMPT)
    want = baseline.tokens("llama", asked, TOKENS)
    assert ask(engine, asked) == want
    settle(engine)
    engine.reset_gpu_prefix_cache()
    (computed,) = engine.generate(asked[1:], TOKENS, kv_transfer_params={"kvoffload": "recompute"})
    plan.read.throttle(4 * SLOWER * max(computed.ttft_s, 1.0) * BLOCK / PROMPT)
    slow = engine.submit(asked[0], TOKENS, kv_transfer_params=LOAD)
    few = asked[0][: 4 * BLOCK]
    assert engine.generate([few], 1, kv_transfer_params=None)[0].tokens == baseline.tokens("llama", [few], 1)[0]
    wait_until(lambda: engine.metrics().sum("kvoffload_queued_blocks", queue="load") > 0, 0.1)  # there is none after a load
    plan.heal()
    assert engine.answer(slow).tokens == want[0]


def test_a_request_that_wants_its_prompt_computed_gets_it_computed(serve, baseline, prompts, tmp_path, plan):
    life = Life(serve, plan, baseline, prompts, {"nvme_path": str(tmp_path), "ssd_kv_offload_gb": 0.3})
    answer, source = ask_one(life.engine, life.asked[0], wish={"kvoffload": "recompute"})
    assert answer.tokens == life.want[0] and source["disk"] == 0
    answer, source = ask_one(life.engine, life.asked[1], wish={"kvoffload": "load"})
    assert answer.tokens == life.want[1] and source["disk"] == PROMPT


def test_the_benchmark_of_it_fills_every_cell(tmp_path):
    """Figures mean nothing here."""
    assert bench.main(["--quick", "--folder", str(tmp_path / "drive"), "--output", str(tmp_path)]) == 0
    found = json.loads((tmp_path / f"{report.NAME}.json").read_text())
    cells = {(cell["speed"], cell["tokens"], cell["hit"]) for cell in found["cells"]}
    shape = bench.QUICK
    assert cells == {(speed.name, tokens, hit) for speed in shape.speeds for tokens in shape.tokens for hit in shape.hits}
    engines = {report.WITHOUT: 2, report.ALWAYS: 1, report.RECOMPUTES: 1, report.DECIDES: 1}
    for cell in found["cells"]:
        assert {name: len(times["all"]) for name, times in cell["ttft_s"].items()} == engines
        assert all(times["median"] > 0 for times in cell["ttft_s"].values())
    for name in (f"{report.NAME}.md", f"{report.NAME}.png"):
        assert (tmp_path / name).stat().st_size > 500
    assert not (tmp_path / "drive").exists()
