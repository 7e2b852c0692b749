"""What every sharding strategy keeps to, on one worker."""

from __future__ import annotations

import pytest
import torch

from lmray.models.load import load_model
from lmray.optim.adamw_torch import AdamwTorch
from lmray.optim.base import parameter_groups
from lmray.registry import SHARDINGS


@pytest.fixture(params=SHARDINGS.names())
def strategy(request):
    chosen, reason = SHARDINGS.load(request.param)().resolve(workers=1)
    assert reason
    return chosen


def test_what_is_placed_can_be_trained(strategy, tiny_model):
    placed = strategy.place(
        load_model(tiny_model, "float32"),
        lambda model: AdamwTorch().make_optimizer(parameter_groups(model), learning_rate=0.1, weight_decay=0.0),
        "cpu",
    )
    before = [parameter.clone() for parameter in placed.model.parameters()]
    placed.model(torch.tensor([[5, 6, 7]])).logits.square().sum().backward()
    norm = placed.clip_grad_norm(1e-3)
    clipped = torch.stack([p.grad.norm() for p in placed.model.parameters() if p.grad is not None]).norm()
    assert norm > 1e-3 and clipped.item() == pytest.approx(1e-3, rel=1e-2)
    placed.optimizer.step()
    assert any(not torch.equal(old, new) for old, new in zip(before, placed.model.parameters(), strict=True))
    assert placed.all_sum(2.5) == 2.5
