"""What the middleware does with a server that is not uvicorn; `test_hard_clients` has real sockets."""

from __future__ import annotations

import asyncio

import pytest

from lmray.serve.slow_clients import SlowClients


def run(send) -> None:
    async def app(scope, receive, sending):
        await sending({"type": "http.response.start"})
        await sending({"type": "http.response.body"})

    asyncio.run(SlowClients(app, send_timeout_s=0.05)({"type": "http"}, None, send))


def test_a_client_that_reads_gets_everything():
    sent = []

    async def send(message):
        sent.append(message["type"])

    run(send)
    assert sent == ["http.response.start", "http.response.body"]


def test_a_server_without_a_connection_to_cut_is_told_that_the_client_left():
    async def send(message):
        if message["type"] == "http.response.body":
            await asyncio.Event().wait()

    with pytest.raises(OSError, match="does not read"):
        run(send)
