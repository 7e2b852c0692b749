"""What an adapter does: attach itself to a model, give and take its state, merge. State on disk is PEFT's layout."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from lmray.config import MemberConfig

if TYPE_CHECKING:
    import torch


class Adapter(MemberConfig):
    """Base of `lmray/adapters/*.py`."""

    kept: ClassVar[Literal["adapter", "model"]] = "adapter"
    """What a saved folder holds: PEFT's layout, or a whole model in Hugging Face's."""

    @abstractmethod
    def attach(self, model: torch.nn.Module, *, seed: int) -> torch.nn.Module:
        """`model` with fresh trainable weights beside its frozen ones. Equal seeds give equal weights."""
        raise NotImplementedError

    @abstractmethod
    def save(self, model: torch.nn.Module, folder: Path, *, state: Mapping[str, torch.Tensor] | None = None) -> None:
        """Writes `adapter_config.json` and `adapter_model.safetensors` into `folder`. `state`: the model's gathered
        `state_dict` where the model is sharded."""
        raise NotImplementedError

    @abstractmethod
    def load(self, model: torch.nn.Module, folder: Path) -> None:
        """Sets the attached weights to those in `folder`. Raises CheckpointError where names or shapes differ."""
        raise NotImplementedError
