"""An adapter merged into its base: a whole model, for plain `from_pretrained`."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError

from lmray.errors import ArtifactError
from lmray.models.load import load_config, load_model, load_tokenizer
from lmray.models.machine import is_out_of_memory
from lmray.models.quiet import quiet
from lmray.models.rope import RopeScaling

PRUNING = "pruning.json"
"""Lies beside the weights of a pruned model, and of what it is merged into."""


def write_merged(
    base: Path,
    adapter: Path | None,
    target: Path,
    *,
    dtype: str = "auto",
    rope_scaling: RopeScaling | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Writes the model in folder `base`, its positions scaled as the adapter was trained with, with the adapter in
    folder `adapter` (None: as it is) to folder `target`.

    Merged in float32 and rounded once to `dtype` (`float32`, `bfloat16`; `auto`: the base's own). The tokenizer is the
    adapter's, where one lies beside it; the record of a pruning stays beside the weights. Raises ArtifactError for an
    adapter that is no change of the weights, does not fit the base, or holds numbers that are none.
    """
    with quiet():
        model: Any = load_model(base, "float32", trust_remote_code=trust_remote_code, rope_scaling=rope_scaling)
        if adapter is not None:
            model = _merged(model, adapter)
        config = load_config(base, trust_remote_code=trust_remote_code)
        model.to((config.dtype or torch.float32) if dtype == "auto" else getattr(torch, dtype)).save_pretrained(target)
        has_tokenizer = adapter is not None and (adapter / "tokenizer_config.json").is_file()
        tokenizer_from = adapter if has_tokenizer and adapter is not None else base
        load_tokenizer(tokenizer_from, chat=False, trust_remote_code=trust_remote_code).save_pretrained(target)
    if (base / PRUNING).is_file():
        shutil.copy(base / PRUNING, target)


def _merged(model: Any, adapter: Path) -> Any:
    try:
        attached = PeftModel.from_pretrained(model, str(adapter))
        if not attached.active_peft_config.is_prompt_learning:
            return attached.merge_and_unload(safe_merge=True)
    except (SafetensorError, ValueError, TypeError, KeyError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        hint = "train it again, or serve another version"
        raise ArtifactError(str(adapter), f"cannot be merged: {first[:200]}", hint=hint) from None
    found = "cannot be merged: its virtual tokens are no weights of the model"
    raise ArtifactError(str(adapter), found, hint="`--format peft` exports it as it is")
