"""One replica's side of the adapters' life: an engine whose adapters come and go with the store.

Requests name a version (`NAME@VERSION`), so what a stage holds may change under a running answer. What a job names, and
what an operator pinned, is loaded ahead of requests, the next version as soon as a stage moves to it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, aclosing
from dataclasses import replace
from typing import Any

from lmray.artifacts.store import Store, open_store
from lmray.engines.base import Engine, Request, TokenEvent
from lmray.errors import ArtifactError, LmrayError, NoRoomError
from lmray.serve.adapter_cache import AdapterCache, Candidate, Limits
from lmray.serve.catalogue import Catalogue
from lmray.serve.demand import Demand
from lmray.serve.fit import StoredAdapters
from lmray.serve.pins import Pins
from lmray.serve.plan import ServePlan

AHEAD_S = 60.0
"""How long a replica's start waits for what it can begin without."""
_LOG = logging.getLogger(__name__)


class EngineLoader:
    """From the store into an engine."""

    def __init__(self, engine: Engine, adapters: StoredAdapters):
        self._engine, self._adapters = engine, adapters

    async def find(self, handle: str) -> Candidate:
        return await asyncio.to_thread(self._adapters.find, handle)

    async def load(self, handle: str, found: Candidate) -> None:
        await self._engine.add_adapter(handle, found.folder)

    async def unload(self, handle: str) -> None:
        await self._engine.remove_adapter(handle)


class LiveEngine:
    """An engine, the adapters it holds, and the store they come from."""

    def __init__(self, engine: Engine, plan: ServePlan, *, store: Store | None = None):
        store = store or open_store(plan.store)
        self.engine = engine
        limits = Limits(engine.capabilities.max_adapters, plan.cache.max_bytes, plan.cache.missing_s)
        self.cache = AdapterCache(EngineLoader(engine, StoredAdapters(store, plan.fit)), limits)
        self._named = tuple(one.artifact for one in plan.served if not one.is_pattern)
        self._planned = {f"{name}@{version[:12]}" for name, version in plan.adapters.items()}
        self._pins = Pins(store, plan.endpoint)
        self._catalogue = Catalogue(store, plan.served, plan.fit, reserved=plan.model_name, only=self._pinned_names)
        self._pinned: set[str] = set()
        self.demand = Demand()

    async def start(self) -> None:
        """Loads what the endpoint was prepared with, and raises what that raises; then, side by side, what was promoted
        or pinned since and next versions, of which none keeps a replica from starting."""
        await asyncio.to_thread(self._catalogue.refresh)
        self._pinned = self._wanted()
        planned, others = sorted(self._pinned & self._planned), sorted(self._pinned - self._planned)
        outcomes = await asyncio.gather(*(self.cache.pin(handle) for handle in planned), return_exceptions=True)
        for outcome in outcomes:
            if outcome is not None:
                raise outcome
        if others:  # in the room that is left; the cache logs what fails
            loading = asyncio.gather(*(self.cache.pin(handle) for handle in others), return_exceptions=True)
            await asyncio.wait({loading}, timeout=AHEAD_S)

    async def stream(self, request: Request) -> AsyncGenerator[TokenEvent, None]:
        """The tokens that continue `request`, its adapter loaded before and kept until the last. Closing it early
        cancels the request. Raises what the cache and the engine raise."""
        async with AsyncExitStack() as held:
            first_token = held.enter_context(self.demand.request(len(request.prompt_ids)))
            await self.follow()
            if request.adapter is not None:
                await self._lease(request.adapter, held)
            events = await held.enter_async_context(aclosing(self.engine.submit(request)))
            before_s: float | None = None
            async for event in events:
                first_token()
                now_s = time.perf_counter()
                yield event if before_s is None else replace(event, after_s=now_s - before_s)
                before_s = now_s

    def holds(self, handle: str | None) -> bool:
        """Whether a request with this adapter, None for none, has nothing to wait for but a row."""
        return handle is None or self.cache.holds(handle)

    async def _lease(self, handle: str, held: AsyncExitStack) -> None:
        try:
            await held.enter_async_context(self.cache.lease(handle))
        except NoRoomError:  # a stage may have moved since the last look: what it held then need not stay
            await self._catalogue.current(handle.partition("@")[0])
            self._pinned = self._wanted()
            self.cache.follow(self._pinned)
            await held.enter_async_context(self.cache.lease(handle))

    async def follow(self, *, again: bool = False) -> None:
        """Loads ahead what stages and pins now name. `again`: looks at once, and also for what could not be loaded."""
        await self._catalogue.look(now=again)
        wanted = self._wanted()
        if again or wanted != self._pinned:
            self._pinned = wanted
            self.cache.follow(wanted)

    async def manage(self, action: str, handle: str) -> dict[str, Any]:
        """Does one thing by an operator's wish: `load`, `prewarm` (the same without waiting for its end), `unload`,
        `follow` (stages and pins, at once). Returns what is held afterwards, or the `error`; JSON types."""
        try:
            match action:
                case "load":
                    await self.cache.prewarm(handle)
                case "prewarm":
                    self.cache.begin(handle)
                case "unload":
                    await self.cache.unload(handle)
                case "follow":
                    await self.follow(again=True)
        except LmrayError as error:
            return {"error": str(error), "held": self.cache.stats()}
        return {"error": None, "held": self.cache.stats()}

    @property
    def failure(self) -> str | None:
        """Why the engine ended; None while it runs."""
        return self.engine.stats()["failure"]

    def stats(self) -> dict[str, Any]:
        """The engine's, and `cache`: what is held, and how often that helped; JSON types."""
        return {**self.engine.stats(), "cache": {"held": self.cache.stats(), **self.cache.counts}}

    def _pinned_names(self) -> tuple[str, ...]:
        try:
            return (*self._named, *self._pins.names())
        except (ArtifactError, OSError) as error:
            _LOG.warning("%s", error)
            return self._named

    def _wanted(self) -> set[str]:
        """Handles of what is named and pinned, as far as it is served, next versions too."""
        lines = [self._catalogue.line(name) for name in self._catalogue.names]
        versions = [version for line in lines if line is not None for version in (line.current, line.canary)]
        return {version.ref for version in versions if version is not None}
