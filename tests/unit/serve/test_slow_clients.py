"""Clients that take their time, on both of uvicorn's loops; `test_hard_clients` has them before the gateway."""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
from collections.abc import Iterator
from urllib.parse import urlsplit

import pytest

from lmray.serve.slow_clients import SlowClients
from lmray.testing.listening import is_cut, listening

SIZE = 16 * 2**20
"""More than the system holds on the way to one who does not read."""
PIECE = 2**18
REQUEST = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"


async def large(scope, receive, send) -> None:
    """A large answer in one piece; of others, the path is the answer."""
    body = b"x" * SIZE if scope["path"] == "/" else scope["path"].encode()
    head = [(b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": head})
    await send({"type": "http.response.body", "body": body})


@pytest.fixture(params=["asyncio", "uvloop"])
def connection(request) -> Iterator[socket.socket]:
    with listening(SlowClients(large, send_timeout_s=0.5), loop=request.param) as url, socket.socket() as one:
        place = urlsplit(url)
        assert place.hostname is not None
        one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        one.settimeout(60)
        one.connect((place.hostname, place.port))
        yield one


def test_one_large_piece_that_nobody_reads_is_not_held_for_long(connection):
    connection.sendall(REQUEST)
    assert is_cut(connection)


def test_who_reads_slowly_gets_all_of_it_and_the_next_answer(connection):
    connection.sendall(REQUEST)
    received, num_pauses, pause = 0, 0, threading.Event()
    while received < SIZE:
        if received >= num_pauses * SIZE / 10:  # altogether longer than a client has that takes nothing
            num_pauses += 1
            pause.wait(0.1)
        received += len(some := connection.recv(PIECE))
        assert some, "it was cut"
    connection.sendall(REQUEST.replace(b"GET / ", b"GET /again "))
    answer = b""
    while b"/again" not in answer:
        answer += (some := connection.recv(PIECE))
        assert some, "it was cut"


def test_who_hangs_up_in_the_middle_leaves_no_error(connection, caplog):
    connection.sendall(REQUEST)
    assert connection.recv(10)
    place = connection.getpeername()
    connection.close()
    with socket.create_connection(place) as other:
        other.sendall(REQUEST)
        assert is_cut(other), "after that one all of the first has passed"
    assert [one.getMessage() for one in caplog.records if one.levelno >= logging.WARNING] == []


def test_a_server_without_a_connection_to_cut_is_told_that_the_client_left():
    async def send(message):
        if message["type"] == "http.response.body":
            await asyncio.Event().wait()

    with pytest.raises(OSError, match="does not read"):
        asyncio.run(SlowClients(large, send_timeout_s=0.05)({"type": "http", "path": "/a"}, None, send))


def test_a_client_that_reads_gets_everything():
    sent = []

    async def send(message):
        sent.append(message["type"])

    asyncio.run(SlowClients(large, send_timeout_s=0.05)({"type": "http", "path": "/a"}, None, send))
    assert sent == ["http.response.start", "http.response.body"]
