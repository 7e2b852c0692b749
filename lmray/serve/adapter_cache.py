"""Which adapters a replica holds: loaded on demand, never dropped while in use, least recently used first out.

Plain Python on one event loop: the loader does the work. Adapters go by handle, a name with a digest of the content, so
new content is another adapter and what is running keeps what it started with.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from lmray.errors import ArtifactError, LmrayError, NoRoomError

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Candidate:
    """A verified adapter on this node's disk."""

    folder: Path
    num_bytes: int
    """Of its files; what it takes of the cache."""


class Loader(Protocol):
    """Where adapters come from and where they go. Methods for different handles run at the same time."""

    async def find(self, handle: str) -> Candidate:
        """Raises ArtifactError for an adapter that is missing or that must not be served."""
        ...

    async def load(self, handle: str, found: Candidate) -> None:
        """Raises ArtifactError for an adapter that does not fit the model."""
        ...

    async def unload(self, handle: str) -> None: ...


@dataclass(frozen=True)
class Limits:
    """What a cache may hold, and for how long it remembers what it could not load."""

    max_adapters: int
    max_bytes: int
    missing_s: float = 10.0
    """For so long after a failure the same adapter is refused without another look."""


@dataclass(eq=False)
class _Entry:
    handle: str
    state: Literal["waiting", "loading", "ready", "leaving"] = "waiting"
    num_bytes: int = 0
    """Room reserved for it: 0 while it waits for some."""
    leases: int = 0
    pinned: bool = False
    draining: bool = False
    """Takes no new requests while another adapter waits for its room."""
    unwanted: bool = False
    """To be unloaded once it is idle, whatever the room."""
    last_used: int = 0
    arrival: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class AdapterCache:
    """Leases on adapters. All methods are called on one event loop."""

    def __init__(self, loader: Loader, limits: Limits, *, clock: Callable[[], float] = time.monotonic):
        self._loader, self._limits, self._clock = loader, limits, clock
        self._entries: dict[str, _Entry] = {}
        self._failures: dict[str, tuple[float, LmrayError]] = {}
        self._turn = asyncio.Lock()  # first come, first served: nobody who waits for room is overtaken
        self._changed = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._num_uses = 0
        self.counts = {"hits": 0, "loads": 0, "evictions": 0, "failures": 0}

    @asynccontextmanager
    async def lease(self, handle: str) -> AsyncIterator[None]:
        """Holds an adapter loaded for the length of the block, loading it first where it is not.

        Requests that ask for the same adapter meanwhile wait for the same loading. Raises ArtifactError for an adapter
        that cannot be served, NoRoomError where pinned ones leave no room for it.
        """
        entry = await self._take(handle)
        try:
            await asyncio.shield(entry.arrival)
            yield
        finally:
            entry.leases -= 1
            self._settle(entry)

    def holds(self, handle: str) -> bool:
        """Whether a lease on it would begin at once."""
        entry = self._entries.get(handle)
        return entry is not None and entry.state == "ready" and not entry.draining and not entry.unwanted

    async def prewarm(self, handle: str) -> None:
        """Loads an adapter before the first request for it. Raises what `lease` raises."""
        async with self.lease(handle):
            pass

    def begin(self, handle: str) -> None:
        """Begins to load an adapter that is not held; how that ends shows in `stats` and in the log."""
        if handle not in self._entries:
            self._failures.pop(handle, None)
            self._arrive(handle)

    async def pin(self, handle: str) -> None:
        """Loads an adapter and keeps it until `unpin`. Raises what `lease` raises."""
        async with self.lease(handle):
            self._entries[handle].pinned = True

    def unpin(self, handle: str) -> None:
        """Lets an adapter go again when room is short."""
        if (entry := self._entries.get(handle)) is not None:
            entry.pinned = False
            self._settle(entry)

    def follow(self, handles: Iterable[str]) -> None:
        """Pins exactly `handles`: what is missing is loaded in the background, what is pinned besides is let go. An
        adapter that cannot be loaded is tried again at a later call."""
        wanted = set(handles)
        for handle in [one.handle for one in self._entries.values() if one.pinned and one.handle not in wanted]:
            self.unpin(handle)
        for handle in wanted:
            entry = self._entries.get(handle)
            if entry is None and self._failure(handle) is None:
                entry = self._arrive(handle)
            if entry is not None and entry.state != "leaving" and not entry.unwanted:
                entry.pinned = True
        self._tell()

    async def unload(self, handle: str) -> None:
        """Takes an adapter out once the requests that use it are done; new ones wait and load it again. Raises
        ArtifactError for one that is not loaded, or pinned."""
        entry = self._entries.get(handle)
        if entry is None or entry.state != "ready":
            allowed = ", ".join(one for one, other in self._entries.items() if other.state == "ready") or "none"
            raise ArtifactError(f"adapter `{handle}`", "is not loaded", allowed=allowed)
        if entry.pinned:
            raise ArtifactError(f"adapter `{handle}`", "is pinned", hint="unpin it first")
        entry.unwanted = True
        self._settle(entry)
        while self._entries.get(handle) is entry:
            await self._change()

    def stats(self) -> list[dict[str, Any]]:
        """What is held, most recently used first; JSON types."""
        latest = sorted(self._entries.values(), key=lambda entry: -entry.last_used)
        shown = ("handle", "state", "num_bytes", "leases", "pinned")
        return [{key: getattr(entry, key) for key in shown} for entry in latest]

    async def _take(self, handle: str) -> _Entry:
        """A lease on the entry of `handle`, made where there is none."""
        while True:
            if (failure := self._failure(handle)) is not None:
                raise failure
            entry = self._entries.get(handle)
            if entry is None:
                entry = self._arrive(handle)
            elif entry.state == "leaving" or entry.draining or entry.unwanted:
                await self._change()
                continue
            else:
                self.counts["hits"] += entry.state == "ready"
            self._num_uses += 1
            entry.leases, entry.last_used = entry.leases + 1, self._num_uses
            return entry

    def _arrive(self, handle: str) -> _Entry:
        entry = self._entries[handle] = _Entry(handle)
        self._start(self._bring(entry))
        return entry

    async def _bring(self, entry: _Entry) -> None:
        """Finds, makes room for and loads an adapter; whoever waits for it is told how that ended."""
        try:
            found = await self._loader.find(entry.handle)
            async with self._turn:
                await self._make_room(entry, found.num_bytes)
            await self._loader.load(entry.handle, found)
        except Exception as error:
            self.counts["failures"] += 1
            _LOG.warning("adapter `%s` cannot be loaded: %s", entry.handle, error)
            if isinstance(error, ArtifactError):
                self._remember(entry.handle, error)
            del self._entries[entry.handle]
            entry.arrival.set_exception(error)
            entry.arrival.exception()  # looked at: all who waited may have left
            self._tell()
            return
        self.counts["loads"] += 1
        entry.state = "ready"
        entry.arrival.set_result(None)
        self._settle(entry)

    async def _make_room(self, entry: _Entry, num_bytes: int) -> None:
        """Reserves room for `entry` once there is some. Idle adapters go at once; of those in use, the least recently
        used take no new requests until one is idle, so that a wait ends with a running answer."""
        try:
            while not self._has_room(num_bytes, self._entries.values()):
                self._check_possible(entry.handle, num_bytes)
                self._choose(num_bytes)
                await self._change()
            entry.num_bytes, entry.state = num_bytes, "loading"
        finally:
            for other in self._entries.values():
                other.draining = False
            self._tell()

    def _has_room(self, num_bytes: int, held: Iterable[_Entry]) -> bool:
        """Whether one more fits beside those of `held` that have room."""
        sizes = [other.num_bytes for other in held if other.state != "waiting"]
        return len(sizes) < self._limits.max_adapters and sum(sizes) + num_bytes <= self._limits.max_bytes

    def _check_possible(self, handle: str, num_bytes: int) -> None:
        pinned = [other for other in self._entries.values() if other.pinned]
        if not self._has_room(num_bytes, pinned):
            held = sum(other.num_bytes for other in pinned)
            found = f"{num_bytes} bytes do not fit beside {len(pinned)} pinned adapter(s) of {held} bytes"
            allowed = f"{self._limits.max_adapters} adapters, {self._limits.max_bytes} bytes"
            hint = "unpin one, or raise `engine.max_adapters` or `adapter_cache.max_bytes`"
            raise NoRoomError(f"adapter `{handle}`", found, allowed=allowed, hint=hint)

    def _choose(self, num_bytes: int) -> None:
        """Lets go of as few adapters as give the room, idle ones before those in use, least recently used first."""
        staying = [other for other in self._entries.values() if other.state in ("loading", "ready")]
        for other in staying:
            other.draining = False
        going = [other for other in staying if other.state == "ready" and not other.pinned]
        for other in sorted(going, key=lambda other: (other.leases > 0, other.last_used)):
            if self._has_room(num_bytes, staying):
                return
            staying.remove(other)
            other.draining = other.leases > 0
            if not other.draining:
                self.counts["evictions"] += 1
                self._let_go(other)

    def _settle(self, entry: _Entry) -> None:
        """After a lease, a pin or a loading ended: whoever waits looks again; what is not wanted any more goes."""
        if entry.unwanted and entry.state == "ready" and not entry.leases:
            self._let_go(entry)
        self._tell()

    def _let_go(self, entry: _Entry) -> None:
        entry.state = "leaving"
        self._start(self._unload(entry))

    async def _unload(self, entry: _Entry) -> None:
        try:
            await self._loader.unload(entry.handle)
        except LmrayError as error:  # an engine that ended holds nothing any more
            _LOG.warning("%s", error)
        finally:
            del self._entries[entry.handle]
            self._tell()

    def _failure(self, handle: str) -> LmrayError | None:
        """Why `handle` could not be loaded a moment ago."""
        until, error = self._failures.get(handle, (0.0, None))
        return error if self._clock() < until else None

    def _remember(self, handle: str, error: LmrayError) -> None:
        now = self._clock()
        self._failures = {key: known for key, known in self._failures.items() if now < known[0]}
        self._failures[handle] = (now + self._limits.missing_s, error)

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)  # the loop itself holds tasks weakly
        task.add_done_callback(self._tasks.discard)

    def _tell(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _change(self) -> None:
        """Returns when anything here changed."""
        await self._changed.wait()
