"""The scheduler half between vLLM's calls and the block manager: order, holes, failures, resets."""

import errno
import os
from types import SimpleNamespace

import pytest
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.common import (
    OffloadingConnectorMetadata,
    TransferJob,
)
from vllm.v1.core.kv_cache_utils import KVCacheBlockCopy
from vllm.v1.core.sched.output import CachedRequestData
from vllm.v1.kv_offload.base import (
    GPULoadStoreSpec,
    LookupResult,
    Medium,
    OffloadPolicy,
    ReqContext,
    TierFilter,
    TierMatcher,
    make_offload_key,
)
from vllm.v1.kv_offload.config import (
    OffloadingCacheConfig,
    OffloadingConfig,
    OffloadingGroupConfig,
    OffloadingModelConfig,
    OffloadingParallelConfig,
)

from kvoffload.config import Config
from kvoffload.errors import ConfigError
from kvoffload.layout import slot_bytes
from kvoffload.types import NO_SLOT, TransferReport
from kvoffload.vllm import contract, notes
from kvoffload.vllm.connector import KVOffloadConnector
from kvoffload.vllm.geometry import Geometry
from kvoffload.vllm.manager import ManagerAdapter, write_budget

PAYLOAD = 100_000
GROUPS = (4, 7)  # vLLM's group ids need not begin at 0


def offloading_config() -> OffloadingConfig:
    return OffloadingConfig(
        groups=tuple(OffloadingGroupConfig(32, ("layer",), group) for group in GROUPS),
        worker_kv_bytes_per_block=PAYLOAD,
        enable_kv_cache_events=False,
        extra_config={},
        engine_id="engine",
        model=OffloadingModelConfig("model", "float32"),
        cache=OffloadingCacheConfig(32, 1),
        parallel=OffloadingParallelConfig(0, 1, 1, 1, 1, 1, 0, 1, None, False),
    )


def adapter(dram_slots: int = 32, weights_stay: bool = True, **settings) -> ManagerAdapter:
    settings.setdefault("dram_kv_offload_gb", (dram_slots + 4) * slot_bytes(PAYLOAD) / 1e9 + 0.0021)
    manager = ManagerAdapter(Config.parse(settings), offloading_config())
    geometry = Geometry(PAYLOAD, (PAYLOAD,) * len(GROUPS), ranks=1, engines=1, blocks_per_step=8)
    manager.open(geometry, {"model": "test"}, weights_stay)
    return manager


def request(manager: ManagerAdapter, name: str, blocks: int, groups=GROUPS[:1], prompt: bytes = b"p"):
    """A request's context and its keys, as vLLM makes them: all of one group, then all of the next."""
    context = ReqContext(name)
    assert manager.on_new_request(context).policy is OffloadPolicy.REQUEST_LEVEL
    keys = []
    for group in groups:
        for number in range(blocks):
            keys.append(make_offload_key(prompt + bytes([number]) * 31, group))
            context.set_offload_key_position(keys[-1], 32 * (number + 1))
    return context, keys


def step(new=(), cached=None, preempted=None) -> SimpleNamespace:
    return SimpleNamespace(
        scheduled_new_reqs=[
            SimpleNamespace(req_id=name, prompt_token_ids=[0] * tokens, num_computed_tokens=context)
            for name, tokens, context in new
        ],
        scheduled_cached_reqs=cached or CachedRequestData.make_empty(),
        preempted_req_ids=preempted,
    )


def end_step(manager: ManagerAdapter):
    manager.note_step(step())
    return manager.take_plan()


def store(manager: ManagerAdapter, context, keys, failed=()):
    output = manager.prepare_store(keys, context)
    errors = {key: errno.EIO for key in output.store_spec.keys if key in failed}
    if errors:
        manager.take_in(TransferReport(failed={output.store_spec.transfer: errors}))
    manager.complete_store(set(output.keys_to_store), context)
    return output.keys_to_store


def hits(manager: ManagerAdapter, context, keys) -> list[bool]:
    return [manager.lookup(key, context) is LookupResult.HIT for key in keys]


