"""The search for masks: what it learns from, and what it leaves alone."""

from __future__ import annotations

import dataclasses
import math
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lmray.errors import DivergenceError
from lmray.pruning.depth import block_influence
from lmray.pruning.gates import Gates
from lmray.pruning.importance.wanda_sp import adding_inputs, no_inputs, scores_of, wanda_sp
from lmray.pruning.masks import Budget, remaining
from lmray.pruning.search import Search, SearchArgs, levels_of, stages_to, standardised
from lmray.pruning.structure import KINDS, Sizes, structure_of
from tests.unit.pruning.test_gates import IDS, adapted

ALONE: Any = SimpleNamespace(of_first=lambda tensor: tensor, sum_tensor=lambda tensor: tensor)


ARGS = SearchArgs(steps=40, learning_rate=0.02, noisy=True, proximal=100.0, stages=1, seed=0)


def made(*, shape="padded", layers=None, share=0.5, **changes):
    model = adapted("llama")
    gates = Gates(model, structure_of(model, block=4))
    gates.real_BT = torch.ones_like(IDS, dtype=torch.bool)
    budget = Budget(gates.structure.sizes, share, shape, layers=layers)
    settings = {"steps": 40, "learning_rate": 0.02, "noisy": True, "proximal": 100.0, "stages": 1}
    search = Search(budget, SearchArgs(**{**settings, "seed": 0, **changes}), ALONE)
    return model, gates, search


def slopes_of(model):
    def measure(leaves):
        model.eval()
        loss = model(IDS, labels=IDS).loss
        return float(loss.detach()), list(torch.autograd.grad(loss, leaves))

    return measure


def weighed(search, gates, model):
    for step in range(1, search.weighing + 1):
        search.decide(step, gates, slopes_of(model))
    assert search.weighing == 4, "a tenth of 40 steps"


def test_a_search_step_moves_the_generator_and_no_weight():
    model, gates, search = made()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    weighed(search, gates, model)
    first = {name: tensor.clone() for name, tensor in search.generator.state_dict().items()}
    decision = search.decide(5, gates, slopes_of(model))
    assert decision.masks is not None and decision.metrics["prune.search_loss"] > 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    moved = [name for name, tensor in search.generator.state_dict().items() if not torch.equal(tensor, first[name])]
    assert moved and "embeddings_LE" not in moved


def test_units_are_weighed_first_and_the_generator_starts_from_what_they_weigh():
    model, gates, search = made(learning_rate=1e-9)
    first = {name: tensor.clone() for name, tensor in search.generator.state_dict().items()}
    for step in range(1, 5):
        decision = search.decide(step, gates, slopes_of(model))
        assert all(bool(decision.masks[kind].all()) for kind in KINDS), "nothing is removed yet"
    assert all(torch.equal(tensor, first[name]) for name, tensor in search.generator.state_dict().items())
    found = scores_of(model, gates.structure, search.inputs)
    wanted = wanda_sp(model, gates.structure, [(IDS, IDS)] * 4)
    for kind in KINDS:
        torch.testing.assert_close(found[kind], wanted[kind])
    search.decide(5, gates, slopes_of(model))
    assert not search.inputs
    for kind, scores in search.generator().items():
        torch.testing.assert_close(scores, standardised(wanted)[kind], rtol=0, atol=1e-3)


def test_padding_and_what_runs_again_weigh_nothing():
    model, gates, _ = made()
    gates.real_BT = None
    real = torch.ones_like(IDS, dtype=torch.bool)
    real[:, -2:] = False
    inputs = no_inputs(gates.structure)
    with adding_inputs(model, gates.structure, inputs, lambda: gates.real_BT):
        with gates.reading(real):
            model(IDS)
        model(IDS)
    short = no_inputs(gates.structure)
    with adding_inputs(model, gates.structure, short):
        model(IDS[:, :-2])
    for kind in KINDS:
        torch.testing.assert_close(inputs[kind], short[kind], rtol=1e-5, atol=1e-5)


def test_standardised_scores_keep_their_order_over_all_units():
    scores = {"groups": torch.tensor([[9.0, 1.0]]), "channels": torch.tensor([[3.0, 2.0, 8.0]])}
    found = standardised(scores)
    flat = torch.cat([found[kind].flatten() for kind in KINDS])
    assert flat.argsort().tolist() == [1, 3, 2, 4, 0]
    assert abs(float(flat.mean())) < 1e-6 and found["channels"][0, 0] == 0


