"""What comes one by one, sent on together: a message between processes costs as much for one token as for ten."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TypeVar

T = TypeVar("T")


async def gathered(items: AsyncGenerator[T, None], every_s: float) -> AsyncGenerator[list[T], None]:
    """`items` in lists: the first at once, and then what has come `every_s` after the list before, or when they end.

    Closing it closes `items`. Raises what `items` raises, behind what came before.
    """
    came: list[T] = []
    woken = asyncio.Event()

    async def take() -> None:
        async with aclosing(items):
            async for item in items:
                came.append(item)
                woken.set()

    taking = asyncio.ensure_future(take())
    taking.add_done_callback(lambda _: woken.set())
    try:
        while came or not taking.done():
            await woken.wait()
            woken.clear()
            if came:
                some, came[:] = came[:], []
                yield some
                await asyncio.wait({taking}, timeout=every_s)
        await taking
    finally:
        taking.cancel()
        await asyncio.gather(taking, return_exceptions=True)
