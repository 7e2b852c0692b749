"""The page at `/` and the load that it shows: what is sent, to whom, and what a browser is held to."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re

import httpx
import pytest

from lmray.errors import RemoteError
from lmray.serve import page
from lmray.serve.fleet import Fleet
from lmray.serve.gateway import GatewaySettings, make_app
from tests.unit.serve.conftest import MAX_LENGTH
from tests.unit.serve.fakes import FakeBackend
from tests.unit.serve.test_envelope import KEYS

HTML = page.FILE.read_text(encoding="utf-8")
IDLE = {
    "replicas": 2,
    "running": 3,
    "waiting": 1,
    "generated_tokens": 34,
    "adapters": ["helper@1", "other@1"],
    "free_blocks": 6,
    "num_blocks": 8,
}


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def rules(response: httpx.Response) -> dict[str, str]:
    """The content security policy: name -> what is allowed."""
    policy = response.headers["content-security-policy"].split("; ")
    return {name: allowed for name, _, allowed in (rule.partition(" ") for rule in policy)}


@pytest.mark.parametrize("settings", [{}, {"keys": KEYS}])
def test_the_page_is_for_everyone_who_reaches_the_endpoint(call, settings):
    response = call(FakeBackend(), "GET", "/", settings=settings)
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.text == HTML


def test_a_browser_runs_the_scripts_and_styles_of_the_file_alone(call):
    found = rules(call(FakeBackend(), "GET", "/"))
    assert found["default-src"] == found["frame-ancestors"] == found["base-uri"] == "'none'"
    assert found["connect-src"] == "'self'" and found["require-trusted-types-for"] == "'script'"
    for name in ("script", "style"):
        [text] = re.findall(rf"<{name}>(.*?)</{name}>", HTML, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert found[f"{name}-src"] == f"'sha256-{digest}'"
    assert not re.search(r"<(?:script|style)\s|\sstyle=|\son\w+=", HTML), "what no hash allows"


def test_the_file_names_nothing_of_elsewhere_and_makes_no_html_of_text():
    assert not re.search(r"https?:|//\w+\.|@import|url\(|<link (?!rel=\"icon\" href=\"data:,\")", HTML)
    assert not re.search(r"(inner|outer)HTML|insertAdjacent|document\.write|\beval\b|localStorage", HTML)
    assert len(HTML.splitlines()) <= 450


def test_an_endpoint_without_the_page(call):
    for path in ("/", "/load"):
        response = call(FakeBackend(), "GET", path, settings={"page": False})
        assert response.status_code == 404 and "message" in response.json()["error"]


def test_the_load_is_that_of_all_replicas(call):
    response = call(FakeBackend(), "GET", "/load")
    load = response.json()
    assert load.pop("seen_s") > 0
    assert load == IDLE
    assert response.headers["cache-control"] == "no-store"


@pytest.mark.parametrize(("key", "status"), [(None, 401), ("wrong", 401), ("few", 403), ("all", 200)])
def test_the_load_is_for_those_who_may_read_metrics(call, key, status):
    headers = bearer(key) if key else {}
    response = call(FakeBackend(), "GET", "/load", settings={"keys": KEYS}, headers=headers)
    assert response.status_code == status
    assert (
        response.status_code
        == call(FakeBackend(), "GET", "/metrics", settings={"keys": KEYS}, headers=headers).status_code
    )


def test_replicas_that_do_not_answer_are_an_error(call):
    backend = FakeBackend()
    backend.down = RemoteError("endpoint", "no replica answered")
    assert call(backend, "GET", "/load").status_code == 503


def test_a_load_tells_when_the_replicas_told_it():
    told = {"running": 1, "seen_s": 100.0}
    assert page.load_of([told, told], num_requests=2)["seen_s"] == 100.0


def test_what_waits_for_a_replica_is_seen_by_the_gateway_alone():
    assert page.load_of([], num_requests=3)["waiting"] == 3
    running = {"waiting": 0, "running": 2, "generated_tokens": 5, "adapters": []}
    assert page.load_of([running], num_requests=5)["waiting"] == 3
    several = {**running, "running": 8, "waiting": 2}  # one request may be several of the engine's
    assert page.load_of([several], num_requests=1)["waiting"] == 2


def test_a_running_request_is_in_the_load(tokenizer, ids, monkeypatch):
    """While no replica runs it waits for one."""
    backend = FakeBackend(ids("ab"))
    backend.hangs_after = 1
    app = make_app(backend, tokenizer, GatewaySettings("tiny", MAX_LENGTH))

    async def none_runs() -> list:
        return []

    async def main() -> list[int]:
        monkeypatch.setattr(backend, "stats", none_runs)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway") as client:
            waiting = [(await client.get("/load")).json()["waiting"]]
            body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
            asking = asyncio.ensure_future(client.post("/v1/chat/completions", json=body))
            await backend.hanging.wait()
            waiting.append((await client.get("/load")).json()["waiting"])
            asking.cancel()
            await asyncio.wait({asking})
            return waiting

    assert asyncio.run(main()) == [0, 1]


def test_one_look_at_all_replicas_is_for_everyone_who_asks():
    asked = []

    class Replicas:
        async def everywhere(self, method, *arguments):
            asked.append((method, *arguments))
            return [{"running": 1}, {"running": 2}]

    fleet = Fleet(Replicas(), None, None, clock=lambda: 100.0)  # type: ignore[arg-type]  # neither is looked at

    async def main() -> list[list[dict]]:
        await fleet.ready()
        return await asyncio.gather(*(fleet.stats() for _ in range(5)))

    assert asyncio.run(main()) == [[{"running": 1, "seen_s": 100.0}, {"running": 2, "seen_s": 100.0}]] * 5
    assert asked == [("stats",)]
