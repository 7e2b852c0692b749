"""What an app serves in these tests: the embedded engine as a backend, and keys."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lmray.engines.base import Request
from lmray.engines.native import Native
from lmray.models.load import load_model, load_tokenizer, stop_token_ids
from lmray.serve.keys import ApiKey

MAX_LENGTH = 512


def key(name: str, **limits) -> ApiKey:
    return ApiKey(name=name, sha256=hashlib.sha256(name.encode()).hexdigest(), **limits)


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
