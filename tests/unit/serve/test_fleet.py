"""From names to versions to replicas: what a request is turned into, and what happens when a replica dies."""

from __future__ import annotations

import asyncio

import pytest

from lmray.engines.base import Request, Sampling, TokenEvent
from lmray.errors import ArtifactError, CapacityError, RemoteError
from lmray.job import ServedAdapter
from lmray.serve.catalogue import Catalogue
from lmray.serve.fleet import Fleet
from tests.unit.serve.stores import FIT, SmallStore


class FakeReplicas:
    """Each attempt sends tokens, then ends as it is told."""

    def __init__(self, *endings: Exception | None, num_tokens: tuple[int, ...] = ()):
        self.endings, self.num_tokens = list(endings), list(num_tokens)
        self.requests: list[Request] = []

    async def stream(self, request: Request):
        self.requests.append(request)
        for token in range(self.num_tokens.pop(0) if self.num_tokens else 2):
            yield TokenEvent(request.id, token)
        if (ending := self.endings.pop(0) if self.endings else None) is not None:
            raise ending

    async def everywhere(self, method, *arguments):
        return []


@pytest.fixture
def small(tmp_path) -> SmallStore:
    return SmallStore(tmp_path)


def make(small: SmallStore, replicas: FakeReplicas) -> Fleet:
    catalogue = Catalogue(small.store, [ServedAdapter(artifact="*", stage="production")], FIT)
    catalogue.refresh()
    return Fleet(replicas, catalogue)


def ask(fleet: Fleet, adapter: str | None = None) -> list[int | None]:
    async def main():
        request = Request("r", (1,), Sampling(max_tokens=4), adapter)
        return [event.token_id async for event in fleet.stream(request)]

    return asyncio.run(main())


DEAD = RemoteError("endpoint", "no replica answered: ActorDiedError")


def test_a_request_names_the_version_its_name_stands_for(small):
    artifact = small.keep("helper", stage="production")
    replicas = FakeReplicas()
    fleet = make(small, replicas)
    assert ask(fleet, "helper") == [0, 1] and ask(fleet) == [0, 1]
    assert [request.adapter for request in replicas.requests] == [artifact.ref, None]
    assert asyncio.run(fleet.adapters()) == ("helper",)
    with pytest.raises(ArtifactError, match="`helpr`: is not served\n  hint: did you mean `helper`"):
        ask(fleet, "helpr")


def test_a_request_whose_replica_died_before_its_first_token_is_sent_again(small):
    small.keep("helper", stage="production")
    replicas = FakeReplicas(DEAD, num_tokens=(0, 3))
    assert ask(make(small, replicas), "helper") == [0, 1, 2]
    first, second = replicas.requests
    assert first == second


@pytest.mark.parametrize(
    ("replicas", "num_requests"),
    [
        (FakeReplicas(DEAD, num_tokens=(1,)), 1),
        (FakeReplicas(DEAD, DEAD, num_tokens=(0, 0)), 2),
        (FakeReplicas(CapacityError("endpoint", "too many"), num_tokens=(0,)), 1),
    ],
)
def test_nothing_is_sent_again_after_a_token_nor_for_ever(small, replicas, num_requests):
    with pytest.raises((RemoteError, CapacityError)):
        ask(make(small, replicas))
    assert len(replicas.requests) == num_requests
