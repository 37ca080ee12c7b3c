"""Many more prompts than the caps hold."""

import subprocess
import threading
from pathlib import Path

from kvoffload.layout import slot_bytes
from tests.e2e.offload import BLOCK, TOKENS, ask

PAYLOAD = 8 * 2 * 4 * 64 * 4 * 32  # layers, K and V, heads, head size, float32, tokens: one block of the llama


def disk_bytes(path: Path) -> int:
    found = subprocess.run(["du", "-s", "-B1", str(path)], capture_output=True, text=True)  # files may go meanwhile
    return int(found.stdout.split()[0]) if found.stdout else 0


def arena_bytes(pid: int) -> int:
    """Bytes of memory behind the engine's arena: the private mapping that is not copied to children, in pages of any
    kind. (smaps counts reserved huge pages apart from Rss.)"""
    total, found, private = 0, 0, False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        field, *values = line.split()
        if not field.endswith(":"):
            found, private = 0, values[0].endswith("p")
        elif field in ("Rss:", "Private_Hugetlb:"):
            found += int(values[0]) * 1024
        elif field == "VmFlags:" and private and "dc" in values:
            total += found
    return total


def test_two_hundred_prompts_stay_below_caps_that_hold_twenty(serve, baseline, prompts, tmp_path):
    asked = prompts.many(200, 2 * BLOCK)
    asked += asked[:20] + asked[-20:]
    want = baseline.tokens("llama", asked, TOKENS)
    dram_gb = 0.025  # twenty prompts and the arena's spare slots
    ssd_gb = round(20 * 2 * slot_bytes(PAYLOAD) / 1e9, 4)  # twenty prompts of two blocks
    settings = {"nvme_path": str(tmp_path), "dram_kv_offload_gb": dram_gb, "ssd_kv_offload_gb": ssd_gb}
    small = serve("llama", settings)
    peaks = {"disk": 0, "dram": 0}
    done = threading.Event()

    def watch():
        while not done.wait(0.2):
            peaks["disk"] = max(peaks["disk"], disk_bytes(tmp_path / "kvoffload"))
            peaks["dram"] = max(peaks["dram"], sum(arena_bytes(process.pid) for process in small.processes()))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        assert ask(small, asked, concurrency=4) == want
    finally:
        done.set()
        watcher.join()
    print(f"peaks {peaks}, caps {dram_gb * 1e9:.0f} and {ssd_gb * 1e9:.0f}")
    assert 0 < peaks["disk"] <= ssd_gb * 1e9
    assert 0 < peaks["dram"] <= dram_gb * 1e9
    assert small.metrics().sum("kvoffload_evictions_total", tier="ssd") > 0
