"""inspect, verify and clean beside a running vLLM and after it."""

import json
import signal
import subprocess
import sys
from pathlib import Path

from tests.e2e.offload import PROMPT, TOKENS, ask, ask_one, settle
from tests.patience import PATIENCE_S

COMMAND = (sys.executable, "-X", "faulthandler", "-c", "from kvoffload.cli import main; main()")


def kvoffload(*arguments: object) -> tuple[int, dict | list]:
    command = [*COMMAND, *map(str, arguments), "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        out, err = process.communicate(timeout=PATIENCE_S)
    except subprocess.TimeoutExpired:
        waits = [f"{task.name}: {(task / 'wchan').read_text()}" for task in Path(f"/proc/{process.pid}/task").iterdir()]
        process.send_signal(signal.SIGABRT)  # it says where its threads are
        raise AssertionError(f"does not end, its threads wait in {waits}; it said {process.communicate()}") from None
    assert err == ""
    return process.returncode, json.loads(out)


def directories(path: Path) -> list[Path]:
    return [each for each in (path / "kvoffload").iterdir() if each.is_dir()]


def test_inspect_verify_and_clean_beside_a_running_vllm_and_after_it(serve, baseline, prompts, tmp_path):
    asked = prompts.many(6, PROMPT)
    want = baseline.tokens("llama", asked, TOKENS)
    vllm = serve("llama", {"nvme_path": str(tmp_path), "ssd_kv_offload_gb": 0.06})  # three prompts: slots are rewritten
    assert ask(vllm, asked[:3]) == want[:3]
    settle(vllm)

    running = [vllm.submit(prompt, TOKENS) for prompt in asked[3:]]
    code, found = kvoffload("verify", tmp_path)
    assert (code, found["damage"], found["caches"]) == (0, [], 1) and found["blocks"] > 0
    assert [vllm.answer(future).tokens for future in running] == want[3:]
    settle(vllm)

    code, ((cache,),) = 0, [path["caches"] for path in kvoffload("inspect", tmp_path)[1]]
    assert "llama" in cache["model"] and 0 < cache["slots_used"] <= cache["slots"]
    assert cache["in_use_by"] in {f"process {process.pid}" for process in vllm.processes()}
    code, (said,) = kvoffload("clean", tmp_path, "--all", "--yes")
    assert code == 1 and not said["removed"] and "in use by" in said["stays"]
    code, found = kvoffload("verify", tmp_path)
    assert (code, found["damage"]) == (0, []) and found["blocks"] > 0

    vllm.reset_gpu_prefix_cache()
    answer, source = ask_one(vllm, asked[5])
    assert answer.tokens == want[5] and source["disk"] > 0
    assert ask(vllm, asked) == want
    settle(vllm)
    metrics = vllm.metrics()
    assert metrics.sum("kvoffload_load_failures_total") == 0
    assert metrics.sum("kvoffload_evictions_total", tier="ssd") > 0
    vllm.shutdown()

    assert kvoffload("verify", tmp_path)[0] == 0
    (slots,) = tmp_path.rglob("*.slots")
    with slots.open("r+b") as file:
        file.seek(4096 + 4096 + 100)  # in the first slot's payload
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))
    code, found = kvoffload("verify", tmp_path)
    assert code == 1 and [(each["rank"], each["slot"]) for each in found["damage"]] == [(0, 0)]

    assert kvoffload("clean", tmp_path, "--all", "--yes")[0] == 0
    assert directories(tmp_path) == [] and not list(tmp_path.rglob("*.slots"))