def test_a_step_of_the_weights_leaves_the_generator_alone():
    model, gates, search = made()
    weighed(search, gates, model)
    gates.masks = search.decide(5, gates, slopes_of(model)).masks
    search.optimizer.zero_grad(set_to_none=True)
    model.train()
    model(IDS, labels=IDS).loss.backward()
    assert any(parameter.grad is not None for parameter in model.parameters())
    assert all(parameter.grad is None for parameter in search.generator.parameters())


def test_the_gradient_of_the_loss_says_what_is_kept():
    """Of two halves of the MLP, one costs loss when it is there and one when it is not."""
    model, gates, search = made(noisy=False)
    weighed(search, gates, model)
    half = gates.structure.sizes.units("channels") // 2

    def measure(leaves):
        groups, channels = leaves
        loss = channels[:, :half].sum() - channels[:, half:].sum() + 0 * groups.sum()
        return float(loss.detach()), list(torch.autograd.grad(loss, leaves))

    for step in range(5, 41):
        scores = search.decide(step, gates, measure).scores["channels"]
    assert scores[:, :half].max() < scores[:, half:].min()


@pytest.mark.parametrize("noisy", [True, False])
@pytest.mark.parametrize("shape", ["padded", "uniform"])
def test_the_budget_falls_to_what_is_asked_and_the_last_word_is_without_noise(noisy, shape):
    model, gates, search = made(noisy=noisy)
    search.budget, sizes = Budget(gates.structure.sizes, 0.5, shape), gates.structure.sizes
    shares = []
    for step in range(1, 41):
        decision = search.decide(step, gates, slopes_of(model))
        assert decision.masks is not None
        shares.append(float(remaining(decision.masks, sizes)))
    assert shares[:4] == [1.0] * 4 and shares[-20:] == pytest.approx([0.5] * 20, abs=0.05)
    assert shares == pytest.approx(sorted(shares, reverse=True), abs=0.045), "never back"
    assert 0.55 < shares[10] < 0.95, "and not at once"
    final = [search.decide(41, gates, slopes_of(model)) for _ in range(2)]
    last = {kind: decision.masks[kind].sum(1).tolist() for kind in KINDS}
    if shape == "uniform":
        assert {kind: one.sum(1).tolist() for kind, one in search.budget.cut(final[0].scores).items()} == last
    assert final[0].masks is None
    assert all(torch.equal(final[0].scores[kind], final[1].scores[kind]) for kind in KINDS)
    assert float(remaining(search.budget.cut(final[0].scores), sizes)) <= 0.5


def test_stages_are_tightened_one_after_the_other():
    model, gates, search = made(stages=2)
    shares = []
    for step in range(1, 41):
        shares.append(float(remaining(search.decide(step, gates, slopes_of(model)).masks, gates.structure.sizes)))
    assert shares[4:22] == pytest.approx([0.5**0.5] * 18, abs=0.045)
    assert shares[22:] == pytest.approx([0.5] * 18, abs=0.045)


@pytest.mark.parametrize("shape", ["padded", "uniform"])
@pytest.mark.parametrize("target", [1.0, 0.8, 0.5])
def test_levels_keep_what_the_budget_keeps(shape, target):
    sizes = structure_of(adapted("llama"), block=1).sizes
    scores = {kind: torch.randn(sizes.layers, sizes.units(kind), generator=torch.manual_seed(0)) for kind in KINDS}
    budget = Budget(sizes, 0.5, shape, multiple_of=8)
    levels = levels_of(scores, budget, target)
    masks = {kind: (scores[kind] >= levels[kind]).float() for kind in KINDS}
    share = float(remaining(masks, sizes))
    assert target - 0.1 < share <= target + 1e-6
    if shape == "uniform":
        assert all(len(set(masks[kind].sum(1).tolist())) == 1 for kind in KINDS)
        assert int(masks["channels"][0].sum()) % 8 == 0
    else:
        assert len(set(masks["channels"].sum(1).tolist())) > 1 or target == 1.0


