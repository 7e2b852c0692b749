"""From what a job calls an adapter to a folder on this machine that belongs to a base model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lmray.artifacts.artifact import Artifacts
from lmray.artifacts.files import folder_digests, sha256_json
from lmray.artifacts.store import open_store
from lmray.errors import ArtifactError
from lmray.models.rope import RopeScaling, check_same_scaling
from lmray.models.source import FoundModel, check_readable

WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class FoundAdapter:
    """An adapter on this machine, in PEFT's layout."""

    name: str
    """`NAME@VERSION` of an artifact, whatever a stage holds later; else the folder as the job writes it."""
    folder: Path
    digest: str
    """Of its files."""


def find_adapter(
    adapter: str, base: FoundModel, *, storage: str | None = None, rope_scaling: RopeScaling | None = None
) -> FoundAdapter:
    """The adapter that `adapter` names (`NAME`, `NAME@STAGE`, `NAME@VERSION`, a folder), for `base` with its positions
    scaled as told. Raises ArtifactError where it is unknown, no adapter, or belongs to another model."""
    folder = Path(adapter).expanduser()
    if (folder / "adapter_config.json").is_file():
        _check_weights(folder)
        check_same_scaling(f"adapter in {folder}", RopeScaling.beside(folder), rope_scaling)
        return FoundAdapter(adapter, folder, sha256_json(folder_digests(folder)))
    artifacts = Artifacts(open_store(storage))
    artifact = artifacts.find(adapter)
    where = f"artifact `{artifact.ref}`"
    if artifact.kind != "adapter":
        hint = f"take it as a model: `artifact:{adapter}`"
        raise ArtifactError(where, f"is a {artifact.kind}", allowed="adapter", hint=hint)
    if artifact.base.get("digest") != base.digest:
        allowed = f"{artifact.base.get('source')} with digest {str(artifact.base.get('digest'))[:12]}"
        raise ArtifactError(where, f"was trained on another base than `{base.source}`", allowed=allowed)
    check_same_scaling(where, RopeScaling.of(artifact.base), rope_scaling)
    return FoundAdapter(artifact.ref, artifacts.checkout(artifact), artifact.id)


def _check_weights(folder: Path) -> None:
    """Raises ArtifactError where `folder` holds no whole safetensors file: PEFT would unpickle another, or ask the
    Hub for one."""
    if not (folder / WEIGHTS).is_file():
        there = ", ".join(sorted(path.name for path in folder.glob("*"))[:6])
        raise ArtifactError(f"adapter in {folder}", f"has no {WEIGHTS}, found {there}", hint="save it as safetensors")
    check_readable(folder / WEIGHTS)
