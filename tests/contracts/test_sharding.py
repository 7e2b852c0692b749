"""What every sharding strategy keeps to, on one worker."""

from __future__ import annotations

import pytest
import torch

from lmray.errors import CheckpointError
from lmray.models.load import load_model
from lmray.optim.adamw import make_adamw
from lmray.registry import SHARDINGS
from lmray.sharding._optimizer_state import optimizer_tensors, set_optimizer_tensors


@pytest.fixture(params=SHARDINGS.names())
def strategy(request):
    chosen, reason = SHARDINGS.load(request.param)().resolve(workers=1)
    assert reason
    return chosen


def place(strategy, folder):
    return strategy.place(load_model(folder, "float32"), optimizer, "cpu")


def optimizer(model):
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return make_adamw([{"params": trained}], learning_rate=0.1, weight_decay=0.0)


def values(placed) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in placed.gathered_state().items()}


def step(placed) -> float:
    """Two micro-batches, then the optimizer; returns the gradient's norm."""
    for number, ids in enumerate(([5, 6, 7], [8, 9]), 1):
        placed.backward(placed.model(torch.tensor([ids])).logits.square().sum(), last=number == 2)
    norm = placed.clip_grad_norm(1e-3)
    placed.apply()
    return norm


def test_what_is_placed_can_be_trained(strategy, tiny_model):
    placed = place(strategy, tiny_model)
    before = values(placed)
    assert step(placed) > 1e-3
    assert any(not torch.equal(before[name], after) for name, after in values(placed).items())
    assert all(parameter.grad is None for parameter in placed.model.parameters())
    assert placed.all_sum(2.5) == 2.5


def test_gradients_are_clipped_to_the_norm_and_not_below(strategy, tiny_model):
    placed = place(strategy, tiny_model)
    placed.backward(placed.model(torch.tensor([[5, 6, 7]])).logits.square().sum(), last=True)
    norm = placed.clip_grad_norm(1e-3)
    assert norm > 1e-3 and placed.clip_grad_norm(1e9) == pytest.approx(1e-3, rel=1e-2)


def test_a_saved_state_goes_on_as_the_one_that_was_not_interrupted(strategy, tiny_model, tmp_path):
    straight, broken = place(strategy, tiny_model), place(strategy, tiny_model)
    step(straight), step(broken)
    broken.save(tmp_path)
    again = place(strategy, tiny_model)
    again.load(tmp_path)
    step(straight), step(again)
    for name, tensor in values(straight).items():
        torch.testing.assert_close(values(again)[name], tensor, atol=0, rtol=0)


def test_a_state_of_other_parameters_is_refused(strategy, tiny_model, tmp_path):
    placed = place(strategy, tiny_model)
    step(placed)
    placed.save(tmp_path)
    model = load_model(tiny_model, "float32").requires_grad_(False)
    model.model.norm.weight.requires_grad_(True)
    other = strategy.place(model, optimizer, "cpu")
    with pytest.raises(CheckpointError, match="does not fit"):
        other.load(tmp_path)


def test_only_what_is_trained_is_gathered_unless_asked(strategy, tiny_model):
    model = load_model(tiny_model, "float32").requires_grad_(False)
    model.model.norm.weight.requires_grad_(True)
    placed = strategy.place(model, optimizer, "cpu")
    assert set(placed.gathered_state()) == {"model.norm.weight"}
    assert set(model.state_dict()) == set(placed.gathered_state(trained_only=False))


def test_counts_that_an_optimizer_keeps_for_a_group_are_part_of_its_state():
    one, other = (torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.1) for _ in range(2))
    one.param_groups[0]["k"] = 7
    set_optimizer_tensors(other, optimizer_tensors(one), "checkpoint")
    assert other.param_groups[0]["k"] == 7 and list(optimizer_tensors(other)) == ["group.0.k"]