def test_the_last_word_cuts_as_the_levels_do():
    """Above a level of each layer and kind, scores of groups and channels cannot be compared any more."""
    sizes = Sizes(layers=6, hidden=64, groups=3, heads_per_group=3, head_dim=64, channels=256, block=1)
    for seed in range(40):
        draw = torch.manual_seed(seed)
        scores = {kind: torch.randn(sizes.layers, sizes.units(kind), generator=draw) for kind in KINDS}
        scores["groups"] += seed % 5 - 2
        search = Search(Budget(sizes, 0.6, "uniform", multiple_of=16), ARGS, ALONE)
        search.generator.say(scores)
        with torch.no_grad():
            above = {kind: (one > 0).sum(1).tolist() for kind, one in search._above(0.6).items()}
        found = search.budget.cut(search._final())
        assert {kind: one.sum(1).int().tolist() for kind, one in found.items()} == above


def test_of_a_search_of_one_step_masks_are_what_units_weigh():
    model, gates, search = made(steps=1)
    assert search.decide(1, gates, slopes_of(model)).masks is not None
    decision = search.decide(2, gates, slopes_of(model))
    wanted = standardised(wanda_sp(model, gates.structure, [(IDS, IDS)]))
    assert decision.masks is None
    for kind in KINDS:
        assert torch.equal(decision.scores[kind].argsort(), wanted[kind].argsort())


def test_what_is_alike_in_all_layers_in_the_end_is_alike_before():
    model, gates, search = made()
    search.budget = Budget(gates.structure.sizes, 0.5, "uniform")
    for step in range(1, 8):
        masks = search.decide(step, gates, slopes_of(model)).masks
        assert all(len(set(masks[kind].sum(1).tolist())) == 1 for kind in KINDS)


@pytest.mark.parametrize("stop", [3, 5, 8])
def test_its_state_is_all_it_needs(stop):
    model, gates, search = made()

    def decided(search, step):
        gates.real_BT = torch.ones_like(IDS, dtype=torch.bool)
        gates.real_BT[:, step:] = False  # no two steps read alike
        return search.decide(step, gates, slopes_of(model))

    for step in range(1, stop):
        decided(search, step)
    _, _, other = made()
    other.load({name: tensor.clone() for name, tensor in search.state().items()})
    for step in range(stop, stop + 4):
        one, two = (decided(each, step) for each in (search, other))
        assert all(torch.equal(one.scores[kind], two.scores[kind]) for kind in KINDS)


def test_the_proximal_step_grows_to_its_strength():
    _, _, search = made()
    strengths = [search.proximal(step) for step in (1, 20, 40)]
    assert strengths == pytest.approx([100 * math.expm1(step / 40) / math.expm1(1) for step in (1, 20, 40)])
    assert strengths[-1] == 100


@pytest.mark.parametrize(("share", "stages"), [(1.0, 1), (0.7, 1), (2 / 3, 1), (0.6, 2), (0.4, 3), (0.2, 4)])
def test_no_stage_removes_more_than_a_third(share, stages):
    assert stages_to(share) == stages


@pytest.mark.parametrize(
    ("loss", "slope", "found"), [(math.nan, 0.0, "loss is nan"), (1.0, math.inf, "gradient is not")]
)
def test_numbers_that_are_not_finite_end_the_search_and_move_nothing(loss, slope, found):
    _, gates, search = made()
    before = {name: tensor.clone() for name, tensor in search.generator.state_dict().items()}
    with pytest.raises(DivergenceError, match=f"search step 3: the search {found}"):
        search.decide(3, gates, lambda leaves: (loss, [torch.full_like(leaf, slope) for leaf in leaves]))
    assert all(torch.equal(tensor, before[name]) for name, tensor in search.generator.state_dict().items())


@pytest.mark.parametrize("shape", ["uniform", "padded"])
@pytest.mark.parametrize("share", [0.3, 0.5])
def test_whole_layers_go_first_those_of_least_influence(shape, share):
    model, gates, search = made(shape=shape, layers=1, share=share)
    weighed(search, gates, model)
    influence = block_influence(model, [(IDS, IDS)] * 4)
    stays = influence.index(max(influence))
    assert search.influence.tolist() == pytest.approx([one * 4 * IDS.numel() for one in influence], rel=1e-4)
    for step in range(5, 42):
        decision = search.decide(step, gates, slopes_of(model))
        masks = search.budget.cut(decision.scores) if decision.masks is None else decision.masks
        assert not any(bool(masks[kind][1 - stays].any()) for kind in KINDS)
        assert all(bool(masks[kind][stays].any()) for kind in KINDS)
    assert decision.masks is None and float(remaining(masks, gates.structure.sizes)) <= share + 1e-6
    if share == 0.5:
        assert all(bool(masks[kind][stays].all()) for kind in KINDS), "one of two layers is the whole budget"


