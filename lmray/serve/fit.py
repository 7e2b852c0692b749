"""What an adapter of the store must be to be served on a base model, told by its record before a file is read.

Shapes, ranks and numbers are the engine's to check when it reads the weights.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from lmray.artifacts.artifact import ALLOWED_FILES, Artifact, ArtifactRef, Artifacts
from lmray.artifacts.store import Store
from lmray.errors import ArtifactError
from lmray.models.rope import RopeScaling, check_same_scaling
from lmray.serve.adapter_cache import Candidate
from lmray.units import human_bytes


@dataclass(frozen=True)
class Fit:
    """A base model, as adapters name it, and the largest adapter it is served with."""

    source: str
    digest: str
    """Of the base model's weights."""
    rope_scaling: RopeScaling | None
    max_adapter_bytes: int

    def check(self, artifact: Artifact) -> None:
        """Raises ArtifactError with what does not fit."""
        where = f"artifact `{artifact.ref}`"
        if artifact.kind != "adapter":
            hint = f"serve it as `model.source: artifact:{artifact.name}`"
            raise ArtifactError(where, f"is a {artifact.kind}", allowed="adapter", hint=hint)
        digest, source = artifact.base.get("digest"), artifact.base.get("source")
        if digest != self.digest:
            hint = f"set `model.source: {source}`, or train it again on this model"
            allowed = f"adapters of `{self.source}` ({self.digest[:12]})"
            raise ArtifactError(where, f"was trained on `{source}` ({str(digest)[:12]})", allowed=allowed, hint=hint)
        check_same_scaling(where, RopeScaling.of(artifact.base), self.rope_scaling)
        _check_files(artifact)
        self.check_size(artifact, artifact.num_bytes)

    def check_size(self, artifact: Artifact, num_bytes: int) -> None:
        """Raises ArtifactError for files that are larger than allowed."""
        if num_bytes > self.max_adapter_bytes:
            allowed = f"up to {human_bytes(self.max_adapter_bytes)}"
            hint = "raise `adapter_cache.max_adapter_bytes`, and `max_bytes` where that is less"
            raise ArtifactError(
                f"artifact `{artifact.ref}`", f"has {human_bytes(num_bytes)}", allowed=allowed, hint=hint
            )


def _check_files(artifact: Artifact) -> None:
    """A record is read from the store like any file: its names must stay inside the folder they are copied to."""
    for name, facts in artifact.files.items():
        path = PurePosixPath(name)
        stays = not path.is_absolute() and ".." not in path.parts and "\\" not in name and name.endswith(ALLOWED_FILES)
        if not stays or not re.fullmatch(r"[0-9a-f]{64}", str(facts.get("sha256"))):
            allowed = f"relative names that end with {' '.join(ALLOWED_FILES)}, and SHA-256 digests"
            raise ArtifactError(f"artifact `{artifact.ref}`", f"names a file `{name}`", allowed=allowed)


class StoredAdapters:
    """The adapters of a store that fit, by handle (`NAME@VERSION`). Blocks while it reads."""

    def __init__(self, store: Store, fit: Fit):
        self._store, self._artifacts, self._fit = store, Artifacts(store), fit

    def find(self, handle: str) -> Candidate:
        """The adapter as a folder of this node, every digest checked. Raises ArtifactError."""
        artifact = self._artifacts.find(ArtifactRef.parse(handle))
        self._fit.check(artifact)
        folder = self._checkout(artifact)
        return Candidate(folder, sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()))

    def _checkout(self, artifact: Artifact) -> Path:
        """Sizes are checked before anything is copied: what a record says is not what must be there."""
        stamps = [self._store.stamp(f"objects/{facts['sha256']}") for facts in artifact.files.values()]
        self._fit.check_size(artifact, sum(stamp[-1] for stamp in stamps if stamp is not None))
        return self._artifacts.checkout(artifact)
