"""Which of Ray Serve's replicas a request is sent to. No cluster runs here."""

from __future__ import annotations

import asyncio

from ray.serve._private.common import (
    DeploymentHandleSource,
    DeploymentID,
    ReplicaID,
    RequestMetadata,
    RunningReplicaInfo,
)
from ray.serve._private.request_router.common import PendingRequest
from ray.serve.request_router import RunningReplica

from lmray.engines.base import Request, Sampling
from lmray.on_ray.deployments import SPARE_SLOTS
from lmray.on_ray.routing import AdapterRouter

MOST = 4
ENGINE = DeploymentID("engine", "endpoint")


class Replica(RunningReplica):
    """Has `load` calls of any kind, and no process."""

    def __init__(self, name: str, load: int):
        self.load = load
        self._replica_info = RunningReplicaInfo(ReplicaID(name, ENGINE), None, None, None, name, MOST + SPARE_SLOTS)

    def update_replica_info(self, replica_info: RunningReplicaInfo) -> None:
        self._replica_info = replica_info

    async def get_queue_len(self, *, deadline_s: float) -> int:
        return self.load


ADAPTED = Request("r", (1,), Sampling(max_tokens=1), "helper@1")


def chosen(request: Request = ADAPTED, internal: str = "r", /, **loads: int) -> str | None:
    """The replica that a request is sent to, or None where it waits."""

    async def main() -> str | None:
        router = AdapterRouter(ENGINE, DeploymentHandleSource.REPLICA, use_replica_queue_len_cache=True)
        router.initialize_state(most=MOST, light=2)
        router.update_replicas([Replica(name, load) for name, load in loads.items()])
        told = RequestMetadata(request_id=internal, internal_request_id=internal)
        pending = PendingRequest([request], {}, told)
        for candidates in await router.choose_replicas(list(router.curr_replicas.values()), pending):
            if (found := await router._select_from_candidate_replicas(candidates, 0)) is not None:
                return found.replica_id.unique_id
        return None

    return asyncio.run(main())


def test_no_request_takes_a_slot_that_is_for_calls_to_every_replica():
    assert chosen(full=MOST) is chosen(full=MOST + 1) is None
    assert chosen(full=MOST, free=MOST - 1) == "free"


def test_prompts_to_the_base_that_begin_alike_meet_and_others_are_spread():
    idle = {"a": 0, "b": 0, "c": 0}

    def home(number: int, *prompt_ids: int) -> str | None:
        return chosen(Request(str(number), prompt_ids, Sampling(max_tokens=1)), str(number), **idle)

    assert len({home(number, *range(64), number) for number in range(6)}) == 1
    assert len({home(0, number) for number in range(20)}) == 3
