"""The simulator: against caches small enough to be worked out by hand or searched through, and by its command."""

import itertools
import json
import random
import subprocess
import sys

import pytest

from kvoffload.cli.clairvoyant import clairvoyant_hits
from kvoffload.cli.replay import Replay
from kvoffload.cli.traces import read
from kvoffload.policy import POLICIES
from tests.patience import PATIENCE_S

CHATS = [[0, 1, 2], [0, 1, 2, 3], [4], [0, 1, 2, 3, 5], [4, 6], [0, 7]]


def key_of(block):
    return f"{block:016}".encode()


def mooncake(path, requests=CHATS):
    rows = [{"timestamp": 0, "input_length": 512 * len(ids), "output_length": 1, "hash_ids": ids} for ids in requests]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def bailian(path):
    rows = [
        {"chat_id": 1, "parent_chat_id": -1, "timestamp": 0.5, "input_length": 40, "output_length": 9, "type": "text", "turn": 1,
         "hash_ids": [11, 12, 13]},
        {"chat_id": 2, "parent_chat_id": 1, "timestamp": 9.5, "input_length": 60, "output_length": 9, "type": "text", "turn": 2,
         "hash_ids": [11, 12, 13, 14]},
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def kvoffload(*arguments):
    command = [sys.executable, "-c", "from kvoffload.cli import main; main()", "simulate", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, env={"COLUMNS": "200"})


def best_hits(requests, capacity):
    """By trying every set of blocks that could be kept after every request."""
    best = {frozenset(): 0}
    for request in requests:
        after = {}
        for kept, hits in best.items():
            hits += next((place for place, key in enumerate(request) if key not in kept), len(request))
            there = sorted(kept | set(request))
            for size in range(min(capacity, len(there)) + 1):
                for choice in map(frozenset, itertools.combinations(there, size)):
                    after[choice] = max(after.get(choice, 0), hits)
        best = after
    return max(best.values())


@pytest.mark.parametrize("seed", range(15))
def test_clairvoyant_hits_as_much_as_the_best_of_all_choices(seed):
    rng = random.Random(seed)
    chains = [[0, 1, 2], [0, 1, 3], [0, 4], [5, 6], [7]]
    requests = [chain[: rng.randint(1, len(chain))] for chain in rng.choices(chains, k=7)]
    for capacity in range(5):
        assert clairvoyant_hits(requests, capacity) == best_hits(requests, capacity), (seed, capacity, requests)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("dram", "ssd"), [(0, 64), (64, 0), (8, 64)])
def test_a_tier_with_room_for_all_hits_all_that_was_there(policy, dram, ssd):
    replay = Replay(dram, ssd, POLICIES[policy])
    for ids in CHATS:
        replay.request([key_of(block) for block in ids])
        replay._manager.check()
    assert (replay.result.asked, replay.result.hits) == (17, 9)
    assert replay.result.written == (8 if ssd else 0)


@pytest.mark.parametrize("policy", POLICIES)
def test_no_policy_hits_more_than_the_clairvoyant(policy):
    rng = random.Random(7)
    chains = [[100 + 100 * number + place for place in range(rng.randint(1, 12))] for number in range(30)]
    requests = [[key_of(b) for b in [0, 1, *rng.choice(chains), 10**6 + number]] for number in range(200)]
    for capacity in (5, 40, 90):
        replay = Replay(0, capacity, POLICIES[policy])
        for request in requests:
            replay.request(request)
        replay._manager.check()
        assert replay.result.hits <= clairvoyant_hits(requests, capacity)


def test_second_touch_writes_only_what_a_second_request_uses():
    replay = Replay(8, 64, POLICIES["lru"], "second-touch")
    for ids in CHATS:
        replay.request([key_of(block) for block in ids])
        replay._manager.check()
    assert replay.result.written == 5  # 0 to 4: the others are used once
    assert replay.result.refused > 0


