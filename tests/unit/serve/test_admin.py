"""Admin calls over two replicas in this process: who is let in, and what each call does."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import httpx
import pytest
from fastapi import FastAPI

from lmray.artifacts.served import ServedAdapter
from lmray.serve import catalogue as module
from lmray.serve.admin import add_admin
from lmray.serve.canaries import Canaries
from lmray.serve.catalogue import Catalogue
from lmray.serve.fleet import Fleet, Replicas
from lmray.serve.gateway import GatewaySettings, make_app
from lmray.serve.live import LiveEngine
from lmray.serve.pins import Pins
from tests.unit.serve.stores import FakeEngine, SmallStore, plan_of

KEY = "an operator's key"


class HereReplicas:
    """Engines of this process."""

    def __init__(self, *engines: LiveEngine):
        self.engines = engines

    async def everywhere(self, method: str, *arguments):
        found = [getattr(engine, method)(*arguments) for engine in self.engines]
        return [await one if asyncio.iscoroutine(one) else one for one in found]


class Merged:
    """Replicas of a merged model, that serve `versions`."""

    def __init__(self, *versions: str):
        self.versions = versions

    async def everywhere(self, method: str, *arguments):
        assert method == "stats", "it has no adapters"
        return [{"version": version} for version in self.versions]


@pytest.fixture
def small(tmp_path, monkeypatch) -> SmallStore:
    monkeypatch.setattr(module, "EVERY_S", 0.0)
    monkeypatch.setattr(module, "PATIENCE_S", 10.0)
    return SmallStore(tmp_path)


@pytest.fixture
def visit(small, tokenizer):
    """Makes calls one after another on a running endpoint with two replicas."""

    def calls(
        *told: tuple,
        key: str = KEY,
        admin_keys: tuple[str, ...] = (KEY,),
        merged: dict[str, list[str]] | None = None,
        num_replicas: int = 2,
    ) -> list[httpx.Response]:
        """`merged`: name -> versions that replicas of its own tell."""
        names = merged or {}

        async def main():
            plan = plan_of(small, "*", admin_keys=admin_keys)
            own = tuple(ServedAdapter(artifact=name, stage="production", merged=True) for name in names)
            plan = replace(plan, served=(*plan.served, *own), merged=dict.fromkeys(names, plan))
            engines = [LiveEngine(FakeEngine(), plan) for _ in range(num_replicas)]
            for engine in engines:
                await engine.start()
            catalogue = Catalogue(small.store, plan.served, plan.fit, reserved="tiny")
            catalogue.refresh()
            told_by: dict[str, Replicas] = {name: Merged(*versions) for name, versions in names.items()}
            fleet = Fleet(HereReplicas(*engines), catalogue, Canaries(small.store, "endpoint"), merged=told_by)
            app: FastAPI = make_app(fleet, tokenizer, GatewaySettings("tiny", 64))
            add_admin(app, fleet, plan)
            transport = httpx.ASGITransport(app, raise_app_exceptions=False)
            headers = {"Authorization": f"Bearer {key}"} if key else {}
            async with httpx.AsyncClient(transport=transport, base_url="http://gateway", headers=headers) as client:
                return [
                    await client.request(method, f"/admin{path}", json=body[0] if body else None)
                    for method, path, *body in told
                ]

        return asyncio.run(main())

    return calls


def held(response: httpx.Response) -> list[list[str]]:
    """Handles that each replica holds."""
    return [[one["handle"] for one in replica["held"]] for replica in response.json()["replicas"]]


def test_without_admin_keys_there_are_no_such_routes(visit):
    (response,) = visit(("GET", "/adapters"), admin_keys=())
    assert response.status_code == 404


@pytest.mark.parametrize(("key", "found"), [("", "no admin key"), ("another", "wrong admin key")])
def test_whoever_has_no_admin_key_is_refused(visit, small, key, found):
    small.keep("helper", stage="production")
    for response in visit(
        ("GET", "/adapters"), ("POST", "/adapters/helper/load"), ("POST", "/adapters/helper/pin"), key=key
    ):
        assert response.status_code == 401 and found in response.json()["error"]["message"]
    assert Pins(small.store, "endpoint").names() == ()


def test_adapters_are_listed_with_what_is_wrong_with_them(visit, small):
    good = small.keep("good", stage="production")
    small.keep("other-base", base={"source": "other", "digest": "e" * 64}, stage="production")
    (response,) = visit(("GET", "/adapters"))
    good_one, bad = response.json()["adapters"]
    assert good_one == {"name": "good", "version": good.ref, "pinned": False, "refused": None, "merged": False}
    assert bad["version"] is None and "was trained on `other`" in bad["refused"]
    assert held(response) == [[], []]


def test_a_merged_one_is_listed_with_what_answers_and_has_nothing_to_load(visit, small):
    for name in ("fast", "helper"):
        small.keep(name, stage="production")
    Pins(small.store, "endpoint").change("fast", pinned=True)
    listed, loaded, pinned, unpinned = visit(
        ("GET", "/adapters"),
        ("POST", "/adapters/fast@production/load"),
        ("POST", "/adapters/fast/pin"),
        ("POST", "/adapters/fast/unpin"),
        merged={"fast": ["fast@1", "fast@2"], "none": []},
    )
    found = [(one["name"], one["version"], one["merged"]) for one in listed.json()["adapters"]][1:]
    assert found == [("fast", "fast@1", True), ("fast", "fast@2", True), ("none", None, True)]
    assert held(listed) == [[], []], "not even what was pinned before it was merged"
    for refused in (loaded, pinned):
        assert refused.status_code == 409
        assert "`fast` is merged: its replicas serve nothing else" in refused.json()["error"]["message"]
    assert unpinned.json()["pinned"] == []


def test_a_version_is_loaded_on_every_replica_ahead_of_its_promotion_and_unloaded(visit, small):
    now = small.keep("helper", "one", stage="production")
    coming = small.keep("helper", "two")
    loaded, ahead, gone, again = visit(
        ("POST", "/adapters/helper/load"),
        ("POST", f"/adapters/{coming.ref}/load"),
        ("POST", "/adapters/helper@production/unload"),
        ("POST", "/adapters/helper/unload"),
    )
    assert held(loaded) == [[now.ref]] * 2
    assert held(ahead) == [[coming.ref, now.ref]] * 2
    assert gone.json()["version"] == now.ref and held(gone) == [[coming.ref]] * 2
    assert again.status_code == 409 and "is not loaded" in again.json()["error"]["message"]


def test_prewarming_answers_before_the_adapter_is_there(visit, small):
    small.keep("helper", stage="production")
    begun, done = visit(("POST", "/adapters/helper/prewarm"), ("POST", "/adapters/helper/load"))
    assert [replica["held"][0]["state"] for replica in begun.json()["replicas"]] == ["waiting", "waiting"]
    assert [replica["held"][0]["state"] for replica in done.json()["replicas"]] == ["ready", "ready"]


def test_pins_hold_on_every_replica_and_for_later_ones(visit, small):
    artifact = small.keep("helper", stage="production")
    pinned, loaded, refused, listed = visit(
        ("POST", "/adapters/helper/pin"),
        ("POST", "/adapters/helper/load"),
        ("POST", "/adapters/helper/unload"),
        ("GET", "/adapters"),
    )
    assert pinned.json()["pinned"] == ["helper"]
    assert [replica["held"][0]["pinned"] for replica in loaded.json()["replicas"]] == [True, True]
    assert refused.status_code == 409 and "is pinned" in refused.json()["error"]["message"]
    assert listed.json()["adapters"][0]["pinned"]
    (later,) = visit(("GET", "/adapters"))
    assert held(later) == [[artifact.ref]] * 2
    _, unloaded = visit(("POST", "/adapters/helper/unpin"), ("POST", "/adapters/helper/unload"))
    assert unloaded.status_code == 200


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("/helpr/load", "`helpr`: is not served\n  hint: did you mean `helper`?"),
        ("/helpr/pin", "did you mean `helper`?"),
        ("/helper@staging/load", "no version or stage `staging`"),
        ("/helper/lode", "unknown action `lode`; there are: load, prewarm, unload, pin, unpin; did you mean `load`?"),
        ("/..%2F..%2Fetc/load", "Not Found"),
        ("/..@production/load", "is no artifact reference"),
    ],
)
def test_what_is_unknown_is_named(visit, small, path, found):
    small.keep("helper", stage="production")
    (response,) = visit(("POST", f"/adapters{path}"))
    assert response.status_code == 404 and found in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("body", "found"),
    [
        ({"id": "x", "score": 1}, "answer `x`: is none of an adapter with a canary"),
        ({"id": "x"}, "Field required"),
        ({"id": "x", "score": 1, "version": "y"}, "Extra inputs"),
        ([], "Input should be an object"),
    ],
)
def test_scores_that_belong_to_nothing_are_refused(visit, body, found):
    listed, refused = visit(("GET", "/canaries"), ("POST", "/canaries/scores", body))
    assert listed.json() == {"canaries": []}
    assert refused.status_code == 400 and found in refused.json()["error"]["message"]


@pytest.mark.parametrize("action", ["load", "prewarm", "unload"])
def test_where_no_replica_runs_nothing_was_done(visit, small, action):
    small.keep("helper", stage="production")
    (response,) = visit(("POST", f"/adapters/helper/{action}"), num_replicas=0)
    assert response.status_code == 409 and "no replica runs" in response.json()["error"]["message"]
