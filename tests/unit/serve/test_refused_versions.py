"""A promoted version whose weights replicas refuse: what its name stood for before goes on serving."""

from __future__ import annotations

import asyncio

import pytest

from lmray.artifacts.served import Canary
from lmray.engines.base import Request, Sampling
from lmray.errors import ArtifactError
from lmray.serve.catalogue import UNFIT_S
from lmray.serve.visitors import STAGE
from tests.unit.serve.stores import SmallStore
from tests.unit.serve.test_fleet import FakeReplicas, ask, make


@pytest.fixture
def small(tmp_path) -> SmallStore:
    return SmallStore(tmp_path)


class Picky(FakeReplicas):
    """Some versions' weights are not what an adapter is."""

    def __init__(self, *refused: str):
        super().__init__()
        self.refused = refused

    async def stream(self, request: Request):
        if request.adapter in self.refused:
            self.requests.append(request)
            raise ArtifactError(f"adapter `{request.adapter}`", "uses DoRA")
        async for event in super().stream(request):
            yield event


@pytest.mark.parametrize("num_bad", [1, 2])
def test_a_promoted_version_that_replicas_refuse_leaves_the_one_before_it_serving(small, num_bad):
    good = small.keep("helper", "good", stage="production")
    bad = [small.keep("helper", f"bad {number}", stage="production") for number in range(num_bad)]
    replicas = Picky(*(one.ref for one in bad))
    fleet = make(small, replicas)
    assert ask(fleet, "helper") == [0, 1] and ask(fleet, "helper") == [0, 1]
    tried = [request.adapter for request in replicas.requests]
    assert tried == [*(one.ref for one in reversed(bad)), good.ref, good.ref], "each is refused once"
    line = fleet.catalogue.line("helper")
    assert line is not None and line.current == good and "uses DoRA" in (line.refused or "")
    replicas.refused = ()
    mended = small.keep("helper", "mended", stage="production")
    fleet.catalogue.refresh()
    ask(fleet, "helper")
    assert replicas.requests[-1].adapter == mended.ref and not fleet.catalogue.refused


def test_a_refused_version_is_tried_again_later_for_what_was_wrong_may_have_passed(small):
    good = small.keep("helper", "good", stage="production")
    bad = small.keep("helper", "bad", stage="production")
    replicas, now = Picky(bad.ref), [0.0]
    fleet = make(small, replicas)
    fleet.catalogue._clock = lambda: now[0]
    ask(fleet, "helper")
    fleet.catalogue.refresh()
    ask(fleet, "helper")
    replicas.refused, now[0] = (), UNFIT_S
    fleet.catalogue.refresh()
    ask(fleet, "helper")
    assert [request.adapter for request in replicas.requests] == [bad.ref, good.ref, good.ref, bad.ref]
    assert not fleet.catalogue.refused


def test_a_next_version_that_was_asked_for_by_its_stage_is_refused_and_not_exchanged(small):
    small.keep("helper", "good", stage="production")
    bad = small.keep("helper", "bad", stage="staging")
    replicas = Picky(bad.ref)
    fleet = make(small, replicas, Canary(share=0.0))
    token = STAGE.set("staging")
    try:
        with pytest.raises(ArtifactError, match="uses DoRA"):
            ask(fleet, "helper")
    finally:
        STAGE.reset(token)
    assert ask(fleet, "helper") == [0, 1] and fleet.canaries.report()[0]["canary"]["requests"] == 0


def test_of_two_requests_that_meet_a_refused_version_both_are_answered(small):
    good = small.keep("helper", "good", stage="production")
    bad = small.keep("helper", "bad", stage="production")
    fleet = make(small, Picky(bad.ref))

    async def main() -> list[int]:
        async def one(name: str) -> int:
            request = Request(name, (1,), Sampling(max_tokens=4), "helper")
            return len([event async for event in fleet.stream(request)])

        return await asyncio.gather(*map(one, "abc"))

    assert asyncio.run(main()) == [2, 2, 2]
    assert fleet.catalogue.line("helper").current == good


def test_a_first_version_that_replicas_refuse_is_told_so(small):
    bad = small.keep("helper", "bad", stage="production")
    fleet = make(small, Picky(bad.ref))
    looked = []
    fleet.catalogue._earlier = lambda *told: looked.append(told)  # type: ignore[method-assign]
    for _ in range(2):
        with pytest.raises(ArtifactError, match="uses DoRA"):
            ask(fleet, "helper")
    assert len(looked) == 1, "the store is not read again for every request"
    assert "uses DoRA" in fleet.catalogue.refused["helper"]
