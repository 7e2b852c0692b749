"""Who asks is known to what works on the request, and to nobody else."""

from __future__ import annotations

import asyncio

import httpx
from fastapi import FastAPI

from lmray.serve.visitors import VISITOR, Visitors


def test_equal_keys_are_one_visitor_and_no_key_is_none():
    app = FastAPI()
    app.add_middleware(Visitors)

    @app.get("/")
    async def visitor() -> str:
        return await asyncio.ensure_future(asyncio.sleep(0, VISITOR.get()))

    async def main() -> list[str]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway") as client:
            keys = ("one", "one", "two", None)
            told = [{"Authorization": f"Bearer {key}"} if key else {} for key in keys]
            return [(await client.get("/", headers=headers)).json() for headers in told]

    one, again, two, none = asyncio.run(main())
    assert one == again != two and none == "" and "one" not in one and VISITOR.get() == ""
