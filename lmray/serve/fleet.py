"""The gateway's backend: from a name in a request to a version of the store, and on to a replica.

A request names the version from here on, so every replica serves the same one, also at a second try.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from dataclasses import replace
from typing import Any, Protocol

from lmray.engines.base import Request, TokenEvent
from lmray.errors import ArtifactError, CapacityError, DataError, LmrayError, NoRoomError, RemoteError, did_you_mean
from lmray.serve.canaries import Canaries, Comparison, answer_of
from lmray.serve.catalogue import Catalogue, Line
from lmray.serve.look import Look
from lmray.serve.visitors import STAGE, VISITOR

MAX_ATTEMPTS = 2
"""How often a request may be sent before its first token. No more: a request that ends every replica it meets is not to
meet them all."""
PATIENCE_S, RESEND_S = 10.0, 0.25
"""So long, and so often, a request whose replica died is sent again where all others are full: it had been taken on."""


class Replicas(Protocol):
    """Where requests go; an implementation picks the replica."""

    def stream(self, request: Request) -> AsyncGenerator[TokenEvent, None]:
        """Raises RemoteError where the replica died or none answers."""
        ...

    async def everywhere(self, method: str, *arguments: Any) -> list[Any]:
        """What `method` gave on every replica that runs; nothing of one that dies meanwhile. Raises LmrayError."""
        ...


class Fleet:
    """All replicas of an endpoint behind the names of its adapters."""

    def __init__(
        self,
        replicas: Replicas,
        catalogue: Catalogue,
        canaries: Canaries,
        *,
        merged: Mapping[str, Replicas] | None = None,
        min_replicas: int = 1,
        clock: Callable[[], float] = time.monotonic,
    ):
        """`merged`: adapters with replicas of their own, which know no adapter."""
        self.replicas, self.catalogue, self.canaries = replicas, catalogue, canaries
        self._merged = dict(merged or {})
        self._min_replicas, self._clock = min_replicas, clock
        self._look = Look(self._stats, clock=clock)

    async def ready(self) -> None:
        """Raises RemoteError while no replica can answer. An endpoint that may go down to none is ready without one:
        the next request starts it, and is answered."""
        for name, told in (await self._look.told()).items():
            if not told and self._min_replicas > 0:
                raise RemoteError(name or "endpoint", "no replica runs", hint="wait for one to start")

    async def adapters(self) -> tuple[str, ...]:
        """Names that requests may give; from memory, no replica is asked."""
        await self.catalogue.look()
        return tuple(sorted((*self.catalogue.names, *self._merged)))

    async def stats(self) -> list[dict[str, Any]]:
        """What each replica's engine told of itself with the last look at all of them, and `seen_s`, when that was.
        Raises LmrayError."""
        return [one for told in (await self._look.told()).values() for one in told]

    async def merged(self) -> dict[str, list[str]]:
        """What replicas of merged models serve: name -> `NAME@VERSION`, several while one replaces another, none while
        no replica runs. Raises LmrayError."""
        told = await self._look.told()
        return {name: sorted({one["version"] for one in told[name]}) for name in self._merged}

    async def stream(self, request: Request) -> AsyncGenerator[TokenEvent, None]:
        """The tokens that continue `request`. Closing it early cancels the request.

        It is sent again where its replica died before the first token. Where a version failed before that, another one
        answers: the current one for the next, so that a canary costs nobody an answer; the one before for the current
        one, where replicas refuse the weights of that; and the one promoted a moment ago, where that took its room.
        Raises ArtifactError for an unknown adapter, and what the replica raises.
        """
        if (own := self._merged.get(request.adapter or "")) is not None:
            async with aclosing(self._sent(replace(request, adapter=None), own)) as events:
                async for event in events:
                    yield event
            return
        versions, compared = self._versions(request)
        was_lost = False
        while versions:
            version, started = versions.pop(0), False
            try:
                watched = self._watched(replace(request, adapter=version), compared)
                async with aclosing(watched) as events:
                    async for event in events:
                        if was_lost and not started and compared is not None:
                            self.canaries.lost(compared, now_s=self._clock())
                        started = True
                        yield event
                return
            except LmrayError as error:
                if not started and not versions:
                    versions = await self._instead(request.adapter, version, error)
                if started or not versions:
                    raise
                was_lost = isinstance(error, RemoteError)

    async def _instead(self, name: str | None, version: str | None, error: LmrayError) -> list[str | None]:
        """What to try once `version`, the last there was to try, has failed with `error`."""
        line = self.catalogue.line(name or "")
        if name is None or version is None or line is None or _asks_next(line):
            return []
        other = None
        if isinstance(error, ArtifactError):  # replicas refuse its weights
            other = await self.catalogue.refuse(name, version, str(error))
        elif isinstance(error, NoRoomError):  # replicas may know more of the stages by now
            other = await self.catalogue.current(name)
        return [other.ref] if other is not None and other.ref != version else []

    def _versions(self, request: Request) -> tuple[list[str | None], Comparison | None]:
        """Handles to try, one after another, and what they are compared in."""
        name = request.adapter
        if name is None:
            return [None], None
        line = self.catalogue.line(name)
        if line is None or line.current is None:
            hint = did_you_mean(name, self.catalogue.names)
            raise ArtifactError(f"adapter `{name}`", "is not served", hint=hint)
        if STAGE.get():
            return [line.canary.ref if _asks_next(line) and line.canary is not None else line.current.ref], None
        answer = answer_of(request.id)  # all answers to one request come from one version
        keys = {"request": answer, "key": VISITOR.get() or answer}
        chosen, compared = self.canaries.choose(name, line, keys)
        return list(dict.fromkeys((chosen.ref, line.current.ref))), compared

    async def _stats(self) -> dict[str | None, list[dict[str, Any]]]:
        """Of the base model under None, of the others under their names."""
        every = {None: self.replicas, **self._merged}
        told = await asyncio.gather(*(replicas.everywhere("stats") for replicas in every.values()))
        seen_s = self._clock()
        return {name: [{**one, "seen_s": seen_s} for one in some] for name, some in zip(every, told, strict=True)}

    async def _watched(self, request: Request, compared: Comparison | None) -> AsyncGenerator[TokenEvent, None]:
        """Counts what happens to a request of an adapter with a canary."""
        began, answered = self._clock(), False
        version = request.adapter or ""
        try:
            async with aclosing(self._sent(request, self.replicas)) as events:
                async for event in events:
                    if compared is not None and not answered:
                        seconds = self._clock() - began
                        self.canaries.answered(compared, version, request_id=request.id, first_token_s=seconds)
                    answered = True
                    yield event
        except (CapacityError, DataError):
            raise  # load and a client's own mistakes say nothing about a version
        except RemoteError:  # nor does an end before the first token, unless the current version answers then
            if compared is not None and answered:
                self.canaries.broke_off(compared, version, now_s=self._clock())
            raise
        except LmrayError:
            if compared is not None:
                self.canaries.failed(compared, version, answered=answered)
            raise

    async def _sent(self, request: Request, replicas: Replicas) -> AsyncGenerator[TokenEvent, None]:
        attempt, started = 1, False
        lost_s: float | None = None
        while True:
            # a replica that was thought dead may still run the first one
            sent = request if attempt == 1 else replace(request, id=f"{request.id}-{attempt}")
            try:
                async with aclosing(replicas.stream(sent)) as events:
                    async for event in events:
                        started = True
                        yield event
                return
            except CapacityError as error:
                if started or lost_s is None or isinstance(error, NoRoomError):
                    raise
                if self._clock() - lost_s > PATIENCE_S:
                    raise
                await asyncio.sleep(RESEND_S)
            except RemoteError:
                if started or attempt == MAX_ATTEMPTS:
                    raise
                attempt, lost_s = attempt + 1, self._clock()


def _asks_next(line: Line) -> bool:
    """Whether the request named the stage of the next version, and wants no other."""
    return line.settings is not None and STAGE.get() == line.settings.stage
