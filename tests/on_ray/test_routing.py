"""Which of Ray Serve's replicas a request is sent to. No cluster runs here."""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from ray.exceptions import ActorDiedError
from ray.serve._private.common import (
    DeploymentHandleSource,
    DeploymentID,
    ReplicaID,
    RequestMetadata,
    RunningReplicaInfo,
)
from ray.serve._private.request_router.common import PendingRequest
from ray.serve.request_router import RunningReplica

from lmray.engines.base import Request, Sampling, TokenEvent
from lmray.engines.openai import Openai
from lmray.errors import RemoteError
from lmray.job import ServeJob
from lmray.on_ray import waiting
from lmray.on_ray.deployments import SPARE_SLOTS, engine_version
from lmray.on_ray.replicas import RoutedReplicas
from lmray.on_ray.routing import AdapterRouter
from lmray.on_ray.waiting import WaitsForAdapter
from lmray.serve.prepare import prepare
from lmray.testing.listening import free_port

ROWS = 4
ENGINE = DeploymentID("engine", "endpoint")


class Replica(RunningReplica):
    """Has `load` calls of any kind, and no process."""

    def __init__(self, name: str, load: int):
        self.load = load
        self._replica_info = RunningReplicaInfo(ReplicaID(name, ENGINE), None, None, None, name, 2 * ROWS + SPARE_SLOTS)

    def update_replica_info(self, replica_info: RunningReplicaInfo) -> None:
        self._replica_info = replica_info

    async def get_queue_len(self, *, deadline_s: float) -> int:
        return self.load


ADAPTED = Request("r", (1,), Sampling(max_tokens=1), "helper@1")


def chosen(
    request: Request = ADAPTED, internal: str = "r", waits: dict[str, int] | None = None, /, **loads: int
) -> str | None:
    """The replica that a request is sent to, or None where it waits. `waits`: replica -> those that have begun to wait
    for their adapters there by then."""

    async def main() -> str | None:
        router = AdapterRouter(ENGINE, DeploymentHandleSource.REPLICA, use_replica_queue_len_cache=True)
        router.initialize_state(rows=ROWS, light=2)
        router.update_replicas([Replica(name, load) for name, load in loads.items()])
        waiting.COUNTS.update(waits or {})
        told = RequestMetadata(request_id=internal, internal_request_id=internal)
        pending = PendingRequest([request], {}, told)
        for candidates in await router.choose_replicas(list(router.curr_replicas.values()), pending):
            if (found := await router._select_from_candidate_replicas(candidates, 0)) is not None:
                return found.replica_id.unique_id
        return None

    return asyncio.run(main())


def test_no_request_takes_a_slot_that_is_for_calls_to_every_replica():
    assert chosen(full=ROWS) is chosen(full=ROWS + 1) is None
    assert chosen(full=ROWS, free=ROWS - 1) == "free"


@pytest.mark.parametrize(
    ("num_waiting", "load", "replica"),
    [
        (2, ROWS + 1, "full"),
        (2, ROWS + 2, None),
        (99, 2 * ROWS - 1, "full"),
        (99, 2 * ROWS, None),
    ],
)
def test_requests_that_wait_for_their_adapter_keep_no_rows_from_others(monkeypatch, num_waiting, load, replica):
    """As many again as there are rows, and no more."""
    monkeypatch.setattr(waiting, "COUNTS", Counter())
    assert chosen(ADAPTED, "r", {"full": num_waiting}, full=load) == replica
    assert chosen(other=ROWS) is None


def test_who_sends_a_request_counts_it_as_waiting_until_its_first_token_or_its_end():
    seen: list[dict[str, int]] = []
    first, second = WaitsForAdapter("a"), [TokenEvent("r", 1)]

    async def ask(*lists) -> None:
        replicas = RoutedReplicas(FakeHandle(lists))  # type: ignore[arg-type]
        async with aclosing(replicas.stream(ADAPTED)) as events:
            async for _ in events:
                seen.append(dict(waiting.COUNTS))

    asyncio.run(ask(first, lambda: seen.append(dict(waiting.COUNTS)), second))
    assert seen == [{"a": 1}, {}]
    with pytest.raises(RemoteError):
        asyncio.run(ask(first, ActorDiedError()))
    assert not waiting.COUNTS

    async def leave() -> None:
        ends = asyncio.ensure_future(ask(first, asyncio.Event()))
        while not waiting.COUNTS:
            await asyncio.sleep(0)
        ends.cancel()
        await asyncio.gather(ends, return_exceptions=True)

    asyncio.run(leave())
    assert not waiting.COUNTS


