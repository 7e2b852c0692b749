"""The evaluation job that a few words on a command line describe."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmray.artifacts.artifact import KINDS, Artifacts
from lmray.artifacts.files import read_json
from lmray.artifacts.store import open_store
from lmray.config import Document, decode, dump
from lmray.config.reader import parse_value
from lmray.errors import ArtifactError, ConfigError
from lmray.job import EvaluateJob
from lmray.models.rope import RopeScaling
from lmray.models.source import ARTIFACT

BASE = "base"
"""The target that is the base model alone."""


@dataclass(frozen=True)
class Words:
    """What the command line says."""

    targets: Sequence[str]
    """`base`, artifacts, folders of adapters or models."""
    tasks: str
    """`json_match,loss`; fields after a colon: `bleu:tokenize=char`, `lm_eval:tasks=[arc_easy,hellaswag]`."""
    data: Sequence[str]
    """Empty where every task brings its own."""
    model: str | None = None
    """Empty: the base model of the first artifact or adapter; a whole model itself, where `base` is no target."""
    mapping: str | None = None
    """A mapping's name, or columns: `prompt=question,completion=answer`."""
    split: float | None = None
    """Fraction held out. Empty: all of the data is measured on."""
    by: str | None = None
    max_examples: int | None = None
    max_new_tokens: int | None = None
    name: str | None = None
    """Of the run. Empty: made of the targets."""


def make_job(words: Words) -> EvaluateJob:
    """The job that `words` describe. Raises ConfigError for what cannot be decoded, ArtifactError for a target that
    is unknown."""
    if not words.targets:
        raise ConfigError("TARGET", "none given", allowed="base, NAME, NAME@STAGE, NAME@VERSION, a folder")
    if words.by and words.split is None:
        raise ConfigError("--by", f"`{words.by}` groups a split, and there is none", hint="add `--split 0.2`")
    targets = [target.removeprefix(ARTIFACT) for target in words.targets]
    labels = _labels(targets)
    model = {"source": words.model} if words.model else _base_of(targets)
    mapping = {"mapping": _mapping(words.mapping)} if words.mapping else {}
    sources = [{"source": source, **mapping} for source in words.data]
    held_out = {"split": words.split, "by": words.by} if words.split is not None else {"sources": sources}
    limits = {"max_examples": words.max_examples, "max_new_tokens": words.max_new_tokens}
    tree = {
        "kind": "evaluate",
        "name": words.name or "-".join(["evaluate", *labels])[:64],
        "model": model,
        **({"data": {"train": sources, "eval": held_out}} if sources else {}),
        "targets": [{"label": label, **_measured_with(target)} for label, target in zip(labels, targets, strict=True)],
        "evaluate": {"tasks": [_task(text) for text in re.split(r",(?![^\[]*\])", words.tasks) if text.strip()]}
        | {key: value for key, value in limits.items() if value is not None},
    }
    if not tree["evaluate"]["tasks"]:
        raise ConfigError("--tasks", "names no task", hint="`lmray show tasks` lists them")
    return decode(EvaluateJob, Document("command line", tree))


def _labels(targets: Sequence[str]) -> list[str]:
    """A name for each target: `function-calls@production` is `function-calls-production`, a folder is its own name or
    its run's. Equal ones are numbered."""
    labels: list[str] = []
    for target in targets:
        folder = Path(target).expanduser()
        if _is_adapter(folder) or _is_model(folder):
            folder = folder.resolve()
            label = folder.parent.name if folder.name in KINDS else folder.name
        else:
            label = target
        label = re.sub(r"[^\w.\-]+", "-", label).strip("-.")[:50] or "target"
        alike = sum(one == label or one.startswith(f"{label}-again-") for one in labels)
        labels.append(f"{label}-again-{alike}" if alike else label)
    return labels


def _measured_with(target: str) -> dict[str, str]:
    """`adapter:` or `model:` of a target. A folder by its whole path, for a worker may stand elsewhere; a reference as
    it is."""
    folder = Path(target).expanduser()
    if target == BASE:
        return {}
    if _is_adapter(folder):
        return {"adapter": str(folder.resolve())}
    if _is_model(folder):
        return {"model": str(folder.resolve())}
    artifact = Artifacts(open_store()).find(target)
    return {"model": ARTIFACT + target} if artifact.kind == "model" else {"adapter": target}


def _is_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").is_file()


def _is_model(folder: Path) -> bool:
    return (folder / "config.json").is_file()


def _base_of(targets: Sequence[str]) -> dict[str, Any]:
    """`model:` of the first target that names its base model; the program checks that the others belong to it too."""
    for target in targets:
        folder = Path(target).expanduser()
        if target == BASE or (_is_model(folder) and BASE in targets):
            continue
        if _is_model(folder):
            return {"source": str(folder.resolve())}
        if not _is_adapter(folder):
            artifact = Artifacts(open_store()).find(target)
            if artifact.kind == "model" and BASE not in targets:
                return {"source": ARTIFACT + target}
            return {name: artifact.base.get(name) for name in ("source", "revision", "rope_scaling")}
        config = read_json(folder / "adapter_config.json", hint="copy the adapter again")
        source = config.get("base_model_name_or_path") if isinstance(config, dict) else None
        if not source:
            raise ArtifactError(str(folder), "does not say which base model it belongs to", hint="add `--model MODEL`")
        scaling = RopeScaling.beside(folder)
        return {"source": source, "rope_scaling": scaling and dump(scaling)}
    raise ConfigError("--model", "none given, and no target names one", hint="add `--model MODEL`")


def _mapping(text: str) -> Any:
    """A name as it stands, `column=name` pairs as a mapping."""
    return _pairs("--mapping", text, ",") if "=" in text else text


def _task(text: str) -> Any:
    name, sign, fields = text.strip().partition(":")
    return {"name": name, **_pairs(f"--tasks {name}", fields, ":")} if sign else name


def _pairs(where: str, text: str, separator: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for pair in text.split(separator):
        key, sign, value = pair.partition("=")
        if not (key.strip() and sign and value.strip()):
            raise ConfigError(where, f"`{pair}` is no `field=value`")
        found[key.strip()] = parse_value(value, where)
    return found
