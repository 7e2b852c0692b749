"""Notices a client that left while its answer was being made, so that nobody generates for nobody."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from typing import TypeVar

from fastapi import Request

T = TypeVar("T")


class ClientGoneError(Exception):
    """The client closed the connection."""


async def until_gone(http: Request, items: AsyncIterator[T]) -> AsyncGenerator[T, None]:
    """`items` as they come. Raises ClientGoneError once the client has left; `items` is closed in any case."""
    gone = asyncio.ensure_future(_gone(http))
    coming: asyncio.Future[T] | None = None
    try:
        while True:
            coming = asyncio.ensure_future(_next(items))
            await asyncio.wait({gone, coming}, return_when=asyncio.FIRST_COMPLETED)
            if not coming.done():
                raise ClientGoneError
            if isinstance(coming.exception(), StopAsyncIteration):
                return
            yield coming.result()
    finally:
        await _cancelled(gone)
        if coming is not None:
            await _cancelled(coming)
        if (close := getattr(items, "aclose", None)) is not None:
            await close()


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
