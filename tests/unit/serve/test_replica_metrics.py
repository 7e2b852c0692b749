"""What replicas tell of themselves on the page of metrics."""

from __future__ import annotations

import asyncio
from functools import partial

from lmray.engines._remote import METRICS
from lmray.errors import RemoteError
from lmray.serve.metrics import Metrics
from lmray.serve.replica_metrics import ReplicaMetrics
from tests.unit.serve.test_envelope import metrics as samples_of

PAGED = {
    "replica": "x1",
    "waiting": 3,
    "running": 4,
    "waiting_tokens": 50,
    "free_blocks": 70,
    "num_blocks": 100,
    "preemptions": 1,
    "prefix_hit_tokens": 640,
    "generated_tokens": 999,
    "failure": None,
    "cache": {
        "held": [{"handle": "a@1", "num_bytes": 10}, {"handle": "b@2", "num_bytes": 32}],
        "hits": 5,
        "loads": 2,
        "evictions": 1,
        "failures": 0,
    },
    "speculation": {"proposed": 40, "accepted": 30, "gain": 1.4, "active": True},
}
SERVER = {
    "running": 6,
    "waiting": 2,
    "kv_cache_fraction": 0.25,
    "preemptions": 1,
    "prefix_hit_tokens": 64,
    "prompt_tokens": 500,
    "generated_tokens": 70,
}
REMOTE = {"replica": "x3", "waiting": 0, "running": 5, "generated_tokens": 60, "failure": None, "server": SERVER}
PLAIN = {"replica": "x2", "waiting": 0, "running": 1, "generated_tokens": 7, "failure": "a step failed"}


class Replicas:
    """Tells `stats`, or raises it."""

    def __init__(self, *stats):
        self.stats = list(stats)

    async def everywhere(self, method, *arguments):
        assert (method, arguments) == ("stats", ())
        for one in self.stats:
            if isinstance(one, Exception):
                raise one
        return list(self.stats)


def pages(replicas: Replicas, *before):
    """A page after each of `before`, which change something."""

    async def main():
        metrics, numbers = Metrics(), ReplicaMetrics(partial(replicas.everywhere, "stats"))
        metrics.add(numbers, numbers.look)
        found = []
        for change in before or (lambda: None,):
            change()
            found.append(samples_of((await metrics.page()).decode()))
        return found

    return asyncio.run(main())


def test_each_replica_has_a_series_of_all_that_its_engine_tells():
    [found] = pages(Replicas(PAGED, PLAIN))
    assert found["lmray_serve_replicas"] == 2
    told = {name.partition("{")[0]: value for name, value in found.items() if 'replica="x1"' in name}
    assert told == {
        "lmray_serve_engine_failed": 0,
        "lmray_serve_engine_running_requests": 4,
        "lmray_serve_engine_waiting_requests": 3,
        "lmray_serve_engine_waiting_tokens": 50,
        "lmray_serve_engine_generated_tokens_total": 999,
        "lmray_serve_kv_blocks": 100,
        "lmray_serve_kv_blocks_used": 30,
        "lmray_serve_preemptions_total": 1,
        "lmray_serve_prefix_hit_tokens_total": 640,
        "lmray_serve_adapter_cache_adapters": 2,
        "lmray_serve_adapter_cache_bytes": 42,
        "lmray_serve_adapter_cache_hits_total": 5,
        "lmray_serve_adapter_cache_loads_total": 2,
        "lmray_serve_adapter_cache_evictions_total": 1,
        "lmray_serve_adapter_cache_failures_total": 0,
        "lmray_serve_speculation_proposed_tokens_total": 40,
        "lmray_serve_speculation_accepted_tokens_total": 30,
        "lmray_serve_speculation_gain": 1.4,
        "lmray_serve_speculation_active": 1,
    }
    assert found['lmray_serve_engine_failed{replica="x2"}'] == 1
    assert 'lmray_serve_kv_blocks{replica="x2"}' not in found


def test_an_engine_in_front_of_a_server_tells_the_servers_own_figures_too():
    [found] = pages(Replicas(REMOTE))
    told = {name.partition("{")[0]: value for name, value in found.items() if "lmray_serve_server" in name}
    assert told == {
        "lmray_serve_server_running_requests": 6,
        "lmray_serve_server_waiting_requests": 2,
        "lmray_serve_server_kv_cache_fraction": 0.25,
        "lmray_serve_server_preemptions_total": 1,
        "lmray_serve_server_prefix_hit_tokens_total": 64,
        "lmray_serve_server_prompt_tokens_total": 500,
        "lmray_serve_server_generated_tokens_total": 70,
    }
    assert set(METRICS.values()) == SERVER.keys(), "all that is read there"


def test_replicas_that_are_gone_or_fail_are_not_told_of(caplog):
    replicas = Replicas(PAGED)

    def fail():
        replicas.stats = [RemoteError("endpoint", "no replica answered")]

    def gone():
        replicas.stats = []

    there, failed, none = pages(replicas, lambda: None, fail, gone)
    assert [one["lmray_serve_replicas"] for one in (there, failed, none)] == [1, 0, 0]
    assert not any("replica=" in name for name in {**failed, **none})
    assert "no replica answered" in caplog.text
