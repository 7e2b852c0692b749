"""A running engine whose model is behind HTTP: one task a request, adapters by their names there."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from lmray.artifacts.files import folder_digests, sha256_json
from lmray.engines._adapter_folder import AdapterFolder, read_adapter_folder
from lmray.engines._completions import Dialect
from lmray.engines._server import Server, failure, refusal
from lmray.engines.base import Capabilities, Request, TokenEvent, check_loaded, check_new, check_request
from lmray.errors import ArtifactError, LmrayError, RemoteError

LAST_BYTES_S = 1.0
"""For what a server sends behind the end of an answer."""
DIGITS = 12
"""Of the digest in an adapter's name: what was in its folder before, and what the server keeps of it, has another."""
METRICS_AGE_S = 2.0
"""How old the server's own figures may be before they are asked for again."""
METRICS = {
    "vllm:num_requests_running": "running",
    "vllm:num_requests_waiting": "waiting",
    "vllm:kv_cache_usage_perc": "kv_cache_fraction",
    "vllm:num_preemptions_total": "preemptions",
    "vllm:prefix_cache_hits_total": "prefix_hit_tokens",
    "vllm:prompt_tokens_total": "prompt_tokens",
    "vllm:generation_tokens_total": "generated_tokens",
}
"""vLLM's names of what is told of the server."""


@dataclass(frozen=True)
class Remote:
    """What a remote engine is made of."""

    name: str
    """The engine's, in messages."""
    model: Any
    """Without weights: adapters are checked against it."""
    base: str
    """The base model's name at the server."""
    dialect: Callable[[Request], Dialect]
    adapter_name: str | None = None
    """Template of an adapter's name there. None: adapters are loaded there by path, under names of the engine's."""
    max_rank: int | None = None


@dataclass
class _Adapter:
    """An adapter at the server."""

    name: str
    folder: Path | None
    """Where it is loaded from; None for one that the server has by itself."""
    num_requests: int = 0
    idle: asyncio.Event = field(default_factory=asyncio.Event)


