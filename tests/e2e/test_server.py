"""`kvoffload serve` on a real vLLM: the clients people have, what /metrics says, signals, and a second life."""

import signal

import pytest
from openai import OpenAI
from tiny_models import LORA_RANK, make_lora

from kvoffload.metrics import METRICS
from tests.e2e.conftest import BUILD, Right
from tests.e2e.offload import PROMPT
from tests.e2e.served import served
from tests.monitoring.test_rules_and_dashboard import exported_name
from tests.patience import PATIENCE_S

NAME = "Meta-Llama-3.1-8B-Instruct"
POOL = ["--max-model-len", 1056, "--num-gpu-blocks-override", 40, "--served-model-name", NAME]
TIERS = ["--dram-kv-offload-gb", 0.06, "--ssd-kv-offload-gb", 0.3]


@pytest.fixture(scope="module")
def life(model, tmp_path_factory):
    """`life(flag, ..)` is a server, each over the cache that the one before left."""
    folder = tmp_path_factory.mktemp("served")
    lora = ["--enable-lora", "--max-lora-rank", LORA_RANK, "--lora-modules", f"lora={make_lora(BUILD / 'models')}"]
    flags = ["--nvme_path", folder, *TIERS, *POOL, *lora]
    environment = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"}
    return lambda *more: served(model("llama"), folder / "log", *flags, *more, env=environment)


@pytest.fixture(scope="module")
def server(life):
    with life() as made:
        yield made


def test_a_health_check_is_answered(server):
    assert server.get("/health")[0] == 200


def test_a_completion_is_answered(server):
    assert server.complete(NAME, "What is the capital of France?", temperature=0.7, max_tokens=100)


def test_a_chat_is_answered(server):
    messages = [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": "What is machine learning?"},
    ]
    answer = server.post("/v1/chat/completions", model=NAME, messages=messages, max_tokens=200)
    assert '"role":"assistant"' in answer.replace(" ", "")


def test_the_openai_client_is_answered(server):
    client = OpenAI(base_url=server.url + "/v1", api_key="dummy")
    response = client.chat.completions.create(
        model=NAME,
        messages=[{"role": "user", "content": "Explain quantum computing in simple terms"}],
        max_tokens=150,
        temperature=0.8,
    )
    assert response.choices[0].message.content
    assert response.usage.completion_tokens > 0


def test_a_lora_of_the_start_and_one_of_run_time_answer_each_in_its_own_way_from_the_cache(server, prompts):
    other = make_lora(BUILD / "models", seed=7)
    server.post("/v1/load_lora_adapter", lora_name="other", lora_path=str(other))
    prompt, pushing_out = prompts.one(PROMPT), prompts.many(2, PROMPT)
    load = {"kv_transfer_params": {"kvoffload": "load"}}
    first, hits = {}, {}
    for name in (NAME, "lora", "other"):
        first[name] = server.answer(name, prompt)
    assert len({tuple(answer) for answer in first.values()}) == 3
    for name in first:
        for filler in pushing_out:
            server.complete(NAME, filler)
        before = server.scrape()["kvoffload_hit_blocks_total"]
        assert server.answer(name, prompt, **load) == first[name]
        hits[name] = server.scrape()["kvoffload_hit_blocks_total"] - before
    assert all(count > 0 for count in hits.values()), hits
    server.post("/v1/unload_lora_adapter", lora_name="other")
    assert "other" not in server.get("/v1/models")[1]


def test_a_served_model_answers_from_the_cache_and_its_metrics_say_so(server, prompts):
    asked = prompts.many(3, PROMPT)
    before = server.scrape()
    first = [server.answer(NAME, prompt) for prompt in asked]
    second = [server.answer(NAME, prompt, kv_transfer_params={"kvoffload": "load"}) for prompt in asked]
    assert first == second
    sums = server.scrape()
    assert sums["kvoffload_hit_blocks_total"] > before["kvoffload_hit_blocks_total"]
    assert sums["kvoffload_stored_blocks_total"] - before["kvoffload_stored_blocks_total"] >= 90
    assert sums["kvoffload_used_bytes"] > 0
    assert {exported_name(name) for name in sums if not name.endswith("_created")} <= set(METRICS)


def test_sigterm_ends_it_in_order_and_a_second_life_hits_what_the_first_stored(server, life, prompts):
    """The last one: it ends the server of those before."""
    prompt = prompts.one(PROMPT)

    def lived(server) -> tuple[Right, float]:
        """Its answer, and how many blocks hit meanwhile."""
        before = server.scrape()["kvoffload_hit_blocks_total"]
        answer = server.answer(NAME, prompt, kv_transfer_params={"kvoffload": "load"})
        server.complete(NAME, prompts.one(PROMPT))  # its steps bring the first one's blocks to the SSD
        hits = server.scrape()["kvoffload_hit_blocks_total"] - before
        server.process.send_signal(signal.SIGTERM)
        server.process.wait(PATIENCE_S)
        assert server.process.returncode in (0, -signal.SIGTERM), server.process.returncode
        return answer, hits

    lives = [lived(server)]
    for resume in ("--resume-kv-cache", "--no-resume-kv-cache"):
        with life(resume) as again:
            lives.append(lived(again))
    answers, hits = zip(*lives, strict=True)
    assert answers[0] == answers[1] and answers[0] == answers[2]
    assert hits[0] == 0 and hits[1] > 0 and hits[2] == 0
