"""A kept adapter in the forms that other programs read: merged into its base (`hf`), or as it is (`peft`)."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoConfig

from lmray.artifacts.files import replace_folder
from lmray.errors import ArtifactError
from lmray.models.load import load_model, load_tokenizer
from lmray.models.quiet import quiet
from lmray.models.source import find_model

FORMATS = ("hf", "peft")
DTYPES = ("auto", "float32", "bfloat16")


def export(adapter: Path, base: Mapping[str, Any], target: Path, format: str = "hf", *, dtype: str = "auto") -> None:
    """Writes the adapter in folder `adapter`, trained on `base` (`source`, `revision`, `digest`), to folder `target`.

    `hf`: base and adapter merged in float32 and rounded once to `dtype` (`auto`: the base's own), with tokenizer and
    chat template, for plain `from_pretrained`. `peft`: the adapter's own files. `target` appears whole or not at all.
    Raises ArtifactError for an unknown format or type, a folder that is not empty, or another base than the
    adapter's.
    """
    if format not in FORMATS:
        raise ArtifactError(f"format `{format}`", "unknown", allowed=", ".join(FORMATS))
    if dtype not in DTYPES:
        raise ArtifactError(f"dtype `{dtype}`", "unknown", allowed=", ".join(DTYPES))
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ArtifactError(str(target), "is there already and not empty", hint="name a new folder")
    target.absolute().parent.mkdir(parents=True, exist_ok=True)
    if format == "peft":
        replace_folder(adapter, target)
        return
    found = find_model(base["source"], base.get("revision"))
    if found.digest != base["digest"]:
        raise ArtifactError(
            f"model `{base['source']}`",
            f"has digest {found.digest[:12]}",
            allowed=f"{base['digest'][:12]}, the adapter's base",
        )
    with tempfile.TemporaryDirectory(dir=target.absolute().parent, prefix=".export-") as scratch:
        merged = Path(scratch) / "model"
        with quiet():
            model = merge(found.folder, adapter)
            stored = AutoConfig.from_pretrained(found.folder).dtype or torch.float32
            model.to(stored if dtype == "auto" else getattr(torch, dtype)).save_pretrained(merged)
            tokenizer_from = adapter if (adapter / "tokenizer_config.json").is_file() else found.folder
            load_tokenizer(tokenizer_from).save_pretrained(merged)
        replace_folder(merged, target)
        shutil.rmtree(merged)


def merge(base: Path, adapter: Path) -> Any:
    """The model in `base` with the adapter in folder `adapter` merged into its weights, in float32."""
    attached = PeftModel.from_pretrained(load_model(base, "float32"), str(adapter))
    if attached.active_peft_config.is_prompt_learning:
        found = "cannot be merged: its virtual tokens are no weights of the model"
        raise ArtifactError(str(adapter), found, hint="`--format peft` exports it as it is")
    return attached.merge_and_unload(safe_merge=True)
