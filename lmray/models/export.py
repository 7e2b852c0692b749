"""What is kept in the forms that other programs read: a whole model (`hf`, `gguf`), or an adapter as it is (`peft`)."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from lmray.artifacts.artifact import Artifact, Artifacts
from lmray.artifacts.files import replace_folder
from lmray.errors import ArtifactError
from lmray.models.gguf_writer import TYPES, check_architecture, write_gguf
from lmray.models.merge import PRUNING, write_merged
from lmray.models.rope import RopeScaling
from lmray.models.source import find_base

FORMATS = ("hf", "peft", "gguf")
DTYPES = ("auto", "float32", "bfloat16")
GGUF_TYPES = ("auto", *TYPES)


def export(
    kept: Artifacts,
    artifact: Artifact,
    target: Path,
    format: str = "hf",
    *,
    dtype: str = "auto",
    gguf_type: str = "auto",
) -> None:
    """Writes `artifact` to folder `target`, which appears whole or not at all.

    `hf`: the model, with tokenizer and chat template, for plain `from_pretrained`; an adapter is merged into its base
    in float32, and weights are rounded once to `dtype` (`auto`: as they are, or the base's own). `peft`: the adapter's
    own files. `gguf`: the model in one file, its matrices of `gguf_type`. Raises ArtifactError for an unknown format or
    type, one that does not fit, a folder that is not empty, or a base that is not there as the adapter was trained on
    it.
    """
    _check_words(artifact, format, dtype, gguf_type)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ArtifactError(str(target), "is there already and not empty", hint="name a new folder")
    target.absolute().parent.mkdir(parents=True, exist_ok=True)
    folder = kept.checkout(artifact)
    if format == "peft" or (format == "hf" and artifact.kind == "model" and dtype == "auto"):
        replace_folder(folder, target)
        return
    with tempfile.TemporaryDirectory(dir=target.absolute().parent, prefix=".export-") as scratch:
        model, written = Path(scratch, "model"), Path(scratch, "gguf")
        if format == "hf":
            _write_whole(kept, artifact, model, dtype)
            replace_folder(model, target)
            return
        written.mkdir()
        if artifact.kind == "adapter":
            check_architecture(find_base(kept, artifact).folder)
            _write_whole(kept, artifact, model, {"auto": "auto", "bf16": "bfloat16"}.get(gguf_type, "float32"))
        source = model if artifact.kind == "adapter" else folder
        write_gguf(source, written / f"{artifact.name}.gguf", type=gguf_type, name=artifact.name)
        if (source / PRUNING).is_file():
            shutil.copy(source / PRUNING, written)
        replace_folder(written, target)


def _check_words(artifact: Artifact, format: str, dtype: str, gguf_type: str) -> None:
    for what, said, allowed in (("format", format, FORMATS), ("dtype", dtype, DTYPES), ("type", gguf_type, GGUF_TYPES)):
        if said not in allowed:
            raise ArtifactError(f"{what} `{said}`", "unknown", allowed=", ".join(allowed))
    if format == "gguf" and dtype != "auto":
        hint = f"`--gguf-type` says it: {', '.join(GGUF_TYPES)}"
        raise ArtifactError(f"dtype `{dtype}`", "is of `hf` alone", hint=hint)
    if format != "gguf" and gguf_type != "auto":
        raise ArtifactError(f"type `{gguf_type}`", f"is of `gguf` alone, and the format is `{format}`")
    if format == "peft" and artifact.kind == "model":
        found, hint = "is a whole model, which PEFT's layout cannot hold", f"lmray artifacts export {artifact.ref} ..."
        raise ArtifactError(f"artifact `{artifact.ref}`", found, allowed="--format hf", hint=hint)


def _write_whole(kept: Artifacts, artifact: Artifact, target: Path, dtype: str) -> None:
    """A whole model with its weights in `dtype`; an adapter merged into its base."""
    folder = kept.checkout(artifact)
    whole = artifact.kind == "model"
    base, adapter = (folder, None) if whole else (find_base(kept, artifact).folder, folder)
    scaling = None if whole else RopeScaling.of(artifact.base)
    write_merged(base, adapter, target, dtype=dtype, rope_scaling=scaling)
