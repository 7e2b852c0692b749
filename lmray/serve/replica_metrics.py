"""What the engine replicas tell of themselves, as Prometheus reads it; one label, the replica.

Each has series of its own: a sum over replicas would fall when one goes, which Prometheus takes for a counter that
began anew.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from lmray.errors import LmrayError
from lmray.metrics.names import SERVE

_LOG = logging.getLogger(__name__)
Stats = Mapping[str, Any]
READ: dict[str, Callable[[Stats], float | None]] = {
    "lmray_serve_engine_failed": lambda stats: stats.get("failure") is not None,
    "lmray_serve_engine_running_requests": lambda stats: stats.get("running"),
    "lmray_serve_engine_waiting_requests": lambda stats: stats.get("waiting"),
    "lmray_serve_engine_waiting_tokens": lambda stats: stats.get("waiting_tokens"),
    "lmray_serve_engine_generated_tokens_total": lambda stats: stats.get("generated_tokens"),
    "lmray_serve_kv_blocks": lambda stats: stats.get("num_blocks"),
    "lmray_serve_kv_blocks_used": lambda stats: _used(stats),
    "lmray_serve_preemptions_total": lambda stats: stats.get("preemptions"),
    "lmray_serve_prefix_hit_tokens_total": lambda stats: stats.get("prefix_hit_tokens"),
    "lmray_serve_adapter_cache_adapters": lambda stats: len(_held(stats)),
    "lmray_serve_adapter_cache_bytes": lambda stats: sum(one["num_bytes"] for one in _held(stats)),
    "lmray_serve_adapter_cache_hits_total": lambda stats: _part(stats, "cache").get("hits"),
    "lmray_serve_adapter_cache_loads_total": lambda stats: _part(stats, "cache").get("loads"),
    "lmray_serve_adapter_cache_evictions_total": lambda stats: _part(stats, "cache").get("evictions"),
    "lmray_serve_adapter_cache_failures_total": lambda stats: _part(stats, "cache").get("failures"),
    "lmray_serve_speculation_proposed_tokens_total": lambda stats: _part(stats, "speculation").get("proposed"),
    "lmray_serve_speculation_accepted_tokens_total": lambda stats: _part(stats, "speculation").get("accepted"),
    "lmray_serve_speculation_gain": lambda stats: _part(stats, "speculation").get("gain"),
    "lmray_serve_speculation_active": lambda stats: _part(stats, "speculation").get("active"),
    "lmray_serve_server_running_requests": lambda stats: _part(stats, "server").get("running"),
    "lmray_serve_server_waiting_requests": lambda stats: _part(stats, "server").get("waiting"),
    "lmray_serve_server_kv_cache_fraction": lambda stats: _part(stats, "server").get("kv_cache_fraction"),
    "lmray_serve_server_preemptions_total": lambda stats: _part(stats, "server").get("preemptions"),
    "lmray_serve_server_prefix_hit_tokens_total": lambda stats: _part(stats, "server").get("prefix_hit_tokens"),
    "lmray_serve_server_prompt_tokens_total": lambda stats: _part(stats, "server").get("prompt_tokens"),
    "lmray_serve_server_generated_tokens_total": lambda stats: _part(stats, "server").get("generated_tokens"),
}
"""Each metric from what a replica tells; None where its engine has no such number."""


class ReplicaMetrics(Collector):
    """What all replicas told last."""

    def __init__(self, ask: Callable[[], Awaitable[Sequence[Stats]]]):
        """`ask`: what every replica tells, which must not take long; raises LmrayError."""
        self._ask = ask
        self._told: Sequence[Stats] = []

    async def look(self) -> None:
        """What the page tells next. Replicas that fail to answer are left out."""
        try:
            self._told = await self._ask()
        except LmrayError as error:
            self._told = []
            _LOG.warning("the replicas do not tell their numbers: %s", error)

    def collect(self) -> Iterator[Metric]:
        yield _family("lmray_serve_replicas", [((), len(self._told))])
        for name, read in READ.items():
            values = [((str(stats.get("replica", place)),), read(stats)) for place, stats in enumerate(self._told)]
            yield _family(name, [(labels, value) for labels, value in values if value is not None], ["replica"])


def _family(name: str, values: list[tuple[tuple[str, ...], float]], labels: list[str] | None = None) -> Metric:
    kind = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
    family = kind(name, SERVE[name].help, labels=labels or [])
    for names, value in values:
        family.add_metric(names, value)
    return family


def _used(stats: Stats) -> float | None:
    return stats["num_blocks"] - stats["free_blocks"] if "num_blocks" in stats else None


def _part(stats: Stats, name: str) -> Mapping[str, Any]:
    return stats.get(name) or {}


def _held(stats: Stats) -> list[Mapping[str, Any]]:
    return _part(stats, "cache").get("held", [])
