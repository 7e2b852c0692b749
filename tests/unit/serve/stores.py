"""A store with adapters in it that no test computes with: their files are a few bytes."""

from __future__ import annotations

import json
from pathlib import Path

from lmray.artifacts.artifact import Artifact, Artifacts
from lmray.artifacts.file_store import FileStore
from lmray.serve.fit import Fit

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
