"""Real servers for clients that are not ours: the app on loopback, over the embedded engine or a fake backend."""

from __future__ import annotations

import hashlib
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn

from lmray.engines.base import Request
from lmray.engines.native import Native
from lmray.models.load import load_model, load_tokenizer, stop_token_ids
from lmray.serve.keys import ApiKey

MAX_LENGTH = 512


def key(name: str, **limits) -> ApiKey:
    return ApiKey(name=name, sha256=hashlib.sha256(name.encode()).hexdigest(), **limits)


class _Server(uvicorn.Server):
    """Says when it listens."""

    def __init__(self, app):
        super().__init__(uvicorn.Config(app, log_level="error", lifespan="off", timeout_graceful_shutdown=5))
        self.listens = threading.Event()

    async def startup(self, sockets=None) -> None:
        await super().startup(sockets)
        self.listens.set()


@contextmanager
def listening(app) -> Iterator[str]:
    """The address of `app` while it is served."""
    server = _Server(app)
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        thread = threading.Thread(target=server.run, args=([place],), daemon=True)
        thread.start()
        assert server.listens.wait(60)
        try:
            yield f"http://127.0.0.1:{place.getsockname()[1]}/v1"
        finally:
            server.should_exit = True
            thread.join(60)


class EngineBackend:
    """The embedded engine as a backend."""

    def __init__(self, folder, adapters: Mapping[str, Path] | None = None, **changes):
        self._waiting = dict(adapters or {})
        model, tokenizer = load_model(folder, "float32"), load_tokenizer(folder)
        config = Native(**{"max_batch_size": 4, "max_length": MAX_LENGTH, **changes})
        told: Any = {"stop_token_ids": stop_token_ids(model, tokenizer), "threads": 1, "tokenizer": tokenizer}
        self.engine = config.start(model, **told)

    def stream(self, request: Request):
        return self.engine.submit(request)

    async def adapters(self) -> tuple[str, ...]:
        while self._waiting:
            await self.engine.add_adapter(*self._waiting.popitem())
        return tuple(self.engine.stats()["adapters"])

    async def ready(self) -> None:
        pass

    async def stats(self) -> list[dict[str, Any]]:
        return [self.engine.stats()]
