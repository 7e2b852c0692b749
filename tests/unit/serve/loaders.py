"""A loader of which a test says when each step ends, and how."""

from __future__ import annotations

import asyncio
from pathlib import Path

from lmray.serve.adapter_cache import Candidate

SIZES = {"a": 10, "b": 20, "c": 30, "d": 40, "huge": 1000}


class FakeLoader:
    """Every step waits until the test ends it; `self.steps` are those that wait."""

    def __init__(self, *, by_hand: bool = True):
        self.by_hand = by_hand
        self.steps: list[tuple[str, str, asyncio.Future[None]]] = []
        self.loaded: dict[str, int] = {}
        self.arriving: set[str] = set()
        self.calls: list[tuple[str, str]] = []

    async def find(self, handle: str) -> Candidate:
        await self._step("find", handle)
        return Candidate(Path(handle), SIZES[handle])

    async def load(self, handle: str, found: Candidate) -> None:
        assert handle not in self.arriving and handle not in self.loaded, f"{handle} is loaded twice"
        self.arriving.add(handle)
        try:
            await self._step("load", handle)
            self.loaded[handle] = found.num_bytes
        finally:
            self.arriving.discard(handle)

    async def unload(self, handle: str) -> None:
        await self._step("unload", handle)
        del self.loaded[handle]

    @property
    def num_bytes(self) -> int:
        return sum(self.loaded.values()) + sum(SIZES[handle] for handle in self.arriving)

    async def _step(self, kind: str, handle: str) -> None:
        self.calls.append((kind, handle))
        if self.by_hand:
            ends = asyncio.get_running_loop().create_future()
            self.steps.append((kind, handle, ends))
            await ends
