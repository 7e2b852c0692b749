"""A backend that says what it is told to, and remembers what it was asked."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence

from lmray.engines.base import Request, TokenEvent
from lmray.errors import LmrayError


class FakeBackend:
    """Answers every request with `ids`, then `finish_reason`; raises `error` after `fails_after` of them."""

    def __init__(
        self,
        ids: Sequence[int] = (),
        *,
        finish_reason: str = "stop",
        error: LmrayError | None = None,
        fails_after: int = 0,
        adapters: Sequence[str] = ("helper",),
    ):
        self.ids, self.finish_reason, self.error, self.fails_after = tuple(ids), finish_reason, error, fails_after
        self.names = tuple(adapters)
        self.requests: list[Request] = []
        self.closed: list[str] = []
        self.hangs_after: int | None = None
        self.hanging = asyncio.Event()
        self.down: LmrayError | None = None

    async def adapters(self) -> tuple[str, ...]:
        if self.down is not None:
            raise self.down
        return self.names

    async def stream(self, request: Request) -> AsyncGenerator[TokenEvent, None]:
        self.requests.append(request)
        try:
            for place, token_id in enumerate(self.ids):
                await self._trouble(place)
                last = place == len(self.ids) - 1 and self.finish_reason == "length"
                yield TokenEvent(request.id, token_id, "length" if last else None)
            await self._trouble(len(self.ids))
            if self.finish_reason == "stop":
                yield TokenEvent(request.id, None, "stop")
        finally:
            self.closed.append(request.id)

    async def _trouble(self, place: int) -> None:
        if self.error is not None and place >= self.fails_after:
            raise self.error
        if place == self.hangs_after:
            self.hanging.set()
            await asyncio.Event().wait()