def test_slots_are_given_in_the_order_of_vllms_block_ids_whatever_is_held_already():
    manager = adapter()
    context, keys = request(manager, "r", 6, GROUPS)
    assert store(manager, context, keys[2:4]) == keys[2:4]
    output = manager.prepare_store(keys, context)
    assert output.keys_to_store == output.store_spec.keys == keys[:2] + keys[4:]


@pytest.mark.parametrize(("prompt_tokens", "tokens", "stored"), [(64, 192, 5), (64, 193, 6), (64, 191, 5), (192, 192, 6)])
@pytest.mark.parametrize("told", ["where each block ends", "the blocks' order"])
def test_a_block_that_ends_with_the_last_token_of_an_answer_is_not_stored(monkeypatch, prompt_tokens, tokens, stored, told):
    """Its KV was never computed, and vLLM before some version offers it."""
    if told == "the blocks' order":
        monkeypatch.setattr(contract, "block_end", lambda position, tokens_per_block: (position + 1) * tokens_per_block)
        monkeypatch.setattr(contract, "key_positions", lambda context: {key: place for place, key in enumerate(keys)})
    manager = adapter()
    context, keys = request(manager, "r", 6)
    ended = SimpleNamespace(
        request_id="r", num_prompt_tokens=prompt_tokens, num_tokens=tokens, num_output_tokens=0, status=None, pooling_params=None
    )
    manager.note_end(ended)
    assert store(manager, context, keys) == keys[:stored]


def test_when_slots_run_out_every_group_keeps_its_beginning():
    manager = adapter(dram_slots=10)
    context, keys = request(manager, "r", 8, GROUPS)
    stored = store(manager, context, keys)
    half = (len(stored) + 1) // 2
    assert 4 < len(stored) < 16
    assert stored == [*keys[:half], *keys[8 : 8 + len(stored) - half]]


def test_nothing_is_stored_behind_a_hole():
    manager = adapter(dram_slots=10)
    context, keys = request(manager, "r", 30)
    first = store(manager, context, keys[:20])
    assert 0 < len(first) < 20
    assert store(manager, context, keys[:30]) == []
    again, _ = request(manager, "r2", 30)
    assert manager.prepare_store(keys[:1], again).keys_to_store == []  # held: no copy, and no hole either


def test_a_failed_store_fails_its_own_blocks_only():
    manager = adapter()
    context, keys = request(manager, "r", 4)
    store(manager, context, keys, failed=keys[1:2])
    assert hits(manager, context, keys) == [True, False, True, True]
    assert store(manager, context, keys) == keys[1:2]
    assert hits(manager, context, keys) == [True] * 4


def begin_store(manager: ManagerAdapter, context, keys, blocks, job_id: int):
    """As vLLM does: a job whose blocks are `blocks`, one a key."""
    output = manager.prepare_store(keys, context)
    source = GPULoadStoreSpec(blocks, group_sizes=[len(blocks)], block_indices=[0])
    return {job_id: TransferJob(context.req_id, source, output.store_spec)}


def test_blocks_stored_after_they_were_overwritten_are_not_held():
    """vLLM's second model runner overwrites a step's new blocks before it lets the stores of their old content be done."""
    manager = adapter()
    context, keys = request(manager, "r", 6)
    earlier = begin_store(manager, context, keys[:3], [10, 11, 12], 1)
    manager.fail_overwritten(set(), earlier, ())
    computed_now = begin_store(manager, context, keys[3:5], [13, 14], 2)
    flushed = begin_store(manager, context, keys[5:], [15], 3)
    manager.fail_overwritten({11, 13, 15}, computed_now | flushed, flushed)
    manager.complete_store(keys[:3], context)
    manager.complete_store(keys[3:5], context)
    manager.complete_store(keys[5:], context)
    assert hits(manager, context, keys) == [True, False, True, True, True, False]
    assert manager._sources == {} == manager._failed, "nothing is remembered of stores that ended"
    again = begin_store(manager, context, keys[1:2], [11], 4)
    manager.fail_overwritten({11}, again, ())
    manager.complete_store(keys[1:2], context)
    assert hits(manager, context, keys[1:2]) == [True], "computed anew in the step that overwrote the block"


