"""Clients that ask and do not read: what they were to get would be held for them for ever."""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from typing import Any

LOOKS = 4
"""At what is still to be written, within the time that a client has for it."""
_RESET = struct.pack("ii", 1, 0)
"""On, for 0 s: what the system still holds for the client goes with the connection."""


class SlowClients:
    """ASGI middleware, directly below uvicorn: who takes nothing of an answer for `send_timeout_s` has left, and the
    connection is cut. The application sees what it sees when a client hangs up."""

    def __init__(self, app: Any, *, send_timeout_s: float):
        self._app, self._send_timeout_s = app, send_timeout_s

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        transport = getattr(getattr(send, "__self__", None), "transport", None)

        async def sending(message: Any) -> None:
            try:
                async with asyncio.timeout(self._send_timeout_s):
                    await send(message)
            except TimeoutError:
                if transport is None:  # of a server that does not show it: what ASGI has for a client that left
                    raise OSError("the client does not read") from None
                _cut(transport)

        await self._app(scope, receive, sending)
        if transport is not None:
            await self._written(transport)

    async def _written(self, transport: Any) -> None:
        """Returns once all is written: `send` waits for what is before a piece of an answer, and not for the piece."""
        before, waited = transport.get_write_buffer_size(), 0
        while before and waited < LOOKS:
            await asyncio.sleep(self._send_timeout_s / LOOKS)
            left = transport.get_write_buffer_size()
            before, waited = left, 0 if left < before else waited + 1
        if before:
            _cut(transport)


def _cut(transport: Any) -> None:
    """Ends the connection with what waits to be written."""
    place = transport.get_extra_info("socket")
    if place is not None and place.fileno() >= 0:
        with socket.socket(fileno=os.dup(place.fileno())) as same:
            same.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    transport.abort()
