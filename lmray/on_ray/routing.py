"""Ray Serve's request router for engine replicas: asks `lmray.policies.placement` and converts types.

Runs wherever requests start, that is in the gateway. Calls that are no requests to generate are spread.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ray.serve.experimental.consistent_hash_router import ConsistentHashRouter
from ray.serve.request_router import PendingRequest, RunningReplica

from lmray.engines.base import Request
from lmray.on_ray import waiting  # the module: Ray Serve makes this class anew from its code, with copies of values
from lmray.policies.placement import key_of, ranked


class AdapterRouter(ConsistentHashRouter):
    """Tries replicas in the order of the request's adapter, or of the beginning of its prompt. Ray's own router of
    this kind keeps a request with the order that was chosen for it, however many wait, which Serve's default does
    not; its hash ring is not used."""

    def initialize_state(self, *, rows: int, light: int = 1, **told: Any) -> None:
        """`rows`: requests that a replica gets at a time, fewer than calls of all kinds that it takes; besides those
        that wait for their adapters, of which it takes as many again."""
        super().initialize_state(**told)
        self._light, self._rows = light, rows

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        for replica in replicas:
            self._limit(replica)
        super().update_replicas(replicas)

    def _limit(self, replica: RunningReplica) -> None:
        most = self._rows + min(waiting.COUNTS[replica.replica_id.unique_id], self._rows)
        if replica.max_ongoing_requests != most:
            replica.update_replica_info(replace(replica._replica_info, max_ongoing_requests=most))

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        if not candidate_replicas or pending_request is None:
            return [candidate_replicas] if candidate_replicas else []
        pending_request.routing_context.should_backoff = True
        for replica in candidate_replicas:
            self._limit(replica)
        by_name = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        lengths = self.replica_queue_len_cache
        loads = {name: lengths.get(replica.replica_id) or 0 for name, replica in by_name.items()}
        return [[by_name[name]] for name in ranked(_key(pending_request), loads, light=self._light)]


def _key(pending: PendingRequest) -> str:
    asked = pending.args[0] if pending.args else None
    if isinstance(asked, Request):
        return key_of(asked.adapter, asked.prompt_ids, asked.cache_salt)
    return pending.metadata.internal_request_id