def fail_load(manager: ManagerAdapter, context, keys, errors) -> None:
    spec = manager.prepare_load(keys, context)
    end_step(manager)
    manager.take_in(TransferReport(failed={spec.transfer: errors}))
    manager.complete_load(set(keys), context)


def test_a_request_of_which_a_block_was_damaged_loads_the_others_and_after_a_second_failure_none():
    manager = adapter()
    context, keys = request(manager, "r", 4)
    store(manager, context, keys)
    assert hits(manager, context, keys) == [True] * 4
    fail_load(manager, context, keys, {keys[2]: errno.EBADMSG})
    assert hits(manager, context, keys) == [True, True, False, True]
    assert store(manager, context, keys) == keys[2:3]  # recomputed, and stored again
    fail_load(manager, context, keys, {keys[3]: errno.EBADMSG})
    assert hits(manager, context, keys) == [False] * 4
    other, _ = request(manager, "r2", 4)
    assert hits(manager, other, keys) == [True, True, True, False]


@pytest.mark.parametrize(("error", "kept"), [(errno.ETIME, True), (errno.EIO, True), (errno.EREMOTEIO, False)])
def test_after_a_load_that_a_drive_kept_waiting_what_arrived_is_loaded_from_dram_and_nothing_from_the_drive(tmp_path, error, kept):
    settings = {"nvme_path": str(tmp_path), "ssd_kv_offload_gb": 0.01}
    manager = adapter(**settings)
    context, keys = request(manager, "r", 4)
    store(manager, context, keys)
    (file,) = tmp_path.rglob("*.slots")
    os.truncate(file, 8 * slot_bytes(PAYLOAD))  # what workers do
    manager.take_in(TransferReport(demoted={demotion.id: 1 for demotion in end_step(manager).demotions}))
    manager.shutdown()
    manager = adapter(**settings)
    again, _ = request(manager, "r2", 4)
    assert hits(manager, again, keys) == [True] * 4
    errors = {keys[2]: error, keys[3]: errno.ECANCELED}
    fail_load(manager, again, keys, errors)
    assert hits(manager, again, keys) == [kept, kept, False, False]
    manager.shutdown()


def test_failures_of_jobs_from_before_a_reset_touch_nothing_after_it():
    manager = adapter()
    context, keys = request(manager, "r", 2)
    stale = manager.prepare_store(keys, context).store_spec.transfer
    manager.reset_cache()
    manager.take_in(TransferReport(failed={stale: {keys[0]: errno.EIO}}))
    assert store(manager, context, keys) == keys
    assert hits(manager, context, keys) == [True, True]


def test_what_was_noted_of_a_request_before_a_reset_is_forgotten():
    manager = adapter(dram_slots=10)
    context, keys = request(manager, "r", 30)
    store(manager, context, keys)
    assert store(manager, context, keys) == []  # behind a hole
    manager.reset_cache()
    assert store(manager, context, keys[:4]) == keys[:4]


@pytest.mark.parametrize(("computed", "stored"), [(96, 0), (0, 4)])
def test_what_a_request_computed_before_a_reset_is_not_stored_after_it(computed, stored):
    """vLLM offers it again from its beginning. A preempted request computes all of it anew."""
    manager = adapter()
    manager.announce(SimpleNamespace(request_id="r", lora_request=None, num_computed_tokens=computed, kv_transfer_params=None))
    context, keys = request(manager, "r", 4)
    store(manager, context, keys[:2])
    manager.reset_cache()
    assert len(store(manager, context, keys)) == stored
    later, _ = request(manager, "later", 4)
    assert hits(manager, later, keys) == [stored > 0] * 4


def test_after_a_reset_blocks_are_kept_under_keys_no_other_process_asks_for():
    manager = adapter()
    context, keys = request(manager, "r", 2)
    assert manager.prepare_store(keys, context).store_spec.keys == keys
    manager.reset_cache()
    renamed = manager.prepare_store(keys, context).store_spec.keys
    assert not set(renamed) & set(keys) and {len(key) for key in renamed} == {len(keys[0])}


