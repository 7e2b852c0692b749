"""What the adapters over the `peft` library share: attaching by a PEFT config, and PEFT's layout on disk.

The layout, `adapter_config.json` and `adapter_model.safetensors`, is read by plain `peft`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file

from lmray.adapters.base import Adapter
from lmray.artifacts.files import write_json
from lmray.errors import ConfigError
from lmray.models.tensors import check_same_shapes, save_tensors

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
HANDLE = "default"
"""PEFT's name for the one adapter of a model."""


class PeftAdapter(Adapter):
    """An adapter that is a config of PEFT."""

    @abstractmethod
    def config(self) -> PeftConfig:
        """The config that `peft` builds it from."""
        raise NotImplementedError

    def attach(self, model: torch.nn.Module, *, seed: int) -> PeftModel:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            try:
                return get_peft_model(model, self.config())  # type: ignore[arg-type,return-value]
            except ValueError as error:
                raise ConfigError("adapter.target_modules", str(error), hint="`all-linear` fits every model") from None

    def save(self, model: torch.nn.Module, folder: Path, *, state: Mapping[str, torch.Tensor] | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        config = peft_config(model).to_dict()
        config["inference_mode"] = True
        write_json(folder / CONFIG, _plain(config))
        save_tensors(get_peft_model_state_dict(model, None if state is None else dict(state)), folder / WEIGHTS)

    def load(self, model: torch.nn.Module, folder: Path) -> None:
        path = folder / WEIGHTS
        state = load_file(path)
        check_same_shapes(path, state, get_peft_model_state_dict(model))
        set_peft_model_state_dict(model, state)


def peft_config(model: Any) -> PeftConfig:
    """The config that `model` was attached by."""
    return model.peft_config[HANDLE]


def _plain(value):
    """PEFT's config with sets, enums and paths as JSON types, so that equal configs give equal files."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(map(str, value))
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, (str, int, float, bool)) else getattr(value, "value", str(value))
