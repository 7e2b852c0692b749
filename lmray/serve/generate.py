"""All answers to one HTTP request, made side by side."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

from lmray.engines.base import Request
from lmray.errors import RemoteError
from lmray.serve.account import Account
from lmray.serve.answer import Answer, Backend, Piece

T = TypeVar("T")


async def answer_pieces(
    backend: Backend, request: Request, answer: Answer, account: Account
) -> AsyncGenerator[Piece, None]:
    """`answer` to `request`, to its finish reason; closing it, or a stop string, ends the engine's work."""
    before_s = None
    async with aclosing(backend.stream(request)) as events:
        async for event in events:
            before_s = account.take(event, before_s)
            long = event.prompt_logprobs is not None  # a whole prompt's, which would keep all others waiting
            piece = await asyncio.to_thread(answer.push, event) if long else answer.push(event)
            account.find("answers", piece.filtered)
            yield piece
            if piece.finish_reason is not None:
                return
    raise RemoteError("endpoint", "the answer broke off")


async def side_by_side(streams: Sequence[AsyncGenerator[T, None]]) -> AsyncGenerator[tuple[int, T], None]:
    """Items of all `streams` as they come, each with its stream's place. Closes all of them when it is closed, or when
    one raises."""
    if len(streams) == 1:  # the common case, without a task a token
        async with aclosing(streams[0]) as alone:
            async for item in alone:
                yield 0, item
        return
    coming: dict[asyncio.Future[Any], int] = {}
    try:
        for place, stream in enumerate(streams):
            coming[asyncio.ensure_future(_next(stream))] = place
        while coming:
            done, _ = await asyncio.wait(coming, return_when=asyncio.FIRST_COMPLETED)
            for task in sorted(done, key=coming.__getitem__):
                place, item = coming.pop(task), task.result()
                if item is not None:
                    yield place, item
                    coming[asyncio.ensure_future(_next(streams[place]))] = place
    finally:
        for task in coming:
            task.cancel()
        await asyncio.gather(*coming, return_exceptions=True)
        for stream in streams:
            await stream.aclose()


async def _next(stream: AsyncGenerator[T, None]) -> T | None:
    return await anext(stream, None)
