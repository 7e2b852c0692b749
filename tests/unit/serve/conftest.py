"""What every test of the gateway needs: a tokenizer, and a client that speaks to the app without a network."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from lmray.serve.gateway import GatewaySettings, make_app
from lmray.testing.tiny import tiny_tokenizer
from tests.unit.serve.fakes import FakeBackend

MAX_LENGTH = 256


@pytest.fixture(scope="session")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture
def ids(tokenizer) -> Callable[[str], list[int]]:
    """Ids of a text: one a byte."""
    return lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.fixture
def call(tokenizer) -> Callable[..., httpx.Response]:
    """One HTTP request to a gateway over `backend`."""

    def ask(backend: FakeBackend, method: str, path: str, *, settings: dict[str, Any] | None = None, **told):
        app = make_app(backend, tokenizer, GatewaySettings("tiny", MAX_LENGTH, **(settings or {})))

        async def main() -> httpx.Response:
            transport = httpx.ASGITransport(app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
                return await client.request(method, path, **told)

        return asyncio.run(main())

    return ask


@pytest.fixture
def chat(call) -> Callable[..., httpx.Response]:
    """One chat completion of `backend`; keywords are fields of the request."""

    def ask(backend: FakeBackend, **fields) -> httpx.Response:
        body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], **fields}
        return call(backend, "POST", "/v1/chat/completions", json=body)

    return ask
