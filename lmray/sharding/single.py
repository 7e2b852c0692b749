"""One worker holds the whole model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from lmray.errors import CapacityError
from lmray.sharding.base import Placed, Sharding


class Single(Sharding):
    """The whole model on one worker."""

    def resolve(self, *, workers: int) -> tuple[Sharding, str]:
        if workers != 1:
            raise CapacityError(
                "sharding", f"`single` runs on one worker, the job asks for {workers}", allowed="resources.workers: 1"
            )
        return self, "one worker"

    def place(
        self, model: torch.nn.Module, make_optimizer: Callable[[torch.nn.Module], torch.optim.Optimizer], device: str
    ) -> Placed:
        model.to(device)
        return _Placed(model, make_optimizer(model))


@dataclass
class _Placed:
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer

    def all_sum(self, value: float) -> float:
        return value

    def clip_grad_norm(self, max_norm: float) -> float:
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        return float(torch.nn.utils.clip_grad_norm_(trained, max_norm))
