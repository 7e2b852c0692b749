"""The gateway's backend: from a name in a request to a version of the store, and on to a replica.

A request names the version from here on, so every replica serves the same one and a second try is the same request.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from typing import Any, Protocol

from lmray.engines.base import Request, TokenEvent
from lmray.errors import ArtifactError, RemoteError, did_you_mean
from lmray.serve.catalogue import Catalogue

MAX_ATTEMPTS = 2
"""How often a request may be sent before its first token. No more: a request that ends every replica it meets is not to
meet them all."""


class Replicas(Protocol):
    """Where requests go; an implementation picks the replica."""

    def stream(self, request: Request) -> AsyncGenerator[TokenEvent, None]:
        """Raises RemoteError where the replica died or none answers."""
        ...

    async def everywhere(self, method: str, *arguments: Any) -> list[Any]:
        """What `method` gave on every replica. Raises LmrayError."""
        ...


class Fleet:
    """All replicas of an endpoint behind the names of its adapters."""

    def __init__(self, replicas: Replicas, catalogue: Catalogue):
        self.replicas, self.catalogue = replicas, catalogue

    async def adapters(self) -> tuple[str, ...]:
        """Names that requests may give; from memory, no replica is asked."""
        await self.catalogue.look()
        return self.catalogue.names

    async def stream(self, request: Request) -> AsyncGenerator[TokenEvent, None]:
        """The tokens that continue `request`, sent again where its replica died before the first. Closing it early
        cancels the request. Raises ArtifactError for an unknown adapter, and what the replica raises."""
        request = replace(request, adapter=self._handle(request.adapter))
        for attempt in range(1, MAX_ATTEMPTS + 1):
            started = False
            try:
                async with aclosing(self.replicas.stream(request)) as events:
                    async for event in events:
                        started = True
                        yield event
                return
            except RemoteError:
                if started or attempt == MAX_ATTEMPTS:
                    raise

    def _handle(self, name: str | None) -> str | None:
        if name is None:
            return None
        line = self.catalogue.line(name)
        if line is None or line.current is None:
            hint = did_you_mean(name, self.catalogue.names)
            raise ArtifactError(f"adapter `{name}`", "is not served", hint=hint)
        return line.current.ref