def test_another_block_of_a_request_with_keys_of_its_own_costs_one_digest(monkeypatch):
    """All of its keys at each block was five milliseconds of the scheduler's time, in a prompt of 8,000 blocks."""
    manager = adapter(weights_stay=False)
    context, keys = request(manager, "r", 9)
    digests = []
    real = notes.salted
    monkeypatch.setattr(notes, "salted", lambda key, salt: digests.append(key) or real(key, salt))
    store(manager, context, keys[:8])
    hits(manager, context, keys[:8])
    assert digests == keys
    store(manager, context, keys)
    context.set_offload_key_position(make_offload_key(b"q" * 32, GROUPS[0]), 320)
    store(manager, context, [make_offload_key(b"q" * 32, GROUPS[0])])
    assert len(digests) == 10


def test_where_vllm_may_be_given_other_weights_no_other_process_asks_for_what_is_kept():
    found = []
    for _ in range(2):
        manager = adapter(weights_stay=False)
        context, keys = request(manager, "r", 2)
        found.append(manager.prepare_store(keys, context).store_spec.keys)
    assert not set(found[0]) & set(found[1]) and not set(found[0] + found[1]) & set(keys)


def test_a_request_whose_adapter_cannot_be_looked_at_is_computed_and_not_kept(monkeypatch):
    manager = adapter()
    monkeypatch.setattr(manager._lora_salts, "of", lambda _adapter: None)
    manager.announce(SimpleNamespace(request_id="r", lora_request=object(), num_computed_tokens=0))
    context, keys = request(manager, "r", 2)
    for _ in range(2):
        assert store(manager, context, keys) == [] and not any(hits(manager, context, keys))
        manager.reset_cache()


def test_a_load_of_what_is_not_held_is_answered_and_fails():
    manager = adapter()
    context, keys = request(manager, "r", 1)
    spec = manager.prepare_load(keys, context)
    assert (spec.dram_slots[0], spec.ssd_slots[0]) == (NO_SLOT, NO_SLOT)
    assert not [name for name in manager._core.counters if name[0] == "kvoffload_hit_blocks_total"]
    manager.complete_load(set(keys), context)


def test_acknowledgements_nobody_waits_for_are_passed_over():
    adapter().take_in(TransferReport(demoted={99: 1}))


def test_a_request_may_exclude_a_tier():
    manager = adapter()
    context, keys = request(manager, "r", 1)
    store(manager, context, keys)
    context.load_tier_filter = TierFilter((TierMatcher(medium=Medium.STORAGE),))
    assert hits(manager, context, keys) == [False]
    context.load_tier_filter = TierFilter((TierMatcher(medium=Medium.CPU),))
    assert hits(manager, context, keys) == [True]


def test_a_request_that_excludes_dram_is_loaded_from_the_ssd_that_has_the_block_too(tmp_path):
    manager = adapter(nvme_path=str(tmp_path), ssd_kv_offload_gb=0.01)
    context, keys = request(manager, "r", 1)
    store(manager, context, keys)
    (demotion,) = end_step(manager).demotions
    manager.take_in(TransferReport(demoted={demotion.id: 1}))
    for medium, tier in ((Medium.CPU, "dram"), (Medium.STORAGE, "ssd")):
        context.load_tier_filter = TierFilter((TierMatcher(medium=medium),))
        spec = manager.prepare_load(keys, context)
        assert (spec.ssd_slots[0] == NO_SLOT) == (tier == "dram")
        manager.complete_load(set(keys), context)
        assert manager._core.counters["kvoffload_hit_blocks_total", tier] == 1
    manager.shutdown()


def test_a_dram_tier_too_small_or_larger_than_the_machine_is_refused_with_figures():
    with pytest.raises(ConfigError, match="holds fewer than 8 blocks.*at least ([0-9.]+) GB") as refused:
        adapter(dram_kv_offload_gb=0.0005)
    least = float(str(refused.value).split("at least ")[1].split(" GB")[0])
    adapter(dram_kv_offload_gb=least)
    with pytest.raises(ConfigError, match=r"1e\+06 is more than the [0-9.]+ GB of memory"):
        adapter(dram_kv_offload_gb=1e6)


