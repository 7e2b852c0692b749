"""The pruning-decision generator."""

from __future__ import annotations

import torch

from lmray.pruning.generator import Generator, decide, harden
from lmray.pruning.masks import budget_loss, remaining
from lmray.pruning.structure import Sizes

SIZES = Sizes(layers=4, hidden=32, groups=2, heads_per_group=2, head_dim=8, channels=64, block=1)


def test_at_first_nearly_everything_is_kept():
    hard = harden(decide(Generator(SIZES, seed=0)(), torch.Generator().manual_seed(0)))
    assert float(remaining(hard, SIZES).detach()) > 0.9


def test_equal_seeds_give_equal_scores_and_noise_is_a_function_of_its_seed():
    one, two = Generator(SIZES, seed=3), Generator(SIZES, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(one().values(), two().values(), strict=True))
    scores = one()
    drawn = [decide(scores, torch.Generator().manual_seed(seed))["channels"] for seed in (5, 5, 6)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_without_noise_the_sign_of_the_score_decides():
    scores = {"groups": torch.tensor([[-0.1, 0.1]]), "channels": torch.tensor([[2.0, -2.0]])}
    hard = harden(decide(scores, None))
    assert hard["groups"].tolist() == [[0.0, 1.0]] and hard["channels"].tolist() == [[1.0, 0.0]]


def test_hard_decisions_have_the_gradient_of_soft_ones():
    scores = {kind: torch.zeros(1, 3, requires_grad=True) for kind in ("groups", "channels")}
    soft = decide(scores, torch.Generator().manual_seed(1))
    (grad_hard,) = torch.autograd.grad(harden(soft)["groups"].sum(), scores["groups"], retain_graph=True)
    (grad_soft,) = torch.autograd.grad(soft["groups"].sum(), scores["groups"])
    assert torch.equal(grad_hard, grad_soft) and (grad_soft > 0).all()


def test_the_budget_alone_is_reached_by_gradient():
    generator = Generator(SIZES, seed=0)
    optimizer = torch.optim.AdamW(generator.parameters(), lr=3e-3)
    for step in range(150):
        loss = 5 * budget_loss(harden(decide(generator(), torch.Generator().manual_seed(step))), SIZES, 0.5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    found = float(remaining(harden(decide(generator(), torch.Generator().manual_seed(10**6))), SIZES).detach())
    assert abs(found - 0.5) < 0.1
