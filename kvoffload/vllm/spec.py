"""What vLLM's offloading asks of a storage medium: an `OffloadingSpec` that gives it our manager and worker halves."""

from functools import partial
from typing import Any

from vllm.v1.kv_offload.base import (
    CanonicalKVCaches,
    OffloadingCounterMetadata,
    OffloadingGaugeMetadata,
    OffloadingHistogramMetadata,
    OffloadingManager,
    OffloadingMetricMetadata,
    OffloadingSpec,
    OffloadingWorker,
)
from vllm.v1.kv_offload.config import OffloadingConfig

from kvoffload.config import Config
from kvoffload.metrics import BUCKETS, METRICS
from kvoffload.vllm.geometry import Geometry
from kvoffload.vllm.manager import ManagerAdapter
from kvoffload.vllm.worker import OffWorker, open_worker

SPEC_NAME = "KVOffloadSpec"


def user_settings(extra_config: Any) -> Config:
    """The user's part of kv_connector_extra_config, checked."""
    return Config.parse({key: value for key, value in extra_config.items() if key != "spec_name"})


class KVOffloadSpec(OffloadingSpec):
    """vLLM makes one in the scheduler process and one per worker. The connector completes it after construction:
    its `geometry` comes from the KV-cache configuration, which a spec is not given."""

    geometry: Geometry

    @classmethod
    def build_metric_definitions(cls, extra_config: dict[str, Any]) -> dict[str, OffloadingMetricMetadata]:
        kinds = {
            "counter": OffloadingCounterMetadata,
            "gauge": OffloadingGaugeMetadata,
            "histogram": partial(OffloadingHistogramMetadata, buckets=BUCKETS),
        }
        return {name: kinds[metric.kind](documentation=metric.help, labelnames=metric.labels) for name, metric in METRICS.items()}

    def __init__(self, config: OffloadingConfig):
        super().__init__(config)
        self.settings = user_settings(config.extra_config)
        self.offload_prompt_only = self.settings.disable_long_token

    def get_manager(self) -> OffloadingManager:
        return ManagerAdapter(self.settings, self.config)

    def get_worker(self, kv_caches: CanonicalKVCaches) -> OffloadingWorker:
        if not self.settings.enabled:
            return OffWorker()
        return open_worker(self.settings, self.config, self.geometry, kv_caches)