def test_switched_off_it_neither_finds_nor_stores():
    manager = ManagerAdapter(Config.parse({}), offloading_config())
    context, keys = request(manager, "r", 2)
    assert manager.prepare_store(keys, context).keys_to_store == []
    assert hits(manager, context, keys) == [False, False]
    assert manager.get_stats() is None and not manager.has_pending_work()


def test_a_drives_state_is_exported_by_its_number_when_it_changes(tmp_path):
    paths = [tmp_path / "a", tmp_path / "b"]
    for path in paths:
        path.mkdir()
    manager = adapter(nvme_path=[str(path) for path in paths], ssd_kv_offload_gb=0.01)

    def exported(name: str) -> dict:
        stats = manager.get_stats()
        return {} if stats is None else stats.data["data"].get(name, {})

    context, keys = request(manager, "r", 4)
    store(manager, context, keys)
    demotions = end_step(manager).demotions
    assert [demotion.ssd_slot for demotion in demotions] == [0, 1, 2, 3]
    well = {(drive, direction): 0 for drive in "01" for direction in ("read", "write")}
    assert exported("kvoffload_drive_state") == well and exported("kvoffload_drive_state") == {}
    done = dict.fromkeys((demotion.id for demotion in demotions), 1)
    manager.take_in(TransferReport(demoted=done, failed_demotions={demotions[1].id: errno.ENOSPC}))
    stats = manager.get_stats().data["data"]
    assert stats["kvoffload_drive_state"] == {("1", "write"): 2}
    assert stats["kvoffload_drive_openings_total"] == {("1", "write", "ENOSPC"): 1}
    manager.shutdown()


def test_counters_are_there_from_the_start_and_of_failures_those_that_an_alert_asks_for():
    manager = adapter()
    found = manager.get_stats().data["data"]
    assert found["kvoffload_hit_blocks_total"] == {("dram",): 0, ("ssd",): 0}
    assert len(found["kvoffload_deadlines_missed_total"]) == 8
    assert found["kvoffload_load_failures_total"] == {(): 0}
    assert found["kvoffload_transfer_failures_total"] == {("read", "EIO"): 0, ("read", "EBADMSG"): 0}
    assert manager.get_stats() is None


def test_what_every_rank_reports_is_one_histogram_and_queues_are_gauges():
    manager = adapter()
    manager.get_stats()
    both = TransferReport(latencies={"read": [0.5]})
    both.add(TransferReport(latencies={"read": [0.25], "write": [1.0]}))
    manager.take_in(both)
    context, keys = request(manager, "r", 4)
    output = manager.prepare_store(keys, context)
    stats = manager.get_stats().data
    assert stats["types"]["kvoffload_transfer_latency_seconds"] == "histogram"
    assert stats["data"]["kvoffload_transfer_latency_seconds"] == {("read",): [0.5, 0.25], ("write",): [1.0]}
    assert stats["data"]["kvoffload_queued_blocks"] == {("store",): 4}
    manager.complete_store(set(output.keys_to_store), context)
    manager.prepare_load(keys, context)
    assert manager.get_stats().data["data"]["kvoffload_queued_blocks"] == {("store",): 0, ("load",): 4}
    manager.complete_load(keys, context)
    found = manager.get_stats().data["data"]
    assert len(found["kvoffload_load_seconds"]["dram",]) == 1
    assert "kvoffload_transfer_latency_seconds" not in found