def test_a_budget_is_spent_on_the_clock_of_the_trace():
    """A day's budget of 24 blocks: blocks used once may only take the upper half of what is saved up, and that
    half is empty at the start; every hour brings a block."""
    written = {}
    for gap in (0.0, 3600.0):
        replay = Replay(0, 64, POLICIES["lru"], "all", 24.0)
        for number in range(30):
            replay.request([key_of(number)], number * gap)
        written[gap] = replay.result.written
        assert replay.result.written + replay.result.refused == 30
    assert written == {0.0: 0, 3600.0: 29}


def test_both_kinds_of_trace_are_read(tmp_path):
    assert read(mooncake(tmp_path / "a")).block_tokens == 512
    trace = read(bailian(tmp_path / "b"))
    assert (trace.block_tokens, trace.blocks, trace.uses) == (16, 4, 7)
    assert trace.requests[1][:3] == trace.requests[0]
    assert trace.seconds == [0.5, 9.5]
    assert len(read(mooncake(tmp_path / "a"), 2).requests) == 2


def test_a_number_is_another_block_behind_other_ones_whether_or_not_the_trace_says_so(tmp_path):
    """vLLM's hashes are of all tokens up to a block's end. A bound that went by numbers alone ended in an IndexError."""
    trace = read(mooncake(tmp_path / "a", [[9, 1], [9], [1], [9, 1], [2, 2]]))
    first, second, third, fourth, fifth = trace.requests
    assert first == fourth and first[:1] == second and third[0] != first[1] and fifth[0] != fifth[1]
    assert trace.blocks == 5
    assert clairvoyant_hits(trace.requests, 2) == 3


def test_tiers_far_larger_than_a_trace_are_as_good_as_large_enough_ones(tmp_path):
    assert figure("of these hit", "--trace", mooncake(tmp_path / "a"), "--ssd-gb", 1e9).startswith("4,608 ")


def test_the_command_reports_hits_and_writes(tmp_path):
    done = kvoffload("--trace", bailian(tmp_path / "b"), "--ssd-gb", 1)
    assert done.returncode == 0, done.stderr
    assert "48 (42.9%)" in done.stdout
    assert "75.0%" in done.stdout


def test_the_command_tells_what_admission_refused(tmp_path):
    trace = mooncake(tmp_path / "a")
    written = [
        kvoffload("--trace", trace, "--dram-gb", 0.3, "--ssd-gb", 1, *arguments).stdout
        for arguments in ([], ["--ssd-admission", "second-touch"], ["--ssd-write-gb-per-day", 0.1])
    ]
    assert "0 times" in written[0]
    assert all("0 times" not in output and "times" in output for output in written[1:])


def figure(name, *arguments):
    done = kvoffload(*arguments)
    assert done.returncode == 0, done.stderr
    (line,) = (line for line in done.stdout.splitlines() if name in line)
    return line.split("│")[2].strip()


def test_only_the_first_requests_are_replayed_with_a_limit(tmp_path):
    replay = ["--trace", mooncake(tmp_path / "a"), "--ssd-gb", 1]
    assert figure("prompt tokens asked for", *replay) == f"{512 * sum(map(len, CHATS)):,}"
    assert figure("prompt tokens asked for", *replay, "--limit", 2) == f"{512 * 7:,}"


def test_a_block_takes_what_its_tokens_take(tmp_path):
    replay = ["--trace", mooncake(tmp_path / "a"), "--ssd-gb", 1000]
    assert figure("written to SSD", *replay, "--kv-bytes-per-token", 1_000_000) == "4.1 GB"  # 8 blocks of 512 tokens
    assert figure("written to SSD", *replay, "--kv-bytes-per-token", 2_000_000) == "8.2 GB"


def test_the_policy_decides_what_leaves(tmp_path):
    trace = mooncake(tmp_path / "a", [[0], [1], [0], [2], [0]])  # two blocks fit: the oldest, 0, is the one that is used
    hits = {name: figure("of these hit", "--trace", trace, "--dram-gb", 0.14, "--policy", name) for name in ("lru", "fifo")}
    assert hits == {"lru": "1,024 (40.0%)", "fifo": "512 (20.0%)"}


