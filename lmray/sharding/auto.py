"""The strategy that fits the workers asked for."""

from __future__ import annotations

import torch

from lmray.sharding.base import MakeOptimizer, Placed, Sharding
from lmray.sharding.single import Single


class Auto(Sharding):
    """Chosen when the job is planned; the plan says which, and why."""

    def resolve(self, *, workers: int) -> tuple[Sharding, str]:
        return Single().resolve(workers=workers)

    def place(
        self, model: torch.nn.Module, make_optimizer: MakeOptimizer, device: str, *, dtype: str = "float32"
    ) -> Placed:
        raise AssertionError("`auto` is resolved in the plan before a model is placed")
