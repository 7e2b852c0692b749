"""Clients that ask and do not read: what they were to get would be held for them for ever."""

from __future__ import annotations

import asyncio
import socket
import struct
from typing import Any

_RESET = struct.pack("ii", 1, 0)
"""On, for 0 s: what the system still holds for the client goes with the connection."""


class SlowClients:
    """ASGI middleware, directly below the server: who takes longer than `send_timeout_s` to take a piece of an answer
    has left, and the connection is cut. The application sees what it sees when a client hangs up."""

    def __init__(self, app: Any, *, send_timeout_s: float):
        self._app, self._send_timeout_s = app, send_timeout_s

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def sending(message: Any) -> None:
            try:
                async with asyncio.timeout(self._send_timeout_s):
                    await send(message)
            except TimeoutError:
                _cut(send)

        await self._app(scope, receive, sending)


def _cut(send: Any) -> None:
    """Ends the connection that `send` writes to, with what waits to be written. Raises OSError, which ASGI has for a
    client that left, where the server does not say which connection that is; uvicorn does."""
    transport = getattr(getattr(send, "__self__", None), "transport", None)
    if transport is None:
        raise OSError("the client does not read")
    transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    transport.abort()
