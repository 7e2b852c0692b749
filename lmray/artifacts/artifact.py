"""Artifacts: immutable versions under a name, with parents and metrics; stages point at versions.

In the store: `objects/DIGEST` holds each file once, `artifacts/NAME/versions/ID.json` describes a version,
`artifacts/NAME/stages.json` lists every change of a stage, which also says what each stage holds: one write a change.
A version's id is a digest of what it is (files, kind, base, parents): keeping the same thing twice gives one version.
"""

from __future__ import annotations

import fnmatch
import getpass
import json
import re
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from lmray.artifacts.files import build_once, folder_digests, sha256_file, sha256_json
from lmray.artifacts.store import Store
from lmray.config import Name
from lmray.config.places import cache_root
from lmray.errors import ArtifactError, did_you_mean

STAGES = ("candidate", "staging", "production")
KINDS = {"adapter": ("adapter_config.json",), "model": ("config.json", "*.safetensors", "tokenizer_config.json")}
"""What an artifact may be, with the files that make it one: an adapter in PEFT's layout, a whole model with its
tokenizer in Hugging Face's."""
ALLOWED_FILES = (".safetensors", ".json", ".jinja", ".txt", ".model")
"""Endings an artifact may hold: tensors, JSON, and a tokenizer's text files. Never pickles."""

_ID = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class ArtifactRef:
    """`NAME`, `NAME@STAGE` or `NAME@VERSION` (eight or more digits of the id)."""

    name: str
    at: str | None = None

    @classmethod
    def parse(cls, text: str) -> ArtifactRef:
        """Raises ArtifactError for text that is no reference."""
        name, sign, at = text.partition("@")
        try:
            name = TypeAdapter(Name).validate_python(name)
        except ValidationError:
            raise ArtifactError(
                f"artifact `{text}`", "is no artifact reference", allowed="NAME, NAME@STAGE, NAME@VERSION"
            ) from None
        if sign and not re.fullmatch(r"[a-z]+|[0-9a-f]{8,64}", at):
            raise ArtifactError(
                f"artifact `{text}`", f"`{at}` is neither a stage nor a version", allowed=", ".join(STAGES)
            )
        return cls(name, at if sign else None)

    def __str__(self) -> str:
        return f"{self.name}@{self.at}" if self.at else self.name


@dataclass(frozen=True)
class Artifact:
    """One version of something kept."""

    name: str
    id: str
    kind: str
    """`adapter` or `model`; see KINDS."""
    base: Mapping[str, Any]
    """The model it was trained from: `source`, `revision`, `digest` of its weights."""
    files: Mapping[str, Mapping[str, Any]]
    """`{path: {sha256, bytes}}`."""
    parents: tuple[str, ...] = ()
    """`NAME@VERSION` of the artifacts it was made from."""
    run_key: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)
    created: float = 0.0
    """Seconds since 1970."""

    @property
    def ref(self) -> str:
        return f"{self.name}@{self.id[:12]}"

    @property
    def num_bytes(self) -> int:
        return sum(facts["bytes"] for facts in self.files.values())


