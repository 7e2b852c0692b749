"""Reads an adapter folder without trusting it: safetensors only, known settings only, shapes checked before loading.

PEFT's own loader would fall back to pickles and to downloads; nothing here does.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from peft import LoraConfig
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from torch import nn

from lmray.errors import ArtifactError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MAX_RANK = 512
_USED = {
    "r", "lora_alpha", "target_modules", "exclude_modules", "rank_pattern", "alpha_pattern", "use_rslora",
    "fan_in_fan_out", "layers_to_transform", "layers_pattern",
}  # fmt: skip
_TRAINING_ONLY = {
    "peft_type", "task_type", "base_model_name_or_path", "revision", "inference_mode", "init_lora_weights",
    "lora_dropout", "peft_version", "bias",
}  # fmt: skip
MERGE = "merge the adapter into the model instead"
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Ways to start a LoRA that change the base model's weights too, so that the adapter alone is not the result."""
_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")


def _regex(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"{text!r} is no regular expression: {error}") from None
    return text


_Regex = Annotated[str, AfterValidator(_regex)]
_Rank = Annotated[int, Field(ge=1, le=MAX_RANK)]


class _Settings(BaseModel):
    """Settings that PEFT computes with and does not check."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)
    lora_alpha: float = 8
    rank_pattern: dict[_Regex, _Rank] | None = None
    alpha_pattern: dict[_Regex, float] | None = None
    target_modules: _Regex | list[str] | None = None
    exclude_modules: _Regex | list[str] | None = None
    layers_pattern: _Regex | list[_Regex] | None = None
    layers_to_transform: int | list[int] | None = None


@dataclass(frozen=True)
class AdapterFolder:
    """A checked adapter: its PEFT config and its weights by PEFT's names."""

    path: Path
    config: LoraConfig
    tensors: dict[str, torch.Tensor]


def read_adapter_folder(path: Path, base: nn.Module) -> AdapterFolder:
    """Reads the adapter in `path` after checking it against `base`. Raises ArtifactError with what does not fit."""
    config, weights = _read_config(path / CONFIG), path / WEIGHTS
    if not weights.is_file():
        pickled = sorted(file.name for file in path.glob("*") if file.suffix in (".bin", ".pt", ".pth", ".pkl"))
        found = f"holds no {WEIGHTS}" + (f", but {pickled[0]}, which may run code when it is read" if pickled else "")
        raise ArtifactError(str(path), found, hint="save it with `safe_serialization=True`")
    try:
        with safe_open(weights, framework="pt") as file:
            names = list(file.keys())
            _check_shapes(weights, {name: tuple(file.get_slice(name).get_shape()) for name in names}, base)
            tensors = {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        raise ArtifactError(str(weights), f"is no safetensors file: {error}", hint="export it again") from None
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ArtifactError(str(weights), f"`{name}` holds NaN or infinity", hint="train it again")
    return AdapterFolder(path, config, tensors)


def _read_config(path: Path) -> LoraConfig:
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(str(path), f"cannot be read: {error}", hint="the folder of an adapter holds it") from None
    if not isinstance(fields, dict) or fields.get("peft_type") != "LORA":
        found = fields.get("peft_type") if isinstance(fields, dict) else fields
        raise ArtifactError(str(path), f"`peft_type` is {found!r}", allowed="LORA", hint=MERGE)
    _check_settings(path, fields)
    used = {key: value for key, value in fields.items() if key in _USED}
    try:
        return LoraConfig(**used, inference_mode=True, task_type="CAUSAL_LM")
    except (TypeError, ValueError) as error:
        raise ArtifactError(str(path), f"is no LoRA config: {error}") from None


def _check_settings(path: Path, fields: dict[str, Any]) -> None:
    defaults = LoraConfig().to_dict()
    for key, value in fields.items():
        if key not in _USED and key not in _TRAINING_ONLY and value and value != defaults.get(key):
            raise ArtifactError(str(path), f"uses `{key}`, which this engine does not apply", hint=MERGE)
    if fields.get("bias", "none") != "none":
        raise ArtifactError(str(path), f"`bias` is {fields['bias']!r}", allowed="none")
    start = str(fields.get("init_lora_weights", True)).lower()
    if start.startswith(_CHANGES_BASE):
        found = f"`init_lora_weights` is {start!r}, which changed the base model's weights too"
        raise ArtifactError(str(path), found, allowed="true", hint=MERGE)
    rank = fields.get("r")
    if not isinstance(rank, int) or not 1 <= rank <= MAX_RANK:
        raise ArtifactError(str(path), f"`r` is {rank!r}", allowed=f"1 to {MAX_RANK}")
    try:
        _Settings.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise ArtifactError(str(path), f"`{first['loc'][0]}`: {first['msg']}") from None


def _check_shapes(path: Path, shapes: dict[str, tuple[int, ...]], base: nn.Module) -> None:
    """Every tensor must be one side of a linear layer of `base`: A is [rank, in], B is [out, rank]."""
    if not shapes:
        raise ArtifactError(str(path), "holds no weights")
    for name, shape in shapes.items():
        match = _KEY.fullmatch(name)
        if match is None:
            raise ArtifactError(str(path), f"`{name}` is no LoRA weight of a linear layer", hint=MERGE)
        sizes = _linear_sizes(base, match["module"])
        if sizes is None:
            hint = "was it trained on another model?"
            raise ArtifactError(str(path), f"the model has no linear layer `{match['module']}`", hint=hint)
        side, width = (1, sizes[0]) if match["side"] == "A" else (0, sizes[1])
        if len(shape) != 2 or shape[side] != width or not 1 <= shape[1 - side] <= MAX_RANK:
            allowed = (f"[rank, {width}]" if match["side"] == "A" else f"[{width}, rank]") + f", rank up to {MAX_RANK}"
            raise ArtifactError(str(path), f"`{name}` has shape {list(shape)}", allowed=allowed)


def _linear_sizes(base: nn.Module, name: str) -> tuple[int, int] | None:
    """(in, out) of linear layer `name`, also where PEFT wraps it; None where there is none."""
    try:
        module = base.get_submodule(name)
    except AttributeError:
        return None
    if hasattr(module, "in_features"):
        return int(module.in_features), int(module.out_features)  # type: ignore[arg-type]
    if type(module).__name__ == "Conv1D":  # GPT-2's linear layer, stored transposed
        num_in, num_out = module.weight.shape  # type: ignore[union-attr]
        return int(num_in), int(num_out)
    return None
