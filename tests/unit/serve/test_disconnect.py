"""A client that leaves, as servers tell it: what was being made for it is closed."""

from __future__ import annotations

import asyncio

import anyio
import pytest
from fastapi import Request

from lmray.serve.disconnect import until_gone


@pytest.mark.parametrize("num_made", [0, 1])
def test_items_are_closed_where_the_server_cancels_at_every_await(num_made):
    """As Starlette does for a streamed response, once its own listener heard that the client left."""

    async def main() -> None:
        waits, closed = asyncio.Event(), asyncio.Event()

        async def items():
            try:
                for item in range(num_made):
                    yield item
                waits.set()
                await asyncio.Event().wait()
            finally:
                await asyncio.sleep(0)
                closed.set()

        async def receive():
            await asyncio.Event().wait()

        async def answer() -> None:
            async for _ in until_gone(Request({"type": "http"}, receive), items()):
                pass

        async with anyio.create_task_group() as group:
            group.start_soon(answer)
            await waits.wait()
            group.cancel_scope.cancel()
        await asyncio.wait_for(closed.wait(), 60)

    asyncio.run(main())
