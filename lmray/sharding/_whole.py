"""A model that lies whole on its rank: what the strategies share that share no weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from lmray.sharding._state import load_state, save_whole, step_and_forget, trained_weights


@dataclass
class WholePlaced:
    """Placed on a rank that is the only one."""

    whole: bool = field(default=True, init=False)
    saves_alone: bool = field(default=True, init=False)
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer

    @property
    def trained(self) -> list[torch.nn.Parameter]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def all_sum(self, value: float) -> float:
        return value

    def sum_tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def of_first(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        loss.backward()

    def clip_grad_norm(self, max_norm: float) -> float:
        return float(torch.nn.utils.clip_grad_norm_(self.trained, max_norm))

    def apply(self, *, then: Callable[[], None] | None = None) -> None:
        step_and_forget(self.optimizer, then)

    def gathered_state(self, *, trained_only: bool = True) -> dict[str, torch.Tensor] | None:
        state = trained_weights(self.model, self.optimizer) if trained_only else self.model.state_dict()
        return {name: tensor.detach().to("cpu") for name, tensor in state.items()}

    def save(self, folder: Path) -> None:
        save_whole(self.model, self.optimizer, folder)

    def load(self, folder: Path) -> None:
        load_state(self.model, self.optimizer, folder)
