"""What is kept in the forms that other programs read: a whole model (`hf`), or an adapter as it is (`peft`)."""

from __future__ import annotations

import tempfile
from pathlib import Path

from lmray.artifacts.artifact import Artifact, Artifacts
from lmray.artifacts.files import replace_folder
from lmray.errors import ArtifactError
from lmray.models.merge import write_merged
from lmray.models.rope import RopeScaling
from lmray.models.source import find_base

FORMATS = ("hf", "peft")
DTYPES = ("auto", "float32", "bfloat16")


def export(kept: Artifacts, artifact: Artifact, target: Path, format: str = "hf", *, dtype: str = "auto") -> None:
    """Writes `artifact` to folder `target`, which appears whole or not at all.

    `hf`: the model, with tokenizer and chat template, for plain `from_pretrained`; an adapter is merged into its base
    in float32, and weights are rounded once to `dtype` (`auto`: as they are, or the base's own). `peft`: the adapter's
    own files. Raises ArtifactError for an unknown format or type, one that does not fit, a folder that is not empty, or
    a base that is not there as the adapter was trained on it.
    """
    if format not in FORMATS:
        raise ArtifactError(f"format `{format}`", "unknown", allowed=", ".join(FORMATS))
    if dtype not in DTYPES:
        raise ArtifactError(f"dtype `{dtype}`", "unknown", allowed=", ".join(DTYPES))
    if format == "peft" and artifact.kind == "model":
        found, hint = "is a whole model, which PEFT's layout cannot hold", f"lmray artifacts export {artifact.ref} ..."
        raise ArtifactError(f"artifact `{artifact.ref}`", found, allowed="--format hf", hint=hint)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ArtifactError(str(target), "is there already and not empty", hint="name a new folder")
    target.absolute().parent.mkdir(parents=True, exist_ok=True)
    if format == "peft" or (artifact.kind == "model" and dtype == "auto"):
        replace_folder(kept.checkout(artifact), target)
        return
    folder = kept.checkout(artifact)
    base, adapter = (folder, None) if artifact.kind == "model" else (find_base(kept, artifact).folder, folder)
    with tempfile.TemporaryDirectory(dir=target.absolute().parent, prefix=".export-") as scratch:
        scaling = None if artifact.kind == "model" else RopeScaling.of(artifact.base)
        write_merged(base, adapter, Path(scratch, "model"), dtype=dtype, rope_scaling=scaling)
        replace_folder(Path(scratch, "model"), target)
