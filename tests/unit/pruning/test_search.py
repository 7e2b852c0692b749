"""The search for masks: what it learns from, and what it leaves alone."""

from __future__ import annotations

import math

import pytest
import torch

from lmray.errors import DivergenceError
from lmray.pruning.gates import Gates
from lmray.pruning.masks import Budget, remaining
from lmray.pruning.search import Search, SearchArgs, stages_to
from lmray.pruning.structure import KINDS, structure_of
from tests.unit.pruning.test_gates import IDS, adapted


def made(**changes):
    model = adapted("llama")
    gates = Gates(model, structure_of(model, block=4))
    budget = Budget(gates.structure.sizes, 0.5, "padded")
    settings = {"steps": 40, "alpha": 5.0, "learning_rate": 0.02, "noisy": True, "proximal": 100.0, "stages": 1}
    search = Search(budget, SearchArgs(**{**settings, "seed": 0, **changes}), lambda tensor: tensor)
    return model, gates, search


def slopes_of(model):
    def measure(leaves):
        model.eval()
        loss = model(IDS, labels=IDS).loss
        return float(loss.detach()), list(torch.autograd.grad(loss, leaves))

    return measure


def test_a_search_step_moves_the_generator_and_no_weight():
    model, gates, search = made()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    first = {name: tensor.clone() for name, tensor in search.generator.state_dict().items()}
    decision = search.decide(1, gates, slopes_of(model))
    assert decision.masks is not None and decision.metrics["prune.search_loss"] > 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    moved = [name for name, tensor in search.generator.state_dict().items() if not torch.equal(tensor, first[name])]
    assert moved and "embeddings_LE" not in moved


def test_a_step_of_the_weights_leaves_the_generator_alone():
    model, gates, search = made()
    gates.masks = search.decide(1, gates, slopes_of(model)).masks
    search.optimizer.zero_grad(set_to_none=True)
    model.train()
    model(IDS, labels=IDS).loss.backward()
    assert any(parameter.grad is not None for parameter in model.parameters())
    assert all(parameter.grad is None for parameter in search.generator.parameters())


def test_the_gradient_of_the_loss_says_what_is_kept():
    """Of two halves of the MLP, one costs loss when it is there and one when it is not."""
    _, gates, search = made(alpha=0.0, noisy=False)
    half = gates.structure.sizes.units("channels") // 2

    def measure(leaves):
        groups, channels = leaves
        loss = channels[:, :half].sum() - channels[:, half:].sum() + 0 * groups.sum()
        return float(loss.detach()), list(torch.autograd.grad(loss, leaves))

    for step in range(1, 41):
        scores = search.decide(step, gates, measure).scores["channels"]
    assert scores[:, :half].max() < scores[:, half:].min()


@pytest.mark.parametrize("noisy", [True, False])
def test_the_budget_is_approached_and_the_last_word_is_without_noise(noisy):
    model, gates, search = made(noisy=noisy, alpha=20.0)
    shares = []
    for step in range(1, 41):
        decision = search.decide(step, gates, slopes_of(model))
        if decision.masks is None:
            break
        shares.append(float(remaining(decision.masks, gates.structure.sizes)))
    assert abs(shares[-1] - 0.5) < 0.15 < shares[0] - 0.5
    final = [search.decide(41, gates, slopes_of(model)) for _ in range(2)]
    assert final[0].masks is None
    assert all(torch.equal(final[0].scores[kind], final[1].scores[kind]) for kind in KINDS)
    assert float(remaining(search.budget.cut(final[0].scores), gates.structure.sizes)) <= 0.5


def test_it_ends_early_once_the_budget_was_met_for_a_while():
    model, gates, search = made()
    search.met = 3
    assert search.decide(5, gates, slopes_of(model)).masks is not None, "a tenth of 40 steps are four"
    search.met = 4
    assert search.decide(6, gates, slopes_of(model)).masks is None


def test_what_is_alike_in_all_layers_in_the_end_is_alike_before():
    model, gates, search = made()
    search.budget = Budget(gates.structure.sizes, 0.5, "uniform")
    for step in range(1, 4):
        masks = search.decide(step, gates, slopes_of(model)).masks
        assert all(len(set(masks[kind].sum(1).tolist())) == 1 for kind in KINDS)


def test_its_state_is_all_it_needs():
    model, gates, search = made()
    for step in range(1, 4):
        search.decide(step, gates, slopes_of(model))
    _, _, other = made()
    other.load({name: tensor.clone() for name, tensor in search.state().items()})
    for step in range(4, 7):
        one, two = (each.decide(step, gates, slopes_of(model)) for each in (search, other))
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


def test_whether_the_budget_is_met_is_what_rank_0_says():
    model, gates, search = made()
    search.agree = lambda tensor: torch.zeros(2) if tensor.shape == (2,) else tensor
    assert search.decide(1, gates, slopes_of(model)).metrics["prune.budget_loss"] == 0.0
    assert search.met == 1
