"""The pruning-decision generator."""

from __future__ import annotations

import pytest
import torch

from lmray.pruning.generator import Generator, draw, harden, soften
from lmray.pruning.structure import KINDS, Sizes

SIZES = Sizes(layers=4, hidden=32, groups=2, heads_per_group=2, head_dim=8, channels=64, block=1)


def decide(scores, noise):
    return soften(draw(scores, noise))


def test_noise_removes_as_often_as_it_adds():
    level = {kind: torch.zeros(200, 500) for kind in KINDS}
    hard = harden(decide(level, torch.Generator().manual_seed(0)))
    assert float(hard["channels"].mean()) == pytest.approx(0.5, abs=0.01)


def test_it_says_what_it_is_told_to_and_learns_from_there():
    generator = Generator(SIZES, seed=0)
    wanted = {kind: torch.randn(SIZES.layers, SIZES.units(kind)) for kind in KINDS}
    generator.say(wanted)
    said = generator()
    for kind in KINDS:
        torch.testing.assert_close(said[kind], wanted[kind], rtol=1e-4, atol=1e-5)
    said["channels"].sum().backward()
    steepest = {name: float(one.grad.abs().max()) for name, one in generator.named_parameters() if one.grad is not None}
    assert steepest["heads.channels"] > 1
    assert max(slope for name, slope in steepest.items() if "encoder" in name) > 0.01, "more than rounding"


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
