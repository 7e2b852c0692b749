"""LISA: which layers are drawn, when, and what the optimizer holds of the others."""

from __future__ import annotations

import pytest
import torch

from lmray.adapters.full import Full
from lmray.adapters.lisa import Lisa
from lmray.artifacts.store import run_folder
from lmray.data.batch import collate
from lmray.errors import ConfigError
from lmray.methods.sft import Sft
from lmray.models.load import load_model
from lmray.optim.adamw_torch import AdamwTorch
from lmray.sharding.ddp import Ddp
from lmray.sharding.fsdp2 import Fsdp2
from lmray.sharding.single import Single
from lmray.testing.jobs import curve, run_here, tiny_job
from lmray.testing.tiny import tiny_model_folder
from lmray.train.learner import Learner
from lmray.train.plan import make_plan
from lmray.train.plan_steps import check_divided
from lmray.train.prepare import prepare


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    return tiny_model_folder(tmp_path_factory.mktemp("deep") / "model", num_hidden_layers=6)


@pytest.fixture
def job(deep, tiny_data, tmp_path):
    settings = {"name": "lisa", "lisa_activated_layers": 1, "lisa_interval_steps": 2}

    def make(name="lisa", **changes):
        return tiny_job(deep, tiny_data, tmp_path / "store", **{"name": name, "adapter": settings} | changes)

    return make


def drawn(model) -> list[int]:
    return [index for index, layer in enumerate(model.model.layers) if layer.mlp.up_proj.weight.requires_grad]


def test_layers_are_drawn_by_seed_and_interval_and_the_rest_is_always_trained(deep):
    adapter = Lisa(lisa_activated_layers=2, lisa_interval_steps=3)
    histories = []
    for seed in (0, 0, 1):
        model = adapter.attach(load_model(deep, "float32").requires_grad_(False), seed=seed)
        history = [drawn(model)]
        for step in range(1, 31):
            adapter.after_step(model, step)
            history.append(drawn(model))
            assert model.model.embed_tokens.weight.requires_grad and model.model.norm.weight.requires_grad
        histories.append(history)
    assert histories[0] == histories[1] != histories[2]
    assert all(len(layers) == 2 for layers in histories[0])
    changes = [step for step in range(1, 31) if histories[0][step] != histories[0][step - 1]]
    assert changes and all(step % 3 == 0 for step in changes)
    assert {layer for layers in histories[0] for layer in layers} == set(range(6))


def optimizer_bytes(job, adapter, steps: int) -> int:
    ready = prepare(job)
    model = adapter.attach(load_model(ready.model.folder, "float32").requires_grad_(False), seed=0)
    groups = adapter.parameter_groups(model)
    placed = Single().place(
        model, lambda _: AdamwTorch().make_optimizer(groups, learning_rate=1e-3, weight_decay=0.0), "cpu"
    )
    (objective,) = Sft().objectives()
    learner = Learner(placed, objective, max_grad_norm=1.0, adapter=adapter)
    for step in range(1, steps + 1):
        learner.step([collate(ready.rows[:2], pad_token_id=0)], learning_rate=1e-3, step=step)
    return sum(one.nbytes for facts in placed.optimizer.state.values() for one in facts.values() if one.dim())


def test_the_optimizer_holds_nothing_of_frozen_layers(job, deep):
    layer, total = (
        sum(one.numel() for one in part.parameters())
        for part in (load_model(deep, "float32").model.layers[0], load_model(deep, "float32"))
    )
    adapter = Lisa(lisa_activated_layers=1, lisa_interval_steps=2)
    full, lisa = (optimizer_bytes(job(), one, 7) for one in (Full(), adapter))
    assert full == 8 * total and lisa == 8 * (total - 5 * layer)
    plan = make_plan(job())
    assert plan.memory_bytes["optimizer"] == lisa and plan.memory_bytes["weights"] == 4 * total


@pytest.mark.parametrize("stop_at", [2, 3])
def test_a_run_resumes_exactly_at_and_between_draws(job, tmp_path, stop_at):
    straight, broken = job("straight"), job("broken")
    run_here(straight, tmp_path / "scratch")
    run_here(broken, tmp_path / "scratch", stop_at=stop_at)
    run_here(broken, tmp_path / "scratch")
    assert curve(broken) == curve(straight)
    one, two = (load_model(run_folder(run) / "model", "float32").state_dict() for run in (straight, broken))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_it_is_refused_where_weights_are_divided(job):
    with pytest.raises(ConfigError, match="`fsdp2` divides the weights, which `lisa` needs whole"):
        check_divided(job(), Fsdp2())
    with pytest.raises(ConfigError, match="which `adalora` needs whole"):
        check_divided(job(adapter="adalora"), Fsdp2())
    check_divided(job(adapter="full"), Fsdp2())
    check_divided(job(), Ddp())


def test_more_layers_than_there_are_is_refused(deep):
    with pytest.raises(ConfigError, match="is 7") as caught:
        Lisa(lisa_activated_layers=7).attach(load_model(deep, "float32"), seed=0)
    assert "1 to 6" in str(caught.value)
