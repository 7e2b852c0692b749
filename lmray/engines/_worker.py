"""The native engine's outside: an event loop's requests go to one worker thread, its tokens come back to the loop.

The worker alone touches the model. The loop alone touches streams and futures. Between them are an inbox of calls and
`call_soon_threadsafe`; there is no lock.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Iterable
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch

from lmray.engines._adapter_folder import AdapterFolder, read_adapter_folder
from lmray.engines._core import Adapters, Core, Outcome
from lmray.engines.base import Request, TokenEvent, check_loaded, check_new, check_request
from lmray.errors import ArtifactError, LmrayError

WHERE = "engine `native`"


class NativeEngine:
    """A running engine; see `lmray.engines.base.Engine` for its methods."""

    def __init__(self, stepper: Core, *, threads: int):
        self.capabilities = stepper.capabilities
        self._stepper = stepper
        self._inbox: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._streams: dict[str, asyncio.Queue[Outcome]] = {}
        self._calls: set[asyncio.Future[None]] = set()
        self._adapters = set(stepper.adapters.handles)
        self._taken = set(self._adapters)
        self._leaving: dict[str, Callable[[], None]] = {}
        self._end: LmrayError | None = None
        self._thread = threading.Thread(target=self._work, args=(threads,), name="lmray-engine", daemon=True)
        self._thread.start()

    async def submit(self, request: Request) -> AsyncGenerator[TokenEvent, None]:
        if self._end is not None:
            raise self._end
        check_request(request, self.capabilities, self._adapters, running=self._streams)
        self._loop = asyncio.get_running_loop()
        stream = self._streams[request.id] = asyncio.Queue()
        self._inbox.put(partial(self._stepper.add, request))
        finished = False
        try:
            while not finished:
                outcome = await stream.get()
                finished = isinstance(outcome, LmrayError) or outcome.finish_reason is not None
                if isinstance(outcome, LmrayError):
                    raise outcome
                yield outcome
        finally:
            del self._streams[request.id]
            if not finished:
                self._inbox.put(partial(self._stepper.cancel, request.id))

    async def add_adapter(self, handle: str, folder: Path) -> None:
        check_new(handle, self._taken, self.capabilities.max_adapters)
        self._taken.add(handle)  # also while it arrives or leaves
        try:
            bank = self._stepper.adapters
            found = await asyncio.to_thread(read_adapter_folder, folder, bank.base)
            await self._call(lambda done: _after(partial(_add, bank, handle, found), done))
        except BaseException:
            self._taken.discard(handle)
            raise
        self._adapters.add(handle)

    async def remove_adapter(self, handle: str) -> None:
        check_loaded(handle, self._adapters)
        self._adapters.discard(handle)
        await self._call(partial(self._leaving.__setitem__, handle))
        self._taken.discard(handle)

    def stats(self) -> dict[str, Any]:
        return {
            **self._stepper.stats(),
            "adapters": sorted(self._adapters),
            "generated_tokens": self._stepper.num_generated,
            "failure": str(self._end) if self._end is not None else None,
        }

    async def close(self) -> None:
        self._fail(LmrayError(WHERE, "is closed"))
        self._inbox.put(None)
        await asyncio.to_thread(self._thread.join)

    async def _call(self, command: Callable[[Callable[[], None]], None]) -> None:
        """Runs `command(done)` on the worker and returns once it called `done`; raises what it raised."""
        if self._end is not None:
            raise self._end
        self._loop = asyncio.get_running_loop()
        future = self._loop.create_future()
        self._calls.add(future)

        def run() -> None:
            try:
                command(lambda: self._post(_resolve, future, None))
            except LmrayError as error:
                self._post(_resolve, future, error)

        self._inbox.put(run)
        try:
            await future
        finally:
            self._calls.discard(future)

    def _fail(self, error: LmrayError) -> None:
        """On the loop: ends everything that waits, with `error`. The first reason stays."""
        self._end = self._end or error
        for stream in self._streams.values():
            stream.put_nowait(self._end)
        for future in self._calls:
            _resolve(future, self._end)

    def _deliver(self, outcomes: Iterable[tuple[str, Outcome]]) -> None:
        for request_id, outcome in outcomes:
            if (stream := self._streams.get(request_id)) is not None:
                stream.put_nowait(outcome)

    def _post(self, callback: Callable[..., None], *args: Any) -> None:
        """From the worker: `callback(*args)` on the loop, where one is still there to hear it."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(callback, *args)

    def _work(self, threads: int) -> None:
        torch.set_num_threads(threads)
        try:
            while self._take_calls():
                if self._stepper.busy:
                    self._post(self._deliver, self._stepper.step())
                self._let_go()
        except Exception as error:
            self._stepper.clear()
            what = f"a step failed: {type(error).__name__}: {error}"
            self._post(self._fail, LmrayError(WHERE, what, hint="start the engine again"))
        finally:
            self._stepper.adapters.restore()

    def _take_calls(self) -> bool:
        """Does what the inbox asks, waiting for something where no request runs; False once the engine is closed."""
        waits = not self._stepper.busy
        while waits or not self._inbox.empty():
            call = self._inbox.get()
            if call is None:
                return False
            call()
            waits = False
        return True

    def _let_go(self) -> None:
        """Unloads adapters that are to go and that no request uses any more."""
        used = self._stepper.adapters_in_use() if self._leaving else set()
        for handle in [handle for handle in self._leaving if handle not in used]:
            self._stepper.adapters.remove(handle)
            self._leaving.pop(handle)()


def _add(bank: Adapters, handle: str, found: AdapterFolder) -> None:
    """Whatever is wrong with one adapter, or with the room for it, is that adapter's failure and not the engine's."""
    try:
        bank.add(handle, found)
    except LmrayError:
        raise
    except Exception as error:
        raise ArtifactError(str(found.path), f"cannot be loaded: {type(error).__name__}: {error}") from error


def _after(action: Callable[[], None], done: Callable[[], None]) -> None:
    action()
    done()


def _resolve(future: asyncio.Future[None], error: LmrayError | None) -> None:
    if not future.done():
        if error is None:
            future.set_result(None)
        else:
            future.set_exception(error)
