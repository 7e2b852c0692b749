"""The strategy that fits the workers asked for."""

from __future__ import annotations

import torch

from lmray.sharding.base import MakeOptimizer, Need, Placed, Sharding
from lmray.sharding.ddp import Ddp
from lmray.sharding.fsdp2 import Fsdp2
from lmray.sharding.single import Single


class Auto(Sharding):
    """Chosen when the job is planned; the plan says which, and why."""

    def resolve(self, *, workers: int, need: Need | None = None) -> tuple[Sharding, str]:
        if workers == 1:
            return Single(), "one worker"
        if need is None or not need.adapter_only:
            return Fsdp2(), f"the trained weights and their optimizer state are shared among {workers} workers"
        if not need.fits:
            return Fsdp2(), "the model does not fit one worker"
        return Ddp(), "only an adapter is trained, and the model fits each worker"

    def place(
        self, model: torch.nn.Module, make_optimizer: MakeOptimizer, device: str, *, dtype: str = "float32"
    ) -> Placed:
        raise AssertionError("`auto` is resolved in the plan before a model is placed")