def test_a_sweep_draws_its_curves(tmp_path):
    plot = tmp_path / "curves.svg"
    done = kvoffload("--trace", mooncake(tmp_path / "a"), "--sweep", "--plot", plot)
    assert done.returncode == 0, done.stderr
    assert "clairvoyant" in done.stdout
    assert "in GB" in done.stdout and "0.0671" in done.stdout, "a block of 512 tokens is the least tier"
    assert "<svg" in plot.read_text()


@pytest.mark.parametrize(
    ("text", "arguments", "says"),
    [
        ("", ["--ssd-gb", 1], "holds no requests"),
        ("{]", ["--ssd-gb", 1], "line 1 is not JSON"),
        ("[1]", ["--ssd-gb", 1], "not a request"),
        ("\n{}", ["--ssd-gb", 1], "line 2: no list of numbers"),
        (None, ["--ssd-gb", 1], "cannot be read"),
        ('{"hash_ids": [1]}', [], "give --dram-gb or --ssd-gb"),
        ('{"hash_ids": [1]}', ["--policy", "best"], "take one of"),
        ('{"hash_ids": [1]}', ["--dram-gb", 1, "--ssd-write-gb-per-day", 1], "give --ssd-gb"),
        ('{"hash_ids": [1], "timestamp": "noon"}', ["--ssd-gb", 1], "timestamp 'noon' is no time"),
        ('{"hash_ids": [1], "timestamp": 1' + "0" * 400 + "}", ["--ssd-gb", 1], "is no time"),
        ('{"hash_ids": [1' + "0" * 5000 + "]}", ["--ssd-gb", 1], "line 1 is not JSON"),
        ("[" * 100_000, ["--ssd-gb", 1], "line 1 is not JSON"),
        ('{"hash_ids": []}', ["--sweep"], "no requests with blocks"),
        ('{"hash_ids": [1]}', ["--ssd-gb", 1, "--ssd-write-gb-per-day", "0"], "writes nothing"),
        ('{"hash_ids": [1]}', ["--ssd-gb", 1, "--kv-bytes-per-token", "1" + "0" * 400], "at most"),
        ('{"hash_ids": [1]}', ["--dram-gb", "inf"], "no size of a tier"),
        ('{"hash_ids": [1]}', ["--ssd-gb", "nan"], "no size of a tier"),
        ('{"hash_ids": [1]}', ["--ssd-gb", 1, "--ssd-write-gb-per-day", "-1"], "no size of a tier"),
        ('{"hash_ids": [1]}', ["--ssd-gb", 1, "--limit", 0], "give 1 or more"),
        ('{"hash_ids": [1]}', ["--plot", "x.png"], "add --sweep"),
        ('{"hash_ids": [1]}', ["--sweep", "--ssd-gb", 1], "leave others out"),
        ('{"hash_ids": [1]}', ["--sweep", "--policy", "lru"], "leave others out"),
        ('{"hash_ids": [1]}', ["--sweep", "--ssd-admission", "second-touch"], "leave others out"),
        (None, ["--sweep", "--plot", "no/such/x.png"], "cannot be drawn"),
        (None, ["--sweep", "--plot", "x.xyz"], "cannot be drawn"),
    ],
)
def test_what_users_do_wrong_is_one_sentence(tmp_path, text, arguments, says):
    trace = tmp_path / "trace"
    if text is not None:
        trace.write_text(text)
    done = kvoffload("--trace", trace, *arguments)
    assert done.returncode == 2
    assert says in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("said, taken", [(7, 7), (0, 0), (None, 0), (-3, 0), (2.5, 0), ("9", 0), (True, 0)])
def test_how_long_an_answer_was_is_taken_from_a_trace_that_says_so(tmp_path, said, taken):
    file = tmp_path / "trace"
    file.write_text(json.dumps({"timestamp": 0, "hash_ids": [1]} | ({} if said is None else {"output_length": said})) + "\n")
    assert read(file).answers == [taken]
