"""What units are worth: each score against its definition, unit by unit, in float64."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from lmray.pruning.importance.base import relative
from lmray.pruning.importance.magnitude import magnitude
from lmray.pruning.importance.taylor import taylor
from lmray.pruning.importance.wanda_sp import wanda_sp
from lmray.pruning.masks import project, remaining
from lmray.pruning.structure import KINDS, structure_of
from lmray.testing.tiny import tiny_config

SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
CONFIGS = {
    "llama": tiny_config(),
    "qwen2": Qwen2Config(**SHAPE, num_key_value_heads=2, vocab_size=264, pad_token_id=0),
}
SCORES = {"magnitude": magnitude, "wanda_sp": wanda_sp, "taylor": taylor}
BLOCK = 24  # the last unit of 64 channels has 16


@pytest.fixture(params=CONFIGS)
def model(request):
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(CONFIGS[request.param], dtype=torch.float64)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return made.eval()


@pytest.fixture
def rows():
    draw = torch.Generator().manual_seed(0)
    made = []
    for length in (7, 12):
        ids = torch.randint(3, 264, (2, length), generator=draw)
        labels = ids.clone()
        labels[:, : length // 2] = -100
        made.append((ids, labels))
    return made


def units(layer):
    """Of each kind, of each unit: pairs of a linear layer and the index of its weights; columns last."""
    groups, channels = [], []
    for unit in range(2):
        query, key = slice(16 * unit, 16 * unit + 16), slice(8 * unit, 8 * unit + 8)
        at = layer.self_attn
        groups.append([(at.q_proj, query), (at.k_proj, key), (at.v_proj, key), (at.o_proj, (slice(None), query))])
    for unit in range(3):
        span = slice(BLOCK * unit, min(BLOCK * unit + BLOCK, 64))
        mlp = layer.mlp
        channels.append([(mlp.gate_proj, span), (mlp.up_proj, span), (mlp.down_proj, (slice(None), span))])
    return {"groups": groups, "channels": channels}


def expected(model, worth, *, columns_only=False):
    """[L, U] of each kind from `worth(linear) -> [O, I]`: the mean over all weights of a unit."""
    found = {kind: [] for kind in KINDS}
    for layer in model.model.layers:
        for kind, of_kind in units(layer).items():
            found[kind].append(
                [
                    sum(
                        float(worth(linear)[place].detach().sum())
                        for linear, place in (unit[-1:] if columns_only else unit)
                    )
                    / sum(linear.weight[place].numel() for linear, place in unit)
                    for unit in of_kind
                ]
            )
    return {kind: torch.tensor(rows, dtype=torch.float64) for kind, rows in found.items()}


def normalised(scores):
    costs = {"groups": [1.0, 1.0], "channels": [24.0, 24.0, 16.0]}
    found = {}
    for kind, rows in scores.items():
        cost = torch.tensor(costs[kind], dtype=torch.float64)
        found[kind] = torch.stack([row * cost.sum() / (row * cost).sum() for row in rows])
    return found


def assert_equal(found, wanted):
    for kind in KINDS:
        assert found[kind].shape == wanted[kind].shape
        assert torch.allclose(found[kind], wanted[kind], rtol=1e-9, atol=0), kind


def test_magnitude_is_the_squared_norm_of_all_weights_of_a_unit(model):
    found = magnitude(model, structure_of(model, block=BLOCK))
    assert_equal(found, normalised(expected(model, lambda linear: linear.weight.detach() ** 2)))


def test_wanda_weighs_columns_by_what_comes_in_over_all_rows(model, rows):
    taken = {}
    for layer in model.model.layers:
        for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
            taken[linear] = []
            linear.register_forward_hook(lambda module, inputs, output: taken[module].append(inputs[0]))
    with torch.no_grad():
        for ids, _ in rows:
            for row in ids:
                model(row[None])
    norms = {
        linear: torch.cat([one.reshape(-1, linear.in_features) for one in given]).norm(dim=0)
        for linear, given in taken.items()
    }

    def worth(linear):
        return torch.stack([abs(column) * norm for column, norm in zip(linear.weight.T, norms[linear], strict=True)]).T

    found = wanda_sp(model, structure_of(model, block=BLOCK), rows)
    assert_equal(found, normalised(expected(model, worth, columns_only=True)))


def test_taylor_is_the_first_order_change_of_the_mean_loss(model, rows):
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    found = taylor(model, structure_of(model, block=BLOCK), rows)
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before
    assert all(parameter.grad is None for parameter in model.parameters())

    losses, count = [], 0
    for ids, labels in rows:
        for row, wanted in zip(ids, labels, strict=True):
            chances = model(row[None]).logits[0].log_softmax(-1)
            for place in range(1, len(row)):
                if wanted[place] != -100:
                    losses.append(-chances[place - 1, wanted[place]])
                    count += 1
    (sum(losses) / count).backward()
    assert_equal(found, expected(model, lambda linear: (linear.weight * linear.weight.grad).detach().abs()))


def test_relative_scores_say_nothing_of_one_layer_beside_another(model):
    structure = structure_of(model, block=BLOCK)
    before = magnitude(model, structure)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(10)
        model.model.layers[1].mlp.gate_proj.weight.mul_(10)
        model.model.layers[1].mlp.up_proj.weight.mul_(10)
    assert_equal(magnitude(model, structure), before)
    assert torch.allclose(relative(before, structure)["groups"], before["groups"])


@pytest.mark.parametrize("name", SCORES)
def test_scores_are_projected_as_they_are(name, model, rows):
    structure = structure_of(model, block=1)
    scores = SCORES[name](model, structure, rows)
    masks = project(scores, structure.sizes, 0.6, shape="uniform", multiple_of=8, worth=lambda score: score)
    assert 0.5 < float(remaining(masks, structure.sizes)) <= 0.6
    for kind in KINDS:
        for layer in range(2):
            kept, gone = (scores[kind][layer][masks[kind][layer] == one] for one in (1, 0))
            assert len(gone) == 0 or kept.min() >= gone.max()


def test_what_a_score_is_worth_decides_between_kinds(model):
    """Groups worth nothing leave the budget to the MLP; groups worth more than it have it all."""
    structure = structure_of(model, block=1)
    sizes = structure.sizes
    scores = {"groups": torch.full((2, 2), 1e-6), "channels": torch.full((2, 64), 1.0)}
    masks = project(scores, sizes, 0.85, shape="uniform", multiple_of=8, worth=lambda score: score)
    assert masks["groups"].sum(1).tolist() == [1.0, 1.0] and masks["channels"].sum(1).tolist() == [64.0, 64.0]
    scores["groups"] *= 2e6
    masks = project(scores, sizes, 0.85, shape="uniform", multiple_of=8, worth=lambda score: score)
    assert masks["groups"].sum(1).tolist() == [2.0, 2.0]
