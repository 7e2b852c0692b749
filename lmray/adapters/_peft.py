"""What the adapters over the `peft` library share: attaching by a PEFT config, and PEFT's layout on disk.

The layout, `adapter_config.json` and `adapter_model.safetensors`, is read by plain `peft`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file

from lmray.adapters.base import Adapter
from lmray.artifacts.files import write_json
from lmray.errors import ConfigError
from lmray.models.precision import keep_masters
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

    def attach(self, model: torch.nn.Module, *, seed: int) -> torch.nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            try:
                adapted = get_peft_model(model, self.config())  # type: ignore[arg-type]
            except ValueError as error:
                raise ConfigError("adapter.target_modules", str(error), hint="`all-linear` fits every model") from None
        keep_masters(self.trained(adapted).values())
        return adapted

    def save(self, model: torch.nn.Module, folder: Path, *, state: Mapping[str, torch.Tensor] | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / CONFIG, _plain(self.kept_config(model)))
        save_tensors(_apart(self.to_kept(model, self._state(model, state))), folder / WEIGHTS)

    def load(self, model: torch.nn.Module, folder: Path) -> None:
        path = folder / WEIGHTS
        found = load_file(path)
        check_same_shapes(path, found, self.to_kept(model, self._state(model)))
        self._set_state(model, self.from_kept(model, found))

    def kept_config(self, model: torch.nn.Module) -> dict[str, Any]:
        """What `adapter_config.json` says."""
        return peft_config(model).to_dict() | {"inference_mode": True}

    def to_kept(self, model: Any, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The weights, by PEFT's names, as they are kept: for the base as it was before this adapter was attached."""
        return state

    def from_kept(self, model: Any, state: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """The weights that `to_kept` made `state` of."""
        return state

    def _state(self, model: Any, state: Mapping[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
        return get_peft_model_state_dict(model, None if state is None else dict(state), save_embedding_layers=False)

    def _set_state(self, model: Any, state: Mapping[str, torch.Tensor]) -> None:
        set_peft_model_state_dict(model, dict(state))


def peft_config(model: Any) -> PeftConfig:
    """The config that `model` was attached by."""
    return model.peft_config[HANDLE]


def _apart(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies of those that share memory, as tied embeddings do: PEFT's layout has each by its own name."""
    seen: set[int] = set()
    found = {}
    for name, tensor in tensors.items():
        found[name] = tensor.clone() if tensor.data_ptr() in seen else tensor
        seen.add(tensor.data_ptr())
    return found


def _plain(value):
    """PEFT's config with sets, enums and paths as JSON types, so that equal configs give equal files."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(map(str, value))
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, (str, int, float, bool)) else getattr(value, "value", str(value))
