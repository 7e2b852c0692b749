"""One worker holds the whole model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from safetensors.torch import load_file

from lmray.errors import CapacityError, CheckpointError
from lmray.models.tensors import save_tensors
from lmray.sharding._optimizer_state import optimizer_tensors, set_optimizer_tensors
from lmray.sharding._shards import SHARDS, load_shards
from lmray.sharding.base import MakeOptimizer, Need, Placed, Sharding

OPTIMIZER = "optimizer.safetensors"


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

    def apply(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def gathered_state(self, *, trained_only: bool = True) -> dict[str, torch.Tensor] | None:
        kept = {name for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        state = {name: tensor.to("cpu") for name, tensor in self.model.state_dict().items()}
        return {name: tensor for name, tensor in state.items() if name in kept} if trained_only else state

    def save(self, folder: Path) -> None:
        save_tensors(optimizer_tensors(self.optimizer), folder / OPTIMIZER)

    def load(self, folder: Path) -> None:
        if (folder / SHARDS).is_dir():
            load_shards(self.model, self.optimizer, folder)
            return
        path = folder / OPTIMIZER
        if not path.is_file():
            raise CheckpointError(
                str(folder), "was saved by another strategy", hint="go on with the `sharding` it began with"
            )
        set_optimizer_tensors(self.optimizer, load_file(path), str(path))
