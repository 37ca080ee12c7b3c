"""A drive is written to no faster than the budget allows, and the engine serves all the same."""

import time

from kvoffload.layout import slot_bytes
from tests.e2e.offload import BLOCK, PROMPT, TOKENS, ask, wait_until_written
from tests.e2e.test_caps import PAYLOAD


def test_writes_stay_within_a_budget_of_a_few_prompts_and_used_blocks_come_first(serve, baseline, prompts, tmp_path):
    asked = prompts.many(12, PROMPT)
    again = asked[-2:]  # still in DRAM
    want = baseline.tokens("llama", asked + again, TOKENS)
    blocks = PROMPT // BLOCK
    burst = 4 * blocks  # an hour's worth, of which a start gives half
    slot = slot_bytes(PAYLOAD)
    settings = {"nvme_path": str(tmp_path), "dram_kv_offload_gb": 0.09, "ssd_kv_offload_gb": 0.5}
    begun, day = time.monotonic(), time.gmtime().tm_yday
    engine = serve("llama", settings | {"ssd_write_gb_per_day": 24 * burst * slot / 1e9})
    assert ask(engine, asked + again) == want
    wait_until_written(engine, lambda metrics: blocks)
    metrics = engine.metrics()
    written = metrics.sum("kvoffload_demotions_total")
    given = burst / 2 + burst * (time.monotonic() - begun) / 3600
    print(f"{written:g} blocks written of {metrics.sum('kvoffload_stored_blocks_total'):g} stored, {given:.1f} were allowed")
    assert blocks <= written <= given
    assert metrics.sum("kvoffload_stored_blocks_total") >= 10 * blocks
    if time.gmtime().tm_yday == day:  # else a part of it was written yesterday
        assert metrics.sum("kvoffload_ssd_written_today_bytes") == written * slot
    assert metrics.sum("kvoffload_refused_admissions_total", reason="budget") > 0
    assert metrics.sum("kvoffload_refused_admissions_total", reason="behind") > 0
    assert 0 <= metrics.sum("kvoffload_write_budget_left_bytes") <= burst * slot
    assert metrics.sum("kvoffload_hit_blocks_total", tier="dram") > 0
