"""Drives that fail, stall, fill up or vanish under a running vLLM: every request ends with the tokens of a vLLM without
kvoffload, the engine lives, the log says it once for each request at most, and metrics count it."""

import errno
import shutil
import subprocess

import pytest
from vllm_process import VllmProcess

from tests.e2e.offload import BLOCK, LOAD, PROMPT, ask, ask_one, settle
from tests.engine.faulty import FaultPlan, environment
from tests.patience import wait_until

PROMPTS = 4
LOGGING = {"VLLM_LOGGING_LEVEL": "INFO"}  # what is said is counted here


class Life:
    """An engine whose drive obeys a plan, and prompts that are on SSD with their right answers. The KV pool holds one of
    them, so each is loaded or computed anew whenever it is asked."""

    def __init__(self, serve, plan: FaultPlan, baseline, prompts, settings: dict, **options):
        self.plan = plan
        self.asked = prompts.many(PROMPTS, PROMPT)
        self.want = baseline.tokens("llama", self.asked, 8)
        self.engine: VllmProcess = serve("llama", settings, env={**environment(plan), **LOGGING}, **options)
        assert ask(self.engine, self.asked) == self.want
        settle(self.engine)
        self.check_all_are_loaded()

    def check_all_are_loaded(self) -> None:
        for prompt, tokens in zip(self.asked, self.want, strict=True):
            answer, source = ask_one(self.engine, prompt)
            assert answer.tokens == tokens and source["disk"] == PROMPT, source

    def check_answers(self, rounds: int = 1, **options) -> None:
        before = len(self.lines())
        for _ in range(rounds):
            assert ask(self.engine, self.asked, **options) == self.want
        said = self.lines()[before:]
        assert len(said) <= rounds * PROMPTS + 2, "\n".join(said)  # one a request, and that a drive is left alone

    def lines(self) -> list[str]:
        return [line for line in self.engine.log_text().splitlines() if "kvoffload: " in line]

    def failures(self, direction: str, reason: str) -> float:
        return self.engine.metrics().sum("kvoffload_transfer_failures_total", direction=direction, reason=reason)

    def wait_until_loads_come_back(self, wish: dict | None = LOAD) -> None:
        """What was damaged or forgotten is stored anew, and pauses end by themselves."""

        def is_loaded() -> bool:
            if ask_one(self.engine, self.asked[0], wish=wish)[1]["disk"] == PROMPT:
                return True
            assert ask(self.engine, self.asked, wish=wish) == self.want
            return False

        wait_until(is_loaded, pause_s=0.5)


@pytest.fixture
def plan(tmp_path):
    with FaultPlan(tmp_path / "plan") as plan:
        yield plan


def test_a_drive_that_fails_fills_up_stalls_and_comes_back_changes_no_token(serve, baseline, prompts, tmp_path, plan):
    settings = {"nvme_path": str(tmp_path), "ssd_kv_offload_gb": 0.3}
    life = Life(serve, plan, baseline, prompts, settings)

    plan.read.set(error=1)
    life.check_answers(rounds=2)
    assert life.failures("read", "EIO") > 0
    assert life.engine.metrics().sum("kvoffload_load_failures_total") > 0
    plan.heal()
    life.wait_until_loads_come_back()

    plan.read.set(error=0.1)
    life.check_answers(rounds=3)
    plan.heal()
    life.wait_until_loads_come_back()

    plan.write.error = errno.ENOSPC
    plan.write.set(error=1)
    fresh = prompts.many(2, PROMPT)
    assert ask(life.engine, fresh) == baseline.tokens("llama", fresh, 8)
    life.check_answers()
    assert life.failures("write", "ENOSPC") > 0
    plan.heal()
    life.wait_until_loads_come_back()

    plan.read.set(stall=1)
    plan.write.set(stall=1)
    fresh = prompts.many(2, PROMPT)
    life.check_answers()
    assert life.failures("read", "ETIMEDOUT") > 0
    assert ask(life.engine, fresh) == baseline.tokens("llama", fresh, 8)
    plan.heal()
    life.wait_until_loads_come_back()


def test_a_cache_directory_that_is_deleted_under_a_running_engine_changes_no_token(serve, baseline, prompts, tmp_path, plan):
    life = Life(serve, plan, baseline, prompts, {"nvme_path": str(tmp_path), "ssd_kv_offload_gb": 0.3})
    shutil.rmtree(tmp_path / "kvoffload")
    fresh = prompts.many(2, PROMPT)
    assert ask(life.engine, fresh) == baseline.tokens("llama", fresh, 8)
    life.check_answers(rounds=2)


def test_a_journal_that_cannot_be_written_costs_nothing_before_a_restart(serve, baseline, prompts, tmp_path, plan):
    settings = {"nvme_path": str(tmp_path), "ssd_kv_offload_gb": 0.3}
    life = Life(serve, plan, baseline, prompts, settings)
    (journal,) = tmp_path.rglob("index.journal")
    if subprocess.run(["chattr", "+i", str(journal), str(journal.parent)], capture_output=True).returncode != 0:
        pytest.skip("this file system, or this user, cannot make files immutable")
    try:
        fresh = prompts.many(2, PROMPT)
        want = baseline.tokens("llama", fresh, 8)
        assert ask(life.engine, fresh) == want
        settle(life.engine)
        life.check_all_are_loaded()
        assert ask(life.engine, fresh) == want
        assert life.engine.log_text().count("cannot be written") == 1
        life.engine.kill9()
    finally:
        subprocess.run(["chattr", "-i", str(journal.parent), str(journal)], check=True)
    again = serve("llama", settings)
    for prompt, tokens in zip(life.asked, life.want, strict=True):
        answer, source = ask_one(again, prompt)
        assert answer.tokens == tokens and source["disk"] >= PROMPT - BLOCK, source
    assert ask(again, fresh) == want


def test_a_fault_on_one_of_two_ranks_changes_no_token(serve, baseline, prompts, tmp_path, plan):
    settings = {"nvme_path": str(tmp_path), "ssd_kv_offload_gb": 0.3}
    life = Life(serve, plan, baseline, prompts, settings, tensor_parallel_size=2)
    plan.only(next(tmp_path.rglob("rank1of2.slots")))
    plan.read.set(error=1)
    life.check_answers(rounds=2)
    assert life.failures("read", "EIO") > 0
    plan.heal()
    life.wait_until_loads_come_back()
    plan.read.set(stall=1)
    life.check_answers()
    assert life.failures("read", "ETIMEDOUT") > 0
    plan.heal()
    life.wait_until_loads_come_back()
