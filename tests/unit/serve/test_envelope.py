"""Keys' rights and limits, metrics, request ids, logs, slow bodies and long answers, through the app."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from dataclasses import replace

import httpx
import pytest

from lmray.config.endpoint import HttpLimits
from lmray.errors import LmrayError
from lmray.serve.gateway import GatewaySettings, make_app
from lmray.serve.keys import ApiKey
from tests.unit.serve.asgi import post
from tests.unit.serve.conftest import MAX_LENGTH
from tests.unit.serve.fakes import FakeBackend
from tests.unit.serve.test_gateway import sse

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "a secret of the client's"}]}


def api_key(name: str, **rights) -> ApiKey:
    return ApiKey(name=name, sha256=hashlib.sha256(name.encode()).hexdigest(), **rights)


KEYS = (api_key("all", metrics=True), api_key("few", models=("helper",), requests_per_minute=1))


@pytest.fixture
def session(tokenizer):
    """Runs requests one after another against one app: `(method, path, key, body)` each."""

    def run(backend: FakeBackend, *asked, **settings):
        app = make_app(backend, tokenizer, GatewaySettings("tiny", MAX_LENGTH, **settings))

        async def main():
            transport = httpx.ASGITransport(app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
                found = []
                for method, path, key, body in asked:
                    headers = {"Authorization": f"Bearer {key}"} if key else {}
                    found.append(await client.request(method, path, headers=headers, json=body))
                return found

        return asyncio.run(main())

    return run


def chat(key: str, **fields):
    return ("POST", "/v1/chat/completions", key, {**CHAT, **fields})


def metrics(text: str) -> dict[str, float]:
    """Samples by name and labels."""
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


def test_a_key_asks_only_what_it_may_and_learns_of_nothing_else(session, ids):
    listed, forbidden, unknown, allowed, card = session(
        FakeBackend(ids("x"), adapters=("helper", "other")),
        ("GET", "/v1/models", "few", None),
        chat("few", model="other"),
        chat("few", model="nothing"),
        chat("few", model="tiny:helper"),
        ("GET", "/v1/models/tiny", "few", None),
        keys=(api_key("few", models=("helper",)),),
    )
    assert [one["id"] for one in listed.json()["data"]] == ["helper", "tiny:helper"]
    assert (forbidden.status_code, unknown.status_code, card.status_code) == (403, 403, 403)
    assert forbidden.json()["error"]["message"].replace("other", "nothing") == unknown.json()["error"]["message"]
    assert forbidden.json()["error"]["code"] == "model_not_allowed"
    assert allowed.status_code == 200


def test_a_key_that_asked_too_often_is_told_when_to_come_back(session, ids):
    fields = {"model": "helper"}
    first, second, other = session(
        FakeBackend(ids("x")), chat("few", **fields), chat("few", **fields), chat("all"), keys=KEYS
    )
    assert (first.status_code, second.status_code, other.status_code) == (200, 429, 200)
    assert 1 <= int(second.headers["retry-after"]) <= 61
    assert second.json()["error"]["message"] == "this key has used its requests_per_minute (1)"


def test_requests_tokens_and_times_are_counted_by_model_and_key(session, ids):
    backend = FakeBackend(ids("abc"))
    *_, page = session(
        backend,
        chat("all"),
        chat("all", n=2, stream=True),
        chat("few", model="helper"),
        chat("few", model="helper"),
        chat("wrong"),
        ("GET", "/metrics", "all", None),
        keys=KEYS,
    )
    assert page.headers["content-type"].startswith("text/plain; version=0.0.4")
    found = metrics(page.text)
    path, num = "/v1/chat/completions", len(backend.requests[0].prompt_ids)
    assert found[f'lmray_serve_requests_total{{key="all",model="tiny",path="{path}",status="200"}}'] == 2
    assert found[f'lmray_serve_requests_total{{key="few",model="",path="{path}",status="429"}}'] == 1
    assert found[f'lmray_serve_requests_total{{key="",model="",path="{path}",status="401"}}'] == 1
    assert found['lmray_serve_prompt_tokens_total{key="all",model="tiny"}'] == 2 * num
    assert found['lmray_serve_generated_tokens_total{key="all",model="tiny"}'] == 9
    assert found['lmray_serve_time_to_first_token_seconds_count{model="tiny"}'] == 3
    assert found['lmray_serve_queue_time_seconds_count{model="tiny"}'] == 3
    assert found['lmray_serve_inter_token_latency_seconds_count{model="tiny"}'] == 9  # the stop token's event counts
    assert found['lmray_serve_running_requests{model="tiny"}'] == 0
    assert not any("wrong" in name for name in found)


def test_times_between_tokens_are_those_of_the_replica_whenever_its_tokens_arrive(session, ids):
    class Told(FakeBackend):
        async def stream(self, request):
            async for event in super().stream(request):
                yield replace(event, after_s=2.0)

    _, page = session(Told(ids("abc")), chat(None), ("GET", "/metrics", None, None))
    found = metrics(page.text)
    assert found['lmray_serve_inter_token_latency_seconds_sum{model="tiny"}'] == 6.0, "the first has none before it"


def test_metrics_are_for_keys_that_may_read_them(session):
    mine, other, none = session(
        FakeBackend(), *(("GET", "/metrics", key, None) for key in ("all", "few", None)), keys=KEYS
    )
    assert (mine.status_code, other.status_code, none.status_code) == (200, 403, 401)
    assert session(FakeBackend(), ("GET", "/metrics", None, None))[0].status_code == 200


def test_an_answer_that_broke_off_counts_as_the_failure_it_was(session, ids):
    broken = FakeBackend(ids("abc"), error=LmrayError("engine", "broke"), fails_after=2)
    stream, page = session(broken, chat("", stream=True), ("GET", "/metrics", None, None))
    assert stream.status_code == 200
    name = 'lmray_serve_requests_total{key="",model="tiny",path="/v1/chat/completions",status="500"}'
    assert metrics(page.text)[name] == 1


@pytest.mark.parametrize(("given", "kept"), [("my-id:1", True), ("bad id\u00e9", False), ("x" * 129, False)])
def test_a_request_has_an_id_its_own_or_a_made_one(call, given, kept):
    for path in ("/health", "/v1/nothing"):
        response = call(FakeBackend(), "GET", path, headers={"X-Request-Id": given.encode("latin-1")})
        assert (response.headers["x-request-id"] == given) == kept
        assert len(response.headers["x-request-id"]) > 4


def test_an_id_that_is_put_there_by_others_is_not_sent_twice(call):
    response = call(FakeBackend(), "GET", "/health", settings={"sends_request_id": False})
    assert "x-request-id" not in response.headers


@pytest.mark.parametrize("error", [None, LmrayError("engine", "broke"), ZeroDivisionError("a secret of ours")])
def test_logs_have_names_and_numbers_and_no_word_of_the_conversation(session, ids, caplog, error):
    with caplog.at_level(logging.DEBUG):
        session(FakeBackend(ids("a secret answer"), error=error), chat("all"), keys=KEYS)
    told = [record.getMessage() for record in caplog.records if record.name == "lmray.serve.access"]
    assert len(told) == 1
    assert "model=tiny key=all status=" in told[0]
    own = [record.getMessage() for record in caplog.records if record.name.startswith("lmray")]
    assert not any("secret" in message for message in own)


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_takes_too_long_ends(session, ids, stream):
    backend = FakeBackend(ids("abc"))
    backend.hangs_after = 1 if stream else 0
    [response] = session(backend, chat("", stream=stream), limits=HttpLimits(answer_timeout_s=0.5))
    error = sse(response.text)[-1] if stream else response.json()
    assert response.status_code == (200 if stream else 504)
    assert error["error"]["message"] == "the answer was not done after 0.5 s"
    assert backend.closed == [backend.requests[0].id]


def test_a_body_that_does_not_come_is_not_waited_for(tokenizer):
    sent = []

    async def send(message):
        sent.append(message)

    limits = HttpLimits(body_timeout_s=0.05)
    app = make_app(FakeBackend(), tokenizer, GatewaySettings("tiny", MAX_LENGTH, limits=limits))
    part = {"type": "http.request", "body": b"{", "more_body": True}
    asyncio.run(post(app, "/v1/chat/completions", [part], send=send))
    assert sent[0]["status"] == 408
    assert b"was not there after 0.05 s" in sent[1]["body"]
