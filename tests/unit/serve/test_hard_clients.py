"""Clients that send too much, too slowly, or do not read, over real sockets."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from urllib.parse import urlsplit

import openai
import pytest

from lmray.config.endpoint import HttpLimits
from lmray.engines.base import TokenEvent
from lmray.serve.gateway import GatewaySettings, make_app
from lmray.serve.slow_clients import SlowClients
from lmray.testing.listening import is_cut, listening
from tests.unit.serve.conftest import MAX_LENGTH
from tests.unit.serve.fakes import LETTER_A, FakeBackend

LIMITS = HttpLimits(body_timeout_s=2.0)
MEGABYTE = 2**20
BODY = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "stream": True}


class Endless(FakeBackend):
    """Answers without an end; says when it is asked, and when it is not any more."""

    def __init__(self):
        super().__init__()
        self.begun, self.ended = threading.Event(), threading.Event()

    async def stream(self, request):
        self.begun.set()
        try:
            while True:
                yield TokenEvent(request.id, LETTER_A)
        finally:
            self.ended.set()


@pytest.fixture(scope="module")
def backend() -> Endless:
    return Endless()


@pytest.fixture(scope="module", params=["asyncio", "uvloop"])
def url(request, tokenizer, backend) -> Iterator[str]:
    app = make_app(backend, tokenizer, GatewaySettings("tiny", MAX_LENGTH, limits=LIMITS))
    with listening(SlowClients(app, send_timeout_s=1.0), path="/v1", loop=request.param) as url:
        yield url


@pytest.fixture
def connection(url) -> Iterator[socket.socket]:
    place = urlsplit(url)
    assert place.hostname is not None
    with socket.socket() as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        one.settimeout(60)
        one.connect((place.hostname, place.port))
        yield one


def head(*fields: str) -> bytes:
    lines = ["POST /v1/chat/completions HTTP/1.1", "Host: gateway", "Content-Type: application/json", *fields]
    return "\r\n".join([*lines, "", ""]).encode()


def test_a_prompt_of_a_hundred_megabytes_is_refused_in_the_clients_own_words(url):
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        with pytest.raises(openai.APIStatusError) as refused:
            client.completions.create(model="tiny", prompt="x" * 100 * MEGABYTE)
        assert refused.value.status_code == 413 and refused.value.code == "request_too_large"
        assert client.models.list().data, "the next request is answered"


def test_a_body_without_an_end_is_refused_while_it_still_comes(connection):
    connection.sendall(head("Transfer-Encoding: chunked"))
    for _ in range(LIMITS.max_body_bytes // 2**16 + 1):
        connection.sendall(b"10000\r\n" + b" " * 2**16 + b"\r\n")
    assert connection.recv(4096).startswith(b"HTTP/1.1 413")


def test_a_body_that_comes_too_slowly_is_answered(connection):
    connection.sendall(head("Content-Length: 1000") + b'{"model": ')
    answer = connection.recv(4096)
    assert answer.startswith(b"HTTP/1.1 408")


def test_who_does_not_read_an_answer_is_not_answered_for_long(connection, backend):
    backend.begun.clear()
    backend.ended.clear()
    body = json.dumps(BODY).encode()
    connection.sendall(head(f"Content-Length: {len(body)}") + body)
    assert connection.recv(100).startswith(b"HTTP/1.1 200")
    assert backend.ended.wait(60)
    assert is_cut(connection), "what it left unread would be held for ever"


def test_who_hangs_up_is_not_answered_any_more(connection, backend):
    backend.begun.clear()
    backend.ended.clear()
    body = json.dumps({**BODY, "stream": False}).encode()
    connection.sendall(head(f"Content-Length: {len(body)}") + body)
    assert backend.begun.wait(60)
    connection.close()
    assert backend.ended.wait(60)
