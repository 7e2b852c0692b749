"""Who asks, for those who treat equal visitors equally: a digest of the key, known to all that works on a request.

A context variable carries it past the layers that have no use for it.
"""

from __future__ import annotations

import hashlib
from contextvars import ContextVar

from starlette.types import ASGIApp, Receive, Scope, Send

VISITOR: ContextVar[str] = ContextVar("visitor", default="")
"""Digest of the request's `Authorization`; empty without one."""


class Visitors:
    """ASGI middleware that sets `VISITOR`."""

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            given = dict(scope["headers"]).get(b"authorization", b"")
            VISITOR.set(hashlib.sha256(given).hexdigest() if given else "")
        await self._app(scope, receive, send)
