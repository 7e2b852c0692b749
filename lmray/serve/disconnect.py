"""Notices a client that left while its answer was being made, so that nobody generates for nobody, and one that is
answered for too long."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable
from contextlib import aclosing
from typing import TypeVar

from fastapi import Request

from lmray.serve.failures import AnswerError, error_body

T = TypeVar("T")
_CLOSING: set[asyncio.Future[None]] = set()
"""What is being closed; the event loop itself would forget it."""


class ClientGoneError(Exception):
    """The client closed the connection."""


async def until_gone(
    http: Request, items: AsyncIterator[T], *, timeout_s: float = float("inf")
) -> AsyncGenerator[T, None]:
    """`items` as they come. Raises ClientGoneError once the client has left, AnswerError (504) for an item that is not
    there `timeout_s` after the first was asked for; `items` is closed in any case."""
    loop = asyncio.get_running_loop()
    deadline_s = loop.time() + timeout_s
    gone = asyncio.ensure_future(_gone(http))
    coming: asyncio.Future[T] | None = None
    try:
        while True:
            coming = asyncio.ensure_future(_next(items))
            left_s = None if timeout_s == float("inf") else max(0.0, deadline_s - loop.time())
            await asyncio.wait({gone, coming}, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
            if gone.done():  # also where the next item is there: items may come without a pause
                raise ClientGoneError
            if not coming.done() or loop.time() > deadline_s:
                found = f"the answer was not done after {timeout_s:g} s"
                raise AnswerError(504, error_body(found, kind="server_error", code="timeout"))
            if isinstance(coming.exception(), StopAsyncIteration):
                return
            yield coming.result()
    finally:  # a task of its own: a server that has seen the client leave cancels this one at every `await`
        closing = asyncio.ensure_future(_close(gone, coming, items))
        _CLOSING.add(closing)
        closing.add_done_callback(_CLOSING.discard)
        await asyncio.shield(closing)


async def _close(gone: asyncio.Future, coming: asyncio.Future | None, items: AsyncIterator) -> None:
    await _cancelled(gone)
    if coming is not None:
        await _cancelled(coming)
    if (close := getattr(items, "aclose", None)) is not None:
        await close()


async def unless_gone(http: Request, work: Awaitable[T]) -> T:
    """What `work` gives. Raises ClientGoneError once the client has left, and what `work` raises."""

    async def alone() -> AsyncIterator[T]:
        yield await work

    async with aclosing(until_gone(http, alone())) as found:
        return await anext(found)


async def _gone(http: Request) -> None:
    """Returns when the connection is closed; the body was read before."""
    while (await http.receive())["type"] != "http.disconnect":
        pass


async def _next(items: AsyncIterator[T]) -> T:
    return await anext(items)


async def _cancelled(task: asyncio.Future) -> None:
    task.cancel()
    await asyncio.wait({task})
    if not task.cancelled():
        task.exception()  # looked at, so that asyncio does not report it as lost
