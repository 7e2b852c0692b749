"""Masks: costs, budgets, projections. Shapes as in `lmray/pruning/masks.py`."""

from __future__ import annotations

import pytest
import torch

from lmray.errors import ConfigError
from lmray.pruning.masks import Budget, all_kept, budget_loss, least, project, remaining
from lmray.pruning.structure import KINDS, Sizes

SIZES = Sizes(layers=3, hidden=32, groups=4, heads_per_group=2, head_dim=8, channels=96, block=1)


def random_scores(sizes: Sizes, seed: int = 0) -> dict:
    draw = torch.Generator().manual_seed(seed)
    return {kind: torch.randn(sizes.layers, sizes.units(kind), generator=draw) for kind in ("groups", "channels")}


def test_everything_kept_is_all_there_is():
    assert float(remaining(all_kept(SIZES), SIZES)) == 1.0
    assert SIZES.prunable == 3 * (2 * 32 * 32 + 2 * 32 * 64 + 3 * 96 * 32)  # k, v; q, o; gate, up, down


def test_the_budget_loss_is_the_log_of_the_ratio_either_way_and_has_a_gradient():
    masks = {kind: one.requires_grad_() for kind, one in all_kept(SIZES).items()}
    loss = budget_loss(masks, SIZES, 0.5)
    assert float(loss.detach()) == pytest.approx(0.6931, abs=1e-4)
    loss.backward()
    assert (masks["channels"].grad > 0).all() and (masks["groups"].grad > masks["channels"].grad[0, 0]).all()
    half = {kind: one * 0.25 for kind, one in all_kept(SIZES).items()}
    assert float(budget_loss(half, SIZES, 0.5)) == pytest.approx(0.6931, abs=1e-4)


@pytest.mark.parametrize("target", [0.3, 0.6, 0.8, 1.0])
def test_uniform_masks_keep_at_most_the_budget_and_one_step_more_would_be_too_much(target):
    masks = project(random_scores(SIZES), SIZES, target, shape="uniform", multiple_of=8)
    found = float(remaining(masks, SIZES))
    groups, channels = ({int(row.sum()) for row in masks[kind]} for kind in ("groups", "channels"))
    assert len(groups) == len(channels) == 1 and channels.pop() % 8 == 0
    step = 8 * 3 * 32 * 3 / SIZES.prunable
    assert found <= target + 1e-6 and (found > target - step or found == pytest.approx(1.0))


@pytest.mark.parametrize("target", [0.25, 0.6, 0.8])
def test_masks_of_any_shape_come_as_near_as_one_channel(target):
    masks = project(random_scores(SIZES), SIZES, target, shape="padded", multiple_of=8)
    found = float(remaining(masks, SIZES))
    assert target - 3 * 32 * 3 / SIZES.prunable < found <= target + 1e-6
    assert all((masks[kind].sum(1) >= 1).all() for kind in masks)


@pytest.mark.parametrize("target", [0.3, 0.6, 0.8])
def test_widths_that_differ_are_multiples_and_come_as_near_as_one(target):
    masks = project(random_scores(SIZES), SIZES, target, shape="hetero", multiple_of=8)
    widths = masks["channels"].sum(1)
    assert (widths % 8 == 0).all() and (widths >= 8).all()
    assert target - 8 * 3 * 32 / SIZES.prunable < float(remaining(masks, SIZES)) <= target + 1e-6


def test_the_highest_scores_are_kept():
    scores = random_scores(SIZES)
    masks = project(scores, SIZES, 0.6, shape="uniform", multiple_of=8)
    for kind, one in masks.items():
        for layer in range(SIZES.layers):
            kept, gone = scores[kind][layer][one[layer] > 0], scores[kind][layer][one[layer] == 0]
            assert len(gone) == 0 or kept.min() >= gone.max()


@pytest.mark.parametrize("shape", ["padded", "hetero"])
def test_layers_that_matter_more_keep_more(shape):
    scores = random_scores(SIZES)
    scores["channels"][1] += 5.0
    masks = project(scores, SIZES, 0.6, shape=shape, multiple_of=8)
    widths = masks["channels"].sum(1).tolist()
    assert widths[1] > widths[0] and widths[1] > widths[2]


@pytest.mark.parametrize("shape", ["uniform", "padded", "hetero"])
def test_a_budget_below_one_group_is_refused_with_the_least(shape):
    with pytest.raises(ConfigError, match=r"method.remaining: 0.05 is less than one") as caught:
        project(random_scores(SIZES), SIZES, 0.05, shape=shape, multiple_of=8)
    assert "to 1" in str(caught.value) and least(SIZES, 8) > 0.05


def test_a_width_that_is_no_multiple_is_kept_where_all_of_it_is():
    sizes = Sizes(layers=2, hidden=32, groups=2, heads_per_group=2, head_dim=8, channels=100, block=1)
    scores = {kind: torch.randn(2, sizes.units(kind), generator=torch.manual_seed(0)) for kind in KINDS}
    cut = [project(scores, sizes, share, shape="uniform", multiple_of=64) for share in (1.0, 0.7)]
    counts = [int(masks["channels"][0].sum()) for masks in cut]
    assert counts == [100, 64]


def test_layers_of_different_widths_need_no_round_one():
    sizes = Sizes(layers=2, hidden=32, groups=2, heads_per_group=2, head_dim=8, channels=96, block=1)
    padded, uniform = (Budget(sizes, 0.5, shape, multiple_of=64) for shape in ("padded", "uniform"))
    assert padded.least < 0.3 < 0.5 < uniform.least
    scores = {kind: torch.randn(2, sizes.units(kind), generator=torch.manual_seed(0)) for kind in KINDS}
    assert float(remaining(padded.cut(scores, 0.3), sizes)) <= 0.3
    assert Budget(sizes, 0.5, "hetero", multiple_of=64).least == uniform.least


@pytest.mark.parametrize("shape", ["uniform", "padded", "hetero"])
def test_a_layer_that_is_gone_leaves_its_share_to_the_others(shape):
    budget = Budget(SIZES, 0.5, shape, multiple_of=8, layers=2)
    scores = random_scores(SIZES)
    for one in scores.values():
        one[0] = -torch.inf
    masks = budget.cut(scores)
    assert not any(bool(masks[kind][0].any()) for kind in KINDS)
    step = 8 * 3 * 32 * 2 / SIZES.prunable
    assert 0.5 - step < float(remaining(masks, SIZES)) <= 0.5 + 1e-6
    assert budget.share_of_layers == pytest.approx(2 / 3)
    assert budget.least == pytest.approx(Budget(SIZES, 0.5, shape, multiple_of=8).least * 2 / 3)


@pytest.mark.parametrize("shape", ["uniform", "padded", "hetero"])
@pytest.mark.parametrize("layers", range(1, 81))
def test_layers_that_are_the_whole_budget_stay_whole(shape, layers):
    """23 / 40 * 40 is less than 23 in floating point."""
    sizes = Sizes(layers=80, hidden=24, groups=2, heads_per_group=1, head_dim=4, channels=8, block=1)
    scores = {kind: torch.zeros(80, sizes.units(kind)) for kind in KINDS}
    for one in scores.values():
        one[layers:] = -torch.inf
    masks = Budget(sizes, layers / 80, shape, multiple_of=4, layers=layers).cut(scores)
    assert all(bool(masks[kind][:layers].all()) and not bool(masks[kind][layers:].any()) for kind in KINDS)
