"""One look at what takes its time to answer, for everybody who wants to know."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

from lmray.errors import LmrayError, RemoteError

T = TypeVar("T")
FRESH_S = 1.0
"""A look serves everybody who asks for so long from when it began."""
PATIENCE_S = 1.0
"""Nobody waits longer: what the look before saw holds until this one has ended."""


class Look(Generic[T]):
    """What `ask` gave last. It is asked by one call at a time, however many want to know and however long it takes."""

    def __init__(self, ask: Callable[[], Awaitable[T]], *, clock: Callable[[], float] = time.monotonic):
        """`ask` raises LmrayError."""
        self._ask, self._clock = ask, clock
        self._began = float("-inf")
        self._looking: asyncio.Task[None] | None = None
        self._told: T | LmrayError = RemoteError(
            "endpoint", "no replica has answered yet", hint="come back in a moment"
        )

    async def told(self) -> T:
        """Raises what the last look did."""
        if self._looking is None or (self._looking.done() and self._clock() - self._began >= FRESH_S):
            self._began = self._clock()
            self._looking = asyncio.create_task(self._look())
        ended, _ = await asyncio.wait({self._looking}, timeout=PATIENCE_S)
        for look in ended:
            look.result()
        if isinstance(self._told, LmrayError):
            raise self._told.with_traceback(None)
        return self._told

    async def _look(self) -> None:
        try:
            self._told = await self._ask()
        except LmrayError as error:
            self._told = error