def test_a_search_that_goes_on_knows_the_layers_that_went():
    model, gates, search = made(layers=1)
    weighed(search, gates, model)
    middle = {name: tensor.clone() for name, tensor in search.state().items()}
    _, _, again = made(layers=1)
    again.load(middle)
    assert torch.equal(again.influence, search.influence) and bool(again.influence.any())
    search.decide(5, gates, slopes_of(model))
    again.load(search.state())
    assert torch.equal(again.dropped, search.dropped) and int(again.dropped.sum()) == 1


@pytest.mark.parametrize("stages", [1, 2])
def test_what_falls_is_what_the_layers_have_that_stay(stages):
    """Else everything would be kept of them until the budget is below their share, and nothing searched."""
    _, _, search = made(layers=1, share=0.3, stages=stages)
    targets = [search._target(step) for step in range(5, 41)]
    staying = [search._staying(step) for step in range(5, 42)]
    assert targets == sorted(targets, reverse=True) and targets[-1] == 0.3
    assert targets[0] == pytest.approx(0.5 - 0.2 / 12 if stages == 1 else 0.3**0.5)
    assert staying == ([1] * 37 if stages == 1 else [2] * 18 + [1] * 19)


def test_in_stages_layers_go_little_by_little_and_no_stage_removes_more_than_a_third():
    sizes = Sizes(30, 64, 2, 2, 16, 128, 1)
    stages = stages_to(0.33)
    args = SearchArgs(steps=40, learning_rate=None, noisy=False, proximal=0.0, stages=stages, seed=0)
    search = Search(Budget(sizes, 0.33, "uniform", layers=10), args, ALONE)
    staying = [search._staying(step) for step in range(5, 42)]
    assert sorted(set(staying), reverse=True) == [21, 15, 10] and staying == sorted(staying, reverse=True)
    left = [1.0, *sorted({search._target(step) for step in range(5, 41)}, reverse=True)]
    assert all(after >= before * 2 / 3 - 1e-9 for before, after in pairwise(left)) and left[-1] == 0.33
    search.influence = torch.arange(30, dtype=torch.float64)
    assert search._least_influential(21).nonzero().flatten().tolist() == list(range(9))


def test_the_last_stage_has_the_layers_that_stay_and_every_stage_room_for_what_layers_keep():
    """`remaining` may be a little above the layers' share; and a layer keeps a key-value head and a width at least."""

    def staying(remaining: float, layers: int, multiple_of: int) -> list[int]:
        sizes = Sizes(12, 64, 1, 4, 16, 128, 1)
        args = SearchArgs(steps=40, learning_rate=None, noisy=False, proximal=0.0, stages=stages_to(remaining), seed=0)
        budget = Budget(sizes, remaining, "uniform", multiple_of=multiple_of, layers=layers)
        search = Search(budget, args, ALONE)
        found = [search._staying(step) for step in range(5, 42)]
        for step, count in zip(range(5, 42), found, strict=True):
            share = search._target(step) if step <= 40 else remaining
            assert count == layers or dataclasses.replace(budget, layers=count).least <= share
        return sorted(set(found), reverse=True)

    assert staying(0.334, 4, 8) == [9, 6, 4]
    assert staying(0.5, 6, 128) == [8, 6], "nine would each keep 94 %, and there is no such layer"


def test_the_encoder_moves_slower_than_the_heads():
    """With it the scores of all units of a layer move; Adam's first step is the learning rate long."""
    model, gates, search = made(noisy=False)
    weighed(search, gates, model)
    search.decide(5, gates, slopes_of(model))
    before = {name: one.clone() for name, one in search.generator.named_parameters()}
    search.decide(6, gates, slopes_of(model))
    moved = {name: float((one - before[name]).abs().max()) for name, one in search.generator.named_parameters()}
    heads = max(one for name, one in moved.items() if name.startswith("heads."))
    rest = max(one for name, one in moved.items() if not name.startswith("heads."))
    assert 0 < rest < 0.2 * heads
