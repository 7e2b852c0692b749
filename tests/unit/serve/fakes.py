"""A backend that says what it is told to, and remembers what it was asked."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from lmray.engines.base import FinishReason, Request, TokenEvent, TokenLogprob
from lmray.errors import LmrayError

STOP, LETTER_A = 2, 67
BLOCKS = {"free_blocks": 6, "num_blocks": 8}


class FakeBackend:
    """Answers every request with `ids`, then `finish_reason`; raises `error` after `fails_after` of them."""

    def __init__(
        self,
        ids: Sequence[int] = (),
        *,
        finish_reason: FinishReason = "stop",
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
        self.looks = 0

    async def adapters(self) -> tuple[str, ...]:
        if self.down is not None:
            raise self.down
        return self.names

    async def ready(self) -> None:
        if self.down is not None:
            raise self.down

    async def stats(self) -> list[dict[str, Any]]:
        """Two engines, one of which has blocks."""
        self.looks += 1
        if self.down is not None:
            raise self.down
        first = {"waiting": 1, "running": 2, "generated_tokens": 30, "adapters": ["helper@1", "other@1"]}
        return [first, {"waiting": 0, "running": 1, "generated_tokens": 4, "adapters": ["helper@1"], **BLOCKS}]

    async def stream(self, request: Request) -> AsyncGenerator[TokenEvent, None]:
        self.requests.append(request)
        try:
            for place, token_id in enumerate(self.ids):
                await self._trouble(place)
                last = place == len(self.ids) - 1 and self.finish_reason == "length"
                yield self._event(request, place, token_id, "length" if last else None)
            await self._trouble(len(self.ids))
            if self.finish_reason == "stop":
                yield self._event(request, len(self.ids), None, "stop")
        finally:
            self.closed.append(request.id)

    def _event(self, request: Request, place: int, token_id: int | None, reason: FinishReason | None) -> TokenEvent:
        """With log probabilities of -1 for what was asked, and -2 for the token `a`."""
        sampling, told = request.sampling, None
        if sampling.logprobs is not None:
            told = _logprob(STOP if token_id is None else token_id, sampling.logprobs)
        read = None
        if place == 0 and sampling.prompt_logprobs is not None:
            read = (None, *(_logprob(one, sampling.prompt_logprobs) for one in request.prompt_ids[1:]))
        prefill_s = 0.0 if place == 0 else None
        return TokenEvent(request.id, token_id, reason, told, read, prefill_s)

    async def _trouble(self, place: int) -> None:
        if self.error is not None and place >= self.fails_after:
            raise self.error
        if place == self.hangs_after:
            self.hanging.set()
            await asyncio.Event().wait()


def _logprob(token_id: int, num_top: int) -> TokenLogprob:
    return TokenLogprob(token_id, -1.0, ((token_id, -1.0), (LETTER_A, -2.0))[:num_top])
