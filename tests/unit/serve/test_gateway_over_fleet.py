"""The gateway over a store's catalogue: names, rights, counts and visitors of adapters that stand for versions."""

from __future__ import annotations

import asyncio
import logging

import httpx
import pytest

from lmray.artifacts.served import Canary, ServedAdapter
from lmray.engines.base import Request, TokenEvent
from lmray.serve.admin import add_admin
from lmray.serve.canaries import Canaries
from lmray.serve.catalogue import Catalogue
from lmray.serve.fleet import Fleet
from lmray.serve.gateway import GatewaySettings, make_app
from lmray.serve.visitors import VISITOR
from tests.unit.serve.stores import FIT, SmallStore, plan_of
from tests.unit.serve.test_envelope import api_key, metrics

KEYS = (api_key("all", metrics=True), api_key("few", models=("helper",)))


class Recording:
    """Remembers requests, and who was the visitor when they came."""

    def __init__(self):
        self.requests: list[Request] = []
        self.visitors: list[str] = []

    async def stream(self, request: Request):
        self.requests.append(request)
        self.visitors.append(VISITOR.get())
        yield TokenEvent(request.id, 67)
        yield TokenEvent(request.id, None, "stop")

    async def everywhere(self, method, *arguments):
        return []


@pytest.fixture
def small(tmp_path) -> SmallStore:
    return SmallStore(tmp_path)


