"""One worker holds the whole model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from lmray.errors import CapacityError
from lmray.sharding._state import load_state, save_whole, step_and_forget, trained_weights
from lmray.sharding.base import MakeOptimizer, Need, Placed, Sharding


class Single(Sharding):
    """The whole model on one worker."""

    def resolve(self, *, workers: int, need: Need | None = None) -> tuple[Sharding, str]:
        if workers != 1:
            raise CapacityError(
                "sharding",
                f"`single` runs on one worker, the job asks for {workers}",
                allowed="resources.workers: 1",
                hint="`sharding: auto` takes the strategy that fits the workers",
            )
        return self, "one worker"

    def place(
        self, model: torch.nn.Module, make_optimizer: MakeOptimizer, device: str, *, dtype: str = "float32"
    ) -> Placed:
        model.to(device)
        return WholePlaced(model, make_optimizer(model))


@dataclass
class WholePlaced:
    """A model that lies whole on its rank, which is the only one."""

    whole: ClassVar[bool] = True
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer

    @property
    def trained(self) -> list[torch.nn.Parameter]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def all_sum(self, value: float) -> float:
        return value

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
