"""From names to versions to replicas: what a request is turned into, and what happens when a replica dies."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
from contextlib import suppress

import pytest

from lmray.artifacts.served import Canary, ServedAdapter
from lmray.engines.base import Request, Sampling, TokenEvent
from lmray.errors import ArtifactError, CapacityError, DataError, LmrayError, NoRoomError, RemoteError
from lmray.serve import fleet as fleet_module
from lmray.serve.canaries import Canaries
from lmray.serve.catalogue import Catalogue
from lmray.serve.fleet import Fleet
from lmray.serve.visitors import VISITOR
from tests.unit.serve.stores import FIT, SmallStore


class FakeReplicas:
    """Each attempt sends tokens, then ends as it is told."""

    def __init__(self, *endings: Exception | None, num_tokens: tuple[int, ...] = ()):
        self.endings, self.num_tokens = list(endings), list(num_tokens)
        self.requests: list[Request] = []
        self.running: list[dict] = []

    async def stream(self, request: Request):
        self.requests.append(request)
        for token in range(self.num_tokens.pop(0) if self.num_tokens else 2):
            yield TokenEvent(request.id, token)
        if (ending := self.endings.pop(0) if self.endings else None) is not None:
            raise ending

    async def everywhere(self, method, *arguments):
        return self.running


@pytest.fixture
def small(tmp_path) -> SmallStore:
    return SmallStore(tmp_path)


def make(small: SmallStore, replicas: FakeReplicas, canary: Canary | None = None, **told) -> Fleet:
    served = ServedAdapter(artifact="*", stage="production", canary=canary)
    catalogue = Catalogue(small.store, [served], FIT)
    catalogue.refresh()
    now = itertools.count()
    return Fleet(replicas, catalogue, Canaries(small.store, "endpoint"), clock=lambda: float(next(now)), **told)


def ask(fleet: Fleet, adapter: str | None = None, *, name: str = "r") -> list[int | None]:
    async def main():
        request = Request(name, (1,), Sampling(max_tokens=4), adapter)
        tokens = [event.token_id async for event in fleet.stream(request)]
        await asyncio.gather(*fleet.canaries._writing)
        return tokens

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
    assert second == dataclasses.replace(first, id="r-2"), "the first may still run where its replica did not die"


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


def test_a_request_whose_replica_died_waits_for_room_on_the_others(small, monkeypatch):
    monkeypatch.setattr(fleet_module, "RESEND_S", 0.0)
    full = CapacityError("endpoint", "too many requests are waiting")
    replicas = FakeReplicas(DEAD, full, full, num_tokens=(0, 0, 0, 2))
    assert ask(make(small, replicas)) == [0, 1]
    assert [request.id for request in replicas.requests] == ["r", "r-2", "r-2", "r-2"]
    for_ever = FakeReplicas(DEAD, *[full] * 99, num_tokens=(0,) * 99)
    with pytest.raises(CapacityError):
        ask(make(small, for_ever))
    assert 5 < len(for_ever.requests) < 20, "the clock of this test goes on by a second a look"


def test_a_second_try_gets_the_version_of_the_first_whatever_was_promoted_meanwhile(small):
    first = small.keep("helper", "one", stage="production").ref

    class Promoting(FakeReplicas):
        async def stream(self, request: Request):
            if not self.requests:
                small.keep("helper", "two", stage="production")
                fleet.catalogue.refresh()
            async for event in super().stream(request):
                yield event

    replicas = Promoting(DEAD, num_tokens=(0, 1))
    fleet = make(small, replicas)
    assert ask(fleet, "helper") == [0]
    assert [request.adapter for request in replicas.requests] == [first, first]
    ask(fleet, "helper")
    assert replicas.requests[-1].adapter != first


@pytest.mark.parametrize("promoted", [True, False])
def test_a_version_whose_room_a_promotion_took_is_answered_by_what_was_promoted(small, promoted):
    old = small.keep("helper", "old", stage="production").ref
    replicas = FakeReplicas(NoRoomError("adapter", "does not fit"), num_tokens=(0, 2))
    fleet = make(small, replicas)
    if promoted:
        new = small.keep("helper", "new", stage="production").ref
        assert ask(fleet, "helper") == [0, 1]
        assert [request.adapter for request in replicas.requests] == [old, new]
    else:
        with pytest.raises(NoRoomError):
            ask(fleet, "helper")


@pytest.mark.parametrize("min_replicas", [0, 1])
def test_an_endpoint_is_ready_while_a_replica_runs_or_none_has_to(small, min_replicas):
    replicas = FakeReplicas()
    fleet = make(small, replicas, min_replicas=min_replicas)
    replicas.running = [{"failure": None}]
    asyncio.run(fleet.ready())
    replicas.running = []
    if min_replicas == 0:
        asyncio.run(fleet.ready())
    else:
        with pytest.raises(RemoteError, match="no replica runs\n  hint: wait for one to start"):
            asyncio.run(fleet.ready())


def test_a_merged_model_has_replicas_of_its_own_that_know_no_adapter(small):
    small.keep("helper", stage="production")
    base, own = FakeReplicas(), FakeReplicas(DEAD, num_tokens=(0, 1))
    fleet = make(small, base, merged={"fast": own})
    assert asyncio.run(fleet.adapters()) == ("fast", "helper")
    assert ask(fleet, "fast") == [0] and ask(fleet, "helper") == [0, 1]
    assert [(request.id, request.adapter) for request in own.requests] == [("r", None), ("r-2", None)]
    base.running = [{"failure": None}]
    with pytest.raises(RemoteError, match="fast: no replica runs"):
        asyncio.run(fleet.ready())
    assert asyncio.run(fleet.merged()) == {"fast": []}
    own.running = [{"version": "fast@2"}, {"version": "fast@1"}, {"version": "fast@2"}]
    assert asyncio.run(fleet.merged()) == {"fast": ["fast@1", "fast@2"]}


def test_a_merged_model_hides_no_other_whatever_it_is_called(small):
    base, own = FakeReplicas(), FakeReplicas()
    own.running = [{"version": "endpoint@1"}]
    fleet = make(small, base, merged={"endpoint": own})
    with pytest.raises(RemoteError, match="no replica runs"):
        asyncio.run(fleet.ready())


@pytest.fixture
def versions(small) -> tuple[str, str]:
    """What production and staging hold."""
    current = small.keep("helper", "one", stage="production").ref
    return current, small.keep("helper", "two", stage="staging").ref


class Versioned(FakeReplicas):
    """Fails for the versions in `bad`, before or after `num_tokens` tokens."""

    def __init__(self, *bad: str, after: int = 0):
        super().__init__()
        self.bad, self.after = bad, after

    async def stream(self, request: Request):
        self.requests.append(request)
        for token in range(self.after or 1):
            if request.adapter in self.bad and not self.after:
                raise LmrayError("request", "answered with NaN")
            yield TokenEvent(request.id, token)
        if request.adapter in self.bad:
            raise LmrayError("request", "answered with NaN")


def test_a_share_of_the_requests_goes_to_the_next_version(small, versions):
    replicas = FakeReplicas()
    fleet = make(small, replicas, Canary(share=0.25))
    for index in range(200):
        ask(fleet, "helper", name=f"r{index}")
    counts = [sum(request.adapter == version for request in replicas.requests) for version in versions]
    assert sum(counts) == 200 and 30 <= counts[1] <= 70
    (report,) = fleet.canaries.report()
    assert report["current"]["requests"] == counts[0] and report["canary"]["requests"] == counts[1]
    assert report["canary"]["first_token_s"] == pytest.approx(1.0) and report["taken_back"] is None


def test_all_answers_to_one_request_come_from_one_version(small, versions):
    replicas = FakeReplicas()
    fleet = make(small, replicas, Canary(share=0.5))
    for index in range(80):
        ask(fleet, "helper", name=f"chatcmpl-{index // 4}-{index % 4}")
    asked = [request.adapter for request in replicas.requests]
    assert set(asked) == set(versions)
    assert all(len(set(asked[start : start + 4])) == 1 for start in range(0, 80, 4))


def test_a_visitor_with_a_key_always_gets_the_same_version(small, versions):
    replicas = FakeReplicas()
    fleet = make(small, replicas, Canary(share=0.5))
    seen = set()
    for visitor in range(20):
        token = VISITOR.set(f"visitor {visitor}")
        replicas.requests.clear()
        for index in range(5):
            ask(fleet, "helper", name=f"r{index}")
        VISITOR.reset(token)
        (version,) = {request.adapter for request in replicas.requests}
        seen.add(version)
    assert seen == set(versions)


def test_a_bad_next_version_is_taken_back_costs_nobody_an_answer_and_is_not_tried_again(small, versions):
    current, coming = versions
    replicas = Versioned(coming)
    fleet = make(small, replicas, Canary(share=0.5, min_requests=10))
    for index in range(100):
        assert ask(fleet, "helper", name=f"r{index}") == [0]
    (report,) = fleet.canaries.report()
    assert report["taken_back"].startswith("errors: ")
    tried = sum(request.adapter == coming for request in replicas.requests)
    assert tried == report["canary"]["errors"] < 30
    again = make(small, replicas, Canary(share=1.0))
    replicas.requests.clear()
    assert ask(again, "helper") == [0] and [request.adapter for request in replicas.requests] == [current]
    small.keep("helper", "three", stage="staging")
    again.catalogue.refresh()
    ask(again, "helper")
    assert replicas.requests[-1].adapter not in versions, "another version gets its own chance"


def test_what_was_taken_back_stays_so_when_production_moves(small, versions):
    replicas = Versioned(versions[1])
    fleet = make(small, replicas, Canary(share=0.5, min_requests=10))
    for index in range(100):
        ask(fleet, "helper", name=f"r{index}")
    moved = small.keep("helper", "three", stage="production").ref
    fleet.catalogue.refresh()
    replicas.requests.clear()
    for index in range(20):
        ask(fleet, "helper", name=f"r{index}")
    assert {request.adapter for request in replicas.requests} == {moved}


def test_a_replica_that_died_says_nothing_about_a_version(small, versions):
    fleet = make(small, FakeReplicas(DEAD, DEAD, num_tokens=(0, 0, 2)), Canary(share=1.0))
    assert ask(fleet, "helper") == [0, 1]
    (report,) = fleet.canaries.report()
    assert report["canary"]["errors"] == 0


class Deadly(FakeReplicas):
    """Requests for the versions `bad` end the replicas that get them, after some tokens."""

    def __init__(self, *bad: str, num_tokens: int = 0):
        super().__init__()
        self.bad, self.before_end = bad, num_tokens

    async def stream(self, request: Request):
        self.requests.append(request)
        for token in range(self.before_end or 1):
            if request.adapter in self.bad and not self.before_end:
                raise DEAD
            yield TokenEvent(request.id, token)
        if request.adapter in self.bad:
            raise DEAD


@pytest.mark.parametrize("apart_s", [60.0, 1.0, 0.01])
def test_a_next_version_that_ends_replicas_is_taken_back_before_it_ends_many(small, versions, apart_s):
    fleet = make(small, replicas := Deadly(versions[1]), Canary(share=0.5))
    fleet._clock = lambda: apart_s * len(replicas.requests)
    for index in range(60):
        assert ask(fleet, "helper", name=f"r{index}") == [0]
    (report,) = fleet.canaries.report()
    tried = sum(request.adapter == versions[1] for request in replicas.requests)
    if apart_s < 1:
        assert report["taken_back"] is None and report["canary"]["lost"] == 1, "all of one moment are one"
    else:
        assert report["taken_back"] == "no answer to 3 of 3 requests, before to all"
        assert tried == 6 if apart_s > 10 else 6 < tried <= 40, "each is sent twice"


@pytest.mark.parametrize("bad", [(0, 1), (0,)])
def test_what_ends_replicas_whichever_version_reads_it_says_nothing_about_a_version(small, versions, bad):
    fleet = make(small, replicas := Deadly(*(versions[one] for one in bad)), Canary(share=0.5))
    fleet._clock = lambda: 60.0 * len(replicas.requests)
    for index in range(40):
        with suppress(RemoteError):
            ask(fleet, "helper", name=f"r{index}")
    (report,) = fleet.canaries.report()
    assert report["taken_back"] is None and report["canary"]["lost"] == 0


@pytest.mark.parametrize(("apart_s", "errors"), [(60.0, 20), (0.01, 1)])
def test_answers_that_break_off_with_their_replica_count_once_for_each(small, versions, apart_s, errors):
    fleet = make(small, replicas := Deadly(versions[1], num_tokens=2), Canary(share=1.0, min_requests=50))
    fleet._clock = lambda: apart_s * len(replicas.requests)
    for index in range(20):
        with pytest.raises(RemoteError):
            ask(fleet, "helper", name=f"r{index}")
    (report,) = fleet.canaries.report()
    assert report["canary"]["errors"] == errors and report["canary"]["requests"] == 20


def test_an_answer_that_broke_off_counts_once_and_is_not_answered_twice(small, versions):
    fleet = make(small, Versioned(versions[1], after=2), Canary(share=1.0))
    with pytest.raises(LmrayError, match="NaN"):
        ask(fleet, "helper")
    (report,) = fleet.canaries.report()
    assert (report["canary"]["requests"], report["canary"]["errors"]) == (1, 1)


def test_a_promotion_ends_the_comparison(small, versions):
    fleet = make(small, FakeReplicas(), Canary(share=1.0))
    ask(fleet, "helper")
    small.artifacts.promote(versions[1], "production")
    fleet.catalogue.refresh()
    line = fleet.catalogue.line("helper")
    assert line.current.ref == versions[1] and line.canary is None


def test_scores_are_counted_by_the_id_of_the_answer(small, versions):
    fleet = make(small, FakeReplicas(), Canary(share=1.0))
    ask(fleet, "helper", name="chatcmpl-1-0")
    fleet.canaries.score("chatcmpl-1", 0.5)
    assert fleet.canaries.report()[0]["canary"]["score"] == 0.5
    with pytest.raises(DataError, match="answer `chatcmpl-2`: is none of an adapter with a canary"):
        fleet.canaries.score("chatcmpl-2", 0.5)


def test_a_spoilt_record_of_canaries_is_named(small):
    small.store.put("endpoints/endpoint/canaries.json", b"[1]")
    with pytest.raises(ArtifactError, match="is no record of canaries"):
        Canaries(small.store, "endpoint")
