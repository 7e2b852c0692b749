"""A client in plain ASGI, so that the moment it leaves and the parts it sends are the test's."""

from __future__ import annotations

import asyncio
import json
from typing import Any


async def post(
    app: Any, path: str, body: dict[str, Any] | list[Any], *, gone: asyncio.Event | None = None, send: Any = None
) -> None:
    """One request: `body` whole, or the messages that come of it. The client leaves when `gone` is set, never without
    it; `send` hears the answer."""
    if isinstance(body, dict):
        body = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]
    inbox = iter(body)

    async def receive() -> Any:
        for message in inbox:
            return message
        await (gone or asyncio.Event()).wait()
        return {"type": "http.disconnect"}

    async def ignore(message: Any) -> None:
        pass

    scope = {"type": "http", "method": "POST", "path": path, "headers": [], "query_string": b"", "asgi": {}}
    scope |= {"http_version": "1.1", "scheme": "http", "server": ("gateway", 80)}
    await app(scope, receive, send or ignore)
