"""Gradients under `ddp` are the sums over the ranks. Curves do not tell: Adam's step is the same for their mean."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from lmray.sharding.ddp import Ddp
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


def _started(rank: int) -> list[float]:
    dist.init_process_group("gloo")
    model = torch.nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    torch.nn.init.constant_(model.weight, rank + 1.0)
    torch.nn.init.constant_(model.bias, rank + 1.0)
    Ddp().place(model, lambda one: torch.optim.SGD([one.weight], lr=1.0), "cpu")
    dist.destroy_process_group()
    return [*model.weight.flatten().tolist(), *model.bias.tolist()]


def test_trained_weights_start_as_rank_0_has_them():
    """Decomposed on another machine, a weight gives other factors."""
    assert run_ranks(2, _started) == [[1.0] * 6, [1.0] * 4 + [2.0] * 2]
