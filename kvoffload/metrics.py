"""The metrics kvoffload exports, in Prometheus conventions: base units, `_total` for counters, bounded labels.

Counters are kept by whoever sees the event, under (name, label values...), and travel to the process that exports
them. vLLM registers and exports them; see kvoffload/vllm/spec.py.
"""

from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

from kvoffload.types import OpKind, Tier


class Metric(NamedTuple):
    kind: str  # "counter", "gauge" or "histogram"
    help: str
    labels: tuple[str, ...] = ()


# Seconds. From a block out of DRAM to a load at its deadline.
BUCKETS = (1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2, 2.5e-2, 5e-2, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
OBSERVATIONS_MAX = 4000  # of a series that wait to be exported
# Of the labels whose values are known before anything happened.
VALUES = {
    "tier": tuple(tier.value for tier in Tier),
    "direction": tuple(kind.name.lower() for kind in OpKind),
    "activity": ("load", "prefill"),
    "deadline": ("operation", "request"),
}
ALERTED = ("EIO", "EBADMSG")  # reasons of reads that fail, of which an alert asks the rate


def zeros() -> Iterator[tuple[str, ...]]:
    """Counters, with label values, that are exported as 0 from the start: of a series that is not there no rate can be told from
    none, and its first increase is lost."""
    for name, metric in METRICS.items():
        if metric.kind == "counter" and set(metric.labels) <= VALUES.keys():
            yield from ((name, *values) for values in product(*(VALUES[label] for label in metric.labels)))
    for reason in ALERTED:
        yield "kvoffload_transfer_failures_total", OpKind.READ.name.lower(), reason


METRICS = {
    "kvoffload_capacity_bytes": Metric("gauge", "Bytes of all slots of the tier, all ranks.", ("tier",)),
    "kvoffload_used_bytes": Metric("gauge", "Bytes of the tier's slots that hold a block, all ranks.", ("tier",)),
    "kvoffload_hit_blocks_total": Metric(
        "counter", "Blocks whose load was started for a request, by the tier they were in.", ("tier",)
    ),
    "kvoffload_hit_tokens_total": Metric(
        "counter", "Prompt tokens that requests set out to load, by the tier they were in.", ("tier",)
    ),
    "kvoffload_missed_tokens_total": Metric("counter", "Prompt tokens that were neither in GPU memory nor loaded."),
    "kvoffload_missed_lookups_total": Metric(
        "counter", "Lookups of a block, repeated ones too, that was in no tier that may be loaded from."
    ),
    "kvoffload_stored_blocks_total": Metric("counter", "Blocks accepted into DRAM slots."),
    "kvoffload_dropped_stores_total": Metric("counter", "Blocks not stored because no slot was free."),
    "kvoffload_demotions_total": Metric("counter", "Blocks written to the SSD."),
    "kvoffload_read_back_blocks_total": Metric(
        "counter", "Of the blocks written to the SSD, those read from there at least once: useful writes."
    ),
    "kvoffload_useful_write_ratio": Metric("gauge", "The same as a share of the blocks written, all since the start."),
    "kvoffload_refused_admissions_total": Metric(
        "counter", "Times that a block was not written to the SSD when it could have been.", ("reason",)
    ),  # reason: first_use, budget, behind (a block before it in its prefix was refused), own_head (none but those could make room)
    "kvoffload_ssd_written_today_bytes": Metric(
        "gauge", "Bytes of slots written to the SSD by this process since 00:00 UTC, all ranks."
    ),
    "kvoffload_write_budget_left_bytes": Metric("gauge", "Bytes that may be written to the SSD now; only with a budget."),
    "kvoffload_drive_percentage_used_ratio": Metric(
        "gauge", "Endurance used up as the drive itself estimates it, 1: all; only where it tells.", ("drive",)
    ),
    "kvoffload_demotion_failures_total": Metric("counter", "Blocks that could not be written to the SSD.", ("reason",)),
    "kvoffload_drive_state": Metric(
        "gauge", "0: in use, 1: on trial, with as little as possible, 2: left alone after failures.", ("drive", "direction")
    ),  # drive: number of the path in nvme_path, from 0; direction: read, write
    "kvoffload_drive_openings_total": Metric(
        "counter", "Times a drive was left alone after failures, failed trials too.", ("drive", "direction", "reason")
    ),
    "kvoffload_evictions_total": Metric("counter", "Blocks evicted from the tier.", ("tier",)),
    "kvoffload_load_failures_total": Metric("counter", "Blocks that could not be loaded and were recomputed."),
    "kvoffload_load_seconds": Metric(
        "histogram", "Loads of a request, from asking to having all of it, those that failed too, by the slowest tier.", ("tier",)
    ),
    "kvoffload_queued_blocks": Metric("gauge", "Blocks in flight or waiting for it.", ("queue",)),
    # queue: load, store (out of the KV cache), demotion (to the SSD), demotion_waiting
    "kvoffload_load_decisions_total": Metric(
        "counter", "Requests of which something could have been loaded, by what was decided and why.", ("decision", "reason")
    ),  # decision: load, part, recompute, and besides read (of a slow SSD); reason: faster, learning, probe, asked
    "kvoffload_predicted_seconds_total": Metric(
        "counter", "Sum of what loads and prefills were predicted to take.", ("activity",)
    ),  # activity: load, prefill
    "kvoffload_actual_seconds_total": Metric("counter", "Sum of what those with a prediction took.", ("activity",)),
    "kvoffload_prediction_error_seconds_total": Metric(
        "counter", "Sum of the differences between the two, without their sign.", ("activity",)
    ),
    "kvoffload_prefill_tokens_per_second": Metric("gauge", "Learned rate of computing a prompt of 1,000 tokens."),
    "kvoffload_load_bytes_per_second": Metric("gauge", "Learned rate of loading 100 MB a rank, latency included.", ("tier",)),
    "kvoffload_store_failures_total": Metric("counter", "Blocks that could not be copied out of the KV cache."),
    "kvoffload_transfer_bytes_total": Metric(
        "counter", "Payload bytes moved, all ranks.", ("direction",)
    ),  # direction: copy_out, copy_in, write, read
    "kvoffload_transfer_seconds_total": Metric(
        "counter", "Sum over transfers of the time from submission to completion, all ranks.", ("direction",)
    ),
    "kvoffload_transfer_latency_seconds": Metric(
        "histogram", "Transfers of a block, from submission to completion, all ranks; of many in a step some.", ("direction",)
    ),
    "kvoffload_deadlines_missed_total": Metric(
        "counter", "Transfers that were not done in time, all ranks.", ("direction", "deadline")
    ),  # deadline: operation (what any drive or GPU is given), request (it would rather recompute)
    "kvoffload_transfer_failures_total": Metric(
        "counter", "Transfers that failed, all ranks, by errno name.", ("direction", "reason")
    ),
}