class FakeHandle:
    """Gives `lists` to whoever streams; calls what can be called, raises what is an error."""

    def __init__(self, lists):
        self.lists, self.stream = lists, SimpleNamespace(remote=lambda request: self)

    def options(self, **told):
        return self

    def cancel(self):
        pass

    async def __aiter__(self):
        for one in self.lists:
            if isinstance(one, Exception):
                raise one
            if isinstance(one, asyncio.Event):
                await one.wait()
            elif callable(one):
                one()
            else:
                yield one


def endpoint(model: Path, root: Path) -> ServeJob:
    return ServeJob.model_validate(
        {
            "name": "endpoint",
            "model": {"source": str(model)},
            "adapters": [{"artifact": "*", "stage": "production", "canary": {"share": 0.1}}],
            "engine": {"name": "native", "max_length": 64, "max_adapters": 2},
            "http": {"port": free_port()},
            "storage": str(root),
        }
    )


@pytest.mark.parametrize(
    ("changes", "stays"),
    [
        ({"http.limits.max_body_bytes": 5000, "http.page": False, "monitor.sample_fraction": 0.5}, True),
        ({"filters": [{"name": "regex", "label": "x", "pattern": "x"}], "autoscaling.min_replicas": 0}, True),
        ({"http.api_keys_file": "KEYS", "http.admin_keys_file": "KEYS"}, True),
        ({"adapters": [{"artifact": "*", "stage": "production", "canary": {"share": 0.7}}]}, True),
        ({"adapters": [{"artifact": "*", "stage": "production", "canary": {"stage": "candidate"}}]}, False),
        ({"adapters": [{"artifact": "a*", "stage": "production"}]}, False),
        ({"engine.max_length": 32}, False),
        ({"engine.max_batch_size": 2}, False),
        ({"model.dtype": "bfloat16"}, False),
        ({"http.stream_interval_s": 1.0}, False),
        ({"adapter_cache.max_bytes": 123456}, False),
    ],
)
def test_engines_are_replaced_for_what_they_need_to_know_alone(tmp_path, tiny_model, changes, stays):
    job = endpoint(tiny_model, tmp_path)
    keys = {name: tmp_path / name for name, value in changes.items() if value == "KEYS"}
    for name, path in keys.items():
        path.write_text(f"key of {name}\n")
    other = job.changed({**changes, **{name: str(path) for name, path in keys.items()}})
    plans = [replace(prepare(one), adapters={"a": version}) for one, version in ((job, "1"), (other, "2"))]
    versions = [engine_version(one, plan, 1) for one, plan in zip((job, other), plans, strict=True)]
    assert (versions[0] == versions[1]) is stays
    assert engine_version(job, plans[0], 2) != versions[0] != engine_version(job, plans[0], 1, num_lost=1)


def test_another_key_of_the_server_behind_an_engine_replaces_it(tmp_path, tiny_model):
    path = tmp_path / "key"
    engine = Openai(url="http://localhost:1", model="m", max_length=64, api_key_file=str(path))
    plain = endpoint(tiny_model, tmp_path)
    job, plan = plain.model_copy(update={"engine": engine}), prepare(plain)

    def version(key: str) -> str:
        path.write_text(key)
        return engine_version(job, plan, 1)

    assert version("one") == version("one") != version("other")


def test_prompts_to_the_base_that_begin_alike_meet_and_others_are_spread():
    idle = {"a": 0, "b": 0, "c": 0}

    def home(number: int, *prompt_ids: int) -> str | None:
        return chosen(Request(str(number), prompt_ids, Sampling(max_tokens=1)), str(number), **idle)

    assert len({home(number, *range(64), number) for number in range(6)}) == 1
    assert len({home(0, number) for number in range(20)}) == 3