class RemoteEngine:
    """A running engine; see `lmray.engines.base.Engine` for its methods."""

    def __init__(self, server: Server, remote: Remote, capabilities: Capabilities):
        self.capabilities = capabilities
        self._server, self._remote = server, remote
        self._rows = asyncio.Semaphore(capabilities.max_batch_size)
        self._streams: dict[str, asyncio.Queue[TokenEvent | LmrayError]] = {}
        self._running = 0
        self._num_generated = 0
        self._adapters: dict[str, _Adapter] = {}
        self._taken: set[str] = set()
        self._end: LmrayError | None = None
        self._figures: dict[str, float] = {}
        self._asking: asyncio.Task[None] | None = None
        self._asked_s = -METRICS_AGE_S

    async def submit(self, request: Request) -> AsyncGenerator[TokenEvent, None]:
        if self._end is not None:
            raise self._end
        check_request(request, self.capabilities, self._adapters, running=self._streams)
        room = self.capabilities.max_length - len(request.prompt_ids)  # servers refuse to be asked for more
        sampling = replace(request.sampling, max_tokens=min(request.sampling.max_tokens, room))
        dialect = self._remote.dialect(replace(request, sampling=sampling))
        adapter = self._adapters.get(request.adapter or "")
        stream = self._streams[request.id] = asyncio.Queue()
        if adapter is not None:
            adapter.num_requests += 1
        asking = asyncio.create_task(self._ask(dialect, adapter, stream))
        finished = False
        try:
            while not finished:
                outcome = await stream.get()
                if isinstance(outcome, LmrayError):
                    raise outcome
                finished = outcome.finish_reason is not None
                self._num_generated += outcome.token_id is not None
                yield outcome
        finally:
            try:
                if finished:  # to its last byte, so that the next request may use the same connection
                    await asyncio.wait({asking}, timeout=LAST_BYTES_S)
            finally:  # at once, also where the caller does not wait for that
                del self._streams[request.id]
                asking.cancel()  # hangs up, which is how a server learns of it
                if adapter is not None:
                    adapter.num_requests -= 1
                    if not adapter.num_requests:
                        adapter.idle.set()
            await asyncio.gather(asking, return_exceptions=True)

    async def _ask(
        self, dialect: Dialect, adapter: _Adapter | None, stream: asyncio.Queue[TokenEvent | LmrayError]
    ) -> None:
        """Puts what the server answers into `stream`, and at the end why there is no more."""
        async with self._rows:
            self._running += 1
            try:
                try:
                    await self._answer(dialect, adapter, stream)
                except ArtifactError:  # before the first token
                    if adapter is None or adapter.folder is None:
                        raise
                    await self._load(adapter.name, adapter.folder)  # the server is new, or somebody else let it go
                    await self._answer(dialect, adapter, stream)
                stream.put_nowait(RemoteError(self._server.address.url, "the answer broke off"))
            except Exception as error:
                stream.put_nowait(failure(error, self._server.address.url))
            finally:
                self._running -= 1

    async def _answer(
        self, dialect: Dialect, adapter: _Adapter | None, stream: asyncio.Queue[TokenEvent | LmrayError]
    ) -> None:
        body = dialect.body(self._remote.base if adapter is None else adapter.name)
        async with aclosing(self._server.choices(body)) as choices:
            async for choice in choices:
                for event in dialect.read(choice):
                    stream.put_nowait(event)

    async def add_adapter(self, handle: str, folder: Path) -> None:
        if self._end is not None:
            raise self._end
        check_new(handle, self._taken, self.capabilities.max_adapters)
        self._taken.add(handle)
        try:
            found = await asyncio.to_thread(read_adapter_folder, folder, self._remote.model)
            check_rank(found, self._remote.max_rank)
            template = self._remote.adapter_name
            if template is None:
                name = f"{handle}-{(await asyncio.to_thread(_digest, folder))[:DIGITS]}"
                await self._load(name, folder)
                self._adapters[handle] = _Adapter(name, folder)
            else:
                self._adapters[handle] = _Adapter(await self._find(handle, template), None)
        except BaseException:
            self._taken.discard(handle)
            raise

    async def remove_adapter(self, handle: str) -> None:
        check_loaded(handle, self._adapters)
        adapter = self._adapters.pop(handle)
        try:
            if adapter.num_requests:
                adapter.idle.clear()
                await adapter.idle.wait()
            if adapter.folder is not None and self._end is None:
                response = await self._server.post("/v1/unload_lora_adapter", {"lora_name": adapter.name})
                if response.status_code not in (200, 404):
                    raise refusal(response.status_code, response.content, self._server.address.url)
        finally:
            self._taken.discard(handle)

    def stats(self) -> dict[str, Any]:
        self._look()
        return {
            "waiting": len(self._streams) - self._running,
            "running": self._running,
            "adapters": sorted(self._adapters),
            "generated_tokens": self._num_generated,
            "failure": str(self._end) if self._end is not None else None,
            "forward": f"{self._remote.name}: {self._remote.base} at {self._server.address.url}",
            **({"server": self._figures} if self._figures else {}),
        }

    async def close(self) -> None:
        self._end = self._end or LmrayError(f"engine `{self._remote.name}`", "is closed")
        for stream in self._streams.values():
            stream.put_nowait(self._end)
        if self._asking is not None:
            self._asking.cancel()
            await asyncio.gather(self._asking, return_exceptions=True)
        await self._server.close()

    async def _load(self, name: str, folder: Path) -> None:
        """Has the server read the adapter itself; another process may have done so before."""
        where, path = f"adapter `{name}`", str(folder.resolve())
        response = await self._server.post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": path})
        if response.status_code == 200 or (await self._server.models()).get(name, {}).get("root") == path:
            return
        said = refusal(response.status_code, response.content, self._server.address.url).found
        hint = "vLLM does, started with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True, where it sees the path"
        raise ArtifactError(where, f"the server does not load it: {said}", hint=hint)

    async def _find(self, handle: str, template: str) -> str:
        """The name under which the server has the adapter by itself, in whatever version."""
        name, _, version = handle.partition("@")
        name = template.format(model=self._remote.base, name=name, version=version)
        there = sorted(await self._server.models())
        if name not in there:
            raise ArtifactError(f"adapter `{handle}`", f"the server has no model `{name}`", allowed=", ".join(there))
        return name

    def _look(self) -> None:
        """Asks the server for its own figures, to be told the next time."""
        now_s = asyncio.get_running_loop().time()
        idle = self._asking is None or self._asking.done()
        if self._end is None and idle and now_s - self._asked_s >= METRICS_AGE_S:
            self._asked_s = now_s
            self._asking = asyncio.create_task(self._read_figures())

    async def _read_figures(self) -> None:
        figures: dict[str, float] = {}
        with suppress(ValueError):  # a page of another kind
            for family in text_string_to_metric_families(await self._server.text("/metrics") or ""):
                for sample in family.samples:
                    if (name := METRICS.get(sample.name)) is not None:
                        figures[name] = figures.get(name, 0.0) + sample.value
        self._figures = figures


def check_rank(found: AdapterFolder, max_rank: int | None) -> None:
    """Raises ArtifactError for an adapter of a higher rank than the server has room for."""
    rank = max([found.config.r, *(found.config.rank_pattern or {}).values()])
    if max_rank is not None and rank > max_rank:
        hint = f"set `engine.max_lora_rank` to {rank} or the next allowed value"
        raise ArtifactError(str(found.path), f"has rank {rank}", allowed=f"up to {max_rank}", hint=hint)


def _digest(folder: Path) -> str:
    return sha256_json(folder_digests(folder))
