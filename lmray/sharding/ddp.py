"""Every worker holds the whole model and computes its share of the rows; gradients are summed over the workers.

Li et al., "PyTorch Distributed: Experiences on Accelerating Data Parallel Training", arXiv 2006.15704.
Differs from the paper in: gradients are summed, not averaged, for the learner divides by the tokens of all workers; one
exchange after the last micro-batch, not beside the backward pass, so that parameters without a gradient may differ
between the ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from lmray.sharding._ranks import agree, have_group, of_first, sum_over_ranks, sum_tensor
from lmray.sharding._whole import WholePlaced
from lmray.sharding.base import MakeOptimizer, Need, Placed, Sharding

BUCKET_BYTES = 64 * 2**20
"""Gradients are exchanged in pieces of about this size: fewer pieces wait less, and each is copied once more."""


class Ddp(Sharding):
    """The whole model on every worker."""

    def resolve(self, *, workers: int, need: Need | None = None) -> tuple[Sharding, str]:
        return self, "as the job says"

    def place(
        self, model: torch.nn.Module, make_optimizer: MakeOptimizer, device: str, *, dtype: str = "float32"
    ) -> Placed:
        have_group()
        model.to(device)
        agree(model)
        return _DdpPlaced(model, make_optimizer(model), torch.device(device))


@dataclass
class _DdpPlaced(WholePlaced):
    device: torch.device

    def all_sum(self, value: float) -> float:
        return sum_over_ranks(value, self.device)

    def sum_tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        return sum_tensor(tensor, self.device)

    def of_first(self, tensor: torch.Tensor) -> torch.Tensor:
        return of_first(tensor, self.device)

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        loss.backward()
        if last and dist.get_world_size() > 1:
            self._sum_gradients()

    def gathered_state(self, *, trained_only: bool = True) -> dict[str, torch.Tensor] | None:
        return super().gathered_state(trained_only=trained_only) if dist.get_rank() == 0 else None

    def save(self, folder: Path) -> None:
        if dist.get_rank() == 0:
            super().save(folder)

    def _sum_gradients(self) -> None:
        """Of every parameter that has a gradient on any rank: one that none has is left alone by the optimizer."""
        trained = self.trained
        has = torch.tensor([parameter.grad is not None for parameter in trained], dtype=torch.int32, device=self.device)
        dist.all_reduce(has, dist.ReduceOp.MAX)
        learning = [parameter for parameter, any_has in zip(trained, has.tolist(), strict=True) if any_has]
        for parameter in learning:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        for bucket in _buckets([parameter.grad for parameter in learning if parameter.grad is not None]):
            flat = torch.cat([gradient.flatten() for gradient in bucket])
            dist.all_reduce(flat)
            for gradient, summed in zip(bucket, flat.split([one.numel() for one in bucket]), strict=True):
                gradient.copy_(summed.view_as(gradient))


def _buckets(gradients: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """`gradients` in their order, cut where the type changes or a bucket is full."""
    bucket: list[torch.Tensor] = []
    size = 0
    for gradient in gradients:
        if bucket and (bucket[0].dtype != gradient.dtype or size + gradient.nbytes > BUCKET_BYTES):
            yield bucket
            bucket, size = [], 0
        bucket.append(gradient)
        size += gradient.nbytes
    if bucket:
        yield bucket
