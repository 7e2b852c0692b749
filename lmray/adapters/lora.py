"""LoRA: a frozen weight W gets a trained low-rank side path, W x + (alpha / r) B A x.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685, equation 3, through the `peft`
library. Differs from the paper in: nothing; B starts at zero, A as `peft` starts it (Kaiming uniform).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from pydantic import Field
from safetensors.torch import load_file

from lmray.adapters.base import Adapter
from lmray.artifacts.files import write_json
from lmray.errors import CheckpointError, ConfigError
from lmray.models.tensors import save_tensors


class Lora(Adapter):
    """Low-rank adaptation."""

    r: Annotated[int, Field(ge=1)] = 8
    """Rank of the update."""
    lora_alpha: Annotated[float, Field(gt=0.0)] = 16
    """Scale: the update is multiplied by `lora_alpha / r`."""
    lora_dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    target_modules: str | tuple[str, ...] = "all-linear"
    """Names of the linear layers that get an update; `all-linear` means all but the output head."""

    def attach(self, model: torch.nn.Module, *, seed: int) -> PeftModel:
        targets = self.target_modules if isinstance(self.target_modules, str) else list(self.target_modules)
        alpha = int(self.lora_alpha) if float(self.lora_alpha).is_integer() else self.lora_alpha
        config = LoraConfig(
            r=self.r,
            lora_alpha=alpha,  # type: ignore[arg-type]  # PEFT divides by r; a fraction is fine
            lora_dropout=self.lora_dropout,
            target_modules=targets,
            task_type="CAUSAL_LM",
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            try:
                return get_peft_model(model, config)  # type: ignore[arg-type,return-value]
            except ValueError as error:
                raise ConfigError("adapter.target_modules", str(error), hint="`all-linear` fits every model") from None

    def save(self, model: torch.nn.Module, folder: Path, *, state: Mapping[str, torch.Tensor] | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        config = model.peft_config["default"].to_dict()  # type: ignore[union-attr,index]
        config["inference_mode"] = True
        write_json(folder / "adapter_config.json", _plain(config))
        save_tensors(get_peft_model_state_dict(model, state_dict=state), folder / "adapter_model.safetensors")

    def load(self, model: torch.nn.Module, folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        state = load_file(path)
        expected = {name: tuple(tensor.shape) for name, tensor in get_peft_model_state_dict(model).items()}
        found = {name: tuple(tensor.shape) for name, tensor in state.items()}
        if found != expected:
            odd = sorted(set(found.items()) ^ set(expected.items()))[0]
            raise CheckpointError(str(path), f"does not fit the job's adapter, first at {odd[0]} {list(odd[1])}")
        set_peft_model_state_dict(model, state)


def _plain(value):
    """PEFT's config with sets, enums and paths as JSON types, so that equal configs give equal files."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(map(str, value))
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, (str, int, float, bool)) else getattr(value, "value", str(value))