@pytest.fixture
def session(small, tokenizer):
    """Requests one after another: `(method, path, key, body)` each; what came, and what the replicas were asked."""

    def run(
        *asked, canary: Canary | None = None, keys=KEYS, merged: tuple[str, ...] = ()
    ) -> tuple[list[httpx.Response], Recording]:
        served = [ServedAdapter(artifact="*", stage="production", canary=canary)]
        served += [ServedAdapter(artifact=name, stage="staging", merged=True) for name in merged]
        catalogue = Catalogue(small.store, served, FIT, reserved="tiny")
        catalogue.refresh()
        replicas = Recording()
        own = {name: Recording() for name in merged}
        fleet = Fleet(replicas, catalogue, Canaries(small.store, "endpoint"), merged=own)
        told = {"aliases": lambda: catalogue.aliases, "keys": keys, "sends_request_id": False}
        app = make_app(fleet, tokenizer, GatewaySettings("tiny", 256, **told))
        add_admin(app, fleet, plan_of(small, "*", admin_keys=("operator",)))

        async def main():
            transport = httpx.ASGITransport(app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
                found = []
                for method, path, key, body in asked:
                    headers = {"Authorization": f"Bearer {key}"} if key else {}
                    found.append(await client.request(method, path, headers=headers, json=body))
                return found

        return asyncio.run(main()), replicas

    return run


def chat(key: str, model: str, **fields):
    body = {"model": model, "messages": [{"role": "user", "content": "hi"}], **fields}
    return ("POST", "/v1/chat/completions", key, body)


def test_rights_hold_for_names_whatever_version_they_stand_for(session, small):
    artifact = small.keep("helper", stage="production")
    other = small.keep("other", stage="production")
    small.keep("waits")
    few, all_, *answers = session(
        ("GET", "/v1/models", "few", None),
        ("GET", "/v1/models", "all", None),
        chat("few", "helper"),
        chat("few", "tiny:helper"),
        chat("few", "other"),
        chat("few", artifact.ref),
        chat("few", "other@production"),
        chat("few", other.ref),
        chat("all", "helper@staging"),
        chat("all", "waits"),
    )[0]
    assert [one["id"] for one in few.json()["data"]] == ["helper", "tiny:helper"]
    assert [one["id"] for one in all_.json()["data"]] == ["tiny", "helper", "tiny:helper", "other", "tiny:other"]
    assert [answer.status_code for answer in answers] == [200, 200, 403, 403, 403, 403, 404, 404]
    assert answers[0].json()["model"] == "helper"


def test_a_name_with_the_stage_it_is_served_from_is_the_name(session, small):
    small.keep("helper", stage="production")
    card, *answers = session(
        ("GET", "/v1/models/helper@production", "few", None),
        chat("few", "helper@production"),
        chat("few", "tiny:helper@production"),
        chat("all", "tiny@production"),
    )[0]
    assert card.json()["parent"] == "tiny"
    assert [answer.status_code for answer in answers] == [200, 200, 404]
    assert answers[0].json()["model"] == "helper@production"


def test_a_merged_model_is_asked_by_its_stage_too_and_by_no_other(session, small):
    small.keep("fast", stage="production")
    small.keep("fast", "two", stage="staging")
    answers, replicas = session(
        *[chat("all", name) for name in ("fast", "fast@staging", "tiny:fast@staging", "fast@production")],
        chat("few", "fast@staging"),
        merged=("fast",),
    )
    assert [answer.status_code for answer in answers] == [200, 200, 200, 404, 403]
    assert replicas.requests == [], "its own replicas answer"


def test_what_a_stage_moves_to_is_listed_and_counted_under_the_same_name(session, small):
    small.keep("helper", "one", stage="production")
    new = small.keep("helper", "two", stage="staging")
    canary = Canary(share=1.0)
    (_, page), replicas = session(chat("few", "helper"), ("GET", "/metrics", "all", None), canary=canary)
    assert replicas.requests[0].adapter == new.ref
    found = metrics(page.text)
    labels = '{key="few",model="helper",path="/v1/chat/completions",status="200"}'
    assert found[f"lmray_serve_requests_total{labels}"] == 1
    assert found['lmray_serve_generated_tokens_total{key="few",model="helper"}'] == 1
    assert not any("@" in name for name in found)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_stage_in_the_name_is_that_stages_version_whatever_share_the_next_one_has(session, small, share):
    old = small.keep("helper", "one", stage="production")
    new = small.keep("helper", "two", stage="staging")
    names = ("helper@production", "helper@staging", "tiny:helper@staging", "helper", "helper@candidate")
    answers, replicas = session(*[chat("few", name) for name in names], canary=Canary(share=share))
    assert [answer.status_code for answer in answers] == [200, 200, 200, 200, 403]
    drawn = new.ref if share else old.ref
    assert [request.adapter for request in replicas.requests] == [old.ref, new.ref, new.ref, drawn]


@pytest.mark.parametrize("fields", [{}, {"stream": True}, {"n": 3}], ids=str)
def test_the_visitor_is_known_wherever_an_answer_is_made(session, small, fields):
    small.keep("helper", stage="production")
    (one, two), replicas = session(chat("few", "helper", **fields), chat("all", "helper", **fields))
    assert (one.status_code, two.status_code) == (200, 200)
    num = fields.get("n", 1)
    assert replicas.visitors == ["few"] * num + ["all"] * num


def test_how_a_key_is_written_makes_no_other_visitor_and_without_keys_there_are_none(session, small):
    small.keep("helper", stage="production")
    _, replicas = session(chat("few", "helper"), chat(" few", "helper"))
    assert replicas.visitors == ["few", "few"]
    (one, _), replicas = session(chat("dummy", "helper"), chat("other", "helper"), keys=())
    assert one.status_code == 200 and replicas.visitors == ["", ""]


def test_keys_share_no_beginnings_of_prompts(session, small):
    _, replicas = session(chat("all", "tiny"), chat("all", "tiny"))
    assert [request.cache_salt for request in replicas.requests] == ["all", "all"]
    small.keep("helper", stage="production")
    _, replicas = session(chat("all", "helper"), chat("few", "helper"))
    assert [request.cache_salt for request in replicas.requests] == ["all", "few"]


def test_admin_calls_are_counted_and_logged_with_their_keys_name(session, small, caplog):
    small.keep("helper", stage="production")
    with caplog.at_level(logging.INFO, logger="lmray.serve.access"):
        *_, page = session(
            ("POST", "/admin/adapters/helper/load", "operator", None),
            ("POST", "/admin/adapters/helper/load", "few", None),
            ("GET", "/metrics", "all", None),
        )[0]
    name = 'lmray_serve_requests_total{{key="{}",model="",path="/admin/adapters/{{reference}}/{{action}}",status="{}"}}'
    assert metrics(page.text)[name.format("admin-0", 409)] == 1  # for no replica runs
    assert metrics(page.text)[name.format("", 401)] == 1
    assert "path=/admin/adapters/{reference}/{action} model=- key=admin-0 status=409" in caplog.text
    assert "operator" not in caplog.text
