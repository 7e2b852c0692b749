"""What happens to a request before the engine: its key's requests count first, then its body and its prompts are read
beside the event loop, then its tokens count."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import httpx
import pytest

from lmray.serve import gateway
from lmray.serve.gateway import READERS, GatewaySettings, make_app
from tests.unit.serve.asgi import post
from tests.unit.serve.conftest import MAX_LENGTH
from tests.unit.serve.fakes import FakeBackend
from tests.unit.serve.servers import key


class Gate:
    """A tokenizer that reads marked prompts when it is let."""

    def __init__(self, tokenizer: Any):
        self._tokenizer, self.opened, self.read = tokenizer, threading.Event(), []
        self.entered = threading.Semaphore(0)
        self.inside, self.most = 0, 0
        self._lock = threading.Lock()

    def __call__(self, text: str, **options: Any) -> Any:
        if "held" in text:
            with self._lock:
                self.inside += 1
                self.most = max(self.most, self.inside)
            self.entered.release()
            assert self.opened.wait(60)
            with self._lock:
                self.inside -= 1
        self.read.append(text)
        return self._tokenizer(text, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


@pytest.fixture
def gate(tokenizer):
    gate = Gate(tokenizer)
    yield gate
    gate.opened.set()


def with_client(app, main: Callable[[httpx.AsyncClient], Awaitable[Any]]) -> Any:
    async def run() -> Any:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://gateway", timeout=60) as client:
            return await main(client)

    return asyncio.run(run())


def completion(client: httpx.AsyncClient, prompt: str, key: str = "", **fields: Any) -> Awaitable[httpx.Response]:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    body = {"model": "tiny", "prompt": prompt, **fields}
    return client.post("/v1/completions", json=body, headers=headers)


def test_a_prompt_that_takes_long_to_read_keeps_nobody_else_waiting(gate, ids):
    app = make_app(FakeBackend(ids("x")), gate, GatewaySettings("tiny", MAX_LENGTH))

    async def main(client: httpx.AsyncClient):
        slow = asyncio.ensure_future(completion(client, "held"))
        await asyncio.to_thread(gate.entered.acquire)
        health, other = await client.get("/health"), await completion(client, "quick")
        assert not slow.done()
        gate.opened.set()
        return health.status_code, other.status_code, (await slow).status_code

    assert with_client(app, main) == (200, 200, 200)


def test_a_body_that_takes_long_to_read_keeps_nobody_else_waiting(tokenizer, ids, monkeypatch):
    app = make_app(FakeBackend(ids("x")), tokenizer, GatewaySettings("tiny", MAX_LENGTH))
    entered, opened, read = threading.Event(), threading.Event(), gateway.read_request

    def held(kind: Any, body: Any) -> Any:
        entered.set()
        assert opened.wait(60)
        return read(kind, body)

    monkeypatch.setattr(gateway, "read_request", held)

    async def main(client: httpx.AsyncClient):
        slow = asyncio.ensure_future(completion(client, "x"))
        await asyncio.to_thread(entered.wait)
        health = await client.get("/health")
        opened.set()
        return health.status_code, (await slow).status_code

    assert with_client(app, main) == (200, 200)


@pytest.mark.parametrize("body", [b"{", b'{"model": "tiny"}', b'{"model": "other", "prompt": "x"}'])
def test_a_request_that_is_wrong_counts_too(tokenizer, ids, body):
    settings = GatewaySettings("tiny", MAX_LENGTH, keys=(key("one", requests_per_minute=1),))
    app = make_app(FakeBackend(ids("x")), tokenizer, settings)

    async def main(client: httpx.AsyncClient):
        wrong = await client.post("/v1/completions", content=body, headers={"Authorization": "Bearer one"})
        return wrong.status_code, (await completion(client, "x", "one")).status_code

    assert with_client(app, main) in ((400, 429), (404, 429))


def test_a_key_beyond_its_requests_is_refused_before_its_body_is_there(tokenizer, ids):
    settings = GatewaySettings("tiny", MAX_LENGTH, keys=(key("one", requests_per_minute=1),))
    app = make_app(FakeBackend(ids("x")), tokenizer, settings)

    async def body() -> AsyncIterator[bytes]:
        raise AssertionError("waited for although it is not answered")
        yield b""

    async def main(client: httpx.AsyncClient):
        await completion(client, "x", "one")
        return await client.post("/v1/completions", content=body(), headers={"Authorization": "Bearer one"})

    assert with_client(app, main).status_code == 429


def test_so_many_prompts_are_read_at_a_time_and_no_more(gate, ids):
    app = make_app(FakeBackend(ids("x")), gate, GatewaySettings("tiny", MAX_LENGTH))

    async def main(client: httpx.AsyncClient):
        slow = [asyncio.ensure_future(completion(client, f"held {place}")) for place in range(READERS + 3)]
        for _ in range(READERS):
            await asyncio.to_thread(gate.entered.acquire)
        assert (await client.get("/health")).status_code == 200
        gate.opened.set()
        return [answer.status_code for answer in await asyncio.gather(*slow)]

    assert with_client(app, main) == [200] * (READERS + 3)
    assert gate.most == READERS


def test_a_key_beyond_its_requests_is_refused_before_its_prompt_is_read(gate, ids):
    keys = (key("one", requests_per_minute=1), key("alone", max_concurrent_requests=1))
    app = make_app(FakeBackend(ids("x")), gate, GatewaySettings("tiny", MAX_LENGTH, keys=keys))

    async def main(client: httpx.AsyncClient):
        first, second = await completion(client, "first", "one"), await completion(client, "second", "one")
        running = asyncio.ensure_future(completion(client, "held", "alone"))
        await asyncio.to_thread(gate.entered.acquire)
        beside = await completion(client, "beside", "alone")
        gate.opened.set()
        return [one.status_code for one in (first, second, beside, await running)]

    assert with_client(app, main) == [200, 429, 429, 200]
    assert "first" in gate.read and "held" in gate.read
    assert not {"second", "beside"} & set(gate.read)


def test_tokens_of_a_prompt_count_once_it_is_read_and_what_is_not_left_is_not_answered(tokenizer, ids):
    backend = FakeBackend(ids("xy"))
    settings = GatewaySettings("tiny", MAX_LENGTH, keys=(key("few", tokens_per_minute=20),))
    app = make_app(backend, tokenizer, settings)

    async def main(client: httpx.AsyncClient):
        return [await completion(client, "a" * num, "few") for num in (21, 12, 7, 6, 1)]

    found = with_client(app, main)
    assert [one.status_code for one in found] == [400, 200, 429, 200, 429]
    assert "has a prompt of 21 tokens\n  allowed: 20, this key's tokens_per_minute" in found[0].text.replace(
        "\\n", "\n"
    )
    assert found[2].json()["error"]["code"] == "rate_limit_exceeded" and "retry-after" in found[2].headers
    assert [len(request.prompt_ids) for request in backend.requests] == [12, 6]


@pytest.mark.parametrize("leaves_in", ["the queue", "reading"])
def test_a_client_that_leaves_before_its_prompt_is_read_asks_the_engine_nothing(gate, ids, leaves_in):
    backend = FakeBackend(ids("x"))
    app = make_app(backend, gate, GatewaySettings("tiny", MAX_LENGTH))

    async def main(client: httpx.AsyncClient):
        num = READERS if leaves_in == "the queue" else 0
        others = [asyncio.ensure_future(completion(client, f"held {place}")) for place in range(num)]
        for _ in range(num):
            await asyncio.to_thread(gate.entered.acquire)
        gone = asyncio.Event()
        body = {"model": "tiny", "prompt": "held, and left"}
        leaving = asyncio.ensure_future(post(app, "/v1/completions", body, gone=gone))
        if not num:
            await asyncio.to_thread(gate.entered.acquire)
        gone.set()
        await leaving
        gate.opened.set()
        await asyncio.gather(*others)

    with_client(app, main)
    assert not any("left" in gate._tokenizer.decode(list(request.prompt_ids)) for request in backend.requests)
    if leaves_in == "the queue":
        assert "held, and left" not in gate.read
