"""One worker holds the whole model."""

from __future__ import annotations

import torch

from lmray.errors import CapacityError
from lmray.sharding._whole import WholePlaced
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
