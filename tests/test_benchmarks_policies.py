"""The benchmark of policies and budgets runs and reports every cell; the traffic it makes is what prompts could be. Figures of
a quick run mean nothing.
"""

import json
from itertools import pairwise

import pytest

from benchmarks import bench_policies
from benchmarks.knowing import knowing
from benchmarks.policies_report import ahead, closed, loss_table, policies_table, relative
from benchmarks.workloads import WORKLOADS, Text, generated, halves, keys_of
from kvoffload.cli.simulate import CLAIRVOYANT, SHARES
from kvoffload.cli.traces import Trace
from kvoffload.policy import DEFAULT, POLICIES

GIVEN = ("given", "given, first half", "given, second half")
KINDS = {"all", "budget 25", "budget 50", "second-touch", "knowing"}


def test_a_quick_run_reports_every_cell(tmp_path, capsys):
    rows = [{"timestamp": 1000 * number, "hash_ids": [0, 1, 2 + number % 9, 20 + number]} for number in range(60)]
    (tmp_path / "given.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    bench_policies.main(["--quick", "--trace", str(tmp_path / "given.jsonl"), "--output", str(tmp_path / "output")])

    found = json.loads((tmp_path / "output" / "bench_policies.json").read_text())
    assert set(found["policies"]) == {*WORKLOADS, *GIVEN}
    for swept in found["policies"].values():
        assert set(swept["rates"]) == {*POLICIES, CLAIRVOYANT}
        bounds = swept["rates"][CLAIRVOYANT]
        for rates in swept["rates"].values():
            assert len(rates) == len(SHARES)
            assert all(0 <= rate <= bound <= 1 for rate, bound in zip(rates, bounds, strict=True))
    cells = {(cell["trace"], cell["ssd"], cell["dram"]) for cell in found["budgets"]}
    assert cells == {
        (trace, ssd, dram)
        for trace in ("given", *bench_policies.BUDGETED)
        for ssd in bench_policies.SSD_SHARES
        for dram in bench_policies.DRAM_SHARES
    }
    assert len(found["budgets"]) == len(cells)
    for cell in found["budgets"]:
        assert set(cell["rates"]) == set(cell["writes"]) == KINDS
        assert all(0 <= rate <= 1 for rate in cell["rates"].values())
        assert 0 <= cell["writes"]["knowing"] <= 0.25
        assert cell["writes"]["all"] == 1 and cell["turnovers"] > 0
    shown = capsys.readouterr().out
    assert all(f"\n| {name} | " in shown for name in (*found["policies"], *POLICIES, CLAIRVOYANT))


@pytest.mark.parametrize("name", WORKLOADS)
def test_a_workload_is_the_same_for_a_seed_and_another_for_another(name):
    assert generated(name, 1, 0.02) == generated(name, 1, 0.02)
    assert generated(name, 1, 0.02).requests != generated(name, 2, 0.02).requests


@pytest.mark.parametrize("name", WORKLOADS)
def test_requests_are_prefix_trees_in_the_order_of_their_seconds(name):
    trace = generated(name, 1, 0.05)
    before: dict[bytes, bytes | None] = {}
    for request in trace.requests:
        for last, key in pairwise([None, *request]):
            assert before.setdefault(key, last) == last
    assert 0 < trace.blocks < trace.uses  # some are shared
    assert all(earlier <= later for earlier, later in pairwise(trace.seconds))


def test_prompts_share_the_whole_blocks_that_all_text_before_agrees_on():
    system, question = Text("system", 20), Text("question", 30)
    keys = keys_of((system, question), 16)
    assert len(keys) == len(set(keys)) == 3
    assert keys_of((system, question, Text("answer", 100)), 16)[:3] == keys
    assert keys_of((system, Text("other", 30)), 16)[:2] == [keys[0], keys_of((system, Text("other", 30)), 16)[1]]
    assert keys_of((system, Text("other", 30)), 16)[1] != keys[1]
    assert not set(keys_of((Text("x", 1), system, question), 16)) & set(keys)


def test_a_half_is_half_of_a_trace():
    trace = generated("chats", 1, 0.02)
    first, second = halves(trace)
    assert first.requests + second.requests == trace.requests and first.seconds + second.seconds == trace.seconds
    assert abs(len(first.requests) - len(second.requests)) <= 1


def test_admission_that_knows_writes_what_is_used_again_and_first_what_is_used_most():
    once = [[b"once %d" % number] for number in range(60)]
    often, twice = [[b"often"]] * 10, [[b"twice"]] * 2
    requests = [[b"head", *request] for request in twice + often + once]
    trace = Trace(requests, [0.0] * len(requests), 16, [0] * len(requests))
    assert (knowing(trace, 0, 99, 1).written, knowing(trace, 0, 99, 1).hits) == (1, 71)
    assert (knowing(trace, 0, 99, 2).written, knowing(trace, 0, 99, 2).hits) == (2, 71 + 9)
    assert (knowing(trace, 0, 99, 63).written, knowing(trace, 0, 99, 63).hits) == (3, 71 + 9 + 1)


def test_the_report_compares_with_the_best_of_the_others():
    rates = {policy: [0.5] * len(SHARES) for policy in POLICIES} | {CLAIRVOYANT: [0.8] * len(SHARES)}
    rates["arc"] = [0.6] * len(SHARES)
    rates[DEFAULT] = [0.55, 0.65, 0.6, 0.6, 0.6]
    assert ahead(rates, DEFAULT, 0) == (pytest.approx(-5), "arc")
    assert ahead(rates, DEFAULT, 1) == (pytest.approx(5), "arc")
    assert ahead(rates, "arc", 1) == (pytest.approx(-5), DEFAULT)
    assert closed(rates, 1) == pytest.approx(25)
    assert closed(rates | {CLAIRVOYANT: [0.6] * len(SHARES)}, 2) is None
    swept = {"one": {"blocks": 10, "uses": 20, "rates": rates}}
    assert "| one | 10 | 20 | **-5.0 arc** | +5.0 arc | +0.0 arc | +0.0 arc | +0.0 arc | 25 % | 0 % | 0 % |" in loss_table(swept)
    assert f"| {DEFAULT} | 4 of 5 | 5.0 | one, 1 % |" in policies_table(swept)
    assert relative({"rates": {"all": 0.5, "budget 25": 0.4}}, "budget 25") == pytest.approx(-20)


def test_traces_without_times_or_of_a_name_that_is_taken_are_refused_by_a_sentence_before_anything_runs(tmp_path):
    request = '{"timestamp": %d, "input_length": 512, "output_length": 1, "hash_ids": [1]}\n'
    good, timeless, named = tmp_path / "good.jsonl", tmp_path / "timeless.jsonl", tmp_path / f"{next(iter(WORKLOADS))}.jsonl"
    good.write_text(request % 0 + request % 1000)
    timeless.write_text(2 * (request % 0))
    named.write_text(good.read_text())
    assert {"good", "good, first half", "good, second half"} < bench_policies.traces([good], 1, 0.02).keys()
    with pytest.raises(SystemExit, match="give one with timestamps"):
        bench_policies.traces([timeless], 1, 0.02)
    for files in ([named], [good, good]):
        with pytest.raises(SystemExit, match="give the file another name"):
            bench_policies.traces(files, 1, 0.02)
