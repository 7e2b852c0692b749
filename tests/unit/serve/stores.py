"""A store with adapters that no test computes with, and an engine that computes nothing."""

from __future__ import annotations

import hashlib
import json
from collections.abc import AsyncGenerator
from pathlib import Path

from lmray.artifacts.artifact import Artifact, Artifacts
from lmray.artifacts.file_store import FileStore
from lmray.artifacts.served import AdapterCache, ServedAdapter
from lmray.engines.base import Capabilities, Request, TokenEvent
from lmray.serve.fit import Fit
from lmray.serve.keys import ApiKey
from lmray.serve.plan import ServePlan

BASE = {"source": "tiny", "revision": None, "digest": "d" * 64}
FIT = Fit("tiny", BASE["digest"], None, max_adapter_bytes=10_000)


class SmallStore:
    """`keep` gives versions that differ by `content`."""

    def __init__(self, root: Path):
        self.root = root
        self.store = FileStore(root / "store")
        self.artifacts = Artifacts(self.store)

    def keep(self, name: str, content: str = "1", *, stage: str | None = None, **told) -> Artifact:
        folder = self.root / "folder"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "adapter_config.json").write_text(json.dumps({"content": content}))
        artifact = self.artifacts.keep(name, folder, **{"base": BASE, **told})
        if stage is not None:
            self.artifacts.promote(artifact.ref, stage)
        return artifact


def plan_of(small: SmallStore, *served: str, admin_keys: tuple[str, ...] = ()) -> ServePlan:
    """An endpoint over `served`, in production."""
    return ServePlan(
        model_name="tiny",
        source="tiny",
        revision=None,
        digest=FIT.digest,
        store=str(small.store.root),
        endpoint="endpoint",
        served=tuple(ServedAdapter(artifact=name, stage="production") for name in served),
        cache=AdapterCache(max_adapter_bytes=FIT.max_adapter_bytes),
        adapters={},
        keys=(),
        admin_keys=tuple(
            ApiKey(name=f"admin-{place}", sha256=hashlib.sha256(key.encode()).hexdigest())
            for place, key in enumerate(admin_keys)
        ),
    )


class FakeEngine:
    """Holds handles and answers with one token a request."""

    def __init__(self, max_adapters: int = 2):
        self.capabilities = Capabilities(4, max_adapters, 64, 256)
        self.handles: list[str] = []

    async def add_adapter(self, handle: str, folder: Path) -> None:
        self.handles.append(handle)

    async def remove_adapter(self, handle: str) -> None:
        self.handles.remove(handle)

    async def submit(self, request: Request) -> AsyncGenerator[TokenEvent, None]:
        yield TokenEvent(request.id, 1, "length")

    def stats(self) -> dict:
        return {"adapters": self.handles, "failure": None}

    async def close(self) -> None:
        pass