def test_writes_stay_within_the_budget_and_its_metrics_say_so_over_a_restart_too(tmp_path, monkeypatch):
    monkeypatch.setattr("kvoffload.store.wear.find_nvme", lambda: None)
    block = slot_bytes(PAYLOAD)
    per_day = 24 * 16 * block / 1e9  # an hour's are sixteen blocks, of which half are there at start
    settings = {"nvme_path": str(tmp_path), "ssd_kv_offload_gb": 0.01, "ssd_write_gb_per_day": per_day}
    manager = adapter(**settings)

    def write(demotions) -> dict:
        manager.take_in(TransferReport(demoted=dict.fromkeys((demotion.id for demotion in demotions), 1)))
        return manager.get_stats().data["data"]

    first, keys = request(manager, "r", 12)
    store(manager, first, keys)
    stats = write(end_step(manager).demotions)
    assert stats["kvoffload_refused_admissions_total"] == {("budget",): 1, ("behind",): 11}
    assert stats["kvoffload_write_budget_left_bytes"] == {(): 8 * block}
    manager.on_request_finished(first)
    second, _ = request(manager, "r2", 12)
    manager.on_request_finished(second)
    demotions = end_step(manager).demotions
    assert [demotion.key for demotion in demotions] == keys[:8]
    stats = write(demotions)
    assert stats["kvoffload_write_budget_left_bytes"] == {(): 0}
    assert stats["kvoffload_ssd_written_today_bytes"] == {(): 8 * block}
    assert stats["kvoffload_useful_write_ratio"] == {(): 0}
    manager.shutdown()

    manager = adapter(**settings, resume_kv_cache=False)  # for no engine wrote a slot; minutes would have to pass for a block
    third, others = request(manager, "r3", 12, prompt=b"q")
    store(manager, third, others)
    manager.on_request_finished(third)
    fourth, _ = request(manager, "r4", 12, prompt=b"q")
    manager.on_request_finished(fourth)  # now the blocks are used ones, which half a burst would be there for
    assert not end_step(manager).demotions
    assert manager.get_stats().data["data"]["kvoffload_write_budget_left_bytes"] == {(): 0}
    manager.shutdown()


def test_engines_divide_the_write_budget():
    settings = Config.parse({"nvme_path": "/a", "ssd_kv_offload_gb": 1, "ssd_write_gb_per_day": 86.4})
    shares = [write_budget(settings, Geometry(PAYLOAD, (PAYLOAD,), 2, engines, 8)) for engines in (1, 4)]
    assert shares == [86.4e9, 21.6e9]


def test_what_a_drive_says_of_its_wear_is_exported_by_its_number(tmp_path):
    manager = adapter(nvme_path=str(tmp_path), ssd_kv_offload_gb=0.01)
    manager._wear = SimpleNamespace(percentages=lambda: {0: 7})
    assert manager.get_stats().data["data"]["kvoffload_drive_percentage_used_ratio"] == {("0",): 0.07}
    manager.shutdown()


@pytest.mark.parametrize("second_runner", [True, False])
def test_the_connector_names_what_a_step_overwrites_if_the_model_runner_does_so_too_early(second_runner):
    manager = adapter()
    context, keys = request(manager, "r", 4)
    jobs = [begin_store(manager, context, keys[:3], [10, 11, 12], 1), begin_store(manager, context, keys[3:], [13], 2)]
    steps = iter([OffloadingConnectorMetadata({}, jobs[0], None), OffloadingConnectorMetadata({}, jobs[1], {2})])
    connector = KVOffloadConnector.__new__(KVOffloadConnector)
    connector._overwrites_first = second_runner
    connector.connector_scheduler = SimpleNamespace(manager=manager, build_connector_meta=lambda _: next(steps))
    idle = CachedRequestData.make_empty()
    rest = {"scheduled_cached_reqs": idle, "scheduled_new_reqs": [], "preempted_req_ids": None}
    nothing = SimpleNamespace(new_block_ids_to_zero=None, kv_cache_block_copies=None, **rest)
    copies = [KVCacheBlockCopy(src_block_id=12, dst_block_id=13)]
    something = SimpleNamespace(new_block_ids_to_zero=[10, 99], kv_cache_block_copies=copies, **rest)
    assert [connector.build_connector_meta(step).store_jobs for step in (nothing, something)] == jobs
    for job in jobs:
        manager.complete_store([key for key in keys if key in job[min(job)].dst_spec.keys], context)
    assert hits(manager, context, keys) == [not second_runner, True, True, not second_runner]


def test_what_a_waiting_request_looked_up_does_not_keep_others_from_storing_in_the_same_step():
    """vLLM 0.33 makes a step's stores before it says that the step ends."""
    manager = adapter(dram_slots=8)
    context, keys = request(manager, "waits", 8)
    store(manager, context, keys)
    manager.on_request_finished(context)
    waiting, _ = request(manager, "waits too", 8)
    assert hits(manager, waiting, keys) == [True] * 8
    other, others = request(manager, "runs", 4, prompt=b"q")
    manager.note_step(step())
    assert store(manager, other, others) == others
