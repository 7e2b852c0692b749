"""Gradients under `ddp` are the sums over the ranks. Curves do not tell: Adam's step is the same for their mean."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from lmray.sharding.base import Sharding
from lmray.sharding.ddp import Ddp
from lmray.sharding.fsdp2 import Fsdp2
from lmray.testing.ranks import run_ranks


class Branches(torch.nn.Module):
    """Every rank uses `shared`, rank 1 alone `sometimes`, none `never`."""

    def __init__(self):
        super().__init__()
        self.shared, self.sometimes, self.never = (torch.nn.Parameter(torch.ones(2)) for _ in range(3))

    def forward(self, rank: int) -> torch.Tensor:
        loss = (rank + 1.0) * self.shared.sum()
        return loss + 5.0 * self.sometimes.sum() if rank == 1 else loss


def _gradients(rank: int) -> tuple[list[list[float] | None], float]:
    dist.init_process_group("gloo")
    placed = Ddp().place(Branches(), lambda model: torch.optim.SGD(model.parameters(), lr=1.0), "cpu")
    for number in (1, 2):  # two micro-batches, exchanged once
        placed.backward(placed.model(rank), last=number == 2)
    found = [None if one.grad is None else one.grad.tolist() for one in placed.model.parameters()]
    norm = placed.clip_grad_norm(1e9)
    dist.destroy_process_group()
    return found, norm


def test_gradients_are_summed_over_ranks_and_micro_batches():
    for found, norm in run_ranks(2, _gradients):
        assert found == [[6.0, 6.0], [10.0, 10.0], None]
        assert norm == pytest.approx((2 * 36 + 2 * 100) ** 0.5)


def _started(rank: int, sharding: Sharding) -> list[list[float]]:
    dist.init_process_group("gloo")
    model: Any = torch.nn.Sequential(layer := torch.nn.Linear(2, 2))
    model._no_split_modules = ["Linear"]
    layer.bias.requires_grad_(False)
    for parameter in layer.parameters():
        torch.nn.init.constant_(parameter, rank + 1.0)
    placed = sharding.place(model, lambda one: torch.optim.SGD([layer.weight], lr=1.0), "cpu")
    state = placed.gathered_state(trained_only=False) if isinstance(sharding, Fsdp2) else layer.state_dict()
    dist.destroy_process_group()
    return [tensor.flatten().tolist() for tensor in (state or {}).values()]


@pytest.mark.parametrize("sharding", [Ddp(), Fsdp2()], ids=["ddp", "fsdp2"])
def test_weights_start_as_rank_0_has_them(sharding):
    """Decomposed on another machine, a weight gives other factors, and leaves another rest."""
    first, other = run_ranks(2, _started, sharding)
    assert first == [[1.0] * 4, [1.0] * 2] and other in (first, [])