class Artifacts:
    """The artifacts in a store."""

    def __init__(self, store: Store):
        self.store = store

    def keep(
        self,
        name: str,
        folder: Path,
        *,
        base: Mapping[str, Any],
        kind: str = "adapter",
        parents: tuple[str, ...] = (),
        run_key: str = "",
        metrics: Mapping[str, float] | None = None,
    ) -> Artifact:
        """Stores every file of `folder` as a version of `name`; the version's record is written last. Raises
        ArtifactError for files that may hold code, or that are no artifact of `kind`."""
        files = folder_digests(folder)
        if kind not in KINDS:
            raise ArtifactError(f"kind `{kind}`", "unknown", allowed=", ".join(KINDS), hint=did_you_mean(kind, KINDS))
        for pattern in KINDS[kind]:
            if not fnmatch.filter(files, pattern):
                raise ArtifactError(str(folder), f"is no {kind}: it has no {pattern}", allowed=", ".join(KINDS[kind]))
        for path in files:
            if not path.endswith(ALLOWED_FILES):
                raise ArtifactError(str(folder / path), "cannot be kept", allowed=" ".join(ALLOWED_FILES))
        content = {"kind": kind, "base": dict(base), "files": files, "parents": list(parents), "run_key": run_key}
        artifact = Artifact(
            name,
            sha256_json(content),
            kind,
            dict(base),
            files,
            parents,
            run_key,
            dict(metrics or {}),
            round(time.time(), 3),
        )
        for path, facts in files.items():
            if not self._is_intact(facts["sha256"]):
                self.store.put(f"objects/{facts['sha256']}", folder / path)
        key = f"artifacts/{name}/versions/{artifact.id}.json"
        self.store.compare_and_swap(key, None, _bytes(asdict(artifact)))
        return self.find(ArtifactRef(name, artifact.id))

    def names(self) -> list[str]:
        """Names of all artifacts, sorted."""
        return sorted({key.split("/")[1] for key in self.store.list("artifacts") if "/versions/" in key})

    def versions(self, name: str) -> list[Artifact]:
        """All versions of `name`, oldest first."""
        keys = self.store.list(f"artifacts/{name}/versions")
        return sorted((self._read(key) for key in keys), key=lambda artifact: artifact.created)

    def stages(self, name: str) -> dict[str, str]:
        """`{stage: version id}`."""
        return _held(self.log(name))

    def find(self, ref: ArtifactRef | str) -> Artifact:
        """The version that `ref` names; without stage or version, the newest. ArtifactError lists what there is."""
        ref = ArtifactRef.parse(ref) if isinstance(ref, str) else ref
        versions = self.versions(ref.name)
        if not versions:
            names = self.names()
            allowed = ", ".join(names) or "nothing is kept yet"
            hint = did_you_mean(ref.name, names) or "`lmray run` of a job with `output.artifact` keeps one"
            raise ArtifactError(f"artifact `{ref}`", f"unknown name in {self.store.root}", allowed=allowed, hint=hint)
        if ref.at is None:
            return versions[-1]
        wanted = self.stages(ref.name).get(ref.at, ref.at)
        found = [artifact for artifact in versions if len(wanted) >= 8 and artifact.id.startswith(wanted)]
        if len(found) != 1:
            allowed = ", ".join([*self.stages(ref.name), *(artifact.id[:12] for artifact in versions)])
            what = f"no version or stage `{ref.at}`" if not found else f"`{ref.at}` fits {len(found)} versions"
            hint = f"lmray artifacts promote {ref.name} {ref.at}" if ref.at in STAGES else did_you_mean(ref.at, STAGES)
            raise ArtifactError(f"artifact `{ref}`", what, allowed=allowed, hint=hint)
        return found[0]

    def verify(self, artifact: Artifact) -> None:
        """Reads every stored file again and compares digests. Raises ArtifactError at the first that differs."""
        for path, facts in artifact.files.items():
            if not self._is_intact(facts["sha256"]):
                raise self._corrupted(artifact, path)

    def checkout(self, artifact: Artifact) -> Path:
        """A local folder with the version's files, verified once; the same folder on every call. Raises ArtifactError
        where a stored file is not what was kept."""

        def build(folder: Path) -> None:
            for path, facts in artifact.files.items():
                stored, copy = self._object(facts["sha256"]), folder / path
                copy.parent.mkdir(parents=True, exist_ok=True)
                if stored.is_file():
                    shutil.copyfile(stored, copy)
                if not stored.is_file() or sha256_file(copy) != facts["sha256"]:
                    raise self._corrupted(artifact, path)

        return build_once(cache_root() / "artifacts" / artifact.id, build)

    def promote(self, ref: ArtifactRef | str, stage: str) -> Artifact:
        """Points `stage` at the version `ref` names and logs it. Raises ArtifactError for an unknown stage."""
        if stage not in STAGES:
            raise ArtifactError(
                f"stage `{stage}`", "unknown", allowed=", ".join(STAGES), hint=did_you_mean(stage, STAGES)
            )
        artifact = self.find(ref)
        self._change(artifact.name, "promote", stage, lambda log: artifact.id)
        return artifact

    def rollback(self, name: str, stage: str) -> Artifact:
        """Points `stage` at the version it held before its last change. Raises ArtifactError where there was none."""

        def previous(log: list[dict[str, Any]]) -> str:
            found = [entry["previous"] for entry in log if entry["stage"] == stage]
            if not found or found[-1] is None:
                hint = f"lmray artifacts show {name} lists versions and stages"
                raise ArtifactError(
                    f"artifact `{name}@{stage}`", "there is no earlier version to go back to", hint=hint
                )
            return found[-1]

        return self.find(ArtifactRef(name, self._change(name, "rollback", stage, previous)))

    def log(self, name: str) -> list[dict[str, Any]]:
        """Every change of a stage of `name`, oldest first."""
        return self._log(name)[0]

    def _change(self, name: str, action: str, stage: str, choose: Callable[[list[dict[str, Any]]], str]) -> str:
        """Points `stage` at the version that `choose` makes of the log, and returns it. The log's new end is written if
        nobody else wrote one meanwhile, else it is all done again; what the stage holds already is not written."""
        while True:
            log, document = self._log(name)
            held, version = _held(log).get(stage), choose(log)
            entry = {"action": action, "stage": stage, "version": version, "previous": held}
            entry |= {"time": round(time.time(), 3), "by": getpass.getuser()}
            if version == held or self.store.compare_and_swap(_stages(name), document, _bytes([*log, entry])):
                return version

    def _log(self, name: str) -> tuple[list[dict[str, Any]], bytes | None]:
        """The log, and the document it was read from."""
        document = self.store.get(_stages(name))
        try:
            found = json.loads(document) if document else []
        except ValueError:
            raise self._spoilt(_stages(name), "no list of changes") from None
        return (self._log_of_old_layout(name, found) if isinstance(found, dict) else found), document

    def _log_of_old_layout(self, name: str, stages: Mapping[str, str]) -> list[dict[str, Any]]:
        """Stages were written first and logged apart, so a kill between lost the entry; it is told by what is there."""
        log = [json.loads(self.store.get(key) or b"{}") for key in self.store.list(f"artifacts/{name}/log")]
        lost = [
            {"action": "not logged", "stage": stage, "version": version, "previous": _held(log).get(stage)}
            | {"time": None, "by": None}
            for stage, version in stages.items()
            if _held(log).get(stage) != version
        ]
        return [*log, *lost]

    def _object(self, digest: str) -> Path:
        return self.store.root / "objects" / digest

    def _is_intact(self, digest: str) -> bool:
        return self._object(digest).is_file() and sha256_file(self._object(digest)) == digest

    def _corrupted(self, artifact: Artifact, path: str) -> ArtifactError:
        found = f"is missing or corrupted in {self._object(artifact.files[path]['sha256'])}"
        return ArtifactError(f"{artifact.ref}: {path}", found, hint="keep it again")

    def _spoilt(self, key: str, found: str) -> ArtifactError:
        hint = "restore it from a copy of the store; without the file, what it says is forgotten"
        return ArtifactError(str(self.store.root / key), f"is {found}", hint=hint)

    def _read(self, key: str) -> Artifact:
        try:
            fields = json.loads(self.store.get(key) or b"{}")
            artifact = Artifact(**{"kind": "adapter", **fields, "parents": tuple(fields["parents"])})  # one kind, once
        except (ValueError, TypeError, KeyError):
            raise self._spoilt(key, "no record of a version") from None
        place = ["artifacts", artifact.name, "versions", f"{artifact.id}.json"]
        if key.split("/") != place or not _ID.fullmatch(str(artifact.id)):  # both become parts of paths
            raise self._spoilt(key, "no record of the version it is named after")
        return artifact


def _stages(name: str) -> str:
    return f"artifacts/{name}/stages.json"


def _held(log: list[dict[str, Any]]) -> dict[str, str]:
    """`{stage: version id}` after all changes of `log`."""
    return {entry["stage"]: entry["version"] for entry in log}


def _bytes(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
